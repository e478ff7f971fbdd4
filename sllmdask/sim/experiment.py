"""One policy over one workload: the live controller, a cluster of the simulator, and what became of every request."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from random import Random

from sllmdask.policy import events as ev
from sllmdask.policy.controller import Controller, ControllerSettings
from sllmdask.policy.decisions import Preempt, Unload
from sllmdask.policy.views import RequestView
from sllmdask.sim.effects import Cluster, introductions
from sllmdask.sim.policies import POLICIES, Policy
from sllmdask.sim.run import Outcome, Simulation
from sllmdask.sim.scenario import Scenario
from sllmdask.sim.workload import Request

#: Events between two looks at the progress.
N_PROGRESS = 256


@dataclass(frozen=True)
class Served:
    """The seconds of one request. One that was refused counts with those until it was, which are no fewer than its deadline.

    ``startup_s``: from its arrival until its first token could be computed, that is, an instance had it.
    ``ttft_s``: until its first token was made, which is longer by what went before in the batch, and by its prefill.
    ``stalled_s``: in which it stood still after it had begun, preempted or moving. ``delay_s`` is startup and stalls.
    """

    id: str
    startup_s: float
    ttft_s: float
    stalled_s: float
    end_to_end_s: float
    #: From where its model was loaded while it waited; ``hit``: it was ready; ``refused``.
    start: str

    @property
    def delay_s(self) -> float:
        return self.startup_s + self.stalled_s


@dataclass(frozen=True)
class Run:
    """One policy with one seed. `loads` are by tier, `estimate_errors` relative, of the loads that a decision predicted."""

    policy: str
    seed: int
    requests: tuple[Served, ...]
    loads: Mapping[str, int] = field(default_factory=dict)
    estimate_errors: tuple[float, ...] = ()
    n_evictions: int = 0
    n_migrations: int = 0
    n_failed_migrations: int = 0
    n_preemptions: int = 0
    #: Virtual seconds until the last request had ended.
    ended_at: float = 0.0

    def starts(self) -> dict[str, int]:
        """Requests by the tier that they waited for."""
        return dict(Counter(each.start for each in self.requests))


def controller_settings(scenario: Scenario, policy: Policy, seed: int) -> ControllerSettings:
    spec = scenario.scheduler
    return ControllerSettings(
        max_queue=spec.max_queue,
        min_residency_s=spec.min_residency,
        patience_s=spec.patience,
        max_requests=spec.max_running,
        can_migrate=policy.can_migrate,
        can_preempt=policy.can_preempt,
        preempts_older=policy.preempts_older,
        chooser=policy.chooser,
        seed=seed,
    )


def simulate_policy(
    scenario: Scenario,
    policy: str,
    seed: int,
    *,
    on_progress: Callable[[float], None] | None = None,
    check: Callable[[Controller, Cluster], None] | None = None,
) -> Run:
    """Serve the workload of `seed` by `policy`; `on_progress` hears the part of it that is over, `check` is for invariants."""
    chosen = POLICIES[policy]
    requests = scenario.requests(seed)
    nodes, models = scenario.nodes(), scenario.model_views()
    simulation = Simulation(Controller(controller_settings(scenario, chosen, seed)))
    cluster = Cluster(
        simulation.clock,
        simulation.tell,
        nodes,
        {model.name: model for model in models},
        {request.id: request.lengths for request in requests},
        scenario.cluster_costs(workers_measure=chosen.workers_measure),
        Random(f"noise {seed}"),
    )
    arrivals: list[ev.Event] = [ev.WorkerJoined(0.0, worker) for worker in introductions(nodes)]
    arrivals += [ev.ModelDeployed(0.0, model) for model in models]
    arrivals += [ev.RequestArrived(request.at, _view(request, scenario)) for request in requests]
    n_events = 0

    def look(controller: Controller) -> None:
        nonlocal n_events
        n_events += 1
        if on_progress and n_events % N_PROGRESS == 0:
            on_progress(min(1.0, simulation.clock.now / scenario.workload.duration))
        if check:
            check(controller, cluster)

    outcome = simulation.run(arrivals, cluster, check=look)
    decisions = [decision for _, decision in outcome.decisions]
    loads = cluster.loads
    errors = [
        abs(load.seconds - load.predicted_s) / load.seconds for load in loads if load.predicted_s is not None and load.seconds
    ]
    counted = [request for request in requests if request.at >= scenario.workload.warm_up]
    return Run(
        policy=policy,
        seed=seed,
        requests=tuple(_served(request, outcome, cluster) for request in counted),
        loads=dict(Counter(load.tier.value for load in loads)),
        estimate_errors=tuple(errors),
        n_evictions=sum(isinstance(each, Unload) and each.cause == "evicted" for each in decisions),
        n_migrations=cluster.n_migrations,
        n_failed_migrations=cluster.n_failed_migrations,
        n_preemptions=sum(len(each.requests) for each in decisions if isinstance(each, Preempt)),
        ended_at=max([*outcome.ended_at.values(), *outcome.refused_at.values()], default=0.0),
    )


def _view(request: Request, scenario: Scenario) -> RequestView:
    return RequestView(
        id=request.id,
        model=request.model,
        front_door="simulated",
        arrived_at=request.at,
        deadline_at=request.at + scenario.scheduler.request_deadline,
        n_tokens=request.lengths.n_prompt,
    )


def _served(request: Request, outcome: Outcome, cluster: Cluster) -> Served:
    """Raises `KeyError` for a request that neither ended nor was refused: there is none."""
    refused_at = outcome.refused_at.get(request.id)
    if refused_at is not None:
        waited_s = refused_at - request.at
        return Served(request.id, waited_s, waited_s, 0.0, waited_s, "refused")
    record, dispatch = cluster.requests[request.id], outcome.dispatches[request.id]
    assert record.first_token_at is not None
    return Served(
        id=request.id,
        startup_s=outcome.dispatched_at[request.id] - request.at,
        ttft_s=record.first_token_at - request.at,
        stalled_s=record.stalled_s,
        end_to_end_s=outcome.ended_at[request.id] - request.at,
        start="hit" if dispatch.loaded_from is None else dispatch.loaded_from.value,
    )
