"""FLUX.1 (dev, schnell, Kontext) and the models that reuse its blocks: double blocks, then single blocks."""

from .family import BlockStack, ModelFamily, Stream

# ComfyUI: comfy/ldm/flux/model.py. The host adds ControlNet residuals in place behind every block.
FLUX = ModelFamily(
    name="flux",
    classes=("Flux",),
    stacks=(
        BlockStack(
            "double_blocks",
            (Stream("img", "img", ("img",)), Stream("txt", "txt", ("txt",))),
            hook="double_block",
            in_place=True,
        ),
        BlockStack("single_blocks", (Stream("img", "img", ("txt", "img")),), hook="single_block", in_place=True),
    ),
    residual_diff_threshold=0.1,
)

# diffusers: models/transformers/transformer_flux.py
FLUX_DIFFUSERS = ModelFamily(
    name="flux (diffusers)",
    classes=("FluxTransformer2DModel",),
    stacks=tuple(
        BlockStack(
            blocks,
            (Stream("hidden_states", 1, ("img",)), Stream("encoder_hidden_states", 0, ("txt",))),
        )
        for blocks in ("transformer_blocks", "single_transformer_blocks")
    ),
    residual_diff_threshold=0.1,
)
