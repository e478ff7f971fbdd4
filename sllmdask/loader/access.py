"""Which addresses may be asked for a checkpoint: what an operator has listed, and hosts that are not on the internet."""

from __future__ import annotations

import fnmatch
import ipaddress
import re
import socket
from collections.abc import Sequence
from urllib.parse import SplitResult, urlsplit

from sllmdask.errors import ConfigError


class Access:
    """Which addresses may be asked. `allowed`: ``https://*``, ``https://*.example.org``, ``http://models.internal:8080``.

    Beside those, loopback and private hosts may be asked over http, but no redirect leads from https to http unless listed.
    """

    def __init__(self, allowed: Sequence[str] = ("https://*",)) -> None:
        self._allowed = [urlsplit(entry) for entry in allowed]
        for entry, parsed in zip(allowed, self._allowed, strict=True):
            if parsed.scheme not in ("http", "https") or not parsed.netloc or parsed.path not in ("", "/"):
                raise ConfigError(f"{entry!r} is not like https://*, https://*.example.org or http://host:port", "remote_hosts")

    def check(self, url: str, *, before: str | None = None) -> None:
        """Raise :class:`ConfigError` unless `url` may be asked, where `before` redirected to it."""
        parsed = split_url(url)
        if parsed.scheme not in ("http", "https"):
            raise ConfigError(f"{url!r} is not an http or https address")
        if any(_matches(parsed, entry) for entry in self._allowed):
            return
        down = before is not None and split_url(before).scheme == "https"
        if parsed.scheme == "http" and not down and _is_private(parsed.hostname or ""):
            return
        here = f"{parsed.scheme}://{parsed.netloc}"
        why = f"a redirect from {before!r} leads to {here}, which" if before else here
        raise ConfigError(f"{why} may not be asked; if it should be, add {here!r} to worker.remote_hosts", "remote_hosts")


def split_url(url: str) -> SplitResult:
    """The parts of `url`; raises :class:`ConfigError` for what is no address of a host, and for one with a password."""
    try:
        parsed = urlsplit(url)
        # Looked at here, because it raises.
        _ = parsed.port
    except ValueError as error:
        raise ConfigError(f"{url!r} is not an address: {error}") from None
    if not parsed.hostname or not url.isprintable() or " " in url:
        raise ConfigError(f"{url!r} is not an address of a host")
    if parsed.username is not None or parsed.password is not None:
        raise ConfigError("an address must not hold a name or a password; give them as a header")
    return parsed


def port_of(parsed: SplitResult) -> int:
    """The port that it says, or that of its scheme."""
    return parsed.port or (443 if parsed.scheme == "https" else 80)


def _matches(parsed: SplitResult, entry: SplitResult) -> bool:
    if parsed.scheme != entry.scheme:
        return False
    host, _, port = entry.netloc.rpartition(":") if re.search(r":\d+$", entry.netloc) else (entry.netloc, "", "")
    if port and int(port) != port_of(parsed):
        return False
    if not port and host != "*" and parsed.port not in (None, 443 if parsed.scheme == "https" else 80):
        return False
    return fnmatch.fnmatchcase((parsed.hostname or "").lower(), host.strip("[]").lower())


def _is_private(host: str) -> bool:
    """Whether every address of `host` is loopback or private; those that clouds answer secrets on are neither."""
    try:
        found = {info[4][0] for info in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
        addresses = [ipaddress.ip_address(str(address).partition("%")[0]) for address in found]
    except (OSError, ValueError):
        return False
    return bool(addresses) and all(
        a.is_loopback or (a.is_private and not (a.is_link_local or a.is_unspecified or a.is_reserved)) for a in addresses
    )


def site_of(url: str) -> tuple[str, str, int]:
    """Scheme, host and port: whoever has these of `url` is who `url` is."""
    parsed = split_url(url)
    return parsed.scheme, (parsed.hostname or "").lower(), port_of(parsed)
