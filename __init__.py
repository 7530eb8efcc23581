"""Para Accelerate: nodes that make diffusion transformers faster in ComfyUI."""

from .nodes import WEB_DIRECTORY, comfy_entrypoint

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
