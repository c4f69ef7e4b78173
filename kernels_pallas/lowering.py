"""Lowering a kernel once per process, shape and option, however many programs it stands in.

Mosaic GPU's lowering is Python: one to two seconds for an attention kernel, under the interpreter lock, in every
program anew. An engine compiles dozens of programs that share a few kernels.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
from jax import export

_UNCHECKED = [export.DisabledSafetyCheck.custom_call(name) for name in ("mosaic_gpu_v2", "mosaic_gpu")]


def lower_once(*static: str) -> Callable[[Callable], Callable]:
    """`jax.jit` for the function that launches a kernel, `static` naming its static arguments.

    Only the first program with given shapes pays for lowering the kernel; the others get the finished module. All
    calls inside one program share one trace, too. An argument `interpret` other than None, a mesh in context or
    operands that vary over mesh axes (`shard_map`) lower it in place, as `jax.jit` alone would.
    """

    def decorate(function: Callable) -> Callable:
        jitted = functools.partial(jax.jit, static_argnames=static, inline=False)
        signature = inspect.signature(function)

        @functools.cache
        def exported(specs: tuple, tree: Any, options: tuple, x64: bool) -> export.Exported:
            del x64  # part of the key
            operands = jax.tree.unflatten(tree, specs)
            lower = export.export(jitted(function), platforms=("cuda",), disabled_checks=_UNCHECKED)
            return lower(**operands, **dict(options))

        @jitted
        @functools.wraps(function)
        def launch(*args, **kwargs):
            given = signature.bind(*args, **kwargs).arguments
            operands = {name: value for name, value in given.items() if name not in static}
            leaves, tree = jax.tree.flatten(operands)
            if given.get("interpret") is not None or not _is_plain(leaves):
                return function(**given)
            specs = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves)
            options = tuple((name, value) for name, value in given.items() if name in static)
            return exported(specs, tree, options, jax.config.jax_enable_x64).call(**operands)

        return launch

    return decorate


def _is_plain(operands: list[jax.Array]) -> bool:
    """Whether no mesh decides how the operands are laid out."""
    in_mesh = not jax.sharding.get_abstract_mesh().empty
    return not in_mesh and not any(getattr(jax.typeof(x), "vma", None) for x in operands)
