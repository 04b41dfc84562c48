"""Brings an artifact into the registry: presign, send in one piece or in parts, complete.

    presign    finds that the registry has it, or says from which size on an upload goes in parts
    send       one PUT, or parts over several connections (`lanes`); an upload in parts that broke off, even with the
               process that sent it, goes on from the parts that have arrived
    complete   the server hashes every byte and says that it is stored

Every step outlives an outage of a minute: calls of the API may be repeated (completing carries an idempotency key),
and a PUT is sent again, with another URL where the old one may have expired. An error that names a broken connection
or a 5xx says that nobody knows whether the artifact is stored; every other one that it is not.
"""

from __future__ import annotations

import random
import time

from aether.client import parts
from aether.client.lanes import Lanes, Urls
from aether.client.upload import SourceFile
from aether.model.errors import (
    AetherError,
    ClientError,
    Conflict,
    DigestMismatch,
    LocalIOError,
    NetworkError,
    NotFound,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TypeVar

    from aether.client.api import Api
    from aether.client.parts import Life, Piece
    from aether.client.wire import Completed, MultipartBegun, Presigned

    Answer = TypeVar("Answer")

ROUNDS = 3
"""An upload that the server has given up is begun again so often."""


class Announced:
    """The artifact. Digests are lower-case hex SHA-256; `signature` is 128 hex characters."""

    __slots__ = ("app", "content_digest", "digest", "runtime", "signature", "size_bytes")

    def __init__(
        self,
        app: str,
        digest: str,
        size_bytes: int,
        *,
        content_digest: str | None = None,
        runtime: str | None = None,
        signature: str | None = None,
    ) -> None:
        self.app = app
        self.digest = digest
        self.size_bytes = size_bytes
        self.content_digest = content_digest
        self.runtime = runtime
        self.signature = signature

    def described(self) -> dict[str, Any]:
        """What presign and init are told."""
        return {
            "digest": self.digest,
            "size_bytes": self.size_bytes,
            "content_digest": self.content_digest,
            "runtime": self.runtime,
        }


class Watch:
    """Told how an upload goes, partly from other threads; one call at a time."""

    def advance(self, done: int, total: int) -> None:
        """`done` of `total` bytes have left, or were there before. It may fall back when a part is sent again."""

    def resumed(self, arrived: int, count: int) -> None:
        """So many of the parts had arrived before."""

    def trouble(self, error: AetherError) -> None:
        """This went wrong; it is being tried again."""


class Sent:
    """`bytes_sent` went over the wire and arrived, in this run; `completed` is None when there was nothing to say."""

    __slots__ = ("bytes_sent", "completed")

    def __init__(self, bytes_sent: int, completed: Completed | None) -> None:
        self.bytes_sent = bytes_sent
        self.completed = completed


def transfer(api: Api, artifact: Announced, path: str, watch: Watch) -> Sent:
    """Returns when the registry has the artifact. Raises NetworkError, LocalIOError, or what the server says."""
    with SourceFile(path) as source:
        if source.size != artifact.size_bytes:
            raise LocalIOError(f"{path} has {source.size} bytes, not {artifact.size_bytes}: it has changed")
        one = _Transfer(api, artifact, source, watch)
        for left in reversed(range(ROUNDS)):
            try:
                return one.run()
            except (NotFound, Conflict, DigestMismatch) as error:
                # gone: it expired, or somebody gave it up. A digest that is wrong is no news unless parts of an
                # earlier run, which nobody could check, were in it.
                if not left or (isinstance(error, DigestMismatch) and not one.relied_on_others):
                    raise
                if not isinstance(error, DigestMismatch) and not one.is_under_way:
                    raise
                watch.trouble(error)
    raise AssertionError("unreachable")


class _Transfer:
    def __init__(self, api: Api, artifact: Announced, source: SourceFile, watch: Watch) -> None:
        self._api = api
        self._artifact = artifact
        self._source = source
        self._watch = watch
        self._sent = 0
        self.relied_on_others = False
        """Parts that arrived before this run are in it."""
        self.is_under_way = False
        """The server knows the upload, or did."""

    def run(self) -> Sent:
        self.relied_on_others = self.is_under_way = False
        made, life = self._presign()
        if made["method"] == "NONE":
            return Sent(self._sent, self._sign_only())
        threshold = made["multipart"]["threshold_bytes"] if "multipart" in made else 0
        if 0 < threshold <= self._artifact.size_bytes:
            return self._in_parts()
        return self._in_one_piece(made, life)

    # --- one piece

    def _in_one_piece(self, made: Presigned, life: Life) -> Sent:
        began = time.monotonic()
        patience, on_this_url = parts.Patience(), 0
        while True:
            url, upload_id = made["url"], made["upload_id"]
            if url is None or upload_id is None:
                return Sent(self._sent, self._sign_only())  # somebody else was faster
            self.is_under_way = True
            body = self._source.part(0, self._artifact.size_bytes, self._advance)
            try:
                self._api.transport.put(url, body, headers=made["headers"])
                break
            except AetherError as error:
                step = self._step(patience, error, life)
                on_this_url += 1
                # a server that refuses early may be cut off before its reason has come
                if step != parts.AGAIN or on_this_url >= parts.MAX_REFUSALS or not life.is_young(time.monotonic()):
                    (made, life), on_this_url = self._presign(), 0
        self._sent += self._artifact.size_bytes
        self._advance(self._artifact.size_bytes)
        return self._completed(upload_id, began, None)

    # --- parts

    def _in_parts(self) -> Sent:
        began = time.monotonic()
        begun = self._init()
        upload_id = begun["upload_id"]
        if upload_id is None:
            return Sent(self._sent, self._sign_only())
        self.is_under_way = True
        every = parts.pieces(self._artifact.size_bytes, begun["part_size_bytes"])
        there, unsure = parts.kept(every, begun["parts"], self._md5)
        if unsure:
            first = min((piece for piece in every if piece.number not in there), key=lambda p: p.number in unsure)
            fresh = self._send(upload_id, [first], 0)
            names_by_md5 = parts.bare(fresh[first.number]) == self._md5(first)
            there = {**there, **({} if names_by_md5 else unsure), **fresh}
        else:
            fresh = {}
        before = [piece for piece in every if piece.number in there]
        if len(before) > len(fresh):
            self.relied_on_others = True
            self._watch.resumed(len(before) - len(fresh), len(every))
        size = sum(piece.size for piece in before)
        self._advance(size)
        todo = [piece for piece in every if piece.number not in there]
        etags = {**there, **self._send(upload_id, todo, size)}
        return self._completed(upload_id, began, [(piece.number, etags[piece.number]) for piece in every])

    def _md5(self, piece: Piece) -> str:
        return self._source.md5(piece.offset, piece.size)

    def _send(self, upload_id: str, todo: list[Piece], before: int) -> dict[int, str]:
        if not todo:
            return {}
        app = self._artifact.app
        lanes = Lanes(
            self._api.transport,
            self._source,
            todo,
            Urls([piece.number for piece in todo], lambda numbers: self._api.presign_parts(app, upload_id, numbers)),
            on_sent=lambda sent: self._advance(before + sent),
            on_trouble=self._watch.trouble,
        )
        try:
            lanes.run()
        finally:
            self._sent += sum(piece.size for piece in todo if piece.number in lanes.etags)
        return lanes.etags

    # --- calls of the API, each until it is answered

    def _presign(self) -> tuple[Presigned, Life]:
        def presign() -> tuple[Presigned, Life]:
            asked = time.monotonic()
            made = self._api.presign(self._artifact.app, **self._artifact.described())
            return made, parts.Life(asked, made.get("expires_in_secs"))

        return self._patiently(presign)

    def _init(self) -> MultipartBegun:
        return self._patiently(lambda: self._api.init_multipart(self._artifact.app, **self._artifact.described()))

    def _completed(self, upload_id: str, began: float, named: list[tuple[int, str]] | None) -> Sent:
        took_ms = round((time.monotonic() - began) * 1000)

        def complete() -> Completed:
            return self._api.complete(
                self._artifact.app,
                **self._artifact.described(),
                upload_id=upload_id,
                signature=self._artifact.signature,
                put_duration_ms=took_ms,
                idempotency_key=upload_id,
                parts=named,
            )

        return Sent(self._sent, self._patiently(complete))

    def _sign_only(self) -> Completed | None:
        """The artifact is there; a signature may be news."""
        artifact = self._artifact
        if artifact.signature is None:
            return None
        return self._patiently(
            lambda: self._api.complete(artifact.app, **artifact.described(), signature=artifact.signature)
        )

    def _patiently(self, call: Callable[[], Answer]) -> Answer:
        patience = parts.Patience()
        while True:
            try:
                return call()
            except AetherError as error:
                if parts.step_after(error) != parts.AGAIN:
                    raise
                self._step(patience, error)

    def _step(self, patience: parts.Patience, error: AetherError, life: Life | None = None) -> str:
        """What to do, after a pause. Raises `error` when that is nothing."""
        step = patience.step(error, time.monotonic(), life)
        if step == parts.FAIL:
            raise error
        self._watch.trouble(error)
        time.sleep(parts.pause_before(patience.attempts + 1, random.random()))
        return step

    def _advance(self, done: int) -> None:
        self._watch.advance(done, self._artifact.size_bytes)


def unsure(error: AetherError) -> bool:
    """Whether nobody knows if the artifact is stored: the server may finish what it has begun."""
    return isinstance(error, NetworkError) or (error.status >= 500 and not isinstance(error, ClientError))
