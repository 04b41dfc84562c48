"""Certificates by host name: which one a TLS handshake is answered with, changed while connections stay.

A connection keeps what it was made with; the next handshake gets what the book says by then. Where certificates come
from is the business of `hosts`.
"""

from __future__ import annotations

import ssl
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import time
from typing import Final

_MAX_MADE: Final = 512


@dataclass(frozen=True, slots=True)
class Made:
    """A certificate made for one name, good to hand out until `until` (seconds since the epoch)."""

    context: ssl.SSLContext
    until: float


class CertificateBook:
    """`listening` is the context to listen with; it has no certificate of its own but asks the book for each name."""

    def __init__(self) -> None:
        self._contexts: dict[str, ssl.SSLContext] = {}
        self._made: OrderedDict[str, Made] = OrderedDict()
        self._default: ssl.SSLContext | None = None
        self.make: Callable[[str], Made | None] = lambda name: None
        """Called for a name that has no certificate, empty when a client names none; quick, and never raises."""
        self.listening = bare_context()
        self.listening.sni_callback = self._choose

    def set_default(self, context: ssl.SSLContext) -> None:
        """For names that have no other, and for clients that name none."""
        self._default = context

    def put(self, host: str, context: ssl.SSLContext | None) -> None:
        """From the next handshake on this one stands for `host`; None: none does."""
        if context is None:
            self._contexts.pop(host, None)
        else:
            self._contexts[host] = context

    def show(self, host: str, pem: Path | None) -> None:
        """The same from a file that holds key and chain. Raises OSError."""
        self.put(host, None if pem is None else server_context(pem))

    def find(self, name: str) -> ssl.SSLContext | None:
        name = name.lower().removesuffix(".")
        context = self._contexts.get(name)
        return context or self._make(name) or self._default

    def _make(self, name: str) -> ssl.SSLContext | None:
        made = self._made.get(name)
        if made is None or made.until < time():
            made = self.make(name)
            if made is None:
                return None
            self._made[name] = made
            if len(self._made) > _MAX_MADE:
                self._made.popitem(last=False)
        self._made.move_to_end(name)
        return made.context

    def _choose(self, connection: ssl.SSLObject | ssl.SSLSocket, name: str | None, _: ssl.SSLContext) -> int | None:
        context = self.find(name or "")
        if context is None:
            return int(ssl.ALERT_DESCRIPTION_UNRECOGNIZED_NAME)
        connection.context = context
        return None


def bare_context() -> ssl.SSLContext:
    """TLS 1.2 and 1.3, HTTP/1.1 only, no compression and no renegotiation; without a certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION | ssl.OP_CIPHER_SERVER_PREFERENCE
    context.set_alpn_protocols(["http/1.1"])
    return context


def server_context(chain: Path, key: Path | None = None) -> ssl.SSLContext:
    """A context that shows the certificates of `chain`. Raises OSError, ssl.SSLError among them."""

    def no_password() -> str:
        raise ssl.SSLError("the key is protected by a password")

    context = bare_context()
    context.load_cert_chain(chain, key, password=no_password)
    return context
