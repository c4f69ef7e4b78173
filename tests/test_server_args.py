"""The configuration record: keywords, flags, validation and derived defaults."""

import argparse
import dataclasses
import logging

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgen.server_args import ALIASES, FIELDS, ServerArgs
from jaxgen.server_args_checks import AVAILABLE
from jaxgen.server_args_defaults import (
    default_chunked_prefill_size,
    default_max_decode_bucket,
    default_max_running_requests,
    request_limits,
    resolve,
)

GIB = 1024  # MiB


def args(**options):
    return ServerArgs(model_path="m", **options)


def parse(*flags):
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    return ServerArgs.from_cli_args(parser.parse_args(["--model-path", "m", *flags]))


def test_the_defaults_are_valid_and_survive_a_round_trip():
    args().validate()
    assert ServerArgs(**dataclasses.asdict(args())) == args()
    assert parse() == args()


@pytest.mark.parametrize("options", [{}, {"model_path": None}])
def test_the_model_is_required(options):
    with pytest.raises(TypeError, match="model_path"):
        ServerArgs(**options)


def test_arguments_are_keyword_only():
    with pytest.raises(TypeError):
        ServerArgs("m")


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("tp_sise", "tp_size"), ("mem_fraction", "mem_fraction_static"), ("cuda_graph_bss", "cuda_graph_bs")],
)
def test_an_unknown_keyword_names_the_nearest_field(wrong, right):
    with pytest.raises(TypeError, match=right) as caught:
        args(**{wrong: 1})
    assert wrong in str(caught.value)


def test_any_unknown_keyword_names_some_field():
    with pytest.raises(TypeError, match="nearest known field"):
        args(zzzz=1)


@pytest.mark.parametrize(("old", "new"), ALIASES.items())
def test_older_names_work_as_keyword_and_as_flag(old, new):
    value = {"bool": True, "ints": [1, 2], "int": 1}[FIELDS[new].metadata["kind"]]
    assert getattr(args(**{old: value}), new) == value
    flag = "--" + old.replace("_", "-")
    parts = (
        [] if value is True else [str(part) for part in value] if isinstance(value, list) else [str(value)]
    )
    assert getattr(parse(flag, *parts), new) == value
    with pytest.raises(TypeError, match="twice"):
        args(**{old: value, new: value})


def test_every_field_but_the_mesh_has_a_flag():
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    flags = parser.format_help()
    for name in FIELDS:
        assert ("--" + name.replace("_", "-") in flags) == (name != "mesh")


def test_flags_of_all_kinds():
    result = parse(
        *("--tp-size", "2", "--mem-fraction-static", "0.5", "--disable-radix-cache"),
        *("--cuda-graph-bs-decode", "1", "2", "4", "--preferred-sampling-params", '{"top_p": 0.5}'),
        *("--dtype", "bfloat16", "--no-enable-mixed-chunk", "--stream-interval", "3"),
    )
    expected = args(
        tp_size=2,
        mem_fraction_static=0.5,
        disable_radix_cache=True,
        cuda_graph_bs_decode=[1, 2, 4],
        preferred_sampling_params={"top_p": 0.5},
        dtype="bfloat16",
        stream_interval=3,
    )
    assert result == expected


def test_model_has_a_short_flag_and_other_arguments_of_the_parser_are_left_alone():
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompts", type=int)
    ServerArgs.add_cli_args(parser)
    namespace = parser.parse_args(["--model", "x", "--prompts", "3"])
    assert ServerArgs.from_cli_args(namespace) == ServerArgs(model_path="x")


def test_bad_flags_stop_the_parser(capsys):
    for flags in (["--preferred-sampling-params", "{"], ["--tp-size", "x"], ["--tokenizer-mode", "quick"]):
        with pytest.raises(SystemExit):
            parse(*flags)
        assert flags[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        {"chunked_prefill_size": 100, "page_size": 16},
        {"page_size": 7},
        {"page_size": 256},
        {"served_model_name": "a:b"},
        {"enable_priority_scheduling": True},
        {"enable_priority_scheduling": True, "schedule_policy": "random"},
        {"retraction_policy": "priority"},
        {"retraction_policy": "oldest"},
        {"schedule_conservativeness": -0.1},
        {"schedule_conservativeness": float("nan")},
        {"max_loras_per_batch": 0},
        {"enable_lora": True},
        {"enable_lora": True, "max_lora_rank": 8},
        {"lora_paths": ["a"], "lora_target_modules": ["all", "q_proj"]},
        {"max_loaded_loras": 1},
        {"enable_tokenizer_batch_encode": True, "enable_dynamic_batch_tokenizer": True},
        {"gc_threshold": []},
        {"gc_threshold": [1, 2, 3, 4]},
        {"gc_threshold": 700},
        {"return_hidden_states_mode": "first"},
        {"schedule_policy": "lifo"},
        {"dtype": "int3"},
        {"load_format": "zip"},
        {"kv_cache_dtype": "fp4"},
        {"quantization_param_path": "scales.json"},
        {"radix_eviction_policy": "mru"},
        {"log_level": "loud"},
        {"log_requests_level": 4},
        {"device": "tpu"},
        {"tokenizer_mode": "quick"},
        {"mem_fraction_static": 0.0},
        {"mem_fraction_static": 1.5},
        {"mem_fraction_static": "0.5"},
        {"tp_size": 0},
        {"tp_size": True},
        {"tp_size": 1.0},
        {"base_gpu_id": -1},
        {"gpu_id_step": 0},
        {"stream_interval": 0},
        {"max_running_requests": 0},
        {"context_length": -5},
        {"cuda_graph_bs_decode": []},
        {"cuda_graph_bs_decode": [0, 1]},
        {"cuda_graph_bs_decode": [1.0]},
        {"nnodes": 2},
        {"disable_radix_cache": 1},
        {"weight_version": 3},
        {"json_model_override_args": "{"},
        {"json_model_override_args": "[1]"},
        {"preferred_sampling_params": {"top_p": 2}},
        {"preferred_sampling_params": {"topp": 1}},
        {"preferred_sampling_params": [1]},
        {"attention_backend": 1},
    ],
    ids=str,
)
def test_bad_configurations_are_value_errors_that_name_a_field(options):
    record = args(**options)
    with pytest.raises(ValueError) as caught:
        record.validate()
    assert any(name in str(caught.value) for name in options)


def test_processor_options_must_be_dicts_by_modality():
    for value in ({"smell": {}}, {"image": 1}):
        with pytest.raises(TypeError, match="mm_process_config"):
            args(mm_process_config=value).validate()


def test_json_given_as_text_is_read_and_checked():
    assert args(preferred_sampling_params='{"top_k": 3}').preferred_sampling_params == {"top_k": 3}
    with pytest.raises(ValueError, match="preferred_sampling_params"):
        args(preferred_sampling_params="{")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dp_size", 2),
        ("pp_size", 2),
        ("ep_size", 2),
        ("is_embedding", True),
        ("quantization", "awq"),
        ("speculative_algorithm", "EAGLE"),
        ("lora_paths", ["a=b"]),
        ("enable_custom_logit_processor", True),
        ("enable_memory_saver", True),
        ("enable_mis", True),
        ("model_loader_extra_config", '{"a": 1}'),
        ("schedule_policy", "hrrn"),
        ("radix_eviction_policy", "tlru"),
        ("kv_cache_dtype", "fp8_e5m2"),
        ("load_format", "sharded_state"),
    ],
)
def test_options_accepted_by_name_only_say_so(name, value):
    with pytest.raises(NotImplementedError, match=name):
        args(**{name: value}).validate()


def test_the_table_of_unavailable_options_allows_their_defaults():
    assert set(AVAILABLE) <= set(FIELDS)
    for name, allowed in AVAILABLE.items():
        for value in allowed:
            args(**{name: value}).validate()


@pytest.mark.parametrize(
    "options",
    [
        {"page_size": 1},
        {"chunked_prefill_size": -1, "page_size": 32},
        {"enable_priority_scheduling": True, "schedule_policy": "lof", "retraction_policy": "priority"},
        {"scheduler_recv_interval": 5, "sleep_on_idle": True, "load_balance_method": "total_tokens"},
        {"chat_template": "x", "sampling_defaults": "openai", "disable_tokenizer_batch_decode": True},
        {"lora_backend": "triton", "max_lora_chunk_size": 64, "enable_lora": False},
        {"device": "cuda:0"},
        {"quantization": "unquant", "grammar_backend": "none"},
    ],
    ids=str,
)
def test_inert_and_equivalent_options_are_accepted(options):
    args(**options).validate()


@pytest.mark.parametrize("name", ["attention_backend", "decode_attention_backend", "sampling_backend"])
def test_foreign_backends_warn_and_are_accepted(name, caplog):
    with caplog.at_level(logging.WARNING, logger="jaxgen"):
        args(**{name: "flashinfer"}).validate()
    assert name in caplog.text
    caplog.clear()
    args(attention_backend="pallas", decode_attention_backend="xla").validate()
    assert not caplog.records


@pytest.mark.parametrize(
    ("memory_gib", "chunk", "lanes", "lanes_wide"),
    [
        (None, 4096, 160, 160),
        (16, 2048, 8, 8),
        (20, 4096, 48, 160),
        (24, 4096, 48, 160),
        (35, 4096, 32, 160),
        (60, 8192, 512, 512),
        (80, 8192, 512, 512),
        (160, 16384, 512, 512),
    ],
)
def test_defaults_follow_device_memory(memory_gib, chunk, lanes, lanes_wide):
    memory = None if memory_gib is None else memory_gib * GIB
    assert default_chunked_prefill_size(memory) == chunk
    assert default_max_decode_bucket(memory) == lanes
    assert default_max_decode_bucket(memory, tp_size=4) == lanes_wide
    if memory is not None:
        just_below = default_chunked_prefill_size(memory - 1)
        assert just_below == (chunk if memory_gib not in (20, 60, 160) else chunk // 2)


def test_resolution_fills_in_what_depends_on_the_platform():
    on_gpu = resolve(args(device="cuda:1"), "gpu", 80 * GIB)
    assert (on_gpu.page_size, on_gpu.chunked_prefill_size, on_gpu.cuda_graph_max_bs_decode) == (64, 8192, 512)
    assert (on_gpu.tokenizer_path, on_gpu.served_model_name, on_gpu.device) == ("m", "m", "cuda")
    on_cpu = resolve(args(page_size=1, max_running_requests=4), "cpu")
    assert (on_cpu.page_size, on_cpu.chunked_prefill_size, on_cpu.cuda_graph_max_bs_decode) == (16, 4096, 4)
    assert resolve(args(chunked_prefill_size=-1), "cpu").chunked_prefill_size == -1
    assert resolve(args(cuda_graph_bs=[1, 3]), "cpu").cuda_graph_max_bs_decode == 3
    with pytest.raises(ValueError, match="page_size"):
        resolve(args(chunked_prefill_size=48), "gpu", 80 * GIB)


def test_a_cache_aware_policy_without_cache_becomes_fcfs():
    assert resolve(args(disable_radix_cache=True), "cpu").schedule_policy == "fcfs"
    assert resolve(args(disable_radix_cache=True, schedule_policy="lof"), "cpu").schedule_policy == "lof"
    assert resolve(args(), "cpu").schedule_policy == "lpm"


def test_running_requests_and_lengths_fit_the_pool():
    assert default_max_running_requests(100_000, 1000) == 4096
    assert default_max_running_requests(10_000, 32_768) == 2048
    assert default_max_running_requests(100, 32_768) == 50
    assert default_max_running_requests(100, 32_768, explicit=80) == 50
    assert default_max_running_requests(100, 32_768, explicit=3) == 3
    assert request_limits(4096, 100_000) == (4095, 4090)
    assert request_limits(4096, 512) == (511, 506)


junk = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.integers(), max_size=4),
)


@settings(max_examples=1500, deadline=None)
@given(st.sampled_from(sorted(set(FIELDS) - {"model_path", "mesh", "lora_paths"})), junk)
def test_any_value_of_any_field_is_accepted_or_refused_by_name(name, value):
    try:
        resolve(args(**{name: value}), "cpu")
    except (ValueError, NotImplementedError) as error:
        assert name in str(error)
