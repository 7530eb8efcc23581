"""What the server tells the interface: the report of a run while it goes on, for the node that caused it."""

import time
from collections.abc import Callable
from dataclasses import asdict

from server import PromptServer

from ..para_core.cache_report import RunReport

MIN_INTERVAL = 0.1  # seconds between two events of one running run; the last one is always sent


def send_report(node_id: str) -> Callable[[RunReport], None]:
    """A listener that sends the numbers as event `para.fbcache` to the client whose workflow runs.

    The event names the node and, where the interface queued the run, its workflow: another one may be open by then.
    """
    last_sent = 0.0

    def send(report: RunReport) -> None:
        nonlocal last_sent
        now = time.monotonic()
        if not report.finished and now - last_sent < MIN_INTERVAL:
            return
        last_sent = now
        server = PromptServer.instance
        sender = {"node": node_id, "workflow": running_workflow(server)}
        server.send_sync("para.fbcache", {**sender, "summary": report.summary(), **asdict(report)}, server.client_id)

    return send


def say_on_node(event: str, node_id: str, summary: str, values: dict[str, object]) -> None:
    """Send what a node has to say, as values, to the client whose workflow runs; the interface finds the words.

    A client that is not the interface gets the summary, in English, as a progress text too.
    """
    server = PromptServer.instance
    workflow = running_workflow(server)
    sender = {"node": node_id, "workflow": workflow, "summary": summary}
    server.send_sync(event, {**sender, **values}, server.client_id)
    if workflow is None:
        server.send_progress_text(summary, node_id, server.client_id)


def running_workflow(server: PromptServer | None) -> str | None:
    """The id of the workflow that runs, None without one. Not from the node: the host may have kept it from another."""
    if server is None:  # a tool that runs the nodes without a server
        return None
    running, _ = server.prompt_queue.get_current_queue_volatile()
    for _number, _prompt_id, _prompt, extra_data, *_ in running:
        return ((extra_data.get("extra_pnginfo") or {}).get("workflow") or {}).get("id")
    return None
