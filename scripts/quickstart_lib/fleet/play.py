"""Plays all conversations through the router, with several requests in flight and always in the same order."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

from quickstart_lib.fleet.chat import Chat, Message, Reply
from quickstart_lib.fleet.talks import Talk


class Play:
    """One playing. Requests start in the given order; a turn waits for its conversation's previous one.

    States: playing (within `run`), and ended: when all is answered, or at the first failure.
    """

    def __init__(self, talks: list[Talk], order: list[int], connect: Callable[[], Chat]) -> None:
        self._talks = talks
        self._order = order
        self._connect = connect
        self._histories: list[list[Message]] = [[{"role": "system", "content": talk.system}] for talk in talks]
        self._next = 0
        self._busy: set[int] = set()
        self._is_stopped = False
        self._changed = threading.Condition()
        self.replies: list[list[Reply]] = [[] for _ in talks]

    def run(self, concurrency: int, on_reply: Callable[[], None]) -> None:
        """Play everything; `on_reply` is called from one thread at a time.

        Raises:
            ServerTroubleError, OSError, http.client.HTTPException: a request failed; the others are not begun.
        """
        with ThreadPoolExecutor(concurrency) as pool:
            workers = [pool.submit(self._work, on_reply) for _ in range(concurrency)]
            try:
                for worker in workers:
                    worker.result()
            finally:
                self._stop()

    def _work(self, on_reply: Callable[[], None]) -> None:
        try:
            with closing(self._connect()) as chat:
                while (index := self._take()) is not None:
                    self._turn(chat, index)
                    with self._changed:
                        on_reply()
        finally:
            # Only the end of the order is an end without an error; nobody has anything to do then,
            # either.
            self._stop()

    def _turn(self, chat: Chat, index: int) -> None:
        history, replies = self._histories[index], self.replies[index]
        history.append({"role": "user", "content": self._talks[index].questions[len(replies)]})
        reply = chat.ask(history)
        history.append({"role": "assistant", "content": reply.text})
        replies.append(reply)
        with self._changed:
            self._busy.discard(index)
            self._changed.notify_all()

    def _take(self) -> int | None:
        """The next conversation in order, once it has its last answer; `None` when nothing is left to begin."""
        with self._changed:
            while not self._is_stopped and self._next < len(self._order):
                index = self._order[self._next]
                if index not in self._busy:
                    self._next += 1
                    self._busy.add(index)
                    return index
                self._changed.wait()
            return None

    def _stop(self) -> None:
        with self._changed:
            self._is_stopped = True
            self._changed.notify_all()
