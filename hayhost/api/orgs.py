"""Orgs and their installations."""

import hashlib
from collections.abc import Collection, Mapping
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from hayhost.answers import Answer
from hayhost.catalog import Plugin
from hayhost.configs import MASK, masked, sensitive_fields
from hayhost.errors import ConflictError, ExistsError, NotFoundError, RequestError
from hayhost.installs import Auth, Change, ToolLists
from hayhost.management import Management, Outcome, remove_org
from hayhost.store import Installed, Org, Store

from .decoding import if_match, if_none_match, must_be_new
from .operations import Operation, Request
from .views import (
    Given,
    InstallationPage,
    InstallationView,
    NewOrg,
    OrgName,
    OrgPage,
    OrgView,
    PageQuery,
    Patched,
    Restarted,
    ToValidate,
    Validated,
)

__all__ = ["Orgs", "installation_view", "org_view"]


class Orgs:
    """Answers for orgs and installations."""

    def __init__(self, store: Store, management: Management, plugins: Mapping[str, Plugin]) -> None:
        self._store = store
        self._management = management
        self._plugins = plugins

    def operations(self) -> list[Operation]:
        """What it answers."""
        org, one = "/orgs/{org}", "/orgs/{org}/plugins/{name}"
        installed = {200: InstallationView}
        change: dict[str, Any] = {"conditional": True, "changes_plugin": True}
        return [
            Operation("listOrgs", "GET", "/orgs", "List orgs", "admin", self._list, {200: OrgPage}, PageQuery),
            Operation(
                "createOrg",
                "POST",
                "/orgs",
                "Make an org",
                "admin",
                self._create,
                {201: OrgView, 409: None},
                body=NewOrg,
            ),
            Operation("getOrg", "GET", org, "Show an org", "org", self._get, {200: OrgView}, tagged=True),
            Operation(
                "putOrg",
                "PUT",
                org,
                "Make or rename an org",
                "admin",
                self._put,
                {200: OrgView, 201: OrgView},
                body=OrgName,
                body_optional=True,
                conditional=True,
            ),
            Operation(
                "patchOrg",
                "PATCH",
                org,
                "Rename an org",
                "admin",
                self._rename,
                {200: OrgView},
                body=OrgName,
                conditional=True,
            ),
            Operation(
                "deleteOrg", "DELETE", org, "Remove an org and all that it has", "admin", self._delete, {204: None}
            ),
            Operation(
                "getTools",
                "GET",
                org + "/tools",
                "Show which tools an org's MCP clients may use",
                "org",
                self._tools,
                {200: ToolLists},
                tagged=True,
            ),
            Operation(
                "putTools",
                "PUT",
                org + "/tools",
                "Say which tools an org's MCP clients may use",
                "admin",
                self._put_tools,
                {200: ToolLists},
                body=ToolLists,
                conditional=True,
            ),
            Operation(
                "listInstallations",
                "GET",
                org + "/plugins",
                "List the plugins of an org",
                "org",
                self._of_org,
                {200: InstallationPage},
                PageQuery,
            ),
            Operation(
                "listInstallationsOfPlugin",
                "GET",
                "/plugins/{name}/installations",
                "List the orgs that have a plugin",
                "admin",
                self._of_plugin,
                {200: InstallationPage},
                PageQuery,
            ),
            Operation("getInstallation", "GET", one, "Show an installation", "org", self._show, installed, tagged=True),
            Operation(
                "putInstallation",
                "PUT",
                one,
                "Install a plugin for an org, or change its settings",
                "org",
                self._install,
                {200: InstallationView, 201: InstallationView},
                body=Given,
                body_optional=True,
                **change,
            ),
            Operation(
                "patchInstallation",
                "PATCH",
                one,
                "Change some settings of an installation",
                "org",
                self._patch,
                installed,
                body=Patched,
                **change,
            ),
            Operation(
                "deleteInstallation", "DELETE", one, "Uninstall", "org", self._uninstall, {204: None}, conditional=True
            ),
            Operation("enable", "POST", one + "/enable", "Enable", "org", self._switch(True), installed, **change),
            Operation("disable", "POST", one + "/disable", "Disable", "org", self._switch(False), installed, **change),
            Operation(
                "restart",
                "POST",
                one + "/restart",
                "Exchange the worker for a new one",
                "org",
                self._restart,
                {200: Restarted},
                changes_plugin=True,
            ),
            Operation(
                "validate",
                "POST",
                one + "/validate",
                "Try settings and credentials, and keep nothing",
                "org",
                self._validate,
                {200: Validated},
                body=ToValidate,
                body_optional=True,
                changes_plugin=True,
            ),
        ]

    # ---- orgs

    async def _list(self, request: Request) -> Answer:
        page = await self._store.orgs.list(request.query.after, request.query.limit)
        return Answer(200, OrgPage(items=[org_view(org) for org in page.items], next=page.next))

    async def _create(self, request: Request) -> Answer:
        made = await self._store.orgs.create(request.body.id, request.body.name, actor=request.call.principal.actor)
        return _org_answer(201, made, {"Location": f"/api/v1/orgs/{made.id}"})

    async def _get(self, request: Request) -> Answer:
        answer = _org_answer(200, await self._store.orgs.get(request.params["org"]))
        return (
            Answer(304, None, answer.headers) if if_none_match(request.call.headers, answer.headers["ETag"]) else answer
        )

    async def _put(self, request: Request) -> Answer:
        org, name, headers = request.params["org"], request.body.name, request.call.headers
        if if_match(headers) is None:
            try:
                made = await self._store.orgs.create(org, name, actor=request.call.principal.actor)
                return _org_answer(201, made, {"Location": f"/api/v1/orgs/{org}"})
            except ExistsError as error:
                if must_be_new(headers):
                    raise ConflictError(str(error), 0) from None
        return await self._rename(request)

    async def _rename(self, request: Request) -> Answer:
        org, name, tags = request.params["org"], request.body.name, if_match(request.call.headers)
        try:
            before = await self._store.orgs.get(org)
        except NotFoundError as error:
            if tags is None:
                raise
            raise ConflictError(str(error), 0) from None
        if tags is not None and tags != ["*"] and _tag(before) not in tags:
            raise ConflictError(f"{org} was changed by somebody else meanwhile", 0)
        if name is None:
            return _org_answer(200, before)
        renamed = await self._store.orgs.rename(
            org, name, actor=request.call.principal.actor, if_name=before.name if tags is not None else None
        )
        return _org_answer(200, renamed)

    async def _delete(self, request: Request) -> Answer:
        org, actor = request.params["org"], request.call.principal.actor
        await remove_org(self._store, self._management, self._plugins, org, actor=actor)
        return Answer(204)

    async def _tools(self, request: Request) -> Answer:
        lists = await self._store.tools.get(request.params["org"])
        headers = {"ETag": _tag_of(lists)}
        return Answer(304, None, headers) if if_none_match(request.call.headers, headers["ETag"]) else _tools(lists)

    async def _put_tools(self, request: Request) -> Answer:
        org, tags, before = request.params["org"], if_match(request.call.headers), None
        if must_be_new(request.call.headers):
            raise ConflictError(f"{org} has lists of tools already, be they empty", 0)
        if tags is not None and tags != ["*"]:
            before = await self._store.tools.get(org)
            if _tag_of(before) not in tags:
                raise ConflictError(f"the tools of {org} were changed by somebody else meanwhile", 0)
        await self._store.tools.put(org, request.body, actor=request.call.principal.actor, if_lists=before)
        return _tools(request.body)

    # ---- installations

    def _plugin(self, request: Request) -> Plugin:
        plugin = self._plugins.get(request.params["name"])
        if plugin is None:
            raise RequestError("There is no plugin of this name", status=404)
        return plugin

    async def _of_org(self, request: Request) -> Answer:
        await self._store.orgs.get(request.params["org"])
        page = await self._store.installations.of_org(request.params["org"], request.query.after, request.query.limit)
        return Answer(200, InstallationPage(items=[self._view(item) for item in page.items], next=page.next))

    async def _of_plugin(self, request: Request) -> Answer:
        page = await self._store.installations.of_plugin(
            request.params["name"], request.query.after, request.query.limit
        )
        return Answer(200, InstallationPage(items=[self._view(item) for item in page.items], next=page.next))

    async def _show(self, request: Request) -> Answer:
        found = await self._store.installations.get(request.params["name"], request.params["org"])
        tag = f'"{found.revision}"'
        if if_none_match(request.call.headers, tag):
            return Answer(304, None, {"ETag": tag})
        return Answer(200, self._view(found), {"ETag": tag})

    async def _install(self, request: Request) -> Answer:
        return await self._change(request, patch=False)

    async def _patch(self, request: Request) -> Answer:
        await self._store.installations.get(request.params["name"], request.params["org"])
        return await self._change(request, patch=True)

    async def _change(self, request: Request, *, patch: bool) -> Answer:
        body, principal = request.body, request.call.principal
        change = Change(body.config, auth=body.auth, enabled=body.enabled, new_org=principal.org_id is None)
        return await self._put_change(request, change, patch=patch)

    async def _put_change(self, request: Request, change: Change, *, patch: bool) -> Answer:
        plugin, org = self._plugin(request), request.params["org"]
        revision = await self._revision(request)
        actor = request.call.principal.actor
        outcome = await self._management.put(plugin, org, change, actor=actor, if_revision=revision, patch=patch)
        return await self._changed(request, outcome)

    async def _changed(self, request: Request, outcome: Outcome) -> Answer:
        org, name = request.params["org"], request.params["name"]
        found = await self._store.installations.get(name, org)
        headers = {"ETag": f'"{found.revision}"'}
        if outcome.created:
            headers["Location"] = f"/api/v1/orgs/{org}/plugins/{name}"
        return Answer(201 if outcome.created else 200, self._view(found, outcome.hooks), headers)

    def _switch(self, enabled: bool) -> Any:
        async def switch(request: Request) -> Answer:
            await self._store.installations.get(request.params["name"], request.params["org"])
            return await self._put_change(request, Change(enabled=enabled), patch=True)

        return switch

    async def _uninstall(self, request: Request) -> Answer:
        name, org = request.params["name"], request.params["org"]
        revision, actor = await self._revision(request), request.call.principal.actor
        plugin = self._plugins.get(name)
        if plugin is not None:
            await self._management.remove(plugin, org, actor=actor, if_revision=revision)
        else:  # its plugin is not served any more, and has nothing to say about it
            await self._store.installations.delete(name, org, actor=actor, if_revision=revision)
        return Answer(204)

    async def _restart(self, request: Request) -> Answer:
        plugin, org = self._plugin(request), request.params["org"]
        await self._store.installations.get(plugin.name, org)
        return Answer(200, Restarted(restarted=await self._management.restart(plugin, org)))

    async def _validate(self, request: Request) -> Answer:
        plugin, org = self._plugin(request), request.params["org"]
        valid = await self._management.validate(plugin, org, request.body.config, request.body.auth)
        return Answer(200, Validated(valid=valid))

    async def _revision(self, request: Request) -> int | None:
        """The revision that the change was made from, as far as the client says."""
        if must_be_new(request.call.headers):
            return 0
        tags = if_match(request.call.headers)
        if tags is None:
            return None
        found = await self._store.installations.find(request.params["name"], request.params["org"])
        if found is None or (tags != ["*"] and f'"{found.revision}"' not in tags):
            what = f"{request.params['name']} of {request.params['org']}"
            raise ConflictError(f"{what} was changed by somebody else meanwhile", found.revision if found else 0)
        return found.revision if tags != ["*"] else None

    def _view(self, record: Installed, hooks: dict[str, str] | UnsetType = UNSET) -> InstallationView:
        plugin = self._plugins.get(record.plugin)
        sensitive = sensitive_fields(plugin.current.metadata) if plugin is not None and plugin.current else frozenset()
        slot = self._management.pool.find(plugin, record.org_id) if plugin is not None else None
        return installation_view(
            record,
            sensitive,
            slot.state.label if slot is not None else "stopped",
            slot.last_error if slot is not None else record.error,
            hooks,
        )


def installation_view(
    record: Installed, sensitive: Collection[str], state: str, error: str, hooks: dict[str, str] | UnsetType = UNSET
) -> InstallationView:
    """An installation as it is shown; ``sensitive`` fields of its config are masked, and what is encrypted."""
    shown = masked(record.installation(), {*sensitive, *record.sealed})
    config = {**shown.config, **dict.fromkeys(record.sealed, MASK)}
    auth = shown.auth
    if auth is None and record.auth_method is not None:  # a list, for which nothing was decrypted
        auth = Auth(record.auth_method, {})
    return InstallationView(
        org=record.org_id,
        plugin=record.plugin,
        enabled=record.enabled,
        config=config,
        auth=auth,
        auth_validity=record.auth_validity,
        state=state,
        error=error or None,
        revision=record.revision,
        created=record.created,
        updated=record.updated,
        hooks=hooks,
    )


def org_view(org: Org) -> OrgView:
    """An org as it is shown."""
    return OrgView(id=org.id, name=org.name, created=org.created)


def _tag(org: Org) -> str:
    return _hashed(org.name.encode())


def _tag_of(lists: ToolLists) -> str:
    return _hashed(msgspec.json.encode(lists))


def _hashed(content: bytes) -> str:
    return f'"{hashlib.sha256(content).hexdigest()[:16]}"'


def _tools(lists: ToolLists) -> Answer:
    return Answer(200, lists, {"ETag": _tag_of(lists)})


def _org_answer(status: int, org: Org, headers: Mapping[str, str] | None = None) -> Answer:
    return Answer(status, org_view(org), {"ETag": _tag(org), **(headers or {})})
