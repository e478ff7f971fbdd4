"""``scripts/bench_placement.py`` in a small size: every request ends, and the figures are those of what was timed."""

from __future__ import annotations

import json

from scripts import bench_placement


def test_a_small_cluster_serves_every_request_and_each_event_is_timed(tmp_path, capsys):
    path = tmp_path / "placement.json"
    size = ["--workers", "4", "--models", "12", "--requests", "60", "--searches", "5"]
    assert bench_placement.main([*size, "--json", str(path)]) == 0
    told = json.loads(path.read_text())
    setup, serving, victims = (told["results"][name] for name in ("setup", "serving", "victims"))
    assert (setup["events"]["WorkerJoined"]["n"], setup["events"]["ModelDeployed"]["n"]) == (4, 12)
    assert serving["events"]["RequestArrived"]["n"] == 60
    assert serving["n_ended"] + serving["decided"].get("Refuse", 0) == 60
    assert serving["decided"]["Load"] >= 4
    assert victims["n"] == 5
    assert victims["n_exact"] == victims["n_plans"] > 0
    assert "events/s" in capsys.readouterr().out


def test_quantiles_are_of_the_sorted_times():
    found = bench_placement.quantiles(i / 1e3 for i in range(100, 0, -1))
    assert found == {"n": 100, "p50_ms": 51.0, "p99_ms": 100.0, "max_ms": 100.0}
