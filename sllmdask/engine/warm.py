"""What a process does once, before its first model, so that no load pays for it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence as Seq
from pathlib import Path

import torch

from sllmdask.batching.params import SamplingParams
from sllmdask.batching.sequence import Sequence
from sllmdask.config import EngineSettings
from sllmdask.engine.construct import build_skeleton
from sllmdask.engine.engine import build_engine

#: As small as the modelling code allows.
_TINY = {
    "vocab_size": 32,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "eos_token_id": None,
}


def warm_up(
    device: str = "auto",
    architectures: Seq[tuple[str, str]] = (("Qwen2ForCausalLM", "qwen2"), ("LlamaForCausalLM", "llama")),
) -> None:
    """Import the modelling code of `architectures` (class, model type), and answer one request with a tiny model of each.

    Takes seconds the first time: transformers' lazy imports, torch's first dispatches, the matrix libraries. Leaves torch's
    settings and random numbers as they are. Raises :class:`ConfigError` if there is no such device.
    """
    for architecture, model_type in architectures:
        config = {**_TINY, "architectures": [architecture], "model_type": model_type}
        with tempfile.TemporaryDirectory(prefix="sllmdask-warm-up-") as name:
            directory = Path(name)
            (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
            for dtype in (torch.bfloat16, torch.float32):
                skeleton = build_skeleton(directory, config)
                tensors = {
                    name: torch.linspace(-0.1, 0.1, parameter.numel()).sin().to(dtype).view(parameter.shape)
                    for name, parameter in skeleton.model.state_dict().items()
                }
                settings = EngineSettings.model_validate({"device": device, "kv_memory": 2**20})
                engine = build_engine(directory, tensors, settings, skeleton=skeleton)
                # More tokens than a block, then one alone: prefill and decode run different code.
                params = SamplingParams(max_tokens=2, temperature=1.0, seed=0, ignore_eos=True)
                engine.add(Sequence("warm-up", [token % 32 for token in range(24)], params))
                while engine.has_work:
                    engine.step()
                engine.close()
