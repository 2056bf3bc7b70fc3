"""Which packages are brought along, and which the machine with the GPU has: Python 3.12, torch 2.11 for CUDA 13."""

import subprocess
import sys
from pathlib import Path

VLLM = "0.32.0"
MATURIN = "maturin==1.16.0"
# What vLLM imports for a dense Llama and the machine lacks. Their own dependencies are there, or
# are not imported.
BROUGHT = (
    "annotated-types==0.8.0",
    "apache-tvm-ffi==0.1.11",
    "blake3==1.0.11",
    "cachetools==8.0.2",
    "cbor2==6.3.0",
    "compressed-tensors==0.17.0",
    "fastapi==0.136.3",
    "httpx2==2.16.2",
    "jsonschema==4.26.0",
    "jsonschema-specifications==2025.9.1",
    "llguidance==1.7.6",
    "loguru==0.7.3",
    "msgspec==0.22.0",
    "openai==3.57.0",
    "opentelemetry-api==1.45.2",
    "oss-harmony==0.0.11",
    "partial-json-parser==0.2.1.1.post7",
    "pybase64==1.5.1",
    "pydantic==2.14.4",
    "pydantic-core==2.50.5",
    "python-json-logger==4.2.0",
    "pyzmq==27.3.0",
    "referencing==0.37.0",
    "rpds-py==2026.9.1",
    "setproctitle==1.3.8",
    "sniffio==1.3.1",
    "starlette==1.10.0",
    "typing-inspection==0.4.5",
    "xgrammar==0.2.8",
)
# What the check of completeness puts into a clean environment: of what the machine has, what vLLM
# imports. Versions where they are known to be the machine's.
TORCH = "torch==2.11.0"
THERE = (
    "transformers==5.17.0",
    "numpy==2.5.2",
    "tokenizers==0.23.2",
    "sentencepiece==0.2.2",
    "safetensors==0.8.0",
    "huggingface-hub==1.33.0",
    "tiktoken==0.14.0",
    "torchvision==0.26.0",
    "aiofiles",
    "aiohappyeyeballs",
    "aiohttp",
    "aiosignal",
    "annotated-doc",
    "anyio",
    "attrs",
    "certifi",
    "charset-normalizer",
    "click",
    "cloudpickle",
    "einops",
    "frozenlist",
    "h11",
    "hf-xet",
    "httpcore",
    "httpx",
    "idna",
    "markdown-it-py",
    "mdurl",
    "multidict",
    "numba",
    "llvmlite",
    "nvidia-ml-py",
    "opencv-python-headless",
    "packaging",
    "pillow",
    "prometheus-client",
    "propcache",
    "protobuf",
    "psutil",
    "py-cpuinfo",
    "pygments",
    "pyyaml",
    "regex",
    "requests",
    "rich",
    "scipy",
    "shellingham",
    "six",
    "tqdm",
    "typer",
    "urllib3",
    "uvloop",
    "yarl",
)
_GLIBC = (28, 27, 24, 17, 34, 31, 35)


def pip(python: str | Path, *arguments: str) -> None:
    """Run pip."""
    subprocess.run(
        [str(python), "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments, "-q"], check=True
    )


def download(folder: Path, *packages: str) -> None:
    """Wheels of these packages for the machine's Python, without what they need."""
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in _GLIBC] + ["manylinux2014_x86_64", "manylinux1_x86_64"]
    wanted = ["--no-deps", "--only-binary=:all:", "--python-version=3.12", "--implementation=cp"]
    pip(
        sys.executable,
        "download",
        *wanted,
        f"--dest={folder}",
        *(f"--platform={name}" for name in platforms),
        *packages,
    )
