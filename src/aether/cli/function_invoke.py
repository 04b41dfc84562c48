"""`aether function invoke`: one call of a function, its answer on stdout as it comes.

The exit code is 0 below status 400, 40 for 502, 503 and 504, which the server answers when no instance could, and 20
for any other failure, which is the function's own.
"""

from __future__ import annotations

import json
import sys
import time

from aether.cli.arguments import seconds
from aether.cli.output import escape
from aether.model.errors import AetherError, LocalIOError, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from aether.cli.arguments import Arguments, Parser
    from aether.cli.context import Context
    from aether.client.transport import Stream

DEFAULT_TIMEOUT_S = 900
FAILED, AWAY = 20, 40
_AWAY = (502, 503, 504)
_LOG_LINES = 20
_MAX_JSON_BODY = 64 * 1024 * 1024


def configure(parser: Parser) -> None:
    parser.add_argument("--path", default="/", metavar="PATH", help="what follows the function's address (/)")
    parser.add_argument("-X", "--method", metavar="METHOD", help="GET, or POST with data")
    parser.add_argument("-d", "--data", metavar="DATA|@FILE|-", help="the body; - reads it from stdin")
    parser.add_argument("-H", "--header", action="append", metavar="K:V", help="a header of the request")
    parser.add_argument(
        "--timeout",
        type=seconds,
        default=DEFAULT_TIMEOUT_S,
        metavar="SECONDS",
        help="longest silence of the function (900)",
    )


def run(arguments: Arguments, context: Context) -> int:
    body = _body(arguments.data)
    headers = _headers(arguments.header or ())
    if body is not None and not any(name.lower() == "content-type" for name in headers):
        headers["Content-Type"] = _kind(body)
    method = (arguments.method or ("GET" if body is None else "POST")).upper()
    if not method.isascii() or not method.isalpha():
        raise UsageError(f"'{arguments.method}' is not a method")
    started = time.monotonic()
    functions = context.api.functions
    with functions.call(
        arguments.name, arguments.path, method=method, headers=headers, body=body, timeout_s=arguments.timeout
    ) as answer:
        if context.as_json:
            _as_json(context, answer, arguments.timeout, started)
        else:
            _pass_on(answer, arguments.timeout)
        status = answer.status
    if status >= 400 and not context.as_json:
        context.log.warn(f"{arguments.name} answered {status}")
    if status in _AWAY:
        _show_failure(context, arguments.name)
    return 0 if status < 400 else AWAY if status in _AWAY else FAILED


def _body(given: str | None) -> bytes | None:
    if given is None:
        return None
    if given == "-":
        return sys.stdin.buffer.read()
    if not given.startswith("@"):
        return given.encode("utf-8", "surrogateescape")
    try:
        with open(given[1:], "rb") as file:
            return file.read()
    except OSError as error:
        raise LocalIOError(f"cannot read {given[1:]}: {error.strerror}") from error


def _kind(body: bytes) -> str:
    try:
        json.loads(body)
    except ValueError:
        return "application/octet-stream"
    return "application/json"


def _headers(given: list[str] | tuple[str, ...]) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in given:
        name, colon, value = text.partition(":")
        name, value = name.strip(), value.strip()
        fits = name.isascii() and name.replace("-", "").replace("_", "").isalnum()
        if not colon or not fits or not value.isprintable() or not value.isascii():
            raise UsageError(f"-H is 'Name: value' in printable ASCII, not '{text}'")
        found[name] = value
    return found


def _pass_on(answer: Stream, timeout_s: float) -> None:
    """The body to stdout as it comes; on a terminal the function cannot steer it."""
    terminal = sys.stdout.isatty()
    decode = None
    if terminal:
        import codecs

        decode = codecs.getincrementaldecoder("utf-8")("replace").decode
    last = b"\n"
    while piece := answer.read(timeout_s):
        if decode is None:
            sys.stdout.buffer.write(piece)
            sys.stdout.buffer.flush()
        else:
            sys.stdout.write(escape(decode(piece), keep="\n\t"))
            sys.stdout.flush()
        last = piece[-1:]
    if terminal and last != b"\n":
        sys.stdout.write("\n")


def _as_json(context: Context, answer: Stream, timeout_s: float, started: float) -> None:
    pieces: list[bytes] = []
    total = 0
    while piece := answer.read(timeout_s):
        pieces.append(piece)
        total += len(piece)
        if total > _MAX_JSON_BODY:
            raise UsageError("the answer is too large for one JSON object: call without --format json")
    body = b"".join(pieces)
    result: dict[str, object] = {"status": answer.status, "headers": answer.headers}
    try:
        result["body"] = body.decode()
    except UnicodeDecodeError:
        import binascii

        result["body_base64"] = binascii.b2a_base64(body, newline=False).decode()
    result["ms"] = round((time.monotonic() - started) * 1000, 1)
    context.result(result, str)


def _show_failure(context: Context, name: str) -> None:
    """Why no instance could answer, when the server knows and tells this caller."""
    try:
        failed = context.api.functions.get(name)["state"]["last_failure"]
    except AetherError as error:
        context.log.debug("the state of the function is not to be had", error=error.message)
        return
    if failed is not None:
        context.log.line(f"the last instance of {name} failed: {escape(failed['reason'])}")
        for line in failed["log"][-_LOG_LINES:]:
            context.log.line(f"  | {escape(line)}")
