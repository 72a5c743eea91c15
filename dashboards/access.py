"""Who may come in where the dashboard is served to other machines: one-time links, then a cookie.

1. `scope serve` prints links, each with a token of its own. Whoever opens one gets a cookie, and the token is spent.
2. Whatever is asked for without the cookie, a page, a callback or a file, is a 401 that says what to do.

Tokens and the cookie are 256 random bits, compared in constant time, and known to this process alone: serving again
makes others. Nothing here is logged.
"""

import hashlib
import hmac
import secrets
import threading
from html import escape
from urllib.parse import quote, urlencode

from flask import Flask, Response, request

__all__ = ["Access"]

BYTES = 32
TOKEN = "token"
UNAUTHORISED = """<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Not let in · Scope</title>
<style>body{font:16px/1.6 system-ui,sans-serif;max-width:34rem;margin:12vh auto;padding:0 1.25rem;color:#1b1f24}
code{background:#f6f7f8;padding:.1em .35em;border-radius:4px}
@media (prefers-color-scheme:dark){body{background:#15181c;color:#e8eaed}code{background:#1d2126}}</style></head>
<body><main><h1>This dashboard does not know you</h1>
<p>%s</p>
<p>The links that let a browser in are printed by <code>scope serve</code> where it runs; each works once. Ask whoever
started it for one that is not used yet. If all are used: stop it, and start it again, with
<code>--links</code> for as many as are needed.</p>
<p>If you have just opened such a link: <a href="/">go on</a>.</p></main></body></html>
"""
GOING_ON = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta http-equiv="refresh" content="0; url=%s"><title>Scope</title></head>
<body><p><a href="%s">Go on to the dashboard</a></p></body></html>
"""


class Access:
    """The links that have not been used, and the cookie of those who have come in.

    Args:
        n_links: browsers to let in.
    """

    def __init__(self, n_links: int = 1) -> None:
        self._tokens = [secrets.token_urlsafe(BYTES) for _ in range(n_links)]
        self._session = secrets.token_urlsafe(BYTES)
        self._cookie = f"scope_{_digest(self._session).hex()[:12]}"
        """Cookies do not know ports: another dashboard of the same host needs another name."""
        self._lock = threading.Lock()

    def links(self, host: str, port: int) -> list[str]:
        """The addresses that let somebody in, each once."""
        where = f"[{host}]" if ":" in host else host
        return [f"http://{where}:{port}/?{TOKEN}={token}" for token in self._tokens]

    def guard(self, server: Flask) -> None:
        """Ask everybody who comes to a Flask application."""

        @server.before_request
        def ask() -> Response | None:
            known = self._knows(request.cookies.get(self._cookie, ""))
            token = request.args.get(TOKEN)
            if token is not None and request.method == "GET" and (self._redeem(token) if not known else True):
                return self._let_in()
            if known:
                return None
            why = (
                "The link has been used, or is none of this dashboard's."
                if token is not None
                else "It asks for a link."
            )
            answer = Response(UNAUTHORISED % why, 401, mimetype="text/html")
            answer.headers["Cache-Control"] = "no-store"
            return answer

    def _knows(self, cookie: str) -> bool:
        return hmac.compare_digest(_digest(cookie), _digest(self._session))

    def _redeem(self, token: str) -> bool:
        """Whether this is a token that has not been used; then it is now."""
        given = _digest(token)
        with self._lock:
            fitting = [kept for kept in self._tokens if hmac.compare_digest(_digest(kept), given)]
            self._tokens = [kept for kept in self._tokens if kept not in fitting]
        return bool(fitting)

    def _let_in(self) -> Response:
        """To the same address without the token, with the cookie.

        A browser that follows a link from another site leaves out a strict cookie on the redirect too; it gets a page
        that goes on by itself.
        """
        query = [(name, value) for name, value in request.args.items(multi=True) if name != TOKEN]
        address = quote("/" + request.path.lstrip("/")) + (f"?{urlencode(query, quote_via=quote)}" if query else "")
        if request.headers.get("Sec-Fetch-Site") == "cross-site":
            answer = Response(GOING_ON % (escape(address), escape(address)), mimetype="text/html")
        else:
            answer = Response("", 303, {"Location": address})
        answer.headers["Cache-Control"] = "no-store"
        answer.set_cookie(self._cookie, self._session, httponly=True, samesite="Strict", path="/")
        return answer


def _digest(text: str) -> bytes:
    """Of equal length whatever came, so that a comparison takes equally long."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
