"""Contexts: what a plugin is given, what it is refused and how it is told, and what becomes of all that it says."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from sandbox.confinement import MINIMAL_ENVIRONMENT

from .conftest import HostProcess, Serve, wait_until, write_plugin
from .hosting import PLUGIN, PREAMBLE, hosting, logged, stored

SECRET = "s3cr3t-of-the-host"
KEY = "5ec4e7d5" * 8
BAD = object()
"""The variable's text is no value of the field's type."""

# type of the field, text of its environment variable, value
ENV_CASES: list[tuple[str, str, Any]] = [
    ("string", "text", "text"),
    ("string", "", ""),
    ("string", " é ", " é "),
    ("string", "not-utf-8-\udcff", BAD),
    ("number", "42", 42),
    ("number", "-1.5", -1.5),
    ("number", " 7 ", 7),
    ("number", "1e3", 1000),
    ("number", "", BAD),
    ("number", "many", BAD),
    ("number", "nan", BAD),
    ("number", "Infinity", BAD),
    ("number", "1e999", BAD),
    ("number", "1" * 400, BAD),
    ("number", "1" * 5000, BAD),
    ("number", "true", BAD),
    *(("boolean", text, True) for text in ("true", "TRUE", "1", "yes", "Yes", " true ")),
    *(("boolean", text, False) for text in ("false", "False", "0", "no", "")),
    *(("boolean", text, BAD) for text in ("maybe", "on", "2", "truely")),
    ("json", '{"a": [1, null, "é"]}', {"a": [1, None, "é"]}),
    ("json", "5", 5),
    ("json", '"x"', "x"),
    ("json", "", BAD),
    ("json", "{", BAD),
    ("json", "NaN", BAD),
    ("json", "[" * 20_000, BAD),
]
DEFAULTS: dict[str, Any] = {"string": "d", "number": 9, "boolean": True, "json": {"d": [1]}}
FIELDS: dict[str, dict[str, Any]] = {
    "unset": {"type": "string"},
    "unsetEnv": {"type": "string", "env": "CTX_UNSET"},
    "unsetEnvDefault": {"type": "string", "env": "CTX_UNSET", "default": "d"},
    "stored": {"type": "string", "env": "CTX_0", "default": "d", "required": True},
    "zero": {"type": "number", "default": 0},
    "no": {"type": "boolean", "default": False},
    "empty": {"type": "string", "default": ""},
    "list": {"type": "json", "default": []},
    "must": {"type": "string", "required": True},
    "mustEnv": {"type": "number", "required": True, "env": "CTX_BAD"},
    "mustDefault": {"type": "string", "required": True, "default": "d"},
    "secret": {"type": "string", "sensitive": True, "default": "s3cr3t-default", "label": "Secret"},
}
for number, (kind, _, _) in enumerate(ENV_CASES):
    FIELDS[f"env{number}"] = {"type": kind, "env": f"CTX_{number}"}
    FIELDS[f"envDefault{number}"] = {"type": kind, "env": f"CTX_{number}", "default": DEFAULTS[kind]}
ENVIRONMENT = {
    **{f"CTX_{number}": text for number, (_, text, _) in enumerate(ENV_CASES)},
    "CTX_BAD": "bad-and-s3cr3t",
    "CTX_NOT_LISTED": SECRET,
    "AWS_SECRET_ACCESS_KEY": SECRET,
    "HAYHOST_SECRET_KEY": KEY,
}
LISTED = tuple({descriptor["env"] for descriptor in FIELDS.values() if "env" in descriptor})

CONTEXT = (
    PREAMBLE
    + f"SCHEMA = json.loads({json.dumps(json.dumps(FIELDS))})\n"
    + """
COUNT = 0
SEEN = []

@route("POST", "/config/{call}")
def config(req):
    try:
        return {"value": getattr(req.ctx.config, req.params["call"])(*req.json())}
    except ConfigError as error:
        return {"error": str(error), "field": error.field}

@route("GET", "/auth")
async def auth(req):
    state = req.ctx.auth.get()
    if state is not None:
        return {"method": state.method_id, "credentials": dict(state.credentials), "shown": repr(state)}

@route("GET", "/org")
async def org(req):
    return {"id": req.ctx.org.id, "name": req.ctx.org.name}

@route("GET", "/state")
async def state(req):
    req.ctx.state["requests"] = req.ctx.state.get("requests", 0) + 1
    return req.ctx.state

@route("GET", "/bump/{name}")
def bump(req):
    global COUNT
    COUNT += 1
    SEEN.append(req.params["name"])
    os.environ["LEFT_BY"] = req.params["name"]
    return {"count": COUNT, "seen": SEEN, "instance": Plugin.wrapped.remembered, "pid": os.getpid()}

@route("GET", "/process")
def process(req):
    return {
        "environ": dict(os.environ),
        "argv": sys.argv + sys.orig_argv,
        "modules": sorted(sys.modules),
        "before": BEFORE,
    }

BEFORE = dict(os.environ)

@define_hay_plugin
class Plugin:
    name = "test"
    remembered = []

    def on_initialize(self, ctx):
        ctx.register.config(SCHEMA)
        register(ctx)

    def on_start(self, ctx):
        ctx.state["started"] = ctx.org.id
        Plugin.wrapped.remembered.append(ctx.org.id)
"""
)

CREDENTIALS = {"token": "s3cr3t-of-acme", "n": 1}
ORGS: dict[str, dict[str, Any]] = {
    "acme": {"auth": {"methodId": "key", "credentials": CREDENTIALS}},
    "beta": {},
    "rich": {"config": {"stored": "value", "extra": [1, {"a": 2}], "zero": 5, "must": "have", "env4": 1}},
}

# ---- what is said

TALK = """
import ctypes, warnings

@route("POST", "/say/{how}")
def say(req):
    text = req.text()
    say_how(req, req.params["how"], text)
    return {"id": req.id}

def say_how(req, how, text):
    if how == "print":
        print(text)
    elif how == "stderr":
        print(text, file=sys.stderr)
    elif how == "logger":
        req.ctx.logger.info(text)
    elif how == "logging":
        logging.getLogger("my.lib").error(text)
    elif how == "warnings":
        warnings.warn(text)
    elif how == "descriptor-1":
        os.write(1, text.encode("utf-8", "surrogateescape") + b"\\n")
    elif how == "descriptor-2":
        os.write(2, text.encode() + b"\\n")
    elif how == "c":
        ctypes.CDLL(None).dprintf(2, b"%s\\n", text.encode())
    elif how == "exception":
        raise RuntimeError(text)
    elif how == "partial":
        print(text, end="")

@route("POST", "/level/{level}")
async def level(req):
    getattr(req.ctx.logger, req.params["level"])(req.text(), req.json() if req.query else None)

@route("POST", "/meta")
async def meta(req):
    req.ctx.logger.info("with meta", req.json())

class Odd:
    def __repr__(self):
        return "an odd thing"

class Worse:
    def __repr__(self):
        raise RuntimeError("no repr")

@route("GET", "/odd-meta")
async def odd_meta(req):
    req.ctx.logger.info("odd meta", {"odd": Odd(), "set": {1, 2}})
    req.ctx.logger.info("worse meta", {"worse": Worse()})
    req.ctx.logger.info("huge meta", {"huge": "x" * 1_000_000})

@route("GET", "/flood/{how}")
def flood(req):
    for number in range(20_000):
        say_how(req, req.params["how"], f"flood {number}")
"""


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostProcess]:
    folder = tmp_path_factory.mktemp("contexts")
    write_plugin(folder / "plugins" / "ctx", CONTEXT, env=LISTED)
    write_plugin(folder / "plugins" / "talk", PREAMBLE + TALK + PLUGIN)
    write_plugin(folder / "plugins" / "types", TYPES)
    write_plugin(folder / "plugins" / "lacks", LACKS)
    file = stored(
        folder / "store.db",
        {org: {"ctx": install, "talk": {}, "types": {}, "lacks": {}} for org, install in ORGS.items()},
        ENVIRONMENT,
    )
    with hosting(folder / "plugins", "--store", file, env=ENVIRONMENT) as host:
        yield host


def config(host: HostProcess, org: str, call: str, *arguments: Any) -> dict[str, Any]:
    answer = host.post(f"/plugins/ctx/{org}/config/{call}", json_body=arguments)
    assert answer.status == 200, (answer.body, host.log[-2000:])
    result: dict[str, Any] = answer.json()
    return result


def warnings(host: HostProcess, org: str, plugin: str = "ctx") -> list[str]:
    where = (plugin, org, "warning")
    return [r["event"] for r in host.records() if (r.get("plugin"), r.get("org"), r["level"]) == where]


# ---- config


@pytest.mark.parametrize("number", range(len(ENV_CASES)), ids=[f"{k}-{text[:20]!a}" for k, text, _ in ENV_CASES])
def test_an_environment_variable_is_read_as_the_fields_type(host: HostProcess, number: int) -> None:
    kind, _, expected = ENV_CASES[number]
    plain, defaulted = (config(host, "beta", "get", f"{name}{number}") for name in ("env", "envDefault"))
    assert plain == {"value": None if expected is BAD else expected}
    assert type(plain["value"]) is type(None if expected is BAD else expected) or kind == "number"
    assert defaulted == {"value": DEFAULTS[kind] if expected is BAD else expected}
    assert config(host, "beta", "get_optional", f"env{number}") == plain
    if expected is BAD:
        wait_until(
            lambda: [w for w in [*warnings(host, "beta"), *host_warnings(host)] if f"CTX_{number} " in w], "warning"
        )
    else:
        assert not [w for w in warnings(host, "beta") if f"CTX_{number} " in w]


def host_warnings(host: HostProcess) -> list[str]:
    return [record["event"] for record in host.records() if record["level"] == "warning" and "org" not in record]


def test_a_bad_variables_text_is_not_logged(host: HostProcess) -> None:
    assert config(host, "acme", "get_optional", "mustEnv") == {"value": None}
    wait_until(lambda: [w for w in warnings(host, "acme") if "CTX_BAD" in w and "mustEnv" in w], "the warning")
    assert "bad-and-s3cr3t" not in host.log


def test_a_stored_value_wins_over_variable_and_default(host: HostProcess) -> None:
    assert config(host, "rich", "get", "stored") == {"value": "value"}
    assert config(host, "rich", "get", "zero") == {"value": 5}
    assert config(host, "rich", "get", "env4") == {"value": 1}
    assert config(host, "beta", "get", "stored") == {"value": "text"}  # its variable
    assert config(host, "beta", "get", "env4") == {"value": 42}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("zero", 0),
        ("no", False),
        ("empty", ""),
        ("list", []),
        ("unset", None),
        ("unsetEnv", None),
        ("unsetEnvDefault", "d"),
        ("mustDefault", "d"),
        ("secret", "s3cr3t-default"),
    ],
)
def test_a_default_is_what_is_left_however_empty(host: HostProcess, key: str, value: Any) -> None:
    assert config(host, "beta", "get", key) == {"value": value}
    assert config(host, "beta", "get_optional", key) == {"value": value}


@pytest.mark.parametrize("key", ["must", "mustEnv"])
def test_a_required_field_without_a_value_is_a_config_error_that_names_it(host: HostProcess, key: str) -> None:
    got = config(host, "beta", "get", key)
    assert got["field"] == key
    assert key in got["error"]
    assert config(host, "beta", "get_optional", key) == {"value": None}
    assert config(host, "rich", "get", "must") == {"value": "have"}


def test_a_stored_null_counts_as_unset(serve: Serve, tmp_path: Path) -> None:
    write_plugin(tmp_path / "ctx", CONTEXT, env=LISTED)
    host = serve(env={"CTX_4": "42"})
    stored = {"config": {"env4": None, "unset": None, "must": None, "zero": None}}
    assert host.post("/plugins/ctx/a/config-update", json_body=stored).status == 200
    assert config(host, "a", "get", "env4") == {"value": 42}
    assert config(host, "a", "get", "unset") == {"value": None}
    assert config(host, "a", "get", "zero") == {"value": 0}
    assert config(host, "a", "get", "must")["field"] == "must"


def test_an_unregistered_key_is_its_stored_value_or_a_warning(host: HostProcess) -> None:
    assert config(host, "rich", "get", "extra") == {"value": [1, {"a": 2}]}
    assert not [text for text in warnings(host, "rich") if "extra" in text]
    assert config(host, "beta", "get", "extra") == {"value": None}
    wait_until(lambda: [text for text in warnings(host, "beta") if "'extra' is not registered" in text], "the warning")


def test_keys_are_those_registered_then_those_stored_only(host: HostProcess) -> None:
    assert config(host, "beta", "keys") == {"value": list(FIELDS)}
    assert config(host, "rich", "keys") == {"value": [*FIELDS, "extra"]}


def test_to_env_renders_what_is_set_as_text(host: HostProcess) -> None:
    names = {
        "stored": "S",
        "zero": "Z",
        "no": "B",
        "list": "L",
        "extra": "X",
        "unset": "U",
        "mustEnv": "M",
        "empty": "E",
    }
    expected = {"S": "value", "Z": "5", "B": "false", "L": "[]", "X": '[1,{"a":2}]', "E": ""}
    assert config(host, "rich", "to_env", names) == {"value": expected}


# ---- org, auth, state, and what orgs see of each other


def test_auth_is_what_the_org_connected_with(host: HostProcess) -> None:
    auth = host.get("/plugins/ctx/acme/auth").json()
    assert (auth["method"], auth["credentials"]) == ("key", CREDENTIALS)
    assert CREDENTIALS["token"] not in auth["shown"]
    assert host.get("/plugins/ctx/beta/auth").status == 204  # none, and nothing of the other org's
    assert host.get("/plugins/ctx/acme/org").json() == {"id": "acme", "name": "acme"}


def test_state_is_the_workers_own(host: HostProcess) -> None:
    for org in ("acme", "beta"):
        assert host.get(f"/plugins/ctx/{org}/state").json() == {"started": org, "requests": 1}
    assert host.get("/plugins/ctx/acme/state").json() == {"started": "acme", "requests": 2}
    assert host.get("/plugins/ctx/beta/state").json()["requests"] == 2


def worker_and_zygote(host: HostProcess, org: str) -> tuple[int, int]:
    """Their pids, as the host sees them."""
    worker: int = host.health("ctx", org)["pid"]
    return worker, int(Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[1])


def test_orgs_share_no_globals(host: HostProcess) -> None:
    for number in (1, 2):
        for org in ("acme", "beta"):
            seen = host.get(f"/plugins/ctx/{org}/bump/{org}").json()
            assert (seen["count"], seen["seen"], seen["instance"]) == (number, [org] * number, [org])
            assert host.get(f"/plugins/ctx/{org}/process").json()["environ"]["LEFT_BY"] == org


def test_a_process_shows_nothing_of_the_hosts_environment(host: HostProcess) -> None:
    process = host.get("/plugins/ctx/rich/process").json()
    scratch = process["environ"]["TMPDIR"]
    assert process["before"] == MINIMAL_ENVIRONMENT
    assert process["environ"] == {**MINIMAL_ENVIRONMENT, "TMPDIR": scratch, "HOME": scratch}
    files = [f"/proc/{pid}/{name}" for pid in worker_and_zygote(host, "rich") for name in ("environ", "cmdline")]
    proc = [Path(file).read_bytes().decode(errors="replace") for file in files]
    everything = json.dumps([process["environ"], proc, process["argv"]])
    for text in (SECRET, KEY, "CTX_", "HAYHOST", "store.db", "serve"):
        assert text not in everything


def test_no_two_workers_write_to_one_pipe(host: HostProcess) -> None:
    # A pipe's writing end can be opened for reading: through a common one an org could read what another writes.
    mine, others = (
        [os.readlink(f"/proc/{pid}/fd/{number}") for pid in worker_and_zygote(host, org) for number in (1, 2)]
        for org in ("acme", "beta")
        if host.get(f"/plugins/ctx/{org}/process").status == 200
    )
    assert mine[0] == mine[1] != others[0] == others[1]
    assert mine[2:] == others[2:]
    assert mine[2] not in (mine[0], others[0])


def test_a_live_worker_has_nothing_of_the_front_in_it(host: HostProcess) -> None:
    modules = host.get("/plugins/ctx/rich/process").json()["modules"]
    assert "hayhost.sdk" in modules
    roots = {name.partition(".")[0] for name in modules}
    assert not roots & {"tornado", "structlog", "click", "watchdog", "dev", "pytest"}
    ours = {name for name in modules if name.startswith("hayhost.") and not name.startswith("hayhost.sdk")}
    assert ours == set()


# ---- wrong types

# A call, and what its error must say: the argument, the expected type, the actual one.
WRONG = {
    "message": ("ctx.logger.info(5)", "argument 'message' of Logger.info(): expected str, got int"),
    "meta": ("ctx.logger.error('x', [1])", "argument 'meta' of Logger.error(): expected"),
    "meta-key": ("ctx.logger.warn('x', {1: 2})", "argument 'meta' of Logger.warning(): expected"),
    "key": ("ctx.config.get(3)", "argument 'key' of OrgConfig.get(): expected str, got int"),
    "optional-key": ("ctx.config.get_optional(None)", "argument 'key' of OrgConfig.get_optional(): expected str"),
    "to-env": (
        "ctx.config.to_env(['a'])",
        "argument 'mapping' of OrgConfig.to_env(): expected Mapping[str, str], got list",
    ),
    "to-env-value": ("ctx.config.to_env({'a': 1})", "argument 'mapping' of OrgConfig.to_env(): expected"),
    "server-id": ("ctx.mcp.start_local(1, print)", "argument 'id' of Mcp.start_local(): expected str, got int"),
    "initializer": ("ctx.mcp.start_local('x', 'y')", "argument 'initializer' of Mcp.start_local(): expected"),
    "status": ("Response('x', '200')", "argument 'status' of Response.__init__(): expected int, got str"),
    "headers": ("Response('x', 200, [('a', 'b')])", "argument 'headers' of Response.__init__(): expected"),
    "header": ("Response('x', 200, {'a': 1})", "argument 'headers' of Response.__init__(): expected"),
}


def _wrong() -> str:
    source = PREAMBLE
    for name, (text, _) in WRONG.items():
        source += f"\n@route('GET', '/{name}')\ndef {name.replace('-', '_')}_(req):\n    ctx = req.ctx\n    {text}\n"
    return source + PLUGIN


TYPES = _wrong()


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_type_reaches_the_author_with_the_authors_own_line(host: HostProcess, name: str) -> None:
    text, expected = WRONG[name]
    assert host.get(f"/plugins/types/acme/{name}").status == 500
    [record] = wait_until(
        lambda: [r for r in host.records() if r["event"].startswith(f"GET /{name} failed: ")], name, 15
    )
    assert f"TypeCheckError: {expected}" in record["event"]
    frames = re.findall(r'File "([^"]+)", line (\d+)', record["traceback"])
    line = next(n for n, source in enumerate(TYPES.splitlines(), 1) if source.strip() == text)
    assert [(Path(file).name, int(number)) for file, number in frames] == [("plugin.py", line)]


# ---- what a context has not

LACKS = (
    PREAMBLE
    + """
def lacks(ctx, *names):
    for name in names:
        try:
            getattr(ctx, name)
        except AttributeError as error:
            ctx.logger.info(str(error))

@route("GET", "/lacks")
def handler(req):
    lacks(req.ctx, "register", "registry")

@define_hay_plugin
class Lacks:
    name = "Lacks"

    def on_initialize(self, ctx):
        register(ctx)
        lacks(ctx, "org", "auth", "mcp", "state")

    def on_start(self, ctx):
        lacks(ctx, "register")

    def on_validate_auth(self, ctx):
        lacks(ctx, "register", "mcp", "state")
        return True

    def on_config_update(self, ctx):
        lacks(ctx, "auth", "mcp", "state", "register")

    def on_disable(self, ctx):
        lacks(ctx, "config", "auth", "state", "mcp")
"""
)


def test_what_a_context_has_not_is_said_with_where_it_is(host: HostProcess) -> None:
    at = "/plugins/lacks/acme"
    assert host.get(f"{at}/lacks").status == 204
    auth = {"authState": {"methodId": "m", "credentials": {}}}
    assert host.post(f"{at}/validate-auth", json_body=auth).json() == {"valid": True}
    assert host.post(f"{at}/config-update", json_body={"config": {}}).status == 200
    assert host.post(f"{at}/disable").status == 200
    said = {record["event"] for record in host.records() if record.get("plugin") == "lacks"}
    for context, names in {
        "HayGlobalContext": ("org", "auth", "mcp", "state"),
        "HayStartContext": ("register",),
        "HayAuthValidationContext": ("register", "mcp", "state"),
        "HayConfigUpdateContext": ("auth", "mcp", "state", "register"),
        "HayDisableContext": ("config", "auth", "state", "mcp"),
    }.items():
        for name in names:
            [message] = [text for text in said if text.startswith(f"{context} has no {name!r}; it is in ")]
            where = "on_initialize" if name == "register" else "every hook" if name == "org" else "on_start"
            assert where in message
    assert "HayStartContext has no 'registry'" in said


# ---- definitions and registrations that are refused


class Refused(NamedTuple):
    """Source of a plugin that must not load, and what the error must say."""

    source: str
    said: str
    capabilities: tuple[str, ...] = ("routes", "config", "auth", "mcp", "ui")


def refused(said: str, *lines: str, without: str = "") -> Refused:
    """A plugin whose ``on_initialize`` has ``lines``; the last of them is refused."""
    capabilities = tuple(name for name in ("routes", "config", "auth", "mcp", "ui") if name != without)
    body = "\n".join(f"        {line}" for line in [*lines[:-1], f"{lines[-1]}  # refused"])
    head = "@define_hay_plugin\nclass Refused:\n    name = 'Refused'\n    def on_initialize(self, ctx):\n"
    return Refused(f"{head}        register = ctx.register\n{body}\n", said, capabilities)


FIELD = "register.config({'key': {'type': 'string'}})"
OAUTH = (
    "register.auth.oauth2(id='o', label='O', authorization_url={}, token_url='https://x.example/t', scopes={}, "
    "client_id={}, client_secret=ctx.config.field('key'))"
)
HANDLER = "handler = lambda req: None"
REFUSED = {
    "type": refused("argument 'schema' of Register.config()", "register.config({'a': {'type': 'text'}})"),
    "no-type": refused("argument 'schema' of Register.config()", "register.config({'a': {'label': 'A'}})"),
    "unknown-key": refused("hidden", "register.config({'a': {'type': 'string', 'hidden': True}})"),
    "label-type": refused("label", "register.config({'a': {'type': 'string', 'label': 5}})"),
    "schema-type": refused("argument 'schema'", "register.config([('a', {'type': 'string'})])"),
    "env": refused(
        "environment variable 'HOME' is not in the manifest's `env` list",
        "register.config({'a': {'type': 'string', 'env': 'HOME'}})",
    ),
    "field-twice": refused("'key' is registered twice", FIELD, FIELD),
    **{
        f"default-{number}": refused(
            f"config field 'a': default {shown}",
            f"register.config({{'a': {{'type': {kind!r}, 'default': {value}}}}})",
        )
        for number, (kind, value, shown) in enumerate(
            [
                ("string", "5", "5"),
                ("number", "'5'", "'5'"),
                ("number", "True", "True"),
                ("number", "float('nan')", "nan"),
                ("number", "float('-inf')", "-inf"),
                ("number", "10 ** 400", "1000000000"),
                ("boolean", "1", "1"),
                ("boolean", "'true'", "'true'"),
                ("json", "object()", "<object"),
                ("json", "{1, 2, object()}", "{"),
            ]
        )
    },
    "api-key-field": refused(
        "config field 'key', which is not registered", "register.auth.api_key(id='a', label='A', config_field='key')"
    ),
    "api-key-id": refused(
        "auth method id 'a' is registered twice",
        FIELD,
        *["register.auth.api_key(id='a', label='A', config_field='key')"] * 2,
    ),
    "api-key-type": refused(
        "argument 'label' of RegisterAuth.api_key(): expected str, got int",
        "register.auth.api_key(id='a', label=5, config_field='key')",
    ),
    "field-reference": refused("config field 'other' is not registered", FIELD, "ctx.config.field('other')"),
    "oauth-reference": refused("argument 'client_id'", FIELD, OAUTH.format("'https://x.example/a'", "[]", "'key'")),
    "oauth-url": refused(
        "authorization_url must be an absolute http(s) URL",
        FIELD,
        OAUTH.format("'/authorize'", "[]", "ctx.config.field('key')"),
    ),
    "oauth-scopes": refused(
        "scopes", FIELD, OAUTH.format("'https://x.example/a'", "'read'", "ctx.config.field('key')")
    ),
    "route-slash": refused("must start with '/'", HANDLER, "register.route('GET', 'x', handler)"),
    "route-method": refused("argument 'method'", HANDLER, "register.route('FETCH', '/x', handler)"),
    "route-lower": refused("argument 'method'", HANDLER, "register.route('get', '/x', handler)"),
    "route-path-type": refused("argument 'path'", HANDLER, "register.route('GET', 5, handler)"),
    "route-handler": refused("argument 'handler'", "register.route('GET', '/x', 'handler')"),
    "route-arguments": refused("exactly one Request", "register.route('GET', '/x', lambda req, more: None)"),
    "route-no-arguments": refused("exactly one Request", "register.route('GET', '/x', lambda: None)"),
    "route-twice": refused("is registered twice", HANDLER, *["register.route('GET', '/x', handler)"] * 2),
    "route-same-shape": refused(
        "is registered twice",
        HANDLER,
        "register.route('GET', '/x/{a}', handler)",
        "register.route('GET', '/x/{b}', handler)",
    ),
    "route-parameter": refused("parameter", HANDLER, "register.route('GET', '/x/{}', handler)"),
    "route-parameters": refused("a parameter twice", HANDLER, "register.route('GET', '/{a}/{a}', handler)"),
    "route-query": refused("plain URL characters", HANDLER, "register.route('GET', '/x?y', handler)"),
    "page-twice": refused("page id 'p' is registered twice", *["register.page(id='p', title='P', component='c')"] * 2),
    "page-slot": refused("argument 'slot'", "register.page(id='p', title='P', component='c', slot='middle')"),
    "page-title": refused("title must not be empty", "register.page(id='p', title=' ', component='c')"),
    "ui-type": refused("argument 'component'", "register.ui(slot='s', component=None)"),
    "no-config": refused("capability 'config'", FIELD, without="config"),
    "no-auth": refused(
        "capability 'auth'", FIELD, "register.auth.api_key(id='a', label='A', config_field='key')", without="auth"
    ),
    "no-routes": refused("capability 'routes'", HANDLER, "register.route('GET', '/x', handler)", without="routes"),
    "no-ui": refused("capability 'ui'", "register.ui(slot='s', component='c')", without="ui"),
    "no-ui-page": refused("capability 'ui'", "register.page(id='p', title='P', component='c')", without="ui"),
    "no-org": refused("HayGlobalContext has no 'org'", "ctx.org"),
    "assignment": refused("boom", "raise ValueError('boom')"),
    "none": Refused("", "exports no result of define_hay_plugin(...)"),
    "several": Refused(
        "@define_hay_plugin\nclass A:\n    name = 'A'\n@define_hay_plugin\nclass B:\n    name = 'B'",
        "exports 2 results of define_hay_plugin(...) (A, B)",
    ),
    "twice": Refused("@define_hay_plugin\n@define_hay_plugin\nclass A:\n    name = 'A'", "was applied twice"),
    "not-callable": Refused("A = define_hay_plugin({'name': 'A'})", "takes a class or a factory, not dict"),
    "constructor": Refused(
        "@define_hay_plugin\nclass A:\n    name = 'A'\n    def __init__(self, ctx): pass", "callable with no arguments"
    ),
    "factory-arguments": Refused("@define_hay_plugin\ndef a():\n    return {}", "callable with exactly one"),
    "factory-none": Refused("@define_hay_plugin\ndef a(ctx):\n    pass", "returned None"),
    "factory-async": Refused(
        "@define_hay_plugin\nasync def a(ctx):\n    return {'name': 'a'}", "must be a plain function"
    ),
    "no-name": Refused("@define_hay_plugin\nclass A:\n    pass", "`name` must be a non-empty string, not None"),
    "name-type": Refused("@define_hay_plugin\nclass A:\n    name = 5", "`name` must be a non-empty string, not 5"),
    "hook-value": Refused(
        "@define_hay_plugin\nclass A:\n    name = 'A'\n    on_start = 5", "`on_start` must be callable, not int"
    ),
    "hook-arguments": Refused(
        "@define_hay_plugin\nclass A:\n    name = 'A'\n    def on_stop(s): pass\n    def on_start(s, ctx, x): pass",
        "`on_start` must take exactly its one context, not (ctx, x); `on_stop` must take exactly its one context",
    ),
    "hook-optional": Refused(
        "@define_hay_plugin\nclass A:\n    name = 'A'\n    def on_start(self, ctx, x=1): pass",
        "`on_start` must take exactly its one context",
    ),
}
ACCEPTED = {
    "factory-of-mapping": "@define_hay_plugin\ndef p(ctx):\n    return {'name': 'P', 'on_initialize': initialize}",
    "factory-of-object": "@define_hay_plugin\ndef p(ctx):\n    return Definition()",
    "factory-that-registers": "@define_hay_plugin\ndef p(ctx):\n    initialize(ctx)\n    return {'name': 'P'}",
    "class-with-async-hook": "@define_hay_plugin\nclass P(Definition):\n    async def on_initialize(self, ctx):\n"
    "        initialize(ctx)",
    "assigned": "plugin = define_hay_plugin(Definition)\nsame = plugin",
}
ACCEPTED_HEAD = """
def initialize(ctx):
    ctx.register.route("GET", "/hello", lambda req: "hello")

class Definition:
    name = "P"

    def on_initialize(self, ctx):
        initialize(ctx)

"""

METADATA = """
@define_hay_plugin
class Plugin:
    name = "test"

    def on_initialize(self, ctx):
        register = ctx.register
        register.config({"apiKey": {"type": "string", "label": "Key", "env": "API_KEY", "sensitive": True,
                                    "default": "s3cr3t-default", "description": "D", "placeholder": "P",
                                    "required": True}})
        register.config({"limit": {"type": "number", "default": 0}, "id": {"type": "string"},
                         "flags": {"type": "json", "default": {"a": [None]}}})
        register.auth.api_key(id="key", label="API key", config_field="apiKey")
        field = ctx.config.field
        register.auth.oauth2(id="oauth", label="OAuth", authorization_url="https://x.example/a",
                             token_url="https://x.example/t", scopes=["r", "w"], client_id=field("id"),
                             client_secret=field("apiKey"))
        register.ui(slot="after-settings", component="components/X.vue")
        register.page(id="bare", title="Bare", component="components/Bare.vue")
        register.page(id="full", title="Full", component="components/Full.vue", icon="star", slot="standalone",
                      requires_setup=False)
        register.route("POST", "/webhook", self.webhook)
        register.route("GET", "/items/{id}", self.webhook)

    async def webhook(self, req):
        return req.ctx.config.get("apiKey")

    async def on_start(self, ctx):
        await ctx.mcp.start_local("tools", lambda mcp: {"list_tools": list})
"""
METADATA_ANSWER = {
    "configSchema": {
        "apiKey": {
            "type": "string",
            "label": "Key",
            "description": "D",
            "placeholder": "P",
            "required": True,
            "env": "API_KEY",
            "sensitive": True,
        },
        "limit": {"type": "number", "default": 0},
        "id": {"type": "string"},
        "flags": {"type": "json", "default": {"a": [None]}},
    },
    "authMethods": [
        {"type": "apiKey", "id": "key", "label": "API key", "configField": "apiKey"},
        {
            "type": "oauth2",
            "id": "oauth",
            "label": "OAuth",
            "authorizationUrl": "https://x.example/a",
            "tokenUrl": "https://x.example/t",
            "scopes": ["r", "w"],
            "clientId": "id",
            "clientSecret": "apiKey",
        },
    ],
    "uiExtensions": [{"slot": "after-settings", "component": "components/X.vue"}],
    "pages": [
        {"id": "bare", "title": "Bare", "component": "components/Bare.vue"},
        {
            "id": "full",
            "title": "Full",
            "component": "components/Full.vue",
            "icon": "star",
            "slot": "standalone",
            "requiresSetup": False,
        },
    ],
    "routes": [{"method": "POST", "path": "/webhook"}, {"method": "GET", "path": "/items/{id}"}],
    "mcp": {"local": [], "external": []},
}

LATE = """
@define_hay_plugin
class Late:
    name = "Late"

    def on_initialize(self, ctx):
        self.ctx = ctx
        ctx.register.route("GET", "/x", lambda req: None)

    def on_start(self, ctx):
        self.ctx.register.route("GET", "/y", lambda req: None)
"""


@pytest.fixture(scope="module")
def loader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostProcess]:
    folder = tmp_path_factory.mktemp("loading")
    for name, plugin in REFUSED.items():
        write_plugin(folder / f"refused-{name}", PREAMBLE + plugin.source, capabilities=plugin.capabilities)
    for name, source in ACCEPTED.items():
        write_plugin(folder / name, PREAMBLE + ACCEPTED_HEAD + source)
    picked = write_plugin(
        folder / "picked", PREAMBLE + REFUSED["several"].source + ACCEPTED_HEAD + "C = define_hay_plugin(Definition)"
    )
    manifest = picked / "pyproject.toml"
    manifest.write_text(manifest.read_text().replace("./plugin.py", "./plugin.py:C"))
    write_plugin(folder / "meta", PREAMBLE + METADATA, env=("API_KEY",))
    write_plugin(folder / "late", PREAMBLE + LATE)
    with hosting(folder, env={"API_KEY": "s3cr3t-from-env"}) as host:
        yield host


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_allowed_does_not_load_and_says_why(loader: HostProcess, name: str) -> None:
    plugin = REFUSED[name]
    [record] = logged(loader, event="the plugin did not load", plugin=f"refused-{name}")
    assert plugin.said in record["reason"]
    answer = loader.get(f"/plugins/refused-{name}/acme/x")
    assert (answer.status, list(answer.json())) == (503, ["error"])
    source = (PREAMBLE + plugin.source).splitlines()
    if line := next((number for number, text in enumerate(source, 1) if "# refused" in text), 0):
        frames = re.findall(r'File "([^"]+)", line (\d+)', record["traceback"])
        assert [(Path(file).name, int(number)) for file, number in frames] == [("plugin.py", line)]


@pytest.mark.parametrize("name", [*ACCEPTED, "picked"])
def test_every_form_of_definition_is_served(loader: HostProcess, name: str) -> None:
    assert loader.get(f"/plugins/{name}/acme/hello").body == b"hello"


def test_registering_after_on_initialize_is_refused(loader: HostProcess) -> None:
    assert loader.get("/plugins/late/acme/x").status == 204
    assert "register.route() is only possible in on_initialize" in loader.health("late", "acme")["lastError"]


def test_metadata_has_what_the_author_gave_and_no_secret(loader: HostProcess) -> None:
    answer = loader.get("/plugins/meta/acme/metadata")
    assert answer.json() == METADATA_ANSWER
    assert list(answer.json()) == list(METADATA_ANSWER)
    stored = {"config": {"apiKey": "s3cr3t-stored", "limit": 5}}
    assert loader.post("/plugins/meta/acme/config-update", json_body=stored).status == 200
    assert loader.post("/plugins/meta/acme/webhook").body == b"s3cr3t-stored"
    running = loader.get("/plugins/meta/acme/metadata")
    assert running.json() == {**METADATA_ANSWER, "mcp": {"local": [{"id": "tools"}], "external": []}}
    assert b"s3cr3t" not in running.body
    assert b"s3cr3t" not in loader.get("/plugins/meta/acme/health").body
    assert loader.post("/plugins/meta/other/webhook").body == b"s3cr3t-from-env"
    assert "s3cr3t" not in loader.log


# ---- logs


def say(host: HostProcess, how: str, text: str, org: str = "acme") -> str:
    answer = host.post(f"/plugins/talk/{org}/say/{how}", text.encode())
    if how == "exception":
        assert answer.status == 500
        return ""
    assert answer.status == 200, answer.body
    request: str = answer.json()["id"]
    return request


LEVELS = {
    "print": "info",
    "stderr": "warning",
    "logger": "info",
    "logging": "error",
    "warnings": "warning",
    "descriptor-1": "warning",
    "descriptor-2": "warning",
    "c": "warning",
    "exception": "error",
}
RAW = ("descriptor-1", "descriptor-2", "c")


@pytest.mark.parametrize("org", ["acme", "beta"])
@pytest.mark.parametrize("how", LEVELS)
def test_whatever_a_plugin_says_is_its_log(host: HostProcess, how: str, org: str) -> None:
    text = f"{how} of {org} says é"
    request = say(host, how, text, org)
    [record] = wait_until(lambda: [r for r in host.records() if text in r["event"]], f"{text!r} in the log", 15)
    assert (record["plugin"], record["source"], record["level"]) == ("talk", "plugin", LEVELS[how])
    assert (record.get("org"), record.get("worker")) == (org, host.health("talk", org)["pid"])
    if how not in RAW and how != "exception":
        assert record["request"] == request
    if how == "logging":
        assert record["meta"] == {"logger": "my.lib"}


def test_what_is_said_without_an_end_of_line_is_not_lost(host: HostProcess) -> None:
    say(host, "partial", "the last words", "rich")
    assert host.post("/plugins/talk/rich/disable").status == 200
    [record] = logged(host, event="the last words")
    assert record["org"] == "rich"


@pytest.mark.parametrize("level", ["info", "warning", "warn", "error"])
def test_the_logger_has_levels_and_meta(host: HostProcess, level: str) -> None:
    meta = {"level is": level, "n": [1, None]}
    assert host.post(f"/plugins/talk/acme/level/{level}?meta", json.dumps(meta)).status == 204
    [record] = logged(host, meta=meta)
    assert record["level"] == ("warning" if level == "warn" else level)


def test_meta_that_is_not_json_is_shown_as_well_as_can_be(host: HostProcess) -> None:
    assert host.get("/plugins/talk/acme/odd-meta").status == 204
    [odd], [worse], [huge] = (logged(host, event=f"{kind} meta") for kind in ("odd", "worse", "huge"))
    assert odd["meta"] == {"odd": "an odd thing", "set": [1, 2]}
    assert "cannot be encoded" in worse["meta"]["meta"]
    assert len(json.dumps(huge)) < 1000


FORGED = {"time": "2000-01-01T00:00:00.000Z", "level": "error", "event": "forged", "plugin": "other", "org": "other"}
FORGERIES = [
    *(
        f"before{end}{json.dumps(FORGED)}"
        for end in ("\n", "\r\n", "\r", "\v", "\f", "\x1c", "\x85", "\u2028", "\u2029")
    ),
    '"}\n' + json.dumps(FORGED),
    '\\"}\\n' + json.dumps(FORGED),
    "\x1b[31mred\x1b[2K\x1b[1A",
    "\x9b31mred",
    "\u202egnirts\u202c",
    "back\b\b\b\b\x7f",
    "bell\x07",
]


def _well_formed(log: str, said: int) -> None:
    assert not re.search("[^\n\x20-\x7e\xa0-\u2027\u202f-\U0010ffff]", log)
    lines = log.splitlines()
    assert len(lines) == log.count("\n")
    records = [json.loads(line) for line in lines]
    mine = [record for record in records if record.get("plugin") == "talk" and record.get("source") == "plugin"]
    assert len(mine) >= said
    for record in records:
        assert record["event"] != "forged"
        assert record.get("org") != "other"
        assert not record["time"].startswith("2000")


@pytest.mark.parametrize("how", [how for how in LEVELS if how != "c"])
def test_nothing_said_can_forge_or_colour_a_line_of_the_log(host: HostProcess, how: str) -> None:
    for number, text in enumerate(FORGERIES):
        say(host, how, text.replace("forged", f"forged {how} {number}") + f" end-{how}-{number}", "beta")
    for number in range(len(FORGERIES)):
        host.wait_for_log(f"end-{how}-{number}")
    _well_formed(host.log, len(FORGERIES))
    events = [record["event"] for record in host.records()]
    assert not [event for event in events if event.startswith(f"forged {how}")]


def test_meta_cannot_stand_in_for_the_hosts_own_fields(host: HostProcess) -> None:
    meta = {**FORGED, "source": "host", "worker": 1, "request": "r", "dropped": 7, "version": "9"}
    assert host.post("/plugins/talk/beta/meta", json.dumps(meta)).status == 204
    [record] = logged(host, event="with meta", org="beta")
    assert record["meta"] == meta
    assert (record["plugin"], record["level"], record["source"]) == ("talk", "info", "plugin")
    assert (record["worker"], record["version"]) == (host.health("talk", "beta")["pid"], "1.2.3")
    assert record["request"] != "r"
    assert "dropped" not in record


def test_nothing_said_can_forge_or_colour_a_line_on_a_console(tmp_path: Path) -> None:
    write_plugin(tmp_path / "talk", PREAMBLE + TALK + PLUGIN)
    host = HostProcess(["serve", str(tmp_path), "--mode", "test", "--port", "0", "--log-format", "console"])
    try:
        host.wait_for_log("ready")
        found = re.search(r"http://127\.0\.0\.1:(\d+)", host.log)
        assert found
        host.port = int(found[1])
        line = "12:34:56 error   forged"
        for how in LEVELS:
            for number, text in enumerate(FORGERIES):
                if how != "c":
                    say(host, how, text.replace(json.dumps(FORGED), line) + f" end-{how}-{number}")
                    host.wait_for_log(f"end-{how}-{number}")
        assert not re.search("[^\n\x20-\x7e\xa0-\u2027\u202f-\U0010ffff]", host.log)
        for text in host.log.splitlines():
            assert re.match(r"\d\d:\d\d:\d\d (debug|info|warning|error) |    \| ", text), text
            assert not text.startswith(line)
    finally:
        host.kill()


@pytest.mark.parametrize("how", ["print", "logger", "descriptor-2"])
def test_a_flood_is_cut_and_what_is_missing_is_counted(host: HostProcess, how: str, tmp_path: Path) -> None:
    org = {"print": "acme", "logger": "beta", "descriptor-2": "beta"}[how]
    before = len(host.records())
    assert host.get(f"/plugins/talk/{org}/flood/{how}").status == 204
    assert host.get(f"/plugins/ctx/{org}/org").status == 200  # the others are not held up

    def counted() -> bool:
        say(host, how, "afterwards", org)
        records = [r for r in host.records()[before:] if (r.get("plugin"), r.get("source")) == ("talk", "plugin")]
        said = sum(record["event"].startswith("flood ") for record in records)
        assert said < 5_000
        missing = sum(record.get("dropped", 0) for record in records)
        afterwards = sum(record["event"] == "afterwards" for record in records)
        return bool(said + missing >= 20_000 and afterwards > 0)

    wait_until(counted, "every line is either there or counted")


@pytest.mark.parametrize("how", ["print", "logger", "descriptor-2"])
def test_a_long_line_is_shortened(host: HostProcess, how: str) -> None:
    text = f"long-{how} " + "x" * 500_000
    say(host, how, text)
    records = wait_until(lambda: [r for r in host.records() if r["event"].startswith(f"long-{how}")], "the line", 30)
    assert max(len(record["event"]) for record in records) < 10_000
