"""Clients of many orgs, who look at every answer: whose it is, whether it is one, and what it says was kept."""

import asyncio
import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final

import aiohttp

from tests.mcping import stateless_request

__all__ = ["Clients", "Tenant", "Violations", "canary_of"]

CANARY: Final = re.compile(rb"hcan-\d+-[0-9a-f]{16}")
SECRET: Final = "hsec-"
"""How the sensitive settings begin, which nobody ever sees again."""
# What may be answered while things die, by README: no worker, one that died, one that took too long.
FAILURES: Final = frozenset({502, 503, 504})


def canary_of(number: int, seed: int) -> str:
    """The canary of an org."""
    return f"hcan-{number}-{hashlib.sha256(f'{seed}/{number}'.encode()).hexdigest()[:16]}"


class Violations:
    """What must not be. The first of a kind are kept whole."""

    def __init__(self) -> None:
        self.count = 0
        self.told: list[str] = []

    def add(self, what: str) -> None:
        """One more."""
        self.count += 1
        if len(self.told) < 30:
            self.told.append(what)


class Tenant:
    """An org's plugin, with what its settings have been set to."""

    def __init__(self, org: int, plugin: str, seed: int) -> None:
        self.org = f"org{org}"
        self.plugin = plugin
        self.canary = canary_of(org, seed)
        self.secret = SECRET + self.canary[5:]
        self.base = f"/plugins/{plugin}/{self.org}"
        self.management = f"/api/v1/orgs/{self.org}/plugins/{plugin}"
        self.writing = asyncio.Lock()
        self.acknowledged = 0
        """The last write that was answered 2xx."""
        self.possible: set[int] = set()
        """Later ones that failed: nobody can say whether they were done."""
        self.sent = 0

    def config(self, value: int) -> dict[str, str]:
        """All its settings."""
        return {"canary": self.canary, "secret": self.secret, "value": str(value)}

    def may_be(self, value: object) -> bool:
        """Whether its stored value may be this."""
        return value in {str(self.acknowledged), *map(str, self.possible)}


class Got:
    """An answer that has been read to its end, or to where it was broken off."""

    def __init__(self, status: int, headers: Any, body: bytes, whole: bool) -> None:
        self.status = status
        self.headers = headers
        self.body = body
        self.whole = whole

    def json(self) -> Any:
        return json.loads(self.body)


class Clients:
    """Some clients, each asking for one tenant after the other. ``limit`` is in seconds, for any answer."""

    def __init__(self, tenants: list[Tenant], seed: int, violations: Violations, echo_port: int) -> None:
        self.tenants = tenants
        self.statuses: Counter[str] = Counter()
        self.limit = 90.0
        self.violations = violations
        self.port = 0
        self._seed = seed
        self._echo_port = echo_port
        self._session: aiohttp.ClientSession
        self._stopping = False
        self._tasks: list[asyncio.Task[None]] = []
        self._kinds: list[tuple[int, Callable[[Tenant, random.Random], Awaitable[object]]]] = [
            (30, self._plain),
            (8, self._thread),
            (4, self._pause),
            (2, self._busy),
            (8, self._upload),
            (6, self._echo),
            (6, self._stream),
            (5, self._dial),
            (8, self._list_tools),
            (8, self._call_tool),
            (4, self._mcp),
            (8, self.write),
            (2, self._config_update),
            (1, self._restart),
            (4, self._read),
            (3, self._health),
            (10, self._abort),
        ]

    async def __aenter__(self) -> "Clients":
        self._session = _session()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()
        await self._session.close()

    # ---- running

    def start(self, count: int) -> None:
        """Begin to ask, as ``count`` clients."""
        self._stopping = False
        self._tasks = [asyncio.create_task(self._run(number)) for number in range(count)]

    async def stop(self) -> None:
        """Let every client finish what it has begun, and no more."""
        self._stopping = True
        tasks, self._tasks = self._tasks, []
        for problem in await asyncio.gather(*tasks, return_exceptions=True):
            if problem is not None:
                self.violations.add(f"a client failed: {problem!r}")

    async def leave(self) -> None:
        """Close all connections that are kept for later requests."""
        await self._session.close()
        self._session = _session()

    async def _run(self, number: int) -> None:
        chance = random.Random(f"{self._seed}/{number}")
        weights, kinds = zip(*self._kinds, strict=True)
        favourites = chance.sample(self.tenants, max(1, len(self.tenants) // 4))
        while not self._stopping:
            tenant = chance.choice(favourites if chance.random() < 0.7 else self.tenants)
            [kind] = chance.choices(kinds, weights)
            await kind(tenant, chance)

    # ---- one request

    async def ask(
        self,
        tenant: Tenant,
        method: str,
        path: str,
        *,
        allowed: frozenset[int] = FAILURES,
        good: frozenset[int] = frozenset({200}),
        data: Any = None,
        headers: dict[str, str] | None = None,
    ) -> Got | None:
        """An answer, if it is a good one and whole; everything that is wrong with it is a violation."""
        got = await self.raw(tenant, method, path, data=data, headers=headers)
        if got is None:
            return None
        what = f"{method} {path}: {got.status} {got.body[:300]!r}"
        if got.status in good:
            return got if got.whole else None
        if got.status not in allowed:
            self.violations.add(f"not a documented status: {what}")
        elif got.whole:
            self._check_error(got, what)
        return None

    def _check_error(self, got: Got, what: str) -> None:
        try:
            error = got.json()["error"]
            assert isinstance(error, str)
        except (ValueError, TypeError, KeyError, AssertionError):
            self.violations.add(f"an error that is not JSON: {what}")
            return
        if CANARY.search(got.body):
            self.violations.add(f"an error with a canary in it: {what}")
        if got.status == 503 and not got.headers.get("Retry-After", "").isdigit():
            self.violations.add(f"503 without Retry-After: {what}")

    async def raw(
        self, tenant: Tenant, method: str, path: str, *, data: Any, headers: dict[str, str] | None
    ) -> Got | None:
        """Whatever is answered. ``None``, which is a violation, if nothing is."""
        url = f"http://127.0.0.1:{self.port}{path}"
        sent = {"X-Canary": tenant.canary, **(headers or {})}
        body, whole = b"", True
        try:
            async with asyncio.timeout(self.limit):
                async with self._session.request(method, url, data=data, headers=sent) as response:
                    try:
                        async for piece in response.content.iter_any():
                            body += piece
                    except (aiohttp.ClientPayloadError, aiohttp.ClientConnectionError):
                        whole = False  # broken off, and the client can tell
        except TimeoutError:
            self.violations.add(f"no answer within {self.limit:.0f} s: {method} {path}")
            return None
        except (aiohttp.ClientError, OSError) as error:
            self.violations.add(f"no answer: {method} {path}: {error!r}")
            return None
        self.statuses[str(response.status) if whole else f"{response.status} broken off"] += 1
        said = body + b"".join(b"\n" + value for _, value in response.raw_headers)
        if foreign := {found.decode() for found in CANARY.findall(said)} - {tenant.canary}:
            self.violations.add(f"FOREIGN CANARY {foreign} for {tenant.org}: {method} {path}: {body[:500]!r}")
        if SECRET.encode() in said:
            self.violations.add(f"a secret is shown: {method} {path}: {body[:300]!r}")
        return Got(response.status, response.headers, body, whole)

    def _own(self, tenant: Tenant, got: Got | None, nonce: str | None = None) -> Any:
        """The JSON of an answer of the plugin's, which must be about this tenant and, with ``nonce``, this request."""
        if got is None:
            return None
        told = got.json()
        if (told["org"], told["canary"]) != (tenant.org, tenant.canary) or told["seen"] != [tenant.canary]:
            self.violations.add(f"of another org: {tenant.org}: {told}")
        if nonce is not None and told["nonce"] != nonce:
            self.violations.add(f"the answer to another request: {nonce}: {told}")
        return told

    # ---- kinds of requests

    async def plain(self, tenant: Tenant, nonce: str = "") -> Any:
        """The tenant's version and value, if its worker can be had now."""
        got = await self.ask(tenant, "GET", f"{tenant.base}/plain", headers={"X-Nonce": nonce})
        return self._own(tenant, got, nonce)

    async def _plain(self, tenant: Tenant, chance: random.Random) -> None:
        log = "?log" if chance.random() < 0.02 else ""
        nonce = f"{chance.getrandbits(48):x}"
        got = await self.ask(tenant, "GET", f"{tenant.base}/plain{log}", headers={"X-Nonce": nonce})
        self._own(tenant, got, nonce)

    async def _thread(self, tenant: Tenant, chance: random.Random) -> None:
        nonce = f"{chance.getrandbits(48):x}"
        self._own(tenant, await self.ask(tenant, "GET", f"{tenant.base}/thread", headers={"X-Nonce": nonce}), nonce)

    async def _pause(self, tenant: Tenant, chance: random.Random) -> None:
        self._own(tenant, await self.ask(tenant, "GET", f"{tenant.base}/pause/{chance.randrange(300)}"))

    async def _busy(self, tenant: Tenant, chance: random.Random) -> None:
        self._own(tenant, await self.ask(tenant, "GET", f"{tenant.base}/busy/{chance.randrange(100)}"))

    def _body(self, tenant: Tenant, chance: random.Random) -> bytes:
        size = int(10 ** chance.uniform(1, 5.9))
        return (f"{tenant.canary}\n".encode() * (size // 20 + 1))[:size]

    async def _upload(self, tenant: Tenant, chance: random.Random) -> None:
        body = self._body(tenant, chance)
        data: Any = body if chance.random() < 0.5 else _pieces(body)
        allowed = FAILURES | {408}  # the clients starve, too
        told = self._own(tenant, await self.ask(tenant, "POST", f"{tenant.base}/upload", data=data, allowed=allowed))
        if told and (told["size"], told["digest"]) != (len(body), hashlib.sha256(body).hexdigest()):
            self.violations.add(f"an upload of {len(body)} bytes arrived as {told['size']}: {tenant.base}")

    async def _echo(self, tenant: Tenant, chance: random.Random) -> None:
        body = self._body(tenant, chance)
        got = await self.ask(tenant, "POST", f"{tenant.base}/echo", data=_pieces(body), allowed=FAILURES | {408})
        if got and got.body != body:
            self.violations.add(f"an echo of {len(body)} bytes has {len(got.body)} others: {tenant.base}")

    async def _stream(self, tenant: Tenant, chance: random.Random) -> None:
        pieces = chance.randrange(1, 30)
        got = await self.ask(tenant, "GET", f"{tenant.base}/stream/{pieces}")
        if got and got.body.count(b"\n") != pieces * 40:
            self.violations.add(f"a stream of {pieces * 40} lines ended after {got.body.count(b'%c' % 10)} as if whole")

    async def _dial(self, tenant: Tenant, _chance: random.Random) -> None:
        # 500 is the plugin's own answer to a broker that is away: its handler raises.
        got = await self.ask(tenant, "GET", f"{tenant.base}/dial/{self._echo_port}", allowed=FAILURES | {500})
        if (told := self._own(tenant, got)) and told["echoed"] != tenant.canary:
            self.violations.add(f"another connection's answer: {tenant.canary}: {told}")

    async def _list_tools(self, tenant: Tenant, _chance: random.Random) -> None:
        if got := await self.ask(tenant, "GET", f"{tenant.base}/mcp/list-tools"):
            for tool in got.json()["tools"]:
                if tool["description"] != tenant.canary:
                    self.violations.add(f"tools of another org: {tenant.org}: {tool}")

    async def _call_tool(self, tenant: Tenant, chance: random.Random) -> None:
        nonce = f"{chance.getrandbits(48):x}"
        call = json.dumps({"toolName": "whoami", "arguments": {"nonce": nonce}})
        got = await self.ask(tenant, "POST", f"{tenant.base}/mcp/call-tool", data=call, allowed=FAILURES | {404})
        if got and got.json() != {"canary": tenant.canary, "nonce": nonce}:
            self.violations.add(f"a tool's answer to another: {tenant.org} {nonce}: {got.body[:300]!r}")

    async def _mcp(self, tenant: Tenant, chance: random.Random) -> None:
        nonce = f"{chance.getrandbits(48):x}"
        body, headers = stateless_request("tools/call", {"name": "whoami", "arguments": {"nonce": nonce}})
        got = await self.ask(tenant, "POST", f"{tenant.base}/mcp", data=body, headers=headers)
        if got and b'"result"' in got.body and nonce.encode() not in got.body:
            self.violations.add(f"an MCP answer to another call: {tenant.org} {nonce}: {got.body[:300]!r}")

    async def _health(self, tenant: Tenant, _chance: random.Random) -> None:
        # 503 is how an unhealthy one is told, without an error.
        got = await self.raw(tenant, "GET", f"{tenant.base}/health", data=None, headers=None)
        if got and got.status not in (200, 503):
            self.violations.add(f"health: {got.status} {got.body[:300]!r}")

    async def _abort(self, tenant: Tenant, chance: random.Random) -> None:
        """Leave in the middle of a request."""
        path, data = chance.choice(
            [
                ("pause/500", None),
                ("stream/50", None),
                ("busy/50", None),
                ("upload", self._body(tenant, chance)),
                ("echo", _pieces(self._body(tenant, chance))),
            ]
        )
        url = f"http://127.0.0.1:{self.port}{tenant.base}/{path}"
        method = "GET" if data is None else "POST"
        try:
            async with asyncio.timeout(chance.choice([0, 0.005, 0.02, 0.1, 0.3])):
                async with self._session.request(method, url, data=data, headers={"X-Canary": tenant.canary}) as answer:
                    await answer.read()
        except (TimeoutError, aiohttp.ClientError):
            self.statuses["left"] += 1

    # ---- settings

    async def write(self, tenant: Tenant, chance: random.Random) -> None:
        """Change a setting, one at a time for each tenant, and keep in mind what was answered."""
        async with tenant.writing:
            if chance.random() < 0.5:
                await self.put(tenant)
            else:
                await self._sent(tenant, "PATCH", tenant.management, {"config": {"value": str(tenant.sent + 1)}})

    async def put(self, tenant: Tenant) -> bool:
        """Set all settings; whether that is answered 2xx."""
        return await self._sent(tenant, "PUT", tenant.management, {"config": tenant.config(tenant.sent + 1)})

    async def _config_update(self, tenant: Tenant, _chance: random.Random) -> None:
        async with tenant.writing:
            config = tenant.config(tenant.sent + 1)
            await self._sent(tenant, "POST", f"{tenant.base}/config-update", {"config": config})

    async def _sent(self, tenant: Tenant, method: str, path: str, body: dict[str, Any]) -> bool:
        tenant.sent += 1
        number = tenant.sent
        tenant.possible.add(number)
        good = frozenset({200, 201})
        headers = {"Content-Type": "application/json"}
        if await self.ask(tenant, method, path, data=json.dumps(body), good=good, headers=headers) is None:
            return False
        tenant.acknowledged = number
        tenant.possible.clear()
        return True

    async def _restart(self, tenant: Tenant, _chance: random.Random) -> None:
        await self.ask(tenant, "POST", f"{tenant.management}/restart")

    async def _read(self, tenant: Tenant, _chance: random.Random) -> None:
        async with tenant.writing:
            await self.read_back(tenant)

    async def read_back(self, tenant: Tenant) -> bool:
        """Whether the settings can be read now; what was answered 2xx must be among them."""
        got = await self.ask(tenant, "GET", tenant.management)
        if got is None:
            return False
        config = got.json()["config"]
        if not tenant.may_be(config["value"]):
            self.violations.add(
                f"A WRITE IS LOST: {tenant.management}: {config['value']}, "
                f"acknowledged {tenant.acknowledged}, possible {sorted(tenant.possible)}"
            )
        return True


def _session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None), connector=aiohttp.TCPConnector(limit=0))


async def _pieces(body: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(body), 30_000):
        yield body[start : start + 30_000]
        await asyncio.sleep(0)
