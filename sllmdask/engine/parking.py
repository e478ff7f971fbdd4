"""KV of sequences that wait, in host memory, and in the books."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from torch import Tensor

from sllmdask.batching.memory import Kind, MemoryAccount


class ParkedKV(Mapping[str, Tensor]):
    """(n_blocks, bytes_per_block) uint8 for each parked sequence, by request.

    :param counted: whether host memory is the memory that `account` is about: on a CPU
    """

    def __init__(self, account: MemoryAccount, *, counted: bool) -> None:
        self._account = account
        self._counted = counted
        self._rows: dict[str, Tensor] = {}

    def __getitem__(self, request_id: str) -> Tensor:
        return self._rows[request_id]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def nbytes(self) -> int:
        return sum(rows.nbytes for rows in self._rows.values())

    def put(self, request_id: str, nbytes: int, read: Callable[[], Tensor], *, instead_of: Kind | None = None) -> bool:
        """Keep the `nbytes` bytes that `read` gives; ``False`` if there is no room for them. Raises what `read` raises.

        `instead_of`: what they are taken from, as far as the account holds something for that. What several sequences share is
        parked once for each of them, so all of it may be more than there was.
        """
        self.drop(request_id)
        if self._counted:
            n_held = 0 if instead_of is None else min(nbytes, self._account.held(instead_of))
            if not self._account.offer(Kind.PARKED, nbytes - n_held):
                return False
            if instead_of is not None:
                self._account.move(instead_of, Kind.PARKED, n_held)
        try:
            rows = read()
            assert rows.nbytes == nbytes
        except BaseException:
            if self._counted:
                self._account.release(Kind.PARKED, nbytes)
            raise
        self._rows[request_id] = rows
        return True

    def drop(self, request_id: str) -> bool:
        """Let go of a sequence's KV; whether there was any."""
        rows = self._rows.pop(request_id, None)
        if rows is not None and self._counted:
            self._account.release(Kind.PARKED, rows.nbytes)
        return rows is not None

    def clear(self) -> None:
        for request_id in list(self._rows):
            self.drop(request_id)
