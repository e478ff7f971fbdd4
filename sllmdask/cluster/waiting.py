"""What operators wait for: that something is loaded, that its last byte is there, that instances have left."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Collection, Container
from typing import Any

from sllmdask.errors import LoadFailed
from sllmdask.policy import events as ev
from sllmdask.policy.controller import Controller
from sllmdask.policy.decisions import Decision, Refuse, ReportLoaded
from sllmdask.policy.views import InstanceState, InstanceView, Tier

logger = logging.getLogger(__name__)

#: Instances that failed whose reasons are kept.
N_FAILED = 100


class Wishes:
    """Operators' wishes that a model be loaded, by the name that the controller knows each by."""

    def __init__(self) -> None:
        self._answers: dict[str, asyncio.Future[ReportLoaded]] = {}
        self._numbers = itertools.count(1)

    def make(self, kind: str = "load") -> tuple[str, asyncio.Future[ReportLoaded]]:
        """A name for one more wish of that `kind`, and the answer to it, which raises what the controller refuses it with."""
        name = f"{kind}-{next(self._numbers)}"
        self._answers[name] = asyncio.get_running_loop().create_future()
        return name, self._answers[name]

    def forget(self, name: str) -> None:
        """Nobody waits for that answer any more."""
        self._answers.pop(name, None)

    def answer(self, decision: Decision) -> bool:
        """Whether `decision` was about a wish; it is answered then."""
        wish = self._answers.pop(decision.request, None) if isinstance(decision, ReportLoaded | Refuse) else None
        if wish is None:
            return False
        if isinstance(decision, Refuse):
            logger.info("refuse load=%s cause=%s why=%s", decision.request, decision.error.message, dict(decision.why))
            if not wish.done():
                wish.set_exception(decision.error)
        elif isinstance(decision, ReportLoaded):
            logger.info("loaded load=%s instance=%s waited_s=%.3f", decision.request, decision.instance, decision.waited_s)
            if not wish.done():
                wish.set_result(decision)
        return True


class Departures:
    """Instances that are to leave, and who waits until they have."""

    def __init__(self) -> None:
        self._leaving: dict[asyncio.Future[None], set[str]] = {}

    def begin(self, instances: Collection[str]) -> asyncio.Future[None]:
        """Done by :meth:`settle` once none of `instances` is there any more."""
        gone = asyncio.get_running_loop().create_future()
        self._leaving[gone] = set(instances)
        return gone

    def forget(self, gone: asyncio.Future[None]) -> None:
        self._leaving.pop(gone, None)

    def settle(self, there: Container[str]) -> None:
        """These instances are `there`."""
        for gone, instances in list(self._leaving.items()):
            if not any(instance in there for instance in instances):
                del self._leaving[gone]
                if not gone.done():
                    gone.set_result(None)


class LoadProgress:
    """How far each load is by the reports of its worker: an instance takes requests before its last byte is there.

    `changed` is called when there is something to tell.
    """

    def __init__(self, controller: Controller, changed: Callable[[], None]) -> None:
        self._controller, self._changed = controller, changed
        #: The last report of each load, by instance.
        self._told: dict[str, dict[str, Any]] = {}
        #: Those who wait for the last byte of an instance, by instance.
        self._readings: dict[str, asyncio.Future[None]] = {}
        #: Model and reason of instances that failed a short while ago: who is about to wait for one may come later than its end.
        self._failed: dict[str, tuple[str, str]] = {}

    def of(self, instance: InstanceView | None) -> dict[str, Any] | None:
        """How far a load is, ``done``, ``total`` in bytes, ``tier``, ``bytes_per_s``, until its last byte is there."""
        told = None if instance is None else self._told.get(instance.id)
        if instance is None or told is None or instance.state not in (InstanceState.LOADING, InstanceState.READY):
            return None
        if instance.state is InstanceState.READY and _is_read(told):
            return None
        return {key: told[key] for key in ("done", "total", "tier", "bytes_per_s")}

    def state_of(self, instance: InstanceView) -> InstanceState:
        """Its state; one that is still being read is loading for who looks at it, whatever may be dispatched to it."""
        reading = instance.state is InstanceState.READY and self.of(instance) is not None
        return InstanceState.LOADING if reading else instance.state

    def reading(self) -> dict[str, dict[str, Any]]:
        """How far those are, by instance, that take requests already."""
        return {
            instance.id: told
            for instance in self._controller.instances.values()
            if instance.state is InstanceState.READY and (told := self.of(instance))
        }

    def reported(self, message: dict[str, Any]) -> None:
        """A worker's report of a load."""
        if not _is_read(self._told.get(message["instance"])):
            self._told[message["instance"]] = message
            self.settle()
            self._changed()

    def takes_requests(self, event: ev.LoadFinished) -> None:
        """Until a report or an account says more, an instance that was not in memory is one of which nothing is there yet."""
        instance = self._controller.instances.get(event.instance)
        if instance is not None and event.loaded_from in (Tier.DISK, Tier.PEER, Tier.REMOTE):
            told = {"done": 0, "total": instance.nbytes, "tier": str(event.loaded_from), "bytes_per_s": 0.0}
            self._told.setdefault(instance.id, told)

    def is_read(self, instance: str) -> None:
        """All bytes of an instance are there: its last report may have been lost, or be late."""
        told = self._told.get(instance, {"total": 0, "tier": None, "bytes_per_s": 0.0})
        if instance in self._controller.instances and not _is_read(told):
            self._told[instance] = {**told, "done": told["total"]}
            self.settle()
            self._changed()

    def failed(self, instance: str, reason: str) -> None:
        """An instance that was being read is gone: who waits for its last byte hears why."""
        view, read = self._controller.instances.get(instance), self._readings.pop(instance, None)
        model = view.model if view is not None else instance
        self._failed[instance] = (model, reason)
        for oldest in list(self._failed)[:-N_FAILED]:
            del self._failed[oldest]
        if read is not None:
            read.set_exception(LoadFailed(model, reason))
            read.exception()  # whoever waited may have gone

    async def until_read(self, instance: str) -> None:
        """Until the last byte of an instance is there, or it is gone; raises :class:`LoadFailed`."""
        if instance in self._failed and instance not in self._controller.instances:
            raise LoadFailed(*self._failed[instance])
        if self.of(self._controller.instances.get(instance)) is not None:
            read = self._readings.setdefault(instance, asyncio.get_running_loop().create_future())
            await asyncio.shield(read)

    def settle(self) -> None:
        """Tell those whose instance is read, or gone."""
        for instance, read in list(self._readings.items()):
            if self.of(self._controller.instances.get(instance)) is None:
                del self._readings[instance]
                read.set_result(None)

    def forget_gone(self) -> None:
        """Keep nothing of instances that are not there any more."""
        self._told = {key: told for key, told in self._told.items() if key in self._controller.instances}


def _is_read(told: dict[str, Any] | None) -> bool:
    """Whether a report of a load is its last one."""
    return told is not None and bool(told.get("done", -1) >= told["total"])
