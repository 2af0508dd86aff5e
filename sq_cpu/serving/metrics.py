"""What Prometheus reads, under the names of vLLM (docs.vllm.ai, "Production Metrics").

What vLLM has not is under "sq_cpu": how rows fit static scales.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from sq_cpu.inference.scheduler import Scheduler
from sq_cpu.serving.watch import Watch

__all__ = ["Metrics", "Timer"]

# Seconds; those of vLLM, so that its dashboards read ours.
_FIRST = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5),
    *(10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_BETWEEN = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5),
    *(10.0, 20.0, 40.0, 80.0),
)
_WHOLE = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)


class Metrics:
    """The metrics of one server.

    Parameters
    ----------
    scheduler : whose numbers are read when Prometheus asks
    model : the name that all metrics carry
    watch : whose counts are read likewise; None: there are none
    """

    def __init__(self, scheduler: Scheduler, model: str, watch: Watch | None = None) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_SchedulerMetrics(scheduler, model))
        if watch is not None and watch.layers:
            self._registry.register(_WatchMetrics(watch, model))
        options: Any = {"registry": self._registry, "labelnames": ["model_name"]}
        self.first = Histogram(
            "vllm:time_to_first_token_seconds",
            "From a request's arrival to its first token.",
            buckets=_FIRST,
            **options,
        ).labels(model)
        self.between = Histogram(
            "vllm:inter_token_latency_seconds",
            "From a token to the next one of the same request.",
            buckets=_BETWEEN,
            **options,
        ).labels(model)
        self.whole = Histogram(
            "vllm:e2e_request_latency_seconds",
            "From a request's arrival to its last token.",
            buckets=_WHOLE,
            **options,
        ).labels(model)
        success = Counter(
            "vllm:request_success",
            "Requests that ended, by why.",
            labelnames=["model_name", "finished_reason"],
            registry=self._registry,
        )
        self.ended = {why: success.labels(model, why) for why in ("stop", "length", "abort")}

    def timer(self, arrival: float) -> Timer:
        """Return what times one request."""
        return Timer(self, arrival)

    def text(self) -> bytes:
        """Return all of it in Prometheus' text format."""
        return generate_latest(self._registry)


class Timer:
    """Times one request; all times in seconds of one clock."""

    def __init__(self, metrics: Metrics, arrival: float) -> None:
        self._metrics = metrics
        self._arrival = arrival
        self._last: float | None = None

    def tokens(self, now: float, count: int) -> None:
        """Take it that tokens have come."""
        if self._last is None:
            self._metrics.first.observe(now - self._arrival)
            count -= 1
            self._last = now
        for _ in range(count):
            self._metrics.between.observe((now - self._last) / count)
        self._last = now

    def finish(self, now: float, why: str) -> None:
        """Take it that the request has ended."""
        self._metrics.whole.observe(now - self._arrival)
        self._metrics.ended[why].inc()


class _SchedulerMetrics(Collector):
    def __init__(self, scheduler: Scheduler, model: str) -> None:
        self._scheduler = scheduler
        self._model = model

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        now, since = self._scheduler, self._scheduler.statistics
        gauges = (
            ("num_requests_running", "Requests that have pages.", now.running),
            ("num_requests_waiting", "Requests that wait for pages.", now.waiting),
            ("kv_cache_usage_perc", "Pages in use, 0 to 1.", now.pages_used / now.pages),
        )
        counters = (
            ("prompt_tokens", "Tokens of prompts.", since.prompt_tokens),
            ("generation_tokens", "Tokens generated.", since.generated_tokens),
            ("num_preemptions", "Requests that gave their pages to others.", since.preemptions),
            ("prefix_cache_queries", "Tokens looked for in pages.", since.prefix_query_tokens),
            ("prefix_cache_hits", "Tokens found in pages.", since.prefix_hit_tokens),
        )
        for kind, rows in ((GaugeMetricFamily, gauges), (CounterMetricFamily, counters)):
            for name, text, value in rows:
                family = kind(f"vllm:{name}", text, labels=["model_name"])
                family.add_metric([self._model], value)
                yield family


class _WatchMetrics(Collector):
    def __init__(self, watch: Watch, model: str) -> None:
        self._watch = watch
        self._model = model

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        self._watch.look()
        labels = ["model_name", "layer"]
        rows = CounterMetricFamily(
            "sq_cpu:rows", "Rows that a layer of static scale quantized.", labels=labels
        )
        misfits = CounterMetricFamily(
            "sq_cpu:misfit_rows", "Of these, rows that clipped or underflowed.", labels=labels
        )
        calibrated = GaugeMetricFamily(
            "sq_cpu:calibrated_misfit_share", "Share of such rows in calibration.", labels=labels
        )
        for name, layer in self._watch.layers.items():
            if not layer.rows:  # another layer with the same input counts them
                continue
            rows.add_metric([self._model, name], layer.rows)
            misfits.add_metric([self._model, name], layer.misfits)
            if layer.calibrated is not None:
                calibrated.add_metric([self._model, name], layer.calibrated)
        drifting = GaugeMetricFamily(
            "sq_cpu:drifting_layers",
            "Layers in which over 4 times as many rows as in calibration do not fit.",
            labels=["model_name"],
        )
        drifting.add_metric([self._model], len(self._watch.drifting))
        yield from (rows, misfits, calibrated, drifting)
