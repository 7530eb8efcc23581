"""Tiny models of ComfyUI's own classes with random weights, and one way to sample them through its real sampler."""

from .additions import add_lora, flux_control
from .exactness import all_foreseen, check, node, twice
from .flux import FLUX
from .image import IMAGE
from .sampling import ALWAYS, NEVER, fbcache, relative, sample, with_sampler
from .tiny_model import TinyModel, build, conditioning, host_version, size_of
from .unet import UNETS
from .video import VIDEO
from .wan import WAN, WANS

__all__ = [
    "ALWAYS",
    "FLUX",
    "NEVER",
    "TINY_MODELS",
    "WAN",
    "TinyModel",
    "add_lora",
    "all_foreseen",
    "build",
    "check",
    "conditioning",
    "fbcache",
    "flux_control",
    "host_version",
    "node",
    "relative",
    "sample",
    "size_of",
    "twice",
    "with_sampler",
]

TINY_MODELS: dict[str, TinyModel] = IMAGE | VIDEO | WANS | UNETS
