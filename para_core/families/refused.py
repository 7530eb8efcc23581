"""Models that ComfyUI samples but no family can describe, with the reason."""

_NO_DIFFUSION = "it is no diffusion model: it runs once for a picture, so there are no steps to reuse"

# ComfyUI: comfy/ldm/. By class name, as `ModelFamily.refuses` has those that are alike to a family's models.
REFUSED = {
    "HiDreamO1Transformer": "its layers fill a key/value cache of the prompt that a skipped layer would leave stale",
    "MiniMaxMusic3DiT": "it runs its blocks several times in one model call, once for each window of long music",
    "StageB": "it runs some of its blocks several times in one model call",
    "Trellis2": "it holds several transformers, of which one call runs this and the next call another",
    "DepthAnything3Net": _NO_DIFFUSION,
    "RTv4": _NO_DIFFUSION,
    "SAM3Model": _NO_DIFFUSION,
}
