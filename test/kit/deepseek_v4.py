"""The config of a DeepSeek-V4 that SGLang 0.5.12 builds on a CPU in a second."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sglang.srt.configs.deepseek_v4 import DeepSeekV4Config


def tiny_deepseek_v4(num_layers: int = 2) -> DeepSeekV4Config:
    """Few and narrow layers without sparse attention; mHC (`hc_mult`, the prenorm's size) as in the real model."""
    from sglang.srt.configs.deepseek_v4 import DeepSeekV4Config

    config = DeepSeekV4Config(
        architectures=["DeepseekV4ForCausalLM"],
        quantization_config=None,
        num_hidden_layers=num_layers,
        compress_ratios=[0] * num_layers,
        hidden_size=256,
        intermediate_size=64,
        moe_intermediate_size=64,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        n_hash_layers=0,
        num_attention_heads=4,
        qk_nope_head_dim=64,
        qk_rope_head_dim=64,
        v_head_dim=128,
        q_lora_rank=64,
        o_lora_rank=32,
        o_groups=2,
        index_n_heads=2,
        vocab_size=512,
        max_position_embeddings=512,
        rope_scaling={
            "rope_type": "yarn",
            "factor": 1.0,
            "beta_fast": 32,
            "beta_slow": 1,
            "original_max_position_embeddings": 512,
        },
    )
    config.head_dim = 128
    return config
