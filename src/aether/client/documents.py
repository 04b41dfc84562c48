"""Sends the documents of an artifact, each over a connection of its own: the server reads and judges every one."""

from __future__ import annotations

import threading

from aether.client.api import Api
from aether.model.errors import AetherError, Unauthorized

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

_END_S = 5.0
"""How long an interrupted command waits for its threads."""


def send_documents(api: Api, app: str, digest: str, documents: Mapping[str, bytes]) -> dict[str, AetherError | None]:
    """Store `documents` by kind (manifest, sbom, provenance); returns why each was refused, None for taken."""
    senders = [_Sender(api, app, digest, kind, document) for kind, document in documents.items()]
    for sender in senders:
        sender.start()
    try:
        for sender in senders:
            sender.join()
    except BaseException:
        for sender in senders:
            sender.cut()
        for sender in senders:
            sender.join(_END_S)
        raise
    for sender in senders:
        if isinstance(sender.failure, Unauthorized):
            # the token ran out just now: the caller's own connection knows how to get another
            sender.send(api)
    for sender in senders:
        if sender.broken is not None:
            raise sender.broken
    return {sender.kind: sender.failure for sender in senders}


class _Sender(threading.Thread):
    def __init__(self, api: Api, app: str, digest: str, kind: str, document: bytes) -> None:
        super().__init__(name=f"document-{kind}", daemon=True)
        self._app, self._digest, self._document = app, digest, document
        self._transport = api.transport.sibling()
        self._transport.token = api.transport.token
        self.kind = kind
        self.failure: AetherError | None = None
        self.broken: BaseException | None = None

    def run(self) -> None:
        with self._transport:
            self.send(Api(self._transport))

    def send(self, api: Api) -> None:
        self.failure = None
        try:
            api.put_document(self._app, self._digest, self.kind, self._document)
        except AetherError as error:
            self.failure = error
        except BaseException as error:  # noqa: BLE001 - it belongs to whoever waits
            self.broken = error

    def cut(self) -> None:
        """Break off what is being sent."""
        self._transport.cut()
