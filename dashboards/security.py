"""What every request has to pass and every answer carries.

- A Host that is not ours is a 400 (`TRUSTED_HOSTS`): another site's name that was made to point here gets nothing.
- A request from another Origin is a 403, whatever its method.
- Served to other machines, everything asks for the cookie of a one-time link (`dashboards.access`); the names that
  such machines may call this one are its own and those that were allowed.
- Answers carry a content security policy: scripts only from here and, by their hash, the few lines that Dash puts
  inline; nothing loads from or talks to anywhere else. Styles allow inline, as Mantine and AG Grid insert theirs.
"""

import re
import socket
from collections.abc import Iterable
from urllib.parse import urlsplit

from dash import Dash
from flask import Response, abort, request

from dashboards.access import Access
from scope.errors import InvalidInputError

__all__ = ["LOOPBACK", "content_security_policy", "hosts_of", "is_loopback", "protect"]

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
ANY = ("0.0.0.0", "::", "")
HOST_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?|\[[0-9A-Fa-f:.]+\]")


def is_loopback(host: str) -> bool:
    """Whether an address to bind to is reached from this machine alone."""
    return host in (*LOOPBACK, "::1") or re.fullmatch(r"127(\.\d{1,3}){3}", host) is not None


def hosts_of(host: str, allowed: Iterable[str] = ()) -> list[str]:
    """The names by which a dashboard that is bound to `host` may be called, the one to show first in front.

    Bound to all addresses these are the names and addresses that this machine knows of itself.

    Raises:
        InvalidInputError: a name in `allowed` is not a host's name.
    """
    given = list(allowed)
    for name in given:
        if not HOST_NAME.fullmatch(name):
            raise InvalidInputError(
                f"{name!r} is not the name of a host; expected something like scope.example.org, without http:// and "
                "port."
            )
    own = _own_names() if host in ANY else [f"[{host}]" if ":" in host else host]
    return list(dict.fromkeys([*given, *own, *LOOPBACK]))


def _own_names() -> list[str]:
    name = socket.gethostname()
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(name, None)}
    except OSError:
        found = set()
    return [name, *(f"[{address.split('%')[0]}]" if ":" in address else address for address in sorted(found))]


def content_security_policy(script_hashes: list[str]) -> str:
    """The policy, with the hashes of the inline scripts that Dash needs."""
    directives = {
        "default-src": "'self'",
        "script-src": " ".join(["'self'", *script_hashes]),
        "style-src": "'self' 'unsafe-inline'",
        "img-src": "'self' data: blob:",
        "font-src": "'self' data:",
        "connect-src": "'self'",
        "object-src": "'none'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in directives.items())


def protect(app: Dash, hosts: Iterable[str], access: Access | None = None) -> None:
    """Put the rules of this module on an app; call it after all callbacks are registered.

    Args:
        app: the dashboard.
        hosts: the names by which it may be called, as `hosts_of` gives them.
        access: who is let in; None lets in everyone who can reach it.
    """
    server = app.server
    server.config["TRUSTED_HOSTS"] = list(hosts)
    policy = content_security_policy(list(app.csp_hashes()))

    @server.before_request
    def refuse_what_is_foreign() -> None:
        host = request.host  # raises for one that is not trusted, before anything is looked at
        origin = request.headers.get("Origin")
        if origin is not None and urlsplit(origin).netloc != host:
            abort(403, f"This request comes from {origin}, not from {host}.")

    if access is not None:
        access.guard(server)

    @server.after_request
    def add_headers(response: Response) -> Response:
        response.headers["Content-Security-Policy"] = policy
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Referrer-Policy"] = "same-origin"
        response.headers["X-Frame-Options"] = "DENY"
        response.headers["Cross-Origin-Opener-Policy"] = "same-origin"
        response.headers["Cross-Origin-Resource-Policy"] = "same-origin"
        return response
