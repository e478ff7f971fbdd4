"""Models on the Hugging Face hub, and in its cache on this machine. Only here the loader knows ``huggingface_hub``."""

from __future__ import annotations

import re
import ssl
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote

import huggingface_hub

from sllmdask.errors import CheckpointError, CheckpointNotFound
from sllmdask.loader.access import Access
from sllmdask.loader.format import read_config, read_index
from sllmdask.loader.http_client import HttpFile
from sllmdask.loader.http_origin import MAX_FILES, HttpOrigin
from sllmdask.loader.sockets import Limits
from sllmdask.loader.tee import check_name

#: A hub id, ``name`` or ``organisation/name``; the hub itself allows neither ``..`` nor ``--``.
_HUB_ID = re.compile(r"^(?!.*(?:\.\.|--))[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?$")


def is_hub_id(text: str) -> bool:
    """Whether `text` could be the id of a model on the hub."""
    return _HUB_ID.match(text) is not None


class HubModel(HttpOrigin):
    """Model `repo` of the hub at `revision`, a branch, tag or commit; it is pinned to the commit when it is surveyed.

    The endpoint is `endpoint` or ``HF_ENDPOINT``, the token ``HF_TOKEN``'s or the one that was logged in with.
    """

    def __init__(
        self,
        repo: str,
        *,
        revision: str | None = None,
        endpoint: str | None = None,
        access: Access | None = None,
        limits: Limits | None = None,
        variant: str | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        if not is_hub_id(repo):
            raise CheckpointNotFound(repo, "it is not the id of a model on the hub")
        self._repo, self._asked, self._endpoint = repo, revision, (endpoint or huggingface_hub.constants.ENDPOINT).rstrip("/")
        token = None if huggingface_hub.constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else huggingface_hub.get_token()
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        super().__init__(repo, self._endpoint + "/", access or Access(), limits or Limits(), headers, variant, tls)

    def _list(self) -> Mapping[str, HttpFile]:
        try:
            api = huggingface_hub.HfApi(endpoint=self._endpoint)
            info = api.model_info(self._repo, revision=self._asked, files_metadata=True, timeout=self._limits.idle_s)
        except Exception as error:
            # The hub's client lets errors of several libraries through; all of them mean the same here.
            reason = f"there is no such directory, and the hub did not supply it ({type(error).__name__}: {error})"
            raise CheckpointNotFound(self._repo, " ".join(reason.split())) from error
        if not info.sha or not info.siblings:
            raise CheckpointNotFound(self._repo, "the hub lists no files of it")
        self._revision = info.sha
        changed = info.last_modified
        modified_ns = int(changed.timestamp()) * 10**9 if changed else None
        listed = {}
        for sibling in info.siblings[:MAX_FILES]:
            name = sibling.rfilename
            check_name(self._repo, name)
            url = f"{self._endpoint}/{self._repo}/resolve/{info.sha}/{quote(name)}"
            sha256 = sibling.lfs.sha256 if sibling.lfs else None
            # The commit pins the bytes; what a cache in between calls them may change.
            listed[name] = HttpFile(name, url, sibling.size, sha256 or sibling.blob_id or "", sha256, modified_ns)
        return listed


def find_cached(repo: str, revision: str | None = None) -> Path | None:
    """Where model `repo` is in the Hugging Face cache, complete; it is used in place."""
    try:
        cached = Path(huggingface_hub.snapshot_download(repo, revision=revision, local_files_only=True))
        # A snapshot may lack files, but has none that is not complete.
        read_index(cached)
        read_config(cached)
    except (FileNotFoundError, CheckpointError, ValueError):
        return None
    return cached
