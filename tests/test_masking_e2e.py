"""A plugin that tells its org's secrets in every way: nothing of them is in the log, in the host's answers, or kept."""

import base64
import contextlib
import json
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import HostProcess, wait_until, write_plugin
from .hosting import PLUGIN, PREAMBLE
from .managing import Manager, managed
from .test_logs_api_e2e import Stream

CANARIES = {
    "field": "c4nary-field/with+signs",
    "leaf": "c4nary-leaf-1",
    "credential": "c4nary-credential",
    "environment": "c4nary-environment",
    "replaced": "c4nary-replaced-later",
    "tried": "c4nary-tried-only",
}

TELLER = (
    PREAMBLE
    + """
import base64, urllib.parse

def values(ctx):
    hidden = ctx.config.get("hidden") or {}
    found = [ctx.config.get("apiKey"), ctx.config.get("fromEnv"), *hidden.get("deep", [])]
    auth = ctx.auth.get() if hasattr(ctx, "auth") else None
    found += list(auth.credentials.values()) if auth else []
    return [value for value in found if value]

def tell(ctx):
    for value in values(ctx):
        print("printed", value)
        print(json.dumps({"json": value}))
        print("x" * 8176 + value)
        print("https://x.example/?key=" + urllib.parse.quote(value, safe=""))
        print("Basic " + base64.b64encode(("user:" + value).encode()).decode())
        print(value, file=sys.stderr)
        os.write(2, ("raw " + value + "\\n").encode())
        logging.getLogger(value).error("logged %s", value)
        ctx.logger.warning("said " + value, {"meta": value, value: [value]})

@route("GET", "/tell")
async def told(req):
    tell(req.ctx)
    return {"count": len(values(req.ctx))}

@route("GET", "/raise")
async def fail(req):
    raise RuntimeError("with " + " ".join(values(req.ctx)))

@route("GET", "/exit")
async def leave(req):
    tell(req.ctx)
    sys.stderr.flush()
    os._exit(3)

@define_hay_plugin
class Teller:
    name = "Teller"

    def on_initialize(self, ctx):
        ctx.register.config({
            "apiKey": {"type": "string", "sensitive": True}, "hidden": {"type": "json", "sensitive": True},
            "fromEnv": {"type": "string", "sensitive": True, "env": "TELLER_SECRET"},
        })
        ctx.register.auth.api_key(id="key", label="API key", config_field="apiKey")
        register(ctx)

    async def on_start(self, ctx):
        tell(ctx)
        raise RuntimeError("on_start knows " + " ".join(values(ctx)))

    async def on_validate_auth(self, ctx):
        tell(ctx)
        raise RuntimeError("validating " + " ".join(values(ctx)))

    async def on_config_update(self, ctx):
        raise RuntimeError("updating " + " ".join(values(ctx)))
"""
)


def leaks(text: str) -> list[str]:
    """The canaries that are in ``text`` in some form."""
    found = []
    for name, value in CANARIES.items():
        forms = [value, urllib.parse.quote(value, safe=""), base64.b64encode(f"user:{value}".encode()).decode()[8:20]]
        if any(form in text for form in (*forms, value[:9])):
            found.append(name)
    return found


@pytest.fixture(scope="module")
def manager(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Manager]:
    folder = tmp_path_factory.mktemp("masking")
    write_plugin(folder / "plugins" / "teller", TELLER, env=("TELLER_SECRET",))
    environment = {"TELLER_SECRET": CANARIES["environment"]}
    with managed(folder, plugins=folder / "plugins", env=environment) as manager:
        yield manager


def test_nothing_of_a_secret_is_told(manager: Manager, tmp_path: Path) -> None:
    told = []
    with contextlib.closing(Stream(manager)) as stream:
        auth = {"methodId": "key", "credentials": {"apiKey": CANARIES["credential"]}}
        config = {"apiKey": CANARIES["field"], "hidden": {"deep": [CANARIES["leaf"]]}}
        told.append(manager.ok("PUT", "/orgs/acme/plugins/teller", {"config": config, "auth": auth}).body.decode())
        assert "on_config_update failed" in told[0]
        assert manager.ok("GET", "/plugins/teller/acme/tell").json() == {"count": 4}
        assert manager.call("GET", "/plugins/teller/acme/raise").status == 500
        told.append(manager.call("GET", "/plugins/teller/acme/health").body.decode())
        assert "on_start knows ********" in told[-1]
        tried = {"auth": {"methodId": "key", "credentials": {"apiKey": CANARIES["tried"]}}}
        assert not manager.ok("POST", "/orgs/acme/plugins/teller/validate", tried).json()["valid"]
        manager.ok("PATCH", "/orgs/acme/plugins/teller", {"config": {"apiKey": CANARIES["replaced"]}})
        assert manager.call("GET", "/plugins/teller/acme/exit").status == 502
        wait_until(lambda: "a worker died" in manager.host.log, "the end of the worker")
        for path in ("/logs?limit=1000", "/workers", "/orgs/acme/plugins", "/audit?limit=1000", "/plugins/teller"):
            told.append(manager.ok("GET", path).body.decode())
        told.append(manager.call("GET", "/plugins/teller/acme/health").body.decode())
        told.append(manager.call("GET", "/plugins/teller/acme/metadata").body.decode())
        kind, _, first = stream.next()
        while first["event"] != "said ********":
            told.append(json.dumps(first))
            kind, _, first = stream.next()
        assert kind == "log"
    log = manager.host.log
    for text in (*told, log):
        assert not leaks(text), text
    for said in ("printed", "raw", "said", "logged", "with"):
        assert f"{said} ********" in log
    assert '"meta":{"meta":"********","********":["********"]}' in log
    assert manager.host.stop() == 0
    for file in Path(manager.host.folder.name).parent.glob("store.*"):
        assert not leaks(file.read_bytes().decode("latin-1")), file


def test_the_secrets_of_run(tmp_path: Path) -> None:
    folder = write_plugin(tmp_path / "teller", TELLER, env=("TELLER_SECRET",))
    environment = {
        "TELLER_SECRET": CANARIES["environment"],
        "HAY_ORG_CONFIG": json.dumps({"org": {"id": "acme"}, "config": {"apiKey": CANARIES["field"]}}),
        "HAY_ORG_AUTH": json.dumps({"methodId": "key", "credentials": {"apiKey": CANARIES["credential"]}}),
    }
    arguments = ["run", "--plugin-path", str(folder), "--org-id", "acme", "--port", "0", "--log-format", "json"]
    host = HostProcess(arguments, environment, writable=tmp_path)
    try:
        host.wait_ready()
        assert host.get("/tell").json() == {"count": 3}
        health = host.get("/health").body.decode()
        assert "********" in health
        assert "printed ********" in host.log
        assert not leaks(health + host.log)
    finally:
        host.kill()


def test_plain_settings_are_told(tmp_path: Path) -> None:
    """Or the tests before would say nothing."""
    source = (
        PREAMBLE
        + '@route("GET", "/x")\ndef x(req):\n    print('
        + repr(CANARIES["field"])
        + ")\n    return {}\n"
        + PLUGIN
    )
    write_plugin(tmp_path / "plugins" / "plain", source)
    with managed(tmp_path, plugins=tmp_path / "plugins") as manager:
        manager.put("acme", "plain")
        manager.ok("GET", "/plugins/plain/acme/x")
        assert leaks(manager.host.log) == ["field"]
