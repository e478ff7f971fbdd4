"""Building a model in two halves: its structure from ``config.json`` alone, and later the tensors that become its parameters.

The structure costs tens of milliseconds of Python and no memory, so it is made before or while the bytes are read: modelling
code of transformers, unmodified, on the meta device, looked through once with two tokens. What is left to do is to put one tensor
into each place (:meth:`Skeleton.fill`). On the CPU, parameters of the right dtype are those tensors, not copies.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import math
import re
import sys
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers.cache_utils import DynamicLayer

from sllmdask.engine.attention import NAME, LayerProbe, LayerShape, attending
from sllmdask.engine.conversion import Fusion, assign_names, make_fusion
from sllmdask.engine.families import (
    RECURRENT,
    ROPE_BY_LENGTH,
    FamilyInfo,
    inspect_config,
    read_config,
    stated_window,
)
from sllmdask.errors import CheckpointCorrupt, UnsupportedArchitecture

log = logging.getLogger(__name__)

#: Names that checkpoints keep although transformers has renamed the parameter (GPT-NeoX).
_RENAMED = {"embed_out.weight": "lm_head.weight"}

#: What a modelling file of transformers imports if its models hide tokens beyond a window by a mask.
_WINDOW_MASKS = {"create_chunked_causal_mask", "create_masks_for_generate", "create_sliding_window_causal_mask"}

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class BuildTimes:
    """Seconds of building one engine; what was done while the bytes were read is in them, too."""

    #: The structure; 0 where a skeleton was at hand.
    construct_s: float
    #: Tensors to their places, and the memory of the KV cache.
    assign_s: float
    #: The check of the first layers over the real weights, without the wait for them; ``None`` while they are on their way.
    check_s: float | None


@dataclass(frozen=True, slots=True)
class _Place:
    """Where one tensor of the state dict goes: ``holder[key]``, a module's own dict of parameters or buffers."""

    holder: dict[str, Any]
    key: str
    #: What is there as long as there are no weights.
    empty: Tensor


@dataclass(frozen=True, slots=True)
class Stage:
    """A module that runs as a whole, and the names of the parameters that it needs for it."""

    module: torch.nn.Module
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """A tensor of the checkpoint that is to be converted, and the names in the model that are given the result."""

    tensor: Tensor
    names: tuple[str, ...]
    #: What is wanted of it: mostly the one that is served.
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Filling:
    """What :meth:`Skeleton.fill` has found out, by stage, in the order of execution."""

    modules: tuple[torch.nn.Module, ...]
    #: Names in the checkpoint of what the module needs.
    awaited: tuple[tuple[str, ...], ...]
    #: What of it must be converted.
    pieces: tuple[tuple[Piece, ...], ...]
    #: What of it is made of several tensors, or of one that is laid out in another way.
    fusions: tuple[tuple[Fusion, ...], ...]
    #: Bytes of weights that are in memory of the engine's own, besides the checkpoint's.
    copied_nbytes: int

    def sources(self, stage: int) -> list[tuple[str, Fusion]]:
        """What the fusions of a stage are made of, by name in the checkpoint, in its order."""
        fusion_of = {source: fusion for fusion in self.fusions[stage] for source in fusion.sources}
        return [(name, fusion_of[name]) for name in self.awaited[stage] if name in fusion_of]


class Skeleton:
    """A model without weights, and what was seen when two tokens went through it. Used by one engine at a time.

    :param paged: whether its attention is to go through transformers' interface, to the paged cache; otherwise the model is run
        as it is, over a cache of transformers' kind
    """

    def __init__(self, family: FamilyInfo, model: Any, key: str, *, paged: bool = True) -> None:
        """Raises :class:`UnsupportedArchitecture` if the model is not as the engine assumes."""
        self.family = family
        self.model = model
        #: The same for the same configuration, and for no other.
        self.key = key
        self.paged = paged
        #: Arguments that the model's forward pass has by name.
        self.arguments = frozenset(inspect.signature(model.forward).parameters)
        self._places = _places(model)
        self._tied = _tied_groups(model)
        layers = _decoder_layers(model)
        if not layers:
            raise UnsupportedArchitecture(family.architecture, "its layers are not in a list of num_hidden_layers modules")
        self._layers = layers
        #: For each layer, the first one that is built in the same way and runs the same code.
        self._kind_of = _kinds(layers)
        self.kinds = sorted(set(self._kind_of))
        shapes, checked, order = self._probe_attention() if paged else self._probe_cache()
        #: The modules whose output is compared before the first token, one for each of `kinds`: attentions, or else whole layers.
        self.checked: list[torch.nn.Module] = checked
        self.layers: list[LayerShape] = [shapes[kind] for kind in self._kind_of]
        self._stages = _stages(model, layers, order)
        self._computed = _compute_buffers(model)
        self.vocab_size = int(model.get_input_embeddings().weight.shape[0])

    def fill(self, checkpoint_dir: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device) -> Filling:
        """Put `tensors`, named as in the checkpoint, where the parameters are; their bytes may arrive later: none is read here.

        What is not in its dtype or not on `device` is left empty, and is in the answer's `pieces`, for :meth:`place`; what is
        made of several tensors is in `fusions`. Raises :class:`CheckpointCorrupt`, naming the tensor, if one is missing or of
        another shape than ``config.json`` says.
        """
        self.model.config.dtype = dtype
        prefix = self.model.base_model_prefix
        shapes = {key: place.empty.shape for key, place in self._places.items()}
        parameter_of, groups, unexpected = assign_names(
            self.model, list(tensors), lambda name: _parameter_name(name, self._places, prefix)
        )
        source_of: dict[str, str] = {}
        for name, key in parameter_of.items():
            if tensors[name].shape != shapes[key]:
                reason = f"its shape is {list(tensors[name].shape)}, but config.json asks for {list(shapes[key])}"
                raise CheckpointCorrupt(str(checkpoint_dir), name, reason)
            source_of[key] = name
        made = [make_fusion(group, self.model, shapes, tensors, dtype, device, str(checkpoint_dir)) for group in groups]
        fusion_of = {key: fusion for fusion in made for key in fusion.parameters if key not in source_of}
        if unexpected:
            log.info("ignored tensors: n=%d first=%s directory=%s", len(unexpected), unexpected[0], checkpoint_dir)
        # A tied parameter may be in the file under any of its names. Where it is under several, each keeps its own: if they
        # differ they must, and if they are equal it makes no difference; to compare them would read what may not be there yet.
        for tied in self._tied:
            given = [source_of[name] for name in tied if name in source_of]
            for name in tied if given else ():
                source = source_of.setdefault(name, given[0])
                if tensors[source].data_ptr() == tensors[given[0]].data_ptr():
                    source_of[name] = given[0]
        absent = sorted(self._places.keys() - source_of.keys() - fusion_of.keys())
        if absent:
            raise CheckpointCorrupt(str(checkpoint_dir), absent[0], f"it is missing, with {len(absent) - 1} others")

        names_of: defaultdict[str, list[str]] = defaultdict(list)
        for key, name in source_of.items():
            names_of[name].append(key)
        piece_of: dict[str, Piece] = {}
        for name, keys in names_of.items():
            tensor = tensors[name]
            wanted = self._wanted_dtype(keys[0], dtype) if tensor.is_floating_point() else tensor.dtype
            if tensor.device == device and tensor.dtype == wanted:
                self.place(tensor, keys)
            else:
                piece_of[name] = Piece(tensor, tuple(keys), wanted)
        for place, value in self._computed:
            place.holder[place.key] = value.to(device)
        copied_nbytes = sum(piece.tensor.numel() * piece.dtype.itemsize for piece in piece_of.values())
        copied_nbytes += sum(math.prod(shapes[key]) * dtype.itemsize for key in fusion_of)
        order = {name: number for number, name in enumerate(tensors)}
        awaited = tuple(_awaited(stage, source_of, fusion_of, order) for stage in self._stages)
        # A tied piece is needed by several stages and converted in the first.
        pieces = tuple(tuple(piece_of.pop(name) for name in names if name in piece_of) for names in awaited)
        left = set(fusion_of.values())
        fusions: list[tuple[Fusion, ...]] = []
        for stage in self._stages:
            needed = dict.fromkeys(fusion_of[key] for key in stage.names if key in fusion_of)
            fusions.append(tuple(fusion for fusion in needed if fusion in left))
            left.difference_update(needed)
        return Filling(tuple(stage.module for stage in self._stages), awaited, pieces, tuple(fusions), copied_nbytes)

    def place(self, tensor: Tensor, names: Sequence[str]) -> None:
        """Make `tensor` the parameter or buffer of these names."""
        parameter = torch.nn.Parameter(tensor, requires_grad=False)
        for name in names:
            place = self._places[name]
            place.holder[place.key] = parameter if isinstance(place.empty, torch.nn.Parameter) else tensor

    def place_all(self, filling: Filling, convert: Callable[[Piece], None]) -> None:
        """Place what `filling` has left, whose bytes are all there; `convert` does so with one piece."""
        for fusion in (fusion for fusions in filling.fusions for fusion in fusions):
            for name in fusion.sources:
                fusion.take(name)
            for name, tensor in fusion.finish().items():
                self.place(tensor, (name,))
        for piece in (piece for pieces in filling.pieces for piece in pieces):
            convert(piece)

    @property
    def decoder_layers(self) -> tuple[torch.nn.Module, ...]:
        return tuple(self._layers)

    def empty(self) -> None:
        """Let go of every tensor that it was given; it can be filled again."""
        for place in self._places.values():
            place.holder[place.key] = place.empty
        for place, value in self._computed:
            place.holder[place.key] = value

    @contextmanager
    def one_of_each_kind(self) -> Iterator[None]:
        """Inside the block a forward pass runs only the first layer of each kind; the others hand on what they are given."""
        extra: tuple[Any, ...] | None = None

        def note(_module: torch.nn.Module, _inputs: Any, output: Any) -> None:
            nonlocal extra
            extra = output[1:] if isinstance(output, tuple) else None

        def skip(*args: Any, **kwargs: Any) -> Any:
            hidden_states = args[0] if args else kwargs["hidden_states"]
            return hidden_states if extra is None else (hidden_states, *extra)

        handles = [self._layers[layer].register_forward_hook(note) for layer in self.kinds]
        skipped = [layer for number, layer in enumerate(self._layers) if number not in self.kinds]
        try:
            for layer in skipped:
                layer.__dict__["forward"] = skip
            yield
        finally:
            for layer in skipped:
                del layer.__dict__["forward"]
            for handle in handles:
                handle.remove()

    def accepted(self, **arguments: Any) -> dict[str, Any]:
        """Those of `arguments` that the model's forward pass takes: some old ones know no positions."""
        return {name: value for name, value in arguments.items() if name in self.arguments}

    def _wanted_dtype(self, key: str, dtype: torch.dtype) -> torch.dtype:
        """The dtype of a parameter: the few that choose among experts stay in float32, as transformers keeps them."""
        strict = getattr(self.model, "_keep_in_fp32_modules_strict", None) or ()
        keep = dtype in (torch.bfloat16, torch.float16) and any(re.search(name.replace("*", ".*"), key) for name in strict)
        return torch.float32 if keep else dtype

    def _probe_attention(self) -> tuple[dict[int, LayerShape], list[torch.nn.Module], list[torch.nn.Module]]:
        """Run two tokens through the model, noting what attention is asked for.

        Returns shapes by kind of layer, the attention modules of `kinds`, and the modules in the order in which they began.
        """
        probe = LayerProbe()
        ids = torch.zeros((1, 2), dtype=torch.long, device="meta")
        positions = torch.zeros_like(ids)
        with attending(probe):
            order = self._look_through(input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=positions[0, :1])
        if probe.unknown:
            reason = f"its attention needs {', '.join(sorted(probe.unknown))}, which the engine does not have"
            raise UnsupportedArchitecture(self.family.architecture, reason)
        self._check_all_seen(probe.shapes)
        if not self.family.tested:
            _check_masks(self.family.architecture, self.model.config.get_text_config(), probe.windows.values())
        return probe.shapes, [probe.modules[kind] for kind in self.kinds], order

    def _probe_cache(self) -> tuple[dict[int, LayerShape], list[torch.nn.Module], list[torch.nn.Module]]:
        """Run two tokens through the model with a cache of transformers' own, and look what it put there; returns the same."""
        cache = transformers.DynamicCache()
        if "past_key_values" not in self.arguments:
            raise UnsupportedArchitecture(self.family.architecture, "it keeps no KV cache between two steps")
        ids = torch.zeros((1, 2), dtype=torch.long, device="meta")
        arguments = self.accepted(position_ids=torch.zeros_like(ids), logits_to_keep=1)
        order = self._look_through(input_ids=ids, past_key_values=cache, use_cache=True, **arguments)
        shapes: dict[int, LayerShape] = {}
        for number, layer in enumerate(cache.layers):
            keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
            if type(layer) is not DynamicLayer or keys is None or values is None or not layer.is_initialized:
                continue
            if keys.dim() == values.dim() == 4 and keys.shape[:3] == values.shape[:3] == (1, keys.shape[1], 2):
                shapes[number] = LayerShape(keys.shape[1], keys.shape[3], values.shape[3])
        self._check_all_seen(shapes)
        return shapes, [self._layers[kind] for kind in self.kinds], order

    @torch.no_grad()
    def _look_through(self, **arguments: Any) -> list[torch.nn.Module]:
        """Run the model without weights, one layer of each kind; the modules in the order in which they began."""
        order: list[torch.nn.Module] = []

        def note(module: torch.nn.Module, _inputs: Any) -> None:
            order.append(module)

        handles = [module.register_forward_pre_hook(note) for module in _gated(self.model, self._layers)]
        try:
            with self.one_of_each_kind(), _nothing_depends_on_values(self.model):
                self.model(**arguments)
        except (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            reason = f"its forward pass cannot be looked through ({error})"
            raise UnsupportedArchitecture(self.family.architecture, reason) from error
        finally:
            for handle in handles:
                handle.remove()
        return order

    def _check_all_seen(self, shapes: Mapping[int, LayerShape]) -> None:
        if sorted(shapes) != self.kinds:
            n_seen = sum(kind in shapes for kind in self._kind_of)
            reason = f"{n_seen} of its {len(self._layers)} layers keep a KV cache of their own"
            raise UnsupportedArchitecture(self.family.architecture, reason)


def build_skeleton(checkpoint_dir: Path, config: Mapping[str, Any] | None = None) -> Skeleton:
    """The model that `config`, or else the ``config.json`` in `checkpoint_dir`, describes, without its weights.

    Its attention goes to the paged cache where it goes through transformers' interface; otherwise it is to be run as it is.
    Raises :class:`UnsupportedArchitecture` if transformers cannot make sense of it or the engine cannot run it, and what
    :func:`read_config` raises.
    """
    config = read_config(checkpoint_dir) if config is None else config
    family = inspect_config(config)
    model_class = getattr(transformers, family.architecture, None)
    if model_class is None:
        reason = f"transformers {transformers.__version__} has no such class, and code that comes with a checkpoint is not run"
        raise UnsupportedArchitecture(family.architecture, reason)
    if getattr(model_class, "_is_stateful", False):
        raise UnsupportedArchitecture(family.architecture, RECURRENT)
    try:
        return _make_skeleton(family, config, model_class, NAME)
    except UnsupportedArchitecture as error:
        refused = error
    try:
        return _make_skeleton(family, config, model_class, "sdpa" if model_class._supports_sdpa else "eager")
    except UnsupportedArchitecture as error:
        if error.reason == refused.reason:
            raise
        reason = f"{refused.reason}; nor can it be run without the paged cache: {error.reason}"
        raise UnsupportedArchitecture(family.architecture, reason) from error


def _make_skeleton(family: FamilyInfo, config: Mapping[str, Any], model_class: Any, attention: str) -> Skeleton:
    try:
        model_config = transformers.CONFIG_MAPPING[family.model_type].from_dict(dict(config))
        model_config._attn_implementation = attention
        # The contexts are this thread's own. Asking for a dtype would change torch's default for the whole process.
        with torch.device("meta"), _WithoutInitialisation():
            model = model_class(model_config).eval().requires_grad_(False)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UnsupportedArchitecture(family.architecture, f"transformers refuses its config.json ({error})") from error
    # Nothing is padded here. With a padding token, some models look for it in every batch, to warn of a missing mask.
    text_config = model.config.get_text_config()
    text_config.pad_token_id = None
    if stated_window(config) is None and not family.tested:
        # What its class takes for granted.
        family = replace(family, max_model_len=stated_window(text_config.to_dict()) or family.max_model_len)
    if not family.tested and attention != NAME:
        family = replace(family, max_model_len=int(min(family.max_model_len, _unmasked_window(model_class, text_config))))
    if family.long_after is not None and attention != NAME:
        family = replace(family, max_model_len=min(family.max_model_len, family.long_after), long_after=None)
    return Skeleton(family, model, _config_key(config), paged=attention == NAME)


class SkeletonShelf:
    """Keeps skeletons of closed engines for the next start of the same model, at most `capacity` of them. For any thread."""

    def __init__(self, capacity: int = 8) -> None:
        self._capacity = capacity
        self._lock = threading.Lock()
        #: Put there first, first.
        self._spare: list[Skeleton] = []

    def take(self, checkpoint_dir: Path, config: Mapping[str, Any] | None = None) -> Skeleton:
        """A skeleton from the shelf, or a new one; it is the caller's alone. Raises what :func:`build_skeleton` raises."""
        config = read_config(checkpoint_dir) if config is None else config
        return self.spare(_config_key(config)) or build_skeleton(checkpoint_dir, config)

    def spare(self, key: str) -> Skeleton | None:
        """The skeleton of that key from the shelf, if there is one; it is the caller's alone."""
        with self._lock:
            for skeleton in self._spare:
                if skeleton.key == key:
                    self._spare.remove(skeleton)
                    return skeleton
        return None

    def put(self, skeleton: Skeleton) -> None:
        """Keep `skeleton`, whose engine is closed, and drop the one that is here longest where there are too many."""
        skeleton.empty()
        with self._lock:
            self._spare = [*(spare for spare in self._spare if spare is not skeleton), skeleton][-self._capacity :]


def serving_dtype(checkpoint_dir: Path, tensors: Mapping[str, Tensor], device: torch.device, wanted: str) -> torch.dtype:
    """`wanted`, or for ``auto`` what most bytes of the checkpoint are in, so that most of it need not be copied.

    Raises :class:`CheckpointCorrupt` if there are no weights, or none that can be computed with.
    """
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


class _WithoutInitialisation(TorchFunctionMode):
    """Inside this context, in this thread, ``torch.nn.init`` leaves parameters as they are: there is nothing to initialise."""

    _INITIALISERS = frozenset(
        function for name, function in vars(torch.nn.init).items() if name.endswith("_") and not name.startswith("_")
    )

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        kwargs = kwargs or {}
        if func in self._INITIALISERS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def _awaited(
    stage: Stage, source_of: Mapping[str, str], fusion_of: Mapping[str, Fusion], order: Mapping[str, int]
) -> tuple[str, ...]:
    """Names in the checkpoint of what a stage needs; what is to be fused in the order of the checkpoint."""
    plain = [source_of[key] for key in stage.names if key in source_of]
    fused = {source for key in stage.names if key in fusion_of for source in fusion_of[key].sources}
    return tuple(dict.fromkeys([*plain, *sorted(fused, key=order.__getitem__)]))


@contextmanager
def _nothing_depends_on_values(model: torch.nn.Module) -> Iterator[None]:
    """Inside the block a forward pass can run without values: experts are not chosen, rotary frequencies do not change.

    Modules with parameters of three dimensions are the experts of a mixture; they give back what has the shape of their input.
    """
    experts = [
        module
        for module in model.modules()
        if not isinstance(module, torch.nn.modules.conv._ConvNd)
        and any(parameter is not None and parameter.dim() == 3 for parameter in module._parameters.values())
    ]
    changing = [module for module in model.modules() if getattr(module, "rope_type", None) in ROPE_BY_LENGTH]
    rope_types = [module.rope_type for module in changing]
    try:
        for module in experts:
            module.__dict__["forward"] = lambda hidden_states, *_, **__: hidden_states
        for module in changing:
            module.rope_type = "default"  # type: ignore[assignment]
        yield
    finally:
        for module in experts:
            del module.__dict__["forward"]
        for module, rope_type in zip(changing, rope_types, strict=True):
            module.rope_type = rope_type


def _windowed(config: Any) -> bool:
    layer_types = getattr(config, "layer_types", None)
    return "sliding_attention" in layer_types if layer_types else bool(getattr(config, "sliding_window", None))


def _unmasked_window(model_class: type, config: Any) -> float:
    """Tokens up to which a model with sliding windows computes the same with and without them.

    Where transformers has no mask for the windows, it leaves them to a cache that forgets, so that what a token sees depends on
    how the prompt was cut into chunks.
    """
    made = vars(sys.modules[model_class.__module__]).keys() & _WINDOW_MASKS
    return math.inf if made or not _windowed(config) else int(config.sliding_window)


def _check_masks(architecture: str, config: Any, windows: Iterable[int | None]) -> None:
    """Refuse an architecture that nobody has tested if its masks may hide tokens in a way of which its attention is not told.

    The interface is told of sliding windows; chunks and others are in the mask alone, which the paged cache does not see, and a
    difference would show only in prompts that are longer than those of the check after loading.
    """
    others = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if others or getattr(config, "attention_chunk_size", None) or (_windowed(config) and not any(windows)):
        raise UnsupportedArchitecture(architecture, "which tokens it sees is in masks that the paged cache does not know of")


def _config_key(config: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True, default=repr).encode()).hexdigest()


def _parameter_name(name: str, expected: Mapping[str, Any], prefix: str) -> str | None:
    """The model's name of a checkpoint tensor: a file may hold the base model only, or name it with the prefix in front."""
    if name in expected:
        return name
    candidates = (f"{prefix}.{name}", name.removeprefix(f"{prefix}."), _RENAMED.get(name, name))
    return next((candidate for candidate in candidates if candidate in expected), None)


def _places(model: torch.nn.Module) -> dict[str, _Place]:
    """The places of everything in the state dict, by its name there."""
    places: dict[str, _Place] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        for key, parameter in module._parameters.items():
            if parameter is not None:
                places[prefix + key] = _Place(module._parameters, key, parameter)
        for key, buffer in module._buffers.items():
            if buffer is not None and key not in module._non_persistent_buffers_set:
                places[prefix + key] = _Place(module._buffers, key, buffer)
    return places


def _tied_groups(model: Any) -> list[list[str]]:
    """The names that one parameter has; where it comes from first."""
    groups: dict[str, list[str]] = {}
    for target, source in model.all_tied_weights_keys.items():
        groups.setdefault(source, [source]).append(target)
    return list(groups.values())


def _decoder_layers(model: Any) -> list[torch.nn.Module]:
    """The outermost list of as many modules as the model has layers."""
    n_layers = int(model.config.get_text_config().num_hidden_layers)
    lists = (module for module in model.modules() if isinstance(module, torch.nn.ModuleList) and len(module) == n_layers)
    return list(next(lists, ()))


def _kinds(layers: Sequence[torch.nn.Module]) -> list[int]:
    """For each layer the number of the first one like it."""
    first: dict[Any, int] = {}
    return [first.setdefault(_structure(layer), number) for number, layer in enumerate(layers)]


_EVERY_MODULE_HAS = frozenset(vars(torch.nn.Module()))


def _structure(layer: torch.nn.Module) -> tuple[Any, ...]:
    """What decides on what a layer does: classes, shapes and settings of all its modules, but not its number."""
    return tuple(
        (
            path,
            type(module),
            tuple((key, tensor.shape) for key, tensor in module._parameters.items() if tensor is not None),
            tuple((key, tensor.shape) for key, tensor in module._buffers.items() if tensor is not None),
            tuple((key, _identity(value)) for key, value in vars(module).items() if key not in _EVERY_MODULE_HAS | {"layer_idx"}),
        )
        for path, module in layer.named_modules()
    )


def _identity(value: Any) -> Any:
    """Equal only for what is the same: settings by value, objects that all layers share by their address."""
    if isinstance(value, bool | int | float | str | None):
        return type(value), value
    if isinstance(value, partial):
        return id(value.func), repr((value.args, value.keywords))
    return repr(value) if isinstance(value, list | tuple | dict) else id(value)


def _gated(model: torch.nn.Module, layers: Sequence[torch.nn.Module]) -> dict[torch.nn.Module, list[str]]:
    """The modules that may have to wait for their weights, with the names of these: whole layers, and what is outside of them."""
    names: dict[torch.nn.Module, list[str]] = {}
    layer: torch.nn.Module | None = None
    layer_prefix = ""
    among_layers = set(layers)
    for path, module in model.named_modules():
        if module in among_layers:
            layer, layer_prefix = module, f"{path}."
        elif layer is not None and not path.startswith(layer_prefix):
            layer = None
        own = [key for key, parameter in module._parameters.items() if parameter is not None]
        own += [
            key for key, buffer in module._buffers.items() if buffer is not None and key not in module._non_persistent_buffers_set
        ]
        if own:
            names.setdefault(layer or module, []).extend(f"{path}.{key}" if path else key for key in own)
    return names


def _stages(model: torch.nn.Module, layers: Sequence[torch.nn.Module], order: Sequence[torch.nn.Module]) -> list[Stage]:
    """Every module that may have to wait, in the order in which a forward pass comes to them; what it left out comes last."""
    names = _gated(model, layers)
    return [Stage(module, tuple(names[module])) for module in dict.fromkeys((*order, *names))]


@torch.no_grad()
def _compute_buffers(model: Any) -> list[tuple[_Place, Tensor]]:
    """Compute the buffers that no checkpoint holds, rotary frequencies for instance, as transformers does after loading."""
    computed: list[tuple[_Place, Tensor]] = []
    for module in model.modules():
        names = [name for name in module._non_persistent_buffers_set if module._buffers.get(name) is not None]
        if not names:
            continue
        for name in names:
            shape, kind = module._buffers[name].shape, module._buffers[name].dtype
            # NaN, so that the check of the first layers sees a buffer that stays empty.
            value = math.nan if kind.is_floating_point else 0
            module._buffers[name] = torch.full(shape, value, dtype=kind)
        for parameter in module.parameters(recurse=False):
            parameter._is_hf_initialized = True
        model._init_weights(module)
        computed += [(_Place(module._buffers, name, module._buffers[name]), module._buffers[name]) for name in names]
    return computed
