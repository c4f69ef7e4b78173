"""Which compiled step serves a batch, and which steps start-up compiles."""

from __future__ import annotations

from collections.abc import Iterable

from jaxgen.execution.batch import RequestNeeds, needs_of
from jaxgen.execution.programs import COPY, DECODE, NEWEST, PREFILL, REFILL, StepKey
from jaxgen.execution.runner_config import RunnerConfig
from jaxgen.execution.sampler import PLAIN, Variant
from jaxgen.scheduling.buckets import coarse, decode_steps, pick
from jaxgen.scheduling.request import Request

# Widths a full step is compiled for at start-up; larger requests widen them at the price of a compile.
EDIT_WIDTH = 256
LOGPROB_WIDTH = 16
TOP_LOGPROBS = 20
# What most that ask for log-probabilities ask for at most.
FEW_TOP_LOGPROBS = 5


def startup_variants(platform: str, vocab_size: int) -> tuple[Variant, ...]:
    """The variants compiled per bucket, least first.

    On a CPU one full step does it all: what no row wants is skipped at run time at no cost. On a GPU a
    run-time branch would break the command buffer, so the common cases get steps of their own.
    """
    full = Variant(True, True, min(TOP_LOGPROBS, vocab_size))
    if platform == "cpu":
        return (full,)
    return PLAIN, Variant(False, True, min(FEW_TOP_LOGPROBS, vocab_size)), full


def launch_steps(config: RunnerConfig, weight_bytes: int, platform: str) -> tuple[tuple[int, int], ...]:
    """(lanes, steps of one launch) of each decode bucket."""
    # On a CPU a launch costs next to nothing.
    explicit = 1 if platform == "cpu" and config.decode_steps is None else config.decode_steps
    return decode_steps(config.decode_buckets, weight_bytes, config.page_size, explicit)


class StepChoice:
    """Picks the least step that serves a batch.

    variants: those compiled per bucket, least first; prefill knows only the first and the last. steps: (lanes,
    steps of one launch) of each decode bucket. `widths` of the methods: of the sparse edits and of the requested
    log-probabilities in the lane state.
    """

    def __init__(
        self,
        config: RunnerConfig,
        variants: tuple[Variant, ...],
        steps: tuple[tuple[int, int], ...],
        vocab_size: int,
    ):
        self._launch_steps = steps
        self.config, self.variants, self.vocab_size = config, variants, vocab_size
        self.copy_key = StepKey(COPY, config.prefill_buckets[-1][1])
        self.newest_key = StepKey(NEWEST, config.rows)

    def refill_key(self, lanes: int) -> StepKey:
        return StepKey(REFILL, lanes)

    def startup_keys(self, widths: tuple[int, int]) -> list[StepKey]:
        """The steps compiled at start-up, the largest first: they take longest."""
        config = self.config
        keys = [self.copy_key, self.newest_key]
        for variant in self.variants:
            if config.precompile_prefill and variant in (self.variants[0], self.variants[-1]):
                keys += [StepKey(PREFILL, *b, variant, widths) for b in self._prefill_buckets(variant)]
            if config.precompile_decode:
                keys += self._decode_keys(variant, widths)
        if config.precompile_decode:
            keys += [self.refill_key(lanes) for lanes in config.decode_buckets]
        return sorted(keys, key=lambda key: -key.size)

    def largest_keys(self, widths: tuple[int, int]) -> list[StepKey]:
        """The steps among which is the one that needs the most temporary memory."""
        variant = self.variants[-1]
        return [
            StepKey(PREFILL, *self.config.prefill_buckets[-1], variant, widths),
            StepKey(DECODE, self.config.decode_buckets[-1], 0, variant, widths),
        ]

    def variant(self, needs: Iterable[RequestNeeds | None]) -> Variant:
        """The least start-up variant that covers the rows (a wider one where a row wants more)."""
        present = [n for n in needs if n is not None]
        edits, logprobs = any(n.edits for n in present), any(n.logprobs for n in present)
        top = max((n.top_logprobs for n in present), default=0)
        for variant in self.variants:
            if variant.edits >= edits and variant.logprobs >= logprobs and variant.top_logprobs >= top:
                return variant
        return Variant(True, True, min(power_of_two(top), self.vocab_size))

    def decode(self, lanes: int, steps: int, variant: Variant, widths: tuple[int, int]) -> StepKey:
        """The decode step for so many lanes and so many tokens of each."""
        buckets = self._decode_buckets(variant)
        if lanes > buckets[-1]:
            bucket = min(power_of_two(lanes), self.config.rows)
        else:
            bucket = pick(buckets, lanes)
        return StepKey(DECODE, bucket, 0, variant, widths, steps)

    def prefill(self, tokens: int, rows: int, variant: Variant, widths: tuple[int, int]) -> StepKey:
        """The prefill step for so many packed tokens of so many rows."""
        if not variant.plain and variant.top_logprobs <= self.variants[-1].top_logprobs:
            variant = self.variants[-1]
        for bucket in self._prefill_buckets(variant):
            if bucket[0] >= tokens and bucket[1] >= rows:
                return StepKey(PREFILL, *bucket, variant, widths)
        most_rows = self.config.prefill_buckets[-1][1]
        return StepKey(PREFILL, power_of_two(tokens), max(power_of_two(rows), most_rows), variant, widths)

    def require_compiled(self, request: Request, widths: tuple[int, int]) -> None:
        """Raises ValueError for a request that no start-up step serves."""
        needs, full = needs_of(request), self.variants[-1]
        edits, ids = widths
        largest = self.config.prefill_buckets[-1][0]
        for what, wanted, most in (
            ("logit edits (logit_bias entries, and stop ids under min_new_tokens)", needs.edit_width, edits),
            ("token_ids_logprob", needs.logprob_width, ids),
            ("top_logprobs_num", needs.top_logprobs, full.top_logprobs),
            (
                "prompt tokens in one step",
                0 if self.config.chunked else len(request.prompt_ids),
                largest,
            ),
        ):
            if wanted > most:
                raise ValueError(
                    f"{what}: {wanted} are more than the {most} that steps were compiled for at start-up, and "
                    "strict_compile=True forbids compiling now; ask for less, or start without strict_compile"
                )

    def _decode_keys(self, variant: Variant, widths: tuple[int, int]) -> list[StepKey]:
        """The decode steps of a variant; those of a coarse bucket may differ in their number of steps."""
        keys, above = [], 0
        for bucket in self._decode_buckets(variant):
            wanted = {steps for lanes, steps in self._launch_steps if above < lanes <= bucket}
            keys += [StepKey(DECODE, bucket, 0, variant, widths, steps) for steps in sorted(wanted)]
            above = bucket
        return keys

    def _decode_buckets(self, variant: Variant) -> tuple[int, ...]:
        """Lanes of the decode steps compiled for a variant."""
        buckets = self.config.decode_buckets
        return coarse(buckets) if self._is_rare(variant) else buckets

    def _prefill_buckets(self, variant: Variant) -> tuple[tuple[int, int], ...]:
        """(packed tokens, rows) of the prefill steps compiled for a variant."""
        buckets = self.config.prefill_buckets
        if not self._is_rare(variant):
            return buckets
        kept = coarse([tokens for tokens, _ in buckets])
        return tuple(bucket for bucket in buckets if bucket[0] in kept)

    def _is_rare(self, variant: Variant) -> bool:
        """Whether a variant is one of several, and not for the common requests."""
        return not variant.plain and len(self.variants) > 1


def power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()
