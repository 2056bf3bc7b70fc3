"""What `scripts/setup` does again: a whole build serves for tests and for the engine alone, and no other for it."""

from pathlib import Path

import pytest
from setup_lib import packages
from setup_lib.__main__ import ENGINE, FOR_TESTS, WHOLE, Build, Step, kvcellar_step
from setup_lib.markers import Markers

CASES = [
    (None, WHOLE, True),
    (None, ENGINE, True),
    (None, FOR_TESTS, True),
    (WHOLE, WHOLE, False),
    (WHOLE, ENGINE, False),
    (WHOLE, FOR_TESTS, False),
    (ENGINE, ENGINE, False),
    (ENGINE, WHOLE, True),
    (ENGINE, FOR_TESTS, True),
    (FOR_TESTS, FOR_TESTS, False),
    (FOR_TESTS, WHOLE, True),
    (FOR_TESTS, ENGINE, True),
]


@pytest.fixture
def markers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Markers:
    """No step has finished, and kvcellar is installed."""
    monkeypatch.setattr(packages, "is_installed", lambda _name: True)
    return Markers(tmp_path / "markers.json")


@pytest.mark.parametrize(("built", "wanted", "due"), CASES)
def test_the_whole_build_serves_for_all_and_no_other_for_it(
    markers: Markers, built: Build | None, wanted: Build, due: bool
) -> None:
    if built is not None:
        markers.record("kvcellar", kvcellar_step(built).fingerprint())
    assert kvcellar_step(wanted).is_due(markers) == due


def test_what_is_not_installed_is_due_whatever_was_recorded(markers: Markers) -> None:
    step = Step("x", "", is_present=lambda: False, inputs=lambda: ["a"], install=lambda _steps: None)
    markers.record("x", step.fingerprint())
    assert step.is_due(markers)
