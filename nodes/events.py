"""What the server tells the interface: the report of a run, shown on the node that caused it."""

from collections.abc import Callable
from dataclasses import asdict

from server import PromptServer

from ..para_core.cache_report import RunReport


def send_report(node_id: str) -> Callable[[RunReport], None]:
    """A listener that writes each run's summary on the node and sends the numbers as event `para.fbcache`."""

    def send(report: RunReport) -> None:
        server = PromptServer.instance
        server.send_progress_text(report.summary(), node_id)
        server.send_sync("para.fbcache", {"node": node_id, "summary": report.summary(), **asdict(report)})

    return send
