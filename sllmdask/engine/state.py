"""The state of a request as a value: its tokens and parameters, and the KV of its tokens, to go on with elsewhere.

Everything has a form of plain msgpack types (``as_wire``). What comes from elsewhere is checked (``from_wire``) and refused by
:class:`StateRefused`, never half believed. There is no random state and no decoder state: the sampler's noise is a function of
seed and position, and what is made of tokens is made by replaying them.

KV travels in pieces of some tokens: layer by layer, keys before values, (n_tokens, n_kv_heads, dim) each, in the sender's byte
order and dtype. It is cut into blocks where it arrives, so block sizes, devices and layouts in memory may differ.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from sllmdask.batching.params import SamplingParams
from sllmdask.batching.sequence import Sequence
from sllmdask.engine.attention import LayerShape
from sllmdask.errors import SllmError, StateRefused

#: Of all that is described here. Another one is refused.
FORMAT = 2

T = TypeVar("T")


@dataclass(frozen=True)
class KVLayout:
    """What a token's bytes mean."""

    #: As torch calls it, ``bfloat16`` for instance.
    dtype: str
    layers: tuple[LayerShape, ...]

    @property
    def token_nbytes(self) -> int:
        itemsize: int = getattr(torch, self.dtype).itemsize
        return sum(layer.nbytes(itemsize) for layer in self.layers)

    def differs(self, other: KVLayout) -> str | None:
        """Why KV of `other` cannot be used here; ``None`` if it can."""
        if self.dtype != other.dtype:
            return f"its KV is in {other.dtype}, here it is in {self.dtype}"
        if self.layers != other.layers:
            return f"the shapes of its KV differ: it has {len(other.layers)} layers, here are {len(self.layers)}"
        return None

    def as_wire(self) -> dict[str, Any]:
        layers = [[layer.n_kv_heads, layer.key_dim, layer.value_dim] for layer in self.layers]
        return {"dtype": self.dtype, "byteorder": sys.byteorder, "layers": layers}

    @classmethod
    def from_wire(cls, data: Mapping[str, Any]) -> KVLayout:
        if data["byteorder"] != sys.byteorder:
            raise ValueError(f"its bytes are in {data['byteorder']} endian order")
        if not isinstance(getattr(torch, data["dtype"], None), torch.dtype):
            raise ValueError("no such layout")
        layers = tuple(LayerShape(_whole(heads), _whole(key), _whole(value)) for heads, key, value in data["layers"])
        return cls(data["dtype"], layers)


@dataclass(frozen=True)
class Manifest:
    """What is about to come, and from what kind of engine."""

    request_id: str
    #: Counts the moves of a request. Of two, the larger one is meant; the same one again is the same move.
    epoch: int
    #: Tells a model's weights from another's.
    model_id: str
    #: What decides the last bits of a result: processor or GPU, dtype, versions. Another one still takes the state.
    numerics_id: str
    layout: KVLayout
    salt: bytes
    from_scratch: bool
    #: The tokens so far, prompt and answer.
    token_ids: list[int]

    def as_wire(self) -> dict[str, Any]:
        return {**vars(self), "format": FORMAT, "layout": self.layout.as_wire(), "token_ids": list(self.token_ids)}

    @classmethod
    def from_wire(cls, data: Mapping[str, Any]) -> Manifest:
        """Raises :class:`StateRefused` if `data` is not what :meth:`as_wire` makes."""
        return _read(
            data,
            lambda: cls(
                _text(data["request_id"]),
                _whole(data["epoch"]),
                _text(data["model_id"]),
                _text(data["numerics_id"]),
                KVLayout.from_wire(data["layout"]),
                bytes(data["salt"]),
                bool(data["from_scratch"]),
                _tokens(data["token_ids"]),
            ),
        )


@dataclass(frozen=True)
class KVChunk:
    """KV of `n_tokens` tokens of a request, from its token `since` on."""

    since: int
    n_tokens: int
    data: bytes | bytearray
    crc32: int

    @classmethod
    def of(cls, since: int, n_tokens: int, data: bytes) -> KVChunk:
        return cls(since, n_tokens, data, zlib.crc32(data))

    def as_wire(self) -> dict[str, Any]:
        return dict(vars(self))

    @classmethod
    def from_wire(cls, data: Mapping[str, Any], request_id: str, layout: KVLayout) -> KVChunk:
        """Raises :class:`StateRefused` if its bytes are not those that were sent, or too many or too few."""
        chunk = _read(
            {"format": FORMAT, **data, "request_id": request_id},
            lambda: cls(_whole(data["since"]), _whole(data["n_tokens"]), _bytes(data["data"]), _whole(data["crc32"])),
        )
        nbytes = chunk.n_tokens * layout.token_nbytes
        if len(chunk.data) != nbytes:
            raise StateRefused(request_id, f"the KV of {chunk.n_tokens} tokens has {nbytes} bytes, but {len(chunk.data)} came")
        if zlib.crc32(chunk.data) != chunk.crc32:
            raise StateRefused(request_id, f"the KV from token {chunk.since} on was changed on its way")
        return chunk


@dataclass(frozen=True)
class RequestState:
    """A request between two steps, but for its KV. `n_computed`: of how many tokens the sender had KV."""

    request_id: str
    prompt_ids: list[int]
    output_ids: list[int]
    params: SamplingParams
    priority: int
    arrival: int
    level: int
    waited: float
    n_preemptions: int
    salt: bytes
    from_scratch: bool
    n_computed: int

    @classmethod
    def of(cls, sequence: Sequence, n_computed: int) -> RequestState:
        return cls(
            sequence.request_id,
            list(sequence.prompt_ids),
            list(sequence.output_ids),
            sequence.params,
            sequence.priority,
            sequence.arrival,
            sequence.level,
            sequence.waited,
            sequence.n_preemptions,
            sequence.salt,
            sequence.from_scratch,
            n_computed,
        )

    def sequence(self) -> Sequence:
        """A sequence of these tokens, without KV: add it to an engine, and they are computed there."""
        return Sequence(
            self.request_id,
            list(self.prompt_ids),
            self.params,
            priority=self.priority,
            arrival=self.arrival,
            output_ids=list(self.output_ids),
            n_preemptions=self.n_preemptions,
            salt=self.salt,
            from_scratch=self.from_scratch,
            waited=self.waited,
            level=self.level,
        )

    def as_wire(self) -> dict[str, Any]:
        return {**vars(self), "format": FORMAT, "params": self.params.as_wire()}

    @classmethod
    def from_wire(cls, data: Mapping[str, Any]) -> RequestState:
        """Raises :class:`StateRefused` if `data` is not what :meth:`as_wire` makes."""
        return _read(
            data,
            lambda: cls(
                _text(data["request_id"]),
                _tokens(data["prompt_ids"]),
                _tokens(data["output_ids"]),
                SamplingParams.from_wire(data["params"]),
                int(data["priority"]),
                int(data["arrival"]),
                _whole(data["level"]),
                float(data["waited"]),
                _whole(data["n_preemptions"]),
                bytes(data["salt"]),
                bool(data["from_scratch"]),
                _whole(data["n_computed"]),
            ),
        )


def _read(data: Mapping[str, Any], make: Callable[[], T]) -> T:
    """What `make` makes of `data`. Raises :class:`StateRefused` if it is of another format, or something is missing or odd."""
    request_id = str(data.get("request_id", ""))
    if data.get("format") != FORMAT:
        raise StateRefused(request_id, f"it is in format {data.get('format')!r}, and here {FORMAT} is read")
    try:
        return make()
    except (LookupError, TypeError, ValueError, SllmError) as error:
        raise StateRefused(request_id, f"it cannot be read ({type(error).__name__}: {error})") from error


def _whole(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r} is not a number of something")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not a name")
    return value


def _bytes(value: Any) -> bytes | bytearray:
    """Without a copy: a piece of KV is large."""
    return value if isinstance(value, bytes | bytearray) else bytes(value)


def _tokens(values: Any) -> list[int]:
    tokens = list(values)
    # Not one by one, since a request is stopped while this is done.
    if not set(map(type, tokens)) <= {int} or min(tokens, default=0) < 0:
        raise ValueError("these are no token ids")
    return tokens
