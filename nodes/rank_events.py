"""What the server tells the interface about the processes of the Context-Parallel Launcher, and what it may ask."""

import asyncio
from dataclasses import asdict

from aiohttp import web
from server import PromptServer

from ..para_core.adapters.comfy_groups import Groups
from ..para_core.parallel_notice import ParallelNotice
from .events import say_on_node

# The server's processes, for as long as it runs.
GROUPS = Groups()


def send_notice(node_id: str, notice: ParallelNotice) -> None:
    """Send it as event `para.parallel`."""
    say_on_node("para.parallel", node_id, notice.text(), asdict(notice))


def add_routes() -> None:
    """The addresses that the panel asks: which ranks there are, and to stop them all."""
    server = getattr(PromptServer, "instance", None)
    if server is None:  # a tool that loads the nodes without a server
        return
    routes = server.routes

    @routes.get("/para/ranks")
    async def ranks(_: web.Request) -> web.Response:
        return web.json_response(await asyncio.to_thread(GROUPS.state))

    @routes.post("/para/ranks/stop")
    async def stop(_: web.Request) -> web.Response:
        await asyncio.to_thread(GROUPS.close)
        return web.json_response({})
