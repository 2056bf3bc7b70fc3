"""Collects the facts of one vLLM version: names and signatures only, in the order of the sources."""

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TypedDict

from contract.shapes import Call, FunctionNode, Method, class_named, fields_of, functions_of
from contract.sources import Sources

CONNECTOR = "distributed/kv_transfer/kv_connector"
BASE, METRICS = f"{CONNECTOR}/v1/base.py", f"{CONNECTOR}/v1/metrics.py"

CLASSES = {
    "KVConnectorBase_V1": BASE,
    "SupportsHMA": BASE,
    "KVConnectorMetadata": BASE,
    "KVConnectorHandshakeMetadata": BASE,
    "KVConnectorWorkerMetadata": BASE,
    "KVConnectorStats": METRICS,
    "KVConnectorPromMetrics": METRICS,
    "KVConnectorFactory": f"{CONNECTOR}/factory.py",
    "KVConnectorBlockState": "v1/core/sched/output.py",
}
FIELDS = {
    "KVConnectorTransferResults": BASE,
    "KVConnectorOutput": "v1/outputs.py",
    "KVConnectorBlockState": "v1/core/sched/output.py",
    "NewRequestData": "v1/core/sched/output.py",
    "CachedRequestData": "v1/core/sched/output.py",
    "SchedulerOutput": "v1/core/sched/output.py",
    "BlockStored": "distributed/kv_events.py",
    "BlockRemoved": "distributed/kv_events.py",
    "AllBlocksCleared": "distributed/kv_events.py",
    "KVCacheTensor": "v1/kv_cache_interface.py",
    "KVCacheGroupSpec": "v1/kv_cache_interface.py",
    "KVCacheConfig": "v1/kv_cache_interface.py",
    "KVTransferConfig": "config/kv_transfer.py",
}
ATTRIBUTES = {"Request": "v1/request.py", "KVConnectorBase_V1": BASE}
ENUMS = {"CacheHitSource": "v1/metrics/cache_hit_source.py", "KVConnectorRole": BASE}
CALLERS = (
    "v1/core/sched/scheduler.py",
    "v1/engine/core.py",
    "v1/worker/gpu_worker.py",
    "v1/worker/gpu_model_runner.py",
    "v1/worker/kv_connector_model_runner_mixin.py",
    "v1/worker/gpu/kv_connector.py",
    "model_executor/layers/attention/kv_transfer_utils.py",
    "config/vllm.py",
    f"{CONNECTOR}/factory.py",
    f"{CONNECTOR}/utils.py",
    METRICS,
)
# Expressions that yield a connector or its class. `self.connector` is one in the scheduler,
# `self.kv_connector` in model runner V2's adapter; locals and parameters are followed inside each
# function.
ATTRIBUTES_HOLDING_ONE = frozenset({"self.connector", "self.kv_connector", "self.connector_cls"})
CALLS_YIELDING_ONE = frozenset({"get_kv_transfer_group", "get_kv_connector", "get_connector_class", "create_connector"})
TYPES_OF_ONE = ("KVConnectorBase", "KVConnectorBase_V1")
CONSTRUCTION = "__call__"


class Facts(TypedDict):
    """Facts of one vLLM version; see `shapes` for the strings.

    Attributes:
        methods: class -> method -> kind and signature.
        fields: class -> fields in order.
        attributes: class -> sorted names readable on an instance.
        enums: enum -> members in order.
        calls: module -> function -> what it does with a connector, in order. `__call__` is the construction.
    """

    vllm: str
    methods: dict[str, dict[str, str]]
    fields: dict[str, list[str]]
    attributes: dict[str, list[str]]
    enums: dict[str, list[str]]
    calls: dict[str, dict[str, list[str]]]


def collect(sources: Sources) -> Facts:
    """All facts of one version. A class that this version does not have is left out."""
    return {
        "vllm": sources.version(),
        "methods": {name: _methods(node) for name, node in _classes(sources, CLASSES)},
        "fields": {name: fields_of(node) for name, node in _classes(sources, FIELDS)},
        "attributes": {name: _attributes(node) for name, node in _classes(sources, ATTRIBUTES)},
        "enums": {name: _members(node) for name, node in _classes(sources, ENUMS)},
        "calls": {module: calls for module in CALLERS if (calls := calls_in(sources.tree(module)))},
    }


def calls_in(tree: ast.Module | None) -> dict[str, list[str]]:
    """Function -> its uses of a connector, in source order; functions without any are left out.

    Functions of several classes that share a name are told apart by `Class.function`.
    """
    found = {name: _uses(function) for name, function in _functions(tree)} if tree is not None else {}
    return {name: uses for name, uses in found.items() if uses}


def write(facts: Facts, folder: Path) -> Path:
    """Write the facts to `vllm-VERSION.json` in `folder` and return that path."""
    path = folder / f"vllm-{facts['vllm']}.json"
    path.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return path


def read(path: Path) -> Facts:
    """Facts written by `write`."""
    facts: Facts = json.loads(path.read_text(encoding="utf-8"))
    return facts


def _classes(sources: Sources, wanted: dict[str, str]) -> Iterator[tuple[str, ast.ClassDef]]:
    for name, module in wanted.items():
        node = class_named(sources.tree(module), name)
        if node is not None:
            yield name, node


def _methods(node: ast.ClassDef) -> dict[str, str]:
    return {function.name: Method.of(function).render() for function in functions_of(node)}


def _members(node: ast.ClassDef) -> list[str]:
    assignments = [item for item in node.body if isinstance(item, ast.Assign)]
    return [target.id for item in assignments for target in item.targets if isinstance(target, ast.Name)]


def _attributes(node: ast.ClassDef) -> list[str]:
    names = {function.name for function in functions_of(node)} | set(_members(node))
    for item in ast.walk(node):
        if isinstance(item, ast.Attribute) and isinstance(item.ctx, ast.Store) and ast.unparse(item.value) == "self":
            names.add(item.attr)
    return sorted(name for name in names if not name.startswith("__"))


def _functions(tree: ast.Module) -> Iterator[tuple[str, FunctionNode]]:
    for function in functions_of(tree):
        yield function.name, function
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            yield from ((f"{node.name}.{function.name}", function) for function in functions_of(node))


def _uses(function: FunctionNode) -> list[str]:
    names = _local_names(function)
    calls = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
    called = {id(call.func): call for call in calls}
    uses: list[tuple[int, int, str]] = []
    for node in ast.walk(function):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and _yields_one(node.value, names):
            call = called.get(id(node))
            use = Call.of(node.attr, call) if call is not None else Call(node.attr, None)
        elif isinstance(node, ast.Name) and id(node) in called and node.id in names:
            use = Call.of(CONSTRUCTION, called[id(node)])
        else:
            continue
        if use.positional is not None or not use.name.startswith("__"):
            uses.append((node.end_lineno or node.lineno, node.end_col_offset or node.col_offset, use.render()))
    return [text for _, _, text in sorted(uses)]


def _local_names(function: FunctionNode) -> frozenset[str]:
    arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    names = {argument.arg for argument in arguments if _annotated_as_one(argument.annotation)}
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and _yields_one(node.value, frozenset()):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return frozenset(names)


def _annotated_as_one(annotation: ast.expr | None) -> bool:
    return annotation is not None and ast.unparse(annotation).strip("'\"") in TYPES_OF_ONE


def _yields_one(node: ast.expr, names: frozenset[str]) -> bool:
    if isinstance(node, ast.Call):
        return ast.unparse(node.func).split(".")[-1] in CALLS_YIELDING_ONE
    if isinstance(node, ast.Name):
        return node.id in names
    return isinstance(node, ast.Attribute) and ast.unparse(node) in ATTRIBUTES_HOLDING_ONE
