"""Embeddings: an unmodified transformers model over packed inputs, without a KV cache, and the pooling of its hidden states.

Inputs of different lengths stand one behind the other in one row, as in :mod:`sllmdask.engine.runner`: no padding is computed.
The attention goes through transformers' attention interface, too, by a context that lets each input see itself alone, causally or
both ways as the model's modules say. Architectures that are off the interface run inputs of equal length together.

Source of the pooling: sentence-transformers (Reimers and Gurevych, EMNLP '19); of shortened vectors: Matryoshka representation
learning (NeurIPS '22).
"""

from __future__ import annotations

import inspect
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn.functional import normalize, scaled_dot_product_attention

from sllmdask.batching.memory import Kind, MemoryAccount
from sllmdask.batching.params import SamplingParams
from sllmdask.batching.protocol import StepOutput, StepStats
from sllmdask.batching.sequence import FinishReason, Sequence
from sllmdask.config import EngineSettings
from sllmdask.engine.attention import NAME, AttentionOptions, Others, attending
from sllmdask.engine.construct import (
    BuildTimes,
    Skeleton,
    SkeletonShelf,
    _compute_buffers,
    _config_key,
    _decoder_layers,
    _kinds,
    _nothing_depends_on_values,
    _places,
    _stages,
    _tied_groups,
    _WithoutInitialisation,
    serving_dtype,
)
from sllmdask.engine.engine import _STEP_FAILURES
from sllmdask.engine.families import read_config
from sllmdask.engine.pooling import EmbeddingInfo, inspect_embedding
from sllmdask.engine.runner import pick_device
from sllmdask.engine.shortage import is_shortage, not_enough
from sllmdask.engine.sizing import activation_nbytes, own_ledger
from sllmdask.errors import ContextTooLong, EngineError, InstanceGone, InvalidRequest, SllmError, UnsupportedArchitecture

log = logging.getLogger(__name__)

#: Arguments of the attention interface that change nothing here.
_HARMLESS = frozenset(
    {
        "cache_position",
        "deterministic",
        "dropout",
        "is_causal",
        "output_attentions",
        "output_hidden_states",
        "position_ids",
        "use_cache",
    }
)
_NO_TEXT = "This is an embedding model: it does not generate text. Send the input to /v1/embeddings."
#: Two inputs that are compared with transformers' own attention before the model answers.
_CHECKED_LENGTHS = (5, 3)


@dataclass(eq=False)
class EmbeddingSequence(Sequence):
    """One input of an embedding request: `prompt_ids`, of which one vector is made.

    `dimensions`: only that many numbers of the vector, from the first; ``None``: all.
    """

    dimensions: int | None = None


@dataclass(frozen=True)
class EmbeddingOutput(StepOutput):
    """The vector of one input, as little-endian float32 bytes."""

    vector: bytes = b""


# --- the model -------------------------------------------------------------------------------------------------------


class PackedInputs:
    """The attention of one batch: each of the inputs, whose `lengths` add up to the batch's tokens, sees itself alone."""

    def __init__(self, lengths: Iterable[int]) -> None:
        self._spans: list[tuple[int, int]] = []
        stop = 0
        for length in lengths:
            self._spans.append((stop, stop + length))
            stop += length
        self._masks: dict[tuple[int, bool, int], Tensor] = {}
        #: What would change the result and is not implemented.
        self.unknown: set[str] = set()
        self.n_calls = 0

    def attend(
        self, module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions, others: Others
    ) -> Tensor:
        """As :meth:`~sllmdask.engine.attention.AttentionContext.attend`: (1, H, T, D) each -> (1, T, Hq, Dv)."""
        self.n_calls += 1
        self.unknown |= {name for name, given in others.items() if given is not None and name not in _HARMLESS}
        if options.sinks is not None:
            self.unknown.add("attention sinks")
        causal = _is_causal(module) and others.get("is_causal") is not False
        n_repeats = query.shape[1] // key.shape[1]
        if n_repeats > 1:
            key, value = (part.repeat_interleave(n_repeats, 1) for part in (key, value))
        output = query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])
        for start, stop in self._spans:
            q, k, v = (part[:, :, start:stop] for part in (query, key, value))
            output[:, start:stop] = self._attend(q, k, v, options, causal).transpose(1, 2)
        return output

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions, causal: bool) -> Tensor:
        length, window = query.shape[2], options.sliding_window
        mask = None if window is None or length <= window else self._mask(length, causal, window, query.device)
        if options.softcap is None:
            return scaled_dot_product_attention(
                query, key, value, attn_mask=mask, is_causal=causal and mask is None, scale=options.scaling
            )
        scores = torch.matmul(query, key.transpose(2, 3)) * options.scaling
        scores = options.softcap * torch.tanh(scores / options.softcap)
        if mask is None and causal:
            mask = self._mask(length, causal, length, query.device)
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        return torch.matmul(torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype), value)

    def _mask(self, length: int, causal: bool, window: int, device: torch.device) -> Tensor:
        """(length, length), true where a row sees a token: less than `window` tokens away, before it only if `causal`."""
        if (length, causal, window) not in self._masks:
            ids = torch.arange(length, device=device)
            distance = ids[:, None] - ids
            near = distance.abs() < window
            self._masks[length, causal, window] = near & (distance >= 0) if causal else near
        return self._masks[length, causal, window]


def _is_causal(module: torch.nn.Module) -> bool:
    """As transformers decides: the module, or the whole configuration, may say that tokens see those behind them, too."""
    config = getattr(module, "config", None)
    return bool(getattr(module, "is_causal", True)) and bool(getattr(config, "is_causal", True))


class EmbeddingSkeleton(Skeleton):
    """The model of an embedding checkpoint without its head and its weights."""

    def __init__(self, info: EmbeddingInfo, model: Any, key: str) -> None:
        """Raises :class:`UnsupportedArchitecture` if its attention asks for what is not implemented."""
        # Not Skeleton's own: that looks for a causal model's caches.
        self.info = info
        self.model = model
        self.key = key
        self.arguments = frozenset(inspect.signature(model.forward).parameters)
        self._places = _places(model)
        self._tied = _tied_groups(model)
        self._layers = _decoder_layers(model)
        self._kind_of = _kinds(self._layers)
        self.kinds = sorted(set(self._kind_of))
        self._stages = _stages(model, [], [])
        self._probe_inputs()
        self._computed = _compute_buffers(model)
        self.vocab_size = int(model.get_input_embeddings().weight.shape[0])

    @torch.no_grad()
    def _probe_inputs(self) -> None:
        probe = PackedInputs([2])
        ids = torch.zeros((1, 2), dtype=torch.long, device="meta")
        arguments = {"position_ids": torch.zeros_like(ids)} if self.info.packs else {}
        try:
            with attending(probe), _nothing_depends_on_values(self.model):
                self.model(input_ids=ids, **arguments, **_without_cache(self.info))
        except (NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            reason = f"its forward pass cannot be looked through ({error})"
            raise UnsupportedArchitecture(self.info.architecture, reason) from error
        if probe.unknown:
            reason = f"its attention needs {', '.join(sorted(probe.unknown))}, which the engine does not have"
            raise UnsupportedArchitecture(self.info.architecture, reason)
        if self.info.packs and probe.n_calls != int(self.model.config.num_hidden_layers):
            reason = f"{probe.n_calls} of its {self.model.config.num_hidden_layers} layers use transformers' attention interface"
            raise UnsupportedArchitecture(self.info.architecture, reason)


def build_embedding_skeleton(
    checkpoint_dir: Path, pooling: str | None = None, normalize: bool | None = None, *, shelf: SkeletonShelf | None = None
) -> EmbeddingSkeleton:
    """The model in `checkpoint_dir` without its head and its weights: one from `shelf`, or a new one.

    Raises :class:`UnsupportedArchitecture`, and what :func:`~sllmdask.engine.pooling.inspect_embedding` raises.
    """
    config = read_config(checkpoint_dir)
    info = inspect_embedding(checkpoint_dir, config, pooling, normalize)
    key = _config_key({"config": config, "embedding": info.as_wire()})
    found = None if shelf is None else shelf.spare(key)
    return found if isinstance(found, EmbeddingSkeleton) else _build(info, config, key)


def _build(info: EmbeddingInfo, config: Mapping[str, Any], key: str) -> EmbeddingSkeleton:
    try:
        model_config = transformers.CONFIG_MAPPING[info.model_type].from_dict(dict(config))
        model_config._attn_implementation = NAME if info.packs else "eager"
        found = transformers.AutoModel._model_mapping[type(model_config)]
        model_class = found[0] if isinstance(found, list | tuple) else found
        # What it makes of the first token is none of the ways of pooling.
        extra = {"add_pooling_layer": False} if "add_pooling_layer" in inspect.signature(model_class).parameters else {}
        with torch.device("meta"), _WithoutInitialisation():
            model = model_class(model_config, **extra).eval().requires_grad_(False)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UnsupportedArchitecture(info.architecture, f"transformers refuses its config.json ({error})") from error
    if not info.is_encoder:  # nothing is padded here; see build_skeleton
        model.config.get_text_config().pad_token_id = None
    return EmbeddingSkeleton(info, model, key)


class EmbeddingRunner:
    """An embedding model on one device. Used by one thread at a time.

    `skeleton` is the runner's own until :meth:`close`; on the CPU its parameters are `tensors` where the dtype agrees.
    """

    def __init__(
        self,
        skeleton: EmbeddingSkeleton,
        checkpoint_dir: Path,
        tensors: Mapping[str, Tensor],
        *,
        device: torch.device,
        dtype: str = "auto",
        construct_s: float = 0.0,
        max_batch_tokens: int = 512,
        memory: MemoryAccount | None = None,
    ) -> None:
        """Raises :class:`CheckpointError` if the model cannot be run, :class:`InsufficientMemory`.

        `memory`: where all memory is asked for that the runner takes; by default, most of what is free now.
        """
        started = time.perf_counter()
        self.info = skeleton.info
        self.device = device
        self.dtype = serving_dtype(checkpoint_dir, tensors, device, dtype)
        self.vocab_size = skeleton.vocab_size
        self.memory = own_ledger(device).account(checkpoint_dir.name) if memory is None else memory
        self._skeleton = skeleton
        self._model = skeleton.model
        # RoBERTa's way: a padding token among the ids keeps the padding's position and is not counted.
        padding = getattr(getattr(self._model, "embeddings", None), "padding_idx", None)
        self._padding: int | None = None if padding is None else int(padding)
        try:
            filling = skeleton.fill(
                checkpoint_dir, {_modern(name): tensor for name, tensor in tensors.items()}, self.dtype, device
            )
            self.memory.reserve(Kind.CONVERTED, filling.copied_nbytes, "Serve it in the dtype that its checkpoint is in.")
            step = activation_nbytes(
                skeleton.decoder_layers or (self._model,),
                n_tokens=max_batch_tokens,
                n_logits=0,
                vocab_size=0,
                itemsize=self.dtype.itemsize,
            )
            self.memory.reserve(Kind.ACTIVATIONS, step, "Lower engine.max_batch_tokens, or unload another model of this worker.")
            skeleton.place_all(filling, lambda piece: skeleton.place(piece.tensor.to(device, piece.dtype), piece.names))
            assigned = time.perf_counter()
            if self.info.packs:
                self._check()
        except BaseException:
            self.close()
            raise
        self.build_times = BuildTimes(construct_s, assigned - started, time.perf_counter() - assigned)

    @property
    def model(self) -> torch.nn.Module:
        model: torch.nn.Module = self._model
        return model

    @torch.inference_mode()
    def embed(self, inputs: Seq[Seq[int]]) -> Tensor:
        """(n, dimensions) float32 on the CPU: the pooled hidden states of each input, not normalised.

        Inputs of different lengths only where :attr:`EmbeddingInfo.packs` says so.
        """
        if self.info.packs:
            hidden = self._run_packed(inputs)[0]
            states = hidden.split([len(ids) for ids in inputs])
        else:
            ids = torch.tensor([list(ids) for ids in inputs], device=self.device)
            states = self._model(input_ids=ids, **_without_cache(self.info)).last_hidden_state.unbind()
        return torch.stack([_pool(state.float(), self.info.pooling) for state in states]).cpu()

    def close(self) -> None:
        """Let go of every tensor: the host memory behind the parameters may be used for something else now."""
        self._skeleton.empty()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.memory.clear(Kind.CONVERTED, Kind.ACTIVATIONS)

    def _run_packed(self, inputs: Seq[Seq[int]]) -> Tensor:
        ids = torch.tensor([[token for one in inputs for token in one]], device=self.device)
        positions = torch.cat([self._positions(one) for one in inputs])[None].to(self.device)
        with attending(PackedInputs(len(one) for one in inputs)):
            output = self._model(input_ids=ids, position_ids=positions, **_without_cache(self.info))
        hidden: Tensor = output.last_hidden_state
        return hidden

    def _positions(self, ids: Seq[int]) -> Tensor:
        if self._padding is None:
            return torch.arange(len(ids))
        counted = torch.tensor(ids) != self._padding
        return counted.cumsum(0) * counted + self._padding

    def _check(self) -> None:
        """Compare two packed inputs with transformers' own eager attention over each alone, up to the last kind of layer.

        Finds a configuration under which an architecture does something else than we think, and memory that nobody filled.
        """
        lengths = [min(length, self.info.max_model_len) for length in _CHECKED_LENGTHS]
        inputs = [[(7 * (i + length) + 1) % self.vocab_size for i in range(length)] for length in lengths]
        layers = self._skeleton._layers
        last = layers[self._skeleton.kinds[-1]] if layers else self._model
        with torch.inference_mode():
            packed = _output_of(last, lambda: self._run_packed(inputs))
            self._model.set_attn_implementation("eager")
            try:
                plain = [_output_of(last, partial(self._model, torch.tensor([ids], device=self.device))) for ids in inputs]
            finally:
                self._model.set_attn_implementation(NAME)
        expected = torch.cat(plain, dim=1).float()
        error = float(torch.linalg.vector_norm(packed.float() - expected) / torch.linalg.vector_norm(expected))
        if not error <= (1e-3 if self.dtype == torch.float32 else 0.15):  # so that NaN fails
            reason = f"with this config.json, packed inputs differ from transformers' own results by {error:.2g}"
            raise UnsupportedArchitecture(self.info.architecture, reason)


def _without_cache(info: EmbeddingInfo) -> dict[str, Any]:
    """Decoders would keep a cache that nobody reads; not all encoders know the argument."""
    return {} if info.is_encoder else {"use_cache": False}


def _modern(name: str) -> str:
    """TensorFlow's names of a norm's parameters, which old checkpoints keep."""
    for old, new in ((".gamma", ".weight"), (".beta", ".bias")):
        if name.endswith(f"LayerNorm{old}"):
            return name.removesuffix(old) + new
    return name


class _SeenEnough(Exception):
    """Ends a forward pass early."""


def _output_of(module: torch.nn.Module, run: Callable[[], Any]) -> Tensor:
    """The first output of `module` while `run` is under way, which ends there."""
    outputs: list[Tensor] = []

    def note(_module: torch.nn.Module, _inputs: Any, output: Any) -> None:
        outputs.append(output if isinstance(output, Tensor) else output[0])
        raise _SeenEnough

    handle = module.register_forward_hook(note)
    try:
        run()
    except _SeenEnough:
        pass
    finally:
        handle.remove()
    return outputs[0]


def _pool(states: Tensor, modes: Seq[str]) -> Tensor:
    """(T, H) hidden states of one input -> (H * len(modes),)."""
    length = states.shape[0]
    ways: dict[str, Callable[[], Tensor]] = {
        "cls": lambda: states[0],
        "max": lambda: states.amax(0),
        "mean": lambda: states.mean(0),
        "mean_sqrt_len": lambda: states.sum(0) / math.sqrt(length),
        "weightedmean": lambda: _weights(length, states.device) @ states,
        "last": lambda: states[-1],
    }
    return torch.cat([ways[mode]() for mode in modes])


def _weights(length: int, device: torch.device) -> Tensor:
    """1, 2, 3... over their sum. Source: SGPT (Muennighoff, 2022)."""
    weights = torch.arange(1, length + 1, device=device, dtype=torch.float32)
    return weights / weights.sum()


# --- the engine ------------------------------------------------------------------------------------------------------


def build_embedding_engine(
    checkpoint_dir: Path,
    tensors: Mapping[str, Tensor],
    settings: EngineSettings,
    *,
    pooling: str | None = None,
    normalize: bool | None = None,
    skeleton: EmbeddingSkeleton | None = None,
    memory: MemoryAccount | None = None,
) -> EmbeddingEngine:
    """The embedding engine of the model in `checkpoint_dir`, with `tensors`, all of them there, by their names in it.

    `pooling` and `normalize` as in :func:`~sllmdask.engine.pooling.inspect_embedding`. On the CPU the parameters are `tensors`
    themselves where the dtype agrees: their memory must stay until :meth:`EmbeddingEngine.close`. Raises
    :class:`CheckpointNotFound`, :class:`CheckpointCorrupt`, :class:`UnsupportedArchitecture`, :class:`ConfigError` or
    :class:`InsufficientMemory`. `memory` as in :func:`~sllmdask.engine.engine.build_engine`.
    """
    started = time.perf_counter()
    made = skeleton or build_embedding_skeleton(checkpoint_dir, pooling, normalize)
    runner = EmbeddingRunner(
        made,
        checkpoint_dir,
        tensors,
        device=pick_device(settings.device),
        dtype=settings.dtype,
        construct_s=time.perf_counter() - started if skeleton is None else 0.0,
        max_batch_tokens=settings.max_batch_tokens,
        memory=memory,
    )
    return EmbeddingEngine(runner, settings)


class EmbeddingEngine:
    """Batches inputs over one :class:`EmbeddingRunner`: an engine whose answers are vectors, one for each request."""

    def __init__(self, runner: EmbeddingRunner, settings: EngineSettings) -> None:
        self.settings = settings
        self._runner = runner
        #: By request id, in the order in which they came.
        self._waiting: dict[str, EmbeddingSequence] = {}
        self._n_steps = 0
        self._step_s = 0.0
        self._first_step_s: float | None = None
        self._n_prompt_tokens = self._n_vectors = 0
        self._closed = False
        #: Called at the end of :meth:`close`.
        self._on_closed: list[Callable[[], None]] = []

    @property
    def info(self) -> EmbeddingInfo:
        return self._runner.info

    @property
    def build_times(self) -> BuildTimes:
        return self._runner.build_times

    @property
    def has_work(self) -> bool:
        return bool(self._waiting)

    @property
    def stalled(self) -> bool:
        """Never: a step needs no memory that somebody else may have."""
        return False

    @property
    def sequences(self) -> tuple[Sequence, ...]:
        """All that wait."""
        return tuple(self._waiting.values())

    def find(self, request_id: str) -> Sequence | None:
        """The input while it waits."""
        return self._waiting.get(request_id)

    def add(self, sequence: Sequence) -> None:
        """Take an input in, or raise :class:`InvalidRequest`, :class:`ContextTooLong` or :class:`InstanceGone`."""
        if self._closed:
            raise InstanceGone("of this engine")
        if not isinstance(sequence, EmbeddingSequence):
            raise InvalidRequest(_NO_TEXT, "model")
        if sequence.request_id in self._waiting:
            raise InvalidRequest(f"Request {sequence.request_id!r} is here already.")
        if not sequence.prompt_ids:
            raise InvalidRequest("The input is empty.", "input")
        if len(sequence.prompt_ids) > self.info.max_model_len:
            raise ContextTooLong(len(sequence.prompt_ids), self.info.max_model_len)
        strange = next((token for token in sequence.prompt_ids if not 0 <= token < self._runner.vocab_size), None)
        if strange is not None:
            n_vocab = self._runner.vocab_size
            raise InvalidRequest(f"Token id {strange} is not in the model's vocabulary of {n_vocab}.", "input")
        if sequence.dimensions is not None and not 1 <= sequence.dimensions <= self.info.dimensions:
            rule = f"between 1 and {self.info.dimensions}, the model's own"
            raise InvalidRequest(f"dimensions must be {rule}, not {sequence.dimensions}.", "dimensions")
        self._waiting[sequence.request_id] = sequence
        self._n_prompt_tokens += len(sequence.prompt_ids)

    def abort(self, request_id: str) -> bool:
        """Drop an input; ``False`` if it is not here. No output says so."""
        return self._waiting.pop(request_id, None) is not None

    def step(self) -> list[StepOutput]:
        """Run one batch. An input that fails ends with an error, and the others go on."""
        started = time.perf_counter()
        batch = self._next_batch()
        outputs: list[StepOutput] = []
        if batch:
            try:
                outputs = self._run(batch)
            except _STEP_FAILURES as error:
                outputs = [self._fail(batch[0], error)] if len(batch) == 1 else self._run_one_by_one(batch)
            for sequence in batch:
                del self._waiting[sequence.request_id]
        seconds = time.perf_counter() - started
        self._n_steps += 1
        self._step_s += seconds
        if batch and self._first_step_s is None:
            self._first_step_s = seconds
        return outputs

    def stats(self) -> StepStats:
        return StepStats(
            n_running=0,
            n_waiting=len(self._waiting),
            n_steps=self._n_steps,
            step_s=self._step_s,
            n_prompt_tokens=self._n_prompt_tokens,
            n_output_tokens=self._n_vectors,
            first_step_s=self._first_step_s,
        )

    def close(self) -> None:
        """Drop all inputs and let go of the model and the tensors that were lent to :func:`build_embedding_engine`."""
        if self._closed:
            return
        self._closed = True
        self._waiting.clear()
        self._runner.close()
        for callback in self._on_closed:
            callback()

    def on_closed(self, callback: Callable[[], None]) -> None:
        """Call `callback` when the engine is closed and holds nothing any more, in the thread that closes it."""
        self._on_closed.append(callback)

    def _next_batch(self) -> list[EmbeddingSequence]:
        """The oldest input, and of the others, oldest first, those that fit beside it into ``max_batch_tokens``.

        So none is overtaken for ever. What cannot be packed is batched by length: inputs as long as the oldest one.
        """
        batch: list[EmbeddingSequence] = []
        budget = self.settings.max_batch_tokens
        for sequence in self._waiting.values():
            length = len(sequence.prompt_ids)
            if batch and (length > budget or not (self.info.packs or length == len(batch[0].prompt_ids))):
                continue
            batch.append(sequence)
            budget -= length
            if budget <= 0:
                break
        return batch

    def _run(self, batch: Seq[EmbeddingSequence]) -> list[StepOutput]:
        pooled = self._runner.embed([sequence.prompt_ids for sequence in batch])
        return [self._accept(sequence, vector) for sequence, vector in zip(batch, pooled, strict=True)]

    def _run_one_by_one(self, batch: Seq[EmbeddingSequence]) -> list[StepOutput]:
        """Run each input alone, to find out whose fault it was."""
        outputs: list[StepOutput] = []
        for sequence in batch:
            try:
                outputs += self._run([sequence])
            except _STEP_FAILURES as error:
                outputs.append(self._fail(sequence, error))
        return outputs

    def _accept(self, sequence: EmbeddingSequence, pooled: Tensor) -> StepOutput:
        vector = pooled[: sequence.dimensions]
        if self.info.normalize:
            vector = normalize(vector, dim=0)
        if not bool(torch.isfinite(vector).all()):
            return self._fail(sequence, ArithmeticError("the model's output is not a number"))
        self._n_vectors += 1
        data = vector.contiguous().numpy().astype("<f4", copy=False).tobytes()
        return EmbeddingOutput(sequence.request_id, 0, None, FinishReason.STOP, vector=data)

    def _fail(self, sequence: Sequence, cause: Exception) -> StepOutput:
        log.error("request failed: request=%s cause=%r", sequence.request_id, cause, exc_info=cause)
        error: SllmError = EngineError(f"The engine could not make an embedding of this input: {cause}")
        if is_shortage(cause):
            advice = f"An input of {sequence.n_tokens} tokens does not fit: send a shorter one, or give the worker more memory."
            error = not_enough(self._runner.memory.model, cause, self._runner.device, advice)
        return StepOutput(sequence.request_id, 0, None, FinishReason.ERROR, error)


def embedding_sequence(request_id: str, token_ids: list[int], dimensions: int | None = None) -> EmbeddingSequence:
    """One input as the engine takes it."""
    return EmbeddingSequence(request_id, token_ids, SamplingParams(max_tokens=1), dimensions=dimensions)
