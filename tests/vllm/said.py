"""What an engine's log says of us."""

from pathlib import Path

LOUD = (" WARNING ", " ERROR ")


def warnings(log: Path, about: str) -> list[str]:
    """What is more than information, is ours, and names this."""
    lines = log.read_text(errors="replace").splitlines()
    return [line for line in lines if "KV Cellar: " in line and about in line and any(loud in line for loud in LOUD)]
