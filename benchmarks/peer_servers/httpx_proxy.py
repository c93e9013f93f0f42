"""A Starlette proxy with httpx, kept connections and all, in front of one uvicorn process per org."""

import asyncio

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from .workers import Workers, listen

WORKERS = Workers()
CLIENT = httpx.AsyncClient(limits=httpx.Limits(max_connections=1000, max_keepalive_connections=1000))


async def proxy(request: Request) -> Response:
    """Ask the org's worker."""
    port = await WORKERS.port(request.path_params["org"])
    headers = {"Content-Type": request.headers.get("Content-Type", "application/octet-stream")}
    url = f"http://127.0.0.1:{port}/{request.path_params['path']}"
    answer = await CLIENT.post(url, content=await request.body(), headers=headers)
    return Response(answer.content, answer.status_code, {"Content-Type": answer.headers.get("Content-Type", "")})


async def main() -> None:
    """Serve until ended."""
    listening = listen()
    print(listening.getsockname()[1], flush=True)
    application = Starlette(routes=[Route("/plugins/echo/{org}/{path:path}", proxy, methods=["POST"])])
    await uvicorn.Server(uvicorn.Config(application, log_level="critical", access_log=False)).serve([listening])
    WORKERS.end()


if __name__ == "__main__":
    asyncio.run(main())
