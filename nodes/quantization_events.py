"""What the server tells the interface about a quantized model: the report, for the node that made it."""

from dataclasses import asdict

from ..para_core.quantization_report import QuantizationReport
from .events import say_on_node


def send_quantization_report(node_id: str, report: QuantizationReport) -> None:
    """Send all numbers as event `para.fp8`."""
    say_on_node("para.fp8", node_id, report.summary(), asdict(report))
