"""What Prometheus may ask."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from deepseek_vl2.engine.engine import Engine

PREFIX = "deepseek_vl2"
SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class EngineCollector(Collector):
    """Reads the engine's counts when it is asked."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def collect(self) -> Iterable[Metric]:
        """Yield gauges of the present and counters since the start."""
        engine, stats = self.engine, self.engine.stats
        scheduler, prefixes, images = engine.scheduler, engine.scheduler.prefixes, engine.images
        gauges = {
            "slots": ("Answers that may be written at the same time.", scheduler.max_batch),
            "slots_busy": ("Answers being written, prompts at work included.", engine.busy),
            "running": ("Answers being written.", len(scheduler.running)),
            "queue_length": ("Requests that wait for a slot.", engine.waiting),
            "cached_tokens": ("Tokens in the cache of the answers being written.", engine.cached_tokens),
            "kv_cache_tokens": ("Tokens that the KV cache has room for.", engine.kv_cache.tokens),
            "image_cache_bytes": ("Bytes of image embeddings that are kept.", images.bytes),
            "engine_healthy": ("Whether the engine works.", int(engine.healthy)),
        }
        counters = {
            "steps": ("Decoding steps.", stats.steps),
            "prompt_tokens": ("Tokens of prompts that were run.", stats.prompt_tokens),
            "generated_tokens": ("Tokens of answers.", stats.generated_tokens),
            "answers_finished": ("Answers that came to their end.", stats.finished),
            "answers_cancelled": ("Answers whose client left or whose time ran out.", stats.cancelled),
            "answers_failed": ("Answers that ended in an error.", stats.failed),
            "preemptions": (
                "Answers that a full KV cache made begin anew.",
                scheduler.preempted,
            ),
            "image_cache_hits": ("Images whose embeddings were kept from before.", images.hits),
            "image_cache_misses": ("Images that went through the vision tower.", images.misses),
            "prefix_cache_hits": ("Prompts that began like one in the KV cache.", prefixes.hits),
            "prefix_cache_tokens_saved": ("Tokens of prompts that were not computed again.", prefixes.tokens_saved),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(f"{PREFIX}_{name}", text, value=value)
        for name, (text, value) in counters.items():
            yield CounterMetricFamily(f"{PREFIX}_{name}", text, value=value)


class Metrics:
    """The server's metrics, in a registry of their own."""

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(EngineCollector(engine))
        self.requests = Counter(f"{PREFIX}_requests", "Chat requests by status.", ["status"], registry=self.registry)
        self.seconds = Histogram(
            f"{PREFIX}_request_seconds", "Time of whole requests.", registry=self.registry, buckets=SECONDS
        )
        self.first_token = Histogram(
            f"{PREFIX}_first_token_seconds", "Time to the first token.", registry=self.registry, buckets=SECONDS
        )

    def count(self, status: int, seconds: float, first_token_seconds: float | None = None) -> None:
        """Count a request that is over."""
        self.requests.labels(str(status)).inc()
        self.seconds.observe(seconds)
        if first_token_seconds is not None:
            self.first_token.observe(first_token_seconds)

    def text(self) -> bytes:
        """Return everything in Prometheus' format."""
        return generate_latest(self.registry)
