"""A training run bounded by minutes: its schedule, checkpoints and log."""

import logging
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image

log = logging.getLogger(__name__)


class Run:
    """Counts steps and seconds of a training run, and saves what it is given every few minutes.

    `stateful` maps names to objects with `state_dict` and `load_state_dict`; they are loaded back at once
    from the checkpoint in `out`, when there is one.
    """

    def __init__(self, out: Path, stateful: dict[str, object], *, minutes: float, save_every: float = 180.0) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.out, self.stateful, self.seconds, self.save_every = out, stateful, minutes * 60, save_every
        self.step, self.spent = 0, 0.0
        self._losses: list[torch.Tensor] = []
        self._load()

    @property
    def progress(self) -> float:
        """The share of the minutes that is spent, 0 to 1."""
        return min(1.0, self.spent / self.seconds)

    def schedule(self, *, warmup: int, decay_from: float) -> float:
        """Return the factor of the learning rate: linear warmup, constant, cosine to zero from `decay_from` on."""
        decay = max(0.0, self.progress - decay_from) / (1 - decay_from)
        return min(1.0, (self.step + 1) / warmup) * (0.5 + 0.5 * math.cos(math.pi * decay))

    def steps(self, batches: Iterator) -> Iterator:
        """Yield batches until the minutes are spent, saving on the way and at the end."""
        saved = time.monotonic()
        while self.progress < 1:
            start = time.monotonic()
            yield next(batches)
            self.step += 1
            self.spent += time.monotonic() - start
            if time.monotonic() - saved > self.save_every:
                self.save()
                saved = time.monotonic()
        self.save()

    def log(self, loss: torch.Tensor, every: int = 50) -> None:
        """Log the mean loss of the last `every` steps."""
        self._losses.append(loss.detach())
        if len(self._losses) == every:
            mean = torch.stack(self._losses).mean().item()
            log.info("step %d loss %.4f, %.1f min", self.step + 1, mean, self.spent / 60)
            self._losses.clear()

    def save(self) -> None:
        """Write the checkpoint, replacing the last one only when it is complete."""
        state = {name: item.state_dict() for name, item in self.stateful.items()}
        torch.save({"step": self.step, "spent": self.spent, **state}, self.out / "last.tmp")
        (self.out / "last.tmp").replace(self.out / "last.pt")

    def _load(self) -> None:
        path = self.out / "last.pt"
        if not path.is_file():
            return
        state = torch.load(path, weights_only=True)
        self.step, self.spent = state["step"], state["spent"]
        for name, item in self.stateful.items():
            item.load_state_dict(state[name])
        log.info("continuing at step %d", self.step)


def write_sheet(pictures: torch.Tensor, path: Path, columns: int = 8) -> None:
    """Write pictures, (B, H, W, 3) in 0..1, as one PNG contact sheet."""
    height, width = pictures.shape[1] + 4, pictures.shape[2] + 4
    sheet = Image.new("RGB", (columns * width, -(-len(pictures) // columns) * height), (255, 255, 255))
    for index, array in enumerate((pictures.clamp(0, 1) * 255).round().to(torch.uint8).numpy()):
        sheet.paste(Image.fromarray(array), (index % columns * width + 2, index // columns * height + 2))
    sheet.save(path)
