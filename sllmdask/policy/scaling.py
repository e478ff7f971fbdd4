"""How many instances a model has, and when an idle one leaves."""

from __future__ import annotations

from math import inf

from sllmdask.policy.views import InstanceView, ModelView


def desired_instances(model: ModelView, n_requests: int) -> int:
    """``ceil(load / target)`` between the model's bounds. Source: ServerlessLLM's autoscaler, metric ``concurrency``."""
    wanted = -(-n_requests // model.target)
    return max(model.min_instances, min(model.max_instances, wanted))


def leaves_at(model: ModelView, instance: InstanceView) -> float:
    """When an idle instance has been kept long enough; ``inf`` while it is busy or kept for ever."""
    if not instance.idle or instance.idle_since is None or model.keep_alive_s < 0:
        return inf
    return instance.idle_since + model.keep_alive_s
