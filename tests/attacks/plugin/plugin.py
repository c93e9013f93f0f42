"""A hostile plugin: ``POST /attack/NAME`` with who to aim at, and it tells what came of it."""

import os
from pathlib import Path
from typing import Any

from attack_code import ATTACKS, at_import, perform

from hayhost.sdk import HayGlobalContext, HTTPError, Request, define_hay_plugin

_AT_IMPORT = Path(__file__).parent / "at_import.txt"
if _AT_IMPORT.exists():
    at_import.prepare(_AT_IMPORT.read_text().strip())


@define_hay_plugin
class Attacks:
    name = "Attacks"

    def on_initialize(self, ctx: HayGlobalContext) -> None:
        ctx.register.route("POST", "/attack/{name}", self.attack)
        ctx.register.route("GET", "/pid", self.pid)

    async def attack(self, req: Request) -> Any:
        try:
            attack = ATTACKS[req.params["name"]]
        except KeyError:
            raise HTTPError(404, "No such attack") from None
        return await perform(attack, req.json())

    async def pid(self, req: Request) -> dict[str, Any]:
        return {"pid": os.getpid(), "parent": os.getppid(), "scratch": os.environ.get("TMPDIR", "/tmp")}
