"""Para Accelerate's core: makes diffusion transformers faster, without ComfyUI or inside it.

Imports point one way: adapters -> {cache_run -> first_block -> {residual_cache, families}, attention} -> torch.
"""
