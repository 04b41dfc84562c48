"""`aether up`: the whole platform in this process, until Ctrl-C.

With `doctor` the only command that reaches the server's side of the code.
"""

from __future__ import annotations

import sys
from pathlib import Path

from aether.cli.output import write
from aether.model.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from aether.cli.arguments import Arguments, Parser
    from aether.cli.context import Context
    from aether.topology import Ready


DATA_DIR_HELP = "where everything is kept (default: AETHER_DATA_DIR, else ${XDG_DATA_HOME:-~/.local/share}/aether)"


def configure(parser: Parser) -> None:
    parser.add_argument("--host", default="127.0.0.1", metavar="HOST", help="address to listen on (127.0.0.1)")
    parser.add_argument("--port", type=port, default=8080, metavar="PORT", help="port; 0 takes a free one (8080)")
    parser.add_argument("--data-dir", metavar="DIR", help=DATA_DIR_HELP)
    parser.add_argument(
        "--insecure-http", action="store_true", help="listen without TLS where other machines reach it"
    )


def port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65_535:
        raise UsageError(f"--port is a number from 0 to 65535, not '{text}'")
    return int(text)


def run(arguments: Arguments, context: Context) -> int:
    from aether.client.dial import is_loopback

    if not is_loopback(arguments.host) and not arguments.insecure_http:
        raise UsageError(
            f"listening on {arguments.host} without TLS sends tokens in clear text over the network: "
            "stay on 127.0.0.1 behind a proxy with TLS, or give --insecure-http"
        )
    from aether.observability.logging import configure as configure_logging
    from aether.settings import load
    from aether.topology import serve

    configure_logging(context.log.level, context.log.format)
    data_dir = Path(arguments.data_dir).expanduser().absolute() if arguments.data_dir else None
    settings = load(context.environ, data_dir=data_dir)

    def on_ready(ready: Ready) -> None:
        write(f"Aether listens at {ready.url} (data in {ready.data_dir}; {ready.sandbox})")
        flag = f" --data-dir {ready.data_dir}" if arguments.data_dir else ""
        base = "" if ready.url == "http://127.0.0.1:8080" else f" --api-base {ready.url}"
        write(f"Log in with: aether login{base}{flag}")
        sys.stdout.flush()

    return serve(settings, arguments.host, arguments.port, on_ready)
