"""What front doors, users and operators see of models and of workers: plain msgpack types."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distributed import Scheduler

from sllmdask.cluster.deployments import Deployed, Deployments
from sllmdask.cluster.draining import Drains
from sllmdask.cluster.estimates import Estimates
from sllmdask.cluster.waiting import LoadProgress
from sllmdask.policy.controller import Controller
from sllmdask.policy.views import InstanceState, Tier, WorkerView


class Rows:
    """Rows over what the controller decided and what the workers told."""

    def __init__(
        self,
        scheduler: Scheduler,
        controller: Controller,
        deployments: Deployments,
        progress: LoadProgress,
        accounts: Mapping[str, dict[str, Any]],
        estimates: Estimates,
        drains: Drains,
    ) -> None:
        self._scheduler, self._controller, self._deployments = scheduler, controller, deployments
        self._progress, self._accounts, self._estimates = progress, accounts, estimates
        self._drains = drains

    def models(self) -> dict[str, dict[str, Any]]:
        """The deployed models by name."""
        return {name: self._model(name, deployed) for name, deployed in self._deployments.by_name.items()}

    def _model(self, name: str, deployed: Deployed) -> dict[str, Any]:
        instances = self._controller.instances_of(name)
        loading = [instance for instance in instances if instance.state in (InstanceState.LOADING, InstanceState.PLANNED)]
        dispatchable = [instance for instance in instances if instance.state is InstanceState.READY]
        ready = [instance for instance in dispatchable if self._progress.of(instance) is None]
        # Requests are dispatched to an instance whose last bytes are on their way, but nobody is answered yet.
        loading = [instance for instance in dispatchable if instance not in ready] + loading
        progress = next((told for instance in loading if (told := self._progress.of(instance))), {})
        done, total = progress.get("done", 0), progress.get("total", deployed.nbytes)
        reason = self._controller.last_failure(name)
        if ready:
            state = "ready"
        elif loading:
            state = "loading"
        elif reason:
            state = "failed"
        else:
            tiers = {worker.residency.get(deployed.deployment.source) for worker in self._controller.workers.values()}
            state = next((str(tier) for tier in (Tier.HOST, Tier.DISK) if tier in tiers), "absent")
            reason = self._deployments.unserved.get(name) if state == "absent" else None
            state = "failed" if reason else state
        return {
            "model": name,
            "state": state,
            "created": deployed.created,
            "revision": deployed.revision,
            "max_model_len": deployed.max_model_len,
            "nbytes": deployed.nbytes,
            "instances": len(ready),
            "reason": reason,
            "keep_alive": self._deployments.keep_alive(deployed.deployment),
            "progress": done / total if loading and total else None,
            "done": done if loading else None,
            "tier": progress.get("tier"),
            "bytes_per_s": progress.get("bytes_per_s"),
            "source": deployed.deployment.source,
            "task": "embed" if deployed.embedding else "generate",
            "embedding": deployed.embedding,
            "adapters": deployed.deployment.backend_config.lora_adapters or {},
            "pinned": sorted(self._deployments.pins.get(name, ())),
        }

    def workers(self) -> list[dict[str, Any]]:
        """Workers with their slots, tiers and models."""
        return [self._worker(view) for view in self._controller.workers.values()]

    def _worker(self, view: WorkerView) -> dict[str, Any]:
        state = self._scheduler.workers[view.address]
        facts = state.extra["sllm"]
        account = self._accounts.get(view.address, facts)
        here = [instance for instance in self._controller.instances.values() if instance.worker == view.address]
        taken = [instance for instance in here if instance.state is not InstanceState.PLANNED]
        models = []
        for name, deployed in self._deployments.by_name.items():
            states = [self._progress.state_of(instance) for instance in here if instance.model == name]
            tier = view.residency.get(deployed.deployment.source)
            if states:
                shown = "device" if InstanceState.READY in states else str(tier or Tier.DISK)
                ready = InstanceState.READY if InstanceState.READY in states else states[0]
                models.append({"model": name, "state": str(ready), "tier": shown, "nbytes": deployed.nbytes})
            elif tier is not None:
                models.append({"model": name, "state": str(tier), "tier": str(tier), "nbytes": deployed.nbytes})
            else:
                continue
            models[-1]["pinned"] = deployed.deployment.source in account["pinned"]
        return {
            "name": view.name,
            "address": view.address,
            "pid": facts["pid"],
            "slots": view.slots,
            "draining": self._drains.row(view),
            "slots_used": sum(instance.n_slots for instance in taken),
            "tiers": account["tiers"],
            "bandwidth": account["bandwidth"],
            "estimate": self._estimates.error_of(view.name),
            "instances": [
                {
                    "instance": instance.id,
                    "model": instance.model,
                    "state": str(instance.state),
                    "n_requests": instance.n_requests,
                    "progress": self._progress.of(instance),
                    "engine": account["instances"].get(instance.id),
                }
                for instance in here
            ],
            "models": models,
        }
