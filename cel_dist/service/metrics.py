"""What the service counts, in the text format of Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)


class Metrics:
    """Counters of one service, beside those of its process (memory, CPU, open files)."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._requests = Counter(
            "cel_requests", "Requests that were answered.", ["method", "endpoint", "status"], registry=self.registry
        )
        self._seconds = Histogram(
            "cel_request_seconds",
            "From the head of a request to its answer.",
            ["endpoint"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.audio_seconds = Counter("cel_audio_seconds", "Audio that was embedded.", registry=self.registry)
        self.admitted = Gauge(
            "cel_requests_admitted", "Requests with audio that are received or worked on.", registry=self.registry
        )
        self.speakers = Gauge("cel_speakers", "People who are enrolled.", registry=self.registry)

    def answered(self, method: str, endpoint: str, status: int, seconds: float) -> None:
        """Count a request. `method` and `endpoint` come from a fixed set, or memory would grow with their number."""
        self._requests.labels(method, endpoint, str(status)).inc()
        self._seconds.labels(endpoint).observe(seconds)

    def text(self) -> bytes:
        """All of them as a scraper reads them."""
        return generate_latest(self.registry)
