"""The engine over the Triton kernels: in Triton's interpreter, or on a GPU, there with CUDA graphs and without.

The tokens are those of ``model.generate()``, on the CPU, in float32.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
pytest.importorskip("triton")

from sllmdask.engine.kernels.triton_attention import TritonBackend  # noqa: E402
from tests.engine.models import TinyModel, assert_all_free, drain, make_engine, make_model, prompts, request  # noqa: E402

on_a_gpu = [pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="torch sees no GPU")]
ARCHITECTURES = ["llama", "qwen2", "qwen3", "gemma2", "gemma3", "mistral-window", "opt", "gpt2", "gpt_neox", "phi3"]


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory):
    made: dict[str, TinyModel] = {}

    def model_of(name: str) -> TinyModel:
        if name not in made:
            made[name] = make_model(tmp_path_factory.mktemp(name), name)
        return made[name]

    return model_of


@pytest.mark.skipif(HAS_GPU, reason="Triton compiles in this process")
@pytest.mark.parametrize("name", ["llama", "gemma2", "opt", "mistral-window", "gpt2"])
def test_tokens_over_interpreted_kernels_are_those_of_generate(model_of, name: str):
    model = model_of(name)
    asked = prompts(3, 1, 40)
    engine = make_engine(model, attention="triton", max_batch_tokens=24)
    for i, prompt in enumerate(asked):
        engine.add(request(str(i), prompt, 6))
    assert drain(engine) == {str(i): model.generate(prompt, 6) for i, prompt in enumerate(asked)}
    assert_all_free(engine)
    graphs = engine._runner.graphs
    assert graphs is not None and graphs.recorded, "decode steps go through the buffers of graphs, recorded or not"
    engine.close()


class TestOnAGpu:
    pytestmark = on_a_gpu

    @pytest.mark.parametrize("cuda_graphs", [True, False], ids=["graphs", "eager"])
    @pytest.mark.parametrize("name", ARCHITECTURES)
    def test_tokens_are_those_of_generate_in_a_staggered_batch(self, model_of, name: str, cuda_graphs: bool):
        model = model_of(name)
        asked = prompts(6)
        engine = make_engine(model, device="cuda", max_batch_tokens=32, cuda_graphs=cuda_graphs)
        assert isinstance(engine._runner.backend, TritonBackend)
        outputs = []
        for i, prompt in enumerate(asked):
            engine.add(request(str(i), prompt, 24))
            outputs += engine.step() + engine.step()
        assert drain(engine, outputs) == {str(i): model.generate(prompt, 24) for i, prompt in enumerate(asked)}
        assert_all_free(engine)
        graphs = engine._runner.graphs
        assert (graphs is not None and len(graphs.recorded) > 2) == cuda_graphs
        engine.close()

    @pytest.mark.parametrize("attention", ["triton", "sdpa"])
    def test_a_small_pool_with_preemptions_gives_the_same_tokens(self, model_of, attention: str):
        model = model_of("llama")
        asked = prompts(6, 20, 60, seed=3)
        engine = make_engine(model, n_blocks=14, device="cuda", attention=attention)
        for i, prompt in enumerate(asked):
            engine.add(request(str(i), prompt, 30, arrival=i))
        assert drain(engine) == {str(i): model.generate(prompt, 30) for i, prompt in enumerate(asked)}
        assert engine.stats().n_preemptions
        assert_all_free(engine)
        engine.close()

    def test_an_engine_that_is_closed_leaves_the_device_as_it_was(self, tmp_path: Path):
        model = make_model(tmp_path)
        first = make_engine(model, device="cuda")
        first.add(request("a", [1, 2, 3], 8))
        drain(first)
        first.close()
        before = torch.cuda.memory_allocated()
        engine = make_engine(model, device="cuda")
        engine.add(request("a", [1, 2, 3], 8))
        drain(engine)
        engine.close()
        assert torch.cuda.memory_allocated() <= before
