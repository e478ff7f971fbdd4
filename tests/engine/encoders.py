"""Tiny random embedding models, and the vectors that plain transformers makes with them, one input at a time: the oracle."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from sllmdask.config import EngineSettings
from sllmdask.engine.embedding import EmbeddingEngine, EmbeddingOutput, build_embedding_engine, embedding_sequence
from tests.engine.models import VOCAB, settings

_BERT = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 130,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
_DECODER = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 130,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}

#: Name -> (class that is saved, what differs from the class's defaults).
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "albert": ("AlbertModel", {**_BERT, "embedding_size": 32}),
    "bert": ("BertModel", _BERT),
    "bert-mlm": ("BertForMaskedLM", _BERT),
    "camembert": ("CamembertModel", {**_BERT, "pad_token_id": 1}),
    "distilbert": (
        "DistilBertModel",
        {"vocab_size": VOCAB, "dim": 64, "n_layers": 3, "n_heads": 4, "hidden_dim": 96, "max_position_embeddings": 130},
    ),
    "electra": ("ElectraModel", {**_BERT, "embedding_size": 32}),
    "modernbert": (
        "ModernBertModel",
        {**_BERT, "num_hidden_layers": 4, "local_attention": 16, "global_attn_every_n_layers": 3, "pad_token_id": 0},
    ),
    "mpnet": ("MPNetModel", _BERT),
    "roberta": ("RobertaModel", {**_BERT, "pad_token_id": 1}),
    "xlm-roberta": ("XLMRobertaModel", {**_BERT, "pad_token_id": 1}),
    "llama": ("LlamaModel", _DECODER),
    "mistral": ("MistralModel", {**_DECODER, "sliding_window": 24}),
    "qwen2": ("Qwen2ForCausalLM", {**_DECODER, "tie_word_embeddings": True}),
    "qwen2-both-ways": ("Qwen2Model", {**_DECODER, "is_causal": False}),
    "qwen3": ("Qwen3ForCausalLM", {**_DECODER, "head_dim": 16}),
}
DECODERS = frozenset({"llama", "mistral", "qwen2", "qwen2-both-ways", "qwen3"})


@dataclass(frozen=True)
class TinyEncoder:
    """A checkpoint, its tensors, and transformers' own model over them, without a head."""

    directory: Path
    tensors: dict[str, torch.Tensor]
    reference: Any

    def states(self, ids: list[int]) -> torch.Tensor:
        """(T, H): what plain transformers makes of one input, alone."""
        with torch.inference_mode():
            tokens = torch.tensor([ids])
            return self.reference(input_ids=tokens, attention_mask=torch.ones_like(tokens)).last_hidden_state[0].float()


def make_encoder(directory: Path, name: str, dtype: torch.dtype = torch.float32, seed: int = 0, **config: Any) -> TinyEncoder:
    """Save the tiny model of that name as transformers does."""
    architecture, given = CONFIGS[name]
    model_class = getattr(transformers, architecture)
    model_config = model_class.config_class(**{**given, **config})
    torch.manual_seed(seed)
    model = model_class._from_config(model_config, attn_implementation="eager", dtype=dtype).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            is_norm = parameter.dim() == 1 and key.endswith("weight")
            parameter.normal_(1.0 if is_norm else 0.0, 0.3 if parameter.dim() == 2 else 0.1)
    model.save_pretrained(directory)
    from safetensors.torch import load_file

    reference = getattr(model, model.base_model_prefix, model)
    return TinyEncoder(directory, load_file(directory / "model.safetensors"), reference)


def add_sentence_transformers_files(
    directory: Path, *modes: str, normalize: bool = True, max_seq_length: int | None = None, **more: Any
) -> None:
    """``modules.json`` and what it names, as sentence-transformers saves them; `modes` as in ``pooling_mode_*``."""
    types = ["Transformer", "Pooling", *(["Normalize"] if normalize else [])]
    paths = ["", "1_Pooling", "2_Normalize"]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(zip(types, paths, strict=False))
    ]
    (directory / "modules.json").write_text(json.dumps(modules))
    (directory / "1_Pooling").mkdir(exist_ok=True)
    names = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
    pooling = {f"pooling_mode_{name}": name in modes for name in names}
    (directory / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 64, **pooling, **more}))
    if max_seq_length is not None:
        (directory / "sentence_bert_config.json").write_text(
            json.dumps({"max_seq_length": max_seq_length, "do_lower_case": False})
        )


def pooled(states: torch.Tensor, mode: str) -> torch.Tensor:
    """The definitions of sentence-transformers, over one input without padding, in float64."""
    states = states.double()
    length = len(states)
    match mode:
        case "cls_token":
            return states[0]
        case "lasttoken":
            return states[length - 1]
        case "max_tokens":
            return torch.stack([max(column) for column in states.T.unbind()])
        case "mean_tokens":
            return sum(states.unbind()) / length
        case "mean_sqrt_len_tokens":
            return sum(states.unbind()) / math.sqrt(length)
        case _:
            return sum((i + 1) * state for i, state in enumerate(states.unbind())) / (length * (length + 1) / 2)


def make_embedder(
    model: TinyEncoder, pooling: str | None = None, normalize: bool | None = None, **changes: Any
) -> EmbeddingEngine:
    given: EngineSettings = settings(**changes)
    return build_embedding_engine(model.directory, model.tensors, given, pooling=pooling, normalize=normalize)


def embed(engine: EmbeddingEngine, inputs: list[list[int]], dimensions: int | None = None) -> list[torch.Tensor]:
    """The vectors of `inputs`, all handed in at once."""
    for i, ids in enumerate(inputs):
        engine.add(embedding_sequence(str(i), list(ids), dimensions))
    found: dict[str, torch.Tensor] = {}
    while engine.has_work:
        for output in engine.step():
            assert isinstance(output, EmbeddingOutput), output
            assert output.request_id not in found
            found[output.request_id] = torch.frombuffer(bytearray(output.vector), dtype=torch.float32)
    return [found[str(i)] for i in range(len(inputs))]
