"""Linear layers over packed weights: the same products, the same modules, and memory that is accounted for."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from sllmdask.engine import linears
from sllmdask.engine.engine import LLMEngine, build_engine
from sllmdask.engine.linears import LinearPacker, PackedLinear, Packing, can_pack, matrices_outside, packable
from sllmdask.errors import DeterminismUnavailable
from tests.engine.models import CONFIGS, TinyModel, drain, make_engine, make_model, prompts, request, settings, until_packed

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch is built without oneDNN")
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def layers_of_any_size_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the models here are small."""
    monkeypatch.setattr(linears, "LEAST_NUMEL", {torch.float32: 0, torch.bfloat16: 0})


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return make_model(tmp_path_factory.mktemp("llama"))


def a_layer(kind: str = "linear", n_in: int = 72, n_out: int = 40, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(0)
    layer: torch.nn.Module = Conv1D(n_out, n_in) if kind == "conv1d" else torch.nn.Linear(n_in, n_out, bias=kind != "no bias")
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    return layer.to(dtype).requires_grad_(False)


def pack_all(model: torch.nn.Module, owned: set[int] | None = None, **packing: Any) -> LinearPacker:
    packer = LinearPacker(model, Packing(**packing), set() if owned is None else owned)
    packer.pack(model)
    return packer


# --- products --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["linear", "no bias", "conv1d"])
def test_a_packed_layer_computes_what_the_plain_one_did(kind: str, dtype: torch.dtype):
    layer = a_layer(kind, dtype=dtype)
    rows = torch.randn(1, 9, 72).to(dtype)
    weight = layer.weight.float().t() if kind == "conv1d" else layer.weight.float()  # type: ignore[operator, union-attr]
    expected = linear(rows.float(), weight, None if layer.bias is None else layer.bias.float())  # type: ignore[operator, union-attr, arg-type]
    packer = pack_all(layer)
    found = layer(rows)
    assert (found.shape, found.dtype) == ((1, 9, 40), dtype)
    rounding = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found.float(), expected, rtol=rounding, atol=rounding)
    # Filled up to whole blocks.
    assert 72 * 40 * dtype.itemsize <= packer.nbytes <= 128 * 64 * dtype.itemsize
    assert packer.n_packed == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n_in", "n_out"), [(64, 96), (896, 1152), (1216, 300), (3072, 256)])
def test_a_rows_bits_do_not_depend_on_how_many_rows_there_are(n_in: int, n_out: int, dtype: torch.dtype):
    layer = a_layer("linear", n_in, n_out, dtype)
    pack_all(layer, invariant=True)
    rows = torch.randn(1, 65, n_in).to(dtype)
    whole = layer(rows)
    for n_rows in (1, 2, 3, 4, 7, 8, 16, 17, 33, 64):
        assert layer(rows[:, :n_rows]).equal(whole[:, :n_rows])
    assert layer(rows[:, 5:6]).equal(whole[:, 5:6])
    assert layer(rows[:, 30:47]).equal(whole[:, 30:47])


@pytest.mark.parametrize("shape", [(1, 0, 72), (0, 72)])
def test_no_rows_give_no_rows(shape: tuple[int, ...]):
    layer = a_layer()
    expected = layer(torch.zeros(shape)).shape
    pack_all(layer)
    assert layer(torch.zeros(shape)).shape == expected


@pytest.fixture
def asked_anew() -> Iterator[None]:
    can_pack.cache_clear()
    yield
    can_pack.cache_clear()


def test_a_dtype_that_cannot_be_packed_is_told_of_once(asked_anew: None, caplog: pytest.LogCaptureFixture):
    with caplog.at_level("INFO", "sllmdask"):
        assert [can_pack(torch.float64), can_pack(torch.float64)] == [False, False]
    assert [record.getMessage() for record in caplog.records] == [
        "weights are not packed: dtype=torch.float64 cause=not for this dtype, or built without oneDNN"
    ]


def test_where_packed_products_are_wrong_layers_stay_plain_and_no_bits_are_promised(
    llama: TinyModel, asked_anew: None, monkeypatch: pytest.MonkeyPatch
):
    original = PackedLinear._product
    monkeypatch.setattr(PackedLinear, "_product", lambda self, rows: original(self, rows).flip(-1))
    assert not can_pack(torch.float32)
    engine = make_engine(llama, pack_weights="always")
    engine.add(request("a", [1, 2, 3], 6))
    assert drain(engine) == {"a": llama.generate([1, 2, 3], 6)}
    assert engine.stats().packed_nbytes == 0
    with pytest.raises(DeterminismUnavailable, match="cannot pack"):
        make_engine(llama, deterministic=True)


# --- modules ---------------------------------------------------------------------------------------------------------


def test_hooks_see_a_packed_layer_as_they_saw_the_plain_one():
    layer = a_layer()
    seen: list[tuple[int, ...]] = []
    handles = [
        layer.register_forward_pre_hook(lambda _module, inputs: seen.append(tuple(inputs[0].shape))),
        layer.register_forward_hook(lambda _module, inputs, output: output + inputs[0].sum()),
    ]
    rows = torch.randn(3, 72)
    expected = layer(rows)
    pack_all(layer)
    torch.testing.assert_close(layer(rows), expected, rtol=1e-4, atol=1e-3)
    assert seen == [(3, 72), (3, 72)]
    for handle in handles:
        handle.remove()


def test_closing_gives_a_layer_its_own_forward_back():
    layer = a_layer()
    rows = torch.randn(3, 72)
    expected = layer(rows)
    packer = pack_all(layer)
    assert isinstance(vars(layer)["forward"], PackedLinear)
    packer.close()
    assert "forward" not in vars(layer)
    assert layer(rows).equal(expected)
    assert packer.nbytes == 0


def test_a_plain_weight_that_nobody_else_needs_is_dropped_and_a_lent_one_is_kept():
    model = torch.nn.Sequential(a_layer(n_out=72), a_layer(n_out=72))
    first, second = (module.weight for module in model)
    pack_all(model, {first.data_ptr()})
    assert model[0].weight.is_meta and model[0].weight.dtype == torch.float32
    assert model[1].weight is second
    assert model(torch.randn(2, 72)).isfinite().all()


def test_what_is_no_linear_layer_is_told_apart():
    model = torch.nn.Module()
    model.embedding = torch.nn.Embedding(4, 8)
    model.linear = torch.nn.Linear(8, 8)
    model.conv1d = Conv1D(8, 8)
    model.norm = torch.nn.LayerNorm(8)
    model.experts = torch.nn.ParameterDict({"up": torch.zeros(2, 8, 8)})
    assert list(packable(model)) == [model.linear, model.conv1d]
    assert list(matrices_outside(model)) == ["experts.up"]


# --- in an engine ----------------------------------------------------------------------------------------------------


def packer_of(engine: LLMEngine) -> LinearPacker:
    return engine._runner._packer


@pytest.mark.parametrize("name", CONFIGS)
def test_tokens_over_packed_weights_are_those_of_generate(tmp_path: Path, name: str):
    # From bfloat16 to float32, so that no layer keeps its plain weight but a tied one.
    model = make_model(tmp_path, name, torch.bfloat16)
    reference = model.reference.float()
    asked = prompts(4, 5, 60)
    engine = make_engine(model, dtype="float32", pack_weights="always", max_batch_tokens=32)
    layers = list(packable(engine._runner.model))
    assert packer_of(engine).n_packed == len(layers) > 0
    tied = reference.config.tie_word_embeddings
    assert sum(not layer.weight.is_meta for layer in layers) == (1 if tied else 0)  # type: ignore[union-attr]
    for i, prompt in enumerate(asked):
        engine.add(request(str(i), prompt, 12))
    assert drain(engine) == {str(i): model.generate(prompt, 12) for i, prompt in enumerate(asked)}
    engine.close()
    assert engine.stats().packed_nbytes == 0
    assert not any("forward" in vars(module) for module in engine._runner.model.modules())


def test_layers_that_are_too_small_to_gain_stay_plain_in_a_hot_model(llama: TinyModel, monkeypatch: pytest.MonkeyPatch):
    engine = make_engine(llama, pack_after=0)
    numels = sorted(layer.weight.numel() for layer in packable(engine._runner.model))  # type: ignore[union-attr, operator, misc]
    monkeypatch.setattr(linears, "LEAST_NUMEL", {torch.float32: numels[-1]})
    until_packed(engine)
    assert 0 < packer_of(engine).n_packed == numels.count(numels[-1]) < len(numels)
    engine.close()


def test_a_model_is_packed_when_it_is_hot_and_its_lent_weights_are_left_alone(llama: TinyModel):
    engine = make_engine(llama, pack_after=3)
    layers = list(packable(engine._runner.model))
    engine.add(request("a", [1, 2, 3], 30))
    for _ in range(3):
        engine.step()
    assert packer_of(engine)._thread is None
    assert engine.stats().packed_nbytes == 0
    assert drain(engine, [])["a"] == llama.generate([1, 2, 3], 30)[3:]
    until_packed(engine)
    assert packer_of(engine).n_packed == len(layers)
    plain = sum(layer.weight.nbytes for layer in layers)  # type: ignore[union-attr, misc]
    assert plain <= engine.stats().packed_nbytes <= 3 * plain
    # What is lent is still served from, by whoever asks for a weight.
    assert {layer.weight.data_ptr() for layer in layers} <= {  # type: ignore[operator, union-attr]
        tensor.data_ptr() for tensor in llama.tensors.values()
    }
    engine.add(request("b", [7, 8], 20))
    assert drain(engine) == {"b": llama.generate([7, 8], 20)}
    engine.close()
    assert engine.stats().packed_nbytes == 0


def test_weights_that_were_converted_give_way_to_the_packed_ones(llama: TinyModel):
    engine = make_engine(llama, dtype="bfloat16", pack_after=0, pack_memory=1)
    layers = list(packable(engine._runner.model))
    until_packed(engine)
    assert packer_of(engine).n_packed == len(layers)
    assert all(layer.weight.is_meta and layer.weight.dtype == torch.bfloat16 for layer in layers)  # type: ignore[union-attr]
    assert not engine._runner._owned & {parameter.data_ptr() for parameter in llama.tensors.values()}
    engine.close()


def test_an_answer_goes_on_unchanged_while_layers_are_exchanged_under_it(llama: TinyModel):
    asked = prompts(5, 5, 40)
    engine = make_engine(llama, pack_after=0)
    for i, prompt in enumerate(asked):
        engine.add(request(str(i), prompt, 40))
    assert drain(engine) == {str(i): llama.generate(prompt, 40) for i, prompt in enumerate(asked)}
    engine.close()


def test_no_weight_is_packed_where_that_is_not_wanted(llama: TinyModel):
    engine = make_engine(llama, dtype="bfloat16", pack_weights="never", pack_after=0)
    engine.add(request("a", [1, 2, 3], 6))
    drain(engine)
    assert packer_of(engine).n_packed == 0 and packer_of(engine)._thread is None
    assert engine.stats().packed_nbytes == 0


@pytest.mark.parametrize("when", ["always", "auto"])
def test_packed_weights_take_no_more_memory_than_they_may(llama: TinyModel, when: str):
    limit = 50_000
    engine = make_engine(llama, pack_weights=when, pack_after=0, pack_memory=limit)
    engine.add(request("a", [1, 2, 3], 3))
    drain(engine)
    if when == "auto":
        until_packed(engine)
    engine.add(request("b", [1, 2, 3], 12))
    assert drain(engine) == {"b": llama.generate([1, 2, 3], 12)}
    assert 0 < engine.stats().packed_nbytes <= limit
    assert packer_of(engine).full
    engine.close()


def test_closing_waits_for_the_weight_that_is_being_packed_and_leaves_the_rest(llama: TinyModel, monkeypatch: pytest.MonkeyPatch):
    from sllmdask.engine import linears

    began, go_on = threading.Event(), threading.Event()
    original = linears._pack
    n_packed = 0

    def slowly(layer: torch.nn.Module, invariant: bool) -> PackedLinear:
        nonlocal n_packed
        began.set()
        assert go_on.wait(60)
        n_packed += 1
        return original(layer, invariant)

    monkeypatch.setattr(linears, "_pack", slowly)
    engine = make_engine(llama, pack_after=0)
    engine.add(request("a", [1, 2, 3], 3))
    engine.step()
    assert began.wait(60)
    closing = threading.Thread(target=engine.close)
    closing.start()
    while not packer_of(engine)._stopped:
        closing.join(0.001)
    go_on.set()
    closing.join(60)
    assert not closing.is_alive()
    assert n_packed == 1
    assert all(parameter.is_meta for parameter in engine._runner.model.parameters())


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_layers_are_packed_as_their_weights_arrive(tmp_path: Path, name: str):
    model = make_model(tmp_path, name)
    arriving = {key: torch.full_like(tensor, torch.nan) for key, tensor in model.tensors.items()}

    def wait(names: Collection[str]) -> None:
        for key in names:
            arriving[key].copy_(model.tensors[key])

    engine = build_engine(model.directory, arriving, settings(pack_weights="always"), wait=wait)
    engine.add(request("a", [5, 6, 7], 12))
    assert drain(engine) == {"a": model.generate([5, 6, 7], 12)}
    engine.settle()
    assert packer_of(engine).n_packed == len(list(packable(engine._runner.model)))
    engine.close()


def test_weights_that_have_not_arrived_are_not_packed_however_hot_the_model_is(llama: TinyModel):
    arriving = {key: torch.full_like(tensor, torch.nan) for key, tensor in llama.tensors.items()}
    last, all_there = threading.Event(), threading.Event()

    def wait(names: Collection[str]) -> None:
        if "model.norm.weight" in names:
            last.set()
            assert all_there.wait(60)
        for key in names:
            arriving[key].copy_(llama.tensors[key])

    engine = build_engine(llama.directory, arriving, settings(pack_after=0), wait=wait)
    engine.add(request("a", [5, 6, 7], 12))
    outputs: list[Any] = []
    stepping = threading.Thread(target=lambda: outputs.append(drain(engine)))
    stepping.start()
    assert last.wait(60)
    assert packer_of(engine)._thread is None and packer_of(engine).n_packed == 0
    all_there.set()
    stepping.join(60)
    assert outputs == [{"a": llama.generate([5, 6, 7], 12)}]
    engine.close()
