"""Our place in Dask's configuration tree, and what we want of Dask itself."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import dask.config

from sllmdask.config import Settings, parse
from sllmdask.errors import ConfigError

#: Dask's own settings for a cluster that serves models. Why each: docs/dask.md.
DISTRIBUTED: Mapping[str, Any] = {
    "distributed.scheduler.work-stealing": False,
    "distributed.scheduler.active-memory-manager.start": False,
    "distributed.scheduler.worker-ttl": "30s",
    "distributed.deploy.lost-worker-timeout": "365d",
    "distributed.worker.profile.enabled": False,
    "distributed.worker.daemon": False,
    "distributed.worker.memory.target": False,
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.pause": False,
    "distributed.worker.memory.terminate": False,
    "distributed.admin.tick.interval": "500ms",
    "distributed.admin.tick.limit": "30s",
    "distributed.comm.timeouts.connect": "10s",
    "distributed.client.direct-to-workers": True,
    "distributed.nanny.pre-spawn-environ.OMP_WAIT_POLICY": "PASSIVE",
}


def log_as_dask_does() -> None:
    """In a process that Dask started, our log lines go where Dask's go, unless the operator's configuration names us."""
    ours, dasks = logging.getLogger("sllmdask"), logging.getLogger("distributed")
    if not ours.handlers and not logging.getLogger().handlers:
        ours.handlers[:] = dasks.handlers
        ours.setLevel(dasks.level)


def read_settings(flags: Mapping[str, Mapping[str, Any]] | None = None, file: Mapping[str, Any] | None = None) -> Settings:
    """The cluster's settings: flags over the environment over `file` over Dask's own files over the defaults.

    A flag of ``None`` was not given. The environment's names are ``DASK_SLLMDASK__SECTION__KEY``. Raises :class:`ConfigError`.
    """
    merged: dict[str, Any] = {}
    for layer in (
        dask.config.get("sllmdask", {}),
        file or {},
        dask.config.collect_env().get("sllmdask", {}),
        {name: {key: value for key, value in given.items() if value is not None} for name, given in (flags or {}).items()},
    ):
        if not isinstance(layer or {}, Mapping):
            raise ConfigError(f"Dask's configuration under 'sllmdask:' must hold settings by name, not {layer!r}")
        for section, values in (layer or {}).items():
            if not isinstance(values, Mapping):
                raise ConfigError(f"Dask's configuration: sllmdask.{section} must hold settings by name, not {values!r}", section)
            # Dask takes both spellings of a key.
            spelt = {str(key).replace("-", "_"): value for key, value in values.items()}
            merged[section] = {**merged.get(section, {}), **spelt}
    return parse(Settings, merged, "Dask's configuration under 'sllmdask:'")
