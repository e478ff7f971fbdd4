"""Both halves of moving a request: the engine that it leaves reads its KV while it runs on, the one that it enters writes it.

The sender: ``export_open``, ``export_read`` as often as there is something new, ``export_freeze`` for the rest, then
``export_commit`` or ``export_abort``. The receiver: ``import_open``, ``import_write`` for each piece, then ``import_commit`` or
``import_abort``. Every call is made between two steps, in the engine's thread. It may be repeated: moves are told apart by
(request id, epoch), the same call again has the same result, and one of an epoch that is over is refused. Up to
``export_freeze`` the sender answers on, and after ``export_abort`` again. From ``import_commit`` on the receiver does. Nobody
here has a clock: who began a move ends it, one way or the other.

Source: live migration of requests, Llumnix (OSDI '24); pre-copy of virtual machines, Clark et al., NSDI '05.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from sllmdask.batching.blocks import BlockPool, blocks_for
from sllmdask.batching.params import SamplingParams
from sllmdask.batching.scheduler import BatchScheduler, Incoming
from sllmdask.batching.sequence import FinishReason, Sequence
from sllmdask.engine.runner import ModelRunner
from sllmdask.engine.state import KVChunk, KVLayout, Manifest, RequestState
from sllmdask.errors import StateRefused
from sllmdask.units import format_bytes

#: Moves that are over, and still known, of each kind: a repeated call comes soon or never.
_N_REMEMBERED = 4096


@dataclass(eq=False)
class _Export:
    epoch: int
    sequence: Sequence
    #: Blocks of its first tokens that were sent, held so that they can be sent again, whatever becomes of the sequence.
    pinned: list[int] = field(default_factory=list)
    frozen: bool = False
    #: Whether somebody held it before us, who will let it go.
    was_held: bool = False


@dataclass(eq=False)
class _Import:
    manifest: Manifest
    #: The tokens of the manifest, whose blocks have their names.
    known: Sequence
    incoming: Incoming
    #: Tokens from the first one on whose KV is here.
    n_tokens: int
    #: Why the KV of the sender is of no use here; ``None``: it is. Its tokens can be computed here all the same.
    kv_refused: str | None = None


class Transfer:
    """The moves of one engine that are under way. `parked` is the KV of parked sequences (n_blocks, bytes of a block)."""

    def __init__(
        self,
        scheduler: BatchScheduler,
        runner: ModelRunner,
        parked: Mapping[str, Tensor],
        check: Callable[[Sequence], None],
    ) -> None:
        """`check` raises what is wrong with a sequence that comes from elsewhere."""
        self.model_id = ""
        self.numerics_id = runner.numerics_id
        self._scheduler = scheduler
        self._pool: BlockPool = scheduler.pool
        self._runner = runner
        self._block_size = runner.block_size
        self._parked = parked
        self._check = check
        self._layout = KVLayout(str(runner.dtype).removeprefix("torch."), tuple(runner.layers))
        self._exports: dict[str, _Export] = {}
        self._imports: dict[str, _Import] = {}
        #: (kind, request id) -> epoch, and whether it was committed.
        self._over: OrderedDict[tuple[str, str], tuple[int, bool]] = OrderedDict()

    @property
    def under_way(self) -> tuple[str, ...]:
        """The requests that leave or enter."""
        return (*self._exports, *self._imports)

    def frozen(self, request_id: str) -> bool:
        export = self._exports.get(request_id)
        return export is not None and export.frozen

    def close(self) -> None:
        for request_id, export in list(self._exports.items()):
            self.export_abort(request_id, export.epoch)
        for request_id, entry in list(self._imports.items()):
            self.import_abort(request_id, entry.manifest.epoch)

    def relieve(self) -> bool:
        """Let go of the blocks that are only kept to be sent again; whether there were any."""
        pinned = [export for export in self._exports.values() if export.pinned and not export.frozen]
        for export in pinned:
            self._unpin(export)
        return bool(pinned)

    # --- the engine that it leaves -------------------------------------------------------------------------------------

    def export_open(self, request_id: str, epoch: int) -> dict[str, Any]:
        """A :class:`Manifest`, as of now. An export of the same request with a lower epoch is aborted."""
        self._check_epoch("export", request_id, epoch)
        export = self._exports.get(request_id)
        if export is not None and epoch < export.epoch:
            raise StateRefused(request_id, f"move {epoch} was followed by move {export.epoch}")
        if export is not None and epoch > export.epoch:
            self.export_abort(request_id, export.epoch)
            export = None
        sequence = self._scheduler.find(request_id)
        if sequence is None:
            raise StateRefused(request_id, "it is not here, or has ended")
        if export is None:
            self._exports[request_id] = _Export(epoch, sequence)
        tokens = sequence.token_ids(0, sequence.n_tokens)
        return Manifest(
            request_id, epoch, self.model_id, self.numerics_id, self._layout, sequence.salt, sequence.from_scratch, tokens
        ).as_wire()

    def export_read(
        self, request_id: str, epoch: int, since: int = 0, max_tokens: int | None = None, *, whole: bool = True
    ) -> dict[str, Any]:
        """A :class:`KVChunk` of the tokens in full blocks from `since` on, at most `max_tokens`; of no tokens if there is none.

        They are kept until the end of the move, so that they can be read again. Unless `whole`, also of those in a block that is
        not full yet, which are not kept.
        """
        export = self._export(request_id, epoch)
        sequence, block_size = export.sequence, self._block_size
        n_tokens = max(len(export.pinned) * block_size, sequence.n_computed, sequence.n_parked)
        if whole:
            n_tokens -= n_tokens % block_size
        stop = n_tokens if max_tokens is None else min(n_tokens, since + max_tokens)
        n_kept = min(blocks_for(stop, block_size), sequence.n_computed // block_size)
        fresh = sequence.block_table[len(export.pinned) : n_kept]
        self._pool.share(fresh)
        export.pinned += fresh
        return self._chunk(export, since, stop).as_wire()

    def export_freeze(self, request_id: str, epoch: int, since: int = 0) -> dict[str, Any]:
        """Stop the request. ``{"state", "kv"}``: its :class:`RequestState`, and a :class:`KVChunk` of what is not sent yet.

        Its blocks stay as they are until :meth:`export_commit` or :meth:`export_abort`.
        """
        export = self._export(request_id, epoch)
        sequence, block_size = export.sequence, self._block_size
        if sequence.finish_reason is not None:
            raise StateRefused(request_id, "it has ended meanwhile")
        if since > sequence.n_tokens - 1:
            raise StateRefused(request_id, f"token {since} is beyond its {sequence.n_tokens} tokens")
        if not export.frozen:
            export.was_held = sequence in self._scheduler.held
            self._scheduler.hold(request_id)
            export.frozen = True
        n_tokens = max(sequence.n_computed, sequence.n_parked, len(export.pinned) * block_size, since)
        kv = self._chunk(export, since, n_tokens)
        return {"state": RequestState.of(sequence, n_tokens).as_wire(), "kv": kv.as_wire()}

    def export_commit(self, request_id: str, epoch: int) -> bool:
        """The request is elsewhere now: nothing of it stays. ``False`` if that was so already."""
        if self._ended("export", request_id, epoch, committed=True):
            return False
        export = self._export(request_id, epoch)
        if not export.frozen:
            raise StateRefused(request_id, "it still runs here, and its last tokens were not given away")
        self._end_export(request_id, export, committed=True)
        if self._scheduler.find(request_id) is export.sequence:
            self._scheduler.finish(request_id, FinishReason.ABORT)
        return True

    def export_abort(self, request_id: str, epoch: int) -> bool:
        """The request stays, and goes on if it was stopped. ``False`` if nothing was under way."""
        if self._ended("export", request_id, epoch, committed=False):
            return False
        export = self._exports.get(request_id)
        if export is None or export.epoch != epoch:
            return False
        self._end_export(request_id, export, committed=False)
        if export.frozen and not export.was_held and self._scheduler.find(request_id) is export.sequence:
            self._scheduler.resume(request_id)
        return True

    def _export(self, request_id: str, epoch: int) -> _Export:
        export = self._exports.get(request_id)
        if export is None or export.epoch != epoch:
            raise StateRefused(request_id, f"move {epoch} is not under way here")
        return export

    def _end_export(self, request_id: str, export: _Export, *, committed: bool) -> None:
        del self._exports[request_id]
        self._unpin(export)
        self._remember("export", request_id, export.epoch, committed)

    def _unpin(self, export: _Export) -> None:
        self._pool.release(export.pinned)
        export.pinned = []

    def _chunk(self, export: _Export, since: int, stop: int) -> KVChunk:
        """KV of the tokens from `since` up to `stop`."""
        if stop <= since:
            return KVChunk.of(since, 0, b"")
        sequence, block_size = export.sequence, self._block_size
        first, end = since // block_size, blocks_for(stop, block_size)
        blocks = [*export.pinned, *sequence.block_table[len(export.pinned) :]][first:end]
        if len(blocks) == end - first:
            data = self._runner.read_tokens(_slots(blocks, block_size, since - first * block_size, stop - first * block_size))
        else:
            # What is not in blocks is parked.
            rows = self._parked[sequence.request_id][first:end]
            data = self._runner.tokens_in(rows, since - first * block_size, stop - first * block_size)
        return KVChunk.of(since, stop - since, data)

    # --- the engine that it enters -------------------------------------------------------------------------------------

    def import_open(
        self, manifest: Mapping[str, Any], n_tokens: int | None = None, *, tokens_will_do: bool = False
    ) -> dict[str, Any]:
        """Reserve a place, and blocks for `n_tokens` tokens: by default, those of the manifest and some more.

        Returns ``{"request_id", "epoch", "n_tokens", "same_numerics", "kv_refused"}``: the KV of the first `n_tokens` tokens is
        here. Raises :class:`StateRefused` if the state is of another model
        or layout, or if there is no room, and what ``add`` raises. With `tokens_will_do`, KV of another layout is no reason to
        refuse the request: it is told as ``kv_refused``, and the KV is to be computed here (:meth:`import_tokens`).
        """
        offered = Manifest.from_wire(manifest)
        request_id, epoch = offered.request_id, offered.epoch
        self._check_epoch("import", request_id, epoch)
        entry = self._imports.get(request_id)
        if entry is not None and epoch < entry.manifest.epoch:
            raise StateRefused(request_id, f"move {epoch} was followed by move {entry.manifest.epoch}")
        if entry is not None and epoch > entry.manifest.epoch:
            self.import_abort(request_id, entry.manifest.epoch)
            entry = None
        if entry is None:
            if offered.model_id != self.model_id:
                raise StateRefused(request_id, f"it is of model {offered.model_id!r}, and here is {self.model_id!r}")
            kv_refused = self._layout.differs(offered.layout)
            if kv_refused and not tokens_will_do:
                raise StateRefused(request_id, kv_refused)
            known = Sequence(
                request_id, offered.token_ids, SamplingParams(), salt=offered.salt, from_scratch=offered.from_scratch
            )
            expected = n_tokens or known.n_tokens + self._block_size
            incoming = self._scheduler.expect(known, expected)
            if incoming is None:
                raise StateRefused(request_id, self._no_room(expected))
            # Now, while the request runs on elsewhere, rather than when it is stopped.
            self._scheduler.name_blocks(known)
            entry = _Import(offered, known, incoming, incoming.n_shared * self._block_size, kv_refused)
            self._imports[request_id] = entry
        return {
            "request_id": request_id,
            "epoch": epoch,
            "n_tokens": entry.n_tokens,
            "same_numerics": offered.numerics_id == self.numerics_id,
            "kv_refused": entry.kv_refused,
        }

    def import_write(self, request_id: str, epoch: int, chunk: Mapping[str, Any]) -> dict[str, Any]:
        """Take a :class:`KVChunk`. Returns ``{"n_tokens"}``: of how many tokens from the first on the KV is here, now.

        Raises :class:`StateRefused` if it is damaged, if something before it is missing, or if there is no room.
        """
        entry = self._import(request_id, epoch)
        if entry.kv_refused:
            raise StateRefused(request_id, entry.kv_refused)
        piece = KVChunk.from_wire(chunk, request_id, entry.manifest.layout)
        stop = piece.since + piece.n_tokens
        if piece.since > entry.n_tokens:
            raise StateRefused(request_id, f"the KV of tokens {entry.n_tokens} to {piece.since} is missing")
        if not self._scheduler.extend(entry.incoming, stop):
            raise StateRefused(request_id, self._no_room(stop))
        # Blocks that are shared are never written.
        start = max(piece.since, entry.incoming.n_shared * self._block_size)
        if start < stop:
            slots = _slots(entry.incoming.blocks, self._block_size, start, stop)
            self._runner.write_tokens(slots, piece.data, piece.n_tokens)
        entry.n_tokens = max(entry.n_tokens, stop)
        return {"n_tokens": entry.n_tokens}

    def import_extend(self, request_id: str, epoch: int, n_tokens: int) -> None:
        """Reserve blocks for `n_tokens` tokens in all; raises :class:`StateRefused` if there are too few."""
        entry = self._import(request_id, epoch)
        if not self._scheduler.extend(entry.incoming, n_tokens):
            raise StateRefused(request_id, f"there is no room for {n_tokens} tokens")

    def import_tokens(self, request_id: str, epoch: int, since: int = 0, token_ids: Iterable[int] = ()) -> dict[str, Any]:
        """Compute the KV of the request's tokens here, beside what runs: those of the manifest, then `token_ids`, which begin at
        its token `since`. What of them is known already is not added again.

        Returns ``{"n_known", "n_tokens"}``: how many tokens are known, and of how many from the first on the KV is here; it ends
        one below, since the last token is computed where the next one is drawn. Raises :class:`StateRefused` as
        :meth:`import_write` does.
        """
        entry = self._import(request_id, epoch)
        sequence = entry.incoming.sequence
        if sequence is None:
            manifest = entry.manifest
            sequence = Sequence(
                request_id, manifest.token_ids, SamplingParams(), salt=manifest.salt, from_scratch=manifest.from_scratch
            )
            sequence.n_computed = min(entry.n_tokens, sequence.n_tokens - 1)
        if since > sequence.n_tokens:
            raise StateRefused(request_id, f"its tokens {sequence.n_tokens} to {since} are missing")
        fresh = list(token_ids)[sequence.n_tokens - since :]
        sequence.output_ids += fresh
        if not self._scheduler.compute(entry.incoming, sequence):
            del sequence.output_ids[len(sequence.output_ids) - len(fresh) :]
            raise StateRefused(request_id, f"there is no room for the KV of {sequence.n_tokens + len(fresh)} tokens")
        entry.n_tokens = max(entry.n_tokens, sequence.n_computed)
        return {"n_known": sequence.n_tokens, "n_tokens": entry.n_tokens}

    def import_failed(self, sequence: Sequence) -> None:
        """The KV of `sequence` could not be computed here: if it is one that comes from elsewhere, it does not come."""
        for request_id, entry in list(self._imports.items()):
            if entry.incoming.sequence is sequence:
                # What went wrong may be in its blocks.
                entry.n_tokens = sequence.n_computed = 0
                self.import_abort(request_id, entry.manifest.epoch)

    def import_commit(self, request_id: str, epoch: int, state: Mapping[str, Any], kv: Mapping[str, Any] | None = None) -> bool:
        """The request is ours from now on, and runs in the next step; `kv` is a last chunk. ``False`` if that was so already.

        Tokens whose KV did not come are computed here. Raises :class:`StateRefused` if the state is not that of the manifest, or
        if there is no room for its tokens, and what ``add`` raises; the move is still under way then.
        """
        if self._ended("import", request_id, epoch, committed=True):
            return False
        entry = self._import(request_id, epoch)
        arrived = RequestState.from_wire(state)
        sequence = arrived.sequence()
        computing = entry.incoming.sequence
        known = entry.manifest.token_ids if computing is None else computing.token_ids(0, computing.n_tokens)
        same = arrived.request_id == request_id and arrived.salt == entry.manifest.salt
        if not same or sequence.token_ids(0, len(known)) != known:
            raise StateRefused(request_id, "its tokens are not those that were told before")
        sequence.digests = list((computing or entry.known).digests)
        self._check(sequence)
        if kv is not None:
            self.import_write(request_id, epoch, kv)
        n_computed = max(entry.n_tokens, 0 if computing is None else computing.n_computed)
        if not self._scheduler.accept(entry.incoming, sequence, min(n_computed, sequence.n_tokens - 1)):
            raise StateRefused(request_id, self._no_room(sequence.n_tokens))
        del self._imports[request_id]
        self._remember("import", request_id, epoch, committed=True)
        return True

    def import_abort(self, request_id: str, epoch: int) -> bool:
        """The request does not come. ``False`` if nothing was under way."""
        if self._ended("import", request_id, epoch, committed=False):
            return False
        entry = self._imports.get(request_id)
        if entry is None or entry.manifest.epoch != epoch:
            return False
        del self._imports[request_id]
        known = entry.incoming.sequence
        if known is None:
            offered = entry.manifest
            known = Sequence(request_id, offered.token_ids, SamplingParams(), salt=offered.salt)
        # Its source knows tokens that were never told here.
        known.n_computed = min(max(entry.n_tokens, known.n_computed), known.n_tokens)
        self._scheduler.refuse(entry.incoming, known)
        self._remember("import", request_id, epoch, committed=False)
        return True

    def _import(self, request_id: str, epoch: int) -> _Import:
        entry = self._imports.get(request_id)
        if entry is None or entry.manifest.epoch != epoch:
            raise StateRefused(request_id, f"move {epoch} is not under way here")
        return entry

    def _no_room(self, n_tokens: int) -> str:
        """Why a request of `n_tokens` tokens cannot come."""
        n_needed, n_free = blocks_for(n_tokens, self._block_size), self._pool.n_free
        if n_needed <= n_free - self._scheduler.n_watermark:
            return f"busy: there is no room beside {self._scheduler.max_running} requests that are here, or on their way"
        needed, free = (format_bytes(n * self._runner.bytes_per_block) for n in (n_needed, n_free))
        return (
            f"no memory: there is no room for {n_tokens} tokens, {n_needed} blocks ({needed}) of KV; {n_free} ({free}) are free"
        )

    # --- moves that are over -------------------------------------------------------------------------------------------

    def _check_epoch(self, kind: str, request_id: str, epoch: int) -> None:
        over, _ = self._over.get((kind, request_id), (-1, False))
        if epoch <= over:
            raise StateRefused(request_id, f"move {epoch} is over")

    def _ended(self, kind: str, request_id: str, epoch: int, *, committed: bool) -> bool:
        """Whether the move has ended in that way; :class:`StateRefused` if it has ended in the other one."""
        over, how = self._over.get((kind, request_id), (-1, False))
        if epoch == over and how != committed:
            raise StateRefused(request_id, f"move {epoch} was {'committed' if how else 'aborted'} already")
        return epoch == over

    def _remember(self, kind: str, request_id: str, epoch: int, committed: bool) -> None:
        self._over[kind, request_id] = (epoch, committed)
        self._over.move_to_end((kind, request_id))
        if len(self._over) > 2 * _N_REMEMBERED:
            self._over.popitem(last=False)


def _slots(blocks: list[int], block_size: int, start: int, stop: int) -> list[int]:
    """Of tokens `start` to `stop` of those in `blocks`."""
    return [blocks[token // block_size] * block_size + token % block_size for token in range(start, stop)]
