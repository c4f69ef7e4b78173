"""What passes from a product of a decoder layer, over an RMS norm, to the next product."""

from dataclasses import dataclass

import jax


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class NormInput:
    """Rows that an RMS norm reads next, with what the product that made them has prepared.

    rows [T, D]. scaled [T, D]: the rows times the norm's weight. squares [R, P] float32, R >= T: sums of the rows'
    squares over P stretches of columns, whose sum is that of a row. Both are None where nothing was prepared.
    """

    rows: jax.Array
    scaled: jax.Array | None = None
    squares: jax.Array | None = None
