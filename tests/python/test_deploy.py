"""The Kubernetes manifests that people copy: they render, fit the API, and name options, keys and files that exist.

Rendering needs kubectl, and comparing with the API's schemas the package kubernetes-validate: each is skipped where it
is not there. No cluster is asked for anything.
"""

import functools
import itertools
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
from docs_lib import keys
from docs_lib.pages import ROOT

yaml = pytest.importorskip("yaml")

MANIFESTS = ROOT / "docs" / "deploy" / "kubernetes"
COMPONENTS = sorted(path.name for path in (MANIFESTS / "components").iterdir())
COMBINATIONS = [chosen for count in range(len(COMPONENTS) + 1) for chosen in itertools.combinations(COMPONENTS, count)]
EXTRA = "--kv-transfer-config.kv_connector_extra_config."
BINARY = shutil.which("kubectl")


def documents(path: Path) -> list[dict[str, Any]]:
    """All documents of a file."""
    return [one for one in yaml.safe_load_all(path.read_text()) if one]


BASE = [one for path in sorted((MANIFESTS / "base").glob("*.yaml")) for one in documents(path)]
WORKLOADS = [one for one in BASE if one["kind"] in ("StatefulSet", "Deployment")]


def render(folder: Path) -> list[dict[str, Any]]:
    """What kustomize makes of a folder."""
    if BINARY is None:
        pytest.skip("kubectl is not installed")
    made = subprocess.run([BINARY, "kustomize", str(folder)], capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    return [one for one in yaml.safe_load_all(made.stdout) if one]


@functools.cache
def with_components(components: tuple[str, ...]) -> list[dict[str, Any]]:
    """The base with some components, as kustomize makes it."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "kubernetes"
        shutil.copytree(MANIFESTS, copy)
        chosen = copy / "chosen"
        chosen.mkdir()
        text = {
            "apiVersion": "kustomize.config.k8s.io/v1beta1",
            "kind": "Kustomization",
            "resources": ["../base"],
            "components": [f"../components/{name}" for name in components],
        }
        (chosen / "kustomization.yaml").write_text(yaml.safe_dump(text))
        return render(chosen)


def container(workload: dict[str, Any]) -> dict[str, Any]:
    """A workload's only container."""
    (found,) = workload["spec"]["template"]["spec"]["containers"]
    return dict(found)


def settings(workload: dict[str, Any]) -> dict[str, str]:
    """Our own keys among an engine's arguments."""
    ours = [argument.removeprefix(EXTRA) for argument in container(workload)["args"] if argument.startswith(EXTRA)]
    return dict(one.split("=", 1) for one in ours)


def check_arguments(workload: dict[str, Any]) -> None:
    """Every option of ours exists, and so does every key."""
    if workload["kind"] == "StatefulSet":
        known = {key.name for key in (*keys.engine_keys(), *keys.nvme_keys())}
        assert settings(workload).keys() <= known
        return
    command = container(workload)["args"][0]
    # Where engines are found is asked in one way by both commands.
    places = [ROOT / "src" / "command" / f"{command}.rs", *(ROOT / "src" / "discovery").rglob("*.rs")]
    source = "\n".join(path.read_text() for path in places)
    named = re.findall(r'long = "([\w-]+)"', source)
    named += [field.replace("_", "-") for field in re.findall(r"^    (?:pub )?(\w+): ", source, re.MULTILINE)]
    given = [argument.split("=")[0][2:] for argument in container(workload)["args"] if argument.startswith("--")]
    assert set(given) <= set(named), set(given) - set(named)


def check_mounts(workload: dict[str, Any]) -> None:
    """Every mount has its volume, and every volume is mounted."""
    spec = workload["spec"]
    volumes = {volume["name"] for volume in spec["template"]["spec"].get("volumes", [])}
    claims = {claim["metadata"]["name"] for claim in spec.get("volumeClaimTemplates", [])}
    assert {mount["name"] for mount in container(workload).get("volumeMounts", [])} == volumes | claims


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda one: one["metadata"]["name"])
def test_workloads_are_probed_and_have_no_rights(workload: dict[str, Any]) -> None:
    pod, one = workload["spec"]["template"]["spec"], container(workload)
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["automountServiceAccountToken"] is False
    assert one["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert one["securityContext"]["allowPrivilegeEscalation"] is False
    ports = {port["name"] for port in one["ports"]}
    for probe in ("readinessProbe", "livenessProbe"):
        assert one[probe]["httpGet"]["port"] in ports
    assert "memory" in one["resources"]["limits"]


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda one: one["metadata"]["name"])
def test_arguments_exist_and_mounts_have_volumes(workload: dict[str, Any]) -> None:
    check_arguments(workload)
    check_mounts(workload)


def test_services_lead_to_workloads() -> None:
    services = [one for one in BASE if one["kind"] == "Service"]
    assert len(services) == len(WORKLOADS)
    for service in services:
        selector = service["spec"]["selector"].items()
        (found,) = [one for one in WORKLOADS if selector <= one["spec"]["template"]["metadata"]["labels"].items()]
        assert found["spec"]["selector"]["matchLabels"].items() == selector
        ports = {port["name"]: port["containerPort"] for port in container(found)["ports"]}
        for port in service["spec"]["ports"]:
            assert port.get("targetPort", port["name"]) in ports


def test_shared_memory_holds_the_pool_and_what_vllm_needs() -> None:
    (engine,) = [one for one in WORKLOADS if one["kind"] == "StatefulSet"]
    (shm,) = [one for one in engine["spec"]["template"]["spec"]["volumes"] if one["name"] == "shm"]
    assert shm["emptyDir"]["medium"] == "Memory"
    pool = int(settings(engine)["dram_size"].removesuffix("GiB"))
    room = int(shm["emptyDir"]["sizeLimit"].removesuffix("Gi"))
    assert pool < room < int(container(engine)["resources"]["limits"]["memory"].removesuffix("Gi"))


@pytest.mark.parametrize("components", COMBINATIONS, ids="+".join)
def test_every_combination_of_components_renders(components: tuple[str, ...]) -> None:
    workloads = [one for one in with_components(components) if one["kind"] in ("StatefulSet", "Deployment")]
    assert len(workloads) == len(WORKLOADS)
    for workload in workloads:
        check_arguments(workload)
        check_mounts(workload)


@pytest.mark.parametrize("components", COMBINATIONS, ids="+".join)
def test_every_combination_fits_the_schemas_of_the_api(components: tuple[str, ...]) -> None:
    validator = pytest.importorskip("kubernetes_validate")
    for one in with_components(components):
        validator.validate(one, validator.latest_version(), strict=True)


def test_the_example_renders() -> None:
    rendered = render(MANIFESTS / "example")
    images = {container(one)["image"] for one in rendered if one["kind"] in ("StatefulSet", "Deployment")}
    assert all(image.startswith("registry.example/") for image in images)


def test_the_containerfile_copies_what_it_builds() -> None:
    text = (ROOT / "docs" / "deploy" / "Containerfile").read_text()
    stages = re.findall(r"^FROM \S+ AS (\w+)$", text, re.MULTILINE)
    assert stages == ["build", "engine", "command"]
    assert set(re.findall(r"--from=(\w+)", text)) <= set(stages)
    toolchain = re.search(r'channel = "(\d+\.\d+)', (ROOT / "rust-toolchain.toml").read_text())
    assert toolchain is not None
    assert f"rust:{toolchain[1]}-" in text
