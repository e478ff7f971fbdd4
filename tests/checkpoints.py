"""Checkpoints for tests: real architectures, random weights, a real tokenizer; a few hundred kilobytes."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

WINDOW = 2048
VOCAB = 400


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE with a chat template in the ChatML manner."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog, hello world, once upon a time"] * 10, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")
    fast.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return fast


def make_checkpoint(path: Path, family: str, *, hidden: int = 64, seed: int = 0, tokenizer: bool = True) -> Path:
    """A safetensors checkpoint of `family` (llama, qwen2, opt, gpt2) in `path`; std 0.1 so that answers vary."""
    torch.manual_seed(seed)
    common = {"vocab_size": VOCAB, "eos_token_id": 1, "bos_token_id": 0, "pad_token_id": 0}
    if family in ("llama", "qwen2"):
        config_class, model_class = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}[family]
        config = config_class(
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=WINDOW,
            initializer_range=0.1,
            **common,
        )
        model = model_class(config)
    elif family == "opt":
        model = OPTForCausalLM(
            OPTConfig(
                hidden_size=hidden,
                ffn_dim=2 * hidden,
                num_hidden_layers=3,
                num_attention_heads=4,
                max_position_embeddings=WINDOW,
                word_embed_proj_dim=hidden,
                init_std=0.1,
                **common,
            )
        )
    else:
        model = GPT2LMHeadModel(
            GPT2Config(n_embd=hidden, n_layer=3, n_head=4, n_positions=WINDOW, initializer_range=0.1, **common)
        )
    model.generation_config.eos_token_id = 1
    model.save_pretrained(path)
    if tokenizer:
        make_tokenizer().save_pretrained(path)
    return path
