"""Deployments as the command line takes them: a file, ``NAME=SOURCE``, a directory, a URL, or the id of a model on the hub."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sllmdask.errors import ConfigError

if TYPE_CHECKING:
    from sllmdask.config import Deployment


def read_model(text: str) -> Deployment:
    """A deployment from a file, ``NAME=SOURCE``, a directory, a URL, or the id of a model on the hub."""
    from sllmdask.config import Deployment, parse, read_deployment

    name, equals, source = text.partition("=")
    if text.startswith(("http://", "https://")):  # there may be a sign of equality in it
        name, source = _last_part(text), text
    elif not equals:
        if os.path.isfile(text):
            return read_deployment(text)
        if text.startswith((".", "/", "~")) or text.endswith((".json", ".yaml", ".yml")):
            if not os.path.isdir(os.path.expanduser(text)):
                raise ConfigError(f"There is no file or directory {text}.")
        elif not os.path.isdir(text):
            return parse(Deployment, {"model": text}, f"the model {text!r}")
        name, source = os.path.basename(os.path.abspath(os.path.expanduser(text))), text
    return parse(Deployment, named(name, absolute(source)), f"the model {text!r}")


def _last_part(url: str) -> str:
    """What the model at `url` is called: the last part of its path. Raises :class:`ConfigError` if that is no name."""
    import re
    from urllib.parse import urlsplit

    try:
        name = urlsplit(url).path.rstrip("/").rpartition("/")[2]
    except ValueError:
        name = ""
    if not re.fullmatch(r"\w[\w.:-]*", name, re.ASCII):
        raise ConfigError(f"The address {url} does not end in the name of a model. Write NAME={url}.")
    return name


def absolute(source: str) -> str:
    """A directory here by its whole path, since workers start elsewhere; anything else is left as it is."""
    path = os.path.abspath(os.path.expanduser(source))
    return path if os.path.isdir(path) else source


def named(name: str, given: Any) -> Any:
    """A model of a ``models:`` mapping as a deployment: its value is a source or the rest of a deployment file."""
    if isinstance(given, str):
        return {"model": name, "backend_config": {"pretrained_model_name_or_path": given}}
    return {"model": name, **(given or {})}


def override(settings: dict[str, Any], given: Mapping[str, Mapping[str, Any]]) -> None:
    """Put the flags that were given over what a file says."""
    for section, values in given.items():
        chosen = {key: value for key, value in values.items() if value is not None}
        if chosen:
            settings[section] = {**(settings.get(section) or {}), **chosen}


def names(given: str | None) -> list[str] | None:
    """Names of nodes, separated by commas or spaces; ``None``: nothing was given."""
    return None if given is None else given.replace(",", " ").split()


def read_adapters(given: Sequence[str]) -> dict[str, str] | None:
    """Sources by name from ``NAME=SOURCE``, several of them in one text or in several, as ServerlessLLM takes them."""
    adapters = {}
    for text in " ".join(given).replace(",", " ").split():
        name, equals, source = text.partition("=")
        if not (name and equals and source):
            raise ConfigError(f"--lora-adapters takes NAME=SOURCE, not {text!r}.")
        adapters[name] = absolute(source)
    return adapters or None
