"""What the command line changes in a store while a host serves from it."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import HostProcess, wait_until
from .storing import BACKENDS, make_url
from .test_store_cli import Shop

pytestmark = pytest.mark.timeout(600)
Start = Callable[..., HostProcess]
FOLLOWS = 20.0
"""Seconds within which a host has followed, on a slow day; it takes less than one."""


@pytest.fixture(params=BACKENDS)
def shop(request: pytest.FixtureRequest, tmp_path: Path) -> Shop:
    url = make_url(request.param, tmp_path / "shop") if request.param == "postgresql" else str(tmp_path / "shop/s.db")
    made = Shop(tmp_path / "shop", url)
    made.key_file = tmp_path / "shop/the.key"
    made.env["HAYHOST_KEY_FILE"] = str(made.key_file)
    return made


def test_a_running_host_follows(start: Start, shop: Shop) -> None:
    arguments = ("serve", shop.folder / "plugins", "--port=0", "--log-format=json")
    host = start(*arguments, env=shop.env).wait_ready()
    show = "/plugins/shop/acme/show"
    assert host.get(show).status == 404

    def follows(what: dict[str, object] | int) -> None:
        def followed() -> bool:
            answer = host.get(show)
            return answer.status == what if isinstance(what, int) else answer.status == 200 and answer.json() == what

        wait_until(followed, f"{what} at {show}", FOLLOWS)

    shop.did("org", "add", "acme")
    shop.did("install", "shop", "acme", "note=one")
    follows({"note": "one", "secret": None})
    pid = host.health("shop", "acme")["pid"]
    shop.hooks()
    shop.did("config", "set", "shop", "acme", "note=two", "secret=-", stdin="whsec_5ecret")
    follows({"note": "two", "secret": "whsec_5ecret"})
    assert host.health("shop", "acme")["pid"] != pid
    assert shop.hooks() == ["on_config_update two"], "once, and not by the host too"
    shop.did("install", "shop", "acme", "--disabled")
    follows(404)
    assert shop.hooks() == ["on_disable acme"]
    shop.did("install", "shop", "acme")
    follows({"note": "two", "secret": "whsec_5ecret"})
    shop.did("org", "remove", "acme", "--yes")
    follows(404)
    assert "whsec_5ecret" not in host.log


def test_tokens_and_rollback(start: Start, shop: Shop) -> None:
    host = start("serve", shop.folder / "plugins", "--port=0", "--log-format=json", env=shop.env).wait_ready()
    url = f"http://127.0.0.1:{host.port}"
    assert host.get("/api/v1/plugins").status == 200
    token = shop.hay("token", "create", "ci").out.strip()
    wait_until(lambda: host.get("/api/v1/plugins").status == 401, "a token is needed", FOLLOWS)
    [said] = shop.refused("rollback", "shop", "--url", url)
    assert said.startswith("shop: This needs a bearer token")
    assert said.endswith("; set HAYHOST_TOKEN, or give --token-file")
    file = shop.folder / "token"
    file.write_text(token + "\n")
    with_token = shop.refused("rollback", "shop", "--url", url, HAYHOST_TOKEN=token)
    assert shop.refused("rollback", "shop", "--url", url, "--token-file", file) == with_token
    assert "token" not in with_token[0]
    file.write_text("two words")
    assert shop.refused("rollback", "shop", "--url", url, "--token-file", file) == [f"{file}: is not a token"]
    shop.did("token", "revoke", token.split("_")[1])
    headers = {"Authorization": f"Bearer {token}"}
    wait_until(lambda: host.get("/api/v1/plugins", headers=headers).status == 401, "it is revoked", FOLLOWS)
    [said] = shop.refused("rollback", "shop", "--url", url, HAYHOST_TOKEN=token)
    assert token not in said
    audit = json.loads(shop.did("audit", "--json"))
    assert [entry["action"] for entry in audit if entry["action"].startswith("token.")] == [
        *("token.revoke", "token.create")
    ]


def test_a_token_is_sent_nowhere_else(tmp_path: Path) -> None:
    asked: list[bytes] = []

    async def main() -> list[str]:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            asked.append(await reader.readuntil(b"\r\n\r\n"))
            writer.write(
                b"HTTP/1.1 302 Found\r\nLocation: /elsewhere\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
            )
            writer.close()

        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            shop = Shop(tmp_path / "shop", "s.db")
            return await asyncio.to_thread(shop.refused, "rollback", "shop", "--url", url, HAYHOST_TOKEN="hay_5ecret")

    assert asyncio.run(main()) == ["shop: the host answered 302"]
    assert len(asked) == 1
    assert b"Bearer hay_5ecret" in asked[0]
