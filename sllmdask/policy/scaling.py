"""How many instances a model has, when an idle one leaves, and which of those that work leave first."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

from sllmdask.policy.views import InstanceState, InstanceView, ModelView


def desired_instances(model: ModelView, n_requests: int) -> int:
    """``ceil(load / target)`` between the model's bounds. Source: ServerlessLLM's autoscaler, metric ``concurrency``."""
    wanted = -(-n_requests // model.target)
    return max(model.min_instances, min(model.max_instances, wanted))


def leaves_at(model: ModelView, instance: InstanceView) -> float:
    """When an idle instance has been kept long enough; ``inf`` while it is busy or kept for ever."""
    if not instance.idle or instance.idle_since is None or model.keep_alive_s < 0:
        return inf
    return instance.idle_since + model.keep_alive_s


_LIFE = {state: i for i, state in enumerate(InstanceState)}


def fewest_first(instances: Sequence[InstanceView]) -> list[InstanceView]:
    """In the order in which surplus ones leave: those that are not ready yet, then by requests; of equals the newest."""
    newest = list(reversed(instances))
    return sorted(newest, key=lambda instance: (_LIFE[instance.state], instance.n_requests))
