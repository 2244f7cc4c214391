"""Tiny random models of twelve families, built from configurations: no download, a few milliseconds each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor

Config = hf.PretrainedConfig
COMMON = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def _shape(layers: int, hidden: int, heads: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 2 * hidden,
        "max_position_embeddings": 128,
    }


def _bert(layers: int, hidden: int, heads: int) -> Config:
    return hf.BertConfig(**_shape(layers, hidden, heads), **COMMON, **NO_DROPOUT)


def _deberta_v2(layers: int, hidden: int, heads: int) -> Config:
    return hf.DebertaV2Config(
        **_shape(layers, hidden, heads),
        **COMMON,
        **NO_DROPOUT,
        relative_attention=True,
        position_buckets=8,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
        position_biased_input=False,
    )


def _roberta(layers: int, hidden: int, heads: int) -> Config:
    return hf.RobertaConfig(**_shape(layers, hidden, heads), **COMMON, **NO_DROPOUT, type_vocab_size=1)


def _modernbert(layers: int, hidden: int, heads: int) -> Config:
    return hf.ModernBertConfig(
        **_shape(layers, hidden, heads), **COMMON, cls_token_id=1, sep_token_id=2, local_attention=8
    )


def _gpt2(layers: int, hidden: int, heads: int) -> Config:
    return hf.GPT2Config(
        n_embd=hidden, n_layer=layers, n_head=heads, n_positions=128, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        **COMMON,
    )  # fmt: skip


def _opt(layers: int, hidden: int, heads: int) -> Config:
    shape = _shape(layers, hidden, heads)
    return hf.OPTConfig(ffn_dim=shape.pop("intermediate_size"), dropout=0.0, **shape, **COMMON)


def _gpt_neox(layers: int, hidden: int, heads: int) -> Config:
    return hf.GPTNeoXConfig(**_shape(layers, hidden, heads), **COMMON)


def _llama(layers: int, hidden: int, heads: int) -> Config:
    return hf.LlamaConfig(**_shape(layers, hidden, heads), **COMMON, num_key_value_heads=heads // 2)


def _qwen3(layers: int, hidden: int, heads: int) -> Config:
    return hf.Qwen3Config(
        **_shape(layers, hidden, heads), **COMMON, num_key_value_heads=heads // 2, head_dim=hidden // heads
    )


def _phi(layers: int, hidden: int, heads: int) -> Config:
    return hf.PhiConfig(**_shape(layers, hidden, heads), **COMMON)


def _bart(layers: int, hidden: int, heads: int) -> Config:
    return hf.BartConfig(
        d_model=hidden, encoder_layers=layers, decoder_layers=layers, encoder_attention_heads=heads,
        decoder_attention_heads=heads, encoder_ffn_dim=2 * hidden, decoder_ffn_dim=2 * hidden,
        max_position_embeddings=128, dropout=0.0, decoder_start_token_id=2, forced_eos_token_id=2, **COMMON,
    )  # fmt: skip


def _t5(layers: int, hidden: int, heads: int) -> Config:
    return hf.T5Config(
        d_model=hidden, d_kv=hidden // heads, d_ff=2 * hidden, num_layers=layers, num_decoder_layers=layers,
        num_heads=heads, dropout_rate=0.0, pad_token_id=0, eos_token_id=2, decoder_start_token_id=0,
    )  # fmt: skip


FAMILIES: dict[str, Callable[[int, int, int], Config]] = {
    "bert": _bert,
    "deberta-v2": _deberta_v2,
    "roberta": _roberta,
    "modernbert": _modernbert,
    "gpt2": _gpt2,
    "opt": _opt,
    "gpt-neox": _gpt_neox,
    "llama": _llama,
    "qwen3": _qwen3,
    "phi": _phi,
    "bart": _bart,
    "t5": _t5,
}
"""Family name -> configuration of (blocks, hidden size, heads); without dropout, padding token 0, end of text 2."""

ENCODERS = ("bert", "deberta-v2", "roberta", "modernbert")
DECODERS = ("gpt2", "opt", "gpt-neox", "llama", "qwen3", "phi")
ENCODER_DECODERS = ("bart", "t5")

FITTING: dict[str, tuple[str, ...]] = {
    "base": tuple(FAMILIES),
    "sequence-classification": tuple(FAMILIES),
    "token-classification": tuple(name for name in FAMILIES if name not in ("opt", "bart")),
    "masked-lm": ENCODERS,
    "causal-lm": DECODERS,
    "seq2seq-lm": ENCODER_DECODERS,
}
"""Head -> the families that have it."""

CLASSES = {
    "base": hf.AutoModel,
    "sequence-classification": hf.AutoModelForSequenceClassification,
    "token-classification": hf.AutoModelForTokenClassification,
    "masked-lm": hf.AutoModelForMaskedLM,
    "causal-lm": hf.AutoModelForCausalLM,
    "seq2seq-lm": hf.AutoModelForSeq2SeqLM,
}


def tiny_model(
    family: str,
    head: str = "base",
    num_layers: int = 4,
    hidden_size: int = 32,
    num_heads: int = 4,
    vocab_size: int = 64,
    num_labels: int = 3,
    seed: int = 0,
    **config: Any,
) -> hf.PreTrainedModel:
    """A random model in float32 and eval mode; further keywords overwrite fields of its configuration.

    Noise is added to every parameter, so that no bias is 0 and no norm is 1, and a test sees when one goes astray.
    """
    made = FAMILIES[family](num_layers, hidden_size, num_heads)
    given = made.to_dict() | {"vocab_size": vocab_size} | config
    if head.endswith("classification"):
        given |= {"id2label": {n: f"LABEL_{n}" for n in range(num_labels)}}
        given |= {"label2id": {f"LABEL_{n}": n for n in range(num_labels)}}
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    try:
        model = CLASSES[head].from_config(type(made).from_dict(given))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    finally:
        torch.random.set_rng_state(state)
    return model.float().eval()


def tiny_batch(model: hf.PreTrainedModel, batch: int = 3, seq: int = 8, seed: int = 0) -> dict[str, Tensor]:
    """Random ids `(batch, seq)`, right-padded from the second row on, each row ending in one end-of-text token.

    Sequence-to-sequence models get decoder ids and a decoder mask as well; there are no labels.
    """
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, model.config.vocab_size, (batch, seq), generator=draw)
    mask = torch.ones_like(ids)
    for row in range(batch):
        length = max(2, seq - 2 * row)
        ids[row, length - 1] = 2
        ids[row, length:] = 0
        mask[row, length:] = 0
    made = {"input_ids": ids, "attention_mask": mask}
    if model.config.is_encoder_decoder and "Classification" not in type(model).__name__:
        made |= {"decoder_input_ids": ids.flip(0)[:, : seq - 1], "decoder_attention_mask": mask.flip(0)[:, : seq - 1]}
    return made
