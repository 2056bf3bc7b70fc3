"""Router and index beside a real Kubernetes API server: pools, pods, objectives, rights, and a server that goes away.

Runs where `KVCELLAR_TEST_KUBE` names the folder with etcd and kube-apiserver that `scripts/kubernetes-tools server`
builds. No pod runs: their states are written as a kubelet would.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import charts
import pytest
from kube_server import USER, KubeServer, kube_server, programs

from tests.deadlines import deadline

pytestmark = pytest.mark.timeout(deadline(charts.BUILD_S + 300.0))

NAMESPACE = "llm"
PODS = f"/api/v1/namespaces/{NAMESPACE}/pods"
POOLS = f"/apis/inference.networking.k8s.io/v1/namespaces/{NAMESPACE}/inferencepools"
OBJECTIVES = f"/apis/inference.networking.x-k8s.io/v1alpha2/namespaces/{NAMESPACE}/inferenceobjectives"
ROLES = f"/apis/rbac.authorization.k8s.io/v1/namespaces/{NAMESPACE}"
# On a good machine; see `deadline`.
SOON_S = 30.0


def definition(group: str, version: str, kind: str) -> dict[str, Any]:
    """A custom resource whose spec may be anything."""
    plural = f"{kind.lower()}s"
    spec = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    schema = {"openAPIV3Schema": {"type": "object", "properties": {"spec": spec}}}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        # The API server keeps names below k8s.io for those who are approved.
        "metadata": {"name": f"{plural}.{group}", "annotations": {"api-approved.kubernetes.io": "unapproved, a test"}},
        "spec": {
            "group": group,
            "scope": "Namespaced",
            "names": {"kind": kind, "plural": plural, "singular": kind.lower()},
            "versions": [{"name": version, "served": True, "storage": True, "schema": schema}],
        },
    }


def eventually(what: str, is_so: Callable[[], bool]) -> None:
    """Waits for it."""
    until = time.monotonic() + deadline(SOON_S)
    while not is_so():
        assert time.monotonic() < until, f"never: {what}"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def kube(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KubeServer]:
    """A server with the kinds, the namespace and the rights that the router needs."""
    binaries = programs()
    if binaries is None:
        pytest.skip("KVCELLAR_TEST_KUBE names no folder with etcd and kube-apiserver: scripts/kubernetes-tools server")
    with kube_server(binaries, tmp_path_factory.mktemp("kube")) as server:
        for kind in (
            ("inference.networking.k8s.io", "v1", "InferencePool"),
            ("inference.networking.x-k8s.io", "v1alpha2", "InferenceObjective"),
            ("monitoring.coreos.com", "v1", "ServiceMonitor"),
        ):
            server.make("/apis/apiextensions.k8s.io/v1/customresourcedefinitions", definition(*kind))
        server.make("/api/v1/namespaces", {"metadata": {"name": NAMESPACE}})
        for path in (POOLS, OBJECTIVES):
            eventually(path, lambda path=path: server.request("GET", path)[0] == 200)  # type: ignore[misc]
        watches = ["list", "watch"]
        rules = [
            {"apiGroups": [""], "resources": ["pods"], "verbs": watches},
            {"apiGroups": ["inference.networking.k8s.io"], "resources": ["inferencepools"], "verbs": watches},
            {
                "apiGroups": ["inference.networking.x-k8s.io", "llm-d.ai"],
                "resources": ["inferenceobjectives"],
                "verbs": watches,
            },
        ]
        server.make(f"{ROLES}/roles", {"metadata": {"name": "router"}, "rules": rules})
        binding = {
            "metadata": {"name": "router"},
            "subjects": [{"kind": "User", "name": USER, "apiGroup": "rbac.authorization.k8s.io"}],
            "roleRef": {"kind": "Role", "name": "router", "apiGroup": "rbac.authorization.k8s.io"},
        }
        server.make(f"{ROLES}/rolebindings", binding)
        yield server


@dataclass
class Command:
    """A command that runs, and what it says."""

    process: subprocess.Popen[str]
    address: str = ""
    log: list[str] = field(default_factory=list)

    def get(self, path: str) -> Any:
        """A JSON answer."""
        with urllib.request.urlopen(f"http://{self.address}{path}", timeout=deadline(SOON_S)) as answer:
            return json.load(answer)

    def engines(self) -> dict[str, tuple[str, str]]:
        """The router's engines by name: where they answer, and `draining` or nothing."""
        found = self.get("/debug/engines")
        return {one["name"]: (one["url"], one["health"] * (one["health"] == "draining")) for one in found}

    def says(self, text: str) -> int:
        """How often it has said so."""
        return sum(text in line for line in self.log)


@contextlib.contextmanager
def command(kube: KubeServer, *arguments: str) -> Iterator[Command]:
    """Runs a command as the user of the router, until the end of the block."""
    environment = {**os.environ, "KUBECONFIG": str(kube.kubeconfig(NAMESPACE))}
    line = [sys.executable, "-m", "kvcellar", *arguments]
    with subprocess.Popen(line, stderr=subprocess.PIPE, text=True, env=environment) as process:
        made, is_up = Command(process), threading.Event()

        def listen() -> None:
            for text in process.stderr or ():
                made.log.append(text.rstrip())
                if found := re.search(r"(?:admin|index) at http://(\S+)", text):
                    made.address = found[1]
                    is_up.set()
            is_up.set()

        threading.Thread(target=listen, daemon=True).start()
        try:
            assert is_up.wait(deadline(SOON_S)) and made.address, made.log
            yield made
        finally:
            process.terminate()


def route(*arguments: str) -> list[str]:
    """A router's arguments."""
    return ["route", "--http", "127.0.0.1:0", "--admin", "127.0.0.1:0", *arguments]


def pod(kube: KubeServer, name: str, ip: str, labels: dict[str, str]) -> None:
    """A pod that is ready."""
    one = {"name": "vllm", "image": "registry.example/vllm"}
    meta = {"name": name, "labels": labels}
    kube.make(PODS, {"metadata": meta, "spec": {"containers": [one], "terminationGracePeriodSeconds": 3600}})
    ready(kube, name, "True", ip)


def ready(kube: KubeServer, name: str, status: str, ip: str) -> None:
    """Sets whether a pod is ready."""
    conditions = [{"type": "Ready", "status": status}]
    state = {"phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}], "conditions": conditions}
    kube.change(f"{PODS}/{name}/status", {"status": state})


def pool(name: str, labels: dict[str, str], ports: list[int]) -> dict[str, Any]:
    """An InferencePool."""
    spec = {"selector": {"matchLabels": labels}, "targetPorts": [{"number": port} for port in ports]}
    return {
        "apiVersion": "inference.networking.k8s.io/v1",
        "kind": "InferencePool",
        "metadata": {"name": name},
        "spec": spec,
    }


def test_the_router_follows_a_pool(kube: KubeServer) -> None:
    labels = {"app": "pooled"}
    pod(kube, "stranger", "10.1.0.9", {"app": "other"})
    pod(kube, "p0", "10.1.0.1", labels | {"llm-d.ai/role": "decode"})
    kube.make(POOLS, pool("pooled", labels, [8000]))
    with command(kube, *route("--inference-pool", "pooled")) as router:
        assert router.engines() == {"p0": ("http://10.1.0.1:8000", "")}
        pod(kube, "p1", "10.1.0.2", labels)
        eventually("the second pod", lambda: router.engines().keys() == {"p0", "p1"})
        ready(kube, "p1", "False", "10.1.0.2")
        eventually("it drains", lambda: router.engines()["p1"][1] == "draining")
        ready(kube, "p1", "True", "10.1.0.2")
        eventually("it is back", lambda: router.engines()["p1"][1] == "")
        # A pod on no node ends at once: what keeps this one is a finalizer.
        kube.change(f"{PODS}/p0", {"metadata": {"finalizers": ["kvcellar.example/test"]}})
        kube.remove(f"{PODS}/p0")
        eventually("it drains while it ends", lambda: router.engines()["p0"][1] == "draining")
        kube.change(f"{PODS}/p0", {"metadata": {"finalizers": None}})
        eventually("it is gone", lambda: router.engines().keys() == {"p1"})
        kube.change(f"{POOLS}/pooled", {"spec": {"targetPorts": [{"number": 8000}, {"number": 8001}]}})
        ranks = {f"p1-rank-{rank}": (f"http://10.1.0.2:{8000 + rank}", "") for rank in (0, 1)}
        eventually("two ranks", lambda: router.engines() == ranks)
        kube.change(f"{POOLS}/pooled", {"spec": {"selector": {"matchLabels": {"app": "other"}}}})
        eventually("other pods", lambda: router.engines().keys() == {"stranger-rank-0", "stranger-rank-1"})
        kube.remove(f"{POOLS}/pooled")
        eventually("nobody", lambda: router.engines() == {})
        assert router.says("no InferencePool pooled in the namespace llm") == 1, router.log


def test_objectives_are_followed_and_options_win(kube: KubeServer) -> None:
    def objective(name: str, priority: int) -> dict[str, Any]:
        spec = {"priority": priority, "poolRef": {"name": "urgent"}}
        kind = {"apiVersion": "inference.networking.x-k8s.io/v1alpha2", "kind": "InferenceObjective"}
        return {**kind, "metadata": {"name": name}, "spec": spec}

    kube.make(POOLS, pool("urgent", {"app": "none"}, [8000]))
    with command(kube, *route("--inference-pool", "urgent", "--objective", "chat=10")) as router:
        kube.make(OBJECTIVES, objective("chat", 3))
        eventually("it is said who wins", lambda: router.says("InferenceObjective chat says priority 3") == 1)
        kube.change(f"{OBJECTIVES}/chat", {"spec": {"priority": 4}})
        eventually("it is said again", lambda: router.says("InferenceObjective chat says priority 4") == 1)


def test_the_index_follows_events_of_each_rank(kube: KubeServer) -> None:
    labels = {"app": "indexed"}
    pod(kube, "i0", "10.1.1.1", labels)
    kube.make(POOLS, pool("indexed", labels, [8000, 8001]))
    arguments = ["index", "serve", "--listen", "127.0.0.1:0", "--inference-pool", "indexed", "--block-tokens", "16"]
    with command(kube, *arguments, "--inference-pool-events", "6000:6100") as index:

        def sources() -> dict[str, str]:
            return {name: state["endpoint"] for name, state in index.get("/v1/engines")["sources"].items()}

        eventually("both", lambda: sources() == {f"i0-rank-{r}": f"tcp://10.1.1.1:{6000 + r}" for r in (0, 1)})
        pod(kube, "i1", "10.1.1.2", labels)
        eventually("the next pod", lambda: len(sources()) == 4)


def test_labels_are_watched_and_what_is_known_outlives_the_server(kube: KubeServer) -> None:
    labels = {"app": "labelled"}
    pod(kube, "l0", "10.1.2.1", labels)
    with command(kube, *route("--kubernetes-labels", "app=labelled", "--kubernetes-ports", "9000")) as router:
        assert router.engines() == {"l0": ("http://10.1.2.1:9000", "")}
        kube.stop()
        eventually("it is said", lambda: router.says("what is known of pods stays") == 1)
        assert router.engines().keys() == {"l0"}
        kube.start()
        pod(kube, "l1", "10.1.2.2", labels)
        eventually("it goes on", lambda: router.engines().keys() == {"l0", "l1"})
        # A server that has just started may not know its roles yet, and refuses.
        assert router.says("what is known of pods stays") - router.says("not allowed to") == 1, router.log
        assert router.says("pods are watched again") == 1, router.log


def accept(kube: KubeServer, namespace: str, one: dict[str, Any]) -> None:
    """The server would make this object, and knows all its fields."""
    root = "api" if one["apiVersion"] == "v1" else "apis"
    place = f"/{root}/{one['apiVersion']}/namespaces/{namespace}/{one['kind'].lower()}s"
    status, answer = kube.request("POST", f"{place}?dryRun=All&fieldValidation=Strict", one)
    assert status == 201, (one["kind"], one["metadata"], answer)


@pytest.mark.parametrize("name", charts.SETS)
def test_the_chart_is_accepted_and_its_pods_are_restricted(kube: KubeServer, name: str) -> None:
    namespace = f"chart-{name}"
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    kube.make("/api/v1/namespaces", {"metadata": {"name": namespace, "labels": labels}})
    for one in charts.render(charts.helm(), *charts.files(name)):
        accept(kube, namespace, one)
        if one["kind"] in ("StatefulSet", "Deployment"):
            template = one["spec"]["template"]
            claims = [{"name": claim["metadata"]["name"]} for claim in one["spec"].get("volumeClaimTemplates", [])]
            template["spec"]["volumes"] = [*template["spec"].get("volumes", []), *claims]
            template["metadata"]["name"] = one["metadata"]["name"]
            accept(kube, namespace, {"apiVersion": "v1", "kind": "Pod", **template})


def test_a_missing_right_is_named(kube: KubeServer) -> None:
    environment = {**os.environ, "KUBECONFIG": str(kube.kubeconfig("default"))}
    for flag, resource in (("--kubernetes-labels", "pods"), ("--inference-pool", "inferencepools")):
        line = [sys.executable, "-m", "kvcellar", *route(flag, "app")]
        limit = deadline(SOON_S)
        done = subprocess.run(line, capture_output=True, text=True, check=False, env=environment, timeout=limit)
        assert done.returncode == 1, done.stderr
        assert f"not allowed to list {resource}" in done.stderr and "verbs list and watch" in done.stderr, done.stderr
