"""Cosmos Predict 2 and Anima: one stack over a (B, T, H, W, D) grid of tokens."""

from .family import BlockStack, ModelFamily, Stream

# ComfyUI: comfy/ldm/cosmos/predict2.py, comfy/ldm/anima/model.py. No hooks.
COSMOS_PREDICT2 = ModelFamily(
    name="cosmos_predict2",
    models="Cosmos Predict 2, Anima",
    classes=("MiniTrainDIT",),
    stacks=(BlockStack("blocks", (Stream("x_B_T_H_W_D", None, ("img",)),)),),
    residual_diff_threshold=0.1,
)
