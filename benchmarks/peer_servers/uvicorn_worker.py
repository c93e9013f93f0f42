"""One org's worker of the usual kind: uvicorn and Starlette. ``python -m ... ORG``; starts when it is asked for."""

import asyncio
import sys

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from .workers import listen

ORG = sys.argv[1] if len(sys.argv) > 1 else ""


async def echo(request: Request) -> JSONResponse:
    """What the echo plugin answers."""
    return JSONResponse({"org": ORG, "query": {}, "body": await request.json()})


async def main() -> None:
    """Serve until ended. Who connects before the server runs waits in the socket's queue."""
    listening = listen()
    print(listening.getsockname()[1], flush=True)
    application = Starlette(routes=[Route("/{path:path}", echo, methods=["POST"])])
    await uvicorn.Server(uvicorn.Config(application, log_level="critical", access_log=False)).serve([listening])


if __name__ == "__main__":
    asyncio.run(main())
