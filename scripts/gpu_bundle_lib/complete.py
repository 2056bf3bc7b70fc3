"""Whether a bundle is complete: unpacked beside a clean Python 3.12 with torch 2.11, everything imports.

No GPU is needed. The compiled files are linked to the driver's library, so one takes its place that has the names they
ask for and answers every call with "no device". What computes rightly, and whether it computes at all, only a GPU says.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from gpu_bundle_lib.packages import THERE, TORCH, pip
from gpu_bundle_lib.parts import COMPILED, FLASH, PLUGIN, ROOT, SITE

PYTHON = "3.12"
_LINKED_TO = "libcuda.so.1"


def find_python() -> str | None:
    """An interpreter of the machine's version: PYTHON312, one on PATH, or one of pyenv's."""
    places = [os.environ.get("PYTHON312"), shutil.which(f"python{PYTHON}")]
    places += map(str, Path.home().glob(f".pyenv/versions/{PYTHON}.*/bin/python{PYTHON}"))
    for place in filter(None, places):
        done = subprocess.run(
            [place, "-c", "import sys; print(sys.version)"], capture_output=True, text=True, check=False
        )
        if done.returncode == 0 and done.stdout.startswith(f"{PYTHON}."):
            return place
    return None


def environment(folder: Path) -> Path | None:
    """A clean environment as the machine has it, made once: about 5 GiB. None without a Python of that version."""
    python = folder / "bin" / "python"
    wanted = json.dumps([TORCH, *THERE])
    made = folder / "made.json"
    if made.exists() and made.read_text() == wanted:
        return python
    interpreter = find_python()
    if interpreter is None:
        return None
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([interpreter, "-m", "venv", str(folder)], check=True)
    pip(python, "install", TORCH)
    # Nothing comes along that the machine may lack.
    pip(python, "install", "--no-deps", *THERE)
    made.write_text(wanted)
    return python


def _stand_in_for_driver(site: Path, folder: Path) -> None:
    names: set[str] = set()
    for compiled in (COMPILED, FLASH):
        done = subprocess.run(
            ["nm", "-D", "--undefined-only", str(site / compiled)], capture_output=True, text=True, check=True
        )
        names |= set(re.findall(r"\bU (cu[A-Z]\w*)$", done.stdout, re.MULTILINE))
    # The runtime's and the libraries' names begin with "cuda", "cublas" and so on.
    source = "".join(
        f"int {name}(void) {{ return 100; }}\n" for name in sorted(names | {"cuInit", "cuGetProcAddress_v2"})
    )
    command = ["cc", "-shared", "-fPIC", f"-Wl,-soname,{_LINKED_TO}", "-x", "c", "-", "-o", str(folder / _LINKED_TO)]
    subprocess.run(command, input=source, text=True, check=True)


PROGRAM = f"""
import importlib, json, sys
import torch
assert torch.__version__.startswith("2.11"), torch.__version__
import vllm._C_stable_libtorch
for name in ("rms_norm", "fused_add_rms_norm", "silu_and_mul", "rotary_embedding"):
    getattr(torch.ops._C, name)
torch.ops._C_cache_ops.reshape_and_cache_flash
import vllm.vllm_flash_attn._vllm_fa3_C
torch.ops._vllm_fa3_C.fwd
for name in (
    "vllm", "vllm.entrypoints.llm", "vllm.platforms.cuda", "vllm.v1.engine.core", "vllm.v1.worker.gpu_worker",
    "vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.gpu.model_runner", "vllm.v1.attention.backends.flash_attn",
    "vllm.v1.attention.backends.triton_attn", "vllm.model_executor.models.llama",
    "vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector", "vllm.v1.structured_output",
    "kvcellar._native", "kvcellar.connector", "gpu_check_lib.__main__", "gpu_check_lib.scenarios",
):
    importlib.import_module(name)
from importlib.metadata import entry_points
plugins = {{point.name for point in entry_points(group="vllm.general_plugins")}}
assert {{"kvcellar", {PLUGIN!r}}} <= plugins, plugins
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm.model_executor.model_loader import dummy_loader
assert dummy_loader.initialize_single_dummy_weight.__module__ == {PLUGIN!r}
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
assert "KVCellarConnector" in KVConnectorFactory._registry
print(json.dumps({{name: sys.modules[name].__file__ for name in ("vllm", "kvcellar", "torch")}}))
"""


def why_not(bundle: Path, python: Path) -> str | None:
    """What is missing; none: the bundle is complete, as far as imports show it."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        subprocess.run([str(python), str(bundle / "unpack.py"), str(folder)], check=True)
        site = folder / SITE
        _stand_in_for_driver(site, folder)
        variables = {
            "PYTHONPATH": os.pathsep.join(map(str, (site, ROOT / "scripts"))),
            "LD_LIBRARY_PATH": str(folder),
            "PATH": os.environ["PATH"],
            "HOME": str(folder),
            "VLLM_USE_FLASHINFER_SAMPLER": "0",
        }
        done = subprocess.run(
            [str(python), "-c", PROGRAM], env=variables, cwd=folder, capture_output=True, text=True, check=False
        )
        if done.returncode:
            print(done.stdout + done.stderr, file=sys.stderr)
            return done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit status {done.returncode}"
        found = json.loads(done.stdout.splitlines()[-1])
        if not (found["vllm"].startswith(str(site)) and found["kvcellar"].startswith(str(site))):
            return f"other packages than the bundle's were imported: {found}"
        return _why_binaries_do_not_start(folder / "binaries")


def _why_binaries_do_not_start(folder: Path) -> str | None:
    for binary in sorted(folder.iterdir()):
        done = subprocess.run([str(binary), "--list"], capture_output=True, text=True, check=False)
        if done.returncode or ": test" not in done.stdout:
            return f"{binary.name} does not list its tests"
    return None
