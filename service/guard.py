"""The gate before all routes: which hosts, origins and clients are served, and how large a request may be."""

import collections
import hmac
import ipaddress
from typing import Dict, Mapping, Optional, Sequence

from fastapi.responses import JSONResponse, RedirectResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from service import uploads

MAX_BODY = uploads.MAX_BYTES * 4 // 3 + 2**16  # bytes: an image in base64, and the rest
SMALL_BODY = 2**16  # bytes, up to which a body is not counted
MAX_BODIES = 8 * MAX_BODY  # bytes of all larger bodies together, a quarter of it for each client
MAX_VALUES = 10_000  # of a body; more than any request has would take memory as Python objects
POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
POLICY += "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


def refuse(status: int, sentence: str, headers: Optional[Mapping[str, str]] = None) -> JSONResponse:
    """Return the answer to a request that is not served."""
    if status in (429, 503):
        headers = {"Retry-After": "10", **(headers or {})}
    return JSONResponse({"error": sentence}, status, headers)


def client_of(scope: Scope) -> str:
    """Return the client's address, of IPv6 the network of 64 bits that one customer gets."""
    host = scope["client"][0] if scope.get("client") else ""
    if ":" in host:
        try:
            return str(ipaddress.ip_network((host.partition("%")[0], 64), strict=False))
        except ValueError:
            return host[:64]
    return host[:64]


class Guard:
    """ASGI middleware that answers what must not reach the routes, and bounds bodies while they arrive."""

    def __init__(
        self,
        app: ASGIApp,
        address: str = "127.0.0.1",
        allowed_hosts: Sequence[str] = (),
        token: Optional[str] = None,
        root_path: str = "",
    ):
        """Protect `app`, which is bound to `address`; `allowed_hosts` are further names that it is reached by."""
        self.app, self.token, self.root_path = app, token, root_path
        self.named = {name.lower().strip("[]") for name in allowed_hosts}
        self.hosts = {"localhost", address.lower(), *self.named}
        # No attacker's name resolves to a literal address, so any of this machine's is as good as the next.
        self.any_address = address in ("0.0.0.0", "::")
        self.held: Dict[str, int] = {}  # client → bytes of bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        body = Body(self.held, client_of(scope), MAX_BODY if scope["method"] == "POST" else SMALL_BODY)
        try:
            path = self.check(scope, headers)
            if path == self.root_path and path:
                await RedirectResponse(f"{path}/")(scope, receive, send)
                return
            body.check_size(int(headers.get(b"content-length", b"0")))

            async def receive_checked():
                message = await receive()
                body.add(message.get("body", b""))
                return message

            await self.app({**scope, "path": path, "root_path": self.root_path}, receive_checked, send)
        except HTTPException as refused:
            await refuse(refused.status_code, refused.detail, refused.headers)(scope, receive, send)
        finally:
            body.release()

    def check(self, scope: Scope, headers: Dict[bytes, bytes]) -> str:
        """Return the request's path below root_path; raise HTTPException if it is not served."""
        host = headers.get(b"host", b"").decode("latin-1").lower()
        if not self.is_allowed(host):
            raise HTTPException(421, "This host name is not served; --allowed-host permits it.")
        if scope["method"] not in ("GET", "HEAD"):
            origin = headers.get(b"origin", b"").decode("latin-1").lower()
            site = origin.partition("://")[2]
            if origin and site != host and hostname(site) not in self.named:
                raise HTTPException(403, "Requests from other web sites are not served.")
        path = scope["path"]
        if self.root_path and path != self.root_path and not path.startswith(f"{self.root_path}/"):
            path = self.root_path + path  # a proxy has cut the prefix off
        given = headers.get(b"authorization", b"")
        if self.token and path[len(self.root_path) :].startswith("/api/"):
            scheme, _, secret = given.partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(secret.strip(), self.token.encode()):
                raise HTTPException(401, "A valid token is needed.", {"WWW-Authenticate": "Bearer"})
        kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if scope["method"] == "POST" and "/api/" in path and kind != b"application/json":
            raise HTTPException(415, "The request's Content-Type must be application/json.")
        return path

    def is_allowed(self, host: str) -> bool:
        """Return whether a Host header names this server."""
        name = hostname(host)
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return name in self.hosts
        return self.any_address or address.is_loopback or name in self.hosts


class Body:
    """What has arrived of a request's body, at most `most` bytes, charged to its client in `held` if it is large."""

    def __init__(self, held: Dict[str, int], client: str, most: int):
        self.held, self.client, self.most = held, client, most
        self.size, self.charged = 0, 0
        self.signs: collections.Counter[int] = collections.Counter()

    def check_size(self, size: int) -> None:
        """Raise HTTPException if the body may not have this size."""
        if size > self.most:
            raise HTTPException(413, f"The request is too large; at most {self.most / 2**20:.2g} MB are accepted.")

    def add(self, part: bytes) -> None:
        """Count a part of the body; raise HTTPException if it is too much."""
        self.size += len(part)
        self.check_size(self.size)
        if self.size > SMALL_BODY:
            self.held[self.client] = self.held.get(self.client, 0) + self.size - self.charged
            self.charged = self.size
            if self.held[self.client] > MAX_BODIES // 4 or sum(self.held.values()) > MAX_BODIES:
                raise HTTPException(503, "Too many images are being uploaded at the moment; please try again soon.")
        self.signs.update({sign: part.count(sign) for sign in b",[{"})
        if max(self.signs.values()) > MAX_VALUES:
            raise HTTPException(400, "The request has too many values.")

    def release(self) -> None:
        if self.charged:
            self.held[self.client] -= self.charged
            if not self.held[self.client]:
                del self.held[self.client]


def hostname(netloc: str) -> str:
    """Return the name or address of "name:port", without brackets."""
    name = netloc.partition("]")[0][1:] if netloc.startswith("[") else netloc.partition(":")[0]
    return name.rstrip(".")
