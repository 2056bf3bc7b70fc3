"""Where NVRTC may be, the run-time compiler that torch brings: it compiles the kernel that loads small fragments."""

from importlib.util import find_spec
from pathlib import Path


def libraries() -> list[str]:
    """Files of the library, newest first. None without torch, which is not imported for this."""
    torch = find_spec("torch")
    if torch is None or torch.origin is None:
        return []
    packages = Path(torch.origin).parents[1]
    return [str(library) for library in sorted(packages.glob("nvidia/*/lib/libnvrtc.so.*"), reverse=True)]
