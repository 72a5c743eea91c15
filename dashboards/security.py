"""What every request has to pass and every answer carries.

- A Host that is not ours is a 400 (`TRUSTED_HOSTS`): another site's name that was made to point here gets nothing.
- A request that changes or computes something (anything but GET, HEAD, OPTIONS) from another Origin is a 403.
- Answers carry a content security policy: scripts only from here and, by their hash, the few lines that Dash puts
  inline; nothing loads from or talks to anywhere else. Styles allow inline, as Mantine and AG Grid insert theirs.
"""

from urllib.parse import urlsplit

from dash import Dash
from flask import Response, abort, request

__all__ = ["LOOPBACK", "content_security_policy", "protect"]

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
SAFE_METHODS = {"GET", "HEAD", "OPTIONS"}


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


def protect(app: Dash, host: str) -> None:
    """Put the rules of this module on an app; call it after all callbacks are registered."""
    server = app.server
    server.config["TRUSTED_HOSTS"] = [*LOOPBACK, *({host} - {*LOOPBACK, "0.0.0.0", "::"})]
    policy = content_security_policy(list(app.csp_hashes()))

    @server.before_request
    def refuse_foreign_origins() -> None:
        origin = request.headers.get("Origin")
        if request.method in SAFE_METHODS or origin is None:
            return
        if urlsplit(origin).netloc != request.host:
            abort(403, f"This request comes from {origin}, not from {request.host}.")

    @server.after_request
    def add_headers(response: Response) -> Response:
        response.headers["Content-Security-Policy"] = policy
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Referrer-Policy"] = "same-origin"
        response.headers["X-Frame-Options"] = "DENY"
        response.headers["Cross-Origin-Opener-Policy"] = "same-origin"
        response.headers["Cross-Origin-Resource-Policy"] = "same-origin"
        return response
