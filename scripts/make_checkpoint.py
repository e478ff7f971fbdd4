#!/usr/bin/env python
"""A checkpoint with the shapes of a real model and random weights: sharded bfloat16 safetensors, configuration, tokenizer.

The bytes are like those of trained weights where a loader or a compressor could tell: each tensor has its own scale, each row
of a matrix another, so that bfloat16's exponents carry about 2.6 bits, as they do in trained models (DFloat11,
arXiv:2504.11651), and mantissas are uniform. Every tensor has its own seed, so the same arguments give the same bytes.

    python scripts/make_checkpoint.py --shape qwen2.5-0.5b ./qwen2.5-0.5b
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: Spread of the rows' scales: standard deviation of their logarithm.
ROW_SPREAD = 0.25
#: Elements drawn at a time, so that memory is one shard and little more.
DRAW = 16 * 1024**2
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder-only model: `n_heads` and `n_kv_heads` heads of `head_dim` each; `tied` input and output embeddings."""

    model_type: str
    hidden: int
    mlp: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    n_vocab: int
    tied: bool
    qkv_bias: bool

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...], float]]:
        """Name, shape and typical scale of each tensor, in the order of the forward pass. Scale 0 is a norm: about one."""
        queries, keys = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        yield "model.embed_tokens.weight", (self.n_vocab, self.hidden), 0.015
        for layer in range(self.n_layers):
            at = f"model.layers.{layer}."
            yield at + "input_layernorm.weight", (self.hidden,), 0.0
            for name, rows, scale, bias_scale in (("q", queries, 0.03, 2.0), ("k", keys, 0.04, 8.0), ("v", keys, 0.02, 0.1)):
                yield f"{at}self_attn.{name}_proj.weight", (rows, self.hidden), scale
                if self.qkv_bias:
                    yield f"{at}self_attn.{name}_proj.bias", (rows,), bias_scale
            yield at + "self_attn.o_proj.weight", (self.hidden, queries), 0.02
            yield at + "post_attention_layernorm.weight", (self.hidden,), 0.0
            yield at + "mlp.gate_proj.weight", (self.mlp, self.hidden), 0.02
            yield at + "mlp.up_proj.weight", (self.mlp, self.hidden), 0.018
            yield at + "mlp.down_proj.weight", (self.hidden, self.mlp), 0.018
        yield "model.norm.weight", (self.hidden,), 0.0
        if not self.tied:
            yield "lm_head.weight", (self.n_vocab, self.hidden), 0.015

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors in bfloat16."""
        return sum(2 * math.prod(shape) for _, shape, _ in self.tensors())

    def config(self) -> dict[str, Any]:
        """``config.json``."""
        return {
            "architectures": [{"qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}[self.model_type]],
            "model_type": self.model_type,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": self.mlp,
            "num_hidden_layers": self.n_layers,
            "num_attention_heads": self.n_heads,
            "num_key_value_heads": self.n_kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.n_vocab,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e6,
            "tie_word_embeddings": self.tied,
            "torch_dtype": "bfloat16",
            "bos_token_id": 256,
            "eos_token_id": 258,
        }


#: Sizes of published models, except the first two. 0.01, 0.1, 1.0, 3.1, 2.5 and 15.2 GB.
SHAPES = {
    "tiny": Shape("qwen2", 256, 704, 4, 4, 2, 64, 8192, tied=True, qkv_bias=True),
    "small": Shape("qwen2", 384, 1024, 24, 6, 2, 64, 32000, tied=True, qkv_bias=True),
    "qwen2.5-0.5b": Shape("qwen2", 896, 4864, 24, 14, 2, 64, 151936, tied=True, qkv_bias=True),
    "qwen2.5-1.5b": Shape("qwen2", 1536, 8960, 28, 12, 2, 128, 151936, tied=True, qkv_bias=True),
    "llama-3.2-1b": Shape("llama", 2048, 8192, 16, 32, 8, 64, 128256, tied=True, qkv_bias=False),
    "qwen2.5-7b": Shape("qwen2", 3584, 18944, 28, 28, 4, 128, 152064, tied=False, qkv_bias=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="must not exist yet")
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-0.5b")
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.shards < 1:
        parser.error("--shards must be at least 1")
    if args.directory.exists():
        parser.error(f"{args.directory} exists already")
    make_checkpoint(args.directory, SHAPES[args.shape], args.shards, args.seed, _show)


def _show(done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{done / 1e9:.2f} of {total / 1e9:.2f} GB", end="\n" if done == total else "", file=sys.stderr, flush=True)


def make_checkpoint(
    directory: Path, shape: Shape, n_shards: int, seed: int, on_progress: Callable[[int, int], None] | None = None
) -> None:
    """Write the checkpoint; `directory` appears when all of it is on the disk. `on_progress` hears bytes made and in all."""
    from safetensors.torch import save_file

    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    shards = _shards(shape, n_shards)
    weight_map, done = {}, 0
    for number, names in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {}
        for name, size, scale in names:
            tensors[name] = _weights(name, size, scale, seed)
            weight_map[name] = file
            done += tensors[name].nbytes
            if on_progress is not None:
                on_progress(done, shape.nbytes)
        save_file(tensors, partial / file, metadata={"format": "pt"})
    if len(shards) > 1:
        _write_json(
            partial / "model.safetensors.index.json", {"metadata": {"total_size": shape.nbytes}, "weight_map": weight_map}
        )
    _write_json(partial / "config.json", shape.config())
    write_tokenizer(partial)
    for path in partial.iterdir():
        with path.open("rb") as file_on_disk:
            os.fsync(file_on_disk.fileno())
    partial.rename(directory)


def _shards(shape: Shape, n_shards: int) -> list[list[tuple[str, tuple[int, ...], float]]]:
    """The tensors in `n_shards` runs of about the same bytes (fewer runs if there are fewer tensors)."""
    shards: list[list[tuple[str, tuple[int, ...], float]]] = [[]]
    taken = 0
    for tensor in shape.tensors():
        if shards[-1] and taken >= shape.nbytes * len(shards) / n_shards:
            shards.append([])
        shards[-1].append(tensor)
        taken += 2 * math.prod(tensor[1])
    return shards


def _weights(name: str, shape: tuple[int, ...], scale: float, seed: int) -> Any:
    """A bfloat16 tensor. Norms lie around one, all else around zero."""
    import numpy as np
    import torch

    rng = np.random.Generator(np.random.SFC64([seed, zlib.crc32(name.encode())]))
    if len(shape) == 1:
        centre, scale = (1.0, 0.2) if not scale else (0.0, scale)
        return torch.from_numpy(centre + scale * rng.standard_normal(shape, dtype=np.float32)).to(torch.bfloat16)
    n_rows, n_columns = shape
    tensor = torch.empty(shape, dtype=torch.bfloat16)
    step = max(DRAW // n_columns, 1)
    for row in range(0, n_rows, step):
        n = min(step, n_rows - row)
        values = rng.standard_normal((n, n_columns), dtype=np.float32)
        values *= (scale * rng.lognormal(0.0, ROW_SPREAD, (n, 1))).astype(np.float32)
        tensor[row : row + n] = torch.from_numpy(values)
    return tensor


def write_tokenizer(directory: Path) -> None:
    """A tokenizer of the 256 bytes and three special tokens, with a chat template: enough to serve the model."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: number for number, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.save(str(directory / "tokenizer.json"))
    _write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": special[0],
            "eos_token": special[2],
            "pad_token": special[0],
            "model_max_length": 32768,
            "chat_template": CHAT_TEMPLATE,
        },
    )


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
