"""Who feeds whom: several receivers of one server form a chain instead of a star.

Whoever comes while another one is being fed is sent on to the last one in the chain, which gives away what it has so far; a
range that has not arrived yet is waited for. The network link of the first server thus carries the checkpoint once, however many
want it.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(eq=False, slots=True)
class Member:
    """One receiver that a server sees to, itself or by the chain; `address` is that of its own server."""

    address: str


class Chains:
    """The chains of one server, by key. Without `linked`, every receiver is fed by the server itself. Any thread may ask."""

    def __init__(self, *, linked: bool = True) -> None:
        self._linked = linked
        self._members: dict[str, list[Member]] = {}
        self._lock = threading.Lock()

    def receivers(self, key: str) -> list[str]:
        """The addresses of those that are in the chain of `key`, the first fed by the server."""
        with self._lock:
            return [member.address for member in self._members.get(key, [])]

    def join(self, key: str, address: str, failed: Sequence[Any], joined: list[tuple[str, Member]]) -> str | None:
        """The address of the one that `address` is to be fed by; ``None``: by the server.

        Those that `failed` are in the chain no more. `joined` is what came over the same connection, and is added to.
        """
        with self._lock:
            members = self._members.setdefault(key, [])
            members[:] = [member for member in members if member.address not in failed]
            if any(member.address == address for _, member in joined):
                # It is in the chain already, and others may be fed by it: to send it on could close a circle.
                return None
            members[:] = [member for member in members if member.address != address]
            upstream = members[-1].address if members and self._linked and not failed else None
            member = Member(address)
            members.append(member)
            joined.append((key, member))
            return upstream

    def leave(self, key: str, member: Member) -> None:
        """`member`'s connection has ended."""
        with self._lock:
            members = self._members.get(key, [])
            if member in members:
                members.remove(member)
            if not members:
                self._members.pop(key, None)
