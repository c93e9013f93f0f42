"""The OpenAPI 3.1 document, made from the table of operations."""

from collections.abc import Iterable
from typing import Any, Final

import msgspec

from hayhost import __version__
from hayhost.installs import ToolLists

from .decoding import TAGS
from .operations import PARAMETERS, Operation
from .views import ErrorView, InstallationView, InvalidView, OrgView, TokenMade

__all__ = ["document"]

_REF: Final = "#/components/schemas/{name}"
_WORDS: Final = {
    200: "Done.",
    201: "Made.",
    204: "Done; there is nothing to say.",
    302: "Go on there.",
    304: "The client has it already.",
    400: "The request is malformed.",
    401: "A bearer token is needed, or this is not a good one.",
    403: "The token is not good for this, or the request comes from another origin.",
    404: "There is no such thing.",
    409: "It is there already, or cannot be done now.",
    412: "Somebody else changed it meanwhile; nothing was changed.",
    413: "The body is too large.",
    415: "The body is of another type.",
    422: "Fields are wrong; each is named.",
    502: "The provider does not answer as it should.",
    503: "It cannot be done now; try again.",
}
# What an answer is good for next: the parameters of paths that are in it, as JSON pointers.
_GIVES: Final[dict[Any, dict[str, str]]] = {
    OrgView: {"org": "/id"},
    InstallationView: {"org": "/org", "name": "/plugin"},
    TokenMade: {"token": "/token/id"},
}
_TAGGED: Final = (OrgView, InstallationView, ToolLists)


def document(operations: Iterable[Operation], *, closed: bool) -> dict[str, Any]:
    """The document that describes ``operations``. A host is ``closed`` to those without a token once there is one."""
    operations = list(operations)
    forms = [
        form
        for operation in operations
        for form in (*operation.answers.values(), operation.body)
        if form is not None and form is not bytes
    ]
    _, components = msgspec.json.schema_components([*forms, ErrorView, InvalidView], ref_template=_REF)
    paths: dict[str, Any] = {}
    for operation in operations:
        described = _operation(operation, operations, closed)
        paths.setdefault("/api/v1" + operation.path, {})[operation.method.lower()] = described
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "hayhost",
            "version": __version__,
            "description": "Manages a host of plugins: orgs, what they have installed, and what runs.",
        },
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {
                "bearer": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "Needed as soon as a token exists. An org's token is good for that org only.",
                }
            },
        },
    }


def _operation(operation: Operation, others: list[Operation], closed: bool) -> dict[str, Any]:
    # Without a token there is nobody to ask for one. In OpenAPI 3.1 a bearer may be asked for a role.
    needed = [{"bearer": ["admin"] if operation.scope == "admin" else []}, *([] if closed else [{}])]
    described: dict[str, Any] = {
        "operationId": operation.id,
        "summary": operation.summary,
        "parameters": _parameters(operation),
        "responses": _responses(operation, others),
        "security": [] if operation.scope == "open" else needed,
    }
    if operation.body is not None:
        schema = msgspec.json.schema_components([operation.body], ref_template=_REF)[0][0]
        described["requestBody"] = {
            "required": not operation.body_optional,
            "content": {"application/json": {"schema": schema}},
        }
    return described


def _parameters(operation: Operation) -> list[dict[str, Any]]:
    parameters: list[dict[str, Any]] = []
    for name, (pattern, text) in PARAMETERS.items():
        if f"{{{name}}}" in operation.path:
            schema = {"type": "string", "pattern": f"^{pattern}$"}
            parameters.append({"name": name, "in": "path", "required": True, "description": text, "schema": schema})
    if operation.query is not None:
        for field in msgspec.structs.fields(operation.query):
            schema = msgspec.json.schema(field.type)
            choices: Any = schema.get("anyOf", [])
            schema = next((one for one in choices if one != {"type": "null"}), schema)  # left out is null here
            parameters.append({"name": field.encode_name, "in": "query", "required": False, "schema": schema})
    if operation.conditional:
        text = "The `ETag` of what the change was made from, or `*`: of something that is there."
        parameters.append(_header("If-Match", TAGS, text))
        if operation.method == "PUT":
            parameters.append(_header("If-None-Match", r"^\*$", "Only if there is none yet."))
    elif operation.tagged:
        text = "The `ETag` of what the client has; if it is still so, the answer is 304."
        parameters.append(_header("If-None-Match", TAGS, text))
    return parameters


def _header(name: str, pattern: str, text: str) -> dict[str, Any]:
    schema = {"type": "string", "pattern": pattern}
    return {"name": name, "in": "header", "required": False, "description": text, "schema": schema}


def _responses(operation: Operation, others: list[Operation]) -> dict[str, Any]:
    responses: dict[str, Any] = {}
    for status, form in operation.answers.items():
        responses[str(status)] = _response(status, form, operation.media)
        if status == 201 and (links := _links(form, others)):
            responses[str(status)]["links"] = links
    errors = {400, 403, 422, 503}
    if operation.scope != "open":
        errors |= {401}
    if "{" in operation.path or operation.body is not None:
        errors |= {404}
    if operation.body is not None:
        errors |= {413, 415}
    if operation.conditional:
        errors |= {412}
    for status in errors - operation.answers.keys():
        responses[str(status)] = _response(status, InvalidView if status == 422 else ErrorView, "application/json")
    if operation.tagged:
        responses["304"] = {"description": _WORDS[304], "headers": {"ETag": _ETAG}}
    return dict(sorted(responses.items()))


def _links(form: Any, others: list[Operation]) -> dict[str, Any]:
    given = _GIVES.get(form, {})
    parameters = {name: f"$response.body#{pointer}" for name, pointer in given.items()}
    return {
        other.id: {"operationId": other.id, "parameters": parameters}
        for other in others
        if given and all(f"{{{name}}}" in other.path for name in given)
    }


_ETAG: Final = {"description": "Of the installation, org or lists as they are now.", "schema": {"type": "string"}}
_HEADERS: Final[dict[int, dict[str, Any]]] = {
    401: {"WWW-Authenticate": {"description": "`Bearer`, and what was wrong.", "schema": {"type": "string"}}},
    503: {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer"}}},
}


def _response(status: int, form: Any, media: str) -> dict[str, Any]:
    described: dict[str, Any] = {"description": _WORDS[status]}
    if form is None and status >= 400:
        form = ErrorView
    if form is bytes:
        described["content"] = {media: {"schema": {"type": "string"}}}
        if status >= 400:  # what is refused before it is looked at is refused as everywhere else
            described["content"] |= _response(status, ErrorView, "application/json")["content"]
    elif form is not None:
        schema = msgspec.json.schema_components([form], ref_template=_REF)[0][0]
        described["content"] = {media: {"schema": schema}}
    headers = dict(_HEADERS.get(status, {}))
    if form in _TAGGED:
        headers["ETag"] = _ETAG
        if status == 201:
            headers["Location"] = {"description": "Its path.", "schema": {"type": "string"}}
    if headers:
        described["headers"] = headers
    return described
