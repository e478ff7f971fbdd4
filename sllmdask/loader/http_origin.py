"""Checkpoints behind HTTP: what is there is found out by its small files and its headers, data comes by ranges.

Each of the reader's threads has one connection and one request under way. A server without ranges is read as one stream, file
by file.
"""

from __future__ import annotations

import fnmatch
import hashlib
import ssl
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import TracebackType
from typing import Self
from urllib.parse import quote, urljoin

from sllmdask.errors import Cancelled, CheckpointCorrupt, CheckpointNotFound, ConfigError
from sllmdask.loader import fast_format, libc
from sllmdask.loader.access import Access, split_url
from sllmdask.loader.arrivals import fresh
from sllmdask.loader.format import ADAPTER, MAX_HEADER, SHARDED, SINGLE, SMALL_PATTERNS, CheckpointIndex, parse_json
from sllmdask.loader.http_client import HttpClient, HttpFile
from sllmdask.loader.plan import ChunkRead
from sllmdask.loader.reader import ChunkSource
from sllmdask.loader.sockets import Limits
from sllmdask.loader.tee import FarFile, Manifest, Partial, check_name

#: Configuration and tokenizer, for a server that lists nothing.
_SMALL_NAMES = (
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "1_Pooling/config.json",
)
#: Bytes of the largest file that is taken for a small one, and of all of them.
_MAX_SMALL, _MAX_ALL_SMALL = MAX_HEADER, 4 * MAX_HEADER
#: Files that one checkpoint may have.
MAX_FILES = 10_000
#: Bytes: what is asked of a file to have its header, most often in one request.
FIRST_READ = 256 * 1024


# --- chunks ----------------------------------------------------------------------------------------------------------


class _DiskFailed(Exception):
    """Our own disk, and not the network: to ask the server again is no help."""

    def __init__(self, error: OSError) -> None:
        super().__init__(error)
        self.error = error


class _HttpChunks:
    """A :class:`ChunkSource` over HTTP; `files` by the plan's numbers, `numbers` are those of the same files in `partial`."""

    def __init__(self, client: HttpClient, files: Sequence[HttpFile], partial: Partial, numbers: Sequence[int]) -> None:
        self._client, self._files = client, files
        self._spools = {i: _Spool(client, file, partial, numbers[i]) for i, file in enumerate(files) if not file.ranges}

    def __enter__(self) -> Self:
        self._client.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for spool in self._spools.values():
            spool.stop()
        self._client.__exit__(kind, error, trace)
        for spool in self._spools.values():
            spool.join()

    def fetch(self, chunk: ChunkRead, address: int) -> None:
        """Bring the wanted bytes of `chunk` to `address`."""
        if chunk.file in self._spools:
            self._spools[chunk.file].fetch(chunk, address)
        else:
            self._client.range(self._files[chunk.file], chunk.offset, chunk.wanted, address)


class _Spool:
    """One file of a server without ranges: a thread writes it to disk in its order, and chunks are taken from there."""

    def __init__(self, client: HttpClient, file: HttpFile, partial: Partial, number: int) -> None:
        self._client, self._file, self._partial, self._number = client, file, partial, number
        self._front = 0
        self._error: BaseException | None = None
        self._stopped = False
        self._moved = threading.Condition()
        self._thread: threading.Thread | None = None

    def fetch(self, chunk: ChunkRead, address: int) -> None:
        with self._moved:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=f"stream {self._file.name}", daemon=True)
                self._thread.start()
            self._moved.wait_for(lambda: self._error is not None or self._front >= chunk.offset + chunk.wanted)
            if self._front < chunk.offset + chunk.wanted:
                assert self._error is not None
                # Made anew: several threads must not add their frames to one traceback.
                raise fresh(self._error)
        if not self._partial.pread(self._number, chunk.offset, chunk.wanted, address):
            raise CheckpointCorrupt(self._file.name, None, "its disk copy was cut while it was filled")
        self._partial.note(self._number, chunk.offset, chunk.wanted, address)

    def stop(self) -> None:
        self._stopped = True

    def join(self) -> None:
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        try:
            self._client.stream(self._file, self._take)
        except BaseException as error:  # noqa: BLE001 - raised again by the threads that wait
            with self._moved:
                self._error = error.error if isinstance(error, _DiskFailed) else error
                self._moved.notify_all()

    def _take(self, offset: int, data: memoryview) -> None:
        if self._stopped:
            raise Cancelled("nobody waits for it any more")
        try:
            self._partial.put(self._number, offset, data)
        except OSError as error:
            raise _DiskFailed(error) from None
        with self._moved:
            self._front = offset + len(data)
            self._moved.notify_all()


# --- where checkpoints are -------------------------------------------------------------------------------------------


class HttpOrigin:
    """What the two kinds of server have in common. `_list` says which files there are, where the server tells."""

    def __init__(
        self,
        source: str,
        url: str,
        access: Access,
        limits: Limits,
        headers: Mapping[str, str],
        variant: str | None,
        tls: ssl.SSLContext | None,
    ) -> None:
        access.check(url)
        self._source, self._url, self._access, self._limits = source, url, access, limits
        self._headers, self._variant, self._tls = headers, variant, tls
        self._files: dict[str, HttpFile] = {}
        self._revision = ""

    def _client(self, cancel: threading.Event) -> HttpClient:
        return HttpClient(self._access, self._limits, self._headers, self._url, cancel, self._tls)

    def _list(self) -> Mapping[str, HttpFile] | None:
        return None

    def _at(self, name: str) -> HttpFile:
        check_name(self._url, name)
        return HttpFile(name, urljoin(self._url, quote(name)))

    def survey(self, cancel: threading.Event) -> Manifest:
        listed = self._list()
        with self._client(cancel) as client:

            def find(name: str) -> HttpFile | None:
                if listed is None:
                    return self._at(name)
                return listed.get(name)

            smalls: dict[str, bytes] = {}

            def small(name: str) -> bytes | None:
                if name not in smalls and (file := find(name)) is not None:
                    text = client.small(file, _MAX_SMALL)
                    if text is not None:
                        smalls[name], self._files[name] = text, file
                return smalls.get(name)

            heads = self._weights(client, find, small)
            names = _SMALL_NAMES if listed is None else [name for name in listed if _is_small(name) and name not in heads]
            names = [name for name in names if listed is None or (listed[name].nbytes or 0) <= _MAX_SMALL]
            with ThreadPoolExecutor(8, thread_name_prefix="small") as pool:
                list(pool.map(small, names))
        if sum(map(len, smalls.values())) > _MAX_ALL_SMALL:
            raise CheckpointCorrupt(self._source, None, f"its small files have more than {_MAX_ALL_SMALL} bytes")
        now = time.time_ns()
        files = tuple(
            FarFile(name, file.nbytes or 0, (smalls | heads)[name], file.modified_ns or now, file.tag or "", file.sha256)
            for name, file in sorted(self._files.items())
            if name in smalls or name in heads
        )
        # Where nothing tells whether a file has changed, nothing of an earlier fetch can be used.
        told = self._revision or all(file.tag or file.name in smalls for file in files)
        state = repr([(file.name, file.nbytes, file.tag, file.head) for file in files])
        revision = self._revision or (hashlib.sha256(state.encode()).hexdigest() if told else uuid.uuid4().hex)
        return Manifest(self._source, revision, files)

    def _weights(
        self, client: HttpClient, find: Callable[[str], HttpFile | None], small: Callable[[str], bytes | None]
    ) -> dict[str, bytes]:
        """The heads of the files that hold tensors."""
        preferred = [self._variant] if self._variant else ["split16", "raw"]
        for variant in preferred:
            name = fast_format.INDEXES[variant]
            text = small(name)
            if text is not None and text.startswith(f'{{"magic":"{fast_format.MAGIC}"'.encode()):
                index = fast_format.parse_index(text, urljoin(self._url, name), variant)
                sizes = {file.name: file.nbytes for file in index.files}
                return self._heads(client, find, sizes, header=False)
        if (file := find(SINGLE)) is not None and (found := self._header(client, file)) is not None:
            return {SINGLE: found}
        if (text := small(SHARDED)) is not None:
            weight_map = parse_json(text, urljoin(self._url, SHARDED), "the file").get("weight_map")
            names = set(weight_map.values()) if isinstance(weight_map, dict) and all(map(_is_str, weight_map.values())) else set()
            if not names or len(names) > MAX_FILES:
                raise CheckpointCorrupt(urljoin(self._url, SHARDED), None, "weight_map does not map tensors to files")
            return self._heads(client, find, dict.fromkeys(sorted(names)), header=True)
        if (file := find(ADAPTER)) is not None and (found := self._header(client, file)) is not None:
            return {ADAPTER: found}
        raise CheckpointNotFound(
            self._source, f"there is neither {SINGLE} nor {SHARDED} nor an index of our own format at {self._url}"
        )

    def _heads(
        self, client: HttpClient, find: Callable[[str], HttpFile | None], sizes: Mapping[str, int | None], *, header: bool
    ) -> dict[str, bytes]:
        def head(name: str) -> bytes:
            check_name(self._url, name)
            file = find(name)
            found = None
            if file is not None:
                found = self._header(client, file) if header else client.head(file, 1)
            if file is None or found is None:
                raise CheckpointNotFound(self._source, f"{name} is not there, and the index names it")
            if not header and file.nbytes != sizes[name]:
                raise CheckpointCorrupt(file.url, None, f"it has {file.nbytes} bytes, and its index says {sizes[name]}")
            self._files[name] = file
            return found if header else b""

        with ThreadPoolExecutor(8, thread_name_prefix="head") as pool:
            return dict(zip(sizes, pool.map(head, sizes), strict=True))

    def _header(self, client: HttpClient, file: HttpFile) -> bytes | None:
        """The header of a safetensors file; what is no such is left to the one who reads it."""
        found = client.head(file, FIRST_READ)
        if found is None:
            return None
        end = 8 + int.from_bytes(found[:8], "little")
        if end > len(found) and len(found) >= 8 and end <= min(8 + MAX_HEADER, file.nbytes or 0):
            if file.ranges:
                rest = bytearray(end - len(found))
                client.range(file, len(found), len(rest), libc.address_of_bytes(rest))
                found += bytes(rest)
            else:
                found = client.head(file, end) or b""
        self._files[file.name] = file
        return found[:end]

    def chunks(self, index: CheckpointIndex, partial: Partial, numbers: Sequence[int], cancel: threading.Event) -> ChunkSource:
        files = [replace(self._files[file.name]) for file in index.files]
        return _HttpChunks(self._client(cancel), files, partial, numbers)


def _is_str(value: object) -> bool:
    return isinstance(value, str)


def _is_small(name: str) -> bool:
    # Our own format's indexes are fetched with what they index: of two variants, one.
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in SMALL_PATTERNS) and name not in fast_format.INDEXES.values()


class HttpDirectory(HttpOrigin):
    """The files of a checkpoint, of either format, below `url`. `headers` may hold ``Authorization``, for `url`'s host alone.

    `variant`: which of our format's variants; ``None``: the smaller one that is there. Raises :class:`ConfigError` if `url` may
    not be asked.
    """

    def __init__(
        self,
        url: str,
        *,
        access: Access | None = None,
        limits: Limits | None = None,
        headers: Mapping[str, str] | None = None,
        variant: str | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        if split_url(url).query or split_url(url).fragment:
            raise ConfigError(f"{url!r} is not the address of a directory")
        base = url if url.endswith("/") else url + "/"
        super().__init__(url, base, access or Access(), limits or Limits(), headers or {}, variant, tls)
