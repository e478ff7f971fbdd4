"""What a checkpoint says about turning texts into vectors: which model, how its hidden states become one vector, its window.

Read from ``config.json`` and from the files that sentence-transformers puts beside it (``modules.json``,
``1_Pooling/config.json``, ``sentence_bert_config.json``, ``config_sentence_transformers.json``). No torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sllmdask.engine.families import TESTED, inspect_config
from sllmdask.errors import CheckpointCorrupt, UnsupportedArchitecture

#: Encoders by ``model_type``: tokens of their window when ``config.json`` does not say.
ENCODERS: Mapping[str, int] = {
    "albert": 512,
    "bert": 512,
    "camembert": 512,
    "distilbert": 512,
    "electra": 512,
    "modernbert": 8192,
    "mpnet": 512,
    "roberta": 512,
    "xlm-roberta": 512,
}
#: Their attention does not go through transformers' attention interface: inputs of one length run together, without packing.
UNPACKED = frozenset({"mpnet"})
#: Their positions begin after that of the padding token, which takes the first rows of the table of positions.
_PADDED_POSITIONS = frozenset({"camembert", "mpnet", "roberta", "xlm-roberta"})
#: Heads that were trained for another end are no reason to take a model for one that makes embeddings.
_PLAIN_ENDINGS = ("Model", "ForMaskedLM", "ForPreTraining")

#: What sentence-transformers calls a way of pooling, in the order in which it puts several one behind the other; our name for it.
_MODES: Mapping[str, str] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "last",
}
_MODE_NAMES: Mapping[str, str] = {"lasttoken": "last", "mean_sqrt_len_tokens": "mean_sqrt_len"}

#: Where sentence-transformers keeps ``max_seq_length`` and ``do_lower_case``; the name depends on its age.
_TRANSFORMER_CONFIGS = tuple(
    f"sentence_{name}_config.json" for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
#: Their frequencies depend on the longest input of the batch.
_BATCH_DEPENDENT_ROPE = ("dynamic", "longrope")


@dataclass(frozen=True)
class EmbeddingInfo:
    """An embedding model as its files, and its operator, describe it."""

    architecture: str
    model_type: str
    #: Tokens of one input.
    max_model_len: int
    #: Numbers of one vector.
    dimensions: int
    #: ``cls``, ``max``, ``mean``, ``mean_sqrt_len``, ``weightedmean``, ``last``; several are put one behind the other.
    pooling: tuple[str, ...]
    #: Whether vectors have the length 1.
    normalize: bool
    #: Texts that are put in front of an input, by name, and the name of the one that is unless another is asked for.
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    lower_case: bool = False

    @property
    def is_encoder(self) -> bool:
        return self.model_type in ENCODERS

    @property
    def tested(self) -> bool:
        """Whether it is known to run; of a decoder, building its structure without a head tells."""
        return self.is_encoder

    @property
    def packs(self) -> bool:
        """Whether inputs of different lengths run in one batch, without padding."""
        return self.model_type not in UNPACKED

    def as_wire(self) -> dict[str, Any]:
        """Plain msgpack types: what front doors need to know."""
        return {**asdict(self), "pooling": list(self.pooling), "prompts": dict(self.prompts)}


def makes_embeddings(directory: Path, config: Mapping[str, Any]) -> bool:
    """Whether the checkpoint is made for embeddings: by sentence-transformers' files, an encoder, or a model without a head."""
    architecture = str((config.get("architectures") or [""])[0])
    if (directory / "modules.json").is_file():
        return True
    if config.get("model_type") in ENCODERS and not config.get("is_decoder"):
        return architecture.endswith(_PLAIN_ENDINGS)
    return architecture.endswith("Model") and not architecture.endswith("LMHeadModel")


def inspect_embedding(
    directory: Path, config: Mapping[str, Any], pooling: str | None = None, normalize: bool | None = None
) -> EmbeddingInfo:
    """How the model in `directory`, with this ``config.json``, makes embeddings.

    `pooling` and `normalize` go before what the files say. Where nobody says anything, encoders are pooled by ``mean`` (as
    sentence-transformers does) and decoders by ``last``, and vectors are normalised. Raises :class:`UnsupportedArchitecture`
    with the reason, and :class:`CheckpointCorrupt` for a file that makes no sense.
    """
    model_type = str(config.get("model_type", ""))
    architecture = str((config.get("architectures") or [model_type or "unknown"])[0])
    if model_type in ENCODERS:
        window = _encoder_window(architecture, model_type, config)
    else:
        causal = _causal(architecture)
        if causal not in TESTED:
            reason = f"the engine does not know it; embeddings are made by {', '.join(ENCODERS)} and by decoders that are tested"
            raise UnsupportedArchitecture(architecture, reason)
        family = inspect_config({**config, "architectures": [causal]})
        # Beyond, the frequencies of an input would depend on what else is in the batch.
        window = min(family.max_model_len, family.long_after or family.max_model_len)
        if config.get("use_bidirectional_attention"):
            raise UnsupportedArchitecture(architecture, "its sliding windows look both ways, which the engine does not do")
    modules = _modules(directory, architecture)
    modes: tuple[str, ...] = ("mean" if model_type in ENCODERS else "last",)
    include_prompt = True
    if pooling is not None:
        modes = (pooling,)
    elif "Pooling" in modules:
        modes, include_prompt = _pooling(directory / modules["Pooling"] / "config.json")
    transformer = next((found for name in _TRANSFORMER_CONFIGS if (found := _read(directory / name))), {})
    prompts = _read(directory / "config_sentence_transformers.json")
    texts = {str(name): str(text) for name, text in (prompts.get("prompts") or {}).items() if text}
    if texts and not include_prompt:
        reason = "1_Pooling/config.json leaves its prompts out of the mean (include_prompt), which the engine does not do"
        raise UnsupportedArchitecture(architecture, reason)
    default = prompts.get("default_prompt_name")
    return EmbeddingInfo(
        architecture=architecture,
        model_type=model_type,
        max_model_len=min(window, int(transformer.get("max_seq_length") or window)),
        dimensions=int(config.get("hidden_size") or config.get("dim") or config.get("n_embd") or 0) * len(modes),
        pooling=modes,
        normalize=(not modules or "Normalize" in modules) if normalize is None else normalize,
        prompts=texts,
        default_prompt=default if default in texts else None,
        lower_case=bool(transformer.get("do_lower_case")),
    )


def _causal(architecture: str) -> str:
    """The name of the class with a head: the engine knows decoders by those."""
    stem = architecture.removesuffix("Model")
    candidates = (architecture, f"{stem}ForCausalLM", f"{stem}LMHeadModel")
    return next((name for name in candidates if name in TESTED), architecture)


def _encoder_window(architecture: str, model_type: str, config: Mapping[str, Any]) -> int:
    if config.get("is_decoder") or config.get("add_cross_attention"):
        raise UnsupportedArchitecture(architecture, "config.json makes a decoder of this encoder (is_decoder)")
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown")
        raise UnsupportedArchitecture(architecture, f"its weights are quantized ({method}); deploy the unquantized model")
    rope = json.dumps([config.get("rope_parameters"), config.get("rope_scaling")])
    if (kind := next((kind for kind in _BATCH_DEPENDENT_ROPE if f'"{kind}"' in rope), None)) is not None:
        raise UnsupportedArchitecture(architecture, f"its {kind!r} rotary embedding depends on what else is in the batch")
    if config.get("position_embedding_type", "absolute") not in ("absolute", "rope", "rotary"):
        kind = config["position_embedding_type"]
        raise UnsupportedArchitecture(architecture, f"its positions are {kind!r}, which transformers does not compute any more")
    first = int(config.get("pad_token_id", 1) or 0) + 1 if model_type in _PADDED_POSITIONS else 0
    return int(config.get("max_position_embeddings") or ENCODERS[model_type] + first) - first


def _modules(directory: Path, architecture: str) -> dict[str, str]:
    """The modules that sentence-transformers runs one after the other, and the folder of each; empty without ``modules.json``."""
    path = directory / "modules.json"
    if not path.is_file():
        return {}
    listed = _parse(path)
    if not isinstance(listed, list) or not all(isinstance(module, dict) and module.get("type") for module in listed):
        raise CheckpointCorrupt(path.name, None, "it must hold a list of modules, each with a type and a path")
    modules = {str(module["type"]).rpartition(".")[2]: str(module.get("path", "")) for module in listed}
    for name, folder in modules.items():
        if name not in ("Transformer", "Pooling", "Normalize"):
            reason = (
                f"modules.json puts a {name!r} behind the model; Transformer, Pooling and Normalize are what the engine knows"
            )
            raise UnsupportedArchitecture(architecture, reason)
        if name == "Transformer" and folder not in ("", "."):
            reason = f"modules.json has its weights in {folder!r}; only those beside config.json are read"
            raise UnsupportedArchitecture(architecture, reason)
        if ".." in Path(folder).parts or Path(folder).is_absolute():
            raise CheckpointCorrupt(path.name, None, f"{folder!r} is not a folder of the checkpoint")
    return modules


def _pooling(path: Path) -> tuple[tuple[str, ...], bool]:
    """The modes of ``1_Pooling/config.json``, and whether a prompt's tokens are pooled as well."""
    config = _read(path)
    modes = tuple(mode for key, mode in _MODES.items() if config.get(key))
    if not modes and isinstance(config.get("pooling_mode"), str):
        named = str(config["pooling_mode"])
        modes = (_MODE_NAMES.get(named, named),)
    if not modes or not set(modes) <= set(_MODES.values()):
        raise CheckpointCorrupt(_shown(path), None, f"it names no way of pooling ({', '.join(_MODES)})")
    return modes, bool(config.get("include_prompt", True))


def _read(path: Path) -> dict[str, Any]:
    """The object in a file; empty where there is none."""
    data = _parse(path) if path.is_file() else {}
    if not isinstance(data, dict):
        raise CheckpointCorrupt(_shown(path), None, "it must hold a JSON object")
    return data


def _shown(path: Path) -> str:
    """As the file is known: pooling has a folder of its own."""
    return f"{path.parent.name}/{path.name}" if path.name == "config.json" else path.name


def _parse(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointCorrupt(_shown(path), None, f"it is not readable JSON ({error})") from None
