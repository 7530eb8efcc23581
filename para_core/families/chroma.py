"""Chroma and Chroma Radiance: the blocks of FLUX, modulated by one small network; Radiance ends in a pixel head."""

from dataclasses import replace

from .flux import FLUX as _FLUX

# ComfyUI: comfy/ldm/chroma/model.py, comfy/ldm/chroma_radiance/model.py
CHROMA = replace(
    _FLUX,
    name="chroma",
    models="Chroma, Chroma Radiance",
    classes=("Chroma",),
    sharded=("ChromaRadiance",),
    residual_diff_threshold=0.1,
)
