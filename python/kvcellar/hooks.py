"""The guard around every hook that vLLM calls.

An exception that left a hook would end EngineCore or a worker, and with it every request that is being served. So none
does: the guard hands it to the side it came from, which takes itself out of service, and answers vLLM with what a
connector answers that holds nothing.
"""

import functools
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S", bound="Guarded")

# Names of all guarded methods, for the test that injects a fault into each.
HOOKS: set[str] = set()


class Guarded(Protocol):
    """What has guarded hooks."""

    def _hook_failed(self, hook: str, error: Exception) -> None:
        """Take out of service what raised ``error`` in ``hook``. Must not raise."""


def hook(
    neutral: Callable[..., R],
) -> Callable[[Callable[Concatenate[S, P], R]], Callable[Concatenate[S, P], R]]:
    """Guard a hook.

    Args:
        neutral: called with the hook's own arguments after it failed; its result is vLLM's answer. Must not raise.
    """

    def guard(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
        name = method.__name__
        HOOKS.add(name)

        @functools.wraps(method)
        def guarded(self: S, *arguments: P.args, **named: P.kwargs) -> R:
            try:
                return method(self, *arguments, **named)
            except Exception as error:  # noqa: BLE001  (the one place where every exception ends)
                self._hook_failed(name, error)
                return neutral(self, *arguments, **named)

        return guarded

    return guard


def nothing(*_arguments: Any, **_named: Any) -> None:
    """Answer of a hook that returns nothing."""
