"""Reads Python modules as syntax trees, from a source tree or from a wheel, without importing anything."""

import ast
import zipfile
from pathlib import Path


class Sources:
    """The modules of one package, by path relative to it (`v1/outputs.py`).

    Args:
        location: a wheel (`*.whl`), or the package's folder, the one that holds its `__init__.py`.
        package: top-level package inside a wheel; a folder is taken as it is.
    """

    def __init__(self, location: Path, package: str = "vllm") -> None:
        self._folder = location
        self._prefix = package
        self._wheel = zipfile.ZipFile(location) if location.is_file() else None
        self._names = frozenset(self._wheel.namelist()) if self._wheel else frozenset()

    def text(self, module: str) -> str | None:
        """Source of a module, or None where this version has no such module."""
        if self._wheel is None:
            path = self._folder / module
            return path.read_text(encoding="utf-8") if path.is_file() else None
        name = f"{self._prefix}/{module}"
        return self._wheel.read(name).decode("utf-8") if name in self._names else None

    def tree(self, module: str) -> ast.Module | None:
        """Syntax tree of a module, or None where this version has no such module."""
        text = self.text(module)
        return None if text is None else ast.parse(text)

    def version(self) -> str:
        """Version in `_version.py`, without a local part such as `+cpu`.

        Raises:
            ValueError: the package states no version.
        """
        for node in ast.walk(self.tree("_version.py") or ast.Module(body=[], type_ignores=[])):
            if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Constant):
                continue
            if any(isinstance(target, ast.Name) and target.id == "version" for target in node.targets):
                return str(node.value.value).split("+")[0]
        raise ValueError(f"no version in {self._folder}/_version.py")
