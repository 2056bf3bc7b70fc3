"""What an engine's log says of us."""

from pathlib import Path


def warnings(log: Path, about: str) -> list[str]:
    """Our warnings in which this is named."""
    lines = log.read_text(errors="replace").splitlines()
    return [line for line in lines if " WARNING " in line and "KV Cellar: " in line and about in line]
