"""For all Python tests: a test's own limit in time follows from how slow this machine is."""

from collections.abc import Generator

import pytest

from tests.deadlines import PACE, VARIABLE, deadline


def pytest_report_header() -> str:
    """Tells how patient this run is: a slow machine's sizes of loads come back with it."""
    return f"kvcellar: {VARIABLE}={PACE.factor:.2f} at the start"


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Before pytest-timeout looks: `timeout` in pyproject.toml is what a good machine gets."""
    good_s = float(item.config.getini("timeout") or 0)
    if good_s and item.config.getoption("timeout") is None and item.get_closest_marker("timeout") is None:
        item.add_marker(pytest.mark.timeout(deadline(good_s)))
    return (yield)
