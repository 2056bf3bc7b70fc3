"""Markers: which step finished with which inputs. They live inside the virtual environment and vanish with it."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path


def fingerprint_texts(parts: Iterable[str]) -> str:
    """SHA-256 (hex) over the given texts, each preceded by its length so that no two lists collide."""
    digest = hashlib.sha256()
    for part in parts:
        encoded = part.encode()
        digest.update(len(encoded).to_bytes(8, "little"))
        digest.update(encoded)
    return digest.hexdigest()


def fingerprint_files(root: Path, names: Iterable[str]) -> str:
    """SHA-256 (hex) over paths and contents of the named files and folders below `root`; missing names are skipped."""
    digest = hashlib.sha256()
    for path in sorted(_files(root, names)):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root)}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def _files(root: Path, names: Iterable[str]) -> Iterable[Path]:
    for name in names:
        top = root / name
        if top.is_file():
            yield top
        for path in top.rglob("*") if top.is_dir() else ():
            if path.is_file() and "__pycache__" not in path.parts and path.suffix not in {".so", ".pyc"}:
                yield path


class Markers:
    """The marker file: step name to fingerprint. An unreadable file counts as empty, so every step runs again."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, str] = {}
        if path.is_file():
            try:
                self._known = json.loads(path.read_text())
            except ValueError:
                path.unlink()

    def matches(self, step: str, fingerprint: str) -> bool:
        """Whether `step` finished with exactly these inputs."""
        return self._known.get(step) == fingerprint

    def record(self, step: str, fingerprint: str) -> None:
        """Note that `step` finished; written at once, so that an interruption later loses nothing."""
        self._known[step] = fingerprint
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self._known, indent=2) + "\n")
        temporary.replace(self._path)
