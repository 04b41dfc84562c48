"""One order at a certificate authority that speaks ACME (RFC 8555), proven over HTTP. Blocks: call it in a thread.

Imported only where an authority is configured: its libraries take long to load.
"""

# acme and josepy carry no usable types: their values are unknown to a type checker
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false
# pyright: reportPrivateImportUsage=false, reportMissingTypeStubs=false, reportUnknownLambdaType=false

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import josepy as jose
import requests
from acme import challenges, client, errors, messages
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from aether import __version__
from aether.hosts.authority import write_private

ORDER_SECS = 120
Answer = Callable[[str, str | None], None]
"""Have this path of the host answered with this text, or no more with None; returns when it is so."""


class OrderFailed(Exception):
    """The message says why; `limited` when the authority wants fewer orders."""

    def __init__(self, message: str, *, limited: bool = False) -> None:
        super().__init__(message)
        self.limited = limited


class Authority:
    """An account at the authority, made with the first order and kept by its key."""

    def __init__(self, directory: str, email: str, account_key: Path, ca_file: str = "") -> None:
        self._directory = directory
        self._email = email
        self._account_key = account_key
        self._ca_file = ca_file

    def issue(self, host: str, answer: Answer) -> tuple[bytes, bytes]:
        """Chain and key of a new certificate for `host`. Raises OrderFailed."""
        try:
            return self._issue(host, answer)
        except errors.ValidationError as error:
            told = [
                str(challenge.error.detail)
                for failed in error.failed_authzrs
                for challenge in cast("Any", failed.body).challenges
                if challenge.error is not None
            ]
            raise OrderFailed(f"the authority could not see that the host leads here: {'; '.join(told)}") from error
        except messages.Error as error:
            raise OrderFailed(
                f"the authority refused: {error.detail}", limited=error.code == "rateLimited"
            ) from error
        except errors.TimeoutError as error:
            raise OrderFailed(f"the authority was not done within {ORDER_SECS} s") from error
        except (errors.Error, requests.RequestException, OSError, ValueError) as error:
            raise OrderFailed(f"the authority at {self._directory} cannot be used: {error}") from error

    def _issue(self, host: str, answer: Answer) -> tuple[bytes, bytes]:
        speaker = self._speaker()
        key = ec.generate_private_key(ec.SECP256R1())
        request = (
            x509.CertificateSigningRequestBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host)] if len(host) <= 64 else []))
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False)
            .sign(key, hashes.SHA256())
        )
        order = speaker.new_order(request.public_bytes(serialization.Encoding.PEM))
        paths: list[str] = []
        try:
            for authorization in cast("Any", order).authorizations:
                if authorization.body.status == messages.STATUS_VALID:
                    continue
                body = next(
                    (one for one in authorization.body.challenges if isinstance(one.chall, challenges.HTTP01)),
                    None,
                )
                if body is None:
                    raise OrderFailed("the authority offers no proof over HTTP")
                response, text = body.chall.response_and_validation(speaker.net.key)
                paths.append(body.chall.path)
                answer(body.chall.path, text)
                speaker.answer_challenge(body, response)
            # the library compares with the naive local time
            deadline = dt.datetime.now() + dt.timedelta(seconds=ORDER_SECS)
            finished = speaker.poll_and_finalize(order, deadline)
        finally:
            for path in paths:
                answer(path, None)
        return finished.fullchain_pem.encode(), key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )

    def _speaker(self) -> client.ClientV2:
        key = jose.JWKEC(key=self._key())
        net = client.ClientNetwork(key, alg=jose.ES256, user_agent=f"aether/{__version__}")
        if self._ca_file:
            # what requests calls verify; the library declares a bool and hands it on as it is
            cast("Any", net).verify_ssl = self._ca_file
        speaker = client.ClientV2(client.ClientV2.get_directory(self._directory, net), net)
        wanted = messages.NewRegistration.from_data(email=self._email, terms_of_service_agreed=True)
        try:
            speaker.new_account(wanted)
        except errors.ConflictError as known:
            net.account = messages.RegistrationResource(uri=known.location, body=messages.Registration())
        return speaker

    def _key(self) -> ec.EllipticCurvePrivateKey:
        if not self._account_key.exists():
            made = ec.generate_private_key(ec.SECP256R1())
            pem = made.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
            self._account_key.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_private(self._account_key, pem)
        found = serialization.load_pem_private_key(self._account_key.read_bytes(), None)
        if not isinstance(found, ec.EllipticCurvePrivateKey):
            raise ValueError(f"{self._account_key} holds a key of another kind")
        return found
