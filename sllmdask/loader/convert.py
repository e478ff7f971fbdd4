"""Converts checkpoints to our own format: whatever :func:`sllmdask.loader.format.read_index` reads, and pickles.

Nothing is held in memory but the chunks on their way (:mod:`sllmdask.loader.writer`).
"""

from __future__ import annotations

import logging
import os
import re
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from sllmdask.errors import CheckpointNotFound
from sllmdask.loader.fast_format import INDEXES
from sllmdask.loader.format import read_index, variants
from sllmdask.loader.sources import OpenFiles, TensorSource, from_bytes, index_sources
from sllmdask.loader.verify import Problem, Verified, verify
from sllmdask.loader.writer import PARTITION, PICKLED, Written, refuse_target, write_checkpoint, written_names

__all__ = [
    "Problem",
    "TensorSource",
    "Verified",
    "Written",
    "convert",
    "files_beside",
    "from_bytes",
    "verify",
    "write_checkpoint",
]

_log = logging.getLogger(__name__)

#: Weights in any format, and pickles: what is not copied beside a converted checkpoint.
_WEIGHTS_SUFFIX = re.compile(
    r"\.(safetensors|bin|pt|pth|ckpt|pkl|pickle|joblib|npy|npz|h5|msgpack|ot|gguf|ggml|onnx|onnx_data|tflite)(\.index\.json)?$",
    re.I,
)


def _is_pickled(source: Path) -> bool:
    if source.is_file():
        return source.suffix in (".bin", ".pt", ".pth", ".ckpt")
    return any((source / name).exists() for name in PICKLED)


def _pickled_sources(source: Path) -> dict[str, TensorSource]:
    # torch is loaded only here: nothing else of a conversion needs it.
    from sllmdask.loader import tiers

    _log.warning("path=%s is pickled; only its tensors are read, and no code of it is run. Prefer safetensors.", source)
    return tiers.sources_of(tiers.load_pickled(source))


def _leads_out(path: Path, root: Path) -> bool:
    """Whether `path`, through links, is a file that does not belong to the checkpoint in `root`."""
    real = path.resolve()
    # The hub's cache keeps contents in blobs/, beside snapshots/<revision>/, which links to them.
    homes = [root.resolve()] + ([root.parent.parent.resolve() / "blobs"] if root.parent.name == "snapshots" else [])
    return not any(real.is_relative_to(home) for home in homes)


def files_beside(source: str | os.PathLike[str]) -> dict[str, Path]:
    """The files of a checkpoint that are no weights, by name: configuration, tokenizer, chat templates, code.

    No weights of any format and no pickles, nothing hidden, and no link that leads out of the checkpoint. Raises
    :class:`CheckpointNotFound` for a file that cannot be read.
    """
    root = Path(source)
    if not root.is_dir():
        return {}
    beside = {}
    for directory, subdirectories, names in os.walk(root):
        subdirectories[:] = sorted(name for name in subdirectories if not name.startswith("."))
        for name in sorted(names):
            path = Path(directory) / name
            relative = path.relative_to(root).as_posix()
            if name.startswith(".") or _WEIGHTS_SUFFIX.search(name) or relative in INDEXES.values():
                continue
            if _leads_out(path, root):
                _log.warning("path=%s is not copied: it is a link out of the checkpoint", path)
                continue
            if not path.is_file():
                continue
            try:
                with open(path, "rb") as opened:
                    start = opened.read(2)
            except OSError as error:
                raise CheckpointNotFound(str(root), f"{relative} cannot be read: {error.strerror}") from None
            # A pickle of protocol 2 or later, by whatever name.
            if len(start) == 2 and start[0] == 0x80 and 2 <= start[1] <= 5:
                _log.warning("path=%s is not copied: it is a pickle", path)
                continue
            beside[relative] = path
    return beside


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    compress: str = "no",
    on_progress: Callable[[int], None] | None = None,
    cancel: threading.Event | None = None,
    *,
    overwrite: bool = False,
    partition_nbytes: int = PARTITION,
    n_threads: int | None = None,
) -> Written:
    """Write the checkpoint at `source` to the directory `target` in our own format, with the files beside its weights.

    `source` is a directory or a file: safetensors, our own format (to add or drop a variant) or, with a warning in the log, a
    pickle, of which only tensors are read. Arguments, memory and errors are those of :func:`write_checkpoint`, and the errors
    of :func:`sllmdask.loader.format.read_index`.
    """
    source = Path(source).absolute()
    beside = files_beside(source)
    refuse_target(Path(target).absolute(), overwrite, written_names(compress, beside))

    def write(tensors: Mapping[str, TensorSource]) -> Written:
        return write_checkpoint(
            tensors,
            target,
            files_beside=beside,
            compress=compress,
            overwrite=overwrite,
            partition_nbytes=partition_nbytes,
            n_threads=n_threads,
            on_progress=on_progress,
            cancel=cancel,
        )

    if not variants(source) and _is_pickled(source):
        return write(_pickled_sources(source))
    index = read_index(source)
    with OpenFiles(index) as files:
        return write(index_sources(files, index))
