"""Canonical form of configuration: equal objects give equal JSON, in every process and at every start.

Owns: how any Python object is written down, field by field. Promises: no address, no order of a set and no counter of
a process gets in; what cannot be written down is a doubt, never a guess. Does not know which fields matter: that is
`kvcellar.neutral`.
"""

import dataclasses
import enum
import functools
import hashlib
import json
import re
import types
from collections import deque
from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import PurePath
from typing import Any, TypeAlias

# More than this is no configuration.
VALUES_MAX = 200_000
DEPTH_MAX = 40
_PLAIN = (bool, int, str, type(None))
# Their text says everything and is the same in every process.
_BY_TEXT = (float, complex, range, PurePath, re.Pattern)
_BY_TEXT_NAMES = frozenset(
    {
        "torch.dtype",
        "torch.device",
        "torch.layout",
        "torch.memory_format",
        "torch.Size",
        "numpy.dtype",
        "decimal.Decimal",
        "fractions.Fraction",
        "datetime.datetime",
        "datetime.date",
        "datetime.timedelta",
        "uuid.UUID",
    }
)
# Where transformers keeps custom code: the rest of such a module's name is a path or a commit.
_CUSTOM_CODE = "transformers_modules"

Json: TypeAlias = "bool | int | str | list[Json] | dict[str, Json] | None"


class Dump:
    """Writes objects down.

    Attributes:
        doubts: what could not be written down, as path and reason.
    """

    def __init__(self, neutral: Mapping[str, str]) -> None:
        """Args: neutral: fields that are left out, as ``Class.field``, with the reason of each."""
        self._neutral = neutral
        self.doubts: list[str] = []
        self._values = 0
        self._open: list[int] = []

    def of(self, value: object, path: str) -> Json:
        """The canonical form of a value; `path` names it in doubts."""
        self._values += 1
        if isinstance(value, enum.Enum):
            return f"{class_name(type(value))}.{value.name}"
        if isinstance(value, _PLAIN):
            return value if type(value) in _PLAIN else f"{class_name(type(value))}:{value}"
        if self._values > VALUES_MAX or len(self._open) > DEPTH_MAX:
            return self._doubt(path, "it is too large to be configuration")
        if id(value) in self._open:
            return f"again:{len(self._open) - self._open.index(id(value))}"
        self._open.append(id(value))
        try:
            return self._composite(value, path)
        finally:
            self._open.pop()

    def _composite(self, value: object, path: str) -> Json:
        if _full_name(type(value)) in _BY_TEXT_NAMES:
            return _as_text(value)
        for types_, write in _WRITERS:
            if isinstance(value, types_):
                return write(self, value, path)
        array = _array(value)
        return self._object(value, path) if array is None else array

    def _set(self, value: Set[object], path: str) -> Json:
        return {"set": sorted((self.of(item, f"{path}{{}}") for item in value), key=text)}

    def _sequence(self, value: Sequence[object], path: str) -> Json:
        return [self.of(item, f"{path}[{index}]") for index, item in enumerate(value)]

    def _mapping(self, value: Mapping[object, object], path: str) -> Json:
        if all(type(key) is str for key in value):
            return {str(key): self.of(item, f"{path}.{key}") for key, item in value.items()}
        pairs = [[self.of(key, f"{path}.key"), self.of(item, f"{path}[{key!r}]")] for key, item in value.items()]
        return {"mapping": sorted(pairs, key=text)}

    def _partial(self, value: functools.partial[object], path: str) -> Json:
        return {"partial": self.of([value.func, value.args, value.keywords], path)}

    def _method(self, value: types.MethodType, path: str) -> Json:
        return {"method": self.of([value.__func__, value.__self__], path)}

    def _function(self, value: types.FunctionType, path: str) -> Json:
        """A function is its code and what it closes over: its name alone says too little."""
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        return {
            "function": value.__qualname__,
            "code": self.of(_code(value.__code__), path),
            "defaults": self.of([value.__defaults__, value.__kwdefaults__], path),
            "closure": self.of(cells, path),
        }

    def _object(self, value: object, path: str) -> Json:
        fields = attributes(value)
        if fields is None:
            return self._doubt(path, f"a {class_name(type(value))} cannot be written down")
        dumped: dict[str, Json] = {"class": class_name(type(value))}
        names = [cls.__name__ for cls in type(value).__mro__]
        for name, item in fields.items():
            if not any(f"{cls}.{name}" in self._neutral for cls in names):
                dumped[name] = self.of(item, f"{path}.{name}")
        return dumped

    def _doubt(self, path: str, reason: str) -> str:
        self.doubts.append(f"{path}: {reason}")
        return "unknown"


_Writer: TypeAlias = Callable[[Dump, Any, str], Json]

_WRITERS: tuple[tuple[type | tuple[type, ...], _Writer], ...] = (
    (_BY_TEXT, lambda _, value, __: _as_text(value)),
    ((bytes, bytearray), lambda _, value, __: f"bytes:{hashlib.sha256(value).hexdigest()}"),
    (Mapping, Dump._mapping),
    ((set, frozenset), Dump._set),
    ((list, tuple, deque), Dump._sequence),
    (type, lambda _, value, __: f"class:{class_name(value)}"),
    (types.ModuleType, lambda _, value, __: f"module:{value.__name__}"),
    (types.BuiltinFunctionType, lambda _, value, __: f"function:{value.__module__}.{value.__qualname__}"),
    (functools.partial, Dump._partial),
    (types.MethodType, Dump._method),
    (types.FunctionType, Dump._function),
)


def text(value: Json) -> str:
    """The one text of a canonical form."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def digest(value: Json) -> str:
    """A short name of a canonical form."""
    return hashlib.sha256(text(value).encode()).hexdigest()[:32]


def class_name(cls: type) -> str:
    """A class by its place in the sources; of custom code, whose place is a cache, by its own name only."""
    return cls.__qualname__ if cls.__module__.startswith(_CUSTOM_CODE) else _full_name(cls)


def attributes(value: object) -> dict[str, object] | None:
    """An object's fields and whatever else was set on it; `None` for one that keeps its state out of sight.

    What a property has remembered is left out: it follows from the rest, and when it is first asked is chance.
    """
    names = [field.name for field in _fields(value)]
    for cls in type(value).__mro__:
        slots = cls.__dict__.get("__slots__", ())
        names += [slots] if isinstance(slots, str) else list(slots)
    names += getattr(type(value), "__struct_fields__", ())
    own = getattr(value, "__dict__", None)
    if own is None and not names:
        return None
    names += own or ()
    cached = {name for name in names if isinstance(_class_attribute(type(value), name), functools.cached_property)}
    found = {name: getattr(value, name, None) for name in names if not name.startswith("__") and name not in cached}
    return dict(sorted(found.items()))


def _fields(value: Any) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(value) if dataclasses.is_dataclass(value) else ()


def _as_text(value: object) -> str:
    return f"{class_name(type(value))}:{value!r}"


def _class_attribute(cls: type, name: str) -> object:
    return next((base.__dict__[name] for base in cls.__mro__ if name in base.__dict__), None)


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}".removeprefix("builtins.")


def _array(value: Any) -> str | None:
    """A tensor or an array: its shape, type and bytes."""
    package = type(value).__module__.partition(".")[0]
    if package == "torch" and hasattr(value, "detach"):
        import torch

        raw = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    elif package == "numpy" and hasattr(value, "tobytes"):
        raw = value
    else:
        return None
    return f"array:{tuple(value.shape)}:{value.dtype}:{hashlib.sha256(raw.tobytes()).hexdigest()}"


def _code(code: types.CodeType) -> list[object]:
    """What a function does, without where its source lies."""
    consts = [_code(const) if isinstance(const, types.CodeType) else const for const in code.co_consts]
    return [code.co_code, consts, code.co_names, code.co_varnames, code.co_freevars]
