"""Tiny models of ComfyUI's own classes with random weights, and one way to sample them through its real sampler."""

from .exactness import check, node, twice
from .image import FLUX, IMAGE
from .sampling import fbcache, relative, sample, with_sampler
from .tiny_model import TinyModel, build, conditioning, host_version
from .unet import UNETS
from .video import VIDEO
from .wan import WAN, WANS

__all__ = [
    "FLUX",
    "TINY_MODELS",
    "WAN",
    "TinyModel",
    "build",
    "check",
    "conditioning",
    "fbcache",
    "host_version",
    "node",
    "relative",
    "sample",
    "twice",
    "with_sampler",
]

TINY_MODELS: dict[str, TinyModel] = IMAGE | VIDEO | WANS | UNETS
