"""`aether up`: the whole platform in this process, until Ctrl-C.

With `doctor`, `backup` and `restore` the only command that reaches the server's side of the code.
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
        "--tls", action="store_true", default=None, help="speak TLS, with certificates of a local authority"
    )
    parser.add_argument("--tls-cert", metavar="FILE", help="speak TLS with this certificate (PEM, with its chain)")
    parser.add_argument("--tls-key", metavar="FILE", help="the certificate's key (PEM)")
    parser.add_argument(
        "--http-port", type=port, metavar="PORT", help="beside TLS: a plain port that sends everything on to HTTPS"
    )
    parser.add_argument(
        "--acme-email", metavar="ADDRESS", help="get certificates for custom hosts from an ACME authority"
    )
    parser.add_argument("--acme-directory", metavar="URL", help="the authority's directory (Let's Encrypt)")
    parser.add_argument("--acme-ca-file", metavar="FILE", help="trust this authority for the directory's own address")
    parser.add_argument(
        "--access-log", choices=("file", "stdout", "off"), help="where a line for each request goes (file)"
    )
    parser.add_argument(
        "--insecure-http", action="store_true", help="listen without TLS where other machines reach it"
    )


def port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65_535:
        raise UsageError(f"--port is a number from 0 to 65535, not '{text}'")
    return int(text)


def run(arguments: Arguments, context: Context) -> int:
    return start(arguments, context, among_others=False)


def start(arguments: Arguments, context: Context, *, among_others: bool) -> int:
    """Serve until the end; `among_others` beside servers that share the database, else alone on SQLite whatever
    DATABASE_URL says: a developer's own program is what it is set for then."""
    from aether.client.dial import is_loopback
    from aether.settings import load

    data_dir = Path(arguments.data_dir).expanduser().absolute() if arguments.data_dir else None
    settings = load(
        context.environ,
        data_dir=data_dir,
        tls=arguments.tls,
        tls_cert=arguments.tls_cert,
        tls_key=arguments.tls_key,
        http_port=arguments.http_port,
        access_log=arguments.access_log,
        acme_email=arguments.acme_email,
        acme_directory=arguments.acme_directory,
        acme_ca_file=arguments.acme_ca_file,
        database_url=None if among_others else "",
    )
    secure = settings.tls or settings.tls_cert
    if not is_loopback(arguments.host) and not secure and not arguments.insecure_http:
        raise UsageError(
            f"listening on {arguments.host} without TLS sends tokens in clear text over the network: "
            "give --tls-cert and --tls-key, stay on 127.0.0.1 behind a proxy with TLS, or give --insecure-http"
        )
    from aether.observability.logging import configure as configure_logging
    from aether.topology import serve

    configure_logging(context.log.level, context.log.format)

    def on_ready(ready: Ready) -> None:
        write(f"Aether listens at {ready.url} (data in {ready.data_dir}; {ready.sandbox}; {ready.functions})")
        if ready.ca_file is not None:
            write(f"Its certificates are made by its own authority: let browsers and curl trust {ready.ca_file}")
        flag = f" --data-dir {ready.data_dir}" if arguments.data_dir else ""
        base = "" if ready.url == "http://127.0.0.1:8080" else f" --api-base {ready.url}"
        write(f"Log in with: aether login{base}{flag}")
        sys.stdout.flush()

    return serve(settings, arguments.host, arguments.port, on_ready, among_others=among_others)
