"""Which transformers architectures the engine runs, and why it refuses the others. Reads ``config.json``; no torch.

A causal language model of transformers is tried whether it is listed here or not: what can be run is found out when its
structure is built (:mod:`sllmdask.engine.construct`), and what it computes is compared with transformers' own before the first
token. An architecture is listed as tested only after its tokens were compared with those of ``model.generate()``
(``tests/engine/test_exactness.py``).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from sllmdask.batching.params import SamplingParams
from sllmdask.errors import CheckpointCorrupt, CheckpointNotFound, InvalidRequest, UnsupportedArchitecture

#: Architecture -> tokens of its window when ``config.json`` does not say.
TESTED: Mapping[str, int] = {
    "BloomForCausalLM": 2048,
    "CodeGenForCausalLM": 2048,
    "Cohere2ForCausalLM": 8192,
    "CohereForCausalLM": 8192,
    "DeepseekV2ForCausalLM": 2048,
    "DeepseekV3ForCausalLM": 4096,
    "Exaone4ForCausalLM": 2048,
    "FalconForCausalLM": 2048,
    "GPT2LMHeadModel": 1024,
    "GPTBigCodeForCausalLM": 1024,
    "GPTJForCausalLM": 2048,
    "GPTNeoForCausalLM": 2048,
    "GPTNeoXForCausalLM": 2048,
    "Gemma2ForCausalLM": 8192,
    "Gemma3ForCausalLM": 131072,
    "GemmaForCausalLM": 8192,
    "Glm4ForCausalLM": 131072,
    "Glm4MoeForCausalLM": 131072,
    "GlmForCausalLM": 131072,
    "GptOssForCausalLM": 131072,
    "GraniteForCausalLM": 2048,
    "GraniteMoeForCausalLM": 2048,
    "HeliumForCausalLM": 4096,
    "HunYuanDenseV1ForCausalLM": 2048,
    "LlamaForCausalLM": 2048,
    "MiniMaxM2ForCausalLM": 196608,
    "MinistralForCausalLM": 131072,
    "MistralForCausalLM": 131072,
    "MixtralForCausalLM": 131072,
    "MptForCausalLM": 2048,
    "NemotronForCausalLM": 4096,
    "OPTForCausalLM": 2048,
    "Olmo2ForCausalLM": 2048,
    "Olmo3ForCausalLM": 2048,
    "OlmoForCausalLM": 2048,
    "OlmoeForCausalLM": 4096,
    "Phi3ForCausalLM": 4096,
    "PhiForCausalLM": 2048,
    "Qwen2ForCausalLM": 32768,
    "Qwen2MoeForCausalLM": 32768,
    "Qwen3ForCausalLM": 32768,
    "Qwen3MoeForCausalLM": 32768,
    "SmolLM3ForCausalLM": 32768,
    "StableLmForCausalLM": 4096,
    "Starcoder2ForCausalLM": 4096,
}

RECURRENT = "it keeps a recurrent state, which is not a KV cache and cannot be paged"
_ENCODER = "it is an encoder: it does not generate text"
_ENCODER_DECODER = "it is an encoder-decoder; only decoder-only models run"
_MULTIMODAL = "it takes images or audio; only text models run"

_REFUSED: Mapping[str, str] = {
    "BambaForCausalLM": RECURRENT,
    "BartForConditionalGeneration": _ENCODER_DECODER,
    "BertModel": _ENCODER,
    "FalconMambaForCausalLM": RECURRENT,
    "JambaForCausalLM": RECURRENT,
    "Mamba2ForCausalLM": RECURRENT,
    "MambaForCausalLM": RECURRENT,
    "RecurrentGemmaForCausalLM": RECURRENT,
    "RwkvForCausalLM": RECURRENT,
    "T5ForConditionalGeneration": _ENCODER_DECODER,
}

#: What the reason is when only the end of the class name is known.
_REFUSED_ENDINGS: Mapping[str, str] = {
    "ForConditionalGeneration": "it is an encoder-decoder, or takes images or audio; only text models with a decoder alone run",
    "ForMaskedLM": _ENCODER,
    "ForQuestionAnswering": _ENCODER,
    "ForSequenceClassification": _ENCODER,
    "ForTokenClassification": _ENCODER,
}

#: Quantized weights that are written out in the dtype that is served while they are loaded.
_DEQUANTIZED = {("GptOssForCausalLM", "mxfp4")}

#: What of ``generation_config.json`` is the default of a request.
_SAMPLING_DEFAULTS = {"min_p", "repetition_penalty", "temperature", "top_k", "top_p"}

#: How transformers names causal language models.
_CAUSAL_ENDINGS = ("ForCausalLM", "LMHeadModel")

_OTHER_INPUTS = ("audio_config", "image_config", "speech_config", "vision_config")

_WINDOW_KEYS = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length", "n_ctx")

#: Where neither ``config.json`` nor the model's class tells the window.
_UNSTATED_WINDOW = 2048

#: Rotary embeddings whose frequencies depend on how long the longest sequence is that they are computed for.
ROPE_BY_LENGTH = ("dynamic", "longrope")


@dataclass(frozen=True)
class FamilyInfo:
    """What ``config.json`` says about a model that the engine runs, or tries to."""

    architecture: str
    model_type: str
    #: Tokens, prompt and answer.
    max_model_len: int
    vocab_size: int
    #: As written there, ``"bfloat16"``; ``None`` if it does not say.
    dtype: str | None
    eos_token_ids: frozenset[int]
    #: Whether its tokens have been compared with those of ``generate()``.
    tested: bool = True
    #: A sequence with more tokens than these has other rotary frequencies, from its first token on; ``None`` for most models.
    long_after: int | None = None


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


def read_sampling_defaults(checkpoint_dir: Path) -> dict[str, Any]:
    """How ``generation_config.json`` says that tokens are to be drawn where a request does not, by our names of parameters.

    Raises :class:`CheckpointCorrupt` if a value makes no sense.
    """
    path = checkpoint_dir / "generation_config.json"
    generation = _read_object(path) if path.is_file() else {}
    known = {field.name for field in fields(SamplingParams)} & _SAMPLING_DEFAULTS
    defaults = {name: generation[name] for name in sorted(known) if generation.get(name) is not None}
    try:
        SamplingParams(**defaults)
    except (InvalidRequest, TypeError) as error:
        reason = error.message if isinstance(error, InvalidRequest) else str(error)
        raise CheckpointCorrupt(path.name, None, f"its defaults cannot be sampled with: {reason}") from None
    return defaults


def inspect_config(config: Mapping[str, Any]) -> FamilyInfo:
    """What the engine needs to know of a model. Raises :class:`UnsupportedArchitecture`, with the reason.

    Of an architecture that is not :attr:`~FamilyInfo.tested`, building its structure tells whether it can be run.
    """
    architecture = _architecture(config)
    if architecture not in TESTED:
        _refuse_unless_causal(architecture, config)
    quantization = config.get("quantization_config")
    method = quantization.get("quant_method", "unknown") if quantization else None
    if method is not None and (architecture, method) not in _DEQUANTIZED:
        raise UnsupportedArchitecture(architecture, f"its weights are quantized ({method}); deploy the unquantized model")
    window = stated_window(config) or TESTED.get(architecture, _UNSTATED_WINDOW)
    # A dynamic rotary embedding is a plain one inside the window, and only there is the model run.
    long_after = None
    for rope in _ropes(config):
        original = rope.get("original_max_position_embeddings") or config.get("original_max_position_embeddings") or window
        if (rope.get("rope_type") or rope.get("type")) == "longrope" and original < window:
            long_after = int(original)
    dtype = config.get("dtype") or config.get("torch_dtype")
    return FamilyInfo(
        architecture=architecture,
        model_type=str(config.get("model_type", "")),
        max_model_len=window,
        vocab_size=int(config.get("vocab_size") or 0),
        dtype=str(dtype).removeprefix("torch.") if dtype else None,
        eos_token_ids=_token_ids(config.get("eos_token_id")),
        tested=architecture in TESTED,
        long_after=long_after,
    )


def stated_window(config: Mapping[str, Any]) -> int | None:
    """Tokens that a configuration says the model was made for, prompt and answer; ``None`` if it does not say."""
    return next((int(config[key]) for key in _WINDOW_KEYS if config.get(key)), None)


def _refuse_unless_causal(architecture: str, config: Mapping[str, Any]) -> None:
    endings = (reason for ending, reason in _REFUSED_ENDINGS.items() if architecture.endswith(ending))
    reason = _REFUSED.get(architecture) or next(endings, None)
    if reason is None and config.get("is_encoder_decoder"):
        reason = _ENCODER_DECODER
    if reason is None and any(config.get(key) for key in _OTHER_INPUTS):
        reason = _MULTIMODAL
    if reason is None and not architecture.endswith(_CAUSAL_ENDINGS):
        reason = f"it is not a causal language model, whose class would end in {' or '.join(_CAUSAL_ENDINGS)}"
    if reason is not None:
        raise UnsupportedArchitecture(architecture, reason)


def _architecture(config: Mapping[str, Any]) -> str:
    named = config.get("architectures") or []
    if not named:
        raise UnsupportedArchitecture(
            str(config.get("model_type", "unknown")), "config.json names no class under 'architectures'"
        )
    return next((name for name in named if name in TESTED), str(named[0]))


def _ropes(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """What is said of rotary embeddings: once, or once for each type of layer."""
    rope = config.get("rope_parameters") or config.get("rope_scaling")
    if isinstance(rope, Mapping):
        yield from (each for each in (rope, *rope.values()) if isinstance(each, Mapping))


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
