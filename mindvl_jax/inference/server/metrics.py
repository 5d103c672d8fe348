"""Prometheus metrics of `/metrics`."""

from __future__ import annotations

import jax
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_COMPILED = "/jax/core/compile/backend_compile_duration"


class Metrics:
    """Counters of one server, in a registry of their own so that several servers can live in one process."""

    def __init__(self):
        self.registry = CollectorRegistry()

        def make(kind, name, text, *rest, **options):
            return kind(f"mindvl_{name}", text, *rest, registry=self.registry, **options)

        self.requests = make(Counter, "requests_total", "Requests by outcome.", ["outcome"])
        self.prompt_tokens = make(Counter, "prompt_tokens_total", "Tokens of prompts that were answered.")
        self.answer_tokens = make(Counter, "answer_tokens_total", "Tokens of answers.")
        self.reused_pictures = make(
            Gauge, "reused_pictures", "Images and videos that were not seen again, since the engine was made."
        )
        self.reused_tokens = make(
            Gauge, "reused_prompt_tokens", "Tokens of prompts that were not read again, since the engine was made."
        )
        self.waiting = make(Gauge, "waiting_requests", "Requests that wait for a slot.")
        self.running = make(Gauge, "running_answers", "Answers that decode.")
        self.slots = make(Gauge, "slots", "Answers that can decode together.")
        self.compilations = make(Counter, "compilations_total", "Programs compiled since the server warmed up.")
        self.restarts = make(Counter, "engine_restarts_total", "Times that the engine failed and was made anew.")
        self.first_token = make(
            Histogram, "time_to_first_token_seconds", "From a request's arrival to its first token.", buckets=SECONDS
        )
        self.between_tokens = make(
            Histogram, "time_between_tokens_seconds", "Mean time between the tokens of an answer.", buckets=SECONDS
        )
        self.whole = make(Histogram, "request_seconds", "From a request's arrival to its last token.", buckets=SECONDS)
        self._counting = False
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def warmed_up(self) -> None:
        """Count compilations from here on."""
        self._counting = True

    def _on_event(self, event: str, duration: float, **rest) -> None:
        if self._counting and event == _COMPILED:
            self.compilations.inc()

    def compilations_since_warm_up(self) -> int:
        return int(self.compilations._value.get())

    def text(self) -> bytes:
        return generate_latest(self.registry)
