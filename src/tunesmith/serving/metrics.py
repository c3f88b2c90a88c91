"""What the server measures, for Prometheus. Each server has a registry of its own."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from tunesmith.machine import backend
from tunesmith.serving import access
from tunesmith.serving.guardrails import Detection
from tunesmith.serving.worker import Worker

FIRST_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
NEXT_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.035, 0.05, 0.1, 0.25, 0.5, 1, 5)
WHOLE_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 900)
PREFIX = "tunesmith"


class Metrics:
    """Counters and histograms, which handlers change, and gauges, which are read from ``worker`` when they
    are asked for. Labels hold names of what is served, never what clients wrote."""

    def __init__(self, worker: Worker) -> None:
        registry = self._registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"{PREFIX}_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, bounds: tuple[float, ...]) -> Histogram:
            return Histogram(f"{PREFIX}_{name}", text, ("model",), buckets=bounds, registry=registry)

        def gauge(name: str, text: str, value: Callable[[], float]) -> None:
            Gauge(f"{PREFIX}_{name}", text, registry=registry).set_function(value)

        self.requests = counter("requests", "HTTP requests", "endpoint", "model", "status")
        self.errors = counter("errors", "Requests that were not answered", "model", "reason")
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts", "model")
        self.cached_tokens = counter("cached_tokens", "Prompt tokens taken from the prefix cache", "model")
        self.answer_tokens = counter("answer_tokens", "Generated tokens", "model")
        self.prefix_lookups = counter("prefix_lookups", "Prompts, by prefix cache hit", "model", "hit")
        self.fallbacks = counter("fallbacks", "Answers by a fallback", "model", "instead", "reason")
        self.guardrails = counter("guardrails", "Findings of guardrails", "guardrail", "direction", "action")
        self.seconds = histogram("request_seconds", "Time of an HTTP request", WHOLE_S)
        self.first_token = histogram("first_token_seconds", "Time to the first token", FIRST_S)
        self.next_token = histogram("next_token_seconds", "Time between two tokens", NEXT_S)
        gauge("up", "1 if the engine runs", lambda: worker.healthy)
        gauge("queue", "Requests that wait", lambda: worker.n_waiting)
        gauge("rows", "Requests under way", lambda: worker.n_rows)
        gauge("batch_size", "Most requests under way", lambda: worker.batch_size)
        gauge("kv_bytes", "Keys and values that requests under way may need", lambda: worker.kv_bytes)
        gauge("weights_bytes", "Memory in use before any request", lambda: worker.weights)
        gauge("reserved_bytes", "For prompts that were read and what is loading", lambda: worker.reserved)
        gauge("memory_limit_bytes", "Memory that the server may use", lambda: worker.memory)
        gauge("memory_active_bytes", "Memory in use", lambda: backend.memory()["active"])
        gauge("memory_peak_bytes", "Most memory in use so far", lambda: backend.memory()["peak"])
        gauge("memory_resident_bytes", "Memory of the process", lambda: backend.memory()["resident"])
        gauge("restarts_died", "Engines started anew after a failure", lambda: worker.restarts["died"])
        gauge("restarts_hung", "Engines started anew after a standstill", lambda: worker.restarts["hung"])
        gauge("out_of_memory", "Times that memory ran out", lambda: worker.out_of_memory)

    def detected(self, detection: Detection) -> None:
        """Count what a guardrail detected, and note it in the access log."""
        self.guardrails.labels(detection.guardrail, detection.direction, detection.action).inc()
        access.current().guardrails.append(f"{detection.action} {detection.direction} {detection.guardrail}")

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)
