"""What the server tells the interface: the report of a run while it goes on, shown on the node that caused it."""

import time
from collections.abc import Callable
from dataclasses import asdict

from server import PromptServer

from ..para_core.cache_report import RunReport

MIN_INTERVAL = 0.1  # seconds between two events of one running run; the last one is always sent


def send_report(node_id: str) -> Callable[[RunReport], None]:
    """A listener that sends the numbers as event `para.fbcache`, and at the end writes the summary on the node."""
    last_sent = 0.0

    def send(report: RunReport) -> None:
        nonlocal last_sent
        now = time.monotonic()
        if not report.finished and now - last_sent < MIN_INTERVAL:
            return
        last_sent = now
        server = PromptServer.instance
        server.send_sync("para.fbcache", {"node": node_id, "summary": report.summary(), **asdict(report)})
        if report.finished:
            server.send_progress_text(report.summary(), node_id)

    return send
