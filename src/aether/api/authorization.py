"""Who may call which route on whose things: one table, and the guard that obeys it.

A row says the smallest role and how the route is bound to what its caller owns. The API is not built when a route
has no row or a row no route; a test calls every row as every kind of caller. What belongs to others is answered
with 404 as if it did not exist, to whoever has the role; too small a role is 403 whatever exists.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, cast

from litestar import Litestar
from litestar.connection import ASGIConnection
from litestar.handlers import BaseRouteHandler

from aether.api.services import Services
from aether.identity.roles import Principal, Role
from aether.model.errors import Forbidden

WEBSOCKET = "WEBSOCKET"


class Owns(Enum):
    """How a route is bound to what its caller owns."""

    NOTHING = "the route touches nobody's things"
    APP = "the guard checks the app that the path names"
    FUNCTION = "the guard checks the function that the path names"
    DEPLOYMENT = "the guard checks the app of the deployment that the path names"
    NAMED = "the handler checks the app that the body or the query names"
    VISIBLE = "the handler shows what its caller may touch and nothing else"
    SELF = "the handler lets its caller reach its own things, and an admin all"


@dataclass(frozen=True, slots=True)
class Rule:
    """`role` None: no token needed."""

    role: Role | None
    owns: Owns = Owns.NOTHING


_PUBLIC = Rule(None)
_READER, _DEPLOYER, _ADMIN = Role.READER, Role.DEPLOYER, Role.ADMIN

ROUTES: Mapping[tuple[str, str], Rule] = {
    # probes and description
    ("GET", "/healthz"): _PUBLIC,
    ("GET", "/health"): _PUBLIC,
    ("GET", "/readyz"): _PUBLIC,
    ("GET", "/startupz"): _PUBLIC,
    ("GET", "/metrics"): Rule(_READER),
    ("GET", "/openapi.json"): Rule(_READER),
    ("GET", "/openapi/{path}"): Rule(_READER),
    ("GET", "/swagger"): Rule(_READER),
    ("GET", "/swagger/{file}"): Rule(_READER),
    # sessions
    ("POST", "/auth/login"): _PUBLIC,
    ("POST", "/auth/refresh"): _PUBLIC,
    ("POST", "/auth/logout"): Rule(_READER, Owns.SELF),
    ("GET", "/auth/whoami"): Rule(_READER, Owns.SELF),
    ("POST", "/auth/device"): _PUBLIC,
    ("POST", "/auth/device/token"): _PUBLIC,
    ("GET", "/auth/device/{user_code}"): Rule(_READER),
    ("POST", "/auth/device/{user_code}"): Rule(_READER, Owns.SELF),
    # users, teams, tokens, audit
    ("POST", "/users"): Rule(_ADMIN),
    ("GET", "/users"): Rule(_ADMIN),
    ("PATCH", "/users/{name}"): Rule(_READER, Owns.SELF),
    ("POST", "/teams"): Rule(_ADMIN),
    ("GET", "/teams"): Rule(_READER, Owns.VISIBLE),
    ("DELETE", "/teams/{team}"): Rule(_ADMIN),
    ("PUT", "/teams/{team}/members/{user}"): Rule(_ADMIN),
    ("DELETE", "/teams/{team}/members/{user}"): Rule(_ADMIN),
    ("POST", "/tokens"): Rule(_READER, Owns.SELF),
    ("GET", "/tokens"): Rule(_READER, Owns.SELF),
    ("DELETE", "/tokens/{token_id}"): Rule(_READER, Owns.SELF),
    ("GET", "/audit"): Rule(_ADMIN),
    ("POST", "/gc"): Rule(_ADMIN),
    ("POST", "/backup"): Rule(_ADMIN),
    # apps
    ("POST", "/apps"): Rule(_DEPLOYER, Owns.NAMED),
    ("GET", "/apps"): Rule(_READER, Owns.VISIBLE),
    ("GET", "/apps/{app}"): Rule(_READER, Owns.APP),
    ("PATCH", "/apps/{app}"): Rule(_DEPLOYER, Owns.APP),
    ("DELETE", "/apps/{app}"): Rule(_DEPLOYER, Owns.APP),
    ("GET", "/apps/{app}/deployments"): Rule(_READER, Owns.APP),
    ("GET", "/apps/{app}/releases"): Rule(_READER, Owns.APP),
    ("POST", "/apps/{app}/rollback"): Rule(_DEPLOYER, Owns.APP),
    ("POST", "/apps/{app}/scale"): Rule(_DEPLOYER, Owns.APP),
    ("GET", "/apps/{app}/config"): Rule(_READER, Owns.APP),
    ("GET", "/apps/{app}/config/changes"): Rule(_READER, Owns.APP),
    ("PUT", "/apps/{app}/config"): Rule(_DEPLOYER, Owns.APP),
    ("GET", "/apps/{app}/logs"): Rule(_READER, Owns.APP),
    (WEBSOCKET, "/apps/{app}/logs"): Rule(_READER, Owns.APP),
    # custom hosts
    ("GET", "/apps/{app}/hosts"): Rule(_READER, Owns.APP),
    ("POST", "/apps/{app}/hosts"): Rule(_DEPLOYER, Owns.APP),
    ("POST", "/apps/{app}/hosts/{host}/verify"): Rule(_DEPLOYER, Owns.APP),
    ("DELETE", "/apps/{app}/hosts/{host}"): Rule(_DEPLOYER, Owns.APP),
    ("PUT", "/apps/{app}/hosts/{host}/certificate"): Rule(_DEPLOYER, Owns.APP),
    ("DELETE", "/apps/{app}/hosts/{host}/certificate"): Rule(_DEPLOYER, Owns.APP),
    ("POST", "/apps/{app}/runs"): Rule(_DEPLOYER, Owns.APP),
    ("GET", "/apps/{app}/runs"): Rule(_READER, Owns.APP),
    ("GET", "/apps/{app}/runs/{run_id}"): Rule(_READER, Owns.APP),
    ("POST", "/apps/{app}/runs/{run_id}/stop"): Rule(_DEPLOYER, Owns.APP),
    (WEBSOCKET, "/apps/{app}/runs/{run_id}/attach"): Rule(_DEPLOYER, Owns.APP),
    ("GET", "/apps/{app}/volumes"): Rule(_READER, Owns.APP),
    ("DELETE", "/apps/{app}/volumes/{volume}"): Rule(_DEPLOYER, Owns.APP),
    # deployments
    ("POST", "/deployments"): Rule(_DEPLOYER, Owns.NAMED),
    ("GET", "/deployments"): Rule(_READER, Owns.VISIBLE),
    ("GET", "/deployments/{deployment_id}"): Rule(_READER, Owns.DEPLOYMENT),
    ("PATCH", "/deployments/{deployment_id}"): Rule(_DEPLOYER, Owns.DEPLOYMENT),
    ("GET", "/deployments/{deployment_id}/events"): Rule(_READER, Owns.DEPLOYMENT),
    # artifacts
    ("POST", "/artifacts/presign"): Rule(_DEPLOYER, Owns.NAMED),
    ("POST", "/artifacts/complete"): Rule(_DEPLOYER, Owns.NAMED),
    ("POST", "/artifacts/multipart/init"): Rule(_DEPLOYER, Owns.NAMED),
    ("POST", "/artifacts/multipart/presign-part"): Rule(_DEPLOYER, Owns.NAMED),
    ("POST", "/artifacts/multipart/complete"): Rule(_DEPLOYER, Owns.NAMED),
    ("POST", "/artifacts"): Rule(_DEPLOYER, Owns.NAMED),
    ("GET", "/artifacts"): Rule(_READER, Owns.VISIBLE),
    ("HEAD", "/artifacts/{digest}"): Rule(_READER, Owns.VISIBLE),
    ("GET", "/artifacts/{digest}/meta"): Rule(_READER, Owns.VISIBLE),
    ("GET", "/artifacts/{digest}/download"): Rule(_READER, Owns.VISIBLE),
    ("GET", "/artifacts/{digest}/events"): Rule(_READER, Owns.VISIBLE),
    ("PUT", "/artifacts/{digest}/pin"): Rule(_DEPLOYER, Owns.VISIBLE),
    ("DELETE", "/artifacts/{digest}/pin"): Rule(_DEPLOYER, Owns.VISIBLE),
    ("POST", "/artifacts/{digest}/manifest"): Rule(_DEPLOYER, Owns.VISIBLE),
    ("GET", "/artifacts/{digest}/manifest"): Rule(_READER, Owns.VISIBLE),
    ("POST", "/artifacts/{digest}/sbom"): Rule(_DEPLOYER, Owns.VISIBLE),
    ("GET", "/artifacts/{digest}/sbom"): Rule(_READER, Owns.VISIBLE),
    ("POST", "/artifacts/{digest}/provenance"): Rule(_DEPLOYER, Owns.VISIBLE),
    ("GET", "/artifacts/{digest}/provenance"): Rule(_READER, Owns.VISIBLE),
    ("GET", "/provenance"): Rule(_READER, Owns.VISIBLE),
    ("GET", "/provenance/keys"): Rule(_READER),
    ("POST", "/provenance/keys"): Rule(_ADMIN),
    ("DELETE", "/provenance/keys/{key_id}"): Rule(_ADMIN),
    ("GET", "/provenance/{digest}"): Rule(_READER, Owns.VISIBLE),
    ("GET", "/provenance/{digest}/attestation"): Rule(_READER, Owns.VISIBLE),
    ("GET", "/apps/{app}/public-keys"): Rule(_READER, Owns.APP),
    ("POST", "/apps/{app}/public-keys"): Rule(_DEPLOYER, Owns.APP),
    ("DELETE", "/apps/{app}/public-keys/{key_id}"): Rule(_DEPLOYER, Owns.APP),
    # functions
    ("POST", "/api/functions"): Rule(_DEPLOYER, Owns.NAMED),
    ("GET", "/api/functions"): Rule(_READER, Owns.VISIBLE),
    ("GET", "/api/functions/runtimes"): Rule(_READER),
    ("POST", "/api/functions/runtimes"): Rule(_ADMIN),
    ("DELETE", "/api/functions/runtimes/{name}"): Rule(_ADMIN),
    ("GET", "/api/functions/{function}"): Rule(_READER, Owns.FUNCTION),
    ("PUT", "/api/functions/{function}"): Rule(_DEPLOYER, Owns.FUNCTION),
    ("PATCH", "/api/functions/{function}"): Rule(_DEPLOYER, Owns.FUNCTION),
    ("DELETE", "/api/functions/{function}"): Rule(_DEPLOYER, Owns.FUNCTION),
    ("POST", "/api/functions/{function}/code"): Rule(_DEPLOYER, Owns.FUNCTION),
    ("GET", "/api/functions/{function}/versions"): Rule(_READER, Owns.FUNCTION),
    ("POST", "/api/functions/{function}/rollback"): Rule(_DEPLOYER, Owns.FUNCTION),
    ("POST", "/api/functions/{function}/warm"): Rule(_DEPLOYER, Owns.FUNCTION),
    ("GET", "/api/functions/{function}/invocations"): Rule(_READER, Owns.FUNCTION),
    ("GET", "/api/functions/{function}/logs"): Rule(_READER, Owns.FUNCTION),
}


async def guard(connection: ASGIConnection[Any, Any, Any, Any], handler: BaseRouteHandler) -> None:
    """Litestar guard on every route. Raises Forbidden for too small a role, NotFound for things of others."""
    scope = cast("Mapping[str, Any]", connection.scope)
    method: str = scope.get("method", WEBSOCKET)
    if method == "OPTIONS":
        return
    rule = ROUTES[method, _template(scope["path_template"])]
    if rule.role is None:
        return
    caller: Principal = scope["state"]["principal"]
    if caller.role < rule.role:
        raise Forbidden(f"this needs the role {rule.role.label}; {caller.name} has {caller.role.label}")
    if caller.apps is not None and rule.role is Role.ADMIN:
        raise Forbidden("a token that is bound to apps may not do this")
    services: Services = connection.app.state.services
    ownership, path = services.identity.ownership, connection.path_params
    if rule.owns is Owns.APP:
        await ownership.check_app(caller, path["app"])
    elif rule.owns is Owns.FUNCTION:
        await ownership.check_function(caller, path["function"])
    elif rule.owns is Owns.DEPLOYMENT:
        await ownership.check_deployment(caller, path["deployment_id"])


def routes_of(app: Litestar) -> Iterable[tuple[str, str]]:
    """(method, path template) of every route of the API."""
    for route in app.routes:
        handlers: list[Any] = getattr(route, "route_handlers", None) or [getattr(route, "route_handler", None)]
        for handler in handlers:
            # Litestar answers OPTIONS itself, with the methods of the path and nothing else: no row is needed
            for method in sorted(getattr(handler, "http_methods", None) or {WEBSOCKET}):
                if method != "OPTIONS":
                    yield method, _template(route.path_format)


def methods_of(template: str) -> list[str]:
    """The methods that a path takes, in order; OPTIONS, which every path takes, is left out."""
    return sorted(method for method, path in ROUTES if path == template and method != WEBSOCKET)


def _template(path: str) -> str:
    """Litestar's own routes for the description, which change with its version, are one row."""
    return "/openapi/{path}" if path == "/openapi" or path.startswith("/openapi/") else path


def check_complete(app: Litestar) -> None:
    """Raises RuntimeError unless table and routes name each other one to one."""
    found = set(routes_of(app))
    if missing := sorted(found - ROUTES.keys()):
        raise RuntimeError(f"routes without a row in the authorization table: {missing}")
    if dead := sorted(ROUTES.keys() - found):
        raise RuntimeError(f"rows of the authorization table without a route: {dead}")


PUBLIC_PATHS = frozenset(path for (_, path), rule in ROUTES.items() if rule.role is None)
"""Paths without authentication; a path is public with all of its methods or with none."""
