"""Where setup puts things, all inside the checkout and ignored by git."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VENV = ROOT / ".venv"
VENV_PYTHON = VENV / "bin" / "python"
MARKERS = VENV / "setup-markers.json"
CACHE = ROOT / ".cache"
LOG = CACHE / "setup.log"
LOCK = CACHE / "setup.lock"
MODEL = CACHE / "model" / "smollm2-135m"
