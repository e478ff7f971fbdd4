"""Deterministic mode: the bits of a request's logits, whatever else is in the batch and however its sequence was cut."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from sllmdask.batching.scheduler import Chunk
from sllmdask.engine.construct import build_skeleton
from sllmdask.engine.engine import LLMEngine, StepOutput, build_engine
from sllmdask.engine.kernels import cpu_attention
from sllmdask.engine.numerics import EvenActivations, refuse_batch_dependence
from sllmdask.engine.runner import ModelRunner
from sllmdask.errors import DeterminismUnavailable, UnsupportedArchitecture
from tests.engine.models import CONFIGS, TinyModel, assert_all_free, drain, make_engine, make_model, prompts, request, settings

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch is built without oneDNN")
N_TOKENS = 24
#: Grouped heads, learned positions with Conv1D, soft-capping with windows, tied weights, multi-query.
NAMES = ["llama", "gpt2", "gemma2", "qwen2", "gpt_bigcode"]
DTYPES = [torch.float32, torch.bfloat16]
OWN_ATTENTION = {"bloom", "codegen", "falcon", "falcon-alibi", "falcon-grouped", "gpt_neo", "gptj", "mpt"}
EXPERTS = {
    "deepseek_v2",
    "deepseek_v3",
    "glm4_moe",
    "gpt_oss",
    "granite_moe",
    "minimax_m2",
    "mixtral",
    "olmoe",
    "qwen2_moe",
    "qwen3_moe",
}
BATCH_DEPENDENT = OWN_ATTENTION | EXPERTS


class Recorder:
    """The digest of all logits of each request, row by row: a row that is computed again must have the same bits."""

    def __init__(self, engine: LLMEngine) -> None:
        self.rows: dict[tuple[str, int], bytes] = {}
        self._forward = engine._runner.forward
        engine._runner.forward = self._record  # type: ignore[method-assign]

    def _record(self, chunks: Sequence[Chunk], n_rows: Sequence[int] | None = None) -> torch.Tensor:
        logits = self._forward(chunks, n_rows)
        for chunk, row in zip((chunk for chunk in chunks if chunk.samples), logits, strict=True):
            key = (chunk.sequence.request_id, chunk.stop)
            found = row.contiguous().view(torch.uint8).numpy().tobytes()
            assert self.rows.setdefault(key, found) == found
        return logits

    def digests(self) -> dict[str, str]:
        made: dict[str, Any] = {}
        for (request_id, _), row in sorted(self.rows.items()):
            made.setdefault(request_id, hashlib.sha1()).update(row)
        return {request_id: digest.hexdigest() for request_id, digest in made.items()}


def run(
    model: TinyModel, asked: dict[str, list[int]], seed: int | None = None, **changes: Any
) -> tuple[dict[str, str], dict[str, list[int]], LLMEngine]:
    """Digests and answers of requests that come together, or in random order at random times."""
    engine = make_engine(model, deterministic=True, **changes)
    recorder = Recorder(engine)
    left = [request(name, prompt, N_TOKENS, temperature=0.8, seed=int(name)) for name, prompt in asked.items()]
    outputs: list[StepOutput] = []
    if seed is not None:
        rng = random.Random(seed)
        rng.shuffle(left)
        while left:
            for _ in range(min(len(left), rng.randint(1, 3))):
                engine.add(left.pop())
            for _ in range(rng.randint(0, 5)):
                outputs += engine.step()
    for sequence in left:
        engine.add(sequence)
    answers = drain(engine, outputs)
    assert_all_free(engine)
    return recorder.digests(), answers, engine


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_logits_have_the_same_bits_alone_mixed_chunked_and_computed_again_after_preemptions(
    model_of, name: str, dtype: torch.dtype
):
    model = model_of(name, dtype)
    asked = {str(i): prompt for i, prompt in enumerate(prompts(7, 3, 120, seed=5))}
    alone: dict[str, str] = {}
    for key, prompt in asked.items():
        digests, *_ = run(model, {key: prompt})
        alone |= digests
    assert len(set(alone.values())) == len(asked)
    assert run(model, asked)[0] == alone
    assert run(model, asked, seed=1, max_batch_tokens=16, block_size=8)[0] == alone
    digests, answers, engine = run(model, asked, seed=2, n_blocks=24, block_size=8, max_batch_tokens=48)
    assert engine.stats().n_preemptions > 0
    assert digests == alone
    assert len({token for answer in answers.values() for token in answer}) > 10


@pytest.mark.parametrize("name", sorted(set(CONFIGS) - set(NAMES)))
def test_any_architecture_has_the_same_bits_alone_and_in_a_chunked_crowd_or_is_refused(model_of, name: str):
    model = model_of(name)
    if name in BATCH_DEPENDENT:
        with pytest.raises(UnsupportedArchitecture, match=r"engine\.deterministic"):
            make_engine(model, deterministic=True)
        return
    asked = {str(i): prompt for i, prompt in enumerate(prompts(4, 3, 60, seed=6))}
    alone, *_ = run(model, {"2": asked["2"]})
    crowd, *_ = run(model, asked, seed=3, max_batch_tokens=16)
    assert crowd["2"] == alone["2"]


@pytest.fixture
def n_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = torch.get_num_threads()
    # So little work would not be divided.
    monkeypatch.setattr(cpu_attention, "_WORK_OF_THREAD", 1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_have_the_same_bits_on_one_thread_and_on_two(tmp_path: Path, dtype: torch.dtype, n_threads: None):
    # Wide enough that torch divides the work of its own operators, too.
    model = make_model(tmp_path, "llama", dtype, hidden_size=256, intermediate_size=1088, num_hidden_layers=2, vocab_size=2000)
    asked = {str(i): prompt for i, prompt in enumerate(prompts(3, 3, 200, seed=7))}
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(run(model, asked, seed=threads, max_batch_tokens=160)[0])
    assert found[0] == found[1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_request_that_continues_elsewhere_has_the_bits_it_would_have_had(model_of, dtype: torch.dtype):
    model = model_of("llama", dtype)
    prompt = prompts(1, 50, 60)[0]
    engine = make_engine(model, deterministic=True)
    recorder = Recorder(engine)
    engine.add(request("a", prompt, N_TOKENS))
    whole = drain(engine)["a"]
    for n_known in (1, 9, 23):
        other = make_engine(model, deterministic=True, block_size=32, max_batch_tokens=20)
        recomputed = Recorder(other)
        other.add(request("a", prompt, N_TOKENS, output_ids=whole[:n_known]))
        assert drain(other)["a"] == whole[n_known:]
        assert recomputed.rows.items() <= recorder.rows.items()
        assert len(recomputed.rows) == N_TOKENS - n_known


def test_greedy_tokens_are_those_of_generate(model_of):
    model = model_of("llama")
    asked = prompts(3, 20, 60)
    engine = make_engine(model, deterministic=True)
    for i, prompt in enumerate(asked):
        engine.add(request(str(i), prompt, N_TOKENS))
    assert drain(engine) == {str(i): model.generate(prompt, N_TOKENS) for i, prompt in enumerate(asked)}


def test_the_promise_is_kept_while_weights_arrive(model_of):
    model = model_of("llama")
    prompt = prompts(1, 50, 60)[0]
    expected, *_ = run(model, {"0": prompt})
    arriving = {key: torch.full_like(tensor, torch.nan) for key, tensor in model.tensors.items()}

    def wait(names: Any) -> None:
        for key in names:
            arriving[key].copy_(model.tensors[key])

    engine = build_engine(model.directory, arriving, settings(deterministic=True), wait=wait)
    recorder = Recorder(engine)
    engine.add(request("0", prompt, N_TOKENS, temperature=0.8, seed=0))
    drain(engine)
    assert recorder.digests() == expected


# --- refusals --------------------------------------------------------------------------------------------------------


def test_a_machine_or_a_model_that_does_not_keep_the_promise_is_found_when_the_engine_starts(model_of):
    model = model_of("llama")
    skeleton = build_skeleton(model.directory)

    def lean_on_neighbours(_module: torch.nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output * (1 + 1e-6 * (output.shape[1] > 1))

    handle = skeleton.model.model.norm.register_forward_hook(lean_on_neighbours)
    with pytest.raises(DeterminismUnavailable, match=r"17 of 17 rows have other bits alone than together"):
        build_engine(model.directory, model.tensors, settings(deterministic=True), skeleton=skeleton)
    assert all(tensor.is_meta for tensor in skeleton.model.state_dict().values())
    handle.remove()
    build_engine(model.directory, model.tensors, settings(deterministic=True), skeleton=skeleton).close()


def test_it_needs_memory_for_all_packed_weights(model_of):
    with pytest.raises(DeterminismUnavailable, match=r"engine\.pack_memory"):
        make_engine(model_of("llama"), deterministic=True, pack_memory=1000)


def test_it_is_refused_on_a_gpu(model_of):
    model = model_of("llama")
    skeleton = build_skeleton(model.directory)
    with pytest.raises(DeterminismUnavailable, match="cuda"):
        ModelRunner(
            skeleton,
            model.directory,
            model.tensors,
            device=torch.device("cuda"),
            block_size=16,
            kv_memory=2**20,
            deterministic=True,
        )


def test_a_mixture_of_experts_is_refused_with_the_reason():
    config = transformers.Qwen3MoeConfig(
        vocab_size=32, hidden_size=32, intermediate_size=32, moe_intermediate_size=32, num_hidden_layers=1, num_experts=4
    )
    with torch.device("meta"):
        model = transformers.Qwen3MoeForCausalLM(config)
    skeleton: Any = SimpleNamespace(model=model, family=SimpleNamespace(architecture="Qwen3MoeForCausalLM"))
    with pytest.raises(UnsupportedArchitecture, match="mixture of experts") as refused:
        refuse_batch_dependence(skeleton)
    assert "how many rows of the batch" in refused.value.message


def test_the_numerics_id_tells_apart_what_may_have_other_bits(model_of):
    model = model_of("llama")

    def numerics_id(**changes: Any) -> str:
        engine = make_engine(model, **changes)
        found = engine.stats().numerics_id
        assert engine.stats().as_wire()["numerics_id"] == found
        engine.close()
        return found

    first = numerics_id(deterministic=True)
    assert first == numerics_id(deterministic=True, block_size=8)
    assert first.startswith("cpu/") and first.endswith("/deterministic") and f"/torch-{torch.__version__.split('+')[0]}" in first
    others = {
        numerics_id(),
        numerics_id(deterministic=True, dtype="bfloat16"),
        numerics_id(attention="sdpa"),
        numerics_id(pack_weights="never"),
    }
    assert len(others | {first}) == 5


# --- activation functions --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "quick_gelu", "sigmoid", "mish"])
def test_an_activation_has_the_same_bits_wherever_a_number_is(name: str, dtype: torch.dtype, n_threads: None):
    torch.set_num_threads(1)
    model = torch.nn.Sequential(transformers.activations.ACT2FN[name])
    numbers = torch.linspace(-9, 9, 90_003).to(dtype)
    plain = model(numbers)
    even = EvenActivations(model)
    whole = model(numbers)
    torch.testing.assert_close(whole, plain)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for start, stop in ((0, 1), (5, 38), (17, 17 + 96), (1000, 1000 + 32_769), (1, 90_003)):
            assert model(numbers[start:stop]).equal(whole[start:stop])
        assert model(numbers[:90_000].view(3, 300, 100).transpose(0, 1)).equal(whole[:90_000].view(3, 300, 100).transpose(0, 1))
    torch.set_num_threads(1)
    even.close()
    assert "forward" not in vars(model[0])
    assert model(numbers).equal(plain)
