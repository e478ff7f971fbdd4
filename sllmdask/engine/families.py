"""Which transformers architectures the engine runs, and why it refuses the others. Reads ``config.json``; no torch.

An architecture is listed only after its tokens were compared with ``model.generate()`` (``tests/engine/test_exactness.py``).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sllmdask.errors import CheckpointCorrupt, CheckpointNotFound, UnsupportedArchitecture

#: Architecture -> tokens of its window when ``config.json`` does not say.
SUPPORTED: Mapping[str, int] = {
    "CohereForCausalLM": 8192,
    "GPT2LMHeadModel": 1024,
    "GPTBigCodeForCausalLM": 1024,
    "GPTNeoXForCausalLM": 2048,
    "Gemma2ForCausalLM": 8192,
    "Gemma3ForCausalLM": 131072,
    "GemmaForCausalLM": 8192,
    "Glm4ForCausalLM": 131072,
    "GlmForCausalLM": 131072,
    "GraniteForCausalLM": 2048,
    "HeliumForCausalLM": 4096,
    "LlamaForCausalLM": 2048,
    "MistralForCausalLM": 131072,
    "OPTForCausalLM": 2048,
    "Olmo2ForCausalLM": 2048,
    "OlmoForCausalLM": 2048,
    "Phi3ForCausalLM": 4096,
    "PhiForCausalLM": 2048,
    "Qwen2ForCausalLM": 32768,
    "Qwen3ForCausalLM": 32768,
    "SmolLM3ForCausalLM": 32768,
    "StableLmForCausalLM": 4096,
    "Starcoder2ForCausalLM": 4096,
}

_OWN_ATTENTION = "its attention does not go through transformers' attention interface, where the paged KV cache is plugged in"
_ALIBI = f"it uses ALiBi position biases, and {_OWN_ATTENTION}"
_STATE = "it keeps a recurrent state, which is not a KV cache and cannot be paged"
_EXPERTS = "it is a mixture of experts, whose weights must be fused after they are read; the engine takes them as they are stored"
_ENCODER = "it is an encoder: it does not generate text"
_ENCODER_DECODER = "it is an encoder-decoder; only decoder-only models run"

_REFUSED: Mapping[str, str] = {
    "BambaForCausalLM": _STATE,
    "BartForConditionalGeneration": _ENCODER_DECODER,
    "BertModel": _ENCODER,
    "BloomForCausalLM": _ALIBI,
    "CodeGenForCausalLM": _OWN_ATTENTION,
    "DeepseekV3ForCausalLM": _EXPERTS,
    "FalconForCausalLM": _ALIBI,
    "FalconMambaForCausalLM": _STATE,
    "GPTJForCausalLM": _OWN_ATTENTION,
    "GPTNeoForCausalLM": _OWN_ATTENTION,
    "GptOssForCausalLM": _EXPERTS,
    "JambaForCausalLM": _STATE,
    "Mamba2ForCausalLM": _STATE,
    "MambaForCausalLM": _STATE,
    "MixtralForCausalLM": _EXPERTS,
    "MptForCausalLM": _ALIBI,
    "OlmoeForCausalLM": _EXPERTS,
    "Qwen2MoeForCausalLM": _EXPERTS,
    "Qwen3MoeForCausalLM": _EXPERTS,
    "RecurrentGemmaForCausalLM": _STATE,
    "RwkvForCausalLM": _STATE,
    "T5ForConditionalGeneration": _ENCODER_DECODER,
}

#: What the reason is when only the end of the class name is known.
_REFUSED_ENDINGS: Mapping[str, str] = {
    "ForConditionalGeneration": "it is an encoder-decoder, or takes images or audio; only text models with a decoder alone run",
    "ForMaskedLM": _ENCODER,
    "ForQuestionAnswering": _ENCODER,
    "ForSequenceClassification": _ENCODER,
    "ForTokenClassification": _ENCODER,
    "MoeForCausalLM": _EXPERTS,
}

_WINDOW_KEYS = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length", "n_ctx")

#: Their frequencies depend on the longest sequence of the batch, so one request would change another's result.
_BATCH_DEPENDENT_ROPE = ("dynamic", "longrope")


@dataclass(frozen=True)
class FamilyInfo:
    """What ``config.json`` says about a model that the engine runs."""

    architecture: str
    model_type: str
    #: Tokens, prompt and answer.
    max_model_len: int
    vocab_size: int
    #: As written there, ``"bfloat16"``; ``None`` if it does not say.
    dtype: str | None
    eos_token_ids: frozenset[int]


def read_config(checkpoint_dir: Path) -> dict[str, Any]:
    """The model's ``config.json``. Raises :class:`CheckpointNotFound` or :class:`CheckpointCorrupt`."""
    path = checkpoint_dir / "config.json"
    if not path.is_file():
        raise CheckpointNotFound(str(checkpoint_dir), "it has no config.json")
    return _read_object(path)


def read_eos_token_ids(checkpoint_dir: Path, config: Mapping[str, Any]) -> frozenset[int]:
    """The ids that end an answer: what ``config.json`` or ``generation_config.json`` names, one or several."""
    path = checkpoint_dir / "generation_config.json"
    generation = _read_object(path) if path.is_file() else {}
    return _token_ids(config.get("eos_token_id")) | _token_ids(generation.get("eos_token_id"))


def inspect_config(config: Mapping[str, Any]) -> FamilyInfo:
    """What the engine needs to know of a model. Raises :class:`UnsupportedArchitecture`, with the reason."""
    architecture = _architecture(config)
    if architecture not in SUPPORTED:
        endings = (reason for ending, reason in _REFUSED_ENDINGS.items() if architecture.endswith(ending))
        unknown = f"the engine does not know it; it runs {', '.join(sorted(SUPPORTED))}"
        raise UnsupportedArchitecture(architecture, _REFUSED.get(architecture) or next(endings, unknown))
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown")
        raise UnsupportedArchitecture(architecture, f"its weights are quantized ({method}); deploy the unquantized model")
    if (rope := _rope_type(config)) in _BATCH_DEPENDENT_ROPE:
        raise UnsupportedArchitecture(architecture, f"its {rope!r} rotary embedding depends on what else is in the batch")
    window = next((config[key] for key in _WINDOW_KEYS if config.get(key)), SUPPORTED[architecture])
    dtype = config.get("dtype") or config.get("torch_dtype")
    return FamilyInfo(
        architecture=architecture,
        model_type=str(config.get("model_type", "")),
        max_model_len=int(window),
        vocab_size=int(config.get("vocab_size", 0)),
        dtype=str(dtype).removeprefix("torch.") if dtype else None,
        eos_token_ids=_token_ids(config.get("eos_token_id")),
    )


def _architecture(config: Mapping[str, Any]) -> str:
    named = config.get("architectures") or []
    if not named:
        raise UnsupportedArchitecture(
            str(config.get("model_type", "unknown")), "config.json names no class under 'architectures'"
        )
    return next((name for name in named if name in SUPPORTED), str(named[0]))


def _rope_type(config: Mapping[str, Any]) -> str | None:
    rope = config.get("rope_parameters") or config.get("rope_scaling")
    return (rope.get("rope_type") or rope.get("type")) if isinstance(rope, Mapping) else None


def _token_ids(value: int | Iterable[int] | None) -> frozenset[int]:
    if value is None:
        return frozenset()
    return frozenset([value]) if isinstance(value, int) else frozenset(value)


def _read_object(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointCorrupt(path.name, None, f"it is not readable JSON ({error})") from None
    if not isinstance(data, dict):
        raise CheckpointCorrupt(path.name, None, "it must hold a JSON object")
    return data
