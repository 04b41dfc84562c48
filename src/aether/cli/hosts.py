"""`aether hosts`: the names of their own under which an app answers."""

from __future__ import annotations

from aether.cli.arguments import add_app, add_format
from aether.cli.output import escape, moment, table
from aether.cli.project import app_of
from aether.model.errors import LocalIOError, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from aether.cli.arguments import Arguments, Parser
    from aether.cli.context import Context
    from aether.client.wire import Host, HostCertificate

YEAR_SECS = 31_536_000


def configure(parser: Parser) -> None:
    add = parser.add_action("add", "let the app answer to a host, once it is proven to be yours")
    add.add_argument("host", metavar="HOST", help="the host, like www.example.com")
    add.add_argument("--redirect-to", metavar="HOST", help="send its requests on to this other host of the app")
    add.add_argument("--allow-http", action="store_true", help="do not send plain HTTP on to HTTPS")
    add.add_argument(
        "--hsts", action="store_true", help="tell browsers to come back over HTTPS only, for a year"
    )  # fmt: skip
    add.add_argument(
        "--verified-by-admin", action="store_true", help="vouch for the host instead of proving it (admins)"
    )
    verify = parser.add_action("verify", "look again for the proof of a pending host")
    verify.add_argument("host", metavar="HOST", help="the host")
    cert = parser.add_action("cert", "show a certificate of your own for a host, or forget it")
    cert.add_argument("host", metavar="HOST", help="the host")
    cert.add_argument("--cert", metavar="FILE", help="the certificate (PEM, with its chain)")
    cert.add_argument("--key", metavar="FILE", help="its key (PEM)")
    cert.add_argument("--remove", action="store_true", help="forget the host's certificate")
    remove = parser.add_action("remove", "give a host up")
    remove.add_argument("host", metavar="HOST", help="the host")
    listing = parser.add_action("list", "list the hosts of an app (also without an action)")
    for one in (add, verify, cert, remove, listing, parser):
        add_app(one)
        add_format(one)


def run(arguments: Arguments, context: Context) -> int:
    app = app_of(arguments)
    if arguments.action == "add":
        added = context.api.add_host(
            app,
            arguments.host,
            redirect_to=arguments.redirect_to,
            allow_http=arguments.allow_http,
            hsts_secs=YEAR_SECS if arguments.hsts else 0,
            verified_by_admin=arguments.verified_by_admin,
        )
        context.result(added, lambda: _told(added))
    elif arguments.action == "verify":
        found = context.api.verify_host(app, arguments.host)
        context.result(found, lambda: _told(found))
    elif arguments.action == "cert":
        _certificate(app, arguments, context)
    elif arguments.action == "remove":
        context.api.remove_host(app, arguments.host)
        context.result({"app": app, "removed": arguments.host}, lambda: f"{arguments.host} no longer leads to {app}")
    else:
        _list(app, context)
    return 0


def _certificate(app: str, arguments: Arguments, context: Context) -> None:
    host = arguments.host
    if arguments.remove:
        context.api.withdraw_certificate(app, host)
        context.result({"host": host, "certificate": None}, lambda: f"forgot the certificate of {host}")
        return
    if not arguments.cert or not arguments.key:
        raise UsageError("give the certificate and its key: --cert FILE --key FILE, or --remove")
    given = context.api.give_certificate(app, host, _read(arguments.cert), _read(arguments.key))
    until = moment(given["not_after"] or "")
    context.result(given, lambda: f"{host} shows the certificate of {escape(given['issuer'] or '')} until {until}")


def _read(path: str) -> str:
    try:
        with open(path, encoding="ascii") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise LocalIOError(f"cannot read {path}: {getattr(error, 'strerror', 'it is not PEM')}") from error


def _told(host: Host) -> str:
    """What has been reached and what is still to be done."""
    name, app, proof = host["host"], host["app"], host["proof"]
    if proof is None:
        leads = f"redirects to {host['redirect_to']}" if host["redirect_to"] else f"leads to {app}"
        return f"{name} {leads} (verified by {host['verified_by']})"
    return (
        f"{name} is pending: {escape(host['problem'] or 'not checked yet')}\n"
        "Prove that it is yours in one of two ways, then call "
        f"'aether hosts verify {name} --app {app}':\n"
        f"  DNS   {proof['txt_name']}  TXT  {proof['value']}\n"
        f"  HTTP  point {name} at this server, which then answers {proof['url']}"
    )


def _list(app: str, context: Context) -> None:
    from aether.client.api import pages

    hosts = list(pages(lambda cursor: context.api.hosts(app, limit=500, cursor=cursor)))
    context.result(
        {"items": hosts},
        lambda: (
            table(("HOST", "STATUS", "PROOF", "CERTIFICATE", "OPTIONS"), map(_row, hosts))
            if hosts
            else f"{app} has no custom hosts"
        ),
    )


def _row(host: Host) -> tuple[str, ...]:
    options = [f"redirects to {host['redirect_to']}"] if host["redirect_to"] else []
    options += ["http allowed"] if host["allow_http"] else []
    options += ["hsts"] if host["hsts_secs"] else []
    proof = escape(host["verified_by"] or host["problem"] or "")
    return host["host"], host["status"], proof, _until(host["certificate"]), ", ".join(options)


def _until(certificate: HostCertificate | None) -> str:
    if certificate is None:
        return ""
    if certificate["not_after"] is None:
        return escape(certificate["problem"] or "being issued")
    return f"{certificate['source']}, until {moment(certificate['not_after'])}"
