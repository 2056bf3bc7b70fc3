"""Fixtures shared by the tests that run a real vLLM."""

import os
import signal
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.vllm.server import Server

ROOT = Path(__file__).resolve().parents[2]
# Files whose tests start engines of their own, many of them: they fill up whichever worker has
# time.
EACH_ALONE = {"test_index.py", "test_nvme.py"}
SEED = int(os.environ.get("KVCELLAR_TEST_SEED", "20817"))


def pytest_configure(config: pytest.Config) -> None:
    """Prepares this process and the engines that it starts, and names the marker for long campaigns."""
    config.addinivalue_line("markers", "soak: a long campaign, run by scripts/soak and with -m soak")
    # Children of an in-process engine, and servers, import tests.vllm.mutants and tests.vllm.timed
    # by name.
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    _keep_to_own_cores()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    # A run that is told to end still ends its engines and removes its pools.
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def _keep_to_own_cores() -> None:
    """Beside other workers of pytest-xdist: each has its share of the cores, and so have the engines that it starts.

    Starting an engine is mostly three processes that import vLLM, one after another; two engines at a time use what
    one leaves idle. On the same cores the threads of several would spin while they wait for each other.
    """
    name, count = os.environ.get("PYTEST_XDIST_WORKER"), int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    cores = sorted(os.sched_getaffinity(0))
    if name is not None and len(cores) >= count > 1:
        os.sched_setaffinity(0, cores[int(name.removeprefix("gw")) :: count])


def pytest_report_header() -> list[str]:
    """Tells the seed that reproduces this run, and what the engines compute in."""
    from tests.vllm.sizes import DATA_TYPE, VARIABLE

    return [f"kvcellar: KVCELLAR_TEST_SEED={SEED}", f"kvcellar: {VARIABLE}={DATA_TYPE.name}, {DATA_TYPE.reason}"]


def group(item: pytest.Item) -> str:
    """Tests of one group run in one worker of pytest-xdist, and share what is started once a module or session."""
    if "shared_server" in getattr(item, "fixturenames", ()):
        return "shared_server"
    # pytest-xdist takes a group's name for a part of the parameters where it has brackets.
    return item.nodeid.replace("]", "") if item.path.name in EACH_ALONE else item.path.name


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deals tests out, and leaves long campaigns out unless the caller selects by marker."""
    for item in items:
        item.add_marker(pytest.mark.xdist_group(group(item)))
    if config.option.markexpr:
        return
    for item in items:
        if item.get_closest_marker("soak"):
            item.add_marker(pytest.mark.skip(reason="a long campaign: run scripts/soak or select -m soak"))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Learns this machine's pace before the first test's limit is set."""
    if session.items and not session.config.option.collectonly and find_spec("torch") is not None:
        from tests.vllm import speed

        speed.learn()


@pytest.fixture(scope="session")
def seed() -> int:
    """The seed of every random choice; KVCELLAR_TEST_SEED sets it."""
    print(f"seed {SEED}")
    return SEED


@pytest.fixture(scope="session")
def vllm_installed() -> None:
    """Skips a test where there is no vLLM to run."""
    if find_spec("vllm") is None:
        pytest.skip("vLLM is not installed: run scripts/setup without --no-vllm")


@pytest.fixture(scope="session")
def shared_server(vllm_installed: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator["Server"]:
    """One real `vllm serve` for the tests that need its HTTP interface: 64 blocks of KV cache and a small pool."""
    from tests.vllm.places import temporary_pool_dir
    from tests.vllm.server import open_server
    from tests.vllm.sizes import kv_mib

    cellar = {"dram_size": kv_mib(192), "namespace_salt": "shared-server"}
    with (
        temporary_pool_dir() as pool_dir,
        open_server(tmp_path_factory.mktemp("server"), pool_dir, cellar=cellar) as server,
    ):
        yield server
