"""An engine over several simulated devices gives what one device gives."""

import jax
import pytest
from jax.sharding import AxisType, Mesh
from tiny_engine import GOLDEN, golden_cases, greedy
from workload import assert_complete, assert_idle, assert_same, internal_state, strict_engine, workload

from jaxgen import ServerArgs
from jaxgen.engine_config import pick_devices

# (fixture, tp_size, vocabulary and kv heads divide): llama3 has 9 query heads in 3 groups, llama2 4 in 4.
WIDTHS = [("llama2", 2), ("llama2", 4), ("llama3", 3)]


def engine_of(family, tp_size=1, **options):
    path = str(GOLDEN / family)
    return strict_engine(model_path=path, tp_size=tp_size, enable_return_hidden_states=True, **options)


@pytest.fixture(scope="module")
def references():
    results = {}
    for family in ("llama2", "llama3"):
        with engine_of(family) as engine:
            results[family] = engine.generate(**workload())
    return results


@pytest.mark.parametrize(("family", "tp_size"), WIDTHS)
def test_results_equal_those_of_one_device(references, family, tp_size):
    cases = golden_cases(family)
    with engine_of(family, tp_size) as engine:
        assert internal_state(engine)["world_size"] == tp_size
        for array in engine._runner.kv:
            assert len(array.sharding.device_set) == tp_size
            assert array.addressable_shards[0].data.size * tp_size == array.size
        results = engine.generate(
            input_ids=[case["prompt_ids"] for case in cases], sampling_params=greedy(32), return_logprob=True
        )
        assert [result["output_ids"] for result in results] == [case["greedy_ids"] for case in cases]
        for result, case in zip(results, cases):
            got = [entry[0] for entry in result["meta_info"]["output_token_logprobs"]]
            assert got == pytest.approx(case["greedy_logprobs"], abs=1e-4)
        engine.flush_cache()
        for result, expected in zip(engine.generate(**workload()), references[family], strict=True):
            assert_complete(result)
            assert_same(result, expected)
        assert_idle(engine)
        arrays = [*engine._runner.weights, *engine._runner.kv]
    assert all(array.is_deleted() for array in arrays)


def test_a_mesh_of_the_callers_devices_overrides_tp_size():
    devices = jax.devices()[2:4]
    mesh = Mesh(devices, ("tensor",), axis_types=(AxisType.Auto,))
    case = golden_cases("llama2")[0]
    with engine_of("llama2", mesh=mesh) as engine:
        assert engine._runner.kv[0].sharding.device_set == set(devices)
        result = engine.generate(input_ids=case["prompt_ids"], sampling_params=greedy(32))
        assert result["output_ids"] == case["greedy_ids"]


def test_base_gpu_id_and_step_choose_the_devices():
    def chosen(**options):
        return pick_devices(ServerArgs(model_path="m", **options))

    devices = jax.devices()
    assert chosen(tp_size=2, base_gpu_id=1, gpu_id_step=2) == [devices[1], devices[3]]
    assert chosen(base_gpu_id=2) == [devices[2]]
    with pytest.raises(ValueError, match="gpu_id_step"):
        chosen(tp_size=3, gpu_id_step=2)


def test_a_width_that_does_not_divide_is_refused_by_name():
    with pytest.raises(ValueError, match="does not divide"):
        engine_of("llama3", 2)
