"""The dashboard as people use it: a real Chromium, a real host, a real authorization server."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .authorization_server import CLIENT_ID, SECRET, Provider
from .browsing import Visit, browser, visiting
from .conftest import HostProcess, wait_until, write_plugin
from .hosting import PLUGIN, PREAMBLE, hosting
from .managing import Manager, managed

SHOP = (
    PREAMBLE
    + """
GATE = "{gate}"

class Tools:
    def list_tools(self):
        number = {{"type": "integer", "minimum": 0, "description": "What to add"}}
        schema = {{"type": "object", "properties": {{"a": number, "b": number}}, "required": ["a"]}}
        return [{{"name": "add", "description": "Adds two numbers", "inputSchema": schema}}]

    def call_tool(self, name, arguments):
        return {{"content": [{{"type": "text", "text": "sum " + str(arguments["a"] + arguments.get("b", 0))}}]}}

@route("GET", "/hello/{{name}}")
async def hello(req):
    print("hello to <img src=x onerror=alert(1)>", req.params["name"])
    return {{"message": "{greeting} " + req.params["name"]}}

@route("POST", "/crash")
async def crash(req):
    os._exit(9)

@define_hay_plugin
class Shop:
    name = "Shop"

    def on_initialize(self, ctx):
        ctx.register.config({{
            "clientId": {{"type": "string", "label": "Client id", "required": True}},
            "clientSecret": {{"type": "string", "label": "Client secret", "required": True, "sensitive": True}},
            "limit": {{"type": "number", "label": "Orders at most", "required": True, "placeholder": "100"}},
            "region": {{"type": "string", "label": "Region", "env": "SHOP_REGION", "description": "Where it sells"}},
            "currency": {{"type": "string", "label": "Currency", "default": "EUR"}},
            "loud": {{"type": "boolean", "label": "Tell everybody"}},
            "options": {{"type": "json", "label": "Options", "description": "Passed on as they are"}},
        }})
        ctx.register.auth.oauth2(
            id="oauth", label="Shop account", scopes=["orders.read"],
            authorization_url="{authorize}", token_url="{token}",
            client_id=ctx.config.field("clientId"), client_secret=ctx.config.field("clientSecret"),
        )
        ctx.register.page(id="orders", title="Orders", component="components/Orders.vue", slot="after-settings")
        register(ctx)

    def on_validate_auth(self, ctx):
        return ctx.auth.get().credentials["accessToken"].startswith("access-")

    async def on_start(self, ctx):
        if os.path.exists(GATE):
            os._exit(3)
        ctx.logger.info("the shop is open", {{"org": ctx.org.id}})
        await ctx.mcp.start_local("sums", lambda mcp: Tools())
"""
)


# Axe looks through every page in both themes, on a machine that runs other tests at the same time.
pytestmark = pytest.mark.timeout(420)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as running:
        yield running


@pytest.fixture
def provider(tmp_path: Path) -> Iterator[Provider]:
    provider = Provider(tmp_path)
    yield provider
    provider.close()


def write_shop(folder: Path, provider: Provider, greeting: str = "Hello") -> Path:
    source = SHOP.format(
        gate=folder / "plugins" / "gate",
        greeting=greeting,
        authorize=provider.url("/authorize"),
        token=provider.url("/token"),
    )
    return write_plugin(folder / "plugins" / "shop", source, env=("SHOP_REGION",))


@pytest.fixture
def host(tmp_path: Path, provider: Provider) -> Iterator[HostProcess]:
    write_shop(tmp_path, provider)
    options = ["--store", tmp_path / "store.db", "--egress-allow=127.0.0.1/32", "--spares=0"]
    options += [f"--egress-nameserver={provider.nameserver}"]
    environment = {"SSL_CERT_FILE": str(provider.ca), "SHOP_REGION": "north"}
    with hosting(tmp_path / "plugins", *options, env=environment, writable=True) as host:
        provider.redirect = f"http://127.0.0.1:{host.port}/api/v1/oauth/callback"
        yield host


def test_from_an_empty_host_to_a_plugin_that_is_healed_reloaded_and_rolled_back(
    chromium: Any, host: HostProcess, provider: Provider, tmp_path: Path
) -> None:
    with visiting(chromium, host, tmp_path / "pictures", "422", "502", "503") as visit:
        visit.see("Nothing is wrong")
        install(visit)
        connect(visit, provider)
        use(visit)
        crash_and_heal(visit, tmp_path / "plugins" / "gate")
        reload_and_roll_back(visit, provider, tmp_path)
        visit.click("Audit log", "link")
        visit.see("install.put")
        visit.look("audit")


def install(visit: Visit) -> None:
    """An org by the form, and the plugin for it: what is wrong is said at its field, and nothing typed is lost."""
    visit.click("Organisations", "link")
    visit.see("No organisations yet")
    visit.look("orgs-empty")
    visit.fill("Id", "not an id")
    visit.click("Create")
    visit.page.locator("#org-id[aria-invalid=true]").wait_for()
    visit.fill("Id", "acme")
    visit.fill("Name", "Acme Ltd")
    visit.click("Create")
    visit.wait_for_title("Acme Ltd")
    visit.click("Install shop", "link")
    visit.see("which is set")  # the region is the environment's
    visit.fill("Client id", CLIENT_ID)
    visit.fill("Orders at most", "many")
    visit.fill("Options", "{")
    visit.click("Install")
    visit.see("is not valid JSON")
    wait_until(lambda: visit.page.evaluate("document.activeElement.id") == "config-options", "the focus is there")
    visit.fill("Options", '{"deep": [1, 2]}')
    visit.click("Install")
    visit.see("must be a finite number, not a string")
    visit.see("is required")
    assert visit.page.get_by_label("Client id").input_value() == CLIENT_ID
    visit.look("settings-wrong")
    visit.fill("Orders at most", "12.5")
    visit.fill("Client secret", SECRET)
    visit.click("Install")
    visit.see("shop is installed for acme", "#toasts")
    visit.page.get_by_role("button", name="Save").wait_for()
    installed = Manager(visit.host).get("/orgs/acme/plugins/shop")
    assert installed["config"] == {
        "clientId": CLIENT_ID,
        "clientSecret": "********",
        "limit": 12.5,
        "options": {"deep": [1, 2]},
    }
    assert SECRET not in visit.page.content()


def connect(visit: Visit, provider: Provider) -> None:
    """The account, in a window of its own."""
    visit.fill("Currency", "not saved yet")
    with visit.page.expect_popup() as opened:
        visit.click("Connect")
    visit.see("The plugin accepts the credentials")
    assert opened.value.is_closed() or opened.value.url.startswith((visit.origin, "about:"))
    assert visit.page.get_by_label("Currency").input_value() == "not saved yet"
    shown = Manager(visit.host).get("/orgs/acme/plugins/shop")
    assert (shown["authValidity"], shown["auth"]["methodId"]) == ("valid", "oauth")
    assert len(provider.issued) == 1
    visit.fill("Currency", "")
    visit.look("settings")


def use(visit: Visit) -> None:
    """A route and a tool, tried."""
    visit.click("Worker", "link", exact=True)
    visit.wait_for_title("shop of acme")
    visit.page.get_by_label("name", exact=False).first.fill("Ada & <b>Co</b>/x")
    visit.click("Send")
    visit.see('"message": "Hello Ada & <b>Co</b>/x"')
    visit.see("ready")
    visit.click("List its tools")
    visit.click("Call add")
    visit.click("Call", exact=True)
    visit.see("is required")
    visit.page.locator("#arg-0").fill("2")
    visit.page.locator("#arg-1").fill("40")
    visit.click("Call", exact=True)
    visit.see("sum 42")
    visit.see("the shop is open")
    visit.see("hello to <img src=x onerror=alert(1)> Ada & <b>Co</b>/x")
    assert visit.page.locator("main img, main b b").count() == 0
    visit.look("worker")


def crash_and_heal(visit: Visit, gate: Path) -> None:
    """A worker that dies, and does not come up again until what is wrong is put right."""
    gate.touch()
    visit.page.get_by_label("Route", exact=True).select_option(label="POST /crash")
    visit.click("Send")
    visit.see("502")
    visit.see("the worker died")
    visit.click("Overview", "link")
    visit.see("The worker is down")
    visit.see("What is wrong now")
    visit.see("What to do")
    visit.look("overview-problem")
    gate.unlink()
    visit.click("Open the worker", "link")
    visit.wait_for_title("shop of acme")
    visit.click("Restart")
    visit.page.get_by_label("name", exact=False).first.fill("again")
    visit.click("Send")
    visit.see("Hello again")
    visit.click("Overview", "link")
    visit.see("Nothing is wrong")


def reload_and_roll_back(visit: Visit, provider: Provider, folder: Path) -> None:
    """What is saved serves; what does not load is shown with the author's traceback; and back."""
    visit.go("/plugins/shop", "shop")
    write_shop(folder, provider, "Good day,")
    visit.see("reload")
    roll = visit.page.get_by_role("button", name="Roll back")
    wait_until(roll.is_enabled, "something to roll back to")
    wait_until(lambda: b"Good day" in visit.host.get("/plugins/shop/acme/hello/x").body, "the new version serves")
    write_plugin(folder / "plugins" / "shop", "import nothing_of_this_name", env=("SHOP_REGION",))
    visit.see("What is on the disk does not load")
    visit.see("nothing_of_this_name")
    visit.look("plugin-error")
    roll.click()
    visit.page.keyboard.press("Escape")
    visit.page.locator("dialog").wait_for(state="detached")
    roll.click()
    visit.page.locator("dialog").get_by_role("button", name="Roll back").click()
    visit.see("rollback")
    wait_until(lambda: b"Hello" in visit.host.get("/plugins/shop/acme/hello/x").body, "the version before serves")
    visit.look("plugin")


# ---- what it is like with tokens, many workers, and no host


def test_with_tokens_one_signs_in_and_an_org_sees_its_own(chromium: Any, tmp_path: Path) -> None:
    with managed(tmp_path) as manager:
        manager.put("acme")
        manager.put("beta", config={"fault": "on_start:raise"})
        admin = manager.token = manager.new_token("me")
        acme = manager.new_token("acme", "acme")
        for org in ("acme", "beta"):
            assert manager.host.get(f"/plugins/recorder/{org}/value").status == 200
        with visiting(chromium, manager.host, tmp_path / "pictures", "401") as visit:
            visit.wait_for_title("Sign in")
            visit.look("sign-in")
            visit.fill("Token", "hay_0123456789abcdef_wrong")
            visit.page.keyboard.press("Enter")
            visit.see("not a good one")
            visit.fill("Token", acme)
            visit.click("Sign in")
            visit.wait_for_title("Overview")
            visit.see("Nothing is wrong")  # beta's trouble is none of theirs
            visit.click("Workers", "link")
            visit.see("1 in all")
            assert visit.page.get_by_role("link", name="Doctor").count() == 0
            visit.click("Organisation", "link")
            visit.wait_for_title("acme")
            visit.see("recorder")
            visit.look("org")
            assert acme not in visit.page.content()
            assert visit.page.evaluate("localStorage.length") == 0
        with visiting(chromium, manager.host, tmp_path / "pictures", "401") as visit:
            visit.fill("Token", admin)
            visit.page.keyboard.press("Enter")
            visit.see("The worker serves, but degraded")
            visit.see("recorder of beta")
            visit.click("Doctor", "link")
            visit.see("What a worker could do when it tried")
            visit.look("doctor")
            visit.click("Plugins", "link")
            visit.see("version")
            visit.look("plugins")
            manager.ok("DELETE", f"/tokens/{admin.split('_')[1]}")
            visit.wait_for_title("Sign in")


def test_three_thousand_workers_in_one_table(chromium: Any, tmp_path: Path) -> None:
    """Only what can be seen is in the document; filters, order and keys go over all."""
    write_plugin(tmp_path / "broken", "import nothing_of_this_name")
    write_plugin(tmp_path / "sound", PREAMBLE + PLUGIN)
    with hosting(tmp_path, "--spares=0", "--store", tmp_path / "store.db", "--mode=test") as host:
        connection = host.connect()
        for number in range(3_000):  # each has nothing to start from, and keeps why
            connection.request("GET", f"/plugins/broken/org-{number:04}/mcp/list-tools")
            answer = connection.getresponse()
            answer.read()
            assert answer.status == 503
        connection.close()
        with visiting(chromium, host, tmp_path / "pictures", "503") as visit:
            visit.see("3,000 organisations")  # one problem, not three thousand
            visit.click("Workers", "link")
            visit.see("3,000 in all")
            rows = visit.page.locator(".rows [role=row]")
            assert 5 < rows.count() < 60
            visit.look("workers")
            grid = visit.page.get_by_role("grid")
            grid.focus()
            visit.page.keyboard.press("End")
            visit.see("org-2999", ".rows")
            assert rows.count() < 60
            assert grid.get_attribute("aria-rowcount") == "3001"
            visit.page.keyboard.press("ArrowUp")
            active = f"#{grid.get_attribute('aria-activedescendant')}"
            assert visit.page.locator(active).get_attribute("aria-selected") == "true"
            visit.click("Worker", exact=True)
            wait_until(lambda: visit.page.locator("[aria-sort=descending]").count() == 1, "the other order")
            visit.fill("Find", "org-17")
            visit.see("100 of 3,000")
            assert grid.evaluate("grid => grid.scrollTop") == 0
            visit.page.get_by_label("State").select_option("ready")
            visit.see("None is like this")
            visit.page.get_by_label("State").select_option("trouble")
            visit.fill("Find", "org-1742")
            grid.focus()
            visit.page.keyboard.press("Enter")
            visit.wait_for_title("broken of org-1742")


def test_it_says_that_the_host_is_away_and_goes_on_when_it_is_back(chromium: Any, tmp_path: Path) -> None:
    write_plugin(tmp_path / "plugins" / "sound", PREAMBLE + PLUGIN)
    options = ("--store", tmp_path / "store.db")
    with contextlib.ExitStack() as stack:
        host = stack.enter_context(hosting(tmp_path / "plugins", *options))
        visit = stack.enter_context(visiting(chromium, host, tmp_path / "pictures", "net::ERR_"))
        visit.see("Nothing is wrong")
        assert host.stop() == 0  # an open dashboard does not hold it up
        visit.see("The host cannot be reached")
        visit.see("Disconnected", "header")
        stack.enter_context(hosting(tmp_path / "plugins", *options, "--port", host.port))
        visit.see("Live", "header")
        visit.gone("The host cannot be reached")


def test_one_goes_through_it_by_keyboard(chromium: Any, tmp_path: Path) -> None:
    write_plugin(tmp_path / "plugins" / "sound", PREAMBLE + PLUGIN)
    options = ("--store", tmp_path / "store.db")
    with hosting(tmp_path / "plugins", *options) as host, visiting(chromium, host, tmp_path / "pictures") as visit:
        visit.see("Nothing is wrong")
        keyboard = visit.page.keyboard
        visit.page.evaluate("document.activeElement.blur()")
        keyboard.press("Tab")
        assert visit.page.evaluate("document.activeElement.className") == "skip"
        for _ in range(3):
            keyboard.press("Tab")
        keyboard.press("Enter")
        visit.wait_for_title("Plugins")
        assert visit.page.evaluate("document.activeElement.id") == "title"  # where a screen reader goes on
        visit.page.get_by_role("button", name="Colours").press("Enter")
        visit.page.get_by_role("button", name="Colours: light").press("Enter")
        assert visit.page.evaluate("document.documentElement.dataset.theme") == "dark"


def test_in_test_mode_without_a_store(chromium: Any, tmp_path: Path) -> None:
    write_plugin(tmp_path / "plugins" / "sound", PREAMBLE + PLUGIN)
    with hosting(tmp_path / "plugins") as host, visiting(chromium, host, tmp_path / "pictures") as visit:
        assert host.get("/plugins/sound/any/health").status == 200
        visit.see("every org is known")
        assert visit.page.get_by_role("link", name="Organisations").count() == 0
        visit.go("/workers/sound/any", "sound of any")
        visit.see("stopped")
        visit.go("/nowhere", "There is no such page")
