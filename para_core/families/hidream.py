"""HiDream-I1: double blocks over image and text, then single blocks over both, image first.

Every block gets its own layer of the language model's states behind the text; the host cuts them off again.
"""

from .family import BlockStack, ModelFamily, Stream

# ComfyUI: comfy/ldm/hidream/model.py. No hooks.
HIDREAM = ModelFamily(
    name="hidream",
    models="HiDream-I1",
    classes=("hidream.model.HiDreamImageTransformer2DModel",),
    stacks=(
        BlockStack("double_stream_blocks", (Stream("image_tokens", 0, ("img",)), Stream("text_tokens", 1, ("txt",)))),
        BlockStack("single_stream_blocks", (Stream("image_tokens", None, ("img", "txt")),)),
    ),
    unsharded={
        "hidream.model.HiDreamImageTransformer2DModel": "the host exchanges part of the text between its blocks"
    },
    residual_diff_threshold=0.1,
)
