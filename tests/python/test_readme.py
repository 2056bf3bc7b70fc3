"""The README's numbers are those of the committed reports."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_readme_says_what_the_reports_say() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "readme_numbers"), "--check"]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_every_configuration_key_is_documented() -> None:
    readme = (ROOT / "README.md").read_text()
    source = (ROOT / "src" / "config" / "mod.rs").read_text()
    keys = source.split("pub const KEYS")[1].split("];")[0].split('("')[1:]
    names = [key.split('"')[0] for key in keys]
    assert len(names) >= 10
    assert all(f"| `{name}` |" in readme for name in names)
