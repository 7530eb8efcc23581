"""Small decoders of plain torch, one for each thing that a layer may do with rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Of(nn.Module):
    """A function of the latent as a module; its layers are attributes."""

    def __init__(self, function: Callable[..., Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, z: Tensor) -> Tensor:
        return self.function(self, z)


def conv(kernel: int, **settings) -> nn.Conv2d:
    return nn.Conv2d(4, 4, kernel, **settings)


def padded(mode: str, amounts: tuple[int, ...] = (1, 1, 1, 1)) -> Of:
    """The caller pads, the convolution does not."""
    return Of(lambda self, z: self.conv(F.pad(z, amounts, mode=mode)), conv=conv(3))


def tokens_attention(self: Of, z: Tensor) -> Tensor:
    """Over rows and columns as tokens, one head."""
    tokens = self.qkv(z).flatten(2).transpose(1, 2)
    q, k, v = (part[:, None] for part in tokens.chunk(3, -1))
    return F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).reshape(z.shape)


def product_attention(self: Of, z: Tensor) -> Tensor:
    """The same by two products."""
    b, c, h, w = z.shape
    q, k, v = (part.reshape(b, c, h * w) for part in self.qkv(z).chunk(3, 1))
    weights = torch.bmm(q.permute(0, 2, 1), k).mul(2.0).softmax(2)
    return torch.bmm(v, weights.permute(0, 2, 1)).reshape(b, c, h, w)


def causal_frames(self: Of, z: Tensor) -> Tensor:
    """A 3D convolution over frames that blank ones precede, written chunk by chunk to a buffer."""
    frames = torch.stack([z, z * 2, -z], 2)
    frames = torch.cat([torch.zeros_like(frames[:, :, :1]), torch.zeros(*frames.shape[:2], 1, *z.shape[2:]), frames], 2)
    out = torch.empty(z.shape[0], 4, 3, *z.shape[2:])
    for index in range(3):
        out[:, :, index : index + 1].copy_(self.conv(frames[:, :, index : index + 3]))
    return out


def depth_to_space(self: Of, z: Tensor) -> Tensor:
    b, c, h, w = z.shape
    wide = self.conv(z).view(b, 2, 2, c, h, w).permute(0, 3, 4, 1, 5, 2).reshape(b, c, h * 2, w * 2)
    return wide + z.repeat_interleave(2, -1).repeat_interleave(2, -2)


def frames_by_pixel(self: Of, z: Tensor) -> Tensor:
    """Attention over three frames, each pixel by itself, and channels mixed by a linear layer."""
    video = torch.stack([z, z.roll(1, 1), -z], 2).permute(0, 3, 4, 2, 1).flatten(0, 2)
    video = self.linear(F.scaled_dot_product_attention(video, video, video))
    return video.unflatten(0, (z.shape[0], z.shape[2], z.shape[3])).permute(0, 4, 3, 1, 2)


def norm_of(norm: nn.Module, *, offset: float = 0.0) -> Of:
    return Of(lambda self, z: self.norm(self.conv(z) + offset), norm=norm, conv=conv(1))


def upsampled(mode: str) -> Of:
    return Of(lambda self, z: self.conv(F.interpolate(z, scale_factor=2.0, mode=mode)), conv=conv(3, padding=1))


EXACT: dict[str, Callable[[], nn.Module]] = {
    "convolution": lambda: conv(3, padding=1),
    "convolution without neighbours": lambda: conv(1),
    "convolution that reaches beyond the neighbour": lambda: conv(7, padding=3),
    "dilated convolution": lambda: conv(3, padding=4, dilation=4),
    "grouped convolution": lambda: conv(3, padding=1, groups=2),
    "strided convolution after upsampling": lambda: nn.Sequential(
        nn.Upsample(scale_factor=2), conv(3, stride=2, padding=1)
    ),
    "patches": lambda: nn.Sequential(nn.Upsample(scale_factor=2), conv(2, stride=2)),
    "padding of one side only": lambda: nn.Sequential(
        nn.Upsample(scale_factor=2), nn.ZeroPad2d((0, 1, 0, 1)), conv(3, stride=2)
    ),
    "transposed convolution": lambda: nn.ConvTranspose2d(4, 4, 2, stride=2),
    "replicated border": lambda: padded("replicate"),
    "mirrored border": lambda: padded("reflect"),
    "zero border": lambda: padded("constant"),
    "padding that is cut off again": lambda: Of(
        lambda self, z: F.pad(z, (1, 1, 1, 1), mode="replicate")[..., 1:-1, 1:-1]
    ),
    "padding mode of the layer": lambda: conv(3, padding=1, padding_mode="replicate"),
    "nearest": lambda: upsampled("nearest"),
    "nearest exact": lambda: upsampled("nearest-exact"),
    "pixel shuffle": lambda: nn.Sequential(nn.Conv2d(4, 16, 3, padding=1), nn.PixelShuffle(2), conv(3, padding=1)),
    "pixel unshuffle": lambda: nn.Sequential(nn.Upsample(scale_factor=2), nn.PixelUnshuffle(2)),
    "depth to space": lambda: Of(depth_to_space, conv=nn.Conv2d(4, 16, 1)),
    "group norm": lambda: norm_of(nn.GroupNorm(2, 4)),
    "group norm of large values": lambda: norm_of(nn.GroupNorm(2, 4), offset=30.0),
    "batch norm": lambda: nn.BatchNorm2d(4),
    "layer norm of channels": lambda: Of(
        lambda self, z: self.norm(z.movedim(1, -1)).movedim(-1, 1), norm=nn.LayerNorm(4)
    ),
    "RMS norm of channels": lambda: Of(lambda self, z: self.norm(z.movedim(1, -1)).movedim(-1, 1), norm=nn.RMSNorm(4)),
    "normalised channels": lambda: Of(lambda self, z: F.normalize(z, dim=1) * z.square().mean(1, keepdim=True)),
    "attention": lambda: Of(tokens_attention, qkv=nn.Conv2d(4, 12, 1)),
    "attention by products": lambda: Of(product_attention, qkv=nn.Conv2d(4, 12, 1)),
    "attention by matmul": lambda: Of(
        lambda self, z: ((t := z.flatten(2)).mT @ t).softmax(2).matmul(t.mT).mT.reshape(z.shape)
    ),
    "attention over frames": lambda: Of(frames_by_pixel, linear=nn.Linear(4, 4)),
    "causal frames": lambda: Of(causal_frames, conv=nn.Conv3d(4, 4, 3, padding=(0, 1, 1))),
    "in place": lambda: Of(
        lambda self, z: self.conv(z).relu_().mul_(z).add_(1.0).clamp_(-2, 2), conv=conv(3, padding=1)
    ),
    "half precision inside": lambda: Of(
        lambda self, z: self.norm(self.conv(z.bfloat16())).float(),
        conv=conv(1).bfloat16(),
        norm=nn.GroupNorm(2, 4).bfloat16(),
    ),
    "several results": lambda: Of(
        lambda self, z: {"image": (self.conv(z), z.sum(1)), "scale": 2}, conv=conv(3, padding=1)
    ),
}

REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "size": (
        lambda: Of(lambda self, z: F.interpolate(z, size=(32, 36))),
        "Of: aten::upsample_nearest2d.*whole factors",
    ),
    "fraction": (lambda: nn.Upsample(scale_factor=1.5), "Upsample: aten::upsample_nearest2d.*by 1.5"),
    "bilinear": (
        lambda: nn.Upsample(scale_factor=2, mode="bilinear"),
        "Upsample: aten::(upsample_bilinear2d|_unsafe_index) is not known",
    ),
    "pooling": (lambda: nn.AvgPool2d(2), "AvgPool2d: aten::avg_pool2d is not known"),
    "mean": (lambda: Of(lambda self, z: z - z.mean((2, 3), keepdim=True)), "aten::mean sums up all rows"),
    "mean of all": (lambda: Of(lambda self, z: z / z.mean()), "aten::mean sums up all rows"),
    "softmax": (lambda: nn.Softmax(2), "Softmax: aten::_?softmax normalises over all rows"),
    "layer norm": (lambda: Of(lambda self, z: F.layer_norm(z, z.shape[1:])), "aten::native_layer_norm normalises"),
    "batch statistics": (lambda: nn.BatchNorm2d(4).train(), "BatchNorm2d: .*normalises over all rows"),
    "roll": (lambda: Of(lambda self, z: z.roll(1, 2)), "aten::roll changes the order"),
    "flip": (lambda: Of(lambda self, z: z.flip(2)), "aten::flip changes the order"),
    "crop": (lambda: Of(lambda self, z: z[:, :, 2:]), "aten::slice takes rows 2 to 5 of 5"),
    "one row": (lambda: Of(lambda self, z: z[:, :, 0]), "aten::select takes one row"),
    "halves": (lambda: Of(lambda self, z: torch.cat(z.chunk(2, 2), 1)), "aten::split divides the rows"),
    "windows": (
        lambda: Of(lambda self, z: z[..., :8].unflatten(3, (2, 4)).transpose(2, 3).flatten(2, 3)),
        "does not keep its rows in one dim",
    ),
    "stacked images": (lambda: Of(lambda self, z: torch.cat([z, z], 2)), "aten::cat joins along the rows"),
    "position": (
        lambda: Of(lambda self, z: z + torch.linspace(0, 1, z.shape[2])[:, None]),
        "aten::add joins the rows with a tensor of 5 rows that is not split",
    ),
    "transposed overlap": (
        lambda: nn.ConvTranspose2d(4, 4, 4, stride=2, padding=1),
        "ConvTranspose2d: aten::convolution is transposed and its 4 rows overlap at stride 2",
    ),
    "shrinking": (lambda: conv(3), "Conv2d: aten::convolution of 3 rows"),
    "odd stride": (lambda: conv(3, stride=2, padding=1), "Conv2d: aten::convolution of 3 rows with stride 2"),
    "linear over rows": (
        lambda: Of(lambda self, z: F.linear(z.transpose(2, 3), torch.ones(z.shape[2], z.shape[2]))),
        "aten::matmul sums up all rows",
    ),
    "product of rows with rows": (lambda: Of(lambda self, z: z.mT @ z), "aten::matmul sums up all rows"),
    "masked attention": (
        lambda: Of(lambda self, z: F.scaled_dot_product_attention(z, z, z, is_causal=True)),
        "aten::scaled_dot_product_attention over split rows has a mask",
    ),
    "circular border": (
        lambda: Of(lambda self, z: self.conv(F.pad(z, (1, 1, 1, 1), mode="circular")), conv=conv(3)),
        "aten::copy_ writes rows to a part",
    ),
    "statistics of padded rows": (
        lambda: Of(lambda self, z: F.group_norm(F.pad(z, (1, 1, 1, 1)), 2)),
        "aten::native_group_norm .*normalises padded ones",
    ),
    "value of a pixel": (lambda: Of(lambda self, z: z * float(z[0, 0].sum() > 0)), "aten::sum sums up all rows"),
    "buffer of another shape": (
        lambda: Of(lambda self, z: torch.zeros(1, 4, z.shape[2] + 1, z.shape[3])[:, :, 1:].copy_(z)),
        "aten::copy_ writes rows to a part",
    ),
}


def build(make: Callable[[], nn.Module]) -> nn.Module:
    """With seeded weights; evaluation mode is the maker's where it says otherwise."""
    torch.manual_seed(0)
    layer = make()
    for name, buffer in layer.named_buffers():
        if "running" in name:
            buffer.copy_(torch.rand_like(buffer) + 0.5)
    return layer


def latent(batch: int = 2, rows: int = 10, columns: int = 9) -> Tensor:
    """Rows differ in mean and spread, so that no slice has the statistics of the whole."""
    z = torch.randn((batch, 4, rows, columns), generator=torch.Generator().manual_seed(1))
    return z * torch.linspace(0.5, 2, rows)[:, None] + torch.linspace(-1, 1, rows)[:, None]
