"""Tiny random models, and the tokens that transformers generates with them: the oracle of the engine's tests.

The weights are larger than transformers' initial ones: with those a random model repeats one token for ever.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from sllmdask.batching.params import SamplingParams
from sllmdask.batching.sequence import Sequence
from sllmdask.config import EngineSettings
from sllmdask.engine.construct import build_skeleton
from sllmdask.engine.engine import LLMEngine, StepOutput, build_engine

VOCAB = 300
_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_GROUPED = {**_COMMON, "num_key_value_heads": 2}

_NO_IDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
_ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]
_MOE = {**_GROUPED, "moe_intermediate_size": 48, "num_experts_per_tok": 2}
_MLA = {
    **_COMMON,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 48,
    "num_experts_per_tok": 2,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
_OLD = {"vocab_size": VOCAB, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 512, **_NO_IDS}
_FALCON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    **_NO_IDS,
}

#: Name -> (architecture, what differs from the class's defaults).
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom": (
        "BloomForCausalLM",
        {"vocab_size": VOCAB, "hidden_size": 64, "n_layer": 3, "n_head": 4, "seq_length": 512, **_NO_IDS},
    ),
    "codegen": ("CodeGenForCausalLM", {**_OLD, "n_ctx": 512, "rotary_dim": 8}),
    "cohere": ("CohereForCausalLM", _GROUPED),
    "cohere2": ("Cohere2ForCausalLM", {**_GROUPED, "sliding_window": 24, "layer_types": _ALTERNATING}),
    "deepseek_v2": ("DeepseekV2ForCausalLM", {**_MLA, "n_group": 2, "topk_group": 1, "topk_method": "group_limited_greedy"}),
    "deepseek_v3": ("DeepseekV3ForCausalLM", {**_MLA, "n_group": 2, "topk_group": 1}),
    "exaone4": ("Exaone4ForCausalLM", {**_GROUPED, "head_dim": 16, "sliding_window": 24, "layer_types": _ALTERNATING}),
    "falcon": ("FalconForCausalLM", {**_FALCON, "alibi": False}),
    "falcon-alibi": ("FalconForCausalLM", {**_FALCON, "alibi": True, "parallel_attn": False}),
    "falcon-grouped": ("FalconForCausalLM", {**_FALCON, "alibi": False, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "gemma": ("GemmaForCausalLM", {**_GROUPED, "head_dim": 16}),
    "gemma2": ("Gemma2ForCausalLM", {**_GROUPED, "head_dim": 16, "sliding_window": 24, "query_pre_attn_scalar": 16}),
    "gemma3": ("Gemma3ForCausalLM", {**_GROUPED, "head_dim": 16, "sliding_window": 24, "query_pre_attn_scalar": 16}),
    "glm": ("GlmForCausalLM", {**_GROUPED, "head_dim": 16}),
    "glm4": ("Glm4ForCausalLM", {**_GROUPED, "head_dim": 16}),
    "glm4_moe": ("Glm4MoeForCausalLM", {**_MOE, "head_dim": 16, "n_routed_experts": 4, "first_k_dense_replace": 1}),
    "gpt2": ("GPT2LMHeadModel", {"vocab_size": VOCAB, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 512}),
    "gpt_bigcode": ("GPTBigCodeForCausalLM", {"vocab_size": VOCAB, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 512}),
    "gpt_neo": (
        "GPTNeoForCausalLM",
        {
            "vocab_size": VOCAB,
            "hidden_size": 64,
            "intermediate_size": 96,
            "max_position_embeddings": 512,
            "num_layers": 4,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 2]],
            "window_size": 24,
            **_NO_IDS,
        },
    ),
    "gpt_neox": ("GPTNeoXForCausalLM", _COMMON),
    "gpt_oss": (
        "GptOssForCausalLM",
        {
            **_GROUPED,
            "num_experts_per_tok": 2,
            "head_dim": 16,
            "num_local_experts": 4,
            "sliding_window": 24,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 150000.0,
                "factor": 8.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "gptj": ("GPTJForCausalLM", {**_OLD, "rotary_dim": 8}),
    "granite": ("GraniteForCausalLM", {**_GROUPED, "attention_multiplier": 0.2, "logits_scaling": 2.0}),
    "granite_moe": ("GraniteMoeForCausalLM", {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "helium": ("HeliumForCausalLM", {**_GROUPED, "head_dim": 16}),
    "hunyuan": ("HunYuanDenseV1ForCausalLM", {**_GROUPED, "head_dim": 16}),
    "llama": ("LlamaForCausalLM", _GROUPED),
    "llama3-rope": (
        "LlamaForCausalLM",
        {
            **_GROUPED,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "minimax_m2": ("MiniMaxM2ForCausalLM", {**_GROUPED, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "ministral": ("MinistralForCausalLM", {**_GROUPED, "head_dim": 16, "sliding_window": 24, "layer_types": _ALTERNATING}),
    "mistral": ("MistralForCausalLM", {**_GROUPED, "sliding_window": None}),
    "mistral-window": ("MistralForCausalLM", {**_GROUPED, "sliding_window": 24}),
    "mixtral": ("MixtralForCausalLM", {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "mpt": ("MptForCausalLM", {"vocab_size": VOCAB, "d_model": 64, "n_heads": 4, "n_layers": 3, "max_seq_len": 512, **_NO_IDS}),
    "nemotron": ("NemotronForCausalLM", _GROUPED),
    "olmo": ("OlmoForCausalLM", _GROUPED),
    "olmo2": ("Olmo2ForCausalLM", _GROUPED),
    "olmo3": ("Olmo3ForCausalLM", {**_GROUPED, "sliding_window": 24, "layer_types": _ALTERNATING}),
    "olmoe": ("OlmoeForCausalLM", {**_COMMON, "num_experts": 4, "num_experts_per_tok": 2}),
    "opt": ("OPTForCausalLM", {**_COMMON, "ffn_dim": 96, "word_embed_proj_dim": 64}),
    "phi": ("PhiForCausalLM", _COMMON),
    "phi3": ("Phi3ForCausalLM", _GROUPED),
    "qwen2": ("Qwen2ForCausalLM", {**_GROUPED, "tie_word_embeddings": True}),
    "qwen2-window": ("Qwen2ForCausalLM", {**_GROUPED, "use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        {**_MOE, "num_experts": 4, "shared_expert_intermediate_size": 64, "mlp_only_layers": [1]},
    ),
    "qwen3": ("Qwen3ForCausalLM", {**_GROUPED, "head_dim": 16}),
    # More experts than ten, so that they must be counted and not sorted as text.
    "qwen3_moe": ("Qwen3MoeForCausalLM", {**_MOE, "head_dim": 16, "num_experts": 12}),
    "smollm3": ("SmolLM3ForCausalLM", _GROUPED),
    "stablelm": ("StableLmForCausalLM", _GROUPED),
    "starcoder2": ("Starcoder2ForCausalLM", {**_GROUPED, "sliding_window": None}),
}


@dataclass(frozen=True)
class TinyModel:
    """A checkpoint: the directory with its JSON files, its tensors, and transformers' own model over them."""

    directory: Path
    tensors: dict[str, torch.Tensor]
    reference: Any
    #: Answers that were asked for: transformers needs more time for one than the engine for a batch.
    _known: dict[tuple[tuple[int, ...], int], list[int]] = field(default_factory=dict, init=False, repr=False)

    def generate(self, prompt: list[int], n_tokens: int) -> list[int]:
        """What transformers generates greedily, alone."""
        key = (tuple(prompt), n_tokens)
        if key not in self._known:
            self._known[key] = self._generate(prompt, n_tokens)
        return list(self._known[key])

    def _generate(self, prompt: list[int], n_tokens: int) -> list[int]:
        ids = torch.tensor([prompt])
        output = self.reference.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=n_tokens, do_sample=False, pad_token_id=0
        )
        return [int(token) for token in output[0, len(prompt) :]]


def make_model(
    directory: Path, name: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0, **config: Any
) -> TinyModel:
    """Save the tiny model of that name as transformers does."""
    architecture, given = CONFIGS[name]
    return save_model(directory, architecture, {**given, **config}, dtype, seed)


def save_model(
    directory: Path, architecture: str, config: dict[str, Any], dtype: torch.dtype = torch.float32, seed: int = 0
) -> TinyModel:
    """Save a model of that class with random weights."""
    model_class = getattr(transformers, architecture)
    model_config = model_class.config_class(**config)
    torch.manual_seed(seed)
    # transformers' eager attention adds Falcon's ALiBi biases twice; what it uses by default does not.
    attention = "sdpa" if config.get("alibi") else "eager"
    reference = model_class._from_config(model_config, attn_implementation=attention, dtype=dtype).eval()
    with torch.no_grad():
        for key, parameter in reference.named_parameters():
            # Norms around one; layers strong beside the embeddings, or a tied model repeats its last token.
            in_layer = any(part.isdigit() for part in key.split("."))
            is_norm = parameter.dim() == 1 and key.endswith("weight")
            parameter.normal_(1.0 if is_norm else 0.0, 0.3 if in_layer and parameter.dim() > 1 else 0.1)
        for key, buffer in reference.named_buffers():
            if key.endswith("e_score_correction_bias"):
                buffer.normal_(0.0, 0.1)
    reference.generation_config.eos_token_id = config.get("eos_token_id")
    reference.save_pretrained(directory)
    from safetensors.torch import load_file

    return TinyModel(directory, load_file(directory / "model.safetensors"), reference)


def settings(**changes: Any) -> EngineSettings:
    return EngineSettings(**{"device": "cpu", "kv_memory": 8 * 1024**2, "n_threads": 1, **changes})


def make_engine(model: TinyModel, n_blocks: int | None = None, **changes: Any) -> LLMEngine:
    """An engine over the model's tensors; `n_blocks` gives it a pool of exactly that many."""
    if n_blocks is not None:
        block_size = changes.setdefault("block_size", 16)
        layers = build_skeleton(model.directory).layers
        itemsize = next(iter(model.tensors.values())).itemsize
        changes["kv_memory"] = (n_blocks + 1) * block_size * sum(layer.nbytes(itemsize) for layer in layers)
    engine = build_engine(model.directory, model.tensors, settings(**changes))
    assert n_blocks is None or engine.stats().blocks_total == n_blocks
    return engine


def request(request_id: str, prompt: list[int], max_tokens: int = 24, **params: Any) -> Sequence:
    fields = {key: params.pop(key) for key in ("priority", "arrival", "output_ids") if key in params}
    return Sequence(request_id, prompt, SamplingParams(**{"max_tokens": max_tokens, "temperature": 0.0, **params}), **fields)


def prompts(n: int, shortest: int = 1, longest: int = 90, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(VOCAB) for _ in range(rng.randint(shortest, longest))] for _ in range(n)]


def drain(engine: LLMEngine, outputs: list[StepOutput] | None = None) -> dict[str, list[int]]:
    """Step until nothing is left; the tokens of each request, whose indexes must be without a gap."""
    outputs = [] if outputs is None else outputs
    for _ in range(5000):
        if not engine.has_work:
            break
        outputs += engine.step()
    assert not engine.has_work
    return tokens_of(outputs)


def answer(model: TinyModel, prompt: list[int], max_tokens: int = 24, **params: Any) -> list[int]:
    """The answer of a request that is alone in an engine of its own."""
    engine = make_engine(model)
    engine.add(request("alone", prompt, max_tokens, **params))
    return drain(engine)["alone"]


def assert_the_same_in_a_crowd(model: TinyModel, asked: list[list[int]], params: list[dict[str, Any]]) -> None:
    """Prompts that come one after the other, in so little memory that some are preempted, are answered as each of them alone."""
    alone = {str(i): answer(model, prompt, **params[i]) for i, prompt in enumerate(asked)}
    engine = make_engine(model, n_blocks=30, block_size=8, max_batch_tokens=40)
    outputs: list[StepOutput] = []
    for i, prompt in enumerate(asked):
        engine.add(request(str(i), prompt, **params[i]))
        outputs += engine.step()
    assert drain(engine, outputs) == alone
    assert engine.stats().n_preemptions > 0


def assert_goes_on_elsewhere(model: TinyModel, **params: Any) -> None:
    """A request that brings its first tokens is given those that follow."""
    [prompt] = prompts(1, 20, 30)
    whole = answer(model, prompt, 30, **params)
    engine = make_engine(model)
    engine.add(request("a", prompt, 30, output_ids=whole[:13], **params))
    assert drain(engine)["a"] == whole[13:]


def until_packed(engine: LLMEngine) -> None:
    """Keep a hot engine busy until nothing is left to be packed."""
    packer = engine._runner._packer
    for number in range(1000):
        engine.add(request(f"busy-{number}", [1, 2, 3], 4))
        drain(engine)
        assert packer._thread is not None
        packer._thread.join(0.01)
        if packer.ended:
            return
    raise AssertionError("it takes too long")


def tokens_of(outputs: list[StepOutput]) -> dict[str, list[int]]:
    answers: dict[str, list[int]] = {}
    first: dict[str, int] = {}
    for output in outputs:
        assert output.error is None, output.error
        if output.token_id is not None:
            answer = answers.setdefault(output.request_id, [])
            assert output.index == first.setdefault(output.request_id, output.index) + len(answer)
            answer.append(output.token_id)
    return answers


def assert_all_free(engine: LLMEngine) -> None:
    stats = engine.stats()
    assert stats.blocks_free == stats.blocks_total
    assert (stats.n_running, stats.n_waiting) == (0, 0)


def write_json(path: Path, **changes: Any) -> None:
    """Change or add keys of a JSON file; ``None`` removes one."""
    data = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({key: value for key, value in {**data, **changes}.items() if value is not None}))
