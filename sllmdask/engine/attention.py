"""Paged attention behind transformers' attention interface.

A model whose ``attn_implementation`` is :data:`NAME` hands every layer's queries, keys and values to :func:`_hook`. What happens
to them is up to the context of this thread (:func:`attending`): a :class:`PagedBatch` writes keys and values into the cache and
attends through block tables, :class:`LayerProbe` only notes what the model does, and without a context it is plain attention.
No mask function is registered under the name, so transformers builds no mask.

What a step computes is a :class:`PackedBatch`; what computes it is a :class:`Backend`, chosen by name (:func:`make_backend`).

Source: PagedAttention (vLLM, SOSP '23); packed sequences without padding, Orca (OSDI '22). Attention sinks: Xiao et al.,
"Efficient Streaming Language Models with Attention Sinks" (ICLR '24), learned ones as in GPT-OSS.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sllmdask.errors import ConfigError

log = logging.getLogger(__name__)

T = TypeVar("T")

#: Name under which the models find us.
NAME = "sllm_paged"

#: Arguments of the interface that change nothing here: dropout is off, and positions are in the batch.
_HARMLESS = frozenset(
    {
        "cache_position",
        "dropout",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "position_ids",
        "use_cache",
    }
)

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class AttentionOptions:
    """What one layer asks for besides plain causal attention."""

    scaling: float
    #: A token sees itself and the ``sliding_window - 1`` tokens before it.
    sliding_window: int | None = None
    #: Scores become ``softcap * tanh(score / softcap)``.
    softcap: float | None = None
    #: (Hq,): one more score of each head, which takes its part of the softmax and has no value.
    sinks: Tensor | None = field(default=None, compare=False)


@dataclass(frozen=True)
class LayerShape:
    """KV of one token in one layer."""

    n_kv_heads: int
    key_dim: int
    value_dim: int

    def nbytes(self, itemsize: int) -> int:
        return self.n_kv_heads * (self.key_dim + self.value_dim) * itemsize


#: Arguments of the interface by names that we do not know.
Others = Mapping[str, Any]


class AttentionContext(Protocol):
    def attend(
        self,
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        options: AttentionOptions,
        others: Others,
    ) -> Tensor:
        """Attention of one layer: `query` (1, Hq, T, Dk), `key` (1, Hkv, T, Dk), `value` (1, Hkv, T, Dv) -> (1, T, Hq, Dv)."""


# --- what a step computes --------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Span:
    """Rows ``start..stop`` of the packed batch: one sequence's tokens, with `n_past` tokens in the cache before them."""

    start: int
    stop: int
    n_past: int
    #: (n_past + stop - start,), int64, in host memory: cache slots of the sequence's tokens, in order.
    host_slots: Tensor
    device: torch.device = _CPU
    masks: dict[int | None, Tensor | None] = field(default_factory=dict)

    @property
    def n_rows(self) -> int:
        return self.stop - self.start

    @property
    def n_context(self) -> int:
        return self.n_past + self.n_rows

    @cached_property
    def slots(self) -> Tensor:
        """The slots on the device; brought there when a backend asks for them."""
        return self.host_slots.to(self.device, non_blocking=True)

    def first_seen(self, window: int | None) -> int:
        """The first token that any row of the span can see."""
        return 0 if window is None else max(0, self.n_past - window + 1)

    def mask(self, window: int | None) -> Tensor | None:
        """(rows, tokens from :meth:`first_seen` on), true where a row sees a token; ``None`` where plain causality says it.

        Made once per step, used by all layers with this window.
        """
        if window not in self.masks:
            first = self.first_seen(window)
            if (self.n_rows == 1) or (self.n_past == 0 and (window is None or self.n_rows <= window)):
                self.masks[window] = None
            else:
                rows = torch.arange(self.n_past, self.n_context, device=self.device)[:, None]
                columns = torch.arange(first, self.n_context, device=self.device)
                seen = columns <= rows
                self.masks[window] = seen if window is None else seen & (columns > rows - window)
        return self.masks[window]


class PackedBatch:
    """The tokens of one step, sequence after sequence without padding, and where their keys and values are.

    Made once per step, for every layer and any backend; nothing in it is read back from a device.

    :param spans: one for each sequence, in order, without a gap
    :param tables: for each, the blocks that hold its tokens, int32
    """

    def __init__(
        self, spans: Sequence[Span], tables: Sequence[np.ndarray[Any, Any]], block_size: int, device: torch.device = _CPU
    ) -> None:
        self.spans = tuple(spans)
        self.block_size = block_size
        self.device = device
        self.n_tokens = spans[-1].stop
        #: Rows of the sequence that has most of them; 1: every sequence decodes.
        self.max_rows = max(span.n_rows for span in spans)
        self.max_context = max(span.n_context for span in spans)
        #: (T,), int64: the cache slot of each packed token, its block times the block size, plus the offset in the block.
        self.new_slots = self._put(torch.cat([span.host_slots[span.n_past :] for span in spans]))
        #: (n + 1,), int32: the row at which each sequence begins, and the end.
        self.cu_seqlens = self._put(torch.tensor([0, *(span.stop for span in spans)], dtype=torch.int32))
        #: (n,), int32: tokens of each sequence in the cache, those of this step included.
        self.context_lens = self._put(torch.tensor([span.n_context for span in spans], dtype=torch.int32))
        padded = np.zeros((len(tables), max(len(table) for table in tables)), dtype=np.int32)
        for row, table in zip(padded, tables, strict=True):
            row[: len(table)] = table
        #: (n, most blocks of a sequence), int32, padded with 0.
        self.block_tables = self._put(torch.from_numpy(padded))
        self._derived: dict[Any, Any] = {}

    def once(self, key: Any, make: Callable[[], T]) -> T:
        """What a backend derives from the batch, made when it is first asked for."""
        if key not in self._derived:
            self._derived[key] = make()
        return self._derived[key]

    def _put(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)


class Backend(Protocol):
    """Computes the attention of a packed batch over the paged cache of one layer."""

    name: str

    def store(self, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, batch: PackedBatch) -> None:
        """Write `key` (1, Hkv, T, Dk) and `value` (1, Hkv, T, Dv) of the batch's tokens into the cache of one layer."""

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, batch: PackedBatch, options: AttentionOptions) -> Tensor:
        """`query` (1, Hq, T, Dk), `keys` (n_blocks, block_size, Hkv, Dk), `values` (.., Dv) -> (1, T, Hq, Dv).

        Keys and values of the batch's own tokens are in the cache already.
        """

    def close(self) -> None:
        """Let go of threads and memory."""


class PagedBatch:
    """The attention of one step: `batch` over paged `caches`, per layer keys and values (n_blocks, block_size, Hkv, D)."""

    def __init__(self, caches: Sequence[tuple[Tensor, Tensor]], batch: PackedBatch, backend: Backend) -> None:
        self._caches = caches
        self._batch = batch
        self._backend = backend

    def attend(
        self,
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        options: AttentionOptions,
        others: Others,
    ) -> Tensor:
        del others
        keys, values = self._caches[_layer(module)]
        self._backend.store(key, value, keys, values, self._batch)
        return self._backend.attend(query, keys, values, self._batch, options)


class LayerProbe:
    """Notes the layers that call the hook, and what the engine cannot honour. Computes nothing, so it runs on meta tensors."""

    def __init__(self) -> None:
        self.modules: dict[int, torch.nn.Module] = {}
        self.shapes: dict[int, LayerShape] = {}
        #: Sliding windows, in tokens.
        self.windows: dict[int, int | None] = {}
        #: What would change the result and is not implemented.
        self.unknown: set[str] = set()

    def attend(
        self,
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        options: AttentionOptions,
        others: Others,
    ) -> Tensor:
        layer = _layer(module)
        if layer in self.shapes:
            self.unknown.add("two attentions in one layer")
        if not getattr(module, "is_causal", True):
            self.unknown.add("attention that is not causal")
        self.unknown |= {name for name, given in others.items() if given is not None and name not in _HARMLESS}
        self.modules[layer] = module
        self.shapes[layer] = LayerShape(key.shape[1], key.shape[3], value.shape[3])
        self.windows[layer] = options.sliding_window
        return query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])


# --- what computes it ------------------------------------------------------------------------------------------------


def make_backend(name: str, device: torch.device) -> Backend:
    """The backend called `name`: ``sdpa`` anywhere, ``numba`` on the CPU, ``triton`` on a GPU, or the fastest one for ``auto``.

    Raises :class:`ConfigError` if `device` does not have it.
    """
    if name == "numba" and device.type != "cpu":
        raise ConfigError(f"engine.attention is 'numba', which runs on the CPU only, not on {device.type}", "attention")
    if name == "triton":
        return _triton_backend(device)
    if name == "auto" and device.type == "cuda":
        return _fastest_on_a_gpu(device)
    if name == "sdpa" or device.type != "cpu":
        return SdpaBackend()
    # Here, because numba takes a while to import.
    from sllmdask.engine.kernels.cpu_attention import NumbaBackend

    return NumbaBackend()


def _triton_backend(device: torch.device) -> Backend:
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ConfigError(f"engine.attention is 'triton', which runs on GPUs, not on {device.type}", "attention")
    if not find_spec("triton"):
        raise ConfigError(
            "engine.attention is 'triton', but Triton is not installed; builds of torch for GPUs bring it", "attention"
        )
    # Here, because no other process has it.
    from sllmdask.engine.kernels.triton_attention import TritonBackend

    backend = TritonBackend()
    try:
        backend.check(device)
    except RuntimeError as error:
        raise ConfigError(f"engine.attention cannot be 'triton': {error}", "attention") from error
    return backend


def _fastest_on_a_gpu(device: torch.device) -> Backend:
    try:
        return _triton_backend(device)
    except ConfigError as error:
        log.warning("attention on %s by torch, which is slower: cause=%s", device, error)
        return SdpaBackend()


class TorchStore:
    """Writes keys and values into the cache by torch."""

    def store(self, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, batch: PackedBatch) -> None:
        keys.flatten(0, 1).index_copy_(0, batch.new_slots, key[0].transpose(0, 1))
        values.flatten(0, 1).index_copy_(0, batch.new_slots, value[0].transpose(0, 1))


class SdpaBackend(TorchStore):
    """Gathers a sequence's blocks and gives them to torch's scaled dot-product attention, one sequence at a time.

    A sequence's result does not depend on its neighbours, but, in its last bits, on how many of its rows come at once.
    """

    name = "sdpa"

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, batch: PackedBatch, options: AttentionOptions) -> Tensor:
        output = query.new_empty(1, query.shape[2], query.shape[1], values.shape[3])
        for span in batch.spans:
            slots = span.slots[span.first_seen(options.sliding_window) :]
            output[:, span.start : span.stop] = dot_product_attention(
                query[:, :, span.start : span.stop],
                keys.flatten(0, 1).index_select(0, slots).transpose(0, 1)[None],
                values.flatten(0, 1).index_select(0, slots).transpose(0, 1)[None],
                options,
                span.mask(options.sliding_window),
            )
        return output

    def close(self) -> None:
        pass


def dot_product_attention(query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions, mask: Tensor | None) -> Tensor:
    """Attention of the last ``n`` tokens of a sequence over all of it.

    `query` (1, Hq, n, Dk), `key` (1, Hkv, L, Dk), `value` (1, Hkv, L, Dv), `mask` (n, L) or ``None`` for plain causality with
    ``n == 1`` or ``n == L``; returns (1, n, Hq, Dv).
    """
    _, n_heads, n_rows, _ = query.shape
    n_kv_heads = key.shape[1]
    sinks = None if options.sinks is None else options.sinks.view(1, n_heads, 1, 1)
    if n_rows == 1:
        # One row sees everything, so the query heads of a group can be the rows of its one KV head: nothing is repeated.
        grouped = query.reshape(1, n_kv_heads, n_heads // n_kv_heads, -1)
        sinks = None if sinks is None else sinks.view(1, n_kv_heads, n_heads // n_kv_heads, 1)
        output = _attend(grouped, key, value, options, None, sinks, causal=False)
        return output.reshape(1, 1, n_heads, -1)
    if n_kv_heads != n_heads:
        key, value = (part.repeat_interleave(n_heads // n_kv_heads, 1) for part in (key, value))
    return _attend(query, key, value, options, mask, sinks, causal=mask is None).transpose(1, 2)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    options: AttentionOptions,
    mask: Tensor | None,
    sinks: Tensor | None,
    *,
    causal: bool,
) -> Tensor:
    """`sinks` are scores (1, H, n or 1, 1)."""
    if options.softcap is None and sinks is None:
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal, scale=options.scaling)
    scores = torch.matmul(query, key.transpose(2, 3)) * options.scaling
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    if sinks is not None:
        scores = torch.cat((scores, sinks.to(scores.dtype).expand(*scores.shape[:-1], 1)), dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype)
    return torch.matmul(weights if sinks is None else weights[..., :-1], value)


def _layer(module: torch.nn.Module) -> int:
    return int(module.layer_idx)  # type: ignore[arg-type]


_this_thread = threading.local()


@contextmanager
def attending(context: AttentionContext) -> Iterator[None]:
    """Models that run in this thread inside the block attend by `context`."""
    _this_thread.context = context
    try:
        yield
    finally:
        del _this_thread.context


def _hook(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    options = AttentionOptions(query.shape[-1] ** -0.5 if scaling is None else scaling, sliding_window, softcap, s_aux)
    context: AttentionContext | None = getattr(_this_thread, "context", None)
    if context is not None:
        return context.attend(module, query, key, value, options, others), None
    if attention_mask is None:
        n_rows = query.shape[2]
        span = Span(0, n_rows, key.shape[2] - n_rows, torch.empty(0, dtype=torch.long), query.device)
        first, mask = span.first_seen(sliding_window), span.mask(sliding_window)
        return dot_product_attention(query, key[:, :, first:], value[:, :, first:], options, mask), None
    n_repeats = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(n_repeats, 1) for part in (key, value))
    sinks = None if s_aux is None else s_aux.view(1, -1, 1, 1)
    return _attend(query, key, value, options, attention_mask, sinks, causal=False).transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register(NAME, _hook)
