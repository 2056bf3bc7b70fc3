"""The licences of everything that Cargo compiles into the wheel, with their texts."""

import json
import subprocess
from pathlib import Path
from typing import Any

from release_lib.tools import ROOT, environment

_PREFIXES = ("license", "licence", "copying", "notice", "copyright", "unlicense")


def _packages(triple: str) -> list[dict[str, Any]]:
    command = ["cargo", "metadata", "--locked", "--format-version", "1", "--filter-platform", triple]
    done = subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True, env=environment())
    told = json.loads(done.stdout)
    ours = set(told["workspace_members"])
    nodes = {node["id"]: node for node in told["resolve"]["nodes"]}
    # What is only used by tests is in nothing that is shipped.
    wanted = [id_ for id_ in ours if "kvcellar-testkit" not in id_]
    seen: set[str] = set()
    while wanted:
        id_ = wanted.pop()
        if id_ in seen:
            continue
        seen.add(id_)
        kinds = ((dep["pkg"], {kind["kind"] for kind in dep["dep_kinds"]}) for dep in nodes[id_]["deps"])
        wanted += [package for package, kind in kinds if kind != {"dev"}]
    return sorted(
        (package for package in told["packages"] if package["id"] in seen - ours),
        key=lambda package: (package["name"], package["version"]),
    )


def write(path: Path, triple: str) -> int:
    """Write them all into one text. Returns how many packages name no licence of theirs.

    A package without a text of its own is named with the licence it declares.
    """
    unnamed, parts = 0, ["Licences of the packages that KV Cellar's binaries are made of.\n"]
    for package in _packages(triple):
        declared = package["license"] or package["license_file"]
        unnamed += declared is None
        parts.append(f"{'=' * 80}\n{package['name']} {package['version']}: {declared or 'no licence declared'}\n")
        folder = Path(package["manifest_path"]).parent
        texts = sorted(file for file in folder.iterdir() if file.is_file() and file.name.lower().startswith(_PREFIXES))
        parts += [f"--- {file.name}\n\n{file.read_text(errors='replace').rstrip()}\n" for file in texts]
    path.write_text("\n".join(parts))
    return unnamed
