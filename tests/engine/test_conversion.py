"""Checkpoints that hold their weights in another layout than the model: experts one by one, halves, four-bit numbers."""

from __future__ import annotations

import random
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.core_model_loading import Chunk, Concatenate, MergeModulelist, Transpose, WeightConverter

from sllmdask.engine.construct import build_skeleton
from sllmdask.engine.conversion import Group, make_fusion
from sllmdask.engine.engine import build_engine
from sllmdask.errors import Cancelled, CheckpointCorrupt
from tests.engine.models import TinyModel, drain, make_engine, make_model, prompts, request, settings, write_json
from tests.engine.test_streamed_loading import Reader

#: Model -> the number of experts, and what a checkpoint calls the tensors of one of them.
MIXTURES = {
    "deepseek_v2": (8, "model.layers.1.mlp.experts.{}.gate_proj.weight"),
    "deepseek_v3": (8, "model.layers.1.mlp.experts.{}.gate_proj.weight"),
    "mixtral": (4, "model.layers.1.block_sparse_moe.experts.{}.w3.weight"),
    "olmoe": (4, "model.layers.1.mlp.experts.{}.up_proj.weight"),
    "qwen2_moe": (4, "model.layers.0.mlp.experts.{}.down_proj.weight"),
    "qwen3_moe": (12, "model.layers.1.mlp.experts.{}.gate_proj.weight"),
}
CPU = torch.device("cpu")


@pytest.fixture(params=sorted(MIXTURES))
def mixture(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[TinyModel, int, str]:
    model = make_model(tmp_path, request.param)
    n_experts, name = MIXTURES[request.param]
    assert name.format(n_experts - 1) in model.tensors, "this is not how users have it"
    assert not any("gate_up_proj" in name for name in model.tensors)
    return model, n_experts, name


def parameters_match(found: torch.nn.Module, expected: torch.nn.Module) -> bool:
    ours, theirs = found.state_dict(), expected.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_experts_become_the_parameters_of_transformers_and_all_else_stays_where_it_is(mixture: tuple[TinyModel, int, str]):
    model, _, _ = mixture
    engine = make_engine(model)
    runner = engine._runner
    assert parameters_match(runner.model, model.reference)
    given = {tensor.data_ptr() for tensor in model.tensors.values()}
    own = {name: tensor for name, tensor in runner.model.named_parameters() if tensor.data_ptr() not in given}
    assert own and all(name.endswith(("experts.gate_up_proj", "experts.down_proj")) for name in own)
    assert runner.copied_nbytes == sum(tensor.nbytes for tensor in own.values())


def test_experts_of_another_dtype_are_converted_into_their_place(tmp_path: Path):
    model = make_model(tmp_path, "qwen3_moe", torch.bfloat16)
    engine = make_engine(model, dtype="float32")
    assert parameters_match(engine._runner.model, model.reference.float())


@pytest.mark.parametrize("name", ["deepseek_v3", "qwen3_moe"])
def test_a_mixture_in_bfloat16_has_the_dtypes_that_transformers_gives_it(tmp_path: Path, name: str):
    model = make_model(tmp_path, name, torch.bfloat16)
    expected = type(model.reference).from_pretrained(model.directory, dtype=torch.bfloat16)
    found = make_engine(model)._runner.model.state_dict()
    assert {name: tensor.dtype for name, tensor in found.items()} == {
        name: tensor.dtype for name, tensor in expected.state_dict().items()
    }


def test_a_missing_expert_is_named(mixture: tuple[TinyModel, int, str]):
    model, n_experts, name = mixture
    for number in (0, n_experts // 2, n_experts - 1):
        tensors = {key: tensor for key, tensor in model.tensors.items() if key != name.format(number)}
        with pytest.raises(CheckpointCorrupt, match="missing") as refused:
            make_engine(replace(model, tensors=tensors))
        assert refused.value.tensor == name.format(number)


def test_a_projection_that_all_experts_miss_is_named(mixture: tuple[TinyModel, int, str]):
    model, n_experts, name = mixture
    gone = {name.format(number) for number in range(n_experts)}
    with pytest.raises(CheckpointCorrupt, match="missing") as refused:
        make_engine(replace(model, tensors={key: tensor for key, tensor in model.tensors.items() if key not in gone}))
    named = refused.value.tensor
    assert named in gone or named == name.partition(".experts")[0].replace("block_sparse_moe", "mlp") + ".experts.down_proj"


def test_an_expert_too_many_is_named(mixture: tuple[TinyModel, int, str]):
    model, n_experts, name = mixture
    tensors = {**model.tensors, name.format(n_experts): model.tensors[name.format(0)]}
    with pytest.raises(CheckpointCorrupt, match=f"asks for {n_experts}") as refused:
        make_engine(replace(model, tensors=tensors))
    assert refused.value.tensor == name.format(n_experts)


@pytest.mark.parametrize("number", [0, 3])
def test_an_expert_of_another_shape_is_named(mixture: tuple[TinyModel, int, str], number: int):
    model, _, name = mixture
    rows, columns = model.tensors[name.format(number)].shape
    for shape in ((rows - 1, columns), (rows, columns + 1)):
        with pytest.raises(CheckpointCorrupt, match=r"config\.json asks for") as refused:
            make_engine(replace(model, tensors={**model.tensors, name.format(number): torch.zeros(shape)}))
        if number:
            assert refused.value.tensor == name.format(number)


def test_an_expert_is_copied_when_it_is_there_and_not_when_the_layer_is(tmp_path: Path):
    model = make_model(tmp_path, "qwen3_moe")
    reader = Reader(model)
    engine = reader.engine()
    first_layer = [name for name in model.tensors if name.startswith("model.layers.0.mlp.experts")]
    engine.add(request("a", [1, 2, 3], 4))
    answers: list[dict[str, list[int]]] = []
    thread = threading.Thread(target=lambda: answers.append(drain(engine)))
    thread.start()
    reader.deliver("model.embed_tokens.weight", *first_layer[:-1])
    reader.until_waited_for(first_layer[-1])
    # What was copied is not read again.
    for name in first_layer[:-1]:
        reader.tensors[name].fill_(torch.nan)
    reader.deliver(*(model.tensors.keys() - set(first_layer[:-1])))
    thread.join(30)
    assert answers == [{"a": model.generate([1, 2, 3], 4)}]


def test_a_load_that_is_called_off_between_two_experts_leaves_the_skeleton_as_it_was(tmp_path: Path):
    model = make_model(tmp_path, "mixtral")
    skeleton = build_skeleton(model.directory)
    reader = Reader(model)
    engine = build_engine(model.directory, reader.tensors, settings(), skeleton=skeleton, wait=reader.wait)
    engine.add(request("a", [1, 2, 3], 4))
    experts = [name for name in model.tensors if name.startswith("model.layers.0.block_sparse_moe.experts")]
    reader.deliver("model.embed_tokens.weight", *experts[:3])
    reader.until_waited_for(experts[3])
    engine.interrupt()
    with pytest.raises(Cancelled):
        engine.step()
    reader.fail(Cancelled())
    engine.close()
    assert all(tensor.is_meta for tensor in skeleton.model.state_dict().values())
    engine = build_engine(model.directory, model.tensors, settings(), skeleton=skeleton)
    engine.add(request("a", [1, 2, 3], 6))
    assert drain(engine) == {"a": model.generate([1, 2, 3], 6)}


def test_a_file_in_the_layout_of_the_model_is_taken_as_it_is(tmp_path: Path):
    model = make_model(tmp_path, "qwen3_moe")
    tensors = {name: tensor.detach().clone() for name, tensor in model.reference.state_dict().items()}
    engine = make_engine(replace(model, tensors=tensors))
    assert engine._runner.copied_nbytes == 0
    engine.add(request("a", [1, 2, 3], 6))
    assert drain(engine) == {"a": model.generate([1, 2, 3], 6)}


# --- the operations of transformers, as the oracle -------------------------------------------------------------------


def converted(converter: WeightConverter, names: dict[str, list[str]], tensors: dict[str, torch.Tensor], first: str) -> Any:
    """What transformers makes of them."""
    for pattern, given in names.items():
        for name in given:
            converter.add_tensor(first, name, pattern, lambda tensor=tensors[name]: tensor)
    return {name: value[0] if isinstance(value, list) else value for name, value in converter.convert(first).items()}


@pytest.mark.parametrize("seed", range(20))
def test_slices_are_where_transformers_stacks_and_joins(seed: int):
    rng = random.Random(seed)
    n_patterns, n_each = rng.randint(1, 3), rng.randint(1, 12)
    kind = rng.choice(["stack", "join"] if n_patterns == 1 else ["join", "stack and join"])
    operations = {
        "stack": lambda: [MergeModulelist(dim=0)],
        "join": lambda: [Concatenate(dim=0)],
        "stack and join": lambda: [MergeModulelist(dim=0), Concatenate(dim=1)],
    }[kind]
    if kind == "join":
        n_each = 1
    patterns = [f"experts.*.p{i}.weight" if kind != "join" else f"p{i}.weight" for i in range(n_patterns)]
    names = {
        pattern: [f"experts.{number}.p{i}.weight" if kind != "join" else f"p{i}.weight" for number in range(n_each)]
        for i, pattern in enumerate(patterns)
    }
    generator = torch.Generator().manual_seed(seed)
    n_columns = rng.randint(1, 5)
    tensors = {}
    for given in names.values():
        n_rows = rng.randint(1, 6)
        tensors |= {name: torch.randn(n_rows, n_columns, generator=generator) for name in given}
    expected = converted(WeightConverter(patterns, "fused", operations()), names, tensors, "fused")
    group = Group(WeightConverter(patterns, "fused", operations()), "fused", names)
    shapes = {name: value.shape for name, value in expected.items()}
    fusion = make_fusion(group, None, shapes, tensors, torch.float32, CPU, "here")
    sources = list(fusion.sources)
    rng.shuffle(sources)
    for name in sources:
        fusion.take(name)
    found = fusion.finish()
    assert found.keys() == expected.keys() == {"fused"}
    assert torch.equal(found["fused"], expected["fused"])


class _Model:
    config = None


@pytest.mark.parametrize(
    ("operations", "targets"),
    [([Transpose(0, 1)], ["a.weight"]), ([Chunk(dim=0)], ["q.weight", "k.weight"]), ([Chunk(dim=1)], ["q.weight", "k.weight"])],
    ids=str,
)
def test_other_operations_are_left_to_transformers(operations: list[Any], targets: list[str]):
    tensors = {"layer.old.weight": torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).bfloat16()}
    names = {"old.weight": ["layer.old.weight"]}
    first = f"layer.{targets[0]}"
    expected = converted(WeightConverter("old.weight", list(targets), operations), names, tensors, first)
    group = Group(WeightConverter("old.weight", list(targets), operations), first, names)
    shapes = {name: value.shape for name, value in expected.items()}
    fusion = make_fusion(group, _Model(), shapes, tensors, torch.float32, CPU, "here")
    assert set(fusion.parameters) == set(expected) == {f"layer.{target}" for target in targets}
    fusion.take("layer.old.weight")
    found = fusion.finish()
    assert all(torch.equal(found[name], expected[name].float()) and found[name].is_contiguous() for name in expected)
    wrong = {name: torch.Size((1, 1)) for name in shapes}
    with pytest.raises(CheckpointCorrupt, match=r"config\.json asks for"):
        make_fusion(group, _Model(), wrong, tensors, torch.float32, CPU, "here")


# --- MXFP4 -----------------------------------------------------------------------------------------------------------


def quantized(model: TinyModel) -> TinyModel:
    """`model` with experts of four bits, in the file as OpenAI's are, and in the reference as transformers reads them."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    generator = torch.Generator().manual_seed(7)
    tensors = dict(model.tensors)
    for name, parameter in model.reference.named_parameters():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            n_experts, n_inner, n_outer = parameter.shape
            blocks = torch.randint(0, 256, (n_experts, n_outer, n_inner // 32, 16), dtype=torch.uint8, generator=generator)
            scales = torch.randint(120, 126, blocks.shape[:-1], dtype=torch.uint8, generator=generator)
            del tensors[name]
            tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            with torch.no_grad():
                parameter.copy_(convert_moe_packed_tensors(blocks, scales, dtype=torch.float32))
    write_json(model.directory / "config.json", quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": []})
    return replace(model, tensors=tensors)


def test_the_four_bit_experts_of_gpt_oss_are_written_out_as_transformers_does(tmp_path: Path):
    model = quantized(make_model(tmp_path, "gpt_oss"))
    engine = make_engine(model)
    assert parameters_match(engine._runner.model, model.reference)
    [prompt] = prompts(1, 40, 60)
    engine.add(request("a", prompt, 20))
    assert drain(engine) == {"a": model.generate(prompt, 20)}


def test_four_bit_experts_that_arrive_while_the_model_runs_give_the_same_tokens(tmp_path: Path):
    model = quantized(make_model(tmp_path, "gpt_oss"))
    reader = Reader(replace(model, tensors=model.tensors), rubbish=7)
    engine = reader.engine()
    engine.add(request("a", [5, 6, 7], 10))
    names = list(model.tensors)
    random.Random(0).shuffle(names)
    with reader.delivering(names):
        assert drain(engine) == {"a": model.generate([5, 6, 7], 10)}


@pytest.mark.parametrize(("ending", "what"), [("_blocks", "missing"), ("_scales", "missing"), ("_scales", "uint8")])
def test_four_bit_experts_of_which_half_is_missing_or_wrong_are_named(tmp_path: Path, ending: str, what: str):
    model = quantized(make_model(tmp_path, "gpt_oss"))
    name = f"model.layers.1.mlp.experts.down_proj{ending}"
    tensor = model.tensors.pop(name)
    if what == "uint8":
        model.tensors[name] = tensor[..., :-1]
    with pytest.raises(CheckpointCorrupt, match=what) as refused:
        make_engine(model)
    assert refused.value.tensor == name
