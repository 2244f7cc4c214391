"""Small tables of facts that neither a module tree nor a configuration tells; all else is found structurally."""

from __future__ import annotations

from typing import Literal

Layout = Literal["qkv", "halves", "per-head", "unknown"]
"""How an output axis that holds several matrices is laid out.

`qkv`: the queries of all heads, then their keys, then their values. `halves`: two parts of one size (gate and up).
`per-head`: head after head (or group after group), each with all its parts, so that the first rows are whole heads.
"""

NOT_THE_FINAL_NORM: dict[str, tuple[str, ...]] = {
    "LayerNorm": ("DebertaV2Encoder",),
    "layernorm_embedding": ("BartEnc", "BartDec", "BlenderbotSmall", "LED", "Mvp", "PLBart", "TrOCR"),
    "embeddings_layer_norm": ("ProphetNet",),
}
"""Names of norms that stand beside the blocks but are not applied to their output, with the classes they stand in.

DeBERTa-v2 normalises its relative embeddings with it, the others normalise what enters the first block. A class is
meant by the beginning of its name. (BigBird-Pegasus calls its final norm `layernorm_embedding`.)
"""

FUSED_LAYOUT: dict[str, Layout] = {
    "c_attn": "qkv",
    "Wqkv": "qkv",
    "qkv_proj": "qkv",
    "in_proj_weight": "qkv",
    "in_proj_bias": "qkv",
    "gate_up_proj": "halves",
    "gate_up_proj_bias": "halves",
    "input_linear": "halves",
    "Wi": "halves",
    "query_key_value": "per-head",
}
"""The layout of fused matrices, by the name of the module (or of the parameter, where it has no module of its own)."""

FUSED_LAYOUT_IN: dict[tuple[str, str], Layout] = {
    ("GPTBigCodeAttention", "c_attn"): "per-head",
    ("MiniMaxLightningAttention", "qkv_proj"): "per-head",
    ("GptOssExperts", "gate_up_proj"): "per-head",
    ("GptOssExperts", "gate_up_proj_bias"): "per-head",
    ("DisentangledSelfAttention", "in_proj"): "per-head",
    ("MoshiGatingMLP", "fc1"): "halves",
    ("CodeGenAttention", "qkv_proj"): "unknown",
}
"""(class that holds it, name): the exceptions to `FUSED_LAYOUT`."""

PER_HEAD_NAMES = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "q_b_proj", "kv_b_proj"})
"""Matrices with an axis of heads whose size per head is not the head size (multi-head latent attention)."""

ONE_PART_NAMES = frozenset({"gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"})
"""Feed-forward matrices of one part, whatever their width (shared experts are several experts wide)."""

FOLLOWS_WIDTH = ("embedding_size", "word_embed_proj_dim", "pooler_hidden_size", "cross_attention_hidden_size")
"""Fields that keep following the hidden size where they equal it (OPT, ELECTRA, DeBERTa, T5Gemma)."""

LAYER_INDEX_FIELDS = (
    "mlp_only_layers",
    "moe_layers",
    "attn_layer_indices",
    "full_attn_idxs",
    "cross_attention_layers",
    "hybrid_layer_ids",
)
"""Fields that list the 0-based numbers of some blocks, rather than one entry for every block."""
