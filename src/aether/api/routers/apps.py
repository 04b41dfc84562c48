"""Apps, their releases and their configuration."""

from __future__ import annotations

from typing import Annotated

import msgspec
from litestar import delete, get, patch, post, put
from litestar.params import FromPath, JSONBody, QueryParameter

from aether.api import auditing
from aether.api.paging import DEFAULT_LIMIT, Cursor, Limit, Page, decode_cursor, page
from aether.api.services import Caller, Deps, IdempotencyKey
from aether.api.views import App, Deployment, Release, app_view, apps_of, deployment_view, release_view
from aether.apps.configs import Change
from aether.apps.deployments import Author, RollbackTarget
from aether.apps.vault import Variables
from aether.identity.ownership import visible
from aether.identity.roles import Role
from aether.model.errors import Forbidden
from aether.observability import tracing

MASK = "****"
DeploymentA = Annotated[str, QueryParameter(name="a", max_length=36, description="Id of a deployment.")]
DeploymentB = Annotated[str, QueryParameter(name="b", max_length=36, description="Id of another one.")]
Search = Annotated[str, QueryParameter(name="q", max_length=40, description="Part of the name.")]


class NewApp(msgspec.Struct, forbid_unknown_fields=True):
    """1 to 40 of a-z, 0-9 and '-'; starts with a letter. Without a team the app is the caller's own."""

    name: str
    team: str | None = None


class AppChange(msgspec.Struct, forbid_unknown_fields=True):
    """`owner` is a user or a team: an own team of the caller's, or for an admin anybody."""

    owner: str


class Rollback(msgspec.Struct, forbid_unknown_fields=True):
    """At most one is given; none means the release before the active one. A digest may be shortened."""

    digest: str | None = None
    version: int | None = None
    deployment_id: str | None = None


class ConfigView(msgspec.Struct):
    """Values are **** for the role reader; those of `secrets` are for everybody."""

    version: int
    env: dict[str, str]
    secrets: list[str]


class ConfigChange(msgspec.Struct, forbid_unknown_fields=True):
    """Variables to set, to set as secrets (never shown again), and to unset; with `replace` the ones not named are
    unset too. A secret stays one until it is unset."""

    set: dict[str, str] = {}
    secrets: dict[str, str] = {}
    unset: list[str] = []
    replace: bool = False


class ChangedConfig(msgspec.Struct):
    """`changed` are the names whose value is another one now; `deployment_id` is the deployment that brings the
    change to the running app."""

    version: int
    env: dict[str, str]
    secrets: list[str]
    changed: list[str]
    deployment_id: str | None


class VariableChange(msgspec.Struct):
    """`change` is added, removed or changed."""

    name: str
    change: str
    secret: bool


class VariableChanges(msgspec.Struct):
    items: list[VariableChange]


@post("/apps", tags=["apps"])
async def create_app(data: JSONBody[NewApp], services: Deps, caller: Caller) -> App:
    """Create an app; 409 when the name is taken."""
    apps = apps_of(services)
    auditing.about(data.name)
    if caller.apps is not None and data.name not in caller.apps:
        raise Forbidden("this token may only touch " + ", ".join(sorted(caller.apps)))
    owner = await services.identity.accounts.owner_of_new_app(caller, data.team)
    return app_view(await apps.catalogue.create(data.name, owner), apps)


@get("/apps", tags=["apps"])
async def list_apps(
    services: Deps, caller: Caller, q: Search = "", limit: Limit = DEFAULT_LIMIT, cursor: Cursor = None
) -> Page[App]:
    """The caller's apps by name; an admin's are all."""
    apps = apps_of(services)
    keys = decode_cursor(cursor, str)
    rows = await apps.catalogue.list(q=q, after=keys[0] if keys else None, limit=limit, only=visible(caller))
    return page(rows, limit, lambda row: app_view(row, apps), lambda row: (row.name,))


@get("/apps/{app:str}", tags=["apps"])
async def show_app(app: FromPath[str], services: Deps) -> App:
    """One app and what runs of it."""
    apps = apps_of(services)
    return app_view(await apps.catalogue.get(app), apps)


@patch("/apps/{app:str}", tags=["apps"])
async def change_app(app: FromPath[str], data: JSONBody[AppChange], services: Deps, caller: Caller) -> App:
    """Give the app to another owner."""
    apps = apps_of(services)
    auditing.about(f"{app} to {data.owner}")
    owner = await services.identity.accounts.owner_to_be(caller, data.owner)
    changed = await apps.catalogue.transfer(app, owner)
    services.identity.tokens.forget()  # whoever followed it as its owner stops seeing it
    return app_view(changed, apps)


@delete("/apps/{app:str}", tags=["apps"])
async def delete_app(app: FromPath[str], services: Deps) -> None:
    """Stop the app and delete everything it owns; answers when it is gone."""
    await apps_of(services).catalogue.delete(app)


@get("/apps/{app:str}/deployments", tags=["apps"])
async def app_deployments(
    app: FromPath[str], services: Deps, limit: Limit = DEFAULT_LIMIT, cursor: Cursor = None
) -> Page[Deployment]:
    """The app's deployments, newest first."""
    apps = apps_of(services)
    before = decode_cursor(cursor, int, str)
    rows = await apps.deployments.list(app=app, before=before, limit=limit)
    return page(rows, limit, lambda row: deployment_view(row, apps), lambda row: (row.created_at, row.id))


@get("/apps/{app:str}/releases", tags=["apps"])
async def app_releases(
    app: FromPath[str], services: Deps, limit: Limit = DEFAULT_LIMIT, cursor: Cursor = None
) -> Page[Release]:
    """The app's releases, newest first."""
    before = decode_cursor(cursor, int, str)
    rows = await apps_of(services).deployments.list(app=app, before=before, limit=limit, releases_only=True)
    return page(rows, limit, release_view, lambda row: (row.created_at, row.id))


@post("/apps/{app:str}/rollback", tags=["apps"])
async def rollback(
    app: FromPath[str],
    data: JSONBody[Rollback],
    services: Deps,
    caller: Caller,
    idempotency_key: IdempotencyKey = None,
) -> Deployment:
    """Deploy exactly what a past release was: its artifact, its variables, its command. A repeat of the key gives the
    deployment that the first call began."""
    apps = apps_of(services)
    target = RollbackTarget(data.digest, data.version, data.deployment_id)
    author = Author(caller.name, tracing.trace_id.get())
    row = await apps.deployments.rollback(app, target, author, idempotency_key)
    return deployment_view(row, apps)


@post("/apps/{app:str}/scale", status_code=200, tags=["apps"])
async def scale(app: FromPath[str], data: JSONBody[dict[str, int]], services: Deps) -> App:
    """How many instances of each process type run, as in {"web": 3}: 0 (stopped) to 50. Answers at once."""
    apps = apps_of(services)
    return app_view(await apps.catalogue.scale(app, data), apps)


@get("/apps/{app:str}/config", tags=["apps"])
async def show_config(app: FromPath[str], services: Deps, caller: Caller) -> ConfigView:
    """The app's variables."""
    config = await apps_of(services).deployments.config(app)
    secrets = sorted(config.variables.secrets)
    return ConfigView(config.version, _shown(config.variables, reveal=caller.role >= Role.DEPLOYER), secrets)


@get("/apps/{app:str}/config/changes", tags=["apps"])
async def config_changes(app: FromPath[str], services: Deps, a: DeploymentA, b: DeploymentB) -> VariableChanges:
    """Which variables differ between two deployments: names without values."""
    found = await apps_of(services).deployments.changed_variables(app, a, b)
    return VariableChanges([VariableChange(change.name, change.change, change.secret) for change in found])


@put("/apps/{app:str}/config", tags=["apps"])
async def change_config(
    app: FromPath[str], data: JSONBody[ConfigChange], services: Deps, caller: Caller
) -> ChangedConfig:
    """Change variables; a running app is deployed anew with them."""
    author = Author(caller.name, tracing.trace_id.get())
    change = Change(data.set, data.secrets, data.unset, data.replace)
    config, names, deployment_id = await apps_of(services).deployments.configure(app, change, author)
    shown = _shown(config.variables, reveal=True)
    return ChangedConfig(config.version, shown, sorted(config.variables.secrets), sorted(names), deployment_id)


def _shown(variables: Variables, *, reveal: bool) -> dict[str, str]:
    """Names with the values that may be seen; secrets never are."""
    return {
        name: value if reveal and name not in variables.secrets else MASK for name, value in variables.env.items()
    }


HANDLERS = [
    create_app, list_apps, show_app, change_app, delete_app, app_deployments, app_releases, rollback, scale,
    show_config, config_changes, change_config,
]  # fmt: skip
