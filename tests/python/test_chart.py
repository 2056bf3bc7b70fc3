"""The Helm chart: it lints, renders with several sets of values, fits the API's schemas, and names options that exist.

Needs helm: the one on the path, or one that `scripts/kubernetes-tools helm` builds where there is Go. No cluster is
asked for anything here; test_kubernetes.py asks an API server whether it takes what is rendered.
"""

import re
from typing import Any

import charts
import pytest
from charts import CHART, SETS, files, refusal, render, run
from docs_lib.pages import ROOT
from test_deploy import check_arguments, check_mounts, container, settings

from tests.deadlines import deadline

pytestmark = pytest.mark.timeout(deadline(charts.BUILD_S + 120.0))

WORKLOADS = ("StatefulSet", "Deployment")
# Kinds of others, which the schemas of Kubernetes itself do not have, with the fields that they must have.
CUSTOM = {
    "InferencePool": ("inference.networking.k8s.io/v1", {"selector", "targetPorts", "endpointPickerRef"}),
    "InferenceObjective": ("inference.networking.x-k8s.io/v1alpha2", {"priority", "poolRef"}),
    "ServiceMonitor": ("monitoring.coreos.com/v1", {"selector", "endpoints"}),
}


def of_kind(objects: list[dict[str, Any]], *kinds: str) -> list[dict[str, Any]]:
    """The objects of some kinds."""
    return [one for one in objects if one["kind"] in kinds]


def named(objects: list[dict[str, Any]], kind: str, name: str) -> dict[str, Any]:
    """One object."""
    (found,) = [one for one in of_kind(objects, kind) if one["metadata"]["name"] == name]
    return found


@pytest.fixture(scope="session")
def helm() -> str:
    """The program."""
    return charts.helm()


@pytest.mark.parametrize("name", SETS)
def test_the_chart_lints(helm: str, name: str) -> None:
    done = run(helm, "lint", "--strict", str(CHART), *files(name))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", SETS)
def test_every_set_fits_the_schemas_of_the_api(helm: str, name: str) -> None:
    validator = pytest.importorskip("kubernetes_validate")
    objects = render(helm, *files(name))
    assert of_kind(objects, "StatefulSet")
    for one in objects:
        if (custom := CUSTOM.get(one["kind"])) is None:
            validator.validate(one, validator.latest_version(), strict=True)
            continue
        version, required = custom
        assert one["apiVersion"] == version and required <= one["spec"].keys()


@pytest.mark.parametrize("name", SETS)
def test_workloads_name_options_that_exist_and_have_no_rights(helm: str, name: str) -> None:
    for workload in of_kind(render(helm, *files(name)), *WORKLOADS):
        check_arguments(workload)
        check_mounts(workload)
        pod, one = workload["spec"]["template"]["spec"], container(workload)
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert one["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert one["securityContext"]["allowPrivilegeEscalation"] is False
        assert one["securityContext"].get("readOnlyRootFilesystem", False) is (workload["kind"] == "Deployment")
        assert "memory" in one["resources"]["limits"]
        ports = {port["name"]: port["containerPort"] for port in one["ports"]}
        for probe in ("readinessProbe", "livenessProbe"):
            asked = one[probe].get("httpGet") or one[probe]["grpc"]
            assert asked["port"] in (*ports, *ports.values())


@pytest.mark.parametrize("name", SETS)
def test_selectors_lead_to_workloads_and_services(helm: str, name: str) -> None:
    objects = render(helm, *files(name))
    pods = [one["spec"]["template"] for one in of_kind(objects, *WORKLOADS)]
    services = of_kind(objects, "Service")
    for service in services:
        selector = service["spec"]["selector"].items()
        (pod,) = [one for one in pods if selector <= one["metadata"]["labels"].items()]
        ports = {port["name"] for port in pod["spec"]["containers"][0]["ports"]}
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports
    for budget in of_kind(objects, "PodDisruptionBudget"):
        selector = budget["spec"]["selector"]["matchLabels"].items()
        assert sum(selector <= one["metadata"]["labels"].items() for one in pods) == 1
    for monitor in of_kind(objects, "ServiceMonitor"):
        selector = monitor["spec"]["selector"]["matchLabels"].items()
        (service,) = [one for one in services if selector <= one["metadata"]["labels"].items()]
        ports = {port["name"] for port in service["spec"]["ports"]}
        assert {endpoint["port"] for endpoint in monitor["spec"]["endpoints"]} <= ports


def test_without_a_pool_nobody_gets_a_token(helm: str) -> None:
    objects = render(helm)
    assert not of_kind(objects, "ServiceAccount", "Role", "RoleBinding", "InferencePool", "ServiceMonitor")
    for workload in of_kind(objects, *WORKLOADS):
        assert workload["spec"]["template"]["spec"]["automountServiceAccountToken"] is False
    assert "--dns=fleet-engine:8000" in container(named(objects, "Deployment", "fleet-router"))["args"]


def test_with_a_pool_index_and_router_may_watch_what_they_do(helm: str) -> None:
    objects = render(helm, *files("pool"))
    (role,) = of_kind(objects, "Role")
    allowed = {
        (group, resource, verb)
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    sources = ROOT / "src" / "discovery" / "kubernetes"
    (pools,) = re.findall(r'GROUP: &str = "(.*)"', (sources / "pools.rs").read_text())
    (objectives,) = re.findall(r"GROUPS: \[&str; \d\] = \[(.*)\]", (sources / "objectives.rs").read_text())
    kinds = {("", "pods"), (pools, "inferencepools")}
    kinds |= {(group, "inferenceobjectives") for group in re.findall(r'"(.*?)"', objectives)}
    assert allowed == {(*kind, verb) for kind in kinds for verb in ("list", "watch")}
    for part, kind in (("engine", "StatefulSet"), ("index", "Deployment"), ("router", "Deployment")):
        pod = named(objects, kind, f"fleet-{part}")["spec"]["template"]["spec"]
        assert pod["automountServiceAccountToken"] is (part != "engine")
        assert pod.get("serviceAccountName") == (None if part == "engine" else role["metadata"]["name"])


def test_the_pool_selects_the_engines_and_names_the_picker(helm: str) -> None:
    objects = render(helm, *files("pool"))
    spec = named(objects, "InferencePool", "fleet")["spec"]
    pod = named(objects, "StatefulSet", "fleet-engine")["spec"]["template"]
    assert spec["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    ports = {port["name"]: port["containerPort"] for port in pod["spec"]["containers"][0]["ports"]}
    assert [port["number"] for port in spec["targetPorts"]] == [ports["http-0"], ports["http-1"]]
    service = named(objects, "Service", spec["endpointPickerRef"]["name"])
    assert spec["endpointPickerRef"]["port"]["number"] in [port["port"] for port in service["spec"]["ports"]]
    router = container(named(objects, "Deployment", "fleet-router"))
    events = next(one.split("=")[1] for one in router["args"] if one.startswith("--inference-pool-events="))
    assert events == f"{ports['events-0']}:{ports['replay-0']}"
    assert ports["events-1"] == ports["events-0"] + 1 and ports["replay-1"] == ports["replay-0"] + 1
    assert ports["replay-0"] - ports["events-0"] >= len(spec["targetPorts"])
    objectives = of_kind(objects, "InferenceObjective")
    assert {one["metadata"]["name"]: one["spec"]["priority"] for one in objectives} == {"chat": 10, "batch": -1}
    assert all(one["spec"]["poolRef"]["name"] == "fleet" for one in objectives)


def test_probes_of_the_picker_ask_names_that_it_answers(helm: str) -> None:
    router = container(named(render(helm, *files("pool")), "Deployment", "fleet-router"))
    source = (ROOT / "src" / "command" / "health.rs").read_text()
    for probe in ("readinessProbe", "livenessProbe"):
        assert f'"{router[probe]["grpc"]["service"]}"' in source
    # A kubelet asks without TLS.
    behind_tls = container(named(render(helm, *files("member")), "Deployment", "fleet-router"))
    assert behind_tls["readinessProbe"]["httpGet"]["path"] == "/readyz"


@pytest.mark.parametrize("name", SETS)
def test_memory_holds_the_pool(helm: str, name: str) -> None:
    (engine,) = of_kind(render(helm, *files(name)), "StatefulSet")
    volumes = {one["name"]: one for one in engine["spec"]["template"]["spec"]["volumes"]}
    limits = container(engine)["resources"]["limits"]
    pool = int(settings(engine)["dram_size"].removesuffix("GiB"))
    shared = int(volumes["shm"]["emptyDir"]["sizeLimit"].removesuffix("Gi"))
    if "hugepages" in volumes:
        assert limits["hugepages-2Mi"] == f"{pool}Gi" and settings(engine)["pool_dir"] == "/hugepages"
        assert shared < int(limits["memory"].removesuffix("Gi"))
    else:
        assert pool < shared < int(limits["memory"].removesuffix("Gi"))


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("engine.tiers.dramGiB=64", "engine.memoryGiB"),
        ("engine.ranks=2", "inferencePool.enabled"),
        ("inferencePool.enabled=true", "router.extProc.enabled"),
        ("inferencePool.objectives.chat=1", "inferencePool.enabled"),
        ("engine.tires.dramGiB=1", "tires"),
        ("router.mode=exact", "mode"),
    ],
)
def test_values_that_cannot_work_are_refused_by_name(helm: str, setting: str, said: str) -> None:
    assert said in refusal(helm, setting)
