"""The management API, ``/api/v1``: what a host's operator, and an org's admin, may ask and order."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import msgspec

from hayhost.access import Access
from hayhost.answers import Answer, Call, Handler
from hayhost.catalog import Plugin
from hayhost.errors import RequestError
from hayhost.events import Events
from hayhost.logs import Log
from hayhost.management import Management

from .decoding import read_body, read_query
from .logs import Logs
from .openapi import document
from .operations import Operation, Request, pattern_of
from .overview import Overview
from .running import Running

if TYPE_CHECKING:
    from hayhost.oauth import Authorizations
    from hayhost.store import Store

__all__ = ["Api", "Endpoint"]

_ROOT: Final = "/api/v1"


class Endpoint:
    """What answers one path: handlers by method, and whether they are open to all, or to a browser on its way.

    ``route`` is the template of all paths like it.
    """

    def __init__(self, operations: Mapping[str, Operation], params: Mapping[str, str]) -> None:
        self.methods: dict[str, Handler] = {
            method: self._handler(operation, params) for method, operation in operations.items()
        }
        self.route = _ROOT + next(iter(operations.values())).path
        self.open = all(operation.scope == "open" for operation in operations.values())
        self.navigation = any(operation.navigation for operation in operations.values())

    @staticmethod
    def _handler(operation: Operation, params: Mapping[str, str]) -> Handler:
        async def handle(call: Call) -> Answer:
            principal = call.principal
            if operation.scope == "admin" and principal.org_id is not None:
                raise RequestError("This needs an admin's token", status=403)
            known = operation.scope == "org" or principal.org_id  # what is open is not, to those who are of another org
            if "org" in params and known and not principal.may(params["org"]):
                raise RequestError("The token is good for another organisation only", status=403)
            query = None if operation.any_query else read_query(call.query, operation.query or _Nothing)
            body: Any = None
            if operation.body is not None:
                body = (
                    operation.body()
                    if operation.body_optional and not call.body
                    else read_body(call.headers, call.body, operation.body)
                )
            return await operation.run(Request(call, params, query, body))

        return handle


class Api:
    """Finds what answers a path of the API. Without a store, there are only operations for what runs."""

    def __init__(
        self,
        management: Management,
        plugins: Mapping[str, Plugin],
        events: Events,
        access: Access,
        log: Log,
        store: "Store | None" = None,
        authorizations: "Authorizations | None" = None,
        unserved: Mapping[Path, list[str]] = MappingProxyType({}),
    ) -> None:
        """``unserved`` are folders that are no plugins of the host's, with every reason."""
        operations = [*Running(management.pool, plugins, events, access).operations(), *Logs(log, access).operations()]
        operations += Overview(management.pool, plugins, unserved, store).operations()
        if store is not None:
            from .oauth import OAuthFlows
            from .orgs import Orgs
            from .records import Records

            operations += [*Orgs(store, management, plugins).operations(), *Records(store).operations()]
            if authorizations is not None:
                operations += OAuthFlows(store, management, plugins, authorizations).operations()
        described = Operation(
            "openapi", "GET", "/openapi.json", "This document", "open", self._describe, {200: dict[str, Any]}
        )
        self._operations = [*operations, described]
        self._documents: dict[bool, dict[str, Any]] = {}
        self._store = store
        paths: dict[str, dict[str, Operation]] = {}
        for operation in self._operations:
            paths.setdefault(operation.path, {})[operation.method] = operation
        self._paths = [(pattern_of(_ROOT + path), methods) for path, methods in paths.items()]

    def find(self, path: str) -> Endpoint | None:
        """What answers ``path``, if anything does."""
        for pattern, methods in self._paths:
            if (found := pattern.fullmatch(path)) is not None:
                return Endpoint(methods, found.groupdict())
        return None

    async def _describe(self, _request: Request) -> Answer:
        closed = self._store is not None and await self._store.tokens.exist()
        if closed not in self._documents:
            self._documents[closed] = document(self._operations, closed=closed)
        return Answer(200, self._documents[closed])


class _Nothing(msgspec.Struct):
    """A query string without parameters."""
