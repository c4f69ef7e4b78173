"""Bucket tables: the shapes for which steps are compiled."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

MOST_STEPS = 8
WEIGHTS_PER_LAUNCH = 8 << 30  # bytes
TOKENS_PER_LAUNCH = 512


def decode_buckets(max_lanes: int, explicit: Iterable[int] | None = None) -> tuple[int, ...]:
    """Ascending lane counts of the decode steps; the last one is `max_lanes`.

    Without an explicit list: 1, then steps that keep the padding of more than 8 lanes under a third: multiples of 8
    to 64, of 16 to 128, of 32 to 256 and of 64 beyond. A step of 8 lanes, whose products kernels serve, takes no longer
    than those of 2 and 4 would (Qwen2.5-0.5B on an H100: 0.75 ms instead of 0.86 and 0.85). Explicit values above
    `max_lanes` are dropped and `max_lanes` is added, since every batch up to it must have a step.

    Raises:
        ValueError: `max_lanes` or an explicit value below 1.
    """
    if max_lanes < 1:
        raise ValueError(f"max_lanes must be at least 1, got {max_lanes}")
    if explicit is not None:
        wanted = sorted(set(explicit))
        if wanted and wanted[0] < 1:
            raise ValueError(f"decode buckets must be at least 1, got {wanted[0]}")
    else:
        wanted = [
            1,
            *range(8, 64, 8),
            *range(64, 128, 16),
            *range(128, 256, 32),
            *range(256, max_lanes, 64),
        ]
    return (*(b for b in wanted if b < max_lanes), max_lanes)


def prefill_buckets(
    max_tokens: int,
    smallest: int = 16,
    explicit: Iterable[int] | None = None,
    half_steps_from: int | None = None,
) -> tuple[int, ...]:
    """Ascending packed token counts of the prefill steps: powers of two from `smallest` to `max_tokens`.

    From `half_steps_from` on there is one more between each two, half way, so that a step of that size or
    more is padded by less than a half instead of doubled.

    Raises:
        ValueError: `max_tokens`, `smallest` or an explicit value below 1.
    """
    if max_tokens < 1 or smallest < 1:
        raise ValueError(f"max_tokens and smallest must be at least 1, got {max_tokens} and {smallest}")
    if explicit is not None:
        wanted = sorted(set(explicit))
        if wanted and wanted[0] < 1:
            raise ValueError(f"prefill buckets must be at least 1, got {wanted[0]}")
    else:
        wanted = []
        size = smallest
        while size < max_tokens:
            wanted.append(size)
            if half_steps_from is not None and size >= half_steps_from:
                wanted.append(size + size // 2)
            size *= 2
    return (*(b for b in wanted if b < max_tokens), max_tokens)


def decode_steps(
    buckets: Sequence[int], weight_bytes: int, page_size: int, explicit: int | None = None
) -> tuple[tuple[int, int], ...]:
    """(lanes, steps) for each decode bucket: how many tokens of each lane one launch decodes.

    A launch costs the host about as much time as a small model's step costs the device. Without an explicit
    number a launch holds as many steps, a power of two up to 8, as read some 8 GiB of weights (3 ms on a
    Hopper GPU), and fewer in large batches, whose steps are long. No launch exceeds a page.

    Raises:
        ValueError: an explicit number below 1 or above `page_size`.
    """
    if explicit is not None:
        if not 1 <= explicit <= page_size:
            raise ValueError(
                f"num_continuous_decode_steps must be 1 to page_size ({page_size}), got {explicit}"
            )
        return tuple((lanes, explicit) for lanes in buckets)

    def steps(lanes: int) -> int:
        most = min(MOST_STEPS, WEIGHTS_PER_LAUNCH // weight_bytes, TOKENS_PER_LAUNCH // lanes, page_size)
        return 1 << (max(most, 1).bit_length() - 1)

    return tuple((lanes, steps(lanes)) for lanes in buckets)


def coarse(buckets: Sequence[int]) -> tuple[int, ...]:
    """The powers of four among `buckets`, and the largest: for steps too rare to compile at every size."""
    return tuple(b for b in buckets if (b.bit_count() == 1 and b.bit_length() % 2) or b == buckets[-1])


def sparse(buckets: Sequence[int], ratio: int) -> tuple[int, ...]:
    """The fewest of `buckets`, the largest first, each at most a `ratio`-th of the one before."""
    kept = [buckets[-1]]
    for bucket in reversed(buckets):
        if bucket * ratio <= kept[-1]:
            kept.append(bucket)
    return tuple(kept)
