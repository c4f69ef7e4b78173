"""`ServerArgs`: the configuration record of an engine. Every keyword of `Engine(...)` is a field here."""

# `opt` returns a dataclasses.field, which the linter cannot see.
# ruff: noqa: RUF009

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxgen.shown import shown


def opt(default: Any, help: str, *, choices: tuple[Any, ...] = (), kind: str = "str") -> Any:
    """A dataclass field that knows its flag. Kinds: str int float bool bool? ints strs json object."""
    metadata = {"help": help, "choices": choices, "kind": kind}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


# Older or alternative spellings, accepted as keyword and as flag.
ALIASES = {
    "stream_output": "incremental_streaming_output",
    "cuda_graph_bs": "cuda_graph_bs_decode",
    "cuda_graph_max_bs": "cuda_graph_max_bs_decode",
    "multi_item_scoring_delimiter": "enable_mis",
    "tensor_parallel_size": "tp_size",
    "data_parallel_size": "dp_size",
    "expert_parallel_size": "ep_size",
    "pipeline_parallel_size": "pp_size",
}
CLI_ALIASES = {"model": "model_path"}


@dataclass(frozen=True, init=False)
class ServerArgs:
    """Configuration of one engine; keyword only. `None` in an optional field means "derived".

    Raises `TypeError` for an unknown keyword, naming the nearest field. Values are checked by `validate()`;
    `server_args_defaults.resolve` fills in what depends on the platform.
    """

    # Model and tokenizer
    model_path: str = opt(None, "local directory or hub id of the checkpoint")
    tokenizer_path: str | None = opt(None, "tokenizer location; default: model_path")
    tokenizer_mode: str = opt(
        "auto", "fast tokenizer when available, or always the slow one", choices=("auto", "slow")
    )
    skip_tokenizer_init: bool = opt(False, "no tokenizer: ids in, ids out", kind="bool")
    load_format: str = opt("auto", "checkpoint format, or dummy for random weights")
    model_loader_extra_config: str = opt("{}", "JSON with loader options")
    trust_remote_code: bool = opt(False, "allow Python code of a tokenizer repository to run", kind="bool")
    context_length: int | None = opt(None, "tokens of context; default: the model's own", kind="int")
    is_embedding: bool = opt(False, "serve a causal LM as an embedding model", kind="bool")
    enable_multimodal: bool | None = opt(None, "force multimodal input on or off", kind="bool?")
    revision: str | None = opt(None, "hub revision")
    download_dir: str | None = opt(None, "where hub downloads are kept")
    dtype: str = opt("auto", "dtype of weights and activations")
    json_model_override_args: str = opt("{}", "JSON merged over the model's config.json")
    model_impl: str = opt("auto", "model implementation")
    chat_template: str | None = opt(None, "chat template, for chat front-ends only")
    completion_template: str | None = opt(None, "completion template, for front-ends only")
    served_model_name: str | None = opt(None, "name reported to clients; default: model_path")
    weight_version: str = opt("default", "echoed in every meta_info")
    preferred_sampling_params: dict[str, Any] | None = opt(None, "defaults under each request's", kind="json")
    sampling_defaults: str = opt("model", "sampling defaults of chat front-ends", choices=("model", "openai"))
    allow_auto_truncate: bool = opt(False, "cut over-long prompts instead of refusing them", kind="bool")
    enable_tokenizer_batch_encode: bool = opt(False, "one tokenizer call per list of prompts", kind="bool")
    enable_dynamic_batch_tokenizer: bool = opt(False, "micro-batched asynchronous tokenisation", kind="bool")
    dynamic_batch_tokenizer_batch_size: int = opt(32, "prompts per micro-batch", kind="int")
    dynamic_batch_tokenizer_batch_timeout: float = opt(
        0.002, "seconds to wait for a micro-batch", kind="float"
    )
    disable_tokenizer_batch_decode: bool = opt(False, "detokenise row by row", kind="bool")

    # Memory and scheduling
    mem_fraction_static: float | None = opt(None, "(weights + KV pool) / device memory", kind="float")
    max_running_requests: int | None = opt(None, "requests that decode at the same time", kind="int")
    max_queued_requests: int | None = opt(None, "bound of the waiting queue; default: none", kind="int")
    max_total_tokens: int | None = opt(None, "KV pool size in tokens", kind="int")
    max_prefill_tokens: int = opt(16384, "prefill tokens per step when chunking is off", kind="int")
    prefill_max_requests: int | None = opt(None, "prompts per prefill step", kind="int")
    chunked_prefill_size: int | None = opt(None, "prefill tokens per step; <= 0: no chunking", kind="int")
    enable_mixed_chunk: bool = opt(False, "decode rows ride along with prefill chunks", kind="bool")
    schedule_policy: str = opt("lpm", "order in which waiting requests are admitted")
    schedule_conservativeness: float = opt(1.0, "scales the estimate of tokens still to come", kind="float")
    page_size: int | None = opt(
        None, "token positions per KV page; default: 64 on GPU, 16 on CPU", kind="int"
    )
    disable_radix_cache: bool = opt(False, "no prefix reuse", kind="bool")
    radix_eviction_policy: str = opt("lru", "which unused cached prefix goes first")
    disable_overlap_schedule: bool = opt(False, "strict alternation of host and device", kind="bool")
    num_continuous_decode_steps: int | None = opt(
        None, "decode steps per launch; default: by model size and batch", kind="int"
    )
    stream_interval: int = opt(1, "tokens per streamed chunk", kind="int")
    incremental_streaming_output: bool = opt(False, "streamed chunks hold only what is new", kind="bool")
    retraction_policy: str = opt("length", "which running request goes first", choices=("length", "priority"))
    enable_priority_scheduling: bool = opt(False, "order the queue by priority", kind="bool")
    schedule_low_priority_values_first: bool = opt(False, "a smaller number is more urgent", kind="bool")
    priority_scheduling_preemption_threshold: int = opt(10, "difference above which to preempt", kind="int")
    disable_priority_preemption: bool = opt(False, "priority orders but never preempts", kind="bool")
    default_priority_value: int | None = opt(None, "priority of requests without one", kind="int")
    abort_on_priority_when_disabled: bool = opt(
        False, "refuse a priority instead of ignoring it", kind="bool"
    )
    kv_cache_dtype: str = opt("auto", "dtype of the KV cache")
    enable_memory_saver: bool = opt(False, "let release_memory_occupation free memory", kind="bool")
    enable_weights_cpu_backup: bool = opt(False, "keep a host copy of released weights", kind="bool")
    cpu_offload_gb: int = opt(0, "GB of weights kept on the host", kind="int")
    scheduler_recv_interval: int = opt(1, "steps between looks at the request queue", kind="int")
    sleep_on_idle: bool = opt(False, "sleep while there is nothing to do", kind="bool")
    prefill_decode_interval: int | None = opt(None, "decode steps between prefill steps", kind="int")
    enable_streaming_session: bool = opt(False, "allow open_session(streaming=True)", kind="bool")

    # Parallelism and devices
    device: str | None = opt(None, "cuda or cpu; default: what is found")
    tp_size: int = opt(1, "devices that share each layer (tensor parallel)", kind="int")
    dp_size: int = opt(1, "independent replicas", kind="int")
    ep_size: int = opt(1, "devices that share the experts", kind="int")
    pp_size: int = opt(1, "pipeline stages", kind="int")
    attn_dp_size: int = opt(1, "data parallel width of attention", kind="int")
    enable_dp_attention: bool = opt(False, "data parallel attention", kind="bool")
    enable_dp_lm_head: bool = opt(False, "data parallel LM head", kind="bool")
    attn_cp_size: int = opt(1, "context parallel width of attention", kind="int")
    base_gpu_id: int = opt(0, "first device", kind="int")
    gpu_id_step: int = opt(1, "stride between devices", kind="int")
    load_balance_method: str = opt("auto", "how requests are spread over replicas")
    nnodes: int = opt(1, "hosts", kind="int")
    node_rank: int = opt(0, "index of this host", kind="int")
    dist_init_addr: str | None = opt(None, "address of the first host")
    dist_timeout: int | None = opt(None, "seconds to wait for the other hosts", kind="int")
    nccl_port: int | None = opt(None, "port for the first exchange between hosts", kind="int")
    random_seed: int | None = opt(None, "root of all unseeded sampling; default: random", kind="int")
    mesh: Any = opt(None, "jax.sharding.Mesh; overrides tp_size and base_gpu_id", kind="object")

    # Runtime, kernels, compilation
    attention_backend: str | None = opt(None, "pallas or xla; other names choose automatically")
    prefill_attention_backend: str | None = opt(None, "the same for prefill only")
    decode_attention_backend: str | None = opt(None, "the same for decode only")
    sampling_backend: str | None = opt(None, "accepted; there is one sampling implementation")
    disable_cuda_graph: bool = opt(False, "compile buckets on demand instead of at start", kind="bool")
    cuda_graph_bs_decode: list[int] | None = opt(None, "decode buckets (lanes)", kind="ints")
    cuda_graph_max_bs_decode: int | None = opt(None, "largest decode bucket compiled at start", kind="int")
    cuda_graph_bs_prefill: list[int] | None = opt(None, "prefill buckets (packed tokens)", kind="ints")
    cuda_graph_max_bs_prefill: int | None = opt(None, "largest prefill bucket compiled at start", kind="int")
    disable_cuda_graph_padding: bool = opt(False, "exact shapes only", kind="bool")
    disable_decode_cuda_graph: bool = opt(False, "compile decode buckets on demand", kind="bool")
    disable_prefill_cuda_graph: bool = opt(False, "compile prefill buckets on demand", kind="bool")
    watchdog_timeout: float = opt(300.0, "seconds after which a single step is fatal", kind="float")
    soft_watchdog_timeout: float | None = opt(
        None, "seconds after which diagnostics are written", kind="float"
    )
    enable_fp32_lm_head: bool = opt(False, "logits computed in float32", kind="bool")
    gc_threshold: list[int] | None = opt(None, "1 to 3 ints for gc.set_threshold", kind="ints")
    custom_weight_loader: list[str] | None = opt(None, "import paths usable as load_format", kind="strs")
    compilation_cache_dir: str | None = opt(None, "persistent compilation cache; empty: off")
    background_compile: bool | None = opt(
        None, "compile the rarer start-up steps while serving; default: on a GPU", kind="bool?"
    )
    strict_compile: bool = opt(False, "fail when a request compiles something after start", kind="bool")

    # LoRA
    enable_lora: bool | None = opt(None, "accept LoRA adapters", kind="bool?")
    lora_paths: Any = opt(None, "adapters loaded at start: path or name=path", kind="strs")
    max_lora_rank: int | None = opt(None, "largest adapter rank", kind="int")
    lora_target_modules: list[str] | None = opt(None, "modules adapters may change, or all", kind="strs")
    max_loras_per_batch: int = opt(8, "distinct adapters per batch", kind="int")
    max_loaded_loras: int | None = opt(None, "adapters kept on the host", kind="int")
    lora_eviction_policy: str = opt("lru", "which adapter leaves the device", choices=("lru", "fifo"))
    lora_backend: str = opt("csgmv", "accepted; tuning only")
    max_lora_chunk_size: int = opt(16, "accepted; tuning only", kind="int")
    enable_lora_overlap_loading: bool | None = opt(None, "accepted; tuning only", kind="bool?")
    lora_drain_wait_threshold: float = opt(0.0, "accepted; tuning only", kind="float")

    # Speculative decoding
    speculative_algorithm: str | None = opt(None, "drafting algorithm")
    speculative_draft_model_path: str | None = opt(None, "draft model")
    speculative_num_steps: int | None = opt(None, "draft steps", kind="int")
    speculative_eagle_topk: int | None = opt(None, "draft branches", kind="int")
    speculative_num_draft_tokens: int | None = opt(None, "tokens verified at once", kind="int")
    speculative_accept_threshold_single: float = opt(1.0, "1.0 keeps the distribution exact", kind="float")
    speculative_accept_threshold_acc: float = opt(1.0, "1.0 keeps the distribution exact", kind="float")

    # Quantisation
    quantization: str | None = opt(
        None,
        "8-bit weights in the layers: fp8, w8a8_int8 (products in 8 bits); int8, w8a16_fp8 (weights only)",
    )
    quantization_param_path: str | None = opt(None, "JSON with KV scales")

    # Logging and metrics
    log_level: str = opt("info", "level of the jaxgen logger")
    log_requests: bool = opt(False, "log requests", kind="bool")
    log_requests_level: int = opt(2, "how much of each request is logged", choices=(0, 1, 2, 3), kind="int")
    log_requests_format: str = opt("text", "format of the request log", choices=("text", "json"))
    log_requests_target: list[str] | None = opt(None, "where the request log goes", kind="strs")
    decode_log_interval: int = opt(40, "decode steps between status lines", kind="int")
    enable_metrics: bool = opt(False, "timing keys in meta_info, and counters", kind="bool")
    enable_request_time_stats_logging: bool = opt(False, "log the times of each request", kind="bool")
    show_time_cost: bool = opt(False, "log the times of start-up phases", kind="bool")
    crash_dump_folder: str | None = opt(None, "where diagnostics of a crash go")
    enable_trace: bool = opt(False, "export traces", kind="bool")
    otlp_traces_endpoint: str | None = opt(None, "where traces go")

    # Structured output, determinism, feature switches
    grammar_backend: str | None = opt(None, "grammar engine")
    constrained_json_whitespace_pattern: str | None = opt(None, "regex of whitespace in JSON output")
    constrained_json_disable_any_whitespace: bool = opt(False, "compact JSON only", kind="bool")
    constrained_json_max_whitespace_cnt: int | None = opt(
        None, "longest run of whitespace in JSON", kind="int"
    )
    enable_deterministic_inference: bool = opt(False, "results independent of batching", kind="bool")
    enable_return_hidden_states: bool = opt(False, "allow return_hidden_states", kind="bool")
    return_hidden_states_mode: str | None = opt(None, "last: only the final vector; full: both")
    enable_custom_logit_processor: bool = opt(False, "allow custom_logit_processor", kind="bool")
    enable_mis: bool = opt(False, "fused multi-item scoring", kind="bool")
    limit_mm_data_per_request: dict[str, int] | None = opt(None, 'for example {"image": 1}', kind="json")
    mm_process_config: dict[str, Any] = opt({}, "processor overrides per modality", kind="json")

    def __init__(self, **options: Any) -> None:
        resolved = resolve_names(options)
        if resolved.get("model_path") is None:
            raise TypeError("model_path is required: a local directory or a hub id")
        for spec in dataclasses.fields(self):
            if spec.name in resolved:
                value = resolved[spec.name]
            else:
                value = default_of(spec)
            object.__setattr__(self, spec.name, _from_json(spec, value))

    def validate(self) -> None:
        """Check every value that can be checked without a device or a checkpoint.

        Raises `ValueError` naming the field, `TypeError` for a wrong structure, `NotImplementedError` for an
        option that is accepted by name only. Logs a warning for values that are accepted and replaced.
        """
        from jaxgen.server_args_checks import validate

        validate(self)

    @staticmethod
    def add_cli_args(parser: argparse.ArgumentParser) -> None:
        """Add one flag per field: the field's name with `-` for `_`, and the aliases."""
        from jaxgen.server_args_cli import add_cli_args

        add_cli_args(parser)

    @classmethod
    def from_cli_args(cls, namespace: argparse.Namespace) -> ServerArgs:
        """The record for parsed flags. Attributes of the namespace that are not fields are left alone."""
        return cls(**{name: getattr(namespace, name) for name in FIELDS if hasattr(namespace, name)})


FIELDS: Mapping[str, dataclasses.Field[Any]] = {spec.name: spec for spec in dataclasses.fields(ServerArgs)}


def default_of(spec: dataclasses.Field[Any]) -> Any:
    return spec.default if spec.default_factory is dataclasses.MISSING else spec.default_factory()


def resolve_names(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options under the current names. Raises `TypeError` for an unknown name or two spellings of one."""
    resolved: dict[str, Any] = {}
    for name, value in options.items():
        target = ALIASES.get(name, name)
        if target not in FIELDS:
            raise TypeError(f"unknown option {shown(name)}{nearest_field(name)}")
        if target in resolved:
            raise TypeError(f"option {target!r} is given twice, also as {name!r}")
        resolved[target] = value
    return resolved


def nearest_field(name: str) -> str:
    close = difflib.get_close_matches(name, [*FIELDS, *ALIASES], n=1, cutoff=0.0) if len(name) < 100 else []
    suffix = f"; the nearest known field is {close[0]!r}" if close else ""
    return f"{suffix}. If it exists in SGLang, it has no counterpart here"


def _from_json(spec: dataclasses.Field[Any], value: Any) -> Any:
    if spec.metadata["kind"] != "json" or not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise ValueError(f"{spec.name} is not valid JSON: {error}") from None
