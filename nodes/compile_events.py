"""What the server tells the interface while a model is compiled, and when a run has ended, for the node that asked."""

from collections.abc import Callable
from dataclasses import asdict

from server import PromptServer

from ..para_core.compile_report import CompileReport
from .events import running_workflow


def send_compile_report(node_id: str) -> Callable[[CompileReport], None]:
    """A listener that sends the numbers as event `para.compile` to the client whose workflow runs."""

    def send(report: CompileReport) -> None:
        server = PromptServer.instance
        sender = {"node": node_id, "workflow": running_workflow(server), "summary": report.summary()}
        server.send_sync("para.compile", {**sender, **asdict(report)}, server.client_id)

    return send
