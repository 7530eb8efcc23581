"""What quantizing a model gave: which layers, which were left and why, bytes, and the error of the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .quantization import QuantizedWeight
from .quantization_scheme import Scheme, compiled_lacks, has_kernels

NAMES_SHOWN = 3  # of the layers that were left for one reason


@dataclass(frozen=True)
class QuantizationReport:
    """What was done to one model.

    quantized: layer names. left: name to reason. bytes_before, bytes_after: of the quantized layers' weights.
    num_weights: in them. weight_error: relative L2 of all of them; None where the original weights are gone.
    note: what to know about this device; may be empty.
    """

    scheme: str
    quantized: tuple[str, ...]
    left: Mapping[str, str]
    bytes_before: int
    bytes_after: int
    num_weights: int
    weight_error: float | None
    note: str = ""

    @property
    def share_of_bf16(self) -> float:
        """The memory of the quantized layers over that in bfloat16, whatever they were in."""
        return self.bytes_after / (2 * self.num_weights)

    @property
    def reasons(self) -> dict[str, list[str]]:
        """The layers that were left by the reason for it, the most frequent one first."""
        found: dict[str, list[str]] = {}
        for name, why in self.left.items():
            found.setdefault(why, []).append(name)
        return dict(sorted(found.items(), key=lambda entry: -len(entry[1])))

    def summary(self) -> str:
        """One line with the numbers."""
        reasons = ", ".join(f"{len(names)} {why}" for why, names in self.reasons.items())
        left = f"; left {len(self.left)}: {reasons}" if reasons else ""
        return (
            f"{self.scheme}: {len(self.quantized)} layers, {self._memory()}, "
            f"weight error {self._error()}{left}{'; ' + self.note if self.note else ''}"
        )

    def text(self) -> str:
        """The same for a person, a line for each fact, with names of layers that were left."""
        lines = [
            f"FP8 Quantize, scheme {self.scheme}",
            f"Layers: {len(self.quantized)} quantized, {len(self.left)} left",
            *(f"Left, {why}: {_some(names)}" for why, names in self.reasons.items()),
            f"Memory of the quantized layers: {self._memory()}",
            f"Weight error: {self._error()} (relative L2)",
            f"Note: {self.note}" if self.note else "",
        ]
        return "\n".join(filter(None, lines))

    def _error(self) -> str:
        return "unknown" if self.weight_error is None else f"{self.weight_error:.2%}"

    def _memory(self) -> str:
        before, after = self.bytes_before, self.bytes_after
        return f"{size(before)} -> {size(after)}" + (f" ({after / before:.2f})" if before else "")


@dataclass
class Tally:
    """Adds up a report while the layers of a model are quantized one by one."""

    scheme: Scheme
    left: dict[str, str]
    quantized: list[str] = field(default_factory=list)
    bytes_before: int = 0
    bytes_after: int = 0
    num_weights: int = 0
    _error: float = 0.0
    _norm: float = 0.0

    def add(self, name: str, weight: Tensor, quantized: QuantizedWeight) -> None:
        """Waits for the device."""
        reference = weight.detach().float()
        self.quantized.append(name)
        self.bytes_before += weight.nbytes
        self.bytes_after += quantized.nbytes
        self.num_weights += weight.numel()
        self._error += float((quantized.dequantize(torch.float32) - reference).square().sum())
        self._norm += float(reference.square().sum())

    def report(self, device: torch.device) -> QuantizationReport:
        """device: on which the model will run."""
        error = (self._error / self._norm) ** 0.5 if self._norm else 0.0
        numbers = (self.bytes_before, self.bytes_after, self.num_weights, error)
        return QuantizationReport(
            self.scheme.name, tuple(self.quantized), self.left, *numbers, note(self.scheme, device)
        )


def note(scheme: Scheme, device: torch.device) -> str:
    """What a person should know about this scheme on this device; empty where nothing is amiss."""
    if scheme.dynamic and not has_kernels(scheme, device):
        return f"{device.type} has no kernels for it: the reference computes the same numbers and is not faster"
    if not scheme.dynamic:
        lacks = compiled_lacks(scheme, device)
        return "weight only: less memory, not faster" + (f"; {lacks}" if lacks else "")
    return ""


def size(num_bytes: float) -> str:
    """Bytes in the unit that suits them."""
    for unit in ("B", "KB", "MB"):
        if num_bytes < 1024:
            return f"{num_bytes:.4g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.4g} GB"


def _some(names: Sequence[str]) -> str:
    more = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
