"""Mochi 1: joint blocks over video and text; the last one leaves the text as it is."""

from .family import BlockStack, ModelFamily, Stream

# ComfyUI: comfy/ldm/genmo/joint_model/asymm_models_joint.py
MOCHI = ModelFamily(
    name="mochi",
    models="Mochi 1",
    classes=("AsymmDiTJoint",),
    stacks=(
        BlockStack(
            "blocks",
            (Stream("img", "img", ("img",)), Stream("txt", "txt", ("txt",))),
            hook="double_block",
        ),
    ),
    residual_diff_threshold=0.1,
)
