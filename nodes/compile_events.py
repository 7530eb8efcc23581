"""What the server tells the interface while a model is compiled, and when a run has ended, for the node that asked."""

from collections.abc import Callable
from dataclasses import asdict

from comfy_execution.progress import get_progress_state
from server import PromptServer

from ..para_core.compile_report import CompileReport
from .events import running_workflow


def send_compile_report(node_id: str) -> Callable[[CompileReport], None]:
    """A listener that sends the numbers as event `para.compile` to the client whose workflow runs.

    While something is compiled, the host's own progress bar is on the node too.
    """
    has_bar = False

    def send(report: CompileReport) -> None:
        nonlocal has_bar
        server = PromptServer.instance
        sender = {"node": node_id, "workflow": running_workflow(server), "summary": report.summary()}
        server.send_sync("para.compile", {**sender, **asdict(report)}, server.client_id)
        if report.compiling is not None or has_bar:
            has_bar = _show_bar(node_id, report)

    return send


def _show_bar(node_id: str, report: CompileReport) -> bool:
    """How many of the kinds of blocks are compiled; whether the bar stays."""
    # Not the host's ProgressBar, which would move the sampler's bar, and raises in whatever thread when cancelled.
    progress = get_progress_state()
    if report.finished or (report.compiling is None and report.num_kinds_compiled >= report.num_kinds):
        progress.finish_progress(node_id)
        return False
    # A kind that is being compiled counts half, so that the bar is not empty during the first one.
    done = report.num_kinds_compiled + (0.5 if report.compiling is not None else 0)
    progress.update_progress(node_id, min(done, report.num_kinds), report.num_kinds)
    return True
