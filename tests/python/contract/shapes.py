"""Signatures, calls and fields as short strings, and back.

A method reads `abstract method (self, request, limit=...)`, a call reads `take(_, limit=_, **_)` (an attribute that is
only read has no parentheses), a field reads `name` or, with a default, `name=...`.
"""

import ast
from dataclasses import dataclass
from typing import Self

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Signature:
    """Parameters of a function as vLLM or kvcellar writes them.

    Attributes:
        positional: names that may be given by position, in order, `self` or `cls` included.
        keyword_only: names after `*`.
        optional: those of the above that have a default.
        var_positional, var_keyword: whether there is `*args`, `**kwargs`.
    """

    positional: tuple[str, ...]
    keyword_only: tuple[str, ...]
    optional: frozenset[str]
    var_positional: bool
    var_keyword: bool

    @classmethod
    def of(cls, node: FunctionNode) -> Self:
        """The signature of a function definition."""
        arguments = node.args
        positional = tuple(argument.arg for argument in [*arguments.posonlyargs, *arguments.args])
        keyword_only = tuple(argument.arg for argument in arguments.kwonlyargs)
        defaulted = positional[len(positional) - len(arguments.defaults) :]
        keyword_defaulted = (
            name for name, default in zip(keyword_only, arguments.kw_defaults, strict=True) if default is not None
        )
        optional = frozenset({*defaulted, *keyword_defaulted})
        return cls(positional, keyword_only, optional, arguments.vararg is not None, arguments.kwarg is not None)

    def render(self) -> str:
        """`(self, request, limit=...)`: valid Python between the parentheses, so that it can be read back."""
        parts = [self._parameter(name) for name in self.positional]
        if self.var_positional:
            parts.append("*args")
        elif self.keyword_only:
            parts.append("*")
        parts += [self._parameter(name) for name in self.keyword_only]
        if self.var_keyword:
            parts.append("**kwargs")
        return f"({', '.join(parts)})"

    def _parameter(self, name: str) -> str:
        return f"{name}=..." if name in self.optional else name

    @property
    def required(self) -> frozenset[str]:
        """Names a caller has to give."""
        return frozenset({*self.positional, *self.keyword_only}) - self.optional


@dataclass(frozen=True)
class Method:
    """A function of a class: `kind` is method, classmethod, staticmethod or property."""

    kind: str
    abstract: bool
    signature: Signature

    @classmethod
    def of(cls, node: FunctionNode) -> Self:
        """The method as defined; one whose body only raises NotImplementedError counts as abstract."""
        decorators = {ast.unparse(decorator).split("(")[0].split(".")[-1] for decorator in node.decorator_list}
        kinds = decorators & {"classmethod", "staticmethod", "property", "cached_property"}
        kind = kinds.pop().removeprefix("cached_") if kinds else "method"
        return cls(kind, "abstractmethod" in decorators or _only_raises(node), Signature.of(node))

    @classmethod
    def parse(cls, text: str) -> Self:
        """The inverse of `render`."""
        words, _, parameters = text.partition("(")
        *flags, kind = words.split()
        node = ast.parse(f"def _({parameters}: ...").body[0]
        assert isinstance(node, ast.FunctionDef)
        return cls(kind, "abstract" in flags, Signature.of(node))

    def render(self) -> str:
        """`abstract classmethod (cls, config)`."""
        return f"{'abstract ' if self.abstract else ''}{self.kind} {self.signature.render()}"


@dataclass(frozen=True)
class Call:
    """A call, or the reading of an attribute (`positional` is None then).

    Attributes:
        positional: number of arguments given by position.
        keywords: names of arguments given by name.
        star, double_star: whether `*xs` or `**xs` is passed, whose contents the source does not tell.
    """

    name: str
    positional: int | None
    keywords: tuple[str, ...] = ()
    star: bool = False
    double_star: bool = False

    @classmethod
    def of(cls, name: str, node: ast.Call) -> Self:
        """The call in `node`, under the given name."""
        star = any(isinstance(argument, ast.Starred) for argument in node.args)
        keywords = tuple(keyword.arg for keyword in node.keywords if keyword.arg is not None)
        return cls(name, len(node.args) - star, keywords, star, len(keywords) < len(node.keywords))

    @classmethod
    def parse(cls, text: str) -> Self:
        """The inverse of `render`."""
        expression = ast.parse(text, mode="eval").body
        if isinstance(expression, ast.Call) and isinstance(expression.func, ast.Name):
            return cls.of(expression.func.id, expression)
        return cls(text, None)

    def render(self) -> str:
        """`take(_, limit=_, **_)`."""
        if self.positional is None:
            return self.name
        parts = ["_"] * self.positional + ["*_"] * self.star + [f"{name}=_" for name in self.keywords]
        return f"{self.name}({', '.join(parts + ['**_'] * self.double_star)})"


def _only_raises(node: FunctionNode) -> bool:
    body = [statement for statement in node.body if not _is_docstring(statement)]
    if len(body) != 1 or not isinstance(body[0], ast.Raise) or body[0].exc is None:
        return False
    return "NotImplementedError" in ast.unparse(body[0].exc)


def _is_docstring(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def functions_of(node: ast.ClassDef | ast.Module) -> list[FunctionNode]:
    """Functions directly in a class or module, in source order."""
    return [item for item in node.body if isinstance(item, FunctionNode)]


def class_named(tree: ast.Module | None, name: str) -> ast.ClassDef | None:
    """A class by name, wherever it is defined in the module."""
    nodes = ast.walk(tree) if tree is not None else ()
    return next((node for node in nodes if isinstance(node, ast.ClassDef) and node.name == name), None)


def fields_of(node: ast.ClassDef) -> list[str]:
    """Annotated fields of a dataclass or struct, in order: `name`, or `name=...` with a default."""
    found = [item for item in node.body if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)]
    return [f"{ast.unparse(item.target)}{'' if item.value is None else '=...'}" for item in found]
