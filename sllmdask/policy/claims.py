"""What those who wait count on: ends that they wait for, and instances that were closed to newcomers for them."""

from __future__ import annotations

from collections.abc import Sequence

from sllmdask.policy.placement import missing_nbytes
from sllmdask.policy.queue import Demand, RequestQueue, demand_of, turn_of
from sllmdask.policy.state import ClusterState
from sllmdask.policy.views import InstanceState, InstanceView, ModelView, RequestView


class Awaited:
    """Whose end is waited for by whom: the slots of one that ends go to the first of them."""

    def __init__(self, queue: RequestQueue) -> None:
        self._queue = queue
        self._of: dict[Demand, tuple[str, ...]] = {}
        self._by_instance: dict[str, dict[Demand, None]] = {}

    def set(self, demand: Demand, instances: tuple[str, ...]) -> None:
        """`demand` waits for the ends of `instances`, and for no others."""
        for instance_id in self._of.pop(demand, ()):
            others = self._by_instance[instance_id]
            del others[demand]
            if not others:
                del self._by_instance[instance_id]
        if instances:
            self._of[demand] = instances
        for instance_id in instances:
            self._by_instance.setdefault(instance_id, {})[demand] = None

    def of(self, demand: Demand) -> tuple[str, ...]:
        """The instances whose end `demand` waits for."""
        return self._of.get(demand, ())

    def before(self, instance_id: str, request: RequestView) -> list[str]:
        """The models that those wait for whose turn is before that of `request`, and who wait for the same end."""
        turn, own = turn_of(request), demand_of(request)
        others = self._by_instance.get(instance_id, ())
        return [demand[0] for demand in others if demand != own and self._queue.turn(demand) < turn]


class Claims:
    """Instances that were closed to newcomers for somebody who has waited for long. Those of one worker are for one claimant."""

    def __init__(self, queue: RequestQueue, state: ClusterState) -> None:
        self._queue, self._state = queue, state
        self._by_instance: dict[str, str] = {}
        self._of_request: dict[str, list[InstanceView]] = {}
        self._on_worker: dict[str, str] = {}

    def claim(self, request: RequestView, model: ModelView, addresses: Sequence[str]) -> None:
        """Close the instances that would free slots for `model` soonest, so that they can become idle and leave; on one of
        `addresses`, or where there is nothing to close, on any worker."""
        for some in (addresses, [worker.address for worker in self._state.fit(model)]):
            closable = {address: self._closable(address, model) for address in some}
            ranks = [(sum(each.n_requests for each in found), address) for address, found in closable.items() if found]
            if ranks:
                self.close(closable[min(ranks)[1]], request.id)
                return

    def _closable(self, address: str, model: ModelView) -> list[InstanceView]:
        """What would have to be closed so that a worker has room for `model` in the end; nothing, if it would not have."""
        worker, instances = self._state.workers[address], self._state.on_worker(address)
        if self.on_worker(address) is not None:
            return []
        found = [
            instance
            for instance in instances
            if instance.state is InstanceState.READY and instance.model != model.name and not self._state.is_kept(instance)
        ]
        closed = {instance.id for instance in found}
        staying = [each for each in (*instances, *self._state.neighbours(address)) if each.id not in closed]
        n_slots = self._state.free_slots(address) + sum(instance.n_slots for instance in found)
        lacks = missing_nbytes(model.nbytes, model.checkpoint_key, worker, staying)
        return found if n_slots >= model.n_slots and lacks <= 0 else []

    def close(self, instances: list[InstanceView], request_id: str) -> None:
        """`instances` of one worker take only those whose turn is before that of the claimant."""
        self._of_request[request_id] = list(instances)
        for instance in instances:
            self._by_instance[instance.id] = request_id
            self._on_worker[instance.worker] = request_id

    def release(self, request_id: str) -> list[InstanceView]:
        """What was closed for a request is open again; returns it."""
        instances = self._of_request.pop(request_id, [])
        for instance in instances:
            self._by_instance.pop(instance.id, None)
            if self._on_worker.get(instance.worker) == request_id:
                del self._on_worker[instance.worker]
        return instances

    def drop(self, instance_id: str) -> None:
        """The instance is gone, or leaves."""
        request_id = self._by_instance.pop(instance_id, None)
        if request_id is None:
            return
        rest = [each for each in self._of_request[request_id] if each.id != instance_id]
        if rest:
            self._of_request[request_id] = rest
        else:
            self.release(request_id)

    def has(self, request_id: str) -> bool:
        return request_id in self._of_request

    def claimants(self) -> list[RequestView]:
        """Those for whom something is closed."""
        return [self._queue.waiting[each] for each in self._of_request if each in self._queue.waiting]

    def closed(self, instance_id: str, request: RequestView) -> bool:
        """Whether the instance is kept from `request` for one of another model whose turn is earlier."""
        other = self._queue.waiting.get(self._by_instance.get(instance_id, ""))
        return other is not None and other.model != request.model and turn_of(other) < turn_of(request)

    def on_worker(self, address: str) -> RequestView | None:
        """For whom a worker is being emptied."""
        return self._queue.waiting.get(self._on_worker.get(address, ""))

    def held(self, address: str, request: RequestView | None) -> RequestView | None:
        """Somebody whose turn is earlier than that of `request`, or of nobody, and for whom the worker is being emptied."""
        other = self.on_worker(address)
        return other if other is not None and (request is None or turn_of(other) < turn_of(request)) else None
