"""The forward pass: a transformers model over views of host memory, its paged KV cache, one packed batch per step.

The modelling code is transformers', unmodified. The model is built on the meta device, which costs neither memory nor time, and
then given the tensors of the checkpoint; parameters of the right dtype on the CPU are those tensors, not copies.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import transformers
from torch import Tensor

from sllmdask.batching.blocks import blocks_for
from sllmdask.batching.scheduler import Chunk
from sllmdask.engine.attention import NAME, LayerProbe, LayerShape, PagedBatch, Span, attending
from sllmdask.engine.families import FamilyInfo, inspect_config
from sllmdask.errors import CheckpointCorrupt, ConfigError, UnsupportedArchitecture
from sllmdask.units import format_bytes

log = logging.getLogger(__name__)

#: Names that checkpoints keep although transformers has renamed the parameter (GPT-NeoX).
_RENAMED = {"embed_out.weight": "lm_head.weight"}

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

#: What the check after loading runs and compares. Two layers: where kinds of attention alternate, both are seen.
_N_CHECKED_TOKENS, _N_CHECKED_LAYERS = 8, 2


class ModelRunner:
    """One model and its KV cache on one device. Used by one thread at a time."""

    def __init__(
        self,
        checkpoint_dir: Path,
        config: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        *,
        device: torch.device,
        block_size: int,
        kv_memory: int,
        dtype: str = "auto",
    ) -> None:
        """Raises :class:`CheckpointError` if the model cannot be run, :class:`ConfigError` if `kv_memory` is too small."""
        self.family: FamilyInfo = inspect_config(config)
        self.device = device
        self.block_size = block_size
        self.dtype = _serving_dtype(checkpoint_dir, tensors, device, dtype)
        self._model = _build_on_meta(self.family, config, self.dtype)
        probe = _probe_layers(self._model, self.family)
        self.layers: list[LayerShape] = [probe.shapes[layer] for layer in range(len(probe.shapes))]
        #: Bytes of one block, keys and values of all layers.
        self.bytes_per_block = block_size * sum(layer.nbytes(self.dtype.itemsize) for layer in self.layers)
        self.n_blocks = kv_memory // self.bytes_per_block - 1
        if self.n_blocks < 1:
            needed = format_bytes(2 * self.bytes_per_block)
            raise ConfigError(
                f"engine.kv_memory is {format_bytes(kv_memory)}, but this model needs {needed} at least", "kv_memory"
            )
        _give_tensors(self._model, checkpoint_dir, tensors, self.dtype, device)
        self.caches: list[tuple[Tensor, Tensor]] = [
            (
                _zeros((self.n_blocks + 1, block_size, layer.n_kv_heads, layer.key_dim), self.dtype, device),
                _zeros((self.n_blocks + 1, block_size, layer.n_kv_heads, layer.value_dim), self.dtype, device),
            )
            for layer in self.layers
        ]
        self.vocab_size = int(self._model.get_input_embeddings().weight.shape[0])
        self._check_first_layers(probe)

    @property
    def model(self) -> torch.nn.Module:
        return cast(torch.nn.Module, self._model)

    @torch.inference_mode()
    def forward(self, chunks: Sequence[Chunk]) -> Tensor:
        """Compute the chunks' tokens into the cache; returns logits (n, vocab), one row for each chunk that samples, in order."""
        ids: list[int] = []
        positions: list[int] = []
        spans: list[Span] = []
        last_rows: list[int] = []
        for chunk in chunks:
            ids += chunk.sequence.token_ids(chunk.start, chunk.stop)
            positions += range(chunk.start, chunk.stop)
            slots = self._slots(chunk.sequence.block_table, chunk.stop)
            spans.append(Span(len(ids) - chunk.n_tokens, len(ids), chunk.start, slots))
            if chunk.samples:
                last_rows.append(len(ids) - 1)
        return self._run(ids, positions, spans, last_rows)

    def close(self) -> None:
        """Let go of every tensor: the host memory behind the parameters may be used for something else now."""
        for module in self._model.modules():
            module._parameters.clear()
            module._buffers.clear()
        self.caches.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _slots(self, block_table: Sequence[int], n_tokens: int) -> Tensor:
        """(n_tokens,) cache slots of a sequence's tokens."""
        blocks = torch.tensor(block_table[: blocks_for(n_tokens, self.block_size)], device=self.device)
        offsets = torch.arange(self.block_size, device=self.device)
        return (blocks[:, None] * self.block_size + offsets).flatten()[:n_tokens]

    def _run(self, ids: list[int], positions: list[int], spans: list[Span], rows: list[int]) -> Tensor:
        new_slots = torch.cat([span.slots[span.n_past :] for span in spans])
        with attending(PagedBatch(self.caches, new_slots, spans)):
            output = self._model(
                input_ids=torch.tensor([ids], device=self.device),
                position_ids=torch.tensor([positions], device=self.device),
                use_cache=False,
                logits_to_keep=torch.tensor(rows, dtype=torch.long, device=self.device),
            )
        return cast(Tensor, output.logits)[0]

    @torch.inference_mode()
    def _check_first_layers(self, probe: LayerProbe) -> None:
        """Compare the first layers over the cache, in two chunks, with transformers' own eager attention.

        Finds a configuration under which an architecture does something else than we think, and memory that nobody filled. It
        stops after the layers that it looks at, so it costs little next to a forward pass.
        """
        modules = [probe.modules[layer] for layer in range(min(_N_CHECKED_LAYERS, len(probe.modules)))]
        n_tokens = min(_N_CHECKED_TOKENS, self.n_blocks * self.block_size, self.family.max_model_len)
        ids = [(7 * i + 1) % self.vocab_size for i in range(n_tokens)]
        blocks = list(range(blocks_for(n_tokens, self.block_size), 0, -1))
        paged: list[list[Tensor]] = []
        for start, stop in ((0, n_tokens // 2), (n_tokens // 2, n_tokens)):
            if start < stop:
                span = Span(0, stop - start, start, self._slots(blocks, stop))
                with _first_outputs(modules) as outputs:
                    self._run(ids[start:stop], list(range(start, stop)), [span], [0])
                paged.append(outputs)
        self._model.set_attn_implementation("eager")
        with _first_outputs(modules) as plain:
            self._model(input_ids=torch.tensor([ids], device=self.device), use_cache=False)
        self._model.set_attn_implementation(NAME)
        tolerance = 1e-3 if self.dtype == torch.float32 else 0.15
        for layer, expected in enumerate(plain):
            found = torch.cat([outputs[layer] for outputs in paged], dim=1)
            error = float(torch.linalg.vector_norm((found - expected).float()) / torch.linalg.vector_norm(expected.float()))
            if not error <= tolerance:  # so that NaN fails
                reason = (
                    f"with this config.json, layer {layer} over the paged cache differs from transformers' own by {error:.2g}"
                )
                raise UnsupportedArchitecture(self.family.architecture, reason)


def pick_device(name: str) -> torch.device:
    """``auto``, ``cpu`` or ``cuda`` as a device. Raises :class:`ConfigError` if there is no such device."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("engine.device is 'cuda', but torch sees no GPU here", "device")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _serving_dtype(checkpoint_dir: Path, tensors: Mapping[str, Tensor], device: torch.device, wanted: str) -> torch.dtype:
    """`wanted`, or for ``auto`` what most bytes of the checkpoint are in, so that most of it need not be copied."""
    nbytes: Counter[torch.dtype] = Counter()
    for tensor in tensors.values():
        if tensor.is_floating_point():
            nbytes[tensor.dtype] += tensor.nbytes
    if not nbytes:
        raise CheckpointCorrupt(str(checkpoint_dir), None, "it holds no weights")
    dtype = max(nbytes, key=lambda dtype: nbytes[dtype]) if wanted == "auto" else getattr(torch, wanted)
    if dtype not in _DTYPES:
        raise CheckpointCorrupt(
            str(checkpoint_dir), None, f"most weights are {dtype}; float32, bfloat16 and float16 can be served"
        )
    if dtype == torch.float16 and device.type == "cpu":
        # Half-precision products are far slower than either on CPUs.
        has_bf16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return torch.bfloat16 if has_bf16 else torch.float32
    return dtype


def _build_on_meta(family: FamilyInfo, config: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """The model without memory. Raises :class:`UnsupportedArchitecture` if transformers cannot make sense of the config."""
    try:
        model_config = transformers.CONFIG_MAPPING[family.model_type].from_dict(dict(config))
        model_config.dtype = dtype
        model_config._attn_implementation = NAME
        # The context is this thread's own. Asking for `dtype` would change torch's default for the whole process.
        with torch.device("meta"):
            model = getattr(transformers, family.architecture)(model_config).eval().requires_grad_(False)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UnsupportedArchitecture(family.architecture, f"transformers refuses its config.json ({error})") from error
    # Nothing is padded here. With a padding token, some models look for it in every batch, to warn of a missing mask.
    model.config.get_text_config().pad_token_id = None
    return model


@torch.no_grad()
def _probe_layers(model: Any, family: FamilyInfo) -> LayerProbe:
    """Run two tokens through the model without weights. Raises :class:`UnsupportedArchitecture` if it is not as assumed."""
    probe = LayerProbe()
    ids = torch.zeros((1, 2), dtype=torch.long, device="meta")
    positions = torch.zeros_like(ids)
    try:
        with attending(probe):
            model(input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=positions[0, :1])
    except (NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        raise UnsupportedArchitecture(family.architecture, f"its forward pass cannot be looked through ({error})") from error
    n_layers = int(model.config.get_text_config().num_hidden_layers)
    if probe.unknown:
        reason = f"its attention needs {', '.join(sorted(probe.unknown))}, which the engine does not have"
        raise UnsupportedArchitecture(family.architecture, reason)
    if sorted(probe.shapes) != list(range(n_layers)):
        reason = f"{len(probe.shapes)} of its {n_layers} layers keep a KV cache of their own"
        raise UnsupportedArchitecture(family.architecture, reason)
    return probe


def _give_tensors(
    model: Any, checkpoint_dir: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device
) -> None:
    """Put the checkpoint's tensors where the model's parameters are. Raises :class:`CheckpointCorrupt`, naming the tensor."""
    expected: dict[str, Tensor] = model.state_dict()
    given: dict[str, Tensor] = {}
    unexpected: list[str] = []
    for name, tensor in tensors.items():
        key = _parameter_name(name, expected, model.base_model_prefix)
        if key is None:
            unexpected.append(name)
            continue
        if tensor.shape != expected[key].shape:
            reason = f"its shape is {list(tensor.shape)}, but config.json asks for {list(expected[key].shape)}"
            raise CheckpointCorrupt(str(checkpoint_dir), name, reason)
        given[key] = tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)
    if unexpected:
        log.info("ignored tensors: n=%d first=%s directory=%s", len(unexpected), unexpected[0], checkpoint_dir)
    model.load_state_dict(given, strict=False, assign=True)
    model.requires_grad_(False)
    missing = expected.keys() - given.keys()
    model.tie_weights(missing_keys=missing, recompute_mapping=False)
    absent = sorted(name for name in missing if model.get_parameter_or_buffer(name).is_meta)
    if absent:
        raise CheckpointCorrupt(str(checkpoint_dir), absent[0], f"it is missing, with {len(absent) - 1} others")
    _fill_computed_buffers(model, device)


def _parameter_name(name: str, expected: Mapping[str, Tensor], prefix: str) -> str | None:
    """The model's name of a checkpoint tensor: a file may hold the base model only, or name it with the prefix in front."""
    candidates = (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."), _RENAMED.get(name, name))
    return next((candidate for candidate in candidates if candidate in expected), None)


def _fill_computed_buffers(model: Any, device: torch.device) -> None:
    """Compute the buffers that no checkpoint holds, rotary frequencies for instance, as transformers does after loading."""
    for module in model.modules():
        names = [name for name in module._non_persistent_buffers_set if module._buffers.get(name) is not None]
        if not names:
            continue
        for name in names:
            shape, kind = module._buffers[name].shape, module._buffers[name].dtype
            # NaN, so that the check of the first layers sees a buffer that stays empty.
            value = math.nan if kind.is_floating_point else 0
            module._buffers[name] = torch.full(shape, value, dtype=kind, device=device)
        for parameter in module.parameters(recurse=False):
            parameter._is_hf_initialized = True
        model._init_weights(module)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on the CPU their pages are taken when they are first written, which keeps the start short."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)


class _SeenEnough(Exception):
    """Ends a forward pass early."""


@contextmanager
def _first_outputs(modules: Sequence[torch.nn.Module]) -> Iterator[list[Tensor]]:
    """Collects the first output of each of `modules` inside the block, and ends the block after the last of them."""
    outputs: list[Tensor] = []

    def note(_module: torch.nn.Module, _inputs: Any, output: Any) -> None:
        outputs.append(output[0])
        if len(outputs) == len(modules):
            raise _SeenEnough

    handles = [module.register_forward_hook(note) for module in modules]
    try:
        with suppress(_SeenEnough):
            yield outputs
    finally:
        for handle in handles:
            handle.remove()
