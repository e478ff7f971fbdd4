"""LoRA adapters beside one base model, each for the requests that ask for it, in the same packed batch.

An adapter is read from the two files that peft saves. It adds ``s * B A x`` to the output of the linear layers that it names: a
hook on each of them does so for the rows of the batch whose requests have that adapter, and leaves the others alone.

Source: LoRA (Hu et al., ICLR '22); rank-stabilised scaling, rsLoRA (Kalajdzievski, 2023); many adapters in one batch, Punica
(MLSys '24) and S-LoRA (MLSys '24).
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from sllmdask.errors import AdapterUnsupported, CheckpointNotFound

#: A tensor of an adapter: ``base_model.model.PATH.lora_A.weight``.
_NAME = re.compile(r"^base_model\.model\.(?P<path>.+?)\.(?P<kind>lora_[A-Za-z_]+)(?:\.weight)?$")

#: What would change the result and is not implemented: key of ``adapter_config.json``, values that mean "not used", what it is.
_REFUSED: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    ("use_dora", (None, False), "DoRA (use_dora) scales the base's own weights"),
    ("modules_to_save", (None, []), "it replaces modules of the base (modules_to_save)"),
    ("bias", (None, "none"), "it changes biases of the base (bias)"),
    ("lora_bias", (None, False), "it has biases of its own (lora_bias)"),
    ("layer_replication", (None, []), "it repeats layers of the base (layer_replication)"),
    ("trainable_token_indices", (None, [], {}), "it replaces rows of the embedding (trainable_token_indices)"),
    ("target_parameters", (None, []), "it changes parameters that are no linear layer (target_parameters)"),
    ("alora_invocation_tokens", (None, []), "it begins in the middle of a prompt (alora_invocation_tokens)"),
    ("use_qalora", (None, False), "it is made for quantized weights (use_qalora)"),
    ("use_bdlora", (None, False, {}), "its matrices are block-diagonal (use_bdlora)"),
    ("monteclora_config", (None, {}), "it draws its matrices at random (monteclora_config)"),
    ("arrow_config", (None, {}), "it chooses among other adapters (arrow_config)"),
)
#: Ways to begin the training that change the base's weights, too.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq")


@dataclass(frozen=True)
class LoraPair:
    """What one linear layer gets: ``y += scale * (x A^T) B^T``, `a` (r, in) and `b` (out, r)."""

    a: Tensor
    b: Tensor
    scale: float


@dataclass(frozen=True, eq=False)
class LoraAdapter:
    """One adapter for one base model."""

    name: str
    #: By the path of the module in the base model.
    pairs: Mapping[str, LoraPair]
    #: Says which weights these are, and under which name: the same in every process. It keeps the KV of requests with different
    #: adapters apart (``Sequence.salt``), and finds the adapter of a request.
    salt: bytes
    #: Bytes of its matrices that are copies: in another dtype, or on another device, than its file's.
    copied_nbytes: int = 0

    @property
    def nbytes(self) -> int:
        return sum(pair.a.nbytes + pair.b.nbytes for pair in self.pairs.values())

    @property
    def rank(self) -> int:
        """The largest of its ranks."""
        return max(pair.a.shape[0] for pair in self.pairs.values())


def read_adapter_config(directory: Path, name: str) -> dict[str, Any]:
    """``adapter_config.json``; raises :class:`CheckpointNotFound`, and :class:`AdapterUnsupported` for what is not plain LoRA."""
    path = directory / "adapter_config.json"
    if not path.is_file():
        raise CheckpointNotFound(str(directory), "it has no adapter_config.json: it is not a LoRA adapter as peft saves it")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterUnsupported(name, f"its adapter_config.json is not readable JSON ({error})") from None
    if not isinstance(config, dict):
        raise AdapterUnsupported(name, "its adapter_config.json holds no JSON object")
    if config.get("peft_type") != "LORA":
        raise AdapterUnsupported(name, f"its peft_type is {config.get('peft_type')!r}; only LORA is known")
    for key, neutral, what in _REFUSED:
        if config.get(key) not in neutral:
            raise AdapterUnsupported(name, f"{what}, which is not supported")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        reason = (
            f"its training changed the base's weights as well (init_lora_weights {start!r}); convert it to plain LoRA with peft"
        )
        raise AdapterUnsupported(name, reason)
    return config


@dataclass(frozen=True)
class _Planned:
    """Where a pair goes, and which tensors it is made of."""

    where: str
    a: str
    b: str
    scale: float


def why_no_adapters(paged: bool, deterministic: bool) -> str | None:
    """Why an engine takes no adapters, whatever they are; ``None`` if it does.

    `paged`: whether its sequences stand one behind the other in one row, see :class:`~sllmdask.engine.construct.Skeleton`.
    """
    if not paged:
        return "its base has an attention of its own, and such models run without adapters"
    if deterministic:
        return "with engine.deterministic there are no adapters: their products may depend on what else is in the batch"
    return None


def check_adapter(
    name: str, directory: Path, shapes: Mapping[str, Sequence[int]], model: torch.nn.Module
) -> tuple[_Planned, ...]:
    """What the adapter in `directory` (``adapter_config.json``), whose tensors have these `shapes`, would do to `model`.

    Raises :class:`AdapterUnsupported` with the reason: for what is not plain LoRA, and for layers that the model does not have,
    or has in another shape; and what :func:`read_adapter_config` raises. `model` may be without its weights.
    """
    config = read_adapter_config(directory, name)
    halves: dict[str, dict[str, str]] = {}
    for key in shapes:
        match = _NAME.match(key)
        if match is None or match["kind"] not in ("lora_A", "lora_B"):
            reason = f"its tensor {key!r} is neither a lora_A nor a lora_B of a linear layer"
            raise AdapterUnsupported(name, reason)
        halves.setdefault(match["path"], {})[match["kind"]] = key
    if not halves:
        raise AdapterUnsupported(name, "it holds no weights")
    modules = dict(model.named_modules())
    prefix = getattr(model, "base_model_prefix", "")
    planned = []
    for path, found in sorted(halves.items()):
        where = next((known for known in (path, f"{prefix}.{path}", path.removeprefix(f"{prefix}.")) if known in modules), None)
        if where is None:
            raise AdapterUnsupported(name, f"it is for a layer {path!r}, which {type(model).__name__} does not have")
        if found.keys() != {"lora_A", "lora_B"}:
            raise AdapterUnsupported(name, f"of {path!r} it has {', '.join(found)} alone")
        a, b = tuple(shapes[found["lora_A"]]), tuple(shapes[found["lora_B"]])
        rank, alpha = _rank_and_alpha(config, path)
        shape = _features(modules[where])
        if shape is None:
            kind = type(modules[where]).__name__
            raise AdapterUnsupported(name, f"it is for {path!r}, a {kind}; only linear layers can have one")
        if a != (rank, shape[0]) or b != (shape[1], rank):
            reason = (
                f"of {path!r} it has {list(a)} and {list(b)}, but the base's layer takes {shape[0]} and gives {shape[1]} "
                f"numbers, and adapter_config.json says rank {rank}. It was made for another model"
            )
            raise AdapterUnsupported(name, reason)
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        planned.append(_Planned(where, found["lora_A"], found["lora_B"], scale))
    return tuple(planned)


def read_adapter(
    name: str, directory: Path, tensors: Mapping[str, Tensor], model: torch.nn.Module, dtype: torch.dtype, device: torch.device
) -> LoraAdapter:
    """The adapter in `directory` with `tensors`, for `model`. Raises what :func:`check_adapter` raises.

    Matrices that are in `dtype` on `device` already are views of `tensors`.
    """
    pairs: dict[str, LoraPair] = {}
    copied_nbytes = 0
    digest = hashlib.blake2b(name.encode(), digest_size=16)
    for planned in check_adapter(name, directory, {key: tensor.shape for key, tensor in tensors.items()}, model):
        a, b = tensors[planned.a], tensors[planned.b]
        pair = pairs[planned.where] = LoraPair(a.to(device, dtype), b.to(device, dtype), planned.scale)
        copied_nbytes += sum(part.nbytes for part, given in ((pair.a, a), (pair.b, b)) if part.data_ptr() != given.data_ptr())
        digest.update(f"{planned.where} {planned.scale!r} {list(a.shape)} {a.dtype}".encode())
        for part in (a, b):
            digest.update(part.detach().contiguous().view(torch.uint8).cpu().numpy().data)
    return LoraAdapter(name, pairs, digest.digest(), copied_nbytes)


def _rank_and_alpha(config: Mapping[str, Any], path: str) -> tuple[int, float]:
    """As peft looks them up: the first pattern that the end of the path matches, or else the adapter's own."""

    def look(patterns: Mapping[str, Any] | None, default: Any) -> Any:
        return next((value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", path)), default)

    return int(look(config.get("rank_pattern"), config.get("r", 8))), float(
        look(config.get("alpha_pattern"), config.get("lora_alpha", 8))
    )


def _features(module: torch.nn.Module) -> tuple[int, int] | None:
    """Numbers that a linear layer takes and gives; ``None`` for any other module. GPT-2's are transposed."""
    if type(module).__name__ == "Conv1D":
        n_in, n_out = module.weight.shape  # type: ignore[misc]
        return int(n_in), int(n_out)
    n_in, n_out = getattr(module, "in_features", None), getattr(module, "out_features", None)
    return (n_in, n_out) if isinstance(n_in, int) and isinstance(n_out, int) else None


#: Rows of the hidden states that have one adapter; ``None``: all of them.
_Group = tuple[LoraAdapter, Tensor | None]


class AdapterSet:
    """The adapters of one model, by salt. Used by the thread that runs the model."""

    def __init__(self, model: torch.nn.Module, device: torch.device, why_none: str | None = None) -> None:
        """`why_none`: why it takes none, if so."""
        self._model = model
        self._device = device
        self._why_none = why_none
        self._adapters: dict[bytes, LoraAdapter] = {}
        #: By path: the module that holds the hooked one, its name there, the hooked one, the hook.
        self._hooks: dict[str, tuple[torch.nn.Module, str, torch.nn.Module, Any]] = {}
        #: The head sees only the rows whose logits are wanted.
        get_head: Any = getattr(model, "get_output_embeddings", lambda: None)
        self._head = get_head()
        self._groups: tuple[_Group, ...] = ()
        self._head_groups: tuple[_Group, ...] = ()
        #: Rows of the running batch, and of those that the head sees.
        self._n_rows = self._n_head_rows = 0

    def __contains__(self, salt: bytes) -> bool:
        return salt in self._adapters

    def __len__(self) -> int:
        return len(self._adapters)

    def refuse(self, name: str) -> None:
        """Raise :class:`AdapterUnsupported` if there can be no adapters here."""
        if self._why_none is not None:
            raise AdapterUnsupported(name, self._why_none)

    def add(self, adapter: LoraAdapter) -> LoraAdapter | None:
        """From now on requests may have it. Its tensors must stay until :meth:`remove`. Raises as :meth:`refuse`.

        Returns the one of the same weights and name whose place it takes, if there is one.
        """
        self.refuse(adapter.name)
        replaced = self._adapters.get(adapter.salt)
        self._adapters[adapter.salt] = adapter
        self._hook()
        return replaced

    def remove(self, salt: bytes) -> LoraAdapter | None:
        """Let go of an adapter that no request has any more, and return it; nothing if it is not here."""
        removed = self._adapters.pop(salt, None)
        self._hook()
        return removed

    def close(self) -> None:
        """Let go of all."""
        self._adapters.clear()
        self._hook()

    @contextmanager
    def applied(self, spans: Sequence[tuple[bytes, int, int]]) -> Iterator[None]:
        """Inside the block, a forward pass over `spans`, one behind the other, is changed by their adapters.

        A span: the salt (empty: none), how many rows, and of how many of them, the last ones, the head sees.
        """
        if not any(salt for salt, _, _ in spans):
            yield
            return
        if any(parent._modules[leaf] is not module for parent, leaf, module, _ in self._hooks.values()):
            self._hook()
        rows: dict[bytes, list[int]] = {}
        head_rows: dict[bytes, list[int]] = {}
        n_rows = n_head = 0
        for salt, length, n_seen in spans:
            if salt:
                rows.setdefault(salt, []).extend(range(n_rows, n_rows + length))
                head_rows.setdefault(salt, []).extend(range(n_head, n_head + n_seen))
            n_rows += length
            n_head += n_seen
        self._groups = self._grouped(rows, n_rows)
        self._head_groups = self._grouped(head_rows, n_head)
        self._n_rows, self._n_head_rows = n_rows, n_head
        try:
            yield
        finally:
            self._groups = self._head_groups = ()

    def _grouped(self, rows: Mapping[bytes, list[int]], n_rows: int) -> tuple[_Group, ...]:
        return tuple(
            (self._adapters[salt], None if len(ids) == n_rows else torch.tensor(ids, device=self._device))
            for salt, ids in rows.items()
        )

    def _hook(self) -> None:
        """One hook on each module that an adapter names, and on no other.

        Modules may be exchanged for others that compute the same, packed ones for instance: the hook moves over.
        """
        wanted = {path for adapter in self._adapters.values() for path in adapter.pairs}
        for path in wanted | self._hooks.keys():
            parent, _, leaf = path.rpartition(".")
            holder = self._model.get_submodule(parent)
            module = holder.get_submodule(leaf) if path in wanted else None
            *_, hooked, handle = self._hooks.get(path, (None, None))
            if hooked is module:
                continue
            if handle is not None:
                handle.remove()
                del self._hooks[path]
            if module is not None:
                handle = module.register_forward_hook(self._make_hook(path, module is self._head))
                self._hooks[path] = holder, leaf, module, handle

    def _make_hook(self, path: str, is_head: bool) -> Any:
        def add_products(_module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            for adapter, rows in self._head_groups if is_head else self._groups:
                pair = adapter.pairs.get(path)
                if pair is None:
                    continue
                x = inputs[0]
                if rows is not None:
                    n_rows = self._n_head_rows if is_head else self._n_rows
                    if x.shape[:-1].numel() != n_rows or x.shape[-2] != n_rows:
                        # Not somebody else's rows instead of ours.
                        raise RuntimeError(
                            f"{path} is not given the rows of the batch in their order, so it cannot have an adapter"
                        )
                    x = x.index_select(-2, rows)
                product = linear(linear(x, pair.a), pair.b) * pair.scale
                # In place: what a linear layer gives is nobody else's.
                if rows is None:
                    output += product
                else:
                    output.index_add_(output.dim() - 2, rows, product)
            return output

        return add_products
