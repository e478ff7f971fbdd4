"""The parts of ``scripts/bench_load.py`` that the figures stand on: cold is cold, wrong bytes are seen, statistics are right."""

import hashlib
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from scripts import bench_load, bench_load_measure, bench_load_report
from scripts.bench_load_cold import check_bytes
from scripts.bench_load_contenders import CONTENDERS, Contender, Load, Loading, Safetensors, SafetensorsBytes, Setting
from scripts.bench_load_measure import PAGE, BenchError, Estimate, WrongBytes
from scripts.bench_load_process import ContenderFailed, ContenderProcess, NotInstalled
from scripts.make_checkpoint import SHAPES, make_checkpoint
from sllmdask.loader.format import read_index

TINY = replace(SHAPES["tiny"], n_vocab=512, hidden=64, mlp=96)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bench") / "checkpoint"
    make_checkpoint(directory, TINY, 2, 0)
    return directory


def on_real_disk(path: Path) -> Path:
    if bench_load_measure.disk_of(path).get("fstype") in ("tmpfs", "ramfs"):
        pytest.skip("the temporary directory is memory")
    return path


# --- the checkpoint ---


@pytest.mark.parametrize(
    ("shape", "n_parameters"),
    [
        ("qwen2.5-0.5b", 494_032_768),
        ("qwen2.5-1.5b", 1_543_714_304),
        ("qwen2.5-7b", 7_615_616_512),
        ("llama-3.2-1b", 1_235_814_400),
    ],
)
def test_shapes_have_as_many_parameters_as_the_published_models(shape: str, n_parameters: int):
    assert SHAPES[shape].nbytes == 2 * n_parameters


def test_a_made_checkpoint_has_every_tensor_of_its_shape_once_over_all_shards(checkpoint: Path):
    shards = sorted(checkpoint.glob("*.safetensors"))
    found = [(name, tensor.shape) for path in shards for name, tensor in load_file(path).items()]

    assert len(shards) == 2
    assert sorted(found) == sorted((name, torch.Size(shape)) for name, shape, _ in TINY.tensors())
    assert read_index(checkpoint).nbytes == TINY.nbytes


def test_the_same_arguments_make_the_same_bytes_and_another_seed_others(checkpoint: Path, tmp_path: Path):
    make_checkpoint(tmp_path / "same", TINY, 2, 0)
    make_checkpoint(tmp_path / "other", TINY, 2, 1)

    def digests(directory: Path) -> list[str]:
        return [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.glob("*.safetensors"))]

    assert digests(tmp_path / "same") == digests(checkpoint)
    assert set(digests(tmp_path / "other")).isdisjoint(digests(checkpoint))


def test_exponents_carry_about_as_many_bits_as_those_of_trained_weights(checkpoint: Path):
    with safe_open(next(checkpoint.glob("*1-of*")), "pt") as file:
        weights = file.get_tensor("model.embed_tokens.weight")
    exponents = (weights.view(torch.int16).numpy().ravel() >> 7) & 0xFF
    shares = np.bincount(exponents) / len(exponents)
    shares = shares[shares > 0]

    assert 2.4 < -(shares * np.log2(shares)).sum() < 2.9


# --- cold files ---


def test_a_file_that_was_read_is_in_the_page_cache_until_it_is_made_cold(tmp_path: Path):
    path = on_real_disk(tmp_path) / "file"
    path.write_bytes(os.urandom(40 * PAGE + 1))
    bench_load_measure.make_warm([path])
    assert bench_load_measure.cached_bytes([path]) == 41 * PAGE

    bench_load_measure.make_cold([path])

    assert bench_load_measure.cached_bytes([path]) == 0


def test_a_file_that_cannot_be_made_cold_is_an_error_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "file"
    path.write_bytes(bytes(PAGE))
    monkeypatch.setattr(os, "posix_fadvise", lambda *_: None)
    monkeypatch.setattr(bench_load_measure.time, "sleep", lambda _: None)
    bench_load_measure.make_warm([path])

    with pytest.raises(BenchError, match="cannot be made cold"):
        bench_load_measure.make_cold([path])


def test_the_limit_reads_every_byte_of_every_file(tmp_path: Path):
    paths = [on_real_disk(tmp_path) / "a", tmp_path / "b"]
    contents = [os.urandom(3 * PAGE + 7), os.urandom(10 * PAGE)]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    if not bench_load_measure.supports_direct_reads(paths[0]):
        pytest.skip("no direct reads here")

    with bench_load_measure.mapped(14 * PAGE) as memory:
        seconds = bench_load_measure.read_directly(paths, memory, n_threads=3, chunk=2 * PAGE)
        found = memory.tobytes()

    assert seconds > 0
    assert found[: 3 * PAGE + 7] == contents[0]
    assert found[4 * PAGE :] == contents[1]


# --- the right bytes ---


def test_a_page_sum_takes_one_byte_of_each_page_and_the_last():
    data = np.zeros(2 * PAGE + 10, np.uint8)
    data[[0, 1, PAGE, 2 * PAGE, 2 * PAGE + 9]] = [1, 100, 2, 4, 8]

    assert bench_load_measure.page_sum(data) == 1 + 2 + 4 + 8
    assert bench_load_measure.page_sum(data[:0]) == 0


@pytest.mark.parametrize("contender", [Safetensors, SafetensorsBytes])
def test_a_loader_that_gives_the_files_bytes_passes(checkpoint: Path, contender: type[Contender]):
    truth = bench_load_measure.read_truth(checkpoint)
    load = Loading(contender, Setting(), "cpu").load(checkpoint, list(truth.digests), with_digests=True)

    check_bytes(contender.name, load, truth)

    assert truth.nbytes == TINY.nbytes
    assert load.seconds > 0


def test_a_loader_that_gives_one_wrong_bit_fails_and_the_tensor_is_named(checkpoint: Path, tmp_path: Path):
    truth = bench_load_measure.read_truth(checkpoint)
    tensors = {name: tensor for path in checkpoint.glob("*.safetensors") for name, tensor in load_file(path).items()}
    tensors["model.norm.weight"].view(torch.uint8)[5] ^= 1
    save_file(tensors, tmp_path / "model.safetensors")

    load = Loading(Safetensors, Setting(), "cpu").load(tmp_path, list(truth.digests), with_digests=True)

    with pytest.raises(WrongBytes, match=r"1 of \d+ tensors, 'model.norm.weight'"):
        check_bytes("it", load, truth)


def test_a_wrong_sum_over_the_pages_fails_without_any_digest():
    truth = bench_load_measure.Truth({"a": "0"}, 1, touch_sum=7)
    load = Load(1.0, 1.0, 0, 0, touch_sum=8)

    with pytest.raises(WrongBytes, match="8 and not to 7"):
        check_bytes("it", load, truth)


def test_a_loader_that_leaves_a_tensor_out_is_told_which(checkpoint: Path):
    with pytest.raises(BenchError, match=r"'no\.such\.tensor'"):
        Loading(Safetensors, Setting(), "cpu").load(checkpoint, ["model.norm.weight", "no.such.tensor"], with_digests=False)


# --- statistics ---


def test_an_interval_holds_the_median_and_is_a_point_where_nothing_varies():
    rng = np.random.default_rng(0)
    values = rng.normal(10, 1, 20).tolist()
    found = bench_load_measure.estimate(values)

    assert min(values) <= found.low < found.median < found.high <= max(values)
    assert found.median == np.median(values)
    assert bench_load_measure.estimate([3.0] * 5) == Estimate(3.0, 3.0, 3.0)


def test_about_95_of_100_intervals_hold_the_true_median():
    rng = np.random.default_rng(1)
    n_hits = 0
    for _ in range(200):
        found = bench_load_measure.estimate(rng.normal(0, 1, 25).tolist())
        n_hits += found.low <= 0 <= found.high

    assert 0.88 <= n_hits / 200 <= 0.99


def test_what_disturbs_both_of_a_repeat_does_not_disturb_their_ratio():
    base = [1.0, 1.1, 5.0, 1.2, 0.9, 8.0]

    found = bench_load_measure.estimate_ratio([2 * value for value in base], base)

    assert found == Estimate(pytest.approx(2.0), pytest.approx(2.0), pytest.approx(2.0))


def test_each_takes_one_turn_per_repeat_in_changing_orders_that_the_seed_decides():
    names = ["a", "b", "c", "d", "e"]
    found = list(bench_load_measure.turns(names, 6, seed=3))
    orders = [tuple(name for number, name in found if number == repeat) for repeat in range(6)]

    assert [repeat for repeat, _ in found] == [repeat for repeat in range(6) for _ in names]
    assert all(sorted(order) == names for order in orders)
    assert len(set(orders)) > 1
    assert found == list(bench_load_measure.turns(names, 6, seed=3))
    assert found != list(bench_load_measure.turns(names, 6, seed=4))


# --- processes ---


def start(tmp_path: Path, module: str) -> ContenderProcess:
    from importlib import import_module

    return ContenderProcess(import_module, module, env={"BENCH_TEST": "7"}, log=tmp_path / "log")


def test_a_contender_process_runs_calls_with_its_environment_and_ends(tmp_path: Path):
    process = start(tmp_path, "os")
    try:
        assert process.call("getenv", "BENCH_TEST", timeout_s=30) == "7"
        assert process.call("getpid", timeout_s=30) == process.pid != os.getpid()
    finally:
        process.close()

    assert not Path(f"/proc/{process.pid}").exists()


def test_what_is_not_installed_is_told_by_name(tmp_path: Path):
    with pytest.raises(NotInstalled, match="no_such_module"):
        start(tmp_path, "no_such_module")


def test_a_contender_that_raises_dies_or_hangs_has_failed_and_it_says_how(tmp_path: Path):
    process = start(tmp_path, "os")
    try:
        with pytest.raises(ContenderFailed, match="FileNotFoundError"):
            process.call("stat", "/no/such/file", timeout_s=30)
        with pytest.raises(ContenderFailed, match="exit code 3"):
            process.call("_exit", 3, timeout_s=30)
    finally:
        process.close()

    process = start(tmp_path, "time")
    try:
        with pytest.raises(ContenderFailed, match="no answer"):
            process.call("sleep", 60, timeout_s=0.1)
    finally:
        process.close()


# --- what it says ---


def row(name: str, seconds: float) -> bench_load_report.Row:
    around = Estimate(seconds, seconds - 0.1, seconds + 0.1)
    return bench_load_report.Row(name, "default", False, 10, around, around, seconds, 0.5, 1e9, 1.0, 1.0)


def test_the_table_goes_from_fast_to_slow_under_the_limit_and_its_columns_are_straight():
    text = bench_load_report.table([row("slow", 3.0), row("fast", 1.0)], Estimate(0.5, 0.4, 0.6), 2e9)
    lines = text.splitlines()

    assert [line.split()[0] for line in lines[1:]] == ["direct", "fast", "slow"]
    assert lines[2].index("1.000") == lines[3].index("3.000")


@pytest.mark.parametrize(("seconds", "text"), [(4.4, "4 s"), (89, "89 s"), (600, "10 min"), (5400, "1 h 30 min")])
def test_durations_read_as_people_say_them(seconds: float, text: str):
    assert bench_load_report.duration(seconds) == text


def test_contenders_are_chosen_by_pattern_and_an_unknown_one_is_refused():
    chosen = bench_load.choose(CONTENDERS, ["torch.load*", "FASTSAFETENSORS"])
    assert [contender.name for contender in chosen] == ["torch.load", "torch.load, mmap", "fastsafetensors"]

    with pytest.raises(BenchError, match="'tensorflow'"):
        bench_load.choose(CONTENDERS, ["tensorflow"])


def test_contenders_have_names_of_their_own_and_settings_too():
    names = [contender.name for contender in CONTENDERS]
    assert len(set(names)) == len(names)
    for contender in CONTENDERS:
        settings = [setting.name for setting in contender.settings]
        assert settings
        assert len(set(settings)) == len(settings)


@pytest.mark.parametrize(
    "arguments",
    [["--repeats", "0"], ["--size", "huge"], ["--json", "/no/such/place/x.json"], ["--device", "cuda", "--scenario", "host"]],
)
def test_bad_usage_ends_with_one_line_that_names_the_argument(arguments: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as exit_:
        bench_load.parse_arguments(arguments)

    assert exit_.value.code == 2
    assert arguments[0] in capsys.readouterr().err.splitlines()[-1]
