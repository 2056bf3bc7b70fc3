"""An engine in a process of its own, asked over a pipe: front end, EngineCore and worker are that one process.

Such an engine starts in some seconds where the usual three processes take a minute, and several of them can be asked
at once. What is asked is a function of the engine, named by its module, which runs over there.
"""

import contextlib
import multiprocessing
import multiprocessing.spawn
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from tests.deadlines import deadline
from tests.vllm.engines import Engine, environment, open_engine

P = ParamSpec("P")
R = TypeVar("R")

# EngineCore in the front end's process, the worker in EngineCore's, and one thread that computes,
# on whichever core is free: threads of several engines that wait for each other while they spin
# cost more than they bring.
ONE_PROCESS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
}
ANSWER_DEADLINE_S = 600.0
STOP_DEADLINE_S = 30.0


class OverThereError(Exception):
    """What went wrong in the engine's process, with its stack."""


@dataclass
class EngineProcess:
    """A running engine."""

    process: BaseProcess
    pipe: Connection
    log: Path
    calls: int = 0

    def wait_ready(self) -> None:
        """Waits until the engine has started.

        Raises:
            OverThereError: it could not start.

        """
        self._answer(0)

    def call(self, function: Callable[Concatenate[Engine, P], R], *arguments: P.args, **named: P.kwargs) -> R:
        """What `function` answers over there.

        Raises:
            OverThereError: the function failed, or the process ended.

        """
        self.calls += 1
        self.pipe.send((self.calls, function, arguments, named))
        answer: R = self._answer(self.calls)
        return answer

    def _answer(self, number: int) -> Any:
        """The answer to one call. Answers that nobody waited for, because a test was cut off, are passed over."""
        came, value, problem = self._receive()
        while came < number:
            came, value, problem = self._receive()
        if problem is not None:
            raise OverThereError(f"{problem}\n{self.log_tail()}")
        return value

    def _receive(self) -> Any:
        try:
            if self.pipe.poll(patience_s := deadline(ANSWER_DEADLINE_S)):
                return self.pipe.recv()
        except EOFError:
            raise OverThereError(f"the engine's process ended:\n{self.log_tail()}") from None
        raise OverThereError(f"no answer within {patience_s:.0f} s:\n{self.log_tail()}")

    def log_tail(self) -> str:
        """The last lines that the process wrote."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-40:])

    def end(self) -> None:
        """Ends the engine; a process that does not end by itself is killed."""
        with contextlib.suppress(BrokenPipeError):
            self.pipe.send(None)
        self.process.join(deadline(STOP_DEADLINE_S))
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.pipe.close()


def _serve(pipe: Connection, log: str, arguments: dict[str, Any]) -> None:
    """Runs in the engine's process until told to end or until nobody is there any more."""
    with open(log, "wb", buffering=0) as output:  # noqa: PTH123
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
    try:
        with open_engine(**arguments, distributed_executor_backend="uni") as engine:
            pipe.send((0, None, None))
            while (wish := pipe.recv()) is not None:
                number, *call = wish
                pipe.send((number, *_answered(engine, *call)))
    except EOFError:
        return
    except BaseException:
        with contextlib.suppress(BrokenPipeError):
            pipe.send((0, None, traceback.format_exc()))
        raise


def _answered(
    engine: Engine, function: Callable[..., Any], arguments: tuple[Any, ...], named: dict[str, Any]
) -> tuple[Any, str | None]:
    try:
        return function(engine, *arguments, **named), None
    except Exception:  # noqa: BLE001  (told to whoever asked)
        return None, traceback.format_exc()


@contextlib.contextmanager
def _run_by(before: Sequence[str], work_dir: Path) -> Iterator[None]:
    """Processes spawned meanwhile are run by this command; nothing: as always."""
    if not before:
        yield
        return
    script = work_dir / "run-by.sh"
    script.write_text(f'#!/bin/sh\nexec {shlex.join([*before, sys.executable])} "$@"\n')
    script.chmod(0o700)
    usual = multiprocessing.spawn.get_executable()
    multiprocessing.set_executable(str(script))
    try:
        yield
    finally:
        multiprocessing.set_executable(os.fsdecode(usual))


@contextlib.contextmanager
def start_engine(
    work_dir: Path,
    pool_dir: Path,
    *,
    env: Mapping[str, str] | None = None,
    before: Sequence[str] = (),
    name: str = "engine",
    **arguments: Any,
) -> Iterator[EngineProcess]:
    """Starts an engine and ends it afterwards; `EngineProcess.wait_ready` waits for it.

    Args:
        work_dir: where the operation log and the process's output go.
        pool_dir: where the pool goes.
        env: environment of the process, from its first instruction on.
        before: a command that runs the process as its own.
        name: tells engines of one `work_dir` apart.
        arguments: more of `open_engine`.

    """
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    log = work_dir / f"{name}.log"
    log.touch()
    options = {"work_dir": work_dir, "pool_dir": pool_dir, "name": name, **arguments}
    with environment({**ONE_PROCESS, **(env or {})}), _run_by(before, work_dir):
        process = spawn.Process(target=_serve, args=(there, str(log), options), name=name)
        process.start()
    there.close()
    engine = EngineProcess(process, here, log)
    try:
        yield engine
    finally:
        engine.end()
