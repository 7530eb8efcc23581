"""What the server tells the interface about the processes of the Context-Parallel Launcher, and what it may ask."""

import asyncio

from aiohttp import web
from server import PromptServer

from ..para_core.adapters.comfy_groups import Groups

# The server's processes, for as long as it runs.
GROUPS = Groups()


def say_on_node(node_id: str, text: str) -> None:
    """Write a line on the node."""
    PromptServer.instance.send_progress_text(text, node_id)


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
