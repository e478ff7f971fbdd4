"""Checkpoints that are elsewhere, by name: a directory behind HTTP, or a model on the Hugging Face hub.

Here is what a source is called on this disk, whether it is there already, and who is to be asked for it.
"""

from __future__ import annotations

import hashlib
import re
import threading
from pathlib import Path
from urllib.parse import quote

from sllmdask.errors import CheckpointNotFound
from sllmdask.loader.access import Access, split_url
from sllmdask.loader.fetch import Fetch, Origin
from sllmdask.loader.http_origin import HttpDirectory
from sllmdask.loader.hub import HubModel, find_cached, is_hub_id
from sllmdask.loader.sockets import Limits


def is_remote(source: str) -> bool:
    """Whether `source` is the address of a directory behind HTTP, or could be the id of a model on the hub."""
    return source.startswith(("http://", "https://")) or is_hub_id(source)


def local_name(source: str, revision: str | None = None) -> str:
    """The name of the directory that the files of `source` are kept in: another one for each source and revision, readable."""
    if not source.startswith(("http://", "https://")):
        return source.replace("/", "--") + (f"--{quote(revision, safe='')}" if revision else "")
    parsed = split_url(source.rstrip("/"))
    readable = re.sub(r"[^A-Za-z0-9._-]+", "--", f"{parsed.netloc}{parsed.path}".strip("/"))[-100:].lstrip(".-")
    return f"{readable}--{hashlib.sha256(source.rstrip('/').encode()).hexdigest()[:12]}"


def find_fetched(source: str, store_dir: Path, revision: str | None = None) -> Path | None:
    """Where a complete copy of `source` is: in `store_dir`, or in the Hugging Face cache, which is used in place."""
    fetched = store_dir / local_name(source, revision)
    if fetched.is_dir():
        return fetched
    return find_cached(source, revision) if is_hub_id(source) else None


def origin_of(
    source: str,
    *,
    revision: str | None = None,
    variant: str | None = None,
    access: Access | None = None,
    limits: Limits | None = None,
) -> Origin:
    """Where `source`, an http(s) address or a hub id, is fetched from. Raises :class:`ConfigError`."""
    if source.startswith(("http://", "https://")):
        return HttpDirectory(source, access=access, limits=limits, variant=variant)
    return HubModel(source, revision=revision, access=access, limits=limits, variant=variant)


def open_remote(
    source: str,
    store_dir: Path,
    *,
    revision: str | None = None,
    variant: str | None = None,
    access: Access | None = None,
    limits: Limits | None = None,
    cancel: threading.Event | None = None,
) -> Fetch | Path:
    """Begin to fetch `source`, an http(s) address or a hub id, to `store_dir`; its path if a complete copy is found.

    Raises as :meth:`Fetch.open`.
    """
    if not is_remote(source):
        raise CheckpointNotFound(source, "it is neither an http(s) address nor the id of a model on the hub")
    found = find_fetched(source, store_dir, revision)
    if found is not None:
        return found
    origin = origin_of(source, revision=revision, variant=variant, access=access, limits=limits)
    final = store_dir / local_name(source, revision)
    return Fetch.open(origin, final, cancel=cancel) or final
