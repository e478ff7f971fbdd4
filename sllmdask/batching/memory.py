"""Who holds how much of a worker's memory: the books of several models on one device. Numbers only; nothing is allocated here.

What is counted is the memory that instances have beside the checkpoints in host memory, which are a pool's: on a GPU everything
that is there, on a CPU what is the process's own. It is asked for before it is taken, so that what does not fit is refused with
numbers instead of being found out by the system.
"""

from __future__ import annotations

import threading
from collections import Counter
from enum import StrEnum

from sllmdask.errors import InsufficientMemory


class Kind(StrEnum):
    """What memory is held for."""

    #: The checkpoint's own bytes, where they are not host memory of the pool: on a GPU.
    WEIGHTS = "weights"
    #: Weights in another dtype or layout than the checkpoint's.
    CONVERTED = "converted"
    #: Weights rearranged for the matrix library.
    PACKED = "packed"
    ADAPTERS = "adapters"
    KV = "kv"
    #: KV of requests that wait, where host memory is the device's own.
    PARKED = "parked"
    #: What one step makes and drops, at most; estimated.
    ACTIVATIONS = "activations"


class MemoryLedger:
    """The memory of one device that instances may take: `capacity` bytes, of which one of `n_shares` should take a fair share.

    The sum over all accounts is at most `capacity`, but for what :meth:`MemoryAccount.take` was told of. For any thread.
    """

    def __init__(self, capacity: int, n_shares: int = 1) -> None:
        assert capacity >= 0
        assert n_shares >= 1
        self.capacity = capacity
        self.n_shares = n_shares
        self._lock = threading.Lock()
        self._accounts: dict[str, MemoryAccount] = {}

    @property
    def used(self) -> int:
        with self._lock:
            return self._used()

    @property
    def free(self) -> int:
        with self._lock:
            return self._free()

    @property
    def share(self) -> int:
        """Bytes that one instance has if all have the same."""
        return self.capacity // self.n_shares

    def account(self, holder: str, model: str = "") -> MemoryAccount:
        """Open the account of `holder`, which has none; refusals name `model`."""
        account = MemoryAccount(self, holder, model or holder)
        with self._lock:
            assert holder not in self._accounts, f"{holder} has an account already"
            self._accounts[holder] = account
        return account

    def snapshot(self) -> dict[str, int]:
        """``used`` and ``capacity``, in bytes."""
        return {"used": self.used, "capacity": self.capacity}

    def _used(self) -> int:
        return sum(account._held.total() for account in self._accounts.values())

    def _free(self) -> int:
        return max(0, self.capacity - self._used())


class MemoryAccount:
    """What one instance holds, by kind. Once it is closed nothing can be had, and what is given back was given back before."""

    def __init__(self, ledger: MemoryLedger, holder: str, model: str) -> None:
        self.ledger = ledger
        self.holder = holder
        self.model = model
        self._held: Counter[Kind] = Counter()
        self._closed = False

    @property
    def used(self) -> int:
        with self.ledger._lock:
            return self._held.total()

    @property
    def fair(self) -> int:
        """Bytes that are left of its fair share, or of the ledger, where that is less."""
        with self.ledger._lock:
            return max(0, min(self.ledger.share - self._held.total(), self.ledger._free()))

    def held(self, kind: Kind) -> int:
        with self.ledger._lock:
            return self._held[kind]

    def offer(self, kind: Kind, nbytes: int) -> bool:
        """Take `nbytes` if they are free; ``False`` if not, and nothing has changed."""
        assert nbytes >= 0
        with self.ledger._lock:
            if self._closed or nbytes > self.ledger._free():
                return False
            self._held[kind] += nbytes
            return True

    def reserve(self, kind: Kind, nbytes: int, advice: str = "") -> None:
        """Take `nbytes`, or raise :class:`InsufficientMemory` with what is free; nothing has changed then."""
        if not self.offer(kind, nbytes):
            raise InsufficientMemory(self.model, nbytes, self.ledger.free, advice)

    def take(self, kind: Kind, nbytes: int) -> None:
        """Note `nbytes` that are in use already, whether or not they were free."""
        assert nbytes >= 0
        with self.ledger._lock:
            if not self._closed:
                self._held[kind] += nbytes

    def release(self, kind: Kind, nbytes: int) -> None:
        """Give `nbytes` back."""
        with self.ledger._lock:
            if not self._closed:
                assert 0 <= nbytes <= self._held[kind], f"{nbytes} bytes of {kind} given back, {self._held[kind]} held"
                self._held[kind] -= nbytes

    def move(self, source: Kind, target: Kind, nbytes: int) -> None:
        """What was held for one purpose is held for another: nobody can come in between."""
        with self.ledger._lock:
            if not self._closed:
                assert 0 <= nbytes <= self._held[source], f"{nbytes} bytes of {source} moved, {self._held[source]} held"
                self._held[source] -= nbytes
                self._held[target] += nbytes

    def clear(self, *kinds: Kind) -> None:
        """Give back all that is held for `kinds`."""
        with self.ledger._lock:
            for kind in kinds:
                self._held[kind] = 0

    def snapshot(self) -> dict[str, int]:
        """Bytes by kind, of every kind that there is something of."""
        with self.ledger._lock:
            return {str(kind): self._held[kind] for kind in Kind if self._held[kind]}

    def close(self) -> None:
        """Give everything back, for good. Again does nothing."""
        with self.ledger._lock:
            if not self._closed:
                self._closed = True
                self._held.clear()
                del self.ledger._accounts[self.holder]
