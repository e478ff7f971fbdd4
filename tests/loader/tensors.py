"""Tensors and files of tests, and whether two of them are the same."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch


def bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Random bytes as a tensor of `dtype`: NaN, denormals and all. Booleans are 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    n = torch.Size(shape).numel() * dtype.itemsize
    data = torch.randint(0, 2 if dtype is torch.bool else 256, (n,), dtype=torch.uint8, generator=generator)
    return data.view(dtype).reshape(shape)


def octets(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor, wherever it is."""
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def assert_same(actual: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Same names, dtypes, shapes and bytes."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (actual[name].dtype, actual[name].shape) == (tensor.dtype, tensor.shape), name
        assert octets(actual[name]) == octets(tensor), name


def files_of(directory: Path) -> dict[str, bytes]:
    """All files below `directory`, by path."""
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()}
