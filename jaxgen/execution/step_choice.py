"""Which compiled step serves a batch, and which steps start-up compiles."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from jaxgen.execution.batch import RequestNeeds, needs_of
from jaxgen.execution.programs import COPY, DECODE, NEWEST, PREFILL, StepKey
from jaxgen.execution.runner_config import RunnerConfig
from jaxgen.execution.sampler import PLAIN, Variant
from jaxgen.scheduling.buckets import coarse, decode_steps, sparse
from jaxgen.scheduling.request import Request

# Widths a full step is compiled for at start-up; larger requests widen them at the price of a compile.
EDIT_WIDTH = 256
LOGPROB_WIDTH = 16
TOP_LOGPROBS = 20
# What most that ask for log-probabilities ask for at most.
FEW_TOP_LOGPROBS = 5
# Between the sizes without which an engine is not ready, where others are compiled in the background: each costs
# a second or two of the wait, and until the others are there batches are padded up to this much.
FIRST_RATIO = 16


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
    steps of one launch) of each decode bucket. shared_buckets: the decode buckets that also have steps for a common
    prefix. is_compiled(key): where steps are compiled in the background, a larger one serves until the right one is
    there. `widths` of the methods: of the sparse edits and of the requested log-probabilities in the lane state.
    """

    def __init__(
        self,
        config: RunnerConfig,
        variants: tuple[Variant, ...],
        steps: tuple[tuple[int, int], ...],
        vocab_size: int,
        shared_buckets: tuple[int, ...] = (),
        is_compiled: Callable[[StepKey], bool] = lambda key: True,
    ):
        self._launch_steps = steps
        self.config, self.variants, self.vocab_size = config, variants, vocab_size
        self._shared_buckets = shared_buckets
        self._is_compiled = is_compiled
        self.copy_key = StepKey(COPY, config.prefill_buckets[-1][1])
        self.newest_key = StepKey(NEWEST, config.rows)

    def startup_keys(self, widths: tuple[int, int]) -> list[StepKey]:
        """The steps compiled at start-up, the largest first: they take longest."""
        config = self.config
        keys = [self.copy_key, self.newest_key]
        for variant in self.variants:
            if config.precompile_prefill and variant in (self.variants[0], self.variants[-1]):
                keys += [StepKey(PREFILL, *b, variant, widths) for b in self._prefill_buckets(variant)]
            if config.precompile_decode:
                keys += self._decode_keys(variant, widths, self._decode_buckets(variant))
        if config.precompile_decode:
            shared = self._decode_keys(self.variants[0], widths, self._shared_buckets)
            keys += [key._replace(shared=True) for key in shared]
        return sorted(_with_refills(keys), key=lambda key: -key.size)

    def first_keys(self, widths: tuple[int, int]) -> list[StepKey]:
        """The steps that serve every request in launches of one step, if slowly; those that take longest first.

        The largest full ones serve whatever there is; a small plain one of each kind serves a single request
        at a bearable price.
        """
        config, common = self.config, self.variants[0]
        prefill, decode = self.largest_keys(widths)
        keys = [prefill]
        if config.precompile_prefill:
            tokens = sparse([tokens for tokens, _ in config.prefill_buckets], FIRST_RATIO)[1:2]
            keys += [StepKey(PREFILL, *b, common, widths) for b in config.prefill_buckets if b[0] in tokens]
        keys.append(decode)
        if config.precompile_decode:
            lanes = sparse(config.decode_buckets, FIRST_RATIO)[1:2]
            keys += [StepKey(DECODE, b, 0, common, widths) for b in lanes]
        return _with_refills([*keys, self.copy_key, self.newest_key])

    def rest_keys(self, widths: tuple[int, int]) -> list[StepKey]:
        """The start-up steps that are not first, the most useful first."""
        first = set(self.first_keys(widths))
        rest = [key for key in self.startup_keys(widths) if key not in first]

        def order(key: StepKey) -> tuple:
            """Steps after the refills they need; common ones and powers of two before others."""
            is_step = key.kind in (DECODE, PREFILL)
            rare = self._is_rare(key.variant)
            return is_step, rare, key.shared, key.size.bit_count() > 1, -key.size

        return sorted(rest, key=order)

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

    def decode(
        self, lanes: int, steps: int, variant: Variant, widths: tuple[int, int], shared: bool = False
    ) -> StepKey:
        """The decode step for so many lanes and so many tokens of each; for a common prefix if there is one."""
        if shared and variant == self.variants[0]:
            fitting = [b for b in self._shared_buckets if b >= lanes]
            sharing = [StepKey(DECODE, b, 0, variant, widths, steps, True) for b in fitting]
            if found := next(filter(self._is_compiled, sharing), None):
                return found
        buckets = [b for b in self._decode_buckets(variant) if b >= lanes]
        keys = [StepKey(DECODE, b, 0, variant, widths, steps) for b in buckets]
        beyond = StepKey(DECODE, min(power_of_two(lanes), self.config.rows), 0, variant, widths, steps)
        return self._first_compiled(keys, self.config.precompile_decode) or beyond

    def prefill(self, tokens: int, rows: int, variant: Variant, widths: tuple[int, int]) -> StepKey:
        """The prefill step for so many packed tokens of so many rows."""
        if not variant.plain and variant.top_logprobs <= self.variants[-1].top_logprobs:
            variant = self.variants[-1]
        buckets = [b for b in self._prefill_buckets(variant) if b[0] >= tokens and b[1] >= rows]
        keys = [StepKey(PREFILL, *b, variant, widths) for b in buckets]
        if key := self._first_compiled(keys, self.config.precompile_prefill):
            return key
        most_rows = self.config.prefill_buckets[-1][1]
        return StepKey(PREFILL, power_of_two(tokens), max(power_of_two(rows), most_rows), variant, widths)

    def _first_compiled(self, keys: Sequence[StepKey], precompiled: bool) -> StepKey | None:
        """The first that there is, where start-up goes on in the background; else the first."""
        if not (keys and self.config.background and precompiled):
            return keys[0] if keys else None
        full = self.variants[-1]
        least = keys[0].variant
        if least is not None and least.top_logprobs <= full.top_logprobs:
            keys = [*keys, *(key._replace(variant=full) for key in keys)]
        return next(filter(self._is_compiled, keys), keys[0])

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

    def _decode_keys(
        self, variant: Variant, widths: tuple[int, int], buckets: tuple[int, ...]
    ) -> list[StepKey]:
        """The decode steps of a variant; those of a coarse bucket may differ in their number of steps."""
        keys, above = [], 0
        for bucket in buckets:
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

    def _is_rare(self, variant: Variant | None) -> bool:
        """Whether a variant is one of several, and not for the common requests."""
        return not (variant is None or variant.plain) and len(self.variants) > 1


def _with_refills(keys: list[StepKey]) -> list[StepKey]:
    """The keys, and those of the refills that their uploads need."""
    refills = (key.refill for key in keys if key.kind in (DECODE, PREFILL))
    return [*keys, *dict.fromkeys(refills)]


def power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()
