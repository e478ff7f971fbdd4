"""Parameters that are not in the checkpoint as the model has them: other names, experts one by one, halves to be joined.

transformers changes how its models hold their weights, and keeps a table of what older files call them and how they are laid out:
the experts of a mixture, one tensor per expert and projection in the file, are one parameter with three dimensions in the model.
The table is transformers' own (``transformers.conversion_mapping``); what is done here is to follow it without reading anything
early and without a second copy: the fused parameter is allocated once, and each tensor is copied into its slice when it is there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from sllmdask.errors import CheckpointCorrupt

#: Ends of the names of what MXFP4 keeps of a tensor: pairs of 4-bit numbers, and for each 32 of them an exponent.
MXFP4 = ("_blocks", "_scales")
_MXFP4_BLOCK = 32
#: E2M1: a sign, two bits of exponent, one of mantissa.
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


class Fusion(Protocol):
    """Parameters that are made of other tensors; :meth:`take` each of `sources`, then :meth:`finish`."""

    #: Names in the checkpoint.
    sources: tuple[str, ...]
    #: Names in the model.
    parameters: tuple[str, ...]

    def take(self, source: str) -> None:
        """The bytes of this tensor are there. They are used now, or at the latest by :meth:`finish`."""

    def finish(self) -> dict[str, Tensor]:
        """The parameters by name; the tensors of the checkpoint are not needed any more."""


@dataclass(frozen=True)
class Group:
    """Tensors of the checkpoint that one converter of transformers turns into parameters."""

    #: ``None``: blocks and scales of MXFP4, see :class:`_Dequantized`.
    converter: Any
    #: The parameter; where the converter makes several of one tensor, the first.
    parameter: str
    #: Names in the checkpoint by the converter's pattern, experts in the order of their numbers.
    names: dict[str, list[str]] = field(default_factory=dict)

    def __iter__(self) -> Iterator[str]:
        return (name for names in self.names.values() for name in names)


def assign_names(
    model: Any, names: Sequence[str], resolve: Callable[[str], str | None]
) -> tuple[dict[str, str], list[Group], list[str]]:
    """For each name in a checkpoint the parameter of the model that it becomes, or the group that it is a part of.

    `resolve` gives the model's name of one that has been translated, or ``None`` if there is none. Returns parameters by name in
    the checkpoint, the groups, and the names that the model has no use for.
    """
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    converter_of = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    plain: dict[str, str] = {}
    groups: dict[str, Group] = {}
    unexpected: list[str] = []
    # In this order experts are counted as transformers counts them, and renamings that depend on each other come in turn.
    for name in sorted(names, key=dot_natural_key):
        renamed, pattern = rename_source_key(name, renamings, converters)
        parameter = resolve(renamed)
        if parameter is None:
            # A file that was written in the present layout, with a name that looks like an old one.
            parameter, pattern = resolve(name), None
        if parameter is None and name.endswith(MXFP4):
            pattern = name[name.rindex("_") :]
            parameter = resolve(renamed.removesuffix(pattern))
        if parameter is None:
            unexpected.append(name)
        elif pattern is None:
            plain[name] = parameter
        else:
            group = groups.setdefault(parameter, Group(converter_of.get(pattern), parameter))
            group.names.setdefault(pattern, []).append(name)
    return plain, list(groups.values()), unexpected


def make_fusion(
    group: Group,
    model: Any,
    shapes: Mapping[str, torch.Size],
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype,
    device: torch.device,
    checkpoint: str,
) -> Fusion:
    """How the parameters of `group`, whose `shapes` are given by name, come from `tensors`. Reads none of them.

    Raises :class:`CheckpointCorrupt` if a tensor is missing, or of another shape than the model has room for.
    """
    for pattern in MXFP4 if group.converter is None else group.converter.source_patterns:
        if pattern not in group.names:
            raise CheckpointCorrupt(checkpoint, _sibling(group, pattern), f"it is missing; {group.parameter!r} is made of it")
    goal = _Goal(shapes, dtype, device, checkpoint)
    if group.converter is None:
        return _Dequantized(group, tensors, goal)
    slices = _slices(group, shapes[group.parameter], tensors, checkpoint)
    if slices is not None:
        return _Sliced(group.parameter, slices, tensors, goal)
    return _Converted(group, model, tensors, goal)


@dataclass(frozen=True)
class _Goal:
    """What the parameters are to be: `shapes` by name, of `dtype` on `device`; `checkpoint` is named where that cannot be."""

    shapes: Mapping[str, torch.Size]
    dtype: torch.dtype
    device: torch.device
    checkpoint: str

    def empty(self, parameter: str) -> Tensor:
        return torch.empty(self.shapes[parameter], dtype=self.dtype, device=self.device)


#: Takes a tensor of the parameter's shape, and gives the part of it that a tensor of the checkpoint fills.
_View = Callable[[Tensor], Tensor]


class _Sliced:
    """One parameter whose slices are the tensors of the checkpoint."""

    def __init__(self, parameter: str, slices: Mapping[str, _View], tensors: Mapping[str, Tensor], goal: _Goal) -> None:
        self.sources = tuple(slices)
        self.parameters: tuple[str, ...] = (parameter,)
        self._slices = slices
        self._tensors = {name: tensors[name] for name in slices}
        self._goal = goal
        self._whole: Tensor | None = None

    def take(self, source: str) -> None:
        if self._whole is None:
            self._whole = self._goal.empty(self.parameters[0])
        self._slices[source](self._whole).copy_(self._tensors.pop(source))

    def finish(self) -> dict[str, Tensor]:
        assert self._whole is not None
        whole, self._whole = self._whole, None
        return {self.parameters[0]: whole}


class _Converted:
    """Parameters that transformers' own operations make, once all tensors are there."""

    def __init__(self, group: Group, model: Any, tensors: Mapping[str, Tensor], goal: _Goal) -> None:
        self.sources = tuple(group)
        self._group = group
        self._model = model
        self._tensors = {name: tensors[name] for name in group}
        self._goal = goal
        try:
            found = self._convert({name: torch.empty_like(tensor, device="meta") for name, tensor in self._tensors.items()})
        except (IndexError, RuntimeError, ValueError) as error:
            reason = f"{group.parameter!r} cannot be made of it ({error})"
            raise CheckpointCorrupt(goal.checkpoint, self.sources[0], reason) from error
        self.parameters = tuple(found)
        for name, tensor in found.items():
            if goal.shapes.get(name) != tensor.shape:
                expected = list(goal.shapes[name]) if name in goal.shapes else "no such parameter"
                reason = f"it makes {name!r} of the shape {list(tensor.shape)}, but config.json asks for {expected}"
                raise CheckpointCorrupt(goal.checkpoint, self.sources[0], reason)

    def take(self, source: str) -> None:
        pass

    def finish(self) -> dict[str, Tensor]:
        made = self._convert(self._tensors)
        self._tensors.clear()
        return {
            name: tensor.to(self._goal.device, self._goal.dtype if tensor.is_floating_point() else tensor.dtype).contiguous()
            for name, tensor in made.items()
        }

    def _convert(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        converter = copy.deepcopy(self._group.converter)
        for pattern, names in self._group.names.items():
            for name in names:
                # What can be called is called where the tensor is needed.
                converter.add_tensor(self._group.parameter, name, pattern, lambda tensor=tensors[name]: tensor)
        made = converter.convert(self._group.parameter, model=self._model, config=self._model.config)
        return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in made.items()}


class _Dequantized:
    """Experts of GPT-OSS, which its checkpoints hold in MXFP4, four bits and a quarter per number, in the dtype that is served.

    Of a parameter (E, K, R) there are blocks (E, R, K / 32, 16), with two numbers per byte, the lower half first, and scales
    (E, R, K / 32), powers of two with a bias of 127.
    Source: OCP Microscaling Formats (MX) Specification 1.0.
    """

    def __init__(self, group: Group, tensors: Mapping[str, Tensor], goal: _Goal) -> None:
        self.sources = tuple(group)
        self.parameters: tuple[str, ...] = (group.parameter,)
        shape = goal.shapes[group.parameter]
        [blocks], [scales] = (group.names[ending] for ending in MXFP4)
        n_experts, n_inner, n_outer = shape if len(shape) == 3 else (0, 0, 0)
        n_blocks = n_inner // _MXFP4_BLOCK
        for name, expected in (
            (blocks, [n_experts, n_outer, n_blocks, _MXFP4_BLOCK // 2]),
            (scales, [n_experts, n_outer, n_blocks]),
        ):
            if list(tensors[name].shape) != expected or tensors[name].dtype != torch.uint8 or n_inner % _MXFP4_BLOCK:
                reason = f"it is {tensors[name].dtype} {list(tensors[name].shape)}, but config.json asks for uint8 {expected}"
                raise CheckpointCorrupt(goal.checkpoint, name, reason)
        self._tensors = {"blocks": tensors[blocks], "scales": tensors[scales]}
        self._goal = goal

    def take(self, source: str) -> None:
        pass

    def finish(self) -> dict[str, Tensor]:
        blocks, scales = self._tensors.pop("blocks"), self._tensors.pop("scales")
        whole = self._goal.empty(self.parameters[0])
        numbers = torch.tensor(_E2M1, device=blocks.device)
        # One expert after the other: what is between takes eight times its room.
        for expert in range(len(whole)):
            halves = torch.stack((blocks[expert] & 0x0F, blocks[expert] >> 4), dim=-1).flatten(-2)
            exponents = scales[expert].to(torch.int32)[..., None] - 127
            whole[expert].copy_(torch.ldexp(numbers[halves.int()], exponents).flatten(-2).T)
        return {self.parameters[0]: whole}


def _slices(group: Group, shape: torch.Size, tensors: Mapping[str, Tensor], checkpoint: str) -> dict[str, _View] | None:
    """Which slice of the parameter each tensor is; ``None`` if the operations are others than to stack and to join."""
    operations = group.converter.operations
    match [type(operation) for operation in operations]:
        case [stack, join] if stack is MergeModulelist and join is Concatenate:
            stack_dim, join_dim = operations[0].dim, operations[1].dim
        case [stack] if stack is MergeModulelist:
            stack_dim, join_dim = operations[0].dim, None
        case [join] if join is Concatenate:
            stack_dim, join_dim = None, operations[0].dim
        case _:
            return None
    if stack_dim == join_dim or min(stack_dim or 0, join_dim or 0) < 0:
        return None
    ordered = [group.names[pattern] for pattern in group.converter.source_patterns]
    blocks = ordered if stack_dim is not None else [[name] for names in ordered for name in names]
    whole = torch.empty(shape, device="meta")
    if stack_dim is not None:
        for block in blocks:
            _check_count(block, whole.shape[stack_dim], checkpoint)
    starts = [0]
    for block in blocks:
        size = list(tensors[block[0]].shape)
        if stack_dim is not None:
            size.insert(stack_dim, len(block))
        starts.append(starts[-1] + (size[join_dim] if join_dim is not None and join_dim < len(size) else 0))
    if join_dim is not None and starts[-1] != shape[join_dim]:
        # Equal shares, so that the one that is to blame is named below.
        starts = [shape[join_dim] * number // len(blocks) for number in range(len(blocks) + 1)]
    slices: dict[str, _View] = {}
    for block, start, stop in zip(blocks, starts, starts[1:], strict=False):
        for number, name in enumerate(block):
            slices[name] = _view(join_dim, start, stop, stack_dim, number)
            expected, found = slices[name](whole).shape, tensors[name].shape
            if found != expected:
                reason = f"its shape is {list(found)}, but config.json asks for {list(expected)}"
                raise CheckpointCorrupt(checkpoint, name, reason)
    return slices


def _view(join_dim: int | None, start: int, stop: int, stack_dim: int | None, number: int) -> _View:
    def view(whole: Tensor) -> Tensor:
        part = whole if join_dim is None else whole.narrow(join_dim, start, stop - start)
        return part if stack_dim is None else part.select(stack_dim, number)

    return view


def _check_count(names: Sequence[str], expected: int, checkpoint: str) -> None:
    """Of experts 0..expected-1 none is missing, and there are no others."""
    numbers = [_number(name) for name in names]
    if None in numbers:
        numbers = list(range(len(names)))
    for number in range(expected):
        if number not in numbers:
            missing = _renumbered(names[0], number)
            raise CheckpointCorrupt(checkpoint, missing, f"it is missing; {len(names)} of {expected} like it are there")
    for name, found in zip(names, numbers, strict=True):
        if found is not None and found >= expected:
            raise CheckpointCorrupt(checkpoint, name, f"config.json asks for {expected} like it, numbered from 0")


def _number(name: str) -> int | None:
    """The last of the numbers between the dots of a name: that of the expert."""
    return next((int(part) for part in reversed(name.split(".")) if part.isdigit()), None)


def _renumbered(name: str, number: int) -> str:
    parts = name.split(".")
    place = next((place for place in range(len(parts) - 1, -1, -1) if parts[place].isdigit()), None)
    if place is not None:
        parts[place] = str(number)
    return ".".join(parts)


def _sibling(group: Group, pattern: str) -> str:
    """What the first tensor of a pattern would be called, of which there is none, by another that is there."""
    present, names = next(iter(group.names.items()))
    tail, wanted = (each.rpartition("*")[2].replace("\\", "") for each in (present, pattern))
    name = names[0]
    return name.removesuffix(tail) + wanted if name.endswith(tail) else group.parameter
