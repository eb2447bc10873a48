"""One very small network of each architecture, with random weights."""

from __future__ import annotations

import torch
import transformers as t

_TEXT = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = _TEXT | {"num_key_value_heads": 2}
_HEADS_OF_8 = _GROUPED | {"head_dim": 8}
_EXPERTS = {"moe_intermediate_size": 12, "num_experts": 4, "num_experts_per_tok": 2}
_IMAGES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 8,
    "patch_size": 4,
}
_SPEECH = {
    "vocab_size": 40,
    "d_model": 16,
    "num_mel_bins": 8,
    "max_source_positions": 16,
    "max_target_positions": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}
_HALVES = ("layers", "attention_heads", "ffn_dim")
_SPEECH |= {
    f"{half}_{name}": size
    for half in ("encoder", "decoder")
    for name, size in zip(_HALVES, (2, 4, 24), strict=True)
}


def _mistral3():
    vision = t.PixtralVisionConfig(**_IMAGES, head_dim=4)
    text = t.MistralConfig(**_GROUPED)
    return t.Mistral3Config(
        text_config=text.to_dict(),
        vision_config=vision.to_dict(),
        image_token_index=39,
        spatial_merge_size=2,
    )


def _qwen2_5_vl():
    rope = {"rope_type": "default", "mrope_section": [1, 1, 0], "rope_theta": 10000.0}
    vision = {
        "depth": 2,
        "hidden_size": 16,
        "out_hidden_size": 16,
        "num_heads": 4,
        "intermediate_size": 24,
        "patch_size": 4,
        "fullatt_block_indexes": [1],
        "window_size": 8,
    }
    return t.Qwen2_5_VLConfig(
        text_config=_GROUPED | {"rope_parameters": rope},
        vision_config=vision,
        image_token_id=39,
        video_token_id=38,
    )


def _clip():
    projection = {"projection_dim": 8}
    text = {k: v for k, v in _TEXT.items() if not k.endswith("_id")} | projection
    return t.CLIPConfig(text_config=text, vision_config=_IMAGES | projection, **projection)


def _deepseek_v3():
    latent = {"kv_lora_rank": 8, "q_lora_rank": 8, "v_head_dim": 4}
    heads = {"qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "num_key_value_heads": 4}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
    groups = {"n_group": 2, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1}
    return t.DeepseekV3Config(**_TEXT, **latent, **heads, **experts, **groups)


_CAUSAL = {
    "llama": (t.LlamaForCausalLM, lambda: t.LlamaConfig(**_GROUPED)),
    "mistral": (t.MistralForCausalLM, lambda: t.MistralConfig(**_GROUPED)),
    "mistral3": (t.Mistral3ForConditionalGeneration, _mistral3),
    "qwen2": (t.Qwen2ForCausalLM, lambda: t.Qwen2Config(**_GROUPED)),
    "qwen3": (
        t.Qwen3ForCausalLM,
        lambda: t.Qwen3Config(**_HEADS_OF_8, tie_word_embeddings=True),
    ),
    "qwen2_moe": (
        t.Qwen2MoeForCausalLM,
        lambda: t.Qwen2MoeConfig(**_GROUPED, **_EXPERTS, shared_expert_intermediate_size=12),
    ),
    "qwen3_moe": (t.Qwen3MoeForCausalLM, lambda: t.Qwen3MoeConfig(**_HEADS_OF_8, **_EXPERTS)),
    "qwen2_5_vl": (t.Qwen2_5_VLForConditionalGeneration, _qwen2_5_vl),
    "gemma2": (t.Gemma2ForCausalLM, lambda: t.Gemma2Config(**_HEADS_OF_8)),
    "gemma3": (t.Gemma3ForCausalLM, lambda: t.Gemma3TextConfig(**_HEADS_OF_8)),
    "phi3": (t.Phi3ForCausalLM, lambda: t.Phi3Config(**_GROUPED)),
    "gpt2": (
        t.GPT2LMHeadModel,
        lambda: t.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=4, n_positions=64),
    ),
    "gpt_neox": (t.GPTNeoXForCausalLM, lambda: t.GPTNeoXConfig(**_TEXT)),
    "falcon": (
        t.FalconForCausalLM,
        lambda: t.FalconConfig(**_TEXT, new_decoder_architecture=True, num_kv_heads=2),
    ),
    "mixtral": (
        t.MixtralForCausalLM,
        lambda: t.MixtralConfig(**_GROUPED, num_local_experts=4, num_experts_per_tok=2),
    ),
    "deepseek_v3": (t.DeepseekV3ForCausalLM, _deepseek_v3),
    "opt": (
        t.OPTForCausalLM,
        lambda: t.OPTConfig(
            **{k: v for k, v in _TEXT.items() if k != "intermediate_size"},
            ffn_dim=24,
            word_embed_proj_dim=16,
        ),
    ),
    "mamba": (
        t.MambaForCausalLM,
        lambda: t.MambaConfig(vocab_size=40, hidden_size=16, state_size=4, num_hidden_layers=2),
    ),
}
_OTHERS = {
    "bert": (t.BertModel, lambda: t.BertConfig(**_TEXT)),
    "bert (masked language model)": (t.BertForMaskedLM, lambda: t.BertConfig(**_TEXT)),
    "vit": (t.ViTForImageClassification, lambda: t.ViTConfig(**_IMAGES, num_labels=3)),
    "clip": (t.CLIPModel, _clip),
    "t5": (
        t.T5ForConditionalGeneration,
        lambda: t.T5Config(
            vocab_size=40,
            d_model=16,
            d_ff=24,
            d_kv=4,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
            decoder_start_token_id=0,
        ),
    ),
    "whisper": (t.WhisperForConditionalGeneration, lambda: t.WhisperConfig(**_SPEECH)),
}
ARCHITECTURES = _CAUSAL | _OTHERS


def write(architecture, folder, seed, dtype=torch.bfloat16):
    """Save a network of that architecture, all of whose parameters are random; returns its path."""
    kind, config = ARCHITECTURES[architecture]
    torch.manual_seed(0)
    network = kind(config())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    network.to(dtype).save_pretrained(folder)
    return str(folder)


def missing_keys(architecture, folder):
    """What a network of that architecture misses in a checkpoint, and what it has no use for."""
    kind, _ = ARCHITECTURES[architecture]
    _, info = kind.from_pretrained(folder, output_loading_info=True)
    return set(info["missing_keys"]) | set(info["unexpected_keys"]) | set(info["mismatched_keys"])
