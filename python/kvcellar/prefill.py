"""How fast vLLM computes prompts: tokens and seconds of its steps, as the scheduler sees them."""

import time

from vllm.v1.core.sched.output import SchedulerOutput

# Steps below that are decode, and say nothing about prefill.
_TOKENS_MIN = 128


class PrefillTimer:
    """What was measured and not taken yet.

    A step lasts until the next one, or until the last request has ended. A gap after that is no prefill. One that
    nobody notices, while only requests that are left out run, makes prefill look slower than it is.
    """

    def __init__(self) -> None:
        # Of the step under way, if it counts.
        self._tokens = 0
        self._began = 0.0
        self._measured = (0, 0.0)

    def step(self, output: SchedulerOutput) -> None:
        """A step begins."""
        self._begin(_prefilled(output))

    def idle(self) -> None:
        """The last request has ended: vLLM may idle until the next step."""
        self._begin(0)

    def _begin(self, tokens: int) -> None:
        now = time.perf_counter()
        if self._tokens:
            measured, seconds = self._measured
            self._measured = measured + self._tokens, seconds + now - self._began
        self._tokens, self._began = tokens, now

    def take(self) -> tuple[int, float]:
        """Tokens and seconds since the last call."""
        taken, self._measured = self._measured, (0, 0.0)
        return taken


def _prefilled(output: SchedulerOutput) -> int:
    """Tokens of a step that is mostly prefill, else 0: many requests that decode say nothing of how fast it is."""
    total = output.total_num_scheduled_tokens
    if total < _TOKENS_MIN:
        return 0
    return total if max(output.num_scheduled_tokens.values(), default=0) >= _TOKENS_MIN else 0
