"""The error hierarchy: one stable code per kind of failure.

    AetherError
    ├── BadRequest            bad_request            400
    │   ├── MissingDigest     missing_digest         400
    │   ├── InvalidDigest     invalid_digest         400
    │   └── DigestMismatch    digest_mismatch        400
    ├── Unauthorized          unauthorized           401
    ├── Forbidden             forbidden              403
    │   ├── QuotaExceeded     quota_exceeded         403
    │   ├── SignatureRequired signature_required     403
    │   ├── SbomRequired      sbom_required          403
    │   └── ProvenanceRequired provenance_required   403
    ├── NotFound              not_found              404
    │   ├── ArtifactGone      artifact_gone          410
    │   └── LeaseGone         lease_gone             404
    ├── Conflict              conflict               409
    │   ├── IdempotencyConflict idempotency_conflict 409
    │   ├── Compacted         compacted              409
    │   └── DeliveryLost      delivery_lost          409
    ├── PayloadTooLarge       payload_too_large      413
    ├── RateLimited           rate_limited           429
    ├── Internal              internal               500
    ├── BadGateway            bad_gateway            502
    ├── ServiceUnavailable    service_unavailable    503
    │   └── QueueFull         queue_full             503
    ├── GatewayTimeout        gateway_timeout        504
    └── ClientError           (never crosses the wire; the CLI turns it into an exit code)
        ├── UsageError        usage             exit 2
        ├── ConfigError       config            exit 10
        ├── BuildFailed       build_failed      exit 20
        ├── LocalIOError      io                exit 30
        ├── NetworkError      network           exit 40
        └── RolloutFailed     rollout_failed    exit 50

The module imports nothing, because the CLI loads it on its hot path.
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any


class AetherError(Exception):
    """A failure with a stable `code`, an HTTP `status` and a process `exit_code`."""

    code = "internal"
    status = 500
    exit_code = 20

    def __init__(self, message: str, details: "Mapping[str, Any] | None" = None) -> None:
        super().__init__(message)
        self.message = message
        self.details = details


class BadRequest(AetherError):
    code, status, exit_code = "bad_request", 400, 2


class MissingDigest(BadRequest):
    code = "missing_digest"


class InvalidDigest(BadRequest):
    code = "invalid_digest"


class DigestMismatch(BadRequest):
    code, exit_code = "digest_mismatch", 30


class Unauthorized(AetherError):
    code, status, exit_code = "unauthorized", 401, 10


class Forbidden(AetherError):
    code, status, exit_code = "forbidden", 403, 10


class QuotaExceeded(Forbidden):
    code = "quota_exceeded"


class SignatureRequired(Forbidden):
    """The server runs artifacts only that a key of their app has signed."""

    code = "signature_required"


class SbomRequired(Forbidden):
    code = "sbom_required"


class ProvenanceRequired(Forbidden):
    """The server runs artifacts only with provenance that a key of their app has signed."""

    code = "provenance_required"


class NotFound(AetherError):
    code, status, exit_code = "not_found", 404, 2


class ArtifactGone(NotFound):
    """The artifact of a release was taken away after a time."""

    code, status = "artifact_gone", 410


class LeaseGone(NotFound):
    """The lease of the key-value store has expired or was revoked, and its keys are deleted."""

    code = "lease_gone"


class Conflict(AetherError):
    code, status = "conflict", 409


class IdempotencyConflict(Conflict):
    code = "idempotency_conflict"


class Compacted(Conflict):
    """History before `revision` is no longer kept: list anew, and watch from there."""

    code = "compacted"

    def __init__(self, message: str, details: "Mapping[str, Any] | None" = None, *, revision: int = 0) -> None:
        super().__init__(message, details)
        self.revision = revision


class DeliveryLost(Conflict):
    """The message was given to another consumer, or is done with: leave its work alone."""

    code = "delivery_lost"


class PayloadTooLarge(AetherError):
    code, status = "payload_too_large", 413


class RateLimited(AetherError):
    code, status, exit_code = "rate_limited", 429, 40


class Internal(AetherError):
    pass


class BadGateway(AetherError):
    code, status, exit_code = "bad_gateway", 502, 40


class ServiceUnavailable(AetherError):
    code, status, exit_code = "service_unavailable", 503, 40


class QueueFull(ServiceUnavailable):
    code = "queue_full"


class GatewayTimeout(AetherError):
    code, status, exit_code = "gateway_timeout", 504, 40


class ClientError(AetherError):
    """A failure on the developer's machine."""


class UsageError(ClientError):
    code, exit_code = "usage", 2


class ConfigError(ClientError):
    code, exit_code = "config", 10


class BuildFailed(ClientError):
    code, exit_code = "build_failed", 20


class LocalIOError(ClientError):
    code, exit_code = "io", 30


class NetworkError(ClientError):
    code, exit_code = "network", 40


class RolloutFailed(ClientError):
    code, exit_code = "rollout_failed", 50


def _index(base: type[AetherError]) -> "dict[str, type[AetherError]]":
    found = {base.code: base}
    for child in base.__subclasses__():
        for code, kind in _index(child).items():
            found.setdefault(code, kind)
    return found


def from_wire(status: int, code: str, message: str, details: "Mapping[str, Any] | None" = None) -> AetherError:
    """Rebuild the error that a server's envelope names; an unknown code keeps its code and status."""
    kind = _index(AetherError).get(code)
    if kind is None or issubclass(kind, ClientError):
        error = AetherError(message, details)
        error.code = code
    else:
        error = kind(message, details)
    error.status = status
    return error
