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

    from aether.client.functions import Functions
    from aether.client.transport import OnEvent
    from aether.client.wire import (
        App,
        ArtifactMeta,
        AuditEntry,
        Collected,
        Completed,
        Config,
        ConfigChange,
        Deployment,
        DeploymentEvent,
        Device,
        Health,
        Host,
        HostCertificate,
        Identity,
        Login,
        LogLine,
        MachineToken,
        MultipartBegun,
        Page,
        PartUrl,
        Presigned,
        PublicKey,
        Release,
        Run,
        Team,
        User,
        VariableChange,
        Volume,
    )

    Item = TypeVar("Item")

DOCUMENT_TIMEOUT_S = 120.0
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
    renewing = renew if is_session else None
    return Api(Transport(found.api_base, found.token, on_event=on_event, renew=renewing, ca_file=found.ca_file))


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
    def functions(self) -> Functions:
        from aether.client.functions import Functions

        return Functions(self.transport)

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

    def begin_device(self, client: str) -> Device:
        """Begin a login that somebody approves elsewhere; the answer holds the device's own secret."""
        return self._send("POST", "/auth/device", {"client": client})

    def redeem_device(self, device_code: str, wait_s: float) -> Login | None:
        """The session once somebody let the device in; None when nobody has decided within `wait_s` (25 at most)."""
        content = {"device_code": device_code, "wait_secs": wait_s}
        answer = self.transport.request("POST", "/auth/device/token", content=content, timeout_s=wait_s + 15)
        return None if answer.status == 202 else answer.json()

    def device(self, user_code: str) -> Device:
        """What waits with this code."""
        return self._get(f"/auth/device/{quote(user_code, safe='')}")

    def decide_device(self, user_code: str, *, approve: bool) -> Device:
        """Let it in with the caller's own rights, or turn it away."""
        return self._send("POST", f"/auth/device/{quote(user_code, safe='')}", {"approve": approve})

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

    def delete_team(self, team: str) -> None:
        self.transport.request("DELETE", f"/teams/{quote(team, safe='')}")

    def audit(
        self,
        *,
        actor: str | None = None,
        since: str | None = None,
        limit: int | None = None,
        cursor: str | None = None,
    ) -> Page[AuditEntry]:
        """What was changed or tried, newest first."""
        return self._get("/audit", actor=actor, since=since, limit=limit, cursor=cursor)

    def collect_garbage(self, *, dry_run: bool) -> Collected:
        """Take away what nobody needs any more, or say what that would be."""
        return self._send("POST", "/gc", {"dry_run": dry_run})

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

    def transfer_app(self, name: str, owner: str) -> App:
        """Give the app to a user or a team."""
        return self._send("PATCH", _app(name), {"owner": owner})

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
        secrets: Mapping[str, str] | None = None,
        unset: Sequence[str] = (),
        replace: bool = False,
    ) -> ConfigChange:
        content: dict[str, object] = {"set": dict(set_ or {}), "unset": list(unset), "replace": replace}
        if secrets:
            content["secrets"] = dict(secrets)
        # not repeated: the second answer would not name the deployment that the first one began
        return self._send("PUT", f"{_app(name)}/config", content, repeatable=False)

    def changed_variables(self, name: str, a: str, b: str) -> list[VariableChange]:
        """Which variables differ between the deployments `a` and `b`."""
        return self._get(f"{_app(name)}/config/changes", a=a, b=b)["items"]

    def log(
        self,
        name: str,
        *,
        tail: int | None = 100,
        since: str | None = None,
        follow: bool = False,
        process: str | None = None,
        on_state: Callable[[str], None] | None = None,
    ) -> Iterator[list[tuple[bytes, LogLine]]]:
        """Batches of log lines; see `aether.client.follow.follow_log`."""
        from aether.client.follow import follow_log

        return follow_log(
            self.transport,
            quote(name, safe=""),
            tail=tail,
            since=since,
            follow=follow,
            process=process,
            on_state=on_state,
        )

    # --- custom hosts -------------------------------------------------------------------------------

    def add_host(
        self,
        app: str,
        host: str,
        *,
        redirect_to: str | None = None,
        allow_http: bool = False,
        hsts_secs: int = 0,
        verified_by_admin: bool = False,
    ) -> Host:
        """Claim a host for an app; pending until it is proven."""
        content: dict[str, object] = {"host": host, "allow_http": allow_http, "hsts_secs": hsts_secs}
        if redirect_to is not None:
            content["redirect_to"] = redirect_to
        if verified_by_admin:
            content["verified_by_admin"] = True
        return self._send("POST", f"{_app(app)}/hosts", content, repeatable=True, timeout_s=90)

    def hosts(self, app: str, *, limit: int | None = None, cursor: str | None = None) -> Page[Host]:
        return self._get(f"{_app(app)}/hosts", limit=limit, cursor=cursor)

    def verify_host(self, app: str, host: str) -> Host:
        """Look for the proof of a pending host."""
        path = f"{_app(app)}/hosts/{quote(host, safe='')}/verify"
        return self.transport.request("POST", path, repeatable=True, timeout_s=90).json()

    def give_certificate(self, app: str, host: str, chain: str, key: str) -> HostCertificate:
        """Have a host show this certificate."""
        path = f"{_app(app)}/hosts/{quote(host, safe='')}/certificate"
        return self._send("PUT", path, {"chain": chain, "key": key})

    def withdraw_certificate(self, app: str, host: str) -> None:
        self.transport.request("DELETE", f"{_app(app)}/hosts/{quote(host, safe='')}/certificate")

    def remove_host(self, app: str, host: str) -> None:
        self.transport.request("DELETE", f"{_app(app)}/hosts/{quote(host, safe='')}")

    # --- public keys --------------------------------------------------------------------------------

    def public_keys(self, app: str) -> list[PublicKey]:
        """The keys of an app, deactivated ones too."""
        return self._get(f"{_app(app)}/public-keys")["items"]

    def add_public_key(
        self, app: str, public_key_hex: str, *, authorization: Mapping[str, str] | None = None
    ) -> PublicKey:
        """Let a key in; `authorization` has public_key_hex and signature_hex of an active key of the app."""
        content: dict[str, object] = {"public_key_hex": public_key_hex}
        if authorization is not None:
            content["authorization"] = dict(authorization)
        return self._send("POST", f"{_app(app)}/public-keys", content, repeatable=True)

    def deactivate_public_key(self, app: str, key_id: str) -> None:
        """Nothing that the key signed counts any more."""
        self.transport.request("DELETE", f"{_app(app)}/public-keys/{quote(key_id, safe='')}", repeatable=True)

    # --- runs and volumes ---------------------------------------------------------------------------

    def start_run(
        self, app: str, *, command: str, env: Mapping[str, str], console: str, timeout_secs: int, release: int | None
    ) -> Run:
        """Run a command; with a console it waits a little for `attach_to_run`."""
        content: dict[str, object] = {"command": command, "env": dict(env), "timeout_secs": timeout_secs}
        content["console"] = console
        if release is not None:
            content["release"] = release
        return self._send("POST", f"{_app(app)}/runs", content, timeout_s=120)

    def attach_to_run(self, app: str, run_id: str, *, terminal: bool) -> dict[str, Any]:
        """Join this process's standard streams to a run until it has ended; see `aether.client.attach`."""
        from aether.client.attach import attach

        path = f"{_app(app)}/runs/{quote(run_id, safe='')}/attach"
        return attach(self.transport, path, terminal=terminal)

    def runs(self, app: str, *, limit: int | None = None, cursor: str | None = None) -> Page[Run]:
        return self._get(f"{_app(app)}/runs", limit=limit, cursor=cursor)

    def stop_run(self, app: str, run_id: str) -> Run:
        """End a run; returns when it has ended. Raises Conflict when it had before."""
        return self._send("POST", f"{_app(app)}/runs/{quote(run_id, safe='')}/stop", {}, timeout_s=120)

    def volumes(self, app: str) -> list[Volume]:
        return self.transport.request("GET", f"{_app(app)}/volumes", timeout_s=180).json()["items"]

    def delete_volume(self, app: str, name: str) -> None:
        self.transport.request("DELETE", f"{_app(app)}/volumes/{quote(name, safe='')}", timeout_s=120)

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
        processes: Mapping[str, Any] | None = None,
        release_command: Mapping[str, Any] | None = None,
        volumes: Sequence[Mapping[str, str]] = (),
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
        if processes:
            content["processes"] = dict(processes)
        if release_command:
            content["release_command"] = dict(release_command)
        if volumes:
            content["volumes"] = [dict(volume) for volume in volumes]
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
        return self._send("POST", "/artifacts/presign", content, repeatable=True)

    def init_multipart(
        self, app: str, *, digest: str, size_bytes: int, content_digest: str | None = None, runtime: str | None = None
    ) -> MultipartBegun:
        """Begin an upload in parts, or take up the one under way; `upload_id` is None when the registry has it."""
        content = _artifact(app, digest, size_bytes, content_digest, runtime)
        return self._send("POST", "/artifacts/multipart/init", content, repeatable=True)

    def presign_parts(self, app: str, upload_id: str, numbers: Sequence[int]) -> list[PartUrl]:
        """Where to PUT these parts; up to 100 at once."""
        content = {"app": app, "upload_id": upload_id, "part_numbers": list(numbers)}
        return self._send("POST", "/artifacts/multipart/presign-part", content, repeatable=True)["parts"]

    def complete(
        self,
        app: str,
        *,
        digest: str,
        size_bytes: int,
        upload_id: str | None = None,
        content_digest: str | None = None,
        runtime: str | None = None,
        signature: str | None = None,
        put_duration_ms: int | None = None,
        idempotency_key: str | None = None,
        parts: Sequence[tuple[int, str]] | None = None,
    ) -> Completed:
        """Have the server verify an upload and keep it; of an upload in parts all of them are named. Without an
        `upload_id` only the signature of a stored artifact is said. Raises DigestMismatch."""
        given = {
            "upload_id": upload_id,
            "signature": signature,
            "put_duration_ms": put_duration_ms,
            "idempotency_key": idempotency_key,
            "parts": parts and [{"part_number": number, "etag": etag} for number, etag in parts],
        }
        return self._send(
            "POST",
            "/artifacts/complete" if parts is None else "/artifacts/multipart/complete",
            {
                **_artifact(app, digest, size_bytes, content_digest, runtime),
                **{name: value for name, value in given.items() if value is not None},
            },
            repeatable=idempotency_key is not None or upload_id is None,
            timeout_s=VERIFY_TIMEOUT_S,
        )

    def has_artifact(self, digest: str) -> bool:
        try:
            self.transport.request("HEAD", f"/artifacts/{quote(digest, safe='')}")
        except NotFound:
            return False
        return True

    def artifact(self, digest: str, app: str | None = None) -> ArtifactMeta:
        return self._get(f"/artifacts/{quote(digest, safe='')}/meta", app=app)

    def artifacts(
        self, *, app: str | None = None, limit: int | None = None, cursor: str | None = None
    ) -> Page[ArtifactMeta]:
        return self._get("/artifacts", app=app, limit=limit, cursor=cursor)

    def put_document(self, app: str, digest: str, kind: str, document: bytes) -> None:
        """Store the manifest, sbom or provenance (`kind`) of an artifact, or replace it. Raises DigestMismatch for
        one about another artifact, NotFound also on servers that keep no such documents."""
        self.transport.request(
            "POST",
            f"/artifacts/{quote(digest, safe='')}/{kind}",
            query={"app": app},
            document=document,
            repeatable=True,
            timeout_s=DOCUMENT_TIMEOUT_S,
        )

    def document(self, digest: str, kind: str, app: str | None = None) -> bytes:
        """The manifest, sbom or provenance of an artifact, as it was stored."""
        path = f"/artifacts/{quote(digest, safe='')}/{kind}"
        return self.transport.request("GET", path, query={"app": app}, timeout_s=DOCUMENT_TIMEOUT_S).body

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
