"""`Metrics`: counters for Prometheus, under names of this server, and under those of vLLM for dashboards made for it."""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from ..engine import Event, Load

PREFIX = "dllm_hf_"
# Names of this server without the prefix -> vLLM's.
ALIASES = {
    "requests_running": "num_requests_running",
    "requests_waiting": "num_requests_waiting",
    "cache_usage": "kv_cache_usage_perc",
    "prompt_tokens": "prompt_tokens",
    "generation_tokens": "generation_tokens",
    "completions": "request_success",
    "time_to_first_token_seconds": "time_to_first_token_seconds",
    "request_seconds": "e2e_request_latency_seconds",
}
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)


class Metrics:
    """Counted in the event loop; the engine's thread leaves its `load` after each step that tells something."""

    def __init__(self, name: str):
        self.load = Load(0, 0, 0.0, 0)
        self.unfinished: Callable[[], int] = lambda: 0  # completions that were submitted
        self.registry = CollectorRegistry()
        labels = {"model_name": name}

        def make(kind, name, text, more=(), **options):
            metric = kind(PREFIX + name, text, [*labels, *more], registry=self.registry, **options)
            return metric if more else metric.labels(*labels.values())

        self._name = name
        running = make(Gauge, "requests_running", "Completions that have a slot.")
        waiting = make(Gauge, "requests_waiting", "Completions that wait for one.")
        cache = make(Gauge, "cache_usage", "Part of the cache's columns that completions hold.")
        passes = make(Gauge, "forward_passes", "Forward passes of the engine since it started.")
        running.set_function(lambda: self.load.running)
        waiting.set_function(lambda: max(self.unfinished() - self.load.running, 0))
        cache.set_function(lambda: self.load.cache)
        passes.set_function(lambda: self.load.num_forward_passes)
        self._prompt_tokens = make(Counter, "prompt_tokens", "Tokens of prompts.")
        self._tokens = make(Counter, "generation_tokens", "New tokens.")
        self._completions = make(Counter, "completions", "Completions that have ended.", ["finished_reason"])
        self._passes = make(Counter, "completion_passes", "Forward passes of completions, each row counted.")
        self._steps = make(Counter, "denoising_steps", "Those that gave a completion a token.")
        self._first = make(Histogram, "time_to_first_token_seconds", "To the first final token.", buckets=SECONDS)
        self._seconds = make(Histogram, "request_seconds", "From a request's arrival to its end.", buckets=SECONDS)
        self._responses = make(Counter, "http_responses", "Answers to requests.", ["path", "status"])

    def completion_finished(self, event: Event) -> None:
        assert event.usage is not None
        self._completions.labels(self._name, event.finish_reason).inc()
        self._prompt_tokens.inc(event.usage.prompt_tokens)
        self._tokens.inc(event.usage.completion_tokens)
        self._passes.inc(event.usage.num_forward_passes)
        self._steps.inc(event.usage.num_denoising_steps)

    def first_token(self, seconds: float) -> None:
        self._first.observe(seconds)

    def request_finished(self, seconds: float) -> None:
        self._seconds.observe(seconds)

    def answered(self, path: str, status: int) -> None:
        self._responses.labels(self._name, path, str(status)).inc()


class WithAliases(Collector):
    """What a registry holds, and again under vLLM's names."""

    def __init__(self, registry: CollectorRegistry):
        self.registry = registry

    def collect(self) -> Iterator[Metric]:
        for metric in self.registry.collect():
            metric.samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
            yield metric
            alias = ALIASES.get(metric.name.removeprefix(PREFIX))
            if alias is not None:
                renamed = Metric("vllm:" + alias, metric.documentation, metric.type)
                renamed.samples = [
                    sample._replace(name=sample.name.replace(metric.name, renamed.name, 1)) for sample in metric.samples
                ]
                yield renamed
