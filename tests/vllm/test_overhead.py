"""The overhead bench at a tiny size, so that it cannot rot. Whether the goal is met is for the real run to say."""

import json

import pytest

from tests.vllm import overhead


def test_the_bench_reports_in_the_common_shape(vllm_installed: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert overhead.main(["--json", "--rounds", "2", "--batches", "1", "--answer-tokens", "4"]) == 0
    made = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(made) == {"commit", "machine", "results", "goals"}
    results = {result["name"]: result for result in made["results"]}
    assert all(set(result) == {"name", "value", "unit", "spread", "n"} for result in made["results"])
    assert all(result["n"] == 2 for result in results.values())
    assert results["connector_step_cpu"]["value"] > 0
    assert 0 < results["connector_share_of_step_cpu"]["value"] < 1
    assert [set(goal) for goal in made["goals"]] == [{"name", "goal", "value", "met"}]
