"""What went wrong with a call, as an error that names a remedy: from exceptions of sockets, TLS and http.client, and
from the envelopes and error documents of servers and object stores."""

from __future__ import annotations

import http.client
import json
import os
import socket
import ssl

from aether.model.errors import AetherError, NetworkError, from_wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from aether.client.dial import Origin
    from aether.client.transport import Reply

_CODES = {
    400: "bad_request",
    401: "unauthorized",
    403: "forbidden",
    404: "not_found",
    409: "conflict",
    413: "payload_too_large",
    429: "rate_limited",
    502: "bad_gateway",
    503: "service_unavailable",
    504: "gateway_timeout",
}


class Unreached(NetworkError):
    """Nothing answered at an address that is right as far as anybody knows, or what did broke off."""


def failure(reply: Reply, method: str, home: Origin) -> AetherError:
    """The error of an answer with status 300 or above; `home` is the API's own origin."""
    envelope: dict[str, Any] = {}
    if reply.body.lstrip()[:1] == b"{":
        try:
            envelope = json.loads(reply.body)
        except ValueError:
            envelope = {}
    own = reply.origin.same(home)
    if isinstance(envelope.get("code"), str):
        details: dict[str, Any] = envelope.get("details") or {}
        if envelope.get("trace_id"):
            details["trace_id"] = envelope["trace_id"]
        error = from_wire(reply.status, envelope["code"], str(envelope.get("message", "")), details)
    else:
        code = _CODES.get(reply.status, "internal" if reply.status >= 500 else "bad_request")
        reason, said = _xml_error(reply.body)
        said = said or http.client.responses.get(reply.status, "no reason given")
        message = f"{reply.origin} answered {reply.status} ({said}) to {method}"
        error = from_wire(reply.status, code, message, {"reason": reason} if reason else None)
    if error.code == "unauthorized" and own:
        hint = "" if "aether login" in error.message else ": run 'aether login'"
        error.message = f"{error.message or 'not logged in'} ({reply.origin}){hint}"
        error.args = (error.message,)
    return error


def named(error: BaseException, origin: Origin, home: Origin) -> BaseException:
    """`error` with a remedy a user can follow; errors that need none stay as they are."""
    own = origin.same(home)
    if isinstance(error, ConnectionRefusedError) or (origin.path and isinstance(error, FileNotFoundError)):
        if not own:
            return Unreached(f"nothing answers at {origin}, where the server keeps its artifacts")
        hint = "is the server running? Start it with 'aether up'" if origin.is_loopback else "is the server running?"
        return Unreached(f"nothing answers at {origin}: {hint}, or set AETHER_API_BASE")
    if isinstance(error, TimeoutError):
        return Unreached(f"{origin} did not answer in time")
    if isinstance(error, socket.gaierror):
        # no answer from the resolver is what a lost network looks like
        kind = Unreached if error.errno == socket.EAI_AGAIN else NetworkError
        hint = "is AETHER_API_BASE right?" if own else "the server named it as its object store"
        return kind(f"the name of {origin} cannot be resolved: {hint}")
    if isinstance(error, ssl.SSLError):
        if isinstance(error, ssl.SSLCertVerificationError):
            return NetworkError(
                f"the certificate of {origin} is not trusted ({error.verify_message}): give the authority that "
                "made it with 'aether login --ca-file FILE' or AETHER_CA_FILE"
            )
        return NetworkError(f"no TLS connection to {origin}: {error.reason or error}")
    if isinstance(error, (OSError, http.client.HTTPException)):
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else type(error).__name__
        hint = ": is the server running?" if own else ""
        return Unreached(f"the connection to {origin} failed ({reason}){hint}")
    return error


def _xml_error(body: bytes) -> tuple[str, str]:
    """Code and message of an S3 error document; empty strings when it is none."""
    text = body[:16_384].decode("utf-8", "replace")
    if "<Error>" not in text:
        return "", ""
    code, message = (
        text.partition(f"<{name}>")[2].partition(f"</{name}>")[0].strip()[:200] for name in ("Code", "Message")
    )
    return code, f"{code}: {message}" if message else code
