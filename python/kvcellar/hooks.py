"""The guard around every hook that vLLM calls.

An exception that left a hook would end EngineCore or a worker, and with it every request that is being served. So none
does: the guard hands it to the side it came from, which takes itself out of service, and answers vLLM with what a
connector answers that holds nothing.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

M = TypeVar("M", bound=Callable[..., Any])

# Names of all guarded methods, for the test that injects a fault into each.
HOOKS: set[str] = set()


def hook(neutral: Callable[..., Any]) -> Callable[[M], M]:
    """Guard a hook: a method of an object that has ``_hook_failed(name, error)``, which must not raise.

    Args:
        neutral: called with the hook's own arguments after it failed; its result is vLLM's answer. Must not raise.
    """

    def guard(method: M) -> M:
        name = method.__name__
        HOOKS.add(name)

        @functools.wraps(method)
        def guarded(self: Any, *arguments: Any, **named: Any) -> Any:
            try:
                return method(self, *arguments, **named)
            except Exception as error:  # noqa: BLE001  (the one place where every exception ends)
                self._hook_failed(name, error)
                return neutral(self, *arguments, **named)

        return cast("M", guarded)

    return guard


def nothing(*_arguments: Any, **_named: Any) -> None:
    """Answer of a hook that returns nothing."""
