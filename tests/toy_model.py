"""A toy model of two stacks with in-place blocks, and a call of it through the cache."""

import torch
from torch import nn

from para_core.block_forward import swapped_forwards
from para_core.families import BlockStack, ModelFamily, Stream
from para_core.run_state import Step


class Double(nn.Module):
    def __init__(self, index):
        super().__init__()
        self.calls, self.scale = 0, 0.3 + 0.1 * index

    def forward(self, img, txt):
        self.calls += 1
        img += self.scale * torch.sin(img + txt.mean(1, keepdim=True))
        txt += self.scale * torch.cos(txt)
        return img, txt


class Single(Double):
    def forward(self, x):
        self.calls += 1
        x += self.scale * torch.sin(2 * x + x.mean(1, keepdim=True))
        return x


class Toy(nn.Module):
    """order: of text and image where they are one tensor."""

    def __init__(self, order, num_double=2, num_single=3):
        super().__init__()
        self.order = order
        self.doubles = nn.ModuleList(Double(index) for index in range(num_double))
        self.singles = nn.ModuleList(Single(index) for index in range(num_single))

    def forward(self, img, txt, control=0.0):
        img, txt = img.clone(), txt.clone()
        for block in self.doubles:
            img, txt = block(img, txt=txt)
            img += control
        streams = {"img": img, "txt": txt}
        x = torch.cat([streams[name] for name in self.order], 1)
        start = 0 if self.order[0] == "img" else txt.shape[1]
        for block in self.singles:
            x = block(x)
            x[:, start : start + img.shape[1]] += control
        return x[:, start : start + img.shape[1]]


def family(order):
    streams = (Stream("img", 0, ("img",)), Stream("txt", 1, ("txt",)))
    return ModelFamily(
        "toy",
        ("Toy",),
        (
            BlockStack("doubles", streams, in_place=True),
            BlockStack("singles", (Stream("x", None, order),), in_place=True),
        ),
    )


def call(run, model, img, txt, *, keys=("a",), step=0, at=1.0, control=0.0, **where):
    num_blocks = [len(model.doubles), len(model.singles)]
    where = Step(step, 1.0, at=at, **where)
    with (
        run.call(run.family, num_blocks, {key: str(key) for key in keys}, where) as cached,
        swapped_forwards(model, run.family, cached),
    ):
        return model(img, txt, control)
