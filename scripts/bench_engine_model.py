"""The models of ``bench_engine.py``: real shapes, random weights, made once per shape, dtype and seed."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

from scripts.make_checkpoint import write_tokenizer

#: Architecture, layers, width, heads, KV heads, width of the MLP, vocabulary, whether input and output embeddings are one.
SHAPES: dict[str, tuple[str, int, int, int, int, int, int, bool]] = {
    "tiny": ("llama", 2, 64, 4, 2, 128, 512, False),
    "small": ("llama", 6, 384, 6, 2, 1024, 8000, False),
    "0.12b": ("llama", 12, 768, 12, 4, 2048, 32000, False),
    "0.5b": ("qwen2", 24, 896, 14, 2, 4864, 151936, True),
}
#: Where the data of the weights begin, and so each tensor of a real shape: on a boundary that vector loads like.
_ALIGNMENT = 4096
_NAMES = {"float32": "F32", "bfloat16": "BF16"}


def n_vocab(name: str) -> int:
    return SHAPES[name][6]


def checkpoint(work_dir: Path, name: str, dtype: str, seed: int) -> Path:
    """The directory with the model: ``config.json``, one safetensors file, a tokenizer of bytes. Made if it is not there."""
    directory = work_dir / f"{name}-{dtype}-{seed}"
    if directory.is_dir():
        return directory
    import torch
    import transformers

    config = _config(name, dtype)
    torch.manual_seed(seed)
    # Not `.to(dtype)` afterwards: it would round the rotary frequencies too, which `from_pretrained` does not.
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    config.save_pretrained(partial)
    tensors = dict(model.state_dict())
    if SHAPES[name][-1]:
        del tensors["lm_head.weight"]
    _save(partial / "model.safetensors", tensors)
    write_tokenizer(partial)
    partial.rename(directory)
    return directory


def _config(name: str, dtype: str) -> Any:
    import transformers

    kind, n_layers, width, n_heads, n_kv_heads, mlp, vocabulary, tied = SHAPES[name]
    made, architecture = {
        "llama": (transformers.LlamaConfig, "LlamaForCausalLM"),
        "qwen2": (transformers.Qwen2Config, "Qwen2ForCausalLM"),
    }[kind]
    return made(
        num_hidden_layers=n_layers,
        hidden_size=width,
        num_attention_heads=n_heads,
        num_key_value_heads=n_kv_heads,
        intermediate_size=mlp,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        max_position_embeddings=4096,
        architectures=[architecture],
        # With the usual 0.02 a random model says one token for ever.
        initializer_range=0.1,
        bos_token_id=None,
        # No answer ends early.
        eos_token_id=None,
        dtype=dtype,
    )


def _save(path: Path, tensors: dict[str, Any]) -> None:
    """Safetensors whose data begin on a page: who maps the file, then has tensors that are aligned, whoever it is."""
    import torch

    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, tensor in tensors.items():
        kind = _NAMES[str(tensor.dtype).removeprefix("torch.")]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [position, position + tensor.nbytes]}
        position += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            file.write(tensor.detach().contiguous().view(torch.uint8).numpy().data)


def load_tensors(directory: Path) -> dict[str, Any]:
    """The tensors under their names, mapped: the processes of all contenders share the pages."""
    from safetensors.torch import load_file

    return load_file(directory / "model.safetensors")


def load_transformers(directory: Path, dtype: str, device: str) -> Any:
    """transformers' own model, with its own SDPA attention."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype), attn_implementation="sdpa")
    return model.to(device).eval().requires_grad_(False)
