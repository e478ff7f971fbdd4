"""Random LoRA adapters in peft's layout, and base models into which they are merged: the oracle of what they do."""

from __future__ import annotations

import copy
import json
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.engine.models import TinyModel

#: Parts of module names that adapters of each family are for, by name in ``tests.engine.models.CONFIGS``.
TARGETS = {
    "llama": ("q_proj", "v_proj", "gate_proj", "down_proj"),
    "qwen2": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "gpt2": ("c_attn", "c_proj", "c_fc"),
    "opt": ("q_proj", "v_proj", "fc1"),
    "phi3": ("qkv_proj", "gate_up_proj"),
    "gemma2": ("q_proj", "up_proj"),
}


@dataclass(frozen=True)
class Adapter:
    directory: Path

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        return load_file(self.directory / "adapter_model.safetensors")

    def merged_into(self, model: TinyModel) -> TinyModel:
        """A model of its own with ``W + s * B A`` in the place of each ``W``, from the definition in the paper."""
        config = json.loads((self.directory / "adapter_config.json").read_text())
        reference = copy.deepcopy(model.reference)
        tensors = self.tensors
        for name in tensors:
            if not name.endswith("lora_A.weight"):
                continue
            path = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            a, b = tensors[name].double(), tensors[name.replace("lora_A", "lora_B")].double()
            rank = a.shape[0]
            alpha = next((v for k, v in config["alpha_pattern"].items() if re.search(f"{k}$", path)), config["lora_alpha"])
            scale = alpha / (math.sqrt(rank) if config["use_rslora"] else rank)
            module = reference.get_submodule(path)
            change = scale * (b @ a)
            with torch.no_grad():
                module.weight += (change.T if type(module).__name__ == "Conv1D" else change).to(module.weight.dtype)
        return replace(model, reference=reference, tensors={})


def write_adapter(directory: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Adapter:
    """Save `tensors`, by names within the base, as peft names and saves them."""
    directory.mkdir(parents=True, exist_ok=True)
    given = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "bias": "none",
    }
    (directory / "adapter_config.json").write_text(json.dumps({**given, **config}))
    save_file({f"base_model.model.{name}": tensor for name, tensor in tensors.items()}, directory / "adapter_model.safetensors")
    return Adapter(directory)


def make_adapter(
    directory: Path, model: TinyModel, targets: tuple[str, ...], *, rank: int = 4, seed: int = 0, **config: Any
) -> Adapter:
    """A random adapter for the modules whose names end in one of `targets`; strong enough to change what the model says."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    patterns = config.get("rank_pattern", {})
    for path, module in model.reference.named_modules():
        if path.split(".")[-1] in targets:
            n_in, n_out = module.weight.shape if type(module).__name__ == "Conv1D" else reversed(module.weight.shape)
            r = next((value for key, value in patterns.items() if re.search(f"{key}$", path)), rank)
            tensors[f"{path}.lora_A.weight"] = torch.randn(r, n_in, generator=generator) * 0.2
            tensors[f"{path}.lora_B.weight"] = torch.randn(n_out, r, generator=generator) * 0.2
    assert tensors
    return write_adapter(directory, tensors, **{"r": rank, "lora_alpha": 2 * rank, **config})
