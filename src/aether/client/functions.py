"""Functions as Python calls: one method for each of their routes, and calling a function itself."""

from __future__ import annotations

import json
from urllib.parse import quote, urlencode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from aether.client.function_wire import Function, FunctionLogLine, FunctionVersion, Invocation, Runtime
    from aether.client.transport import Body, Stream, Transport
    from aether.client.wire import Page

_BASE = "/api/functions"
_IN_PATH = "/?&=%:@!$'()*+,;~[]"
"""What somebody may have written into a path as it is."""
CODE_TIMEOUT_S = 600.0
"""The server unpacks and judges the code before it answers."""
DELETE_TIMEOUT_S = 300.0
"""It answers when the last instance has ended."""


class Functions:
    """The functions of a server over `transport`. Every method raises NetworkError or the error that the server
    names."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def create(self, values: Mapping[str, Any], team: str | None = None) -> Function:
        """`values` has name, runtime, entrypoint and what else is not to be the default."""
        content = dict(values) if team is None else {**values, "team": team}
        return self._transport.request("POST", _BASE, content=content).json()

    def page(self, *, q: str | None = None, limit: int | None = None, cursor: str | None = None) -> Page[Function]:
        return self._get(_BASE, q=q, limit=limit, cursor=cursor)

    def get(self, name: str) -> Function:
        """`name` may be an id, here and everywhere."""
        return self._get(_path(name))

    def update(self, name: str, values: Mapping[str, Any]) -> Function:
        """Change the fields that `values` names."""
        return self._transport.request("PUT", _path(name), content=dict(values)).json()

    def transfer(self, name: str, owner: str) -> Function:
        """Give it to a user or a team."""
        return self._transport.request("PATCH", _path(name), content={"owner": owner}).json()

    def delete(self, name: str) -> None:
        """Returns when nothing of it is left."""
        self._transport.request("DELETE", _path(name), timeout_s=DELETE_TIMEOUT_S)

    def put_archive(
        self, name: str, body: Body, *, entrypoint: str | None = None, runtime: str | None = None
    ) -> Function:
        """Give it the zip or tar.gz archive that `body` reads, and with it another entrypoint or runtime."""
        given = {"entrypoint": entrypoint, "runtime": runtime}
        query = urlencode({key: value for key, value in given.items() if value is not None})
        path = f"{_path(name)}/code" + (f"?{query}" if query else "")
        return self._transport.post(path, body, "application/octet-stream", CODE_TIMEOUT_S).json()

    def put_artifact(
        self, name: str, digest: str, *, app: str | None = None, values: Mapping[str, Any] | None = None
    ) -> Function:
        """Give it an artifact of `app` as code and change `values` of its fields, as one version."""
        content: dict[str, object] = {"artifact": digest}
        if app is not None:
            content["app"] = app
        if values:
            content["fields"] = dict(values)
        return self._transport.request(
            "POST", f"{_path(name)}/code", content=content, repeatable=True, timeout_s=CODE_TIMEOUT_S
        ).json()

    def versions(
        self, name: str, *, limit: int | None = None, cursor: str | None = None
    ) -> Page[FunctionVersion]:  # fmt: skip
        return self._get(f"{_path(name)}/versions", limit=limit, cursor=cursor)

    def rollback(self, name: str, version: int | None = None) -> Function:
        """Make it what it was in a version; in the one before the current one when none is named."""
        content = {} if version is None else {"version": version}
        return self._transport.request("POST", f"{_path(name)}/rollback", content=content).json()

    def warm(self, name: str) -> Function:
        """Have an instance started if there is none; answers before it serves."""
        return self._transport.request("POST", f"{_path(name)}/warm", repeatable=True).json()

    def invocations(
        self, name: str, *, limit: int | None = None, cursor: str | None = None
    ) -> Page[Invocation]:  # fmt: skip
        return self._get(f"{_path(name)}/invocations", limit=limit, cursor=cursor)

    def logs(self, name: str, tail: int) -> list[FunctionLogLine]:
        reply = self._transport.request("GET", f"{_path(name)}/logs", query={"tail": tail})
        return [json.loads(line) for line in reply.body.splitlines()]

    def runtimes(self) -> list[Runtime]:
        return self._get(f"{_BASE}/runtimes")["items"]

    def add_runtime(self, name: str, init: Sequence[str], body: Body) -> Runtime:
        """Register the squashfs image that `body` reads; `init` is the command that is put before entrypoints."""
        query = urlencode([("name", name), *(("init", word) for word in init)])
        path = f"{_BASE}/runtimes?{query}"
        return self._transport.post(path, body, "application/octet-stream", CODE_TIMEOUT_S).json()

    def remove_runtime(self, name: str) -> None:
        self._transport.request("DELETE", f"{_BASE}/runtimes/{quote(name, safe='')}")

    def call(
        self,
        name: str,
        path: str,
        *,
        method: str = "GET",
        headers: Mapping[str, str] | None = None,
        body: bytes | None = None,
        timeout_s: float = 900.0,
    ) -> Stream:
        """Call the function; the answer is its own, whatever its status. The token of the API is not shown to it."""
        there = self._transport.sibling()
        given = {name.lower() for name in headers or ()}
        fields = {**({} if "accept" in given else {"Accept": "*/*"}), **(headers or {})}
        target = f"/functions/{quote(name, safe='')}/{quote(path.lstrip('/'), safe=_IN_PATH)}"
        return there.open(method, target, headers=fields, body=body, timeout_s=timeout_s)

    def _get(self, path: str, **query: str | int | None) -> Any:
        return self._transport.request("GET", path, query=query).json()


def _path(name: str) -> str:
    return f"{_BASE}/{quote(name, safe='')}"
