"""ERNIE-Image: one stack over image and text, image first."""

from .family import BlockStack, ModelFamily, Stream

# ComfyUI: comfy/ldm/ernie/model.py. No hooks.
ERNIE = ModelFamily(
    name="ernie",
    models="ERNIE-Image",
    classes=("ErnieImageModel",),
    stacks=(BlockStack("layers", (Stream("x", None, ("img", "txt")),)),),
    unsharded={"ErnieImageModel": "the host offers no way to exchange its attention"},
    residual_diff_threshold=0.1,
)
