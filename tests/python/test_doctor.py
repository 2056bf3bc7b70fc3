"""The doctor's line about vLLM, which Python adds."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from kvcellar import __main__ as command
from kvcellar import window
from kvcellar.command import run as run_command


def test_the_installed_vllm_is_named(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kvcellar", "doctor", str(tmp_path), "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    report = json.loads(done.stdout)
    lines = {line["name"]: line for line in report["findings"]}
    assert lines["vllm"]["status"] == "ok" and lines["vllm"]["found"] == window.vllm_version()
    assert {"kernel", "io_uring", "memlock", "shared memory", "nvme_dir", "O_DIRECT", "cuda"} <= set(lines)
    assert done.returncode == (report["worst"] == "problem")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("version", ["0.30.9", "0.34.0", "nonsense"])
def test_a_version_outside_the_window_is_a_problem(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window, "vllm_version", lambda: version)
    args = command._about_vllm()
    assert args[:3] == ["--vllm", version, "--vllm-problem"] and "0.31 to 0.33" in args[3]


def test_a_host_without_vllm_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> str:
        raise ModuleNotFoundError("vllm")

    monkeypatch.setattr(window, "vllm_version", missing)
    args = command._about_vllm()
    assert args[0] == "--vllm-missing" and "0.31 to 0.33" in args[1]
    assert run_command(["doctor", *args]) == 0
