"""What `scripts/setup` does again: a build for tests is served by one for users, never the other way round."""

from pathlib import Path

import pytest
from setup_lib import packages
from setup_lib.__main__ import Step, kvcellar_step
from setup_lib.markers import Markers

USERS, TESTS = False, True
CASES = [
    (None, USERS, True),
    (None, TESTS, True),
    (USERS, USERS, False),
    (USERS, TESTS, False),
    (TESTS, TESTS, False),
    (TESTS, USERS, True),
]


@pytest.fixture
def markers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Markers:
    """No step has finished, and kvcellar is installed."""
    monkeypatch.setattr(packages, "is_installed", lambda _name: True)
    return Markers(tmp_path / "markers.json")


@pytest.mark.parametrize(("built", "wanted", "due"), CASES)
def test_a_build_for_tests_never_passes_for_one_for_users(
    markers: Markers, built: bool | None, wanted: bool, due: bool
) -> None:
    if built is not None:
        markers.record("kvcellar", kvcellar_step(for_tests=built).fingerprint())
    assert kvcellar_step(for_tests=wanted).is_due(markers) == due


def test_what_is_not_installed_is_due_whatever_was_recorded(markers: Markers) -> None:
    step = Step("x", "", is_present=lambda: False, inputs=lambda: ["a"], install=lambda _steps: None)
    markers.record("x", step.fingerprint())
    assert step.is_due(markers)
