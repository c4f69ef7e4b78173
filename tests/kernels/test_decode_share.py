"""How the decode kernel divides a lane's KV blocks among its splits."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas.decode_config import BUFFER_BYTES, buffer_bytes, default_config
from kernels_pallas.decode_memory import Share, longest_first

BLOCK = 64


@settings(max_examples=40, deadline=None)
@given(
    length=st.integers(0, 3000),
    window=st.none() | st.integers(1, 3000),
    num_splits=st.sampled_from([1, 2, 5, 8, 16, 33]),
)
def test_splits_take_every_visible_block_once_and_the_owner_the_last(length, window, num_splits):
    shares = [Share.of(jnp.int32(length), window, jnp.int32(i), num_splits, BLOCK) for i in range(num_splits)]
    active = int(shares[0].active)
    assert 1 <= active <= num_splits
    taken = {}
    for split, share in enumerate(shares[:active]):
        for i in range(int(share.trips)):
            assert taken.setdefault(int(share.block(i)), split) == split
    first = 0 if window is None else max(length - window, 0)
    blocks = list(range(first // BLOCK, -(-length // BLOCK)))
    assert sorted(taken) == blocks
    owners = [split for split, share in enumerate(shares[:active]) if share.owner]
    assert owners == [taken[blocks[-1]] if blocks else 0]
    trips = [int(share.trips) for share in shares[:active]]
    assert max(trips) - min(trips) <= 1


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 900), min_size=1, max_size=20),
    window=st.none() | st.integers(1, 900),
    page_size=st.sampled_from([16, 64, 128]),
)
def test_longest_lanes_come_first_with_the_pages_of_their_first_block(lengths, window, page_size):
    table = np.arange(len(lengths) * 60, dtype=np.int32).reshape(-1, 60)
    operands = jnp.asarray(lengths, jnp.int32), jnp.asarray(table)
    rows = np.asarray(longest_first(*operands, window, BLOCK, page_size)).tolist()
    order = sorted(range(len(lengths)), key=lambda lane: -lengths[lane])
    assert [row[0] for row in rows] == order
    for lane, length, *ids in rows:
        assert length == lengths[lane]
        first = 0 if window is None else max(length - window, 0) // BLOCK * BLOCK
        pages = [(first + i) // page_size for i in range(0, BLOCK, min(page_size, BLOCK))]
        seen = [page if page <= (length - 1) // page_size else pages[0] for page in pages]
        assert ids == table[lane, seen].tolist()


@pytest.mark.parametrize(("num_kv_heads", "group", "head_dim"), [(2, 7, 64), (8, 4, 128), (8, 16, 256)])
@pytest.mark.parametrize("num_lanes", [1, 8, 64, 512])
def test_default_configuration_fits_in_shared_memory(num_lanes, num_kv_heads, group, head_dim):
    config = default_config(num_lanes, num_kv_heads, group, head_dim, 8192)
    assert buffer_bytes(config, group, head_dim) <= BUFFER_BYTES
    assert config.num_splits > 1 or num_lanes * num_kv_heads > 66


def test_a_lane_alone_merges_in_a_cluster_unless_it_may_be_long():
    assert default_config(1, 8, 4, 128, 8192).clustered
    assert not default_config(1, 8, 4, 128, 131072).clustered
    assert not default_config(1, 8, 4, 128, 64).clustered


def test_long_lanes_come_first_where_blocks_of_threads_come_in_a_few_waves():
    assert default_config(64, 8, 4, 128, 8192).longest_first
    assert not default_config(16, 8, 4, 128, 8192).longest_first
    assert not default_config(256, 8, 4, 128, 8192).longest_first
    assert not default_config(256, 2, 7, 64, 8192).longest_first
