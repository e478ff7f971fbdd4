"""The forward pass: a transformers model over views of host memory, its paged KV cache, one packed batch per step.

The model is made in :mod:`sllmdask.engine.construct`. Its weights may still be on their way; then its layers wait for them, by
:mod:`sllmdask.engine.gating`.
"""

from __future__ import annotations

import math
import mmap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from sllmdask.batching.blocks import blocks_for
from sllmdask.batching.memory import Kind, MemoryAccount
from sllmdask.batching.scheduler import Chunk
from sllmdask.engine.attention import NAME, Backend, LayerShape, PackedBatch, PagedBatch, Span, attending, make_backend
from sllmdask.engine.construct import BuildTimes, Piece, Skeleton, serving_dtype
from sllmdask.engine.families import FamilyInfo
from sllmdask.engine.gating import ArrivalGate, Wait
from sllmdask.engine.graphs import DecodeGraphs, DecodeInputs
from sllmdask.engine.linears import LinearPacker, Packing, can_pack
from sllmdask.engine.lora import AdapterSet, why_no_adapters
from sllmdask.engine.numerics import EvenActivations, numerics_id, refuse_batch_dependence
from sllmdask.engine.sizing import activation_nbytes, device_memory, kv_blocks, least_window, own_ledger
from sllmdask.engine.slots import SlotTables
from sllmdask.errors import ConfigError, DeterminismUnavailable, InsufficientMemory, UnsupportedArchitecture
from sllmdask.units import format_bytes

#: What the check after loading runs and compares. Where kinds of attention alternate, two are seen.
_N_CHECKED_TOKENS, _N_CHECKED_KINDS = 8, 2
#: Rows that the check of the deterministic mode computes together and one by one: more than one register block, and odd.
_N_COMPARED_ROWS = 17
_SMALLER_STEPS = "Lower engine.max_batch_tokens or engine.max_running, or unload another model of this worker."
_SMALLER_KV = "Lower engine.kv_memory, or leave it to auto, or unload another model of this worker."
#: Of the memory that a device has left now, what a KV cache may take by itself for one long request; and on a CPU, where others
#: live, too, which part all caches of a worker take.
_USED_OF_FREE, _KV_PART = 0.9, 2


@dataclass(frozen=True, eq=False)
class StepInputs:
    """One forward pass: packed tokens with their positions, where they attend, and the rows whose logits are wanted."""

    ids: list[int]
    positions: list[int]
    batch: PackedBatch
    rows: list[int]


class ModelRunner:
    """One model and its KV cache on one device. Used by one thread at a time.

    :param skeleton: the model; the runner's own until :meth:`close`
    :param wait: where the bytes of `tensors` are still arriving, blocks until those of these names are there
    :param construct_s: seconds that making the skeleton took, for :attr:`build_times`
    :param attention: the backend, by its name in :func:`make_backend`
    :param max_graph_batch: sequences of the largest decode step that is recorded as a CUDA graph; 0: none is
    :param packing: whether, and when, linear layers run over packed weights
    :param deterministic: a row's bits shall not depend on what else is in the batch, nor on how its sequence was cut
    :param kv_memory: bytes of the KV cache; ``auto``: by what is free, see :func:`~sllmdask.engine.sizing.kv_blocks`
    :param max_running: sequences that decode together, at most, and `max_batch_tokens` of one step: what memory is needed for
    :param memory: where all memory is asked for that the runner takes; by default, most of what is free now
    """

    def __init__(
        self,
        skeleton: Skeleton,
        checkpoint_dir: Path,
        tensors: Mapping[str, Tensor],
        *,
        device: torch.device,
        block_size: int,
        kv_memory: int | Literal["auto"],
        dtype: str = "auto",
        wait: Wait | None = None,
        construct_s: float = 0.0,
        attention: str = "auto",
        max_graph_batch: int = 0,
        packing: Packing | None = None,
        deterministic: bool = False,
        max_running: int = 64,
        max_batch_tokens: int = 512,
        memory: MemoryAccount | None = None,
    ) -> None:
        """Raises :class:`CheckpointError` if the model cannot be run, :class:`ConfigError` if `kv_memory` is too small.

        :class:`DeterminismUnavailable` if `deterministic` cannot be promised here, :class:`InsufficientMemory`.
        """
        started = time.perf_counter()
        self.family: FamilyInfo = skeleton.family
        self.device = device
        self.block_size = block_size
        self.dtype = serving_dtype(checkpoint_dir, tensors, device, dtype)
        self.layers: list[LayerShape] = skeleton.layers
        self.vocab_size = skeleton.vocab_size
        #: Bytes of one block, keys and values of all layers.
        self.bytes_per_block = block_size * sum(layer.nbytes(self.dtype.itemsize) for layer in self.layers)
        #: Blocks that sequences may have; there is one more, see :class:`~sllmdask.batching.blocks.BlockPool`.
        self.n_blocks = 0
        self._skeleton = skeleton
        self._model = skeleton.model
        #: LoRA adapters that requests may have.
        self.adapters = AdapterSet(skeleton.model, device, why_no_adapters(skeleton.paged, deterministic))
        self._gate: ArrivalGate | None = None
        self._checked = False
        self.caches: list[tuple[Tensor, Tensor]] = []
        #: On a CPU, the same memory as bytes, slot by slot, and the bytes of a slot: of each layer, keys, then values.
        self._memory: list[tuple[memoryview, int]] = []
        self._tables = SlotTables(block_size)
        self._deterministic = deterministic
        self._packing = self._choose_packing(packing or Packing())
        self.memory = own_ledger(device).account(checkpoint_dir.name) if memory is None else memory
        #: Addresses of weights that were made here, for one name alone: nobody misses them when they are packed.
        self._owned: set[int] = set()
        self._packer = LinearPacker(self._model, self._packing, self._owned, self.memory)
        self._even = EvenActivations(self._model) if deterministic else None
        self._n_steps = 0
        self.backend: Backend = make_backend("numba" if deterministic else attention, device)
        self._max_graph_batch = max_graph_batch
        self.graphs: DecodeGraphs | None = None
        mode = "deterministic" if deterministic else f"{self.backend.name}-{self._packing.mode}"
        self.numerics_id = numerics_id(device, self.dtype, mode)
        try:
            filling = skeleton.fill(checkpoint_dir, tensors, self.dtype, device)
            #: Bytes of weights that are not the given tensors but copies of them: in another dtype, or fused.
            self.copied_nbytes = filling.copied_nbytes
            self.memory.reserve(Kind.CONVERTED, self.copied_nbytes, "Serve it in the dtype that its checkpoint is in.")
            self.memory.reserve(Kind.ACTIVATIONS, self._activation_nbytes(max_running, max_batch_tokens), _SMALLER_STEPS)
            self.n_blocks = self._choose_n_blocks(kv_memory, max_running)
            self.make_cache()
            if wait is not None:
                place = skeleton.place
                self._gate = ArrivalGate(filling, wait, self._convert, place, str(checkpoint_dir), self._pack, device)
            else:
                skeleton.place_all(filling, self._convert)
                for module in filling.modules:
                    self._pack(module)
            self.build_times = BuildTimes(construct_s, time.perf_counter() - started, None)
            if wait is None:
                self.settle()
        except BaseException:
            self.close()
            raise

    @property
    def packed_nbytes(self) -> int:
        """Bytes of packed weights."""
        return self._packer.nbytes

    @property
    def kv_nbytes(self) -> int:
        """Bytes of the KV cache that is there, the block that belongs to nobody included."""
        return (self.n_blocks + 1) * self.bytes_per_block if self.caches else 0

    @property
    def model(self) -> torch.nn.Module:
        return cast(torch.nn.Module, self._model)

    @property
    def settled(self) -> bool:
        """Whether all weights have arrived and been checked, and nothing waits any more."""
        return self._checked and self._gate is None

    def settle(self) -> None:
        """Check the first layers, once they are there, and let go of what holds the others back, if they are there by then.

        Raises :class:`UnsupportedArchitecture`, or what the load has failed of.
        """
        if self._gate is not None and self._gate.ended:
            self._gate.raise_failure()
        if not self._checked:
            try:
                self._check_first_layers()
            except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
                raise UnsupportedArchitecture(self.family.architecture, f"its forward pass fails ({error})") from error
            if self._deterministic:
                self._check_determinism()
            self._checked = True
        if self._gate is not None and self._gate.ended:
            self._gate.raise_failure()
            self._gate.close()
            self._gate = None

    def on_arrival(self, callback: Callable[[], None]) -> None:
        """Call `callback` once, on any thread, when all weights have arrived or the load has failed."""
        if self._gate is not None:
            self._gate.on_end(callback)

    def interrupt(self) -> None:
        """Make a forward pass that waits for weights raise :class:`Cancelled`. From any thread."""
        gate = self._gate
        if gate is not None:
            gate.cancel()

    @torch.inference_mode()
    def forward(self, chunks: Sequence[Chunk], n_rows: Sequence[int] | None = None) -> Tensor:
        """Compute the chunks' tokens into the cache; returns logits (n, vocab), one row for each chunk that samples, in order.

        `n_rows`: of how many of its last tokens each chunk gives a row, where it is not that.
        """
        self._pack_when_hot()
        ids: list[int] = []
        positions: list[int] = []
        spans: list[Span] = []
        tables: list[np.ndarray[Any, Any]] = []
        last_rows: list[int] = []
        adapted: list[tuple[bytes, int, int]] = []
        for i, chunk in enumerate(chunks):
            ids += chunk.sequence.token_ids(chunk.start, chunk.stop)
            positions += range(chunk.start, chunk.stop)
            blocks, slots = self._tables.find(chunk.sequence, chunk.sequence.block_table, chunk.stop)
            spans.append(Span(len(ids) - chunk.n_tokens, len(ids), chunk.start, slots, self.device))
            tables.append(blocks)
            n = n_rows[i] if n_rows else int(chunk.samples)
            last_rows += range(len(ids) - n, len(ids))
            adapted.append((chunk.sequence.salt, chunk.n_tokens, n))
        batch = PackedBatch(spans, tables, self.block_size, self.device)
        # A recording has no adapters in it.
        plain = not any(salt for salt, _, _ in adapted)
        if plain and self.graphs is not None and self.settled and batch.max_rows == 1 and len(last_rows) == len(ids):
            logits = self.graphs.run(ids, positions, batch)
            if logits is not None:
                return logits
        with self.adapters.applied(adapted):
            return self._run(StepInputs(ids, positions, batch, last_rows))

    def close(self) -> None:
        """Let go of every tensor: the host memory behind the parameters may be used for something else now."""
        if self._gate is not None:
            self._gate.close()
            self._gate = None
        self.adapters.close()
        self._close_graphs()
        self._packer.close()
        if self._even is not None:
            self._even.close()
        self.backend.close()
        self._skeleton.empty()
        self.caches.clear()
        self._memory.clear()
        self._tables.clear()
        self._owned.clear()
        self.give_back()
        # What else there is belongs to whoever opened the account.
        self.memory.clear(Kind.CONVERTED, Kind.PACKED, Kind.ADAPTERS, Kind.KV, Kind.ACTIVATIONS)

    def give_back(self) -> None:
        """Let others have the memory that torch keeps for later."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _activation_nbytes(self, max_running: int, max_batch_tokens: int) -> int:
        text_config = self._model.config.get_text_config()
        return activation_nbytes(
            self._skeleton.decoder_layers,
            n_tokens=max_batch_tokens,
            n_logits=max_running,
            vocab_size=self.vocab_size,
            itemsize=self.dtype.itemsize,
            n_experts=getattr(text_config, "num_experts_per_tok", None) or 1,
        )

    def _choose_n_blocks(self, kv_memory: int | Literal["auto"], max_running: int) -> int:
        """Raises :class:`ConfigError` if `kv_memory` holds no block, :class:`InsufficientMemory` if ``auto`` finds too little."""
        nbytes = self.bytes_per_block
        if kv_memory != "auto":
            if kv_memory < 2 * nbytes:
                least = f"this model needs {format_bytes(2 * nbytes)} at least"
                raise ConfigError(f"engine.kv_memory is {format_bytes(kv_memory)}, but {least}", "kv_memory")
            return kv_memory // nbytes - 1
        # Converted weights and activations are in the books, and not in use yet.
        asked = self.memory.held(Kind.CONVERTED) + self.memory.held(Kind.ACTIVATIONS)
        there = max(0, int(_USED_OF_FREE * (device_memory(self.device)[0] - asked)))
        free = min(self.memory.ledger.free, there)
        # Packed weights take the place of converted ones.
        fair = self.memory.fair - max(0, self._packer.expected_nbytes(self.dtype) - self.copied_nbytes)
        if self.device.type == "cpu":
            fair = min(fair, there // self.memory.ledger.n_shares // _KV_PART)
        n_blocks = kv_blocks(
            bytes_per_block=nbytes,
            block_size=self.block_size,
            max_model_len=self.family.max_model_len,
            max_running=max_running,
            fair_nbytes=fair,
            free_nbytes=free,
        )
        if not n_blocks:
            window = least_window(self.family.max_model_len)
            needed = (blocks_for(window, self.block_size) + 1) * nbytes
            advice = (
                f"Its KV cache must hold one request of {window:,} tokens. For shorter ones set engine.kv_memory to what there "
                "is, or unload another model of this worker."
            )
            raise InsufficientMemory(self.memory.model, needed, free, advice)
        return n_blocks

    def _convert(self, piece: Piece) -> None:
        converted = piece.tensor.to(self.device, piece.dtype)
        self._skeleton.place(converted, piece.names)
        if len(piece.names) == 1:
            self._owned.add(converted.data_ptr())

    def _choose_packing(self, packing: Packing) -> Packing:
        """What of `packing` can be had on this device. Raises what the deterministic mode is refused with."""
        if self._deterministic:
            if self.device.type != "cpu":
                raise DeterminismUnavailable(f"{self.device.type} chooses its kernels by the size of the batch")
            refuse_batch_dependence(self._skeleton)
            if not can_pack(self.dtype):
                raise DeterminismUnavailable(f"torch cannot pack weights of {self.dtype} on this processor")
            return replace(packing, mode="always", invariant=True)
        if self.device.type != "cpu" or packing.mode == "never" or not can_pack(self.dtype):
            return replace(packing, mode="never")
        return packing

    def _pack(self, module: torch.nn.Module) -> None:
        """Pack what is to be packed before `module` runs for the first time."""
        if self._packing.mode == "always":
            self._packer.pack(module)

    def _pack_when_hot(self) -> None:
        """Begin to pack, once that pays, and use what has been packed since the last step."""
        if self._packing.mode != "auto":
            return
        self._n_steps += 1
        if self._n_steps > self._packing.after_steps and self.settled:
            self._packer.start()
            self._packer.install()

    def _run(self, step: StepInputs) -> Tensor:
        with attending(PagedBatch(self.caches, step.batch, self.backend)):
            output = self._model(
                input_ids=torch.tensor([step.ids], device=self.device),
                position_ids=torch.tensor([step.positions], device=self.device),
                use_cache=False,
                logits_to_keep=torch.tensor(step.rows, dtype=torch.long, device=self.device),
            )
        return cast(Tensor, output.logits)[0]

    def _make_graphs(self) -> DecodeGraphs | None:
        """Only Triton's backend reads nothing back from the device, so only its steps can be recorded.

        Rotary frequencies that depend on the positions do read them.
        """
        if not self._max_graph_batch or self.backend.name != "triton" or self.family.long_after is not None:
            return None
        longest = min(self.family.max_model_len, self.n_blocks * self.block_size)
        return DecodeGraphs(
            self._run_decode,
            max_running=self._max_graph_batch,
            max_blocks=blocks_for(longest, self.block_size),
            block_size=self.block_size,
            device=self.device,
        )

    def _close_graphs(self) -> None:
        if self.graphs is not None:
            self.graphs.close()
            self.graphs = None

    def _run_decode(self, inputs: DecodeInputs) -> Tensor:
        # To Triton's backend they are a packed batch: it looks at nothing that they lack.
        with attending(PagedBatch(self.caches, cast(PackedBatch, inputs), self.backend)):
            output = self._model(input_ids=inputs.ids, position_ids=inputs.positions, use_cache=False, logits_to_keep=inputs.rows)
        return cast(Tensor, output.logits)[0]

    def _run_alone(self, ids: list[int], start: int, stop: int, rows: list[int]) -> Tensor:
        """Tokens `start`..`stop` of a sequence that has the cache to itself, in blocks from its end."""
        blocks = np.arange(blocks_for(len(ids), self.block_size), 0, -1, dtype=np.int64)
        slots = torch.from_numpy((blocks[:, None] * self.block_size + np.arange(self.block_size)).ravel()[:stop])
        table = blocks[: blocks_for(stop, self.block_size)].astype(np.int32)
        batch = PackedBatch([Span(0, stop - start, start, slots, self.device)], [table], self.block_size, self.device)
        return self._run(StepInputs(ids[start:stop], list(range(start, stop)), batch, rows))

    def _check_first_layers(self) -> None:
        """Compare the attention over the cache, in two chunks, with transformers' own eager attention, in one layer of each kind.

        Finds a configuration under which an architecture does something else than we think, and memory that nobody filled. What
        follows the attention that it looks at is not run, so that little memory is touched.
        """
        started, waited_s = time.perf_counter(), self._gate.waited_s if self._gate else 0.0
        modules = self._skeleton.checked[:_N_CHECKED_KINDS]
        n_tokens = min(_N_CHECKED_TOKENS, self.n_blocks * self.block_size, self.family.max_model_len)
        ids = [(7 * i + 1) % self.vocab_size for i in range(n_tokens)]
        with torch.inference_mode(), self._skeleton.one_of_each_kind():
            paged = self._paged_outputs(modules, ids)
            plain = self._plain_outputs(modules, ids)
        tolerance = 1e-3 if self.dtype == torch.float32 else 0.15
        for layer, found, expected in zip(self._skeleton.kinds, paged, plain, strict=False):
            error = float(torch.linalg.vector_norm((found - expected).float()) / torch.linalg.vector_norm(expected.float()))
            if not error <= tolerance:  # so that NaN fails
                reason = (
                    f"with this config.json, layer {layer} over the paged cache differs from transformers' own by {error:.2g}"
                )
                raise UnsupportedArchitecture(self.family.architecture, reason)
        waited_s = (self._gate.waited_s if self._gate else 0.0) - waited_s
        self.build_times = replace(self.build_times, check_s=time.perf_counter() - started - waited_s)

    def _paged_outputs(self, modules: Sequence[torch.nn.Module], ids: list[int]) -> list[Tensor]:
        # A prompt, a chunk after it, and a token alone: they may run different code.
        cuts = sorted({0, len(ids) // 2, max(len(ids) - 1, 0), len(ids)})
        chunks: list[list[Tensor]] = []
        for start, stop in pairwise(cuts):
            with first_outputs(modules) as outputs:
                self._run_alone(ids, start, stop, [0])
            chunks.append(outputs)
        return [torch.cat(parts, dim=1) for parts in zip(*chunks, strict=True)]

    def _check_determinism(self) -> None:
        """Compute logits of a few tokens together, in chunks, and one by one, through one layer of each kind: with equal bits.

        Raises :class:`DeterminismUnavailable`.
        """
        n_rows = min(_N_COMPARED_ROWS, self.n_blocks * self.block_size, self.family.max_model_len)
        cuts = sorted({min(row, n_rows) for row in (0, 2, 5, 9, _N_COMPARED_ROWS)})
        ids = [(11 * i + 3) % self.vocab_size for i in range(n_rows)]
        with torch.inference_mode(), self._skeleton.one_of_each_kind():
            together = self._run_alone(ids, 0, n_rows, list(range(n_rows)))
            cut = torch.cat([self._run_alone(ids, start, stop, list(range(stop - start))) for start, stop in pairwise(cuts)])
            alone = torch.cat([self._run_alone(ids, row, row + 1, [0]) for row in range(n_rows)])
        if self._packer.full:
            raise DeterminismUnavailable(
                "not all packed weights fit into engine.pack_memory beside the plain ones, or into what the worker's models leave"
            )
        one, others = together.view(torch.uint8), (cut.view(torch.uint8), alone.view(torch.uint8))
        n_different = max(int((one != other).any(dim=-1).sum()) for other in others)
        if n_different:
            reason = f"on this processor {n_different} of {n_rows} rows have other bits alone than together"
            raise DeterminismUnavailable(reason)

    def _plain_outputs(self, modules: Sequence[torch.nn.Module], ids: list[int]) -> list[Tensor]:
        self._model.set_attn_implementation("eager")
        try:
            with first_outputs(modules) as outputs:
                self._model(input_ids=torch.tensor([ids], device=self.device), use_cache=False)
        finally:
            self._model.set_attn_implementation(NAME)
        return outputs

    # --- blocks of the cache as bytes --------------------------------------------------------------------------------------

    @torch.inference_mode()
    def copy_blocks(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Block ``targets[i]`` gets the content of ``sources[i]``; no block is in both."""
        at, to = (torch.tensor(blocks, dtype=torch.long, device=self.device) for blocks in (sources, targets))
        for cache in self._parts():
            cache.index_copy_(0, to, cache.index_select(0, at))

    @torch.inference_mode()
    def read_blocks(self, blocks: Sequence[int]) -> Tensor:
        """(len(blocks), bytes_per_block) bytes in host memory: layer by layer, keys before values, token by token."""
        index = torch.tensor(blocks, dtype=torch.long, device=self.device)
        parts = [cache.index_select(0, index).flatten(1).view(torch.uint8) for cache in self._parts()]
        return torch.cat(parts, dim=1).cpu()

    @torch.inference_mode()
    def write_blocks(self, blocks: Sequence[int], rows: Tensor) -> None:
        """Put back what :meth:`read_blocks` gave, into any blocks."""
        index, offset = torch.tensor(blocks, dtype=torch.long, device=self.device), 0
        for cache in self._parts():
            nbytes = cache[0].nbytes
            part = rows[:, offset : offset + nbytes].clone(memory_format=torch.contiguous_format)
            cache.index_copy_(0, index, part.view(cache.dtype).view(len(blocks), *cache.shape[1:]).to(self.device))
            offset += nbytes

    @torch.inference_mode()
    def read_tokens(self, slots: Sequence[int]) -> bytes:
        """The KV in `slots`: layer by layer, keys before values, token by token."""
        if self._few(slots):
            return b"".join(memory[slots[0] * nbytes : (slots[-1] + 1) * nbytes] for memory, nbytes in self._memory)
        index = torch.tensor(slots, dtype=torch.long, device=self.device)
        parts = [cache.flatten(0, 1).index_select(0, index).flatten() for cache in self._parts()]
        return torch.cat(parts).view(torch.uint8).cpu().numpy().tobytes()

    def tokens_in(self, rows: Tensor, start: int, stop: int) -> bytes:
        """What :meth:`read_tokens` gives, of tokens `start` to `stop` of `rows` of :meth:`read_blocks`."""
        parts, offset = [], 0
        for cache in self._parts():
            part = rows[:, offset : offset + cache[0].nbytes].reshape(-1, cache[0, 0].nbytes)
            parts.append(part[start:stop].flatten())
            offset += cache[0].nbytes
        return torch.cat(parts).numpy().tobytes()

    @torch.inference_mode()
    def write_tokens(self, slots: Sequence[int], data: bytes | bytearray, n_tokens: int) -> None:
        """Put KV into `slots`: of the last tokens of `data`, which :meth:`read_tokens` of some engine gave for `n_tokens`."""
        skip, offset = n_tokens - len(slots), 0
        if self._few(slots):
            given = memoryview(data)
            for memory, nbytes in self._memory:
                end = offset + n_tokens * nbytes
                memory[slots[0] * nbytes : (slots[-1] + 1) * nbytes] = given[offset + skip * nbytes : end]
                offset = end
            return
        index = torch.tensor(slots, dtype=torch.long, device=self.device)
        # Memory that may be written, as torch wants it; what came over a connection is.
        flat = torch.frombuffer(data if isinstance(data, bytearray) else bytearray(data), dtype=torch.uint8)
        for cache in self._parts():
            end = offset + n_tokens * cache[0, 0].nbytes
            tokens = flat[offset:end].view(cache.dtype).view(n_tokens, *cache.shape[2:])
            cache.flatten(0, 1).index_copy_(0, index, tokens[skip:].to(self.device))
            offset = end

    def _few(self, slots: Sequence[int]) -> bool:
        """Whether `slots` are some in a row in the memory of this process: these are quicker copied than found by torch."""
        n_slots = len(slots)
        return bool(self._memory) and n_slots <= self.block_size and slots == list(range(slots[0], slots[0] + n_slots))

    def drop_cache(self) -> None:
        """Give the cache's memory back. Nothing runs until :meth:`make_cache`."""
        # Their kernels were recorded with its addresses.
        self._close_graphs()
        self.caches.clear()
        self._memory.clear()
        self.give_back()
        self.memory.clear(Kind.KV)

    def make_cache(self) -> None:
        """A cache of `n_blocks`, of zeros; again after :meth:`drop_cache`. Raises :class:`InsufficientMemory`."""
        if self.caches:
            return
        nbytes = (self.n_blocks + 1) * self.bytes_per_block
        self.memory.reserve(Kind.KV, nbytes, _SMALLER_KV)
        there = False
        with suppress(MemoryError, OSError, torch.OutOfMemoryError):
            self.caches += _make_caches(self.layers, (self.n_blocks + 1, self.block_size), self.dtype, self.device)
            if self.device.type == "cpu":
                self._memory += [(_memory(cache), cache[0, 0].nbytes) for cache in self._parts()]
            there = True
        if not there:
            # Whatever there is of it: else it would be there and in no books.
            self.caches.clear()
            self._memory.clear()
            self.memory.release(Kind.KV, nbytes)
            raise InsufficientMemory(self.memory.model, nbytes, device_memory(self.device)[0], _SMALLER_KV)
        self.graphs = self._make_graphs()

    def _parts(self) -> Iterator[Tensor]:
        """(n_blocks + 1, block_size, n_kv_heads, dim) for each layer, keys, then values."""
        return (cache for layer in self.caches for cache in layer)


def _memory(cache: Tensor) -> memoryview:
    """The bytes of a tensor in the memory of this process."""
    data: Any = cache.view(torch.uint8).numpy()
    return memoryview(data).cast("B")


def pick_device(name: str) -> torch.device:
    """``auto``, ``cpu`` or ``cuda`` as a device. Raises :class:`ConfigError` if there is no such device."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("engine.device is 'cuda', but torch sees no GPU here", "device")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _make_caches(
    layers: Sequence[LayerShape], shape: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> list[tuple[Tensor, Tensor]]:
    """Zeros for keys and values of each layer, `shape` being (n_blocks, block_size).

    On the CPU they are one fresh mapping: its pages are taken when they are first written, and small ones, since a huge page is
    cleared as a whole for the few tokens of it that a short answer needs.
    """
    sizes = [(layer.n_kv_heads, dim) for layer in layers for dim in (layer.key_dim, layer.value_dim)]
    counts = [math.prod(shape) * n_heads * dim for n_heads, dim in sizes]
    if device.type == "cpu":
        flat = torch.frombuffer(mmap.mmap(-1, sum(counts) * dtype.itemsize, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=dtype)
    else:
        flat = torch.zeros(sum(counts), dtype=dtype, device=device)
    caches = iter([part.view(*shape, *size) for part, size in zip(flat.split(counts), sizes, strict=True)])
    return list(zip(caches, caches, strict=True))


class _SeenEnough(Exception):
    """Ends a forward pass early."""


@contextmanager
def first_outputs(modules: Sequence[torch.nn.Module]) -> Iterator[list[Tensor]]:
    """Collects the first output of each of `modules` inside the block, and ends the block after the last of them."""
    outputs: list[Tensor] = []

    def note(_module: torch.nn.Module, _inputs: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)
        if len(outputs) == len(modules):
            raise _SeenEnough

    handles = [module.register_forward_hook(note) for module in modules]
    try:
        with suppress(_SeenEnough):
            yield outputs
    finally:
        for handle in handles:
            handle.remove()
