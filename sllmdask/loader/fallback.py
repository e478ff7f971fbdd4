"""A checkpoint from other workers, and, when they are gone, from where they had it themselves.

A load that somebody builds upon already cannot begin again elsewhere: the same bytes have to go on coming, from wherever.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Self

from sllmdask.errors import Cancelled, CheckpointCorrupt, SllmError, SourceUnreachable
from sllmdask.loader import fast_format
from sllmdask.loader.fetch import Origin
from sllmdask.loader.format import CheckpointIndex
from sllmdask.loader.plan import ChunkRead
from sllmdask.loader.reader import ChunkSource
from sllmdask.loader.tee import Manifest, Partial


class Fallback:
    """An :class:`Origin`: `first`, and, once that fails, ``second(variant)``, if what is there is the same checkpoint still."""

    def __init__(self, first: Origin, second: Callable[[str | None], Origin]) -> None:
        self._first, self._second = first, second
        self._manifest: Manifest | None = None

    def survey(self, cancel: threading.Event) -> Manifest:
        """As `first` says; raises what it raises."""
        self._manifest = self._first.survey(cancel)
        return self._manifest

    def chunks(self, index: CheckpointIndex, partial: Partial, numbers: Sequence[int], cancel: threading.Event) -> ChunkSource:
        """A source of the bytes of `index`'s files, whose numbers in the manifest are `numbers`."""
        assert self._manifest is not None
        manifest = self._manifest

        def other() -> ChunkSource:
            origin = self._second(_variant(manifest))
            if not _same(index, manifest, origin.survey(cancel)):
                raise SourceUnreachable(manifest.source, "what is at its source is another version")
            return origin.chunks(index, partial, numbers, cancel)

        return _Chunks(self._first.chunks(index, partial, numbers, cancel), other)


class _Chunks:
    """A :class:`ChunkSource`; ``second()`` is asked for once, by the thread that `first` fails first."""

    def __init__(self, first: ChunkSource, second: Callable[[], ChunkSource]) -> None:
        self._first, self._make_second = first, second
        self._second: ChunkSource | None = None
        self._failure: SllmError | None = None
        self._lock = threading.Lock()
        self._opened = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as opened:
            try:
                opened.enter_context(self._first)
            except (SourceUnreachable, CheckpointCorrupt) as error:
                self._opened = opened
                self._switch(error)
            self._opened = opened.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._opened.__exit__(kind, error, trace)

    def fetch(self, chunk: ChunkRead, address: int) -> None:
        """Bring the wanted bytes of `chunk` to `address`.

        Raises :class:`SourceUnreachable` when both have failed, what the second one raises, and :class:`Cancelled`.
        """
        second = self._second
        if second is None:
            try:
                self._first.fetch(chunk, address)
                return
            except (SourceUnreachable, CheckpointCorrupt) as error:
                second = self._switch(error)
        second.fetch(chunk, address)

    def _switch(self, error: SourceUnreachable | CheckpointCorrupt) -> ChunkSource:
        with self._lock:
            if self._second is None and self._failure is None:
                try:
                    self._second = self._opened.enter_context(self._make_second())
                except Cancelled:
                    raise
                except SllmError as another:
                    source = error.source if isinstance(error, SourceUnreachable) else error.file
                    self._failure = SourceUnreachable(source, f"{error.reason}; nor could it be had elsewhere: {another.message}")
            if self._failure is not None:
                raise type(self._failure)(*self._failure.args)
            assert self._second is not None
            return self._second


def _variant(manifest: Manifest) -> str | None:
    """Which of our format's variants it is."""
    names = {file.name for file in manifest.files}
    return next((variant for variant, name in fast_format.INDEXES.items() if name in names), None)


def _same(index: CheckpointIndex, manifest: Manifest, other: Manifest) -> bool:
    """Whether two places have the same bytes of `index`'s files: what the fingerprint of an index says, too."""
    here, there = ({file.name: file for file in each.files} for each in (manifest, other))
    if index.format == "fast":
        # Its index has checksums of all else.
        names = [name for name in fast_format.INDEXES.values() if name in here]
        return all(name in there and there[name].head == here[name].head for name in names)
    return all(
        file.name in there
        and (there[file.name].nbytes, there[file.name].head, there[file.name].modified_ns)
        == (here[file.name].nbytes, here[file.name].head, here[file.name].modified_ns)
        for file in index.files
    )


__all__ = ["Fallback"]
