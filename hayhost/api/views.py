"""What the management API takes and gives, as JSON. No secret is in any of it, but for a new token's own."""

import datetime as dt
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType, field

from hayhost.installs import Auth, AuthValidity
from hayhost.metrics.histogram import Latency
from hayhost.names import ORG_ID, PLUGIN_NAME
from hayhost.problems import Severity

__all__ = [
    "SINCE",
    "AuditPage",
    "AuditQuery",
    "DoctorQuery",
    "DoctorView",
    "ErrorView",
    "FieldError",
    "Given",
    "HostView",
    "InstallationPage",
    "InstallationView",
    "InvalidView",
    "LogPage",
    "LogQuery",
    "LogStreamQuery",
    "LogView",
    "NewOrg",
    "NewToken",
    "OAuthQuery",
    "OAuthStarted",
    "OrgName",
    "OrgPage",
    "OrgView",
    "PageQuery",
    "Patched",
    "PluginList",
    "PluginView",
    "ProblemList",
    "ProblemView",
    "Restarted",
    "ToValidate",
    "TokenMade",
    "TokenPage",
    "TokenQuery",
    "TokenView",
    "Validated",
    "WorkerPage",
    "WorkerQuery",
    "WorkerView",
]

Limit = Annotated[int, Meta(ge=1, le=1000, description="Items at most.")]
After = Annotated[str, Meta(max_length=200, pattern=r"^[^\x00]*$", description="`next` of the page before.")]
Name = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=200,
        pattern=r"^[^\x00-\x1f\x7f-\x9f\u2028\u2029]*[^\s\x00-\x1f\x7f-\x9f][^\x00-\x1f\x7f-\x9f\u2028\u2029]*$",
        description="For people; no control characters.",
    ),
]
OrgId = Annotated[str, Meta(pattern=f"^{ORG_ID.pattern}$")]
PluginName = Annotated[str, Meta(pattern=f"^{PLUGIN_NAME.pattern}$")]


class _View(msgspec.Struct, frozen=True, rename="camel", kw_only=True, forbid_unknown_fields=True):
    pass


class ErrorView(_View, frozen=True):
    """What went wrong, in one sentence."""

    error: str


class FieldError(_View, frozen=True):
    """What is wrong with one field, such as `config.apiKey`."""

    field: str
    message: str


class InvalidView(_View, frozen=True):
    """Everything that is wrong with a request."""

    error: str
    errors: list[FieldError] = []


class PageQuery(_View, frozen=True):
    """Which part of a list."""

    after: After = ""
    limit: Limit = 100


class OrgView(_View, frozen=True):
    """An organisation."""

    id: OrgId
    name: str
    created: dt.datetime


class OrgPage(_View, frozen=True):
    """Orgs by id; `next` is what to pass as `after` for those that follow."""

    items: list[OrgView]
    next: str | None


class NewOrg(_View, frozen=True):
    """An org to be made. Without a name it is called by its id."""

    id: OrgId
    name: Name | None = None


class OrgName(_View, frozen=True):
    """What an org is called."""

    name: Name | None = None


class Given(_View, frozen=True):
    """An installation as it should be. What is left out stays as it is.

    A secret that is `********` stays as it is, too. `auth: null` removes the credentials.
    """

    config: dict[str, Any] | UnsetType = UNSET
    auth: Auth | UnsetType | None = UNSET
    enabled: bool | UnsetType = UNSET


class Patched(_View, frozen=True):
    """Changes to an installation: fields of `config` are merged into the stored ones, and `null` removes one."""

    config: dict[str, Any] | UnsetType = UNSET
    auth: Auth | UnsetType | None = UNSET
    enabled: bool | UnsetType = UNSET


class ToValidate(_View, frozen=True):
    """Settings to be tried; what is left out is taken from what is stored."""

    config: dict[str, Any] | None = None
    auth: Auth | None = None


class Validated(_View, frozen=True):
    """Whether the plugin accepts the credentials with these settings."""

    valid: bool


class OAuthQuery(_View, frozen=True):
    """Which of the plugin's auth methods; by default its first with OAuth2."""

    method: Annotated[str, Meta(min_length=1, max_length=200)] | None = None


class OAuthStarted(_View, frozen=True):
    """Where to send the browser that asked: it has a cookie now by which it is known when it comes back."""

    authorization_url: str


class InstallationView(_View, frozen=True):
    """One plugin of one org. Secrets are `********`.

    `state` is what its worker does now, `error` why it does not do better. After a change, `hooks` has the plugin's
    lifecycle hooks that failed, each with its reason; the change stands.
    """

    org: OrgId
    plugin: PluginName
    enabled: bool
    config: dict[str, Any]
    auth: Auth | None
    auth_validity: AuthValidity
    state: str
    error: str | None
    revision: int
    created: dt.datetime
    updated: dt.datetime
    hooks: dict[str, str] | UnsetType = UNSET


class InstallationPage(_View, frozen=True):
    """Installations, by plugin or org; `next` is what to pass as `after` for those that follow."""

    items: list[InstallationView]
    next: str | None


class Restarted(_View, frozen=True):
    """Whether the new worker started. If there was no worker, there is none now: the next request starts one."""

    restarted: bool


class VersionView(_View, frozen=True):
    """A loaded version of a plugin; `digest` is of its folder's content."""

    version: str
    digest: str
    loaded_at: float


class LoadView(_View, frozen=True):
    """One load of a plugin, and what came of it."""

    at: float
    action: str
    digest: str
    version: str
    ms: float
    error: str = ""
    changes: list[str] = []


class PluginView(_View, frozen=True):
    """A plugin that the host serves, or fails to: `error` and `traceback` say why the content on disk is not served.

    `metadata` is what its workers answer at `/metadata`, without what is running. `fromEnv` names the config fields
    that have a value from the host's environment where an org gives none.
    """

    name: PluginName
    display_name: str
    category: str
    capabilities: list[str]
    permissions: dict[str, Any]
    env: list[str]
    from_env: list[str]
    warnings: list[str]
    state: str
    error: str | None
    traceback: str | None
    current: VersionView | None
    previous: VersionView | None
    workers: int
    metadata: dict[str, Any] | None
    history: list[LoadView]


class PluginList(_View, frozen=True):
    """All plugins, by name."""

    items: list[PluginView]


class HostView(_View, frozen=True):
    """What the host is and does, and who asks: counts are of what concerns them.

    `actor` is how they are named in the audit log; `org` the only org that they may manage. Without a `store` every org
    is known, and nothing is kept. `open`: nobody needs a token, as there is none.
    """

    version: str
    mode: str
    store: bool
    open: bool
    actor: str
    org: OrgId | None
    isolation: str
    started: float
    max_workers: int
    plugins: dict[str, int]
    workers: dict[str, int]
    requests: int
    errors: int
    in_flight: int
    waiting: int
    restarts: int


class ProblemView(_View, frozen=True):
    """One thing that is wrong now: why, since when (seconds since 1970) and what to do about it.

    It concerns `count` of the plugin's orgs, some of which are `orgs`; the plugin or the host as a whole if that is 0.
    """

    kind: str
    severity: Severity
    title: str
    why: str
    remedy: str
    since: float | None
    plugin: PluginName | None
    orgs: list[OrgId]
    count: int


class ProblemList(_View, frozen=True):
    """What is wrong, the worst first."""

    items: list[ProblemView]


class DoctorQuery(_View, frozen=True):
    """How many seconds old the report may be."""

    max_age: Annotated[int, Meta(ge=10, le=86_400)] = 3_600


class LayerView(_View, frozen=True):
    """A layer of isolation, and what to do if the machine does not give it."""

    layer: str
    about: str
    in_force: bool
    problem: str | None
    remedy: str | None


class CanaryView(_View, frozen=True):
    """Something that a worker must not do, and what refused it; `null`: it succeeded."""

    attempt: str
    refused: str | None


class DoctorView(_View, frozen=True):
    """What isolation the machine gives, tried for real. `level` is what it amounts to, `required` what must be had,
    `programsOffline` why programs that plugins start have no network; `null`: they may have one."""

    kernel: str
    machine: str
    python: str
    user: str
    landlock_abi: int
    required: str
    level: str
    ok: bool
    layers: list[LayerView]
    programs_offline: str | None
    canaries: list[CanaryView]
    error: str | None
    examined_at: float


class WorkerQuery(_View, frozen=True):
    """Which workers."""

    after: After = ""
    limit: Limit = 100
    plugin: PluginName | None = None
    org: OrgId | None = None
    memory: Annotated[bool, Meta(description="Whether to look at what processes take; it is what a page costs.")] = True


class WorkerView(_View, frozen=True):
    """The worker of an org's plugin, or why there is none. Sizes are in bytes, times in seconds since 1970.

    `errors` are answers with 5xx, and `latency` is of the time until answers began: both are of the org's requests over
    all its workers, until the plugin was last stopped for want of requests.
    """

    plugin: PluginName
    org: OrgId
    state: str
    since: float | None
    why: str | None
    pid: int | None
    version: str | None
    isolation: str | None
    requests: int
    in_flight: int
    waiting: int
    restarts: int
    errors: int
    latency: Latency
    started_at: float | None = field(name="started_at")
    rss: int | None
    pss: int | None
    private_dirty: int | None = field(name="private_dirty")
    cpu_seconds: float | None = field(name="cpu_seconds")
    last_error: str | None


class WorkerPage(_View, frozen=True):
    """Workers by plugin and org; `next` is what to pass as `after` for those that follow."""

    items: list[WorkerView]
    next: str | None


class TokenQuery(_View, frozen=True):
    """Which tokens."""

    after: After = ""
    limit: Limit = 100
    org: OrgId | None = None


class TokenView(_View, frozen=True):
    """A bearer token, without its secret. `org` is the only one that it is good for; `null`: it is an admin's."""

    id: str
    name: str
    org: OrgId | None
    created: dt.datetime
    last_used: dt.datetime | None
    expires: dt.datetime | None
    revoked: dt.datetime | None


class TokenPage(_View, frozen=True):
    """Tokens by id, revoked ones too; `next` is what to pass as `after` for those that follow."""

    items: list[TokenView]
    next: str | None


class NewToken(_View, frozen=True):
    """A token to be made: for an org or, without, for an admin."""

    name: Name
    org: OrgId | None = None
    expires: Annotated[dt.datetime, Meta(tz=True)] | None = None


class TokenMade(_View, frozen=True):
    """A new token. `secret` is shown this once."""

    token: TokenView
    secret: str


class AuditQuery(_View, frozen=True):
    """Which entries, the latest first. `before` is `next` of the page before."""

    before: Annotated[str, Meta(pattern=r"^[0-9]{1,18}$")] | None = None
    limit: Limit = 100
    org: OrgId | None = None
    plugin: PluginName | None = None
    actor: Annotated[str, Meta(max_length=200)] | None = None
    action: Annotated[str, Meta(max_length=100)] | None = None


class AuditView(_View, frozen=True):
    """Who did what to what, and how it ended. Never with a secret."""

    id: int
    at: dt.datetime
    actor: str
    action: str
    org: str | None
    plugin: str | None
    outcome: str
    details: dict[str, Any]


class AuditPage(_View, frozen=True):
    """Entries of the audit log, the latest first; `next` is what to pass as `before` for older ones."""

    items: list[AuditView]
    next: str | None


LogLevel = Literal["debug", "info", "warning", "error"]
LogId = Annotated[str, Meta(pattern=r"^[0-9]{1,18}$", description="The `id` of a record: those after it.")]
SINCE: Final = (
    r"^([0-9]{1,9}(ms|s|m|h|d|w)|"
    r"[1-9][0-9]{3}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])"
    r"([T ]([01][0-9]|2[0-3]):[0-5][0-9](:[0-5][0-9](\.[0-9]{1,6})?)?(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])?)?)$"
)
"""An age such as ``5m``, or a time as in RFC 3339, or the beginning of one."""

Since = Annotated[
    str,
    Meta(
        max_length=40,
        pattern=SINCE,
        description="Not older than this: an age such as `5m`, or a time as in RFC 3339 (in UTC).",
    ),
]
Found = Annotated[str, Meta(min_length=1, max_length=200, description="Is in the message, traceback or `meta`.")]


class LogQuery(_View, frozen=True):
    """Which records of the log: the latest, or those `after` one. `level` is the least."""

    after: LogId | None = None
    limit: Limit = 100
    plugin: PluginName | None = None
    org: OrgId | None = None
    worker: Annotated[int, Meta(ge=1, le=1 << 31)] | None = None
    level: LogLevel = "debug"
    since: Since | None = None
    request: Annotated[str, Meta(min_length=1, max_length=64)] | None = None
    q: Found | None = None


class LogStreamQuery(_View, frozen=True):
    """Which records of the log: new ones. With `after` or `since` those first that there are already, with `limit`
    the latest of them."""

    after: LogId | None = None
    limit: Limit | None = None
    plugin: PluginName | None = None
    org: OrgId | None = None
    worker: Annotated[int, Meta(ge=1, le=1 << 31)] | None = None
    level: LogLevel = "debug"
    since: Since | None = None
    request: Annotated[str, Meta(min_length=1, max_length=64)] | None = None
    q: Found | None = None


class LogView(_View, frozen=True):
    """A record of the log. `source` is who says so: the host, a plugin, or a worker's runtime; `worker` is a process
    id. `dropped` is how many before it were left out, because there were too many."""

    id: int
    time: str
    level: LogLevel
    event: str
    plugin: str | UnsetType = UNSET
    version: str | UnsetType = UNSET
    org: str | UnsetType = UNSET
    worker: int | UnsetType = UNSET
    request: str | UnsetType = UNSET
    source: Literal["host", "plugin", "worker"] = "host"
    meta: dict[str, Any] | UnsetType = UNSET
    traceback: str | UnsetType = UNSET
    dropped: int | UnsetType = UNSET


class LogPage(_View, frozen=True):
    """Records of the log, oldest first; `next` is what to pass as `after` for those that follow."""

    items: list[LogView]
    next: str | None
