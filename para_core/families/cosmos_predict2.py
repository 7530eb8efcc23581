"""Cosmos Predict 2 and Anima: one stack over a (B, T, H, W, D) grid of tokens."""

from .family import BlockStack, ModelFamily, Stream
from .sharding import PerToken, Sharding

# ComfyUI: comfy/ldm/cosmos/predict2.py, comfy/ldm/anima/model.py. No hooks.
COSMOS_PREDICT2 = ModelFamily(
    name="cosmos_predict2",
    models="Cosmos Predict 2, Anima",
    classes=("MiniTrainDIT",),
    stacks=(
        BlockStack(
            "blocks",
            (Stream("x_B_T_H_W_D", None, ("img",), grid=3),),
            sharding=Sharding(
                attentions=(("img",),),
                per_token=(
                    PerToken("rope_emb_L_1_1_D", ("img",)),
                    PerToken("extra_per_block_pos_emb", ("img",), grid=3),
                    # A row for each frame, where those have timesteps of their own.
                    PerToken("emb_B_T_D", ("img",), repeats=True),
                    PerToken("adaln_lora_B_T_3D", ("img",), repeats=True),
                ),
            ),
        ),
    ),
    sharded=("Anima",),
    residual_diff_threshold=0.1,
)
