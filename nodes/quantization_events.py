"""What the server tells the interface about a quantized model: the report, on the node that made it."""

from dataclasses import asdict

from server import PromptServer

from ..para_core.quantization_report import QuantizationReport


def send_quantization_report(node_id: str, report: QuantizationReport) -> None:
    """Write the summary on the node, and send all numbers as event `para.fp8` to the client whose workflow runs."""
    server = PromptServer.instance
    summary = report.summary()
    server.send_sync("para.fp8", {"node": node_id, "summary": summary, **asdict(report)}, server.client_id)
    server.send_progress_text(summary, node_id)
