"""``GET /metrics``: what this front door saw of its requests, and what the scheduler tells of the cluster.

Nothing is kept outside the objects here, so several front doors may live in one process. Labels have names of deployed models,
and no id and no text of a request.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter as Tally
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Self

from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from sllmdask.cluster.journal import Delta, Finished, GatewayEvent, Started
from sllmdask.cluster.tallies import Counter, Family, Histogram, Labels, gauge
from sllmdask.errors import SllmError

#: Upper bounds of buckets, in seconds: vLLM's, and shorter ones for small models.
FIRST_TOKEN_S = (
    *(0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
BETWEEN_TOKENS_S = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
WHOLE_S = (
    *(0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
#: Models that are not deployed any more of which the series are kept.
N_DELETED = 256
#: Seconds for which an answer of the scheduler serves, and that it may take.
FRESH_S, SCHEDULER_S = 1.0, 3.0


class Watch:
    """The choices of one HTTP request, from its arrival to its end. Use it around the loop that reads their events."""

    def __init__(self, metrics: FrontDoorMetrics, model: str, n_prompt_tokens: Sequence[int], began_s: float) -> None:
        self._metrics, self._model, self._n_prompt_tokens, self._began_s = metrics, model, n_prompt_tokens, began_s
        #: Of each choice: when its last token came, and whether an instance has it.
        self._last_s: list[float | None] = [None] * len(n_prompt_tokens)
        self._started = [False] * len(n_prompt_tokens)
        self._open = set(range(len(n_prompt_tokens)))

    def __enter__(self) -> Self:
        self._metrics.n_waiting[self._model] += len(self._open)
        return self

    def saw(self, index: int, event: GatewayEvent) -> None:
        """One event of the choice with this index."""
        metrics, model = self._metrics, self._model
        if isinstance(event, Delta):
            if n_tokens := len(event.token_ids):
                now, last_s = time.monotonic(), self._last_s[index]
                metrics.n_tokens.add(n_tokens, model)
                if last_s is None:
                    metrics.first_token_s.observe(now - self._began_s, model)
                else:
                    for _ in range(n_tokens):  # several at once: as if they had come one after the other
                        metrics.between_tokens_s.observe((now - last_s) / n_tokens, model)
                self._last_s[index] = now
        elif isinstance(event, Started):
            if not self._started[index]:
                self._started[index] = True
                metrics.n_waiting[model] -= 1
                metrics.n_running[model] += 1
                metrics.n_prompt_tokens.add(self._n_prompt_tokens[index], model)
        elif isinstance(event, Finished):
            self._end(index, event.reason.value)

    def _end(self, index: int, reason: str) -> None:
        self._open.discard(index)
        (self._metrics.n_running if self._started[index] else self._metrics.n_waiting)[self._model] -= 1
        self._metrics.ended.add(1, self._model, reason)
        self._metrics.whole_s.observe(time.monotonic() - self._began_s, self._model)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        left = kind is not None and not issubclass(kind, Exception)  # the client did, or the server stops
        for index in sorted(self._open):
            self._end(index, "abort" if left else "error")


class FrontDoorMetrics:
    """The counts of one front door."""

    def __init__(self) -> None:
        labels = ("model_name",)
        self.n_waiting: Tally[str] = Tally()
        self.n_running: Tally[str] = Tally()
        self.first_token_s = Histogram(
            "vllm:time_to_first_token_seconds",
            "From a request's arrival to its first token, loading included.",
            FIRST_TOKEN_S,
            *labels,
        )
        self.between_tokens_s = Histogram(
            "vllm:inter_token_latency_seconds", "Between two tokens of an answer.", BETWEEN_TOKENS_S, *labels
        )
        self.whole_s = Histogram("vllm:e2e_request_latency_seconds", "From a request's arrival to its end.", WHOLE_S, *labels)
        self.n_prompt_tokens = Counter("vllm:prompt_tokens_total", "Tokens of prompts that instances took.", *labels)
        self.n_tokens = Counter("vllm:generation_tokens_total", "Tokens of answers.", *labels)
        self.ended = Counter(
            "vllm:request_success_total",
            "Answers that have ended: stop and length are whole ones, abort and error are not.",
            *labels,
            "finished_reason",
        )
        #: Models of which there are series, the latest used last.
        self._models: dict[str, None] = {}

    def watch(self, model: str, n_prompt_tokens: Sequence[int], began_s: float) -> Watch:
        """A request for `model` that came at `began_s` (monotonic); `n_prompt_tokens`: what each choice adds to the prompts."""
        self._models.pop(model, None)
        self._models[model] = None
        return Watch(self, model, n_prompt_tokens, began_s)

    def families(self, deployed: Iterable[str]) -> list[Family]:
        """All of them. Of models that are not `deployed` any more the oldest are forgotten."""
        there = set(deployed)
        busy = {model for counts in (self.n_running, self.n_waiting) for model, n in counts.items() if n}
        gone = [model for model in self._models if model not in there | busy]
        histograms = (self.first_token_s, self.between_tokens_s, self.whole_s)
        counters = (self.n_prompt_tokens, self.n_tokens, self.ended)
        for model in gone[: max(0, len(gone) - N_DELETED)]:
            del self._models[model]
            for each in (*histograms, *counters):
                each.forget(model)
        running: dict[Labels, float] = {(model,): float(self.n_running[model]) for model in self._models}
        waiting: dict[Labels, float] = {(model,): float(self.n_waiting[model]) for model in self._models}
        labels = ("model_name",)
        return [
            gauge("vllm:num_requests_running", "Requests of this front door that an instance has.", labels, running),
            gauge("vllm:num_requests_waiting", "Requests of this front door that wait for an instance.", labels, waiting),
            *(each.family() for each in (*histograms, *counters)),
        ]


class ClusterFamilies:
    """What the scheduler tells, asked once for all who scrape within a second."""

    def __init__(self, ask: Callable[[], Awaitable[list[Family]]]) -> None:
        self._ask = ask
        self._asked_at: float | None = None
        self._answer: asyncio.Task[list[Family]] | None = None

    async def families(self) -> list[Family]:
        """The families of the cluster, and whether the scheduler has told them; a scheduler that is away is no error."""
        now = time.monotonic()
        if self._answer is None or self._asked_at is None or now >= self._asked_at + FRESH_S:
            self._asked_at = now
            self._answer = asyncio.create_task(self._told())
        return await asyncio.shield(self._answer)

    async def _told(self) -> list[Family]:
        name, what = "sllmdask_scheduler_up", "Whether the scheduler told the metrics of the cluster."
        try:
            async with asyncio.timeout(SCHEDULER_S):
                told = await self._ask()
        except (SllmError, TimeoutError):
            return [gauge(name, what, (), {(): 0.0})]
        return [gauge(name, what, (), {(): 1.0}), *told]


class _Families(Collector):
    """Our families as prometheus_client's."""

    def __init__(self, families: Iterable[Family]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        for family in self._families:
            name, text, labels = family["name"], family["help"], family["labels"]
            if family["kind"] == "histogram":
                histogram = HistogramMetricFamily(name, text, labels=labels)
                for values, buckets, total in family["samples"]:
                    histogram.add_metric(values, [(floatToGoString(bound), n) for bound, n in buckets], total)
                yield histogram
            else:
                metric: CounterMetricFamily | GaugeMetricFamily
                if family["kind"] == "counter":
                    metric = CounterMetricFamily(name, text, labels=labels)
                else:
                    metric = GaugeMetricFamily(name, text, labels=labels)
                for values, number in family["samples"]:
                    metric.add_metric(values, number)
                yield metric


def render(families: Iterable[Family]) -> web.Response:
    """The answer to a scrape. Always Prometheus' own text format, which every scraper takes: as OpenMetrics, the library writes
    the colon of vLLM's names as an underscore."""
    registry = CollectorRegistry()
    registry.register(_Families(families))
    return web.Response(body=generate_latest(registry), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})
