"""The API as Python calls: one method for each route, errors as exceptions of `aether.model.errors`."""

from __future__ import annotations

import os
from urllib.parse import quote

from aether.client.transport import Transport
from aether.model.errors import NotFound

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from typing import Any, TypeVar

    from aether.client.transport import OnEvent
    from aether.client.wire import (
        App,
        ArtifactMeta,
        Completed,
        Config,
        ConfigChange,
        Deployment,
        DeploymentEvent,
        Health,
        Identity,
        Login,
        LogLine,
        MachineToken,
        Page,
        Presigned,
        Release,
        Team,
        User,
    )

    Item = TypeVar("Item")

VERIFY_TIMEOUT_S = 900.0
"""The server hashes every byte of an artifact before it answers."""


def connect(environ: Mapping[str, str] = os.environ, *, on_event: OnEvent | None = None) -> Api:
    """The API that the environment, the session and config.toml point at. Raises ConfigError."""
    from aether.client.session import endpoint

    found = endpoint(environ)

    def renew(refused: str) -> str | None:
        from aether.client.renewal import renewal

        return renewal(environ, found.api_base, on_event=on_event)(refused)

    is_session = found.token_from == "session"
    return Api(Transport(found.api_base, found.token, on_event=on_event, renew=renew if is_session else None))


def pages(fetch: Callable[[str | None], Page[Item]]) -> Iterator[Item]:
    """Every item of a paged list; `fetch` gets the cursor of the next page."""
    cursor: str | None = None
    while True:
        page = fetch(cursor)
        yield from page["items"]
        cursor = page["next_cursor"]
        if not cursor:
            return


class Api:
    """A server's API over `transport`. Every method raises NetworkError or the error that the server names."""

    def __init__(self, transport: Transport) -> None:
        self.transport = transport

    def close(self) -> None:
        self.transport.close()

    def __enter__(self) -> Api:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def base(self) -> str:
        return self.transport.base

    def _get(self, path: str, **query: str | int | None) -> Any:
        return self.transport.request("GET", path, query=query).json()

    def _send(self, method: str, path: str, content: object, **options: Any) -> Any:
        return self.transport.request(method, path, content=content, **options).json()

    # --- who am I -----------------------------------------------------------------------------------

    def login(self, token: str) -> Login:
        """Exchange a static token for a session token."""
        return self._send("POST", "/auth/login", {"token": token})

    def login_with_password(self, username: str, password: str) -> Login:
        """Open a session for a user."""
        return self._send("POST", "/auth/login", {"username": username, "password": password})

    def refresh(self, refresh_token: str, following: str) -> Login:
        """New tokens for a refresh token; with the same `following` it may be repeated until that is used."""
        content = {"refresh_token": refresh_token, "next": following}
        return self._send("POST", "/auth/refresh", content, repeatable=True)

    def logout(self) -> None:
        """End the session whose access token this transport carries."""
        self.transport.request("POST", "/auth/logout")

    def whoami(self) -> Identity:
        return self._get("/auth/whoami")

    def alive(self, timeout_s: float = 10.0) -> None:
        """Raises NetworkError unless a server answers."""
        self.transport.request("GET", "/healthz", timeout_s=timeout_s)

    def ready(self, timeout_s: float = 5.0) -> dict[str, Any]:
        """What /readyz says; raises ServiceUnavailable when a dependency is missing."""
        return self.transport.request("GET", "/readyz", timeout_s=timeout_s).json()

    # --- users, teams, tokens -----------------------------------------------------------------------

    def create_user(self, name: str, role: str, password: str | None, email: str | None) -> User:
        content = {"name": name, "role": role, "password": password, "email": email}
        return self._send("POST", "/users", {key: value for key, value in content.items() if value is not None})

    def users(self, *, limit: int | None = None, cursor: str | None = None) -> Page[User]:
        return self._get("/users", limit=limit, cursor=cursor)

    def change_user(self, name: str, **change: str | bool) -> User:
        """`change` has role, disabled, password, current_password."""
        return self._send("PATCH", f"/users/{quote(name, safe='')}", change)

    def create_team(self, name: str) -> Team:
        return self._send("POST", "/teams", {"name": name})

    def teams(self, *, limit: int | None = None, cursor: str | None = None) -> Page[Team]:
        return self._get("/teams", limit=limit, cursor=cursor)

    def add_member(self, team: str, user: str) -> Team:
        return self.transport.request("PUT", _member(team, user)).json()

    def remove_member(self, team: str, user: str) -> None:
        self.transport.request("DELETE", _member(team, user))

    def create_token(
        self, name: str, *, user: str | None, role: str | None, apps: Sequence[str] | None, expires_in_secs: int
    ) -> MachineToken:
        content = {"name": name, "user": user, "role": role, "apps": apps, "expires_in_secs": expires_in_secs}
        return self._send("POST", "/tokens", {key: value for key, value in content.items() if value is not None})

    def tokens(
        self, *, user: str | None = None, limit: int | None = None, cursor: str | None = None
    ) -> Page[MachineToken]:
        return self._get("/tokens", user=user, limit=limit, cursor=cursor)

    def revoke_token(self, token_id: str) -> None:
        self.transport.request("DELETE", f"/tokens/{quote(token_id, safe='')}")

    # --- apps ---------------------------------------------------------------------------------------

    def create_app(self, name: str, team: str | None = None) -> App:
        """Owned by `team`, or by the caller itself."""
        return self._send("POST", "/apps", {"name": name} if team is None else {"name": name, "team": team})

    def apps(self, *, q: str | None = None, limit: int | None = None, cursor: str | None = None) -> Page[App]:
        return self._get("/apps", q=q, limit=limit, cursor=cursor)

    def app(self, name: str) -> App:
        return self._get(_app(name))

    def has_app(self, name: str) -> bool:
        try:
            self.app(name)
        except NotFound:
            return False
        return True

    def delete_app(self, name: str) -> None:
        self.transport.request("DELETE", _app(name), timeout_s=120)

    def app_deployments(self, name: str, *, limit: int | None = None, cursor: str | None = None) -> Page[Deployment]:
        return self._get(f"{_app(name)}/deployments", limit=limit, cursor=cursor)

    def releases(self, name: str, *, limit: int | None = None, cursor: str | None = None) -> Page[Release]:
        """Releases of an app, newest first."""
        return self._get(f"{_app(name)}/releases", limit=limit, cursor=cursor)

    def rollback(
        self,
        name: str,
        *,
        digest: str | None = None,
        version: int | None = None,
        deployment_id: str | None = None,
        idempotency_key: str | None = None,
    ) -> Deployment:
        """Deploy an earlier release again; the one before the active one when nothing is named."""
        named = {"digest": digest, "version": version, "deployment_id": deployment_id}
        content = {key: value for key, value in named.items() if value is not None}
        return self._send("POST", f"{_app(name)}/rollback", content, **_key(idempotency_key))

    def scale(self, name: str, sizes: Mapping[str, int]) -> App:
        """Have so many instances of each process type run; answers before they do."""
        return self._send("POST", f"{_app(name)}/scale", dict(sizes), repeatable=True)

    def config(self, name: str) -> Config:
        return self._get(f"{_app(name)}/config")

    def change_config(
        self,
        name: str,
        *,
        set_: Mapping[str, str] | None = None,
        unset: Sequence[str] = (),
        replace: bool = False,
    ) -> ConfigChange:
        content = {"set": dict(set_ or {}), "unset": list(unset), "replace": replace}
        # not repeated: the second answer would not name the deployment that the first one began
        return self._send("PUT", f"{_app(name)}/config", content, repeatable=False)

    def log(
        self,
        name: str,
        *,
        tail: int | None = 100,
        since: str | None = None,
        follow: bool = False,
        on_state: Callable[[str], None] | None = None,
    ) -> Iterator[list[LogLine]]:
        """Batches of log lines; see `aether.client.follow.follow_log`."""
        from aether.client.follow import follow_log

        return follow_log(
            self.transport, quote(name, safe=""), tail=tail, since=since, follow=follow, on_state=on_state
        )

    # --- deployments --------------------------------------------------------------------------------

    def create_deployment(
        self,
        app: str,
        *,
        digest: str,
        runtime: str,
        command: str,
        env: Mapping[str, str] | None = None,
        health: Health | None = None,
        strategy: str = "rolling",
        timeout_secs: int = 120,
        rollout: Mapping[str, Any] | None = None,
        description: str | None = None,
        idempotency_key: str | None = None,
    ) -> tuple[Deployment, bool]:
        """Start a rollout; the second value is False when it repeats one that is active or under way."""
        content: dict[str, object] = {
            "app": app,
            "digest": digest,
            "runtime": runtime,
            "command": command,
            "env": dict(env or {}),
            "strategy": strategy,
            "timeout_secs": timeout_secs,
        }
        if health is not None:
            content["health"] = health
        if rollout:
            content["rollout"] = dict(rollout)
        if description is not None:
            content["description"] = description
        reply = self.transport.request("POST", "/deployments", content=content, **_key(idempotency_key))
        return reply.json(), reply.status == 201

    def deployments(
        self,
        *,
        app: str | None = None,
        status: str | None = None,
        limit: int | None = None,
        cursor: str | None = None,
    ) -> Page[Deployment]:
        return self._get("/deployments", app=app, status=status, limit=limit, cursor=cursor)

    def deployment(self, deployment_id: str) -> Deployment:
        return self._get(_deployment(deployment_id))

    def cancel_deployment(self, deployment_id: str) -> Deployment:
        """Ask for the end of a rollout; raises Conflict when it has settled."""
        return self._send("PATCH", _deployment(deployment_id), {"status": "cancelled"})

    def watch_deployment(
        self,
        deployment_id: str,
        on_event: Callable[[DeploymentEvent], None],
        *,
        deadline: float | None = None,
        on_state: Callable[[str], None] | None = None,
    ) -> Deployment:
        """Wait until a deployment has settled; see `aether.client.follow.watch_deployment`."""
        from aether.client.follow import watch_deployment

        return watch_deployment(
            self.transport, quote(deployment_id, safe=""), on_event, deadline=deadline, on_state=on_state
        )

    # --- artifacts ----------------------------------------------------------------------------------

    def presign(
        self, app: str, *, digest: str, size_bytes: int, content_digest: str | None = None, runtime: str | None = None
    ) -> Presigned:
        """Where to PUT an artifact; method NONE when the registry has it."""
        content = _artifact(app, digest, size_bytes, content_digest, runtime)
        return self._send("POST", "/artifacts/presign", content)

    def upload(self, presigned: Presigned, path: str, progress: Callable[[int], None] | None = None) -> int:
        """PUT the file `path` where `presigned` says; returns the bytes sent."""
        url = presigned["url"]
        if url is None:
            return 0
        return self.transport.put_file(url, path, headers=presigned["headers"], progress=progress)

    def complete(
        self,
        app: str,
        *,
        digest: str,
        upload_id: str,
        size_bytes: int,
        content_digest: str | None = None,
        runtime: str | None = None,
        put_duration_ms: int | None = None,
        idempotency_key: str | None = None,
    ) -> Completed:
        """Have the server verify an uploaded artifact and keep it. Raises DigestMismatch."""
        content = {**_artifact(app, digest, size_bytes, content_digest, runtime), "upload_id": upload_id}
        if put_duration_ms is not None:
            content["put_duration_ms"] = put_duration_ms
        if idempotency_key is not None:
            content["idempotency_key"] = idempotency_key
        return self._send(
            "POST",
            "/artifacts/complete",
            content,
            repeatable=idempotency_key is not None,
            timeout_s=VERIFY_TIMEOUT_S,
        )

    def has_artifact(self, digest: str) -> bool:
        try:
            self.transport.request("HEAD", f"/artifacts/{quote(digest, safe='')}")
        except NotFound:
            return False
        return True

    def artifact(self, digest: str) -> ArtifactMeta:
        return self._get(f"/artifacts/{quote(digest, safe='')}/meta")

    def artifacts(
        self, *, app: str | None = None, limit: int | None = None, cursor: str | None = None
    ) -> Page[ArtifactMeta]:
        return self._get("/artifacts", app=app, limit=limit, cursor=cursor)

    def download(self, digest: str) -> bytes:
        """The bytes of a small artifact, over the server's redirect to its store."""
        return self.transport.request("GET", f"/artifacts/{quote(digest, safe='')}/download", timeout_s=300).body


def new_key() -> str:
    """An idempotency key of its own for one intent of a user."""
    return os.urandom(16).hex()


def _app(name: str) -> str:
    return f"/apps/{quote(name, safe='')}"


def _member(team: str, user: str) -> str:
    return f"/teams/{quote(team, safe='')}/members/{quote(user, safe='')}"


def _deployment(deployment_id: str) -> str:
    return f"/deployments/{quote(deployment_id, safe='')}"


def _artifact(
    app: str, digest: str, size_bytes: int, content_digest: str | None, runtime: str | None
) -> dict[str, object]:
    content: dict[str, object] = {"app": app, "digest": digest, "size_bytes": size_bytes}
    if content_digest is not None:
        content["content_digest"] = content_digest
    if runtime is not None:
        content["runtime"] = runtime
    return content


def _key(idempotency_key: str | None) -> dict[str, Any]:
    """A call with an idempotency key may be repeated after a broken connection."""
    if idempotency_key is None:
        return {}
    return {"headers": {"Idempotency-Key": idempotency_key}, "repeatable": True}
