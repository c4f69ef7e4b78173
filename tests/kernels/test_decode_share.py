"""How the decode kernel divides a lane's KV blocks among its splits."""

import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas.decode_config import BUFFER_BYTES, buffer_bytes, default_config
from kernels_pallas.decode_memory import Share

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
