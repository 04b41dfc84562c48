"""Every metric of the server, on a registry of its own. The `artifact_*` names are part of the contract.

No label carries an app, a digest or anything else that users can multiply.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_PART_BYTES = tuple(float(mib << 20) for mib in (1, 4, 8, 16, 32, 64, 128, 512))
_PARTS = (1, 2, 5, 10, 50, 100, 500, 1000, 5000, 10_000)


class Metrics:
    """One instance per server; tests make their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(name, text, labels, registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], labels: tuple[str, ...] = ()) -> Histogram:
            return Histogram(name, text, labels, registry=self.registry, buckets=buckets)

        self.presign_requests = counter("artifact_presign_requests_total", "Presign requests.")
        self.presign_failures = counter("artifact_presign_failures_total", "Presign requests that failed.")
        self.complete_failures = counter("artifact_complete_failures_total", "Complete requests that failed.")
        self.upload_bytes = counter("artifact_upload_bytes_total", "Bytes of verified uploads.")
        self.digest_mismatch = counter("artifact_digest_mismatch_total", "Uploads whose bytes had another digest.")
        self.size_exceeded = counter("artifact_size_exceeded_total", "Uploads refused for their size.")
        self.pending_gc_runs = counter("artifact_pending_gc_runs_total", "Runs of the pending collector.")
        self.pending_gc_deleted = counter("artifact_pending_gc_deleted_total", "Pending objects deleted.")
        self.events = counter("artifact_events_total", "Events in the life of artifacts.", ("event",))
        self.legacy_uploads = counter("artifact_legacy_upload_requests_total", "Uploads over the deprecated route.")
        self.multipart_inits = counter("artifact_multipart_inits_total", "Multipart uploads begun.")
        self.multipart_part_presigns = counter("artifact_multipart_part_presigns_total", "Part URLs signed.")
        self.multipart_completes = counter("artifact_multipart_completes_total", "Multipart uploads completed.")
        self.multipart_complete_failures = counter(
            "artifact_multipart_complete_failures_total", "Multipart uploads that failed to complete."
        )
        self.quota_exceeded = counter("artifact_quota_exceeded_total", "Uploads refused by a quota.")
        self.retention_runs = counter("retention_runs_total", "Rounds of taking away what nobody needs.")
        self.retention_deleted = counter("retention_deleted_total", "Things taken away, by chore.", ("chore",))
        self.retention_bytes = counter("retention_freed_bytes_total", "Bytes given back, by chore.", ("chore",))
        self.uploads_in_progress = Gauge(
            "artifact_uploads_in_progress", "Uploads that are being received.", registry=self.registry
        )
        self.artifacts = Gauge("artifacts_total", "Artifacts stored.", registry=self.registry)
        self.upload_seconds = histogram(
            "artifact_upload_duration_seconds", "Presign to completed, as the server saw it.", _SECONDS
        )
        self.put_seconds = histogram("artifact_put_duration_seconds", "Duration of the PUT.", _SECONDS)
        self.complete_seconds = histogram("artifact_complete_duration_seconds", "Duration of complete.", _SECONDS)
        self.part_bytes = histogram("artifact_multipart_part_size_bytes", "Size of multipart parts.", _PART_BYTES)
        self.parts = histogram("artifact_multipart_parts_per_artifact", "Parts per multipart artifact.", _PARTS)

        self.http_requests = counter("http_requests_total", "Requests answered.", ("method", "route", "status"))
        self.http_seconds = histogram(
            "http_request_duration_seconds", "Time to answer.", _SECONDS, ("method", "route")
        )

    def render(self) -> bytes:
        """The text exposition format."""
        return generate_latest(self.registry)
