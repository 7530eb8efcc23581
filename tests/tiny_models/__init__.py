"""Tiny models of ComfyUI's own classes with random weights, and one way to sample them through its real sampler."""

from .image import FLUX, IMAGE
from .sampling import relative, sample, with_sampler
from .tiny_model import TinyModel, build, conditioning, host_version
from .unet import UNETS
from .video import VIDEO, WAN
from .wan import WANS

__all__ = [
    "FLUX",
    "TINY_MODELS",
    "WAN",
    "TinyModel",
    "build",
    "conditioning",
    "host_version",
    "relative",
    "sample",
    "with_sampler",
]

TINY_MODELS: dict[str, TinyModel] = IMAGE | VIDEO | WANS | UNETS
