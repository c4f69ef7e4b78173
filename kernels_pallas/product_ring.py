"""The ring of slots that operands of a product pass through, from the warpgroup that copies to those that multiply."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas.mosaic import ROWS


@dataclass(frozen=True)
class ProductRing:
    """Slots of shared memory for tokens [stages, rows, K'] and weight [stages, columns, K'], and their barriers.

    A tile of the result takes `chunks` slots, one after the other; a block of threads makes `trips` of them.
    """

    tokens: Any
    weight: Any
    full: Any
    free: Any
    chunks: int
    trips: Any

    def _slot(self, step):
        return lax.rem(step, jnp.int32(self.tokens.shape[0]))

    def fill(self, locate: Callable, copy: Callable) -> None:
        """copy(place, i, slot) for chunk i of each trip, `place` being locate(trip); one warpgroup comes here."""

        @pl.loop(0, self.trips)
        def _tile(trip):
            place = locate(trip)

            @pl.loop(0, self.chunks)
            def _chunk(i):
                step = trip * self.chunks + i
                slot = self._slot(step)

                @pl.when(step >= self.tokens.shape[0])
                def _wait():
                    plgpu.barrier_wait(self.free.at[slot])

                copy(place, i, slot)

        steps = self.trips * self.chunks

        @pl.loop(lax.max(steps - self.tokens.shape[0], jnp.int32(0)), steps)
        def _drain(step):  # a barrier's every completion must be seen
            plgpu.barrier_wait(self.free.at[self._slot(step)])

    def product(self, trip, mine):
        """The sums [64, columns] float32 of a trip, of the token rows `mine` of a warpgroup."""

        def accumulate(acc):
            @pl.loop(0, self.chunks)
            def _chunk(i):
                step = trip * self.chunks + i
                slot = self._slot(step)
                plgpu.barrier_wait(self.full.at[slot])
                plgpu.wgmma(acc, self.tokens.at[slot, mine], self.weight.at[slot].transpose((1, 0)))
                plgpu.wgmma_wait(1)

                @pl.when(i > 0)
                def _release():
                    plgpu.barrier_arrive(self.free.at[self._slot(step - 1)])

            value = acc[...]
            plgpu.barrier_arrive(self.free.at[self._slot(trip * self.chunks + self.chunks - 1)])
            return value

        return pl.run_scoped(accumulate, plgpu.ACC((ROWS, self.weight.shape[1]), jnp.float32))
