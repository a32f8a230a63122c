"""The Prometheus metrics of `/metrics`."""

from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from collections.abc import Iterable

    from scail2_rt.runtime.serve.service import Service

BUCKETS = (0.25, 0.5, 1, 2, 5, 10, 30, 60, 300, 1800)


class Metrics(Collector):
    """Counters of this process, and gauges that are read at each request of `/metrics`."""

    def __init__(self, service: "Service") -> None:
        self._service = service
        self.registry = CollectorRegistry()
        registry = self.registry
        self.taken = Counter("scail2_jobs_taken", "Jobs accepted.", registry=registry)
        self._ended = Counter("scail2_jobs_ended", "Jobs that ended, by final state.", ["state"], registry=registry)
        self._failures = Counter("scail2_failures", "Failed jobs by kind.", ["kind"], registry=registry)
        self._phases = Counter(
            "scail2_phase_seconds", "Seconds of completed jobs by phase.", ["phase"], registry=registry
        )
        self._frames = Counter("scail2_frames", "Frames of completed jobs.", registry=registry)
        self._rate = Histogram(
            "scail2_frames_per_second", "Frames per second of completed jobs.", registry=registry, buckets=BUCKETS
        )
        self.first_step = Histogram(
            "scail2_first_step_seconds", "From accepting a job to its first step.", registry=registry, buckets=BUCKETS
        )
        self.refused = Counter("scail2_refused", "Refused requests by status.", ["status"], registry=registry)
        registry.register(self)

    def ended(self, state: str, result: dict[str, Any]) -> None:
        """Count a job that has ended in this state. result: as it is stored."""
        self._ended.labels(state).inc()
        if state == "failed":
            self._failures.labels(result["kind"]).inc()
            return
        if not result["frames"]:  # a masks job
            return
        for phase, seconds in result["timings_s"].items():
            self._phases.labels(phase).inc(seconds)
        self._frames.inc(result["frames"])
        self._rate.observe(result["frames"] / max(result["inference_s"], 1e-6))

    def collect(self) -> "Iterable[Metric]":
        """Yield the gauges; called by Prometheus' registry."""
        service = self._service
        counts = service.store.counts()
        for name, about, value in (
            ("scail2_jobs_queued", "Queued jobs.", counts.get("queued", 0)),
            ("scail2_jobs_running", "Running jobs.", counts.get("running", 0)),
            ("scail2_workers_ready", "Workers with open engines.", sum(w.ready for w in service.pool.workers)),
            ("scail2_worker_deaths", "Worker processes that ended since the service started.", service.pool.deaths),
        ):
            yield GaugeMetricFamily(name, about, value=value)
        memory = GaugeMetricFamily("scail2_worker_memory_gib", "Memory per worker in GiB.", labels=["worker", "kind"])
        for worker in service.pool.workers:
            for kind, gib in (worker.memory or {}).items():
                memory.add_metric([str(worker.number), kind], gib)
        yield memory

    @property
    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)
