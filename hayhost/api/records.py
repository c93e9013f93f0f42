"""Tokens and the audit log."""

from hayhost.answers import Answer
from hayhost.errors import RequestError
from hayhost.store import AuditEntry, Store, Token

from .operations import Operation, Request
from .views import (
    AuditPage,
    AuditQuery,
    AuditView,
    NewToken,
    TokenMade,
    TokenPage,
    TokenQuery,
    TokenView,
)

__all__ = ["Records", "audit_view", "token_view"]


class Records:
    """Answers for tokens and the audit log."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def operations(self) -> list[Operation]:
        """What it answers."""
        return [
            Operation(
                "listTokens", "GET", "/tokens", "List tokens", "admin", self._tokens, {200: TokenPage}, TokenQuery
            ),
            Operation(
                "createToken",
                "POST",
                "/tokens",
                "Make a token; the first one closes the management of this host to all others",
                "admin",
                self._create,
                {201: TokenMade, 404: None},
                body=NewToken,
            ),
            Operation("revokeToken", "DELETE", "/tokens/{token}", "Revoke a token", "admin", self._revoke, {204: None}),
            Operation(
                "listAudit", "GET", "/audit", "Read the audit log", "any", self._audit, {200: AuditPage}, AuditQuery
            ),
        ]

    async def _tokens(self, request: Request) -> Answer:
        query = request.query
        page = await self._store.tokens.list(query.after, query.limit, org=query.org)
        return Answer(200, TokenPage(items=[token_view(token) for token in page.items], next=page.next))

    async def _create(self, request: Request) -> Answer:
        body = request.body
        token, secret = await self._store.tokens.create(
            body.name, actor=request.call.principal.actor, org=body.org, expires=body.expires
        )
        return Answer(201, TokenMade(token=token_view(token), secret=secret))

    async def _revoke(self, request: Request) -> Answer:
        await self._store.tokens.revoke(request.params["token"], actor=request.call.principal.actor)
        return Answer(204)

    async def _audit(self, request: Request) -> Answer:
        query, own = request.query, request.call.principal.org_id
        if query.org is not None and not request.call.principal.may(query.org):
            raise RequestError("The token is good for another organisation only", status=403)
        page = await self._store.audit.list(
            query.before,
            query.limit,
            org=query.org if own is None else own,
            plugin=query.plugin,
            actor=query.actor,
            action=query.action,
        )
        return Answer(200, AuditPage(items=[audit_view(entry) for entry in page.items], next=page.next))


def token_view(token: Token) -> TokenView:
    """A token as it is shown."""
    return TokenView(
        id=token.id,
        name=token.name,
        org=token.org_id,
        created=token.created,
        last_used=token.last_used,
        expires=token.expires,
        revoked=token.revoked,
    )


def audit_view(entry: AuditEntry) -> AuditView:
    """An entry as it is shown."""
    return AuditView(
        id=entry.id,
        at=entry.at,
        actor=entry.actor,
        action=entry.action,
        org=entry.org_id,
        plugin=entry.plugin,
        outcome=entry.outcome,
        details=entry.details,
    )
