"""DSSE envelopes (https://github.com/secure-systems-lab/dsse, v1.0): a payload with signatures around it.

Signatures are Ed25519 over the pre-authentication encoding, which binds the payload's type to its bytes. An envelope
may carry several (builder, server, two server keys during a rotation). What the payload says is left to `provenance`.
"""

import binascii
from base64 import b64decode, b64encode
from collections.abc import Iterable
from dataclasses import dataclass, replace

from aether.artifact import strictjson
from aether.artifact.signature import check_public_key, key_id, public_key, sign_bytes, verify_bytes
from aether.model.errors import BadRequest

PAYLOAD_TYPE = "application/vnd.in-toto+json"
MAX_SIGNATURES = 16
MAX_BYTES = 4 << 20
"""Longest envelope that is read."""


def pae(payload_type: str, payload: bytes) -> bytes:
    """The bytes that are signed."""
    kind = payload_type.encode("utf-8")
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


@dataclass(frozen=True, slots=True)
class Signature:
    """One signature; `keyid` is a hint that nothing vouches for, and may be empty."""

    keyid: str
    sig: bytes


@dataclass(frozen=True, slots=True)
class Envelope:
    """A payload and who signed it."""

    payload: bytes
    payload_type: str = PAYLOAD_TYPE
    signatures: tuple[Signature, ...] = ()

    def signed(self, seed: bytes) -> "Envelope":
        """This envelope with one signature more; one that the same key made before is replaced."""
        keyid = key_id(public_key(seed))
        made = Signature(keyid, sign_bytes(pae(self.payload_type, self.payload), seed))
        return replace(self, signatures=(*(one for one in self.signatures if one.keyid != keyid), made))

    def verify(self, public_keys: Iterable[str]) -> list[str]:
        """Those of `public_keys` (hex) that signed this payload, each once, in their order."""
        message = pae(self.payload_type, self.payload)
        found: list[str] = []
        for key in public_keys:
            named = key_id(check_public_key(key))
            # by the specification a key id only helps to find the key: a signature without one, or with a name of
            # somebody else's scheme, is tried with every key
            fits = sorted(self.signatures, key=lambda one, named=named: one.keyid != named)
            if key not in found and any(verify_bytes(message, one.sig, key) for one in fits):
                found.append(key)
        return found

    def encode(self) -> bytes:
        """The envelope as JSON; equal envelopes are equal bytes."""
        return strictjson.write(
            {
                "payload": b64encode(self.payload).decode("ascii"),
                "payloadType": self.payload_type,
                "signatures": [
                    {"keyid": one.keyid, "sig": b64encode(one.sig).decode("ascii")} for one in self.signatures
                ],
            }
        )


def _base64(value: object, what: str) -> bytes:
    """Standard or URL-safe base64, both of which the specification lets writers use. Raises BadRequest."""
    if not isinstance(value, str):
        raise BadRequest(f"{what} is not a text")
    try:
        return b64decode(value.replace("-", "+").replace("_", "/"), validate=True)
    except (binascii.Error, ValueError):
        raise BadRequest(f"{what} is not base64") from None


def decode(data: bytes) -> Envelope:
    """The envelope in `data`; signatures are not checked yet. Raises BadRequest for anything but an envelope with at
    least one signature around an in-toto payload.
    """
    what = "the DSSE envelope"
    if len(data) > MAX_BYTES:
        raise BadRequest(f"{what} is larger than {MAX_BYTES} bytes")
    value = strictjson.an_object(strictjson.read(data, what), what)
    kind = value.get("payloadType")
    if kind != PAYLOAD_TYPE:
        raise BadRequest(f"{what} does not have the payloadType '{PAYLOAD_TYPE}'")
    signatures: list[Signature] = []
    for item in strictjson.a_list(value.get("signatures"), f"'signatures' of {what}"):
        one = strictjson.an_object(item, f"a signature of {what}")
        keyid = one.get("keyid", "")
        if not isinstance(keyid, str) or len(keyid) > 256:
            raise BadRequest(f"a keyid of {what} is not a short text")
        signatures.append(Signature(keyid, _base64(one.get("sig"), f"a signature of {what}")))
    if not 1 <= len(signatures) <= MAX_SIGNATURES:
        raise BadRequest(f"{what} has {len(signatures)} signatures: 1 to {MAX_SIGNATURES} are read")
    named = [one.keyid for one in signatures if one.keyid]
    if len(set(named)) != len(named):
        raise BadRequest(f"{what} has two signatures with one keyid")
    return Envelope(_base64(value.get("payload"), f"the payload of {what}"), kind, tuple(signatures))
