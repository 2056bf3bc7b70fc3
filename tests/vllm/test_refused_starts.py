"""A mistake in our settings ends `vllm serve` before any weights are loaded, with a last line that names the field."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from tests.deadlines import deadline
from tests.vllm.places import real_model
from tests.vllm.server import free_port, transfer_config

# Looking at the configuration, on a good machine: mostly importing vLLM.
END_S = 120.0
AS_USERS_START_IT = ("-m", "vllm.entrypoints.cli.main")
# vLLM itself refuses sleep mode on a CPU, before it has a whole configuration.
WHERE_SLEEP_MODE_EXISTS = (
    "-c",
    "from vllm.platforms import current_platform as platform; "
    "type(platform).is_sleep_mode_available = lambda self: True; "
    "from vllm.entrypoints.cli.main import main; main()",
)

pytestmark = [pytest.mark.usefixtures("vllm_installed"), pytest.mark.e2e]


def serve(
    log: Path, cellar: Mapping[str, object], more: Sequence[str] = (), program: Sequence[str] = AS_USERS_START_IT
) -> list[str]:
    """Starts `vllm serve`, which has to end by itself with an error. Returns the lines that it wrote."""
    command = [sys.executable, *program, "serve", str(real_model()), "--host", "127.0.0.1", "--port", str(free_port())]
    command += [
        "--enforce-eager",
        "--max-model-len",
        "256",
        "--kv-transfer-config",
        json.dumps(transfer_config(cellar)),
    ]
    with log.open("wb") as output:
        ended = subprocess.run(
            [*command, *more],
            stdout=output,
            stderr=subprocess.STDOUT,
            timeout=deadline(END_S),
            check=False,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
    assert ended.returncode not in (0, None)
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    loading = [line for line in lines if "load model" in line or "Loading" in line]
    assert not loading, loading
    assert not [line for line in lines if "EngineCore" in line and "pid=" in line], "an engine had been started already"
    return lines


@pytest.mark.parametrize(
    ("wrong", "names"),
    [
        ({"dram_sise": "1GiB"}, ("dram_sise", "dram_size")),
        ({"pool_dir": "/dev/shm/kvcellar-is-not-here"}, ("pool_dir", "/dev/shm/kvcellar-is-not-here")),
        ({"nvme_size": "900TiB"}, ("nvme_size",)),
    ],
    ids=["a key with a typing error", "a directory that is missing", "more than the disk has"],
)
def test_a_wrong_setting_is_the_last_line_before_anything_is_loaded(
    tmp_path: Path, wrong: dict[str, object], names: Sequence[str]
) -> None:
    cellar = {"nvme_dir": str(tmp_path), **wrong} if "nvme_size" in wrong else wrong
    last = serve(tmp_path / "serve.log", cellar)[-1]
    assert all(name in last for name in names), last


def test_sleep_mode_is_refused_by_name_before_anything_is_loaded(tmp_path: Path) -> None:
    log = tmp_path / "serve.log"
    lines = serve(log, {"dram_size": "64MiB"}, ["--enable-sleep-mode"], WHERE_SLEEP_MODE_EXISTS)
    assert "--enable-sleep-mode is not supported" in lines[-1], lines[-1]
