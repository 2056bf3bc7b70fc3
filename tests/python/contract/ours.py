"""kvcellar's own Python sources, read the same way as vLLM's: nothing is imported."""

import ast
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from contract.shapes import Call, FunctionNode, Method, functions_of


@dataclass(frozen=True)
class Ours:
    """The modules of a package of ours, by path relative to its folder."""

    modules: dict[str, ast.Module]

    @classmethod
    def in_folder(cls, folder: Path) -> Self:
        """All modules below `folder`."""
        paths = sorted(folder.rglob("*.py"))
        return cls({str(path.relative_to(folder)): ast.parse(path.read_text(encoding="utf-8")) for path in paths})

    @classmethod
    def of_text(cls, text: str) -> Self:
        """A package of one module, for tests of the rules."""
        return cls({"example.py": ast.parse(text)})

    def methods_of(self, name: str) -> dict[str, Method]:
        """Methods of a class, those inherited from other classes of ours included.

        Raises:
            KeyError: there is no such class.
        """
        node = self._classes()[name]
        found: dict[str, Method] = {}
        for base in reversed([self._last_name(base) for base in node.bases]):
            if base in self._classes():
                found |= self.methods_of(base)
        return found | {function.name: Method.of(function) for function in functions_of(node)}

    def subclasses_of(self, base: str) -> list[str]:
        """Classes that name `base` among their bases, sorted."""
        classes = self._classes().items()
        return sorted(name for name, node in classes if base in map(self._last_name, node.bases))

    def bases_of(self, name: str) -> frozenset[str]:
        """Last names of a class's direct bases.

        Raises:
            KeyError: there is no such class.
        """
        return frozenset(map(self._last_name, self._classes()[name].bases))

    def calls_of(self, callee: str) -> list[Call]:
        """Calls of a function or class by its last name, in every module."""
        calls = [node for node in self._nodes() if isinstance(node, ast.Call)]
        return [Call.of(callee, call) for call in calls if self._last_name(call.func) == callee]

    def attributes_read(self, type_name: str) -> frozenset[str]:
        """Attributes read from parameters that are annotated with exactly this type."""
        functions = [node for node in self._nodes() if isinstance(node, FunctionNode)]
        return frozenset().union(*(self._read_in(function, type_name) for function in functions))

    def _read_in(self, function: FunctionNode, type_name: str) -> frozenset[str]:
        arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        typed = {argument.arg for argument in arguments if self._annotation(argument) == type_name}
        return frozenset(
            node.attr
            for node in ast.walk(function)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in typed
        )

    def _classes(self) -> dict[str, ast.ClassDef]:
        return {node.name: node for node in self._nodes() if isinstance(node, ast.ClassDef)}

    def _nodes(self) -> list[ast.AST]:
        return [node for tree in self.modules.values() for node in ast.walk(tree)]

    @staticmethod
    def _annotation(argument: ast.arg) -> str:
        text = "" if argument.annotation is None else ast.unparse(argument.annotation).strip("'\"")
        return text.split(".")[-1]

    @staticmethod
    def _last_name(node: ast.expr) -> str:
        return ast.unparse(node).split("[")[0].split(".")[-1]
