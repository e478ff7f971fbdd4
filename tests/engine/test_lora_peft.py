"""Logits with LoRA adapters are peft's own, alone and in mixed batches, of adapters that peft has saved."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from sllmdask.engine.engine import LLMEngine
from tests.engine.models import TinyModel, make_engine, make_model, prompts, request

TARGETS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "qwen2": ["q_proj", "v_proj"],
    "opt": ["q_proj", "v_proj", "fc1", "fc2"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
}


def save_adapter(directory: Path, model: TinyModel, targets: list[str], seed: int, **config: Any) -> torch.nn.Module:
    """An adapter as peft makes and saves it; returns peft's model, which applies it."""
    torch.manual_seed(seed)
    # Random matrices: what peft begins with changes nothing.
    given = {"r": 4, "lora_alpha": 16, "init_lora_weights": False, "task_type": "CAUSAL_LM", **config}
    given["fan_in_fan_out"] = type(model.reference).__name__.startswith("GPT2")
    wrapped = peft.get_peft_model(copy.deepcopy(model.reference), peft.LoraConfig(target_modules=targets, **given)).eval()
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.mul_(0.5)
    # Otherwise it saves the base's head, too, where an adapter is for the head.
    wrapped.save_pretrained(directory, save_embedding_layers=False)
    # What is compared is what was saved.
    return peft.PeftModel.from_pretrained(copy.deepcopy(model.reference), directory).eval()


def take(engine: LLMEngine, name: str, directory: Path) -> bytes:
    from safetensors.torch import load_file

    adapter = engine.read_adapter(name, directory, load_file(directory / "adapter_model.safetensors"))
    engine.add_adapter(adapter)
    return adapter.salt


def next_logits(engine: LLMEngine, asked: list[tuple[list[int], bytes]], monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The logits behind each prompt, of one step in which all of them run."""
    seen: list[torch.Tensor] = []
    forward = engine._runner.forward

    def note(chunks: Any, n_rows: Any) -> torch.Tensor:
        logits = forward(chunks, n_rows)
        seen.append(torch.as_tensor(logits).clone())
        return logits

    monkeypatch.setattr(engine._runner, "forward", note)
    for i, (prompt, salt) in enumerate(asked):
        sequence = request(str(i), prompt, 1)
        sequence.salt = salt
        engine.add(sequence)
    while engine.has_work:
        engine.step()
    monkeypatch.undo()
    (logits,) = seen
    return list(logits)


@torch.inference_mode()
def expected_logits(model: Any, prompt: list[int]) -> torch.Tensor:
    return model(input_ids=torch.tensor([prompt])).logits[0, -1]


@pytest.mark.parametrize("family", TARGETS)
def test_logits_are_those_of_peft_alone_and_beside_others(tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch):
    model = make_model(tmp_path / "base", family)
    theirs = [model.reference, *(save_adapter(tmp_path / str(seed), model, TARGETS[family], seed, r=2 * seed) for seed in (1, 2))]
    engine = make_engine(model, max_batch_tokens=1000)
    salts = [b"", take(engine, "one", tmp_path / "1"), take(engine, "two", tmp_path / "2")]
    asked = [(prompt, i % 3) for i, prompt in enumerate(prompts(9, 1, 60))]
    together = next_logits(engine, [(prompt, salts[which]) for prompt, which in asked], monkeypatch)
    for (prompt, which), beside in zip(asked, together, strict=True):
        [alone] = next_logits(engine, [(prompt, salts[which])], monkeypatch)
        expected = expected_logits(theirs[which], prompt)
        scale = float(expected.abs().max())
        assert (beside - expected).abs().max() <= 1e-5 * scale
        assert (alone - expected).abs().max() <= 1e-5 * scale
        if which:
            assert (expected - expected_logits(model.reference, prompt)).abs().max() > 1e-2 * scale, "the adapter does nothing"


@pytest.mark.parametrize(
    "config",
    [
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
        {"rank_pattern": {r"layers\.1\.self_attn\.q_proj": 8}, "alpha_pattern": {"^model.layers.2.self_attn.v_proj": 64}},
        {"target_modules": "all-linear"},
        {"target_modules": ["lm_head", "q_proj"]},
        {"layers_to_transform": [1]},
    ],
    ids=str,
)
def test_options_of_peft_mean_the_same_here(tmp_path: Path, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    model = make_model(tmp_path / "base")
    targets = config.pop("target_modules", ["q_proj", "v_proj"])
    theirs = save_adapter(tmp_path / "a", model, targets, 0, **config)
    engine = make_engine(model, max_batch_tokens=1000)
    salt = take(engine, "a", tmp_path / "a")
    for prompt in prompts(3, 5, 40):
        [found] = next_logits(engine, [(prompt, salt)], monkeypatch)
        expected = expected_logits(theirs, prompt)
        assert (found - expected).abs().max() <= 1e-5 * float(expected.abs().max())
