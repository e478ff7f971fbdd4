"""``sllmdask simulate``, as somebody types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from sllmdask.cli import main
from sllmdask.sim.policies import POLICIES

CONFIGS = Path(__file__).parents[2] / "configs" / "sim"
SMALL = str(CONFIGS / "small.yaml")


def run(*args: str, code: int = 0) -> Result:
    result = CliRunner().invoke(main, ["simulate", *args])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def table(result: Result) -> list[list[str]]:
    return [line.split("\t") for line in result.stdout.splitlines()]


def test_a_run_compares_the_policies_in_a_table_and_says_that_it_is_simulated():
    result = run("run", SMALL, "--seeds", "2")
    heading, *rows = table(result)
    assert heading[:2] == ["POLICY", "STARTUP MEAN"] and heading[-1] == "REFUSED"
    assert [row[0] for row in rows] == list(POLICIES)
    assert all(row[-1] == "0 of 288" for row in rows)
    assert "Simulated seconds" in result.stderr and "small: ours, seed 0 0%" in result.stderr


def test_json_has_everything_that_is_needed_to_run_it_again(tmp_path):
    facts = json.loads(run("run", SMALL, "--policy", "ours", "--seeds", "1", "--json", "-").stdout)
    assert facts["kind"] == "simulated" and facts["scenario"]["workers"]["disk"]["expected_bandwidth"] == 2 * 1024**3
    (ours,) = facts["policies"]
    assert ours["policy"] == "ours" and ours["startup_s"]["p99"]["low"] is None
    again = tmp_path / "again.json"
    again.write_text(json.dumps(facts["scenario"]))
    assert json.loads(run("run", str(again), "--json", "-").stdout)["policies"] == facts["policies"]


def test_several_files_are_told_apart(tmp_path):
    other = tmp_path / "other.yaml"
    other.write_text(Path(SMALL).read_text())
    heading, *rows = table(run("run", SMALL, str(other), "--policy", "ours", "--seeds", "1"))
    assert heading[:2] == ["FILE", "POLICY"] and [row[:2] for row in rows] == [["small", "ours"], ["other", "ours"]]
    assert rows[0][2:] == rows[1][2:]


def test_a_sweep_has_a_row_for_each_value_and_policy(tmp_path):
    path = tmp_path / "sweep.json"
    result = run("sweep", SMALL, "--over", "rps=0.2,0.5", "--policy", "ours", "--seeds", "1", "--json", str(path))
    heading, *rows = table(result)
    assert heading[:2] == ["RPS", "POLICY"] and [row[0] for row in rows] == ["0.2", "0.5"]
    facts = json.loads(path.read_text())
    assert facts["over"] == "rps" and [point["value"] for point in facts["points"]] == [0.2, 0.5]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["run", SMALL, "--policy", "our"], "there is no policy 'our'; did you mean 'ours'?"),
        (["run", "nowhere.yaml"], "Cannot read nowhere.yaml"),
        (["sweep", SMALL, "--over", "rsp=1"], "did you mean 'workload.rps'?"),
        (["sweep", SMALL, "--over", "rps=0"], "workload.rps: Input should be greater than 0"),
        (["run", SMALL, "--plot", "picture.jpeg"], "the picture is .png, .svg, .pdf"),
        (["run", SMALL, SMALL, "--plot", "picture.png"], "--plot draws one FILE"),
        (["run", SMALL, "--json", "nowhere/out.json"], "--json nowhere/out.json: a file cannot be written there"),
        (["run"], "Missing argument"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_simulated(args, message):
    result = run(*args, code=2)
    assert message in result.stderr and "seed" not in result.stdout


def test_pictures_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    run("run", SMALL, "--policy", "ours", "--seeds", "1", "--plot", str(tmp_path / "cdf.png"))
    run("sweep", SMALL, "--over", "rps=0.2,0.4", "--policy", "ours", "--seeds", "2", "--plot", str(tmp_path / "sweep.svg"))
    assert (tmp_path / "cdf.png").read_bytes().startswith(b"\x89PNG") and "<svg" in (tmp_path / "sweep.svg").read_text()


def test_without_matplotlib_a_picture_is_refused_with_what_to_install(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install 'sllmdask[plot]'" in run("run", SMALL, "--plot", str(tmp_path / "a.png"), code=2).stderr
