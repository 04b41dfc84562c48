"""Apps, their releases and their configuration."""

from __future__ import annotations

from typing import Annotated

import msgspec
from litestar import delete, get, post, put
from litestar.params import FromPath, JSONBody, QueryParameter

from aether.api import auditing
from aether.api.paging import DEFAULT_LIMIT, Cursor, Limit, Page, decode_cursor, page
from aether.api.services import Caller, Deps
from aether.api.views import App, Deployment, Release, app_view, apps_of, deployment_view, release_view
from aether.apps.deployments import Author, RollbackTarget
from aether.identity.ownership import visible
from aether.identity.roles import Role
from aether.model.errors import Forbidden
from aether.observability import tracing

MASK = "****"
Search = Annotated[str, QueryParameter(name="q", max_length=40, description="Part of the name.")]


class NewApp(msgspec.Struct, forbid_unknown_fields=True):
    """1 to 40 of a-z, 0-9 and '-'; starts with a letter. Without a team the app is the caller's own."""

    name: str
    team: str | None = None


class Rollback(msgspec.Struct, forbid_unknown_fields=True):
    """At most one is given; none means the release before the active one. A digest may be shortened."""

    digest: str | None = None
    version: int | None = None
    deployment_id: str | None = None


class ConfigView(msgspec.Struct):
    """Values are **** for the role reader."""

    version: int
    env: dict[str, str]


class ConfigChange(msgspec.Struct, forbid_unknown_fields=True):
    """Variables to set and to unset; with `replace` the ones not named are unset too."""

    set: dict[str, str] = {}
    unset: list[str] = []
    replace: bool = False


class ChangedConfig(msgspec.Struct):
    """`deployment_id` is the deployment that brings the change to the running app."""

    version: int
    env: dict[str, str]
    deployment_id: str | None


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
async def rollback(app: FromPath[str], data: JSONBody[Rollback], services: Deps, caller: Caller) -> Deployment:
    """Deploy exactly what a past release was: its artifact, its variables, its command."""
    apps = apps_of(services)
    target = RollbackTarget(data.digest, data.version, data.deployment_id)
    row = await apps.deployments.rollback(app, target, Author(caller.name, tracing.trace_id.get()))
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
    hidden = caller.role < Role.DEPLOYER
    return ConfigView(config.version, {name: MASK if hidden else value for name, value in config.env.items()})


@put("/apps/{app:str}/config", tags=["apps"])
async def change_config(
    app: FromPath[str], data: JSONBody[ConfigChange], services: Deps, caller: Caller
) -> ChangedConfig:
    """Change variables; a running app is deployed anew with them."""
    author = Author(caller.name, tracing.trace_id.get())
    config, deployment_id = await apps_of(services).deployments.configure(
        app, data.set, data.unset, author, replace_all=data.replace
    )
    return ChangedConfig(config.version, dict(config.env), deployment_id)


HANDLERS = [
    create_app, list_apps, show_app, delete_app, app_deployments, app_releases, rollback, scale, show_config,
    change_config,
]  # fmt: skip
