"""Which requests a step has to look at: those that may complete a block in it.

A decoding request completes a block once in many steps. So each one has a number of tokens that it must gain at least
until it does, and is not looked at before all requests together could have gained so many. How many a request has
gained at most is counted for all of them at once.

States of a request: *near* (looked at in every step: its prompt is being computed, or it was admitted and not
scheduled yet), *far* (looked at when its tokens are due), and neither (nothing more will be offered, or vLLM has not
admitted it).
"""

import heapq
from collections.abc import Mapping

from kvcellar.requests import NEVER, KnownRequest


class Due:
    """When each request is looked at next. Bounded by vLLM's requests, and by those that ended in the last steps."""

    def __init__(self) -> None:
        self._near: dict[str, KnownRequest] = {}
        self._far: dict[str, KnownRequest] = {}
        # Far requests by the reading of `_gained` at which they are due. An entry that is older than
        # what is known of its request now stays until then, so entries hold no request, which would
        # keep all its tokens.
        self._queue: list[tuple[int, str]] = []
        # Tokens that a far request has gained at most, since the start.
        self._gained = 0

    def admitted(self, known: KnownRequest) -> None:
        """vLLM admitted a request: it may have any number of computed tokens now."""
        self.ended(known)
        self._near[known.request.request_id] = known

    def ended(self, known: KnownRequest) -> None:
        """No step offers anything more of a request."""
        self._near.pop(known.request.request_id, None)
        self._far.pop(known.request.request_id, None)
        if not self._far:
            # Whatever is left there is old.
            self._queue.clear()

    def clear(self) -> None:
        """Every request has ended."""
        self._near.clear()
        self._far.clear()
        self._queue.clear()

    def in_step(self, scheduled: Mapping[str, int], total: int) -> list[KnownRequest]:
        """Requests to look at in a step. Each of them must be passed to `looked_at` or `ended`.

        Args:
            scheduled: the step's tokens by request.
            total: the sum of them.
        """
        due = list(self._near.values())
        others, tokens = len(scheduled), total
        for request_id in self._near:
            if (count := scheduled.get(request_id)) is not None:
                others -= 1
                tokens -= count
        if others > 0:
            # Mostly each of the others decodes one token, which their sum tells.
            self._gained += 1 if tokens == others else self._most(scheduled)
        queue = self._queue
        while queue and queue[0][0] <= self._gained:
            when, request_id = heapq.heappop(queue)
            known = self._far.get(request_id)
            if known is not None and known.due == when:
                del self._far[request_id]
                due.append(known)
        return due

    def _most(self, scheduled: Mapping[str, int]) -> int:
        """Tokens that one of the requests that are not near gains at most."""
        return max(count for request_id, count in scheduled.items() if request_id not in self._near)

    def looked_at(self, known: KnownRequest, ready: int) -> None:
        """A request has ``ready`` complete tokens after this step."""
        self.ended(known)
        request = known.request
        if not known.scheduled or ready < request.num_tokens:
            self._near[request.request_id] = known
        elif known.next_tokens < NEVER:
            known.due = self._gained + max(1, known.next_tokens - ready)
            self._far[request.request_id] = known
            heapq.heappush(self._queue, (known.due, request.request_id))
