"""FLUX and the models that reuse its blocks: double blocks over image and text, then single blocks over both."""

from .family import BlockStack, ModelFamily, Stream
from .sharding import PerToken, Sharding

DOUBLE_SHARDING = Sharding(
    attentions=(("txt", "img"),),
    streams=(Stream("img", 0, ("img",)), Stream("txt", 1, ("txt",))),
    per_token=(
        PerToken("pe", ("txt", "img"), dims=(2,)),
        PerToken("modulation_dims_img", ("img",), kind="spans"),
        PerToken("modulation_dims_txt", ("txt",), kind="spans"),
    ),
    residuals="input",
)
SINGLE_SHARDING = Sharding(
    attentions=(("txt", "img"),),
    streams=(Stream("x", None, ("txt", "img")),),
    per_token=(
        PerToken("pe", ("txt", "img"), dims=(2,)),
        # Reference latents at another timestep: spans over the image, moved behind the text by its length in the block.
        PerToken("modulation_dims", ("txt", "img"), kind="spans", counted=("txt",)),
    ),
    residuals="output",
)

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
            sharding=DOUBLE_SHARDING,
        ),
        BlockStack(
            "single_blocks",
            (Stream("img", "img", ("txt", "img")),),
            hook="single_block",
            in_place=True,
            sharding=SINGLE_SHARDING,
        ),
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
            sharding=Sharding(
                attentions=(("txt", "img"),),
                per_token=tuple(PerToken("image_rotary_emb", ("txt", "img"), dims=(0,), part=part) for part in (0, 1)),
            ),
        )
        for blocks in ("transformer_blocks", "single_transformer_blocks")
    ),
    residual_diff_threshold=0.1,
)
