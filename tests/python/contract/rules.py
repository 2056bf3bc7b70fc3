"""Compares kvcellar's sources with the facts of one vLLM version. A rule returns complaints; none means it holds."""

from collections.abc import Iterable

from contract.facts import CONSTRUCTION, Facts
from contract.ours import Ours
from contract.shapes import Call, Method, Signature

RUNNER_V1 = "v1/worker/kv_connector_model_runner_mixin.py"
RUNNER_V2 = "v1/worker/gpu/kv_connector.py"


def theirs(facts: Facts, bases: Iterable[str]) -> dict[str, Method]:
    """Methods that a class with these vLLM bases has in this version; earlier bases win."""
    found: dict[str, Method] = {}
    for base in bases:
        for name, text in facts["methods"].get(base, {}).items():
            found.setdefault(name, Method.parse(text))
    return found


def missing(ours: dict[str, Method], base: dict[str, Method]) -> list[str]:
    """Abstract methods that are left out."""
    return [f"{name}: abstract in vLLM, not overridden" for name in base if base[name].abstract and name not in ours]


def unknown(ours: dict[str, Method], versions: Iterable[dict[str, Method]]) -> list[str]:
    """Public methods that override nothing in any supported version: misspelled, or left from an older vLLM."""
    known = {name for base in versions for name in base}
    return [f"{name}: overrides nothing in vLLM" for name in ours if not name.startswith("_") and name not in known]


def incompatible(ours: dict[str, Method], base: dict[str, Method]) -> list[str]:
    """Overrides of another kind, or that refuse a call which the base's signature allows."""
    complaints = []
    for name, method in ours.items():
        other = base.get(name)
        if other is None or name == "__init__":
            continue
        if method.kind != other.kind:
            complaints.append(f"{name}: a {method.kind} here, a {other.kind} in vLLM")
        elif not _covers(method.signature, other.signature):
            complaints.append(f"{name}: {method.signature.render()} here, {other.signature.render()} in vLLM")
    return complaints


def refused(ours: dict[str, Method], base: dict[str, Method], calls: Iterable[Call]) -> list[str]:
    """Uses of a connector that neither our class nor its base accepts."""
    complaints = []
    for call in calls:
        name = "__init__" if call.name == CONSTRUCTION else call.name
        method = ours.get(name, base.get(name))
        if call.positional is None:
            continue
        if method is None:
            complaints.append(f"{call.render()}: no such method")
        elif not accepts(method, call):
            complaints.append(f"{call.render()}: refused by {method.render()}")
    return complaints


def calls_of(facts: Facts) -> list[Call]:
    """Everything this version does with a connector."""
    texts = [text for functions in facts["calls"].values() for uses in functions.values() for text in uses]
    return [Call.parse(text) for text in dict.fromkeys(texts)]


def misbuilt(ours: Ours, facts: Facts, names: Iterable[str]) -> list[str]:
    """Constructions of vLLM's dataclasses and structs by us that this version would refuse."""
    complaints = []
    for name in names:
        method = Method("staticmethod", False, _constructor(facts["fields"].get(name, [])))
        complaints += [
            f"{call.render()}: refused by {name}{method.signature.render()}"
            for call in ours.calls_of(name)
            if not accepts(method, call, trust_double_star=True)
        ]
    return complaints


def unreadable(ours: Ours, facts: Facts, type_name: str) -> list[str]:
    """Attributes that we read from parameters of this type and that this version does not have."""
    known = {field.removesuffix("=...") for field in facts["fields"].get(type_name, [])}
    known |= set(facts["attributes"].get(type_name, [])) | set(facts["methods"].get(type_name, {}))
    return [f"{type_name}.{name} does not exist" for name in sorted(ours.attributes_read(type_name) - known)]


def out_of_order(facts: Facts, module: str, function: str, expected: tuple[str, ...]) -> list[str]:
    """Names in `expected` that the function does not use in this order."""
    names = [Call.parse(text).name for text in facts["calls"].get(module, {}).get(function, [])]
    at = 0
    for name in expected:
        if name not in names[at:]:
            return [f"{module} {function}: {name} is missing or too early in {names}"]
        at = names.index(name, at) + 1
    return []


def accepts(method: Method, call: Call, *, trust_double_star: bool = False) -> bool:
    """Whether a method, called on an instance or class, takes the call.

    `*xs` and `**xs` of a call hold what no source tells: the method has to take any of it, unless `trust_double_star`.
    """
    if call.positional is None:
        return method.kind == "property"
    if method.kind == "property":
        return False
    signature = method.signature
    positional = signature.positional if method.kind == "staticmethod" else signature.positional[1:]
    if (call.star or call.positional > len(positional)) and not signature.var_positional:
        return False
    if call.double_star and not signature.var_keyword and not trust_double_star:
        return False
    by_name = {*positional[call.positional :], *signature.keyword_only}
    if not signature.var_keyword and not by_name.issuperset(call.keywords):
        return False
    owed = (by_name & signature.required) - set(call.keywords)
    return not owed or call.star or call.double_star


def _covers(ours: Signature, base: Signature) -> bool:
    """Whether `ours` takes every call that `base` takes: same names in the same places, extra ones optional."""
    shared = ours.positional[: len(base.positional)]
    extra = ours.required - base.required
    open_ended = (ours.var_positional or not base.var_positional) and (ours.var_keyword or not base.var_keyword)
    return shared == base.positional and not extra and open_ended and set(base.keyword_only) <= set(ours.keyword_only)


def _constructor(fields: list[str]) -> Signature:
    names = tuple(field.removesuffix("=...") for field in fields)
    optional = frozenset(field.removesuffix("=...") for field in fields if field.endswith("=..."))
    return Signature(names, (), optional, var_positional=False, var_keyword=False)
