"""How many instances each model has: more for a burst, in one decision, and fewer when they have had less to do for a while."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice

from sllmdask.policy.backoff import BackOff
from sllmdask.policy.choosers import Chooser
from sllmdask.policy.decisions import Chose, Decision
from sllmdask.policy.fleet import Fleet
from sllmdask.policy.options import WayFinder
from sllmdask.policy.placement import unfit
from sllmdask.policy.queue import RequestQueue
from sllmdask.policy.records import choice
from sllmdask.policy.scaling import desired_instances, fewest_first, leaves_at
from sllmdask.policy.state import ClusterState
from sllmdask.policy.timers import Timers
from sllmdask.policy.views import InstanceState, InstanceView, ModelView

#: Why an instance that works gets no more requests; it goes on if they become more before it has left.
SCALED_DOWN = "scaled down"
#: Why an instance beyond the most takes no more requests.
LIMITED = "max_instances"
#: Models that lack instances and are looked at when there is room: the others follow with the next event.
_MAX_SHORT = 16


class Autoscaler:
    """Looks at models whose load, instances or settings have changed, or whose time has come."""

    def __init__(
        self,
        state: ClusterState,
        queue: RequestQueue,
        back_off: BackOff,
        finder: WayFinder,
        fleet: Fleet,
        timers: Timers,
        choose: Chooser,
        min_residency_s: float,
    ) -> None:
        self._state, self._queue, self._back_off = state, queue, back_off
        self._finder, self._fleet, self._timers, self._choose = finder, fleet, timers, choose
        self._min_residency_s = min_residency_s
        self._changed: dict[str, None] = {}
        #: Models that lack instances, for which there was no room; who has waited longest for it comes first.
        self._short: dict[str, None] = {}
        #: Since when a model has more instances than it needs, and how many it needed at most since then.
        self._surplus: dict[str, tuple[float, int]] = {}

    def look_at(self, models: Iterable[str]) -> None:
        """Something has changed about `models`."""
        self._changed.update(dict.fromkeys(models))

    def there_is_room(self) -> None:
        """Some worker has free slots, or idle instances."""
        self.look_at(islice(self._short, _MAX_SHORT))

    def limit(self, model: ModelView, at: float) -> None:
        """What is more than the most, which was lowered, takes no more requests."""
        living = self._state.living(model.name)
        for instance in fewest_first(living)[: max(0, len(living) - model.max_instances)]:
            self._fleet.drain(instance, LIMITED, at)

    def scale(self, at: float) -> list[Decision]:
        """Begin what is missing, and let go of what is too much."""
        changed, self._changed = self._changed, {}
        decisions: list[Decision] = []
        for name in changed:
            model = self._state.models.get(name)
            if model is None:
                self._short.pop(name, None)
                self._surplus.pop(name, None)
                self._timers.cancel("scale", name)
                continue
            decisions += self._grow(model, at)
            decisions += self._shrink(model, at)
            self._look_again(model, at)
        return decisions

    def _wanted(self, model: ModelView) -> int:
        return desired_instances(model, self._queue.load[model.name])

    def _grow(self, model: ModelView, at: float) -> list[Decision]:
        """Instances beyond the first go to free slots only; only what a model is promised is worth another one's idle instance.

        The first one is begun for a request, by the way that serves it the soonest.
        """
        decisions: list[Decision] = []
        wanted = self._wanted(model)
        self._short.pop(model.name, None)
        if not model.min_instances and not self._state.living(model.name):
            return []
        for instance in self._state.instances_of(model.name):
            reopens = instance.draining == SCALED_DOWN and instance.state is InstanceState.READY
            fits = unfit(model, self._state.workers[instance.worker]) is None
            if reopens and fits and len(self._state.living(model.name)) < wanted:
                self._fleet.reopen(instance)
        while (n_living := len(self._state.living(model.name))) < wanted:
            is_promised = n_living < model.min_instances
            if not is_promised and not self._state.any_free:
                self._short[model.name] = None
                break
            ways = self._finder.of_nobody(model, at, may_evict=is_promised)
            chosen = self._choose(ways.open)
            if chosen is None:
                self._short[model.name] = None
                break
            n_requests = self._queue.load[model.name]
            reason = "min_instances" if is_promised else f"{n_requests} requests are more than {n_living} x {model.target}"
            record = choice("", model.name, chosen, ways, reason, at)
            decisions += [Chose(record), *self._fleet.begin(model, chosen, ways, at)[1]]
        return decisions

    def _shrink(self, model: ModelView, at: float) -> list[Decision]:
        """What has been idle, or one too many, for the keep-alive time leaves."""
        decisions: list[Decision] = []
        living = self._state.living(model.name)
        wanted = self._wanted(model)
        surplus = len(living) - wanted
        for instance in sorted(living, key=lambda instance: leaves_at(model, instance)):
            if surplus > 0 and leaves_at(model, instance) <= at:
                decisions.append(self._fleet.unload(instance, "keep-alive over", at))
                surplus -= 1
        self._drain_surplus(model, wanted, at)
        return decisions

    def _drain_surplus(self, model: ModelView, wanted: int, at: float) -> None:
        """Of instances that all work, those with the fewest requests are closed to newcomers, if fewer would have done."""
        living = self._state.living(model.name)
        # What an operator is moving about is not disturbed.
        if len(living) <= wanted or model.keep_alive_s < 0 or self._held(living):
            self._surplus.pop(model.name, None)
            return
        since, most = self._surplus.get(model.name, (at, wanted))
        most = max(most, wanted)
        self._surplus[model.name] = since, most
        if at < since + model.keep_alive_s:
            return
        # Idle ones leave by themselves, and what is not ready yet has not had its chance.
        working = [each for each in living if self._works(each, at)]
        n_idle = sum(instance.idle for instance in living)
        n_coming = sum(instance.state is not InstanceState.READY for instance in living)
        n_more = len(living) - most - n_idle - n_coming
        for instance in fewest_first(working)[: max(0, n_more)]:
            self._fleet.drain(instance, SCALED_DOWN, at)
        self._surplus[model.name] = at, wanted

    def _held(self, instances: Sequence[InstanceView]) -> bool:
        return any(request.load_only for each in instances for request in self._queue.on_instance(each.id))

    def _works(self, instance: InstanceView, at: float) -> bool:
        settled = at >= (instance.ready_at or 0.0) + self._min_residency_s
        return instance.state is InstanceState.READY and not instance.idle and settled

    def _look_again(self, model: ModelView, at: float) -> None:
        """When time alone may have changed the answer."""
        moments = []
        living = self._state.living(model.name)
        if len(living) > model.min_instances:
            moments += [leaves_at(model, instance) for instance in living if instance.idle]
        if model.name in self._surplus and sum(not instance.idle for instance in living) > 0:
            moments.append(self._surplus[model.name][0] + model.keep_alive_s)
        tried_again_at = self._back_off.ends_at(model.name, at)
        if model.name in self._short:
            moments += [tried_again_at] if tried_again_at is not None else []
            if model.min_instances:  # all that are ready by now may be evicted by then
                moments.append(self._fleet.last_ready_at + self._min_residency_s)
        earliest = min((moment for moment in moments if at < moment < float("inf")), default=None)
        if earliest is None:
            self._timers.cancel("scale", model.name)
        else:
            self._timers.set(earliest, "scale", model.name)
