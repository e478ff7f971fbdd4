"""Serverless LLM inference on Dask. The names below load what they need on first use; ``Client`` needs no Dask, no torch."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_WHERE = {
    "Client": "sllmdask.client",
    "AsyncClient": "sllmdask.client",
    "serve": "sllmdask.server.service",
    "load_model": "sllmdask.library",
    "load_state_dict": "sllmdask.library",
    "save_model": "sllmdask.library",
}

__all__ = [*_WHERE, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
