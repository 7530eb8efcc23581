"""Cosmos 1: one stack over a (T, H, W, B, D) grid of video tokens."""

from .family import BlockStack, ModelFamily, Stream

# ComfyUI: comfy/ldm/cosmos/model.py. No hooks; the host adds the position embedding in place before every block.
COSMOS = ModelFamily(
    name="cosmos",
    models="Cosmos 1",
    classes=("GeneralDIT",),
    stacks=(BlockStack("blocks", (Stream("x", None, ("img",), batch_dim=3),), in_place=True),),
    unsharded={"GeneralDIT": "the host adds the position of every token between its blocks"},
    residual_diff_threshold=0.1,
)
