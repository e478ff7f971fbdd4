"""Checkpoints as tests need them: well-made ones by safetensors itself, damaged ones byte by byte."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from sllmdask.loader import libc

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def write_sharded() -> Callable[[Path, list[Tensors]], Path]:
    """``write_sharded(directory, shards)``: safetensors files, their index and a config, as the hub has them."""

    def write(directory: Path, shards: list[Tensors]) -> Path:
        directory.mkdir(parents=True, exist_ok=True)
        weight_map = {}
        for number, tensors in enumerate(shards, 1):
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
            safetensors.torch.save_file(tensors, directory / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(tensors, file)
        (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        (directory / "config.json").write_text('{"model_type": "test"}')
        return directory

    return write


@pytest.fixture
def write_single() -> Callable[[Path, Tensors], Path]:
    """``write_single(directory, tensors)``: one ``model.safetensors`` and a config."""

    def write(directory: Path, tensors: Tensors) -> Path:
        directory.mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_file(tensors, directory / "model.safetensors")
        (directory / "config.json").write_text('{"model_type": "test"}')
        return directory

    return write


@pytest.fixture
def write_raw() -> Callable[..., Path]:
    """``write_raw(path, header, data)``: a file with just this header, given as text or as what JSON makes of it."""

    def write(path: Path, header: object, data: bytes = b"") -> Path:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data)
        return path

    return write


@pytest.fixture
def assert_equal() -> Callable[[Tensors, Tensors], None]:
    """Same names, dtypes, shapes and bytes: NaN and every 8-bit float included."""

    def check(actual: Tensors, expected: Tensors) -> None:
        assert actual.keys() == expected.keys()
        for name, tensor in expected.items():
            assert (actual[name].dtype, actual[name].shape) == (tensor.dtype, tensor.shape), name
            assert actual[name].is_contiguous(), name
            if tensor.numel():
                theirs, ours = (t.contiguous().reshape(-1).view(torch.uint8) for t in (tensor, actual[name]))
                assert torch.equal(ours, theirs), name

    return check


@pytest.fixture
def preads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Grows by (offset, nbytes) with each read of tensor data."""
    seen: list[tuple[int, int]] = []
    pread = libc.pread

    def counting(fd: int, address: int, nbytes: int, offset: int) -> int:
        seen.append((offset, nbytes))
        return pread(fd, address, nbytes, offset)

    monkeypatch.setattr(libc, "pread", counting)
    return seen


@pytest.fixture
def n_fds() -> Callable[[], int]:
    return lambda: len(os.listdir("/proc/self/fd"))
