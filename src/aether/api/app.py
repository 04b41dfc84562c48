"""Build the API.

To add routes for a noun:

1. write `routers/<noun>.py` with handlers (`@get`, `@post`, ... of Litestar) that take what they need by name:
   `services: Deps`, `caller: Caller` (both from aether.api.services);
2. end the module with `HANDLERS = [...]`, add it to `_handlers()` below, and give every route its row in
   `aether.api.authorization` (and in the calls of its test);
3. add the capability it calls to `Services`;
4. path and query parameters are `FromPath[T]` and `FromQuery[T]`, a body is `data: JSONBody[T]` (all of
   litestar.params); bodies and answers are msgspec Structs; failures are raised as `aether.model.errors`;
   lists answer `paging.Page` and take `limit: Limit = DEFAULT_LIMIT, cursor: Cursor = None`.

Handler modules must not put names used in handler signatures under TYPE_CHECKING: Litestar reads them.
Streams that may last (logs, events) watch `services.shutdown`.
"""

from __future__ import annotations

from typing import Any, cast

from litestar import Litestar, Router
from litestar.datastructures import State
from litestar.di import Provide
from litestar.openapi import OpenAPIConfig
from litestar.openapi.spec import Components, SecurityScheme

from aether import __version__
from aether.api import auth, authorization, bodies, errors
from aether.api.cors import Cors
from aether.api.routers.objects import ObjectsApp
from aether.api.services import Services
from aether.api.shell import App, Shell


def create_api(services: Services) -> App:
    """The ASGI application. Raises RuntimeError when a route has no row in the authorization table."""
    routed = create_routes(services)
    authorization.check_complete(routed)
    shell: App = Shell(cast(App, routed), ObjectsApp(services), services, authorization.PUBLIC_PATHS)
    origins = services.settings.cors_allowed_origins
    return Cors(shell, origins) if origins else shell


def create_routes(services: Services) -> Litestar:
    """The routes alone, without the layer that authenticates; for `create_api` and for tests that walk them."""

    async def provide_services() -> Services:
        return services

    return Litestar(
        route_handlers=_handlers(),
        dependencies={"services": Provide(provide_services), "caller": Provide(auth.principal)},
        guards=[authorization.guard],
        state=State({"services": services}),
        exception_handlers=errors.HANDLERS,
        openapi_config=OpenAPIConfig(
            title="Aether",
            version=__version__,
            description="Deploy artifacts and run them. Every failure is an envelope with code and message.",
            components=Components(
                security_schemes={"bearer_auth": SecurityScheme(type="http", scheme="bearer")},
            ),
            security=[{"bearer_auth": []}],
            create_examples=False,
            use_handler_docstrings=True,
            # Litestar insists on routes of its own for the schema; ours are in aether.api.swagger.
            openapi_router=Router(path="/openapi", route_handlers=[], include_in_schema=False),
            render_plugins=[],
        ),
        logging_config=None,
        request_max_body_size=bodies.MAX_BYTES,
        debug=False,
    )


def _handlers() -> list[Any]:
    from aether.api import swagger
    from aether.api.routers import (
        apps,
        artifacts,
        audit,
        backup,
        deployments,
        devices,
        documents,
        function_runtimes,
        functions,
        hosts,
        legacy,
        logs,
        multipart,
        probes,
        provenance,
        public_keys,
        retention,
        runs,
        uploads,
        users,
    )
    from aether.api.routers import auth as auth_router

    modules = (
        probes, auth_router, devices, users, audit, backup, apps, hosts, deployments, runs, logs, artifacts,
        uploads, multipart, legacy, documents, provenance, public_keys, retention,
        functions, function_runtimes, swagger,
    )  # fmt: skip
    return [handler for module in modules for handler in module.HANDLERS]
