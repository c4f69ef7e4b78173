"""Typed reading of a Hugging Face config.json, so that a mistake in it is reported by its key."""

from collections.abc import Mapping
from typing import Any

from jaxgen.layers.rope import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    RopeConfig,
    RopeScaling,
    YarnScaling,
    yarn_attention_factor,
)

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")
_REQUIRED = object()


class HFConfig:
    """A config.json (or an object nested in it) whose values are read with a type and a range."""

    def __init__(self, raw: Mapping[str, Any], where: str = "config.json"):
        self.raw = raw
        self.where = where

    def get(self, key: str, default: Any = None) -> Any:
        """The raw value; absent and null are the same thing."""
        value = self.raw.get(key)
        return default if value is None else value

    def integer(self, key: str, default: Any = _REQUIRED, *, minimum: int = 1) -> Any:
        """An integer of at least `minimum`; `default` (unchecked) when absent."""
        value = self._value(key, default)
        if value is default:
            return value
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise ValueError(f"{self.where}: {key} must be an integer >= {minimum}, got {value!r}")
        return value

    def number(self, key: str, default: Any = _REQUIRED) -> Any:
        """A number above zero; `default` (unchecked) when absent."""
        value = self._value(key, default)
        if value is default:
            return value
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise ValueError(f"{self.where}: {key} must be a number > 0, got {value!r}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """A boolean."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise ValueError(f"{self.where}: {key} must be true or false, got {value!r}")
        return value

    def token_ids(self, key: str) -> tuple[int, ...]:
        """One id, a list of ids, or nothing."""
        value = self.get(key, [])
        ids = value if isinstance(value, list) else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
            raise ValueError(f"{self.where}: {key} must be token ids >= 0, got {value!r}")
        return tuple(ids)

    def _value(self, key: str, default: Any) -> Any:
        value = self.get(key)
        if value is not None:
            return value
        if default is _REQUIRED:
            raise ValueError(f"{self.where}: key {key!r} is missing")
        return default


def read_rope(config: HFConfig, head_dim: int, max_positions: int) -> RopeConfig:
    """Rope of a config.json in either spelling: `rope_theta` with `rope_scaling`, or `rope_parameters`.

    Raises ValueError for a rope type that is not one of `ROPE_TYPES`: running an extended model with plain
    rope would give fluent nonsense.
    """
    key = "rope_parameters" if config.get("rope_parameters") is not None else "rope_scaling"
    nested = config.get(key, {})
    if not isinstance(nested, Mapping):
        raise ValueError(f"{config.where}: {key} must be an object, got {nested!r}")
    rope = HFConfig(nested, f"{config.where}: {key}")

    theta = rope.number("rope_theta", None) or config.number("rope_theta", 10000.0)
    fraction = rope.number("partial_rotary_factor", None) or config.number("partial_rotary_factor", 1.0)
    rotary_dim = int(head_dim * fraction)
    if rotary_dim % 2 or not 2 <= rotary_dim <= head_dim:
        raise ValueError(
            f"{config.where}: head_dim {head_dim} x partial_rotary_factor {fraction} must be an even number"
            f" of dimensions between 2 and head_dim, got {rotary_dim}"
        )
    scaling, attention_factor = _read_scaling(rope, max_positions)
    if isinstance(scaling, DynamicScaling) and rotary_dim < 4:
        raise ValueError(f"{config.where}: head_dim must be at least 4 for rope type 'dynamic'")
    return RopeConfig(theta, rotary_dim, scaling, attention_factor)


def _read_scaling(rope: HFConfig, max_positions: int) -> tuple[RopeScaling | None, float]:
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    match rope_type:
        case "default":
            return None, 1.0
        case "linear":
            return LinearScaling(rope.number("factor")), 1.0
        case "dynamic":
            return DynamicScaling(rope.number("factor"), max_positions), 1.0
        case "llama3":
            scaling = Llama3Scaling(
                factor=rope.number("factor"),
                low_freq_factor=rope.number("low_freq_factor"),
                high_freq_factor=rope.number("high_freq_factor"),
                original_context=rope.integer("original_max_position_embeddings"),
            )
            if scaling.high_freq_factor <= scaling.low_freq_factor:
                raise ValueError(f"{rope.where}: high_freq_factor must be greater than low_freq_factor")
            return scaling, 1.0
        case "yarn":
            return _read_yarn(rope, max_positions)
    raise ValueError(f"{rope.where}: unknown rope type {rope_type!r}; known: {', '.join(ROPE_TYPES)}")


def _read_yarn(rope: HFConfig, max_positions: int) -> tuple[YarnScaling, float]:
    original = rope.integer("original_max_position_embeddings", max_positions)
    factor = rope.number("factor", max_positions / original)
    scaling = YarnScaling(
        factor=factor,
        original_context=original,
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        truncate=rope.flag("truncate", True),
    )
    attention_factor = rope.number("attention_factor", None)
    if attention_factor is None:
        mscale, mscale_all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
        attention_factor = yarn_attention_factor(factor, mscale, mscale_all_dim)
    return scaling, attention_factor


def extended_context(max_positions: int, scaling: RopeScaling | None) -> int:
    """Context length that a rope scaling reaches, in tokens.

    Linear and dynamic scaling stretch `max_position_embeddings`; Llama 3 configs already state the stretched
    length; YaRN configs state either, so the greater of the two counts.
    """
    match scaling:
        case LinearScaling(factor) | DynamicScaling(factor):
            return int(max_positions * factor)
        case YarnScaling():
            return max(max_positions, int(scaling.original_context * scaling.factor))
        case _:
            return max_positions


def read_sliding_windows(config: HFConfig) -> tuple[int | None, ...]:
    """Window of each layer in the Qwen manner: `layer_types`, else layers from `max_window_layers` upwards.

    `sliding_window` means nothing unless `use_sliding_window` is set. A `layer_types` longer than the model
    is cut, so that a config can be shrunk by overriding `num_hidden_layers` alone.
    """
    num_layers = config.integer("num_hidden_layers")
    if not config.flag("use_sliding_window", False):
        return (None,) * num_layers
    window = config.integer("sliding_window", 4096)
    layer_types = config.get("layer_types")
    if layer_types is None:
        first = config.integer("max_window_layers", 28, minimum=0)
        return tuple(window if i >= first else None for i in range(num_layers))
    windows = {"full_attention": None, "sliding_attention": window}
    if not isinstance(layer_types, list) or len(layer_types) < num_layers or set(layer_types) - set(windows):
        raise ValueError(
            f"{config.where}: layer_types must give one of {', '.join(windows)} for each of the"
            f" {num_layers} layers, got {layer_types!r}"
        )
    return tuple(windows[kind] for kind in layer_types[:num_layers])
