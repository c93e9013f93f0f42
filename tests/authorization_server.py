"""An authorization server on loopback: Authlib's, behind a real HTTP server, with PKCE and rotating refresh tokens."""

import http.client
import json
import ssl
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import trustme
from authlib.common.security import generate_token
from authlib.oauth2.rfc6749 import AuthorizationCodeMixin, AuthorizationServer, ClientMixin, OAuth2Request, TokenMixin
from authlib.oauth2.rfc6749.grants import AuthorizationCodeGrant, RefreshTokenGrant
from authlib.oauth2.rfc6749.requests import BasicOAuth2Payload
from authlib.oauth2.rfc6750 import BearerTokenGenerator
from authlib.oauth2.rfc7636 import CodeChallenge

from .conftest import LIMIT
from .networking import Names

__all__ = ["CLIENT_ID", "HOST", "REDIRECT", "SECRET", "Provider"]

HOST = "auth.test"
CLIENT_ID = "the-client"
SECRET = "client-5ecret+/="
REDIRECT = "https://hay.example/callback"


class _Client(ClientMixin):  # type: ignore[misc]
    def __init__(self, methods: set[str], redirect: str) -> None:
        self.client_id, self.methods, self.redirect = CLIENT_ID, methods, redirect

    def get_client_id(self) -> str:
        return self.client_id

    def get_default_redirect_uri(self) -> str:
        return self.redirect

    def get_allowed_scope(self, scope: str | None) -> str:
        return scope or ""

    def check_redirect_uri(self, redirect_uri: str) -> bool:
        return redirect_uri == self.redirect

    def check_client_secret(self, client_secret: str) -> bool:
        return client_secret == SECRET

    def check_endpoint_auth_method(self, method: str, endpoint: str) -> bool:
        return method in self.methods

    def check_response_type(self, response_type: str) -> bool:
        return response_type == "code"

    def check_grant_type(self, grant_type: str) -> bool:
        return True


class _Code(AuthorizationCodeMixin):  # type: ignore[misc]
    def __init__(self, request: Any) -> None:
        payload = request.payload
        self.redirect_uri, self.scope = payload.redirect_uri, request.scope
        self.code_challenge = payload.data.get("code_challenge")
        self.code_challenge_method = payload.data.get("code_challenge_method")

    def get_redirect_uri(self) -> str:
        return str(self.redirect_uri)

    def get_scope(self) -> str:
        return str(self.scope)


class _Issued(TokenMixin):  # type: ignore[misc]
    def __init__(self, scope: str) -> None:
        self.scope = scope

    def check_client(self, client: Any) -> bool:
        return True

    def get_scope(self) -> str:
        return self.scope


class _Request(OAuth2Request):  # type: ignore[misc]
    def __init__(self, method: str, path: str, headers: dict[str, str], body: str) -> None:
        super().__init__(method, f"https://{HOST}{path}", headers=headers)
        values = {**parse_qs(urlsplit(path).query), **parse_qs(body)}
        self.payload = BasicOAuth2Payload({key: value[0] for key, value in values.items()})

    @property
    def form(self) -> dict[str, str]:
        return dict(self.payload.data)


class _CodeGrant(AuthorizationCodeGrant):  # type: ignore[misc]
    TOKEN_ENDPOINT_AUTH_METHODS = ["client_secret_basic", "client_secret_post", "none"]

    def save_authorization_code(self, code: str, request: Any) -> None:
        self.server.provider.codes[code] = _Code(request)

    def query_authorization_code(self, code: str, client: Any) -> _Code | None:
        found: _Code | None = self.server.provider.codes.pop(code, None)  # good for one try
        return found

    def delete_authorization_code(self, authorization_code: _Code) -> None:
        pass

    def authenticate_user(self, authorization_code: _Code) -> str:
        return "somebody"


class _RefreshGrant(RefreshTokenGrant):  # type: ignore[misc]
    TOKEN_ENDPOINT_AUTH_METHODS = ["client_secret_basic", "client_secret_post", "none"]

    @property
    def INCLUDE_NEW_REFRESH_TOKEN(self) -> bool:
        return bool(self.server.provider.rotating)

    def authenticate_refresh_token(self, refresh_token: str) -> _Issued | None:
        provider = self.server.provider
        provider.used.append(refresh_token)
        if (found := provider.tokens.get(refresh_token)) is None:
            provider.tokens.clear()  # somebody has stolen one
        if provider.rotating:
            provider.tokens.pop(refresh_token, None)
        return found  # type: ignore[no-any-return]

    def authenticate_user(self, refresh_token: _Issued) -> str:
        return "somebody"

    def revoke_old_credential(self, refresh_token: _Issued) -> None:
        pass


class _Server(AuthorizationServer):  # type: ignore[misc]
    def __init__(self, provider: "Provider") -> None:
        super().__init__()
        self.provider = provider

    def query_client(self, client_id: str) -> _Client | None:
        return _Client(self.provider.client_methods, self.provider.redirect) if client_id == CLIENT_ID else None

    def save_token(self, token: dict[str, Any], request: Any) -> None:
        if "refresh_token" in token:
            self.provider.tokens[token["refresh_token"]] = _Issued(token.get("scope") or "")

    def create_oauth2_request(self, request: _Request) -> _Request:
        return request

    def handle_response(self, status: int, body: Any, headers: Any) -> tuple[int, Any, list[tuple[str, str]]]:
        return status, body, list(headers)

    def send_signal(self, name: str, *args: Any, **kwargs: Any) -> None:
        pass


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    provider: "Provider"

    def do_GET(self) -> None:
        self._answer(self.provider.server.create_authorization_response, grant_user="somebody")

    def do_POST(self) -> None:
        self._answer(self.provider.server.create_token_response)

    def _answer(self, create: Callable[..., Any], **options: Any) -> None:
        provider = self.provider
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        request = _Request(self.command, self.path, dict(self.headers.items()), body)
        provider.requests.append((self.command, self.path, dict(self.headers.items()), body))
        if self.command == "POST" and provider.instead is not None:
            provider.instead(self)
            return
        with provider.lock:
            if self.command == "GET":
                options["grant"] = provider.server.get_authorization_grant(request)
                if provider.denies:
                    options["grant_user"] = None
            status, answer, headers = create(request, **options)
        if isinstance(answer, dict) and "access_token" in answer:
            answer = {key: value for key, value in {**answer, **provider.changes}.items() if value is not None}
            with provider.lock:
                provider.issued.append(dict(answer))
        self.send(status, json.dumps(answer) if isinstance(answer, dict) else answer, headers)

    def send(self, status: int, body: str = "", headers: list[tuple[str, str]] | None = None) -> None:
        encoded = body.encode()
        self.send_response(status)
        for name, value in headers or []:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(encoded)))
        self.end_headers()
        self.wfile.write(encoded)

    def log_message(self, *_: Any) -> None:
        pass


class _HTTPServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def __init__(self, provider: "Provider", context: ssl.SSLContext | None) -> None:
        super().__init__(("127.0.0.1", 0), type("Handler", (_Handler,), {"provider": provider}))
        self.context = context
        self.thread = threading.Thread(target=self.serve_forever, args=(0.02,))
        self.thread.start()

    def finish_request(self, request: Any, client_address: Any) -> None:
        if self.context is None:
            super().finish_request(request, client_address)
            return
        request.settimeout(LIMIT)
        with self.context.wrap_socket(request, server_side=True) as wrapped:
            super().finish_request(wrapped, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that goes away is part of a test

    def close(self) -> None:
        self.shutdown()
        self.server_close()
        self.thread.join()


class Provider:
    """The server, with TLS as ``auth.test:port`` and without as ``plain``, and the names and the CA that it needs."""

    def __init__(self, folder: Path) -> None:
        self.lock = threading.Lock()
        self.codes: dict[str, _Code] = {}
        self.tokens: dict[str, _Issued] = {}
        self.used: list[str] = []
        """The refresh tokens that were used, in turn."""
        self.issued: list[dict[str, Any]] = []
        self.requests: list[tuple[str, str, dict[str, str], str]] = []
        self.client_methods = {"client_secret_basic"}
        self.redirect = REDIRECT
        """Where it sends browsers back to."""
        self.rotating = True
        self.denies = False
        self.expires_in = 3_600
        self.changes: dict[str, Any] = {}
        """What is different in answers with tokens; ``None`` leaves out."""
        self.instead: Callable[[_Handler], None] | None = None
        """What answers token requests in place of the server."""
        self.released = threading.Event()
        self.server = _Server(self)
        generator = BearerTokenGenerator(
            lambda **_: f"access-{generate_token(20)}",
            lambda **_: f"refresh-{generate_token(20)}",
            lambda *_: self.expires_in,
        )
        self.server.register_token_generator("default", generator)
        self.server.register_grant(_CodeGrant, [CodeChallenge(required=True)])
        self.server.register_grant(_RefreshGrant)
        authority = trustme.CA()
        self.ca = folder / "authority.pem"
        authority.cert_pem.write_to_path(self.ca)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert(HOST, "rebind.test").configure_cert(context)
        self.names = Names()
        for name in (HOST, "other.test"):
            self.names.set(name, "127.0.0.1")
        self._servers = [_HTTPServer(self, context), _HTTPServer(self, None)]
        self.port, self.plain = (server.server_address[1] for server in self._servers)

    @property
    def nameserver(self) -> str:
        return f"127.0.0.1:{self.names.port}"

    def url(self, path: str, host: str = HOST) -> str:
        return f"https://{host}:{self.port}{path}"

    def secrets(self) -> set[str]:
        """Everything that nobody may say."""
        issued = {token[key] for token in self.issued for key in ("access_token", "refresh_token") if key in token}
        return {SECRET, *issued, *self.used}

    def issue(self, scope: str = "read") -> dict[str, Any]:
        """Credentials as if somebody had authorized them, that have expired already."""
        refresh = f"refresh-{generate_token(20)}"
        with self.lock:
            self.tokens[refresh] = _Issued(scope)
        access = f"access-{generate_token(20)}"
        credentials = {"accessToken": access, "refreshToken": refresh, "tokenType": "Bearer"}
        self.issued.append({"access_token": access, "refresh_token": refresh})
        return {**credentials, "expiresAt": int(time.time()) - 1, "scope": scope}

    def browse(self, url: str) -> dict[str, list[str]]:
        """What a browser is sent back with from the authorization endpoint."""
        return parse_qs(urlsplit(self.sends_to(url)).query)

    def sends_to(self, url: str) -> str:
        """Where a browser is sent from the authorization endpoint."""
        parts = urlsplit(url)
        connection = http.client.HTTPConnection("127.0.0.1", self.plain, timeout=LIMIT)
        try:
            connection.request("GET", f"{parts.path}?{parts.query}", headers={"Host": HOST})
            answer = connection.getresponse()
            answer.read()
        finally:
            connection.close()
        location = answer.headers["Location"]
        assert location.startswith(self.redirect), (answer.status, location)
        return location

    def hang(self, handler: _Handler) -> None:
        """Answer nothing before ``released``."""
        self.released.wait(LIMIT)

    def close(self) -> None:
        self.released.set()
        for server in self._servers:
            server.close()
        self.names.close()
