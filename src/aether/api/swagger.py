"""The API's description at /openapi.json and Swagger UI at /swagger, served without the internet.

The UI's files come from the installed `swagger-ui-py` distribution; its Python code is not used.
"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from typing import Any

from litestar import Request, Response, get
from litestar.params import FromPath

from aether.api.description import describe
from aether.model.errors import NotFound, ServiceUnavailable

_TYPES = {
    "swagger-ui.css": "text/css",
    "swagger-ui-bundle.js": "text/javascript",
    "swagger-ui-standalone-preset.js": "text/javascript",
    "favicon-32x32.png": "image/png",
}
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
        "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>Aether API</title>
<link rel="icon" href="/swagger/favicon-32x32.png">
<link rel="stylesheet" href="/swagger/swagger-ui.css">
</head>
<body>
<div id="swagger-ui"></div>
<script src="/swagger/swagger-ui-bundle.js"></script>
<script src="/swagger/swagger-ui-standalone-preset.js"></script>
<script src="/swagger/start.js"></script>
</body>
</html>
"""
_START = """SwaggerUIBundle({
  url: "/openapi.json",
  dom_id: "#swagger-ui",
  deepLinking: true,
  persistAuthorization: false,
  validatorUrl: null,
  presets: [SwaggerUIBundle.presets.apis],
});
"""


@get("/openapi.json", include_in_schema=False, media_type="application/json")
async def openapi(request: Request[Any, Any, Any]) -> bytes:
    """OpenAPI 3.1."""
    return _schema(request.app)


@functools.lru_cache(maxsize=2)
def _schema(app: Any) -> bytes:
    return describe(app)


@get("/swagger", include_in_schema=False, media_type="text/html")
async def swagger() -> Response[str]:
    """Swagger UI."""
    return Response(_PAGE, headers=_HEADERS, media_type="text/html")


@get("/swagger/{file:str}", include_in_schema=False)
async def asset(file: FromPath[str]) -> Response[bytes]:
    if file == "start.js":
        return Response(_START.encode(), headers=_HEADERS, media_type="text/javascript")
    if file not in _TYPES:
        raise NotFound("Swagger UI has no such file")
    headers = {**_HEADERS, "Cache-Control": "private, max-age=3600"}
    return Response((_assets() / file).read_bytes(), headers=headers, media_type=_TYPES[file])


@functools.cache
def _assets() -> Path:
    spec = importlib.util.find_spec("swagger_ui")
    if spec is None or not spec.submodule_search_locations:
        raise ServiceUnavailable("Swagger UI is not installed; install the distribution swagger-ui-py")
    return Path(spec.submodule_search_locations[0]) / "static"


HANDLERS = [openapi, swagger, asset]
