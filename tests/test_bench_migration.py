from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from scripts.bench_migration import parse_arguments
from scripts.bench_migration_cluster import token_ids, write_tokenizer
from scripts.bench_migration_report import NAMES, by_length, cut_of, gap_facts, report, split_of, stages_of, timeline_of, verdicts
from scripts.bench_migration_storm import plan
from sllmdask.engine.text import Tokenizer

STEP_S = 0.02


def stream(n_before: int, gap_s: float, n_after: int = 20) -> SimpleNamespace:
    """An answer to three tokens, in even steps but for one gap, after `n_before` tokens."""
    at = [STEP_S * i for i in range(n_before)]
    at += [at[-1] + gap_s + STEP_S * i for i in range(n_after)]
    return SimpleNamespace(prompt=[1, 2, 3], at=at)


def record(n_output: int, **more: Any) -> dict[str, Any]:
    told = {"n_tokens": 3 + n_output, "nbytes": 0, "steps": [100, 7], "seconds": 1.0, "stop_ms": 2.0, "pause_ms": 50.0}
    return told | {"source": "0", "destination": "1", **more}


def test_the_gap_at_the_cut_is_that_before_the_first_token_of_the_destination():
    cut = cut_of(stream(9, 0.05), record(9), 12)
    assert cut["gap_ms"] == pytest.approx(50) and cut["step_ms"] == pytest.approx(20)
    assert cut_of(stream(9, 0.05), record(8), 12)["gap_ms"] == pytest.approx(20)


def test_the_parts_of_a_gap_add_up_to_what_is_beyond_a_step():
    answer = stream(9, 0.05)
    # Tokens come to the client 1 ms after their steps, the first one of the destination after 5 ms: its step took 40 ms.
    there = [(at - 0.021, at - 0.001) for at in answer.at[:9]]
    early = [(begin - 10, end - 10) for begin, end in there]
    here = [(answer.at[9] - 0.045, answer.at[9] - 0.005), *((at - 0.021, at - 0.001) for at in answer.at[10:])]
    parts = split_of(answer, record(9), there, [*early, *here], 8)
    assert parts == pytest.approx({"before": 6, "longer": 20, "later": 4, "step": 20})
    assert parts["before"] + parts["longer"] + parts["later"] == pytest.approx(50 - 20)


def rows(**gaps_ms: tuple[float, float]) -> list[dict[str, Any]]:
    """Two repeats of each way at 64 and at 1024 tokens."""
    return [
        {"length": length, "way": way, "repeat": repeat, "gap_ms": gap + repeat, "step_ms": 20.0, **_rest(way)}
        for way, gaps in gaps_ms.items()
        for length, gap in zip((64, 1024), gaps, strict=True)
        for repeat in (0, 2)
    ]


def _rest(way: str) -> dict[str, Any]:
    return {"stop_ms": 1.0, "pause_ms": 9.0, "seconds": 0.1, "nbytes": 10_100_000, "steps": [10**7, 10**5], "n_tokens": 64}


def test_what_is_beyond_a_step_is_told_apart_from_what_the_last_bytes_take():
    measured = rows(kv=(22, 23), tokens=(29, 39), blocking=(31, 120), recompute=(99, 899))
    facts = by_length(measured, "kv")[1024]
    assert facts["beyond_ms"] == pytest.approx(4) and facts["gap_ms"] == pytest.approx(24)
    # 10.1 MB went in 101 ms (the median of 100 and 102).
    assert facts["transport_ms"] == pytest.approx(1.0, rel=0.01)
    said = "\n".join(verdicts(measured))
    assert "the gap at 1024 tokens is 1.04 times that at 64" in said
    assert "at 1024 tokens its gap is 1/22.5 of that of recomputing (1/20 was to be)" in said


def test_where_a_way_loses_is_said():
    said = "\n".join(verdicts(rows(kv=(30, 23), tokens=(29, 39), blocking=(31, 120), recompute=(25, 899))))
    assert f"{NAMES['tokens']} has a shorter gap than {NAMES['recompute']}, but not at 64 tokens." in said
    assert f"{NAMES['kv']} has a shorter gap than {NAMES['blocking']}, at every length." in said


def test_the_messages_of_a_stage_are_one_stage():
    notes = [
        {"op": op, "began_at": 10.0 + i, "ended_at": 10.5 + i, "n_before": n}
        for i, (op, n) in enumerate([("reserve", 0), ("append", 1), ("append", 1), ("append", 2), ("extend", 2), ("commit", 3)])
    ]
    assert stages_of(notes, 10.0) == [("reserve", 0, 0.5), ("1", 1, 2.5), ("2", 3, 3.5), ("commit", 5, 5.5)]
    drawn = timeline_of(stream(600, 0.05), record(600, notes=notes), 12)
    assert drawn["first_at_destination"] == 600 and drawn["nodes"] == ["0", "1"]
    assert drawn["tokens"][-1][0] == 611 and drawn["tokens"][0][0] > 0


def test_a_storm_has_the_moves_that_were_asked_for_within_its_time():
    planned = plan(1000, 60.0, 64, seed=1)
    assert planned == plan(1000, 60.0, 64, seed=1) != plan(1000, 60.0, 64, seed=2)
    assert [at for at, *_ in planned] == sorted(at for at, *_ in planned)
    assert 0 <= planned[0][0] < planned[-1][0] < 60
    assert {number for _, number, _, _ in planned} == set(range(64))
    assert min(Counter(way for _, _, way, _ in planned).values()) > 400


def test_a_text_has_the_ids_of_its_tokens(tmp_path: Path):
    write_tokenizer(tmp_path, 512)
    stream = Tokenizer.from_directory(tmp_path).stream()
    ids = [0, 511, 7, 7, 300]
    assert token_ids("".join(stream.push([token]) for token in ids)) == ids


def test_a_report_says_what_was_lost_and_what_stayed_behind():
    facts = gap_facts([1.0, 2.0, 3.0])
    one = {
        "n_streams": 4,
        "n_tokens": 50,
        "n_workers": 2,
        "seconds": 60.0,
        "outcomes": {"moved": 3, "refused": 1},
        "by_way": {"kv": 2, "tokens": 1},
        "reasons": {"it has ended": 1},
        "n_failed": 1,
        "n_other_tokens": 2,
        "quiet": facts,
        "moving": facts,
        "pauses": None,
        "held_before": {"0": [0, 0, 0]},
        "held_after": {"0": [1, 5, 1]},
    }
    text = report({"machine": {"cpu": "a CPU", "cores": 2, "memory_nbytes": 8e9}, "storm": [one]})
    assert "3 moves in 60 s (2 as kv, 1 as tokens), 1 refused" in text
    assert "streams that failed: 1; with other tokens than undisturbed: 2" in text
    assert "{'0': [1, 5, 1]}, before {'0': [0, 0, 0]}" in text


def test_a_quick_run_is_smaller_and_what_makes_no_sense_is_refused(capsys: pytest.CaptureFixture[str]):
    quick, full = parse_arguments(["--quick"]), parse_arguments([])
    assert quick.moves < full.moves and quick.parts == full.parts == ["downtime", "split", "neighbours", "storm"]
    assert parse_arguments(["storm"]).parts == ["storm"]
    for wrong in (["walk"], ["--lengths", "8"], ["--storm-workers", "1"], ["--repeats", "0"], ["--plot", "/nowhere"]):
        with pytest.raises(SystemExit):
            parse_arguments(wrong)
    assert "no part is called 'walk'" in capsys.readouterr().err
