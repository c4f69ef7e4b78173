"""Lanes that begin with the same pages may have them read once for all; nothing a caller sees depends on it."""

import jax.numpy as jnp
import pytest
from tiny_engine import CONTEXT, PAGE, greedy, prompt_of
from workload import assert_idle, strict_engine

from jaxgen.execution import common_prefix, step_set
from jaxgen.execution.programs import DECODE
from jaxgen.execution.sampler import PLAIN, Variant
from jaxgen.layers import attention


@pytest.fixture
def sharing(monkeypatch):
    """What a Hopper GPU does, where any two lanes with a page in common are worth it.

    The steps take the common pages from the first lane, as the kernel does.
    """
    decode = attention.paged_decode_update

    def decode_by_first_table(qkv, k_pages, v_pages, page_table, *operands, common_prefix, **options):
        if common_prefix is not None:
            column = jnp.arange(page_table.shape[1])
            is_common = column < common_prefix // k_pages.shape[2]
            page_table = jnp.where(is_common, page_table[:1], page_table)
        return decode(qkv, k_pages, v_pages, page_table, *operands, **options)

    always = common_prefix.PrefixSharing(PAGE, token_bytes=common_prefix.LEAST_BYTES, most_tokens=CONTEXT)
    monkeypatch.setattr(common_prefix, "LEAST_LANES", 2)
    monkeypatch.setattr(common_prefix.PrefixSharing, "of", lambda *_: always)
    monkeypatch.setattr(attention, "paged_decode_update", decode_by_first_table)
    variants = (PLAIN, Variant(True, True, 20))
    monkeypatch.setattr(step_set, "startup_variants", lambda platform, vocab_size: variants)


def test_requests_with_a_common_prefix_are_answered_as_alone(sharing):
    prefix = prompt_of(40)
    prompts = [prefix + own for own in ([1, 2, 3], [4], [5] * 30, [6, 7])]
    others = [prompt_of(50)[::-1], prefix[:20] + [3] * 9]
    params = [greedy(n) for n in (12, 3, 20, 9, 15, 15)]
    with strict_engine() as engine:
        alone = [engine.generate(input_ids=p, sampling_params=s) for p, s in zip(prompts + others, params)]
        commons, pack = [], engine._runner._launch_decode

        def launch(plan):
            launched = pack(plan)
            decode = engine._runner._decode
            commons.append((len(plan.lanes), decode.common, decode.key.shared))
            return launched

        engine._runner._launch_decode = launch
        together = engine.generate(input_ids=prompts, sampling_params=params[:4])
        assert [r["output_ids"] for r in together] == [r["output_ids"] for r in alone[:4]]
        assert all(common == 32 and shared for lanes, common, shared in commons if lanes > 1)
        assert {lanes for lanes, *_ in commons} > {1, 4}

        commons.clear()
        mixed = engine.generate(input_ids=prompts + others, sampling_params=params)
        assert [r["output_ids"] for r in mixed] == [r["output_ids"] for r in alone]
        assert not commons[0][2]  # all six have nothing in common
        assert commons[0][0] == 6
        assert_idle(engine)


def test_log_probabilities_and_samples_are_served_beside(sharing):
    prompts = [[*prompt_of(40), i] for i in range(3)]
    with strict_engine() as engine:
        plain = engine.generate(input_ids=prompts, sampling_params=greedy(6))
        scored = engine.generate(input_ids=prompts, sampling_params=greedy(6), return_logprob=True)
        assert [r["output_ids"] for r in scored] == [r["output_ids"] for r in plain]
        samples = engine.generate(input_ids=prompt_of(33), sampling_params={**greedy(6), "n": 4})
        assert len({tuple(r["output_ids"]) for r in samples}) == 1


def test_a_start_compiles_steps_for_a_common_prefix_only_where_a_kernel_reads_it_once():
    with strict_engine() as engine:
        assert not any(key.shared for key in engine._runner.steps if key.kind == DECODE)
