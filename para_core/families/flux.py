"""FLUX and the models that reuse its blocks: double blocks over image and text, then single blocks over both."""

from .family import BlockStack, ModelFamily, Stream

# ComfyUI: comfy/ldm/flux/model.py. The host adds ControlNet residuals in place behind every block.
FLUX = ModelFamily(
    name="flux",
    models="FLUX.1, Kontext, FLUX.2 and Klein, LongCat-Image, Ovis-Image",
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
    # Published first-block caches take 0.08 to 0.12 for FLUX.1 dev.
    residual_diff_threshold=0.1,
)

# diffusers: models/transformers/transformer_flux.py
FLUX_DIFFUSERS = ModelFamily(
    name="flux (diffusers)",
    models="FLUX.1 of diffusers",
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
