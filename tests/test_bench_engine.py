"""The parts of ``scripts/bench_engine.py`` that the figures stand on: the work, the clocks, who is compared with whom."""

import json
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers

from scripts import bench_engine, bench_engine_http, bench_engine_throughput
from scripts.bench_engine_clock import PARTS, StepClock, shares
from scripts.bench_engine_contenders import MANAGER, ONE_BY_ONE, OURS, STATIC, Manager, OneByOne, OurEngine, Padded
from scripts.bench_engine_measure import (
    MIXED_BOUNDS,
    Work,
    cpu_seconds_of_tree,
    first_difference,
    make_work,
    resident_of_range,
)
from scripts.bench_engine_model import SHAPES, checkpoint, load_tensors, n_vocab
from scripts.bench_engine_run import Variant, parse_variant
from scripts.bench_load_measure import BenchError


@pytest.fixture(scope="module")
def work_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engine-models")


@pytest.fixture(scope="module")
def tiny(work_dir: Path) -> Path:
    return checkpoint(work_dir, "tiny", "float32", 0)


# --- the model and the work ---


@pytest.mark.parametrize(("name", "n_millions"), [("0.12b", 125), ("0.5b", 494)])
def test_shapes_have_as_many_parameters_as_their_names_say(name: str, n_millions: int):
    kind, n_layers, width, n_heads, n_kv_heads, mlp, vocabulary, tied = SHAPES[name]
    head = width // n_heads
    layer = 2 * width * width + 2 * width * n_kv_heads * head + 3 * width * mlp + 2 * width
    bias = width + 2 * n_kv_heads * head if kind == "qwen2" else 0
    n_parameters = n_layers * (layer + bias) + width + vocabulary * width * (1 if tied else 2)

    assert n_parameters == pytest.approx(n_millions * 1e6, rel=0.01)


def test_a_checkpoint_is_what_transformers_loads_and_its_data_begin_on_a_page(tiny: Path):
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    tensors = load_tensors(tiny)

    assert {name: torch.equal(tensor, model.state_dict()[name]) for name, tensor in tensors.items()} == dict.fromkeys(
        tensors, True
    )
    assert set(tensors) == set(model.state_dict())
    length = int.from_bytes((tiny / "model.safetensors").read_bytes()[:8], "little")
    assert (8 + length) % mmap.PAGESIZE == 0


def test_the_same_seed_asks_for_the_same_work_and_mixed_lengths_differ_within_their_bounds():
    work = make_work(200, 512, "mixed", (32, 96), 32, 0)

    assert work == make_work(200, 512, "mixed", (32, 96), 32, 0)
    assert work != make_work(200, 512, "mixed", (32, 96), 32, 1)
    assert MIXED_BOUNDS[0] <= min(work.lengths) < 10 < 60 < max(work.lengths) <= MIXED_BOUNDS[1]
    assert all(32 <= len(prompt) <= 96 for prompt in work.prompts)


def test_uniform_work_has_one_length():
    assert make_work(5, 512, "uniform", (3, 3), 7, 0).lengths == [7] * 5


# --- the contenders ---


@pytest.fixture(scope="module", params=[Padded, OneByOne, Manager])
def other(request: pytest.FixtureRequest, tiny: Path) -> Iterator[object]:
    contender = request.param(tiny, "float32", "cpu", 1)
    yield contender
    if hasattr(contender, "close"):
        contender.close()


def test_every_contender_gives_the_answers_of_our_engine_at_the_lengths_asked_for(other: object, tiny: Path):
    work = make_work(4, n_vocab("tiny"), "mixed", (5, 20), 16, 3)
    engine = OurEngine(tiny, "cpu", 1, {})
    try:
        ours = engine.run(work)
    finally:
        engine.close()

    theirs = other.run(work)  # type: ignore[attr-defined]

    assert [len(answer) for answer in ours.answers] == work.lengths
    assert theirs.answers == ours.answers
    assert theirs.n_tokens == ours.n_tokens == sum(work.lengths)
    assert len({token for answer in ours.answers for token in answer}) > 10


def test_a_request_that_the_engine_refuses_is_raised_where_the_answers_are_waited_for(tiny: Path):
    engine = OurEngine(tiny, "cpu", 1, {})
    try:
        with pytest.raises(Exception, match="not in the model's vocabulary"):
            engine.run(Work([[n_vocab("tiny")]], [1]))
    finally:
        engine.close()


def test_where_answers_part_the_margin_of_the_two_best_logits_is_told(tiny: Path):
    judge = OneByOne(tiny, "float32", "cpu", 1)
    asked = SimpleNamespace(call=lambda method, ids, **_: getattr(judge, method)(ids))
    work = Work([[1, 2, 3], [4, 5, 6]], [3, 3])
    (mine, same) = judge.answer(work)
    theirs = [[*mine[:1], mine[1] + 1, *mine[2:]], same]

    found = bench_engine_throughput.compare_answers([mine, same], theirs, work, asked)  # type: ignore[arg-type]

    model = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([[1, 2, 3, mine[0]]])).logits[0, -1].sort(descending=True).values
    assert (found["n"], found["n_equal"]) == (2, 1)
    (difference,) = found["differences"]
    assert (difference["request"], difference["index"]) == (0, 1)
    assert difference["margin"] == pytest.approx(float(logits[0] - logits[1]), abs=1e-4)


def test_the_first_difference_of_two_answers_is_found_also_where_one_is_shorter():
    assert first_difference([1, 2, 3], [1, 2, 3]) is None
    assert first_difference([1, 2, 3], [1, 9, 3]) == 1
    assert first_difference([1, 2], [1, 2, 3]) == 2


# --- clocks ---


def test_the_parts_of_a_step_add_up_to_it_and_each_is_seen(tiny: Path, monkeypatch: pytest.MonkeyPatch):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    from sllmdask.engine import engine as engine_module
    from sllmdask.engine.attention import NAME

    # What the clock replaces for its process is put back for the tests that follow.
    monkeypatch.setattr(engine_module, "sample", engine_module.sample)
    hook = ALL_ATTENTION_FUNCTIONS[NAME]
    engine = OurEngine(tiny, "cpu", 1, {}, watch=StepClock)
    try:
        engine.run(Work([[1, 2, 3], [4, 5]], [4, 4]))
    finally:
        engine.close()
        ALL_ATTENTION_FUNCTIONS.register(NAME, hook)
    steps = engine.watched.steps

    assert sum(step["n_tokens"] for step in steps) == 3 + 2 + 3 + 3
    assert all(sum(step[part] for part in PARTS) == pytest.approx(step["step"]) for step in steps)
    assert all(share > 0 for share in shares(steps).values())
    assert sum(shares(steps).values()) == pytest.approx(1)


def test_seconds_of_a_process_tree_hold_those_of_its_children():
    burn = "import os, time\nwhile os.times().user < 0.3: pass\nprint('burnt', flush=True)\ntime.sleep(60)"
    parent = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {burn!r}])"
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "burnt\n"
        assert cpu_seconds_of_tree(process.pid) >= 0.3
        assert (
            float(Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[11]) / os.sysconf("SC_CLK_TCK") < 0.3
        )
    finally:
        os.killpg(process.pid, 9)
        process.communicate()


def test_of_some_memory_the_pages_count_that_were_touched_and_no_neighbours():
    area = mmap.mmap(-1, 64 * mmap.PAGESIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    area.madvise(mmap.MADV_NOHUGEPAGE)
    address = torch.frombuffer(area, dtype=torch.uint8).data_ptr()
    assert resident_of_range(address, len(area)) == 0

    for page in range(10):
        area[page * mmap.PAGESIZE] = 1

    assert resident_of_range(address, len(area)) == 10 * mmap.PAGESIZE
    assert resident_of_range(address + mmap.PAGESIZE, 1) == mmap.PAGESIZE
    assert resident_of_range(address + 10 * mmap.PAGESIZE, 54 * mmap.PAGESIZE) == 0


# --- the command ---


def test_settings_of_a_variant_are_read_as_json_and_named():
    variant = parse_variant(["engine.max_batch_tokens=256", "engine.dtype=float32", "deterministic=true"])

    assert variant.settings == {"max_batch_tokens": 256, "dtype": "float32", "deterministic": True}
    assert variant.name("sllmdask") == "sllmdask (max_batch_tokens=256, dtype=float32, deterministic=True)"


@pytest.mark.parametrize("pair", ["engine.block_size", "server.port=1", "engine.=1"])
def test_a_variant_that_is_no_setting_of_the_engine_is_refused(pair: str):
    with pytest.raises(BenchError, match=r"--set .* takes engine\.KEY=VALUE"):
        parse_variant([pair])


def test_all_contenders_are_listed_in_process_and_over_http():
    names = [one.name for one in bench_engine_throughput.entrants([Variant(), Variant({"block_size": 32})])]

    assert names == [
        OURS,
        f"{OURS} (block_size=32)",
        MANAGER,
        STATIC,
        ONE_BY_ONE,
        bench_engine_http.OURS,
        f"{bench_engine_http.OURS} (block_size=32)",
        bench_engine_http.SERVE,
    ]


def test_a_variant_that_the_engine_does_not_know_is_named_with_the_reason_and_the_rest_goes_on(
    work_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    report = tmp_path / "report.json"
    bench_engine.run(
        bench_engine.parse_arguments(
            [
                *("--quick", "--scenario", "prefix", "--repeats", "2"),
                *("--set", "engine.no_such_setting=1"),
                *("--work-dir", str(work_dir), "--json", str(report)),
            ]
        )
    )
    written = json.loads(report.read_text())

    assert list(written["failed"]) == ["sllmdask (no_such_setting=1)"]
    assert "no_such_setting" in written["failed"]["sllmdask (no_such_setting=1)"]
    assert [result["contender"] for result in written["results"]] == ["sllmdask"]
    assert all(len(turn["ttft"]) == 2 for result in written["results"] for turn in result["turns"])
    assert str(work_dir) not in report.read_text()
    assert "not run: sllmdask (no_such_setting=1)" in capsys.readouterr().out


def test_models_that_were_swapped_in_the_midst_of_their_answers_give_the_same_ones(work_dir: Path, tmp_path: Path):
    report = tmp_path / "report.json"
    arguments = ["--quick", "--scenario", "swap", "--work-dir", str(work_dir), "--json", str(report)]
    bench_engine.run(bench_engine.parse_arguments(arguments))

    (result,) = json.loads(report.read_text())["results"]
    assert result["n_same_answers"] == result["n_answers"] == 2 * 2 * 4
    assert all(turn["pauses"] for turn in result["turns"])
