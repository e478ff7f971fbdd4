"""What a front door tells operators of the cluster, and of the requests of all front doors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from sllmdask.cluster.explaining import explained_move, explained_resume
from sllmdask.cluster.records import merged_moves
from sllmdask.errors import Cancelled, SchedulerUnreachable, SllmError


class Lookout(ABC):
    """The part of the :class:`~sllmdask.cluster.gateway.Gateway` that looks on."""

    #: Of the front door.
    id: str

    @abstractmethod
    async def _ask(self, op: str, **arguments: Any) -> dict[str, Any]:
        """The scheduler's answer; raises what it answers with, or :class:`SchedulerUnreachable`."""

    @abstractmethod
    def requests(self) -> list[dict[str, Any]]:
        """Requests of this front door under way, then those that ended lately, newest first."""

    @abstractmethod
    def end_here(self, request: str, error: SllmError) -> bool:
        """End the requests of this front door with this id, or key, with `error`; whether there were any."""

    @property
    @abstractmethod
    def connected(self) -> bool:
        """Whether there is a scheduler to ask, as far as is known."""

    async def all_requests(self) -> list[dict[str, Any]]:
        """Requests of all front doors: those under way, then those that have ended. Only ours while there is no scheduler."""
        try:
            reply = await self._ask_now("sllm_requests", front_door=self.id)
        except SchedulerUnreachable:
            return self.requests()
        rows = [*self.requests(), *reply["requests"]]
        return sorted(rows, key=lambda row: row["state"] not in ("queued", "running"))

    async def explain(self, name: str) -> dict[str, Any]:
        """Why a request or a model is served as it is; raises :class:`RecordNotFound`."""
        told = await self._ask("sllm_explain", name=name)
        if told["kind"] == "request" and told["ended"] is None:
            # The scheduler hears of tokens only in the end.
            mine = next((row for row in self.requests() if row["id"] == told["id"]), told)
            told |= {name: mine[name] for name in ("n_tokens", "node", "path")}
            told["moves"] = [explained_move(move) for move in merged_moves(told["moves"], mine["moves"])]
            told["resumes"] = [explained_resume(resume) for resume in mine["resumes"]]
        return told

    async def events(self, since: int, model: str | None, last: int | None, wait_s: float) -> dict[str, Any]:
        """See :meth:`sllmdask.cluster.observing.Observer.events`."""
        return await self._ask("sllm_events", since=since, model=model, last=last, wait_s=wait_s)

    async def families(self) -> list[dict[str, Any]]:
        """The metrics of the cluster, see :mod:`sllmdask.cluster.tallies`; raises :class:`SchedulerUnreachable` at once."""
        return list((await self._ask_now("sllm_metrics"))["families"])

    async def cancel(self, request: str) -> dict[str, Any]:
        """End a request, at whichever front door it is; raises :class:`RecordNotFound`."""
        if self.end_here(request, Cancelled("An operator cancelled the request.")):
            return {"request": request, "cancelled": True, "state": "cancelled"}
        return await self._ask("sllm_cancel", request=request)

    async def _ask_now(self, op: str, **arguments: Any) -> dict[str, Any]:
        """As :meth:`_ask`, without the attempts to reach a scheduler that has gone."""
        if not self.connected:
            raise SchedulerUnreachable("", "it went away")
        return await self._ask(op, **arguments)
