"""A model in another dtype: as opened in it, with what was shared still shared."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as hf
from tiny_models import tiny_batch, tiny_model

from layerdistill.models import find_embeddings, find_head, to_dtype, trim_model

UNUSUAL = {
    "xglm": lambda: hf.XGLMForCausalLM(
        hf.XGLMConfig(vocab_size=20, d_model=16, ffn_dim=16, num_layers=1, attention_heads=2)
    ),
    "esm": lambda: hf.EsmModel(
        hf.EsmConfig(
            vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
            pad_token_id=1, position_embedding_type="rotary",
        )
    ),
    "t5": lambda: hf.T5Model(hf.T5Config(vocab_size=20, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)),
}  # fmt: skip


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "gpt-neox", "qwen3", "phi"])
def test_it_is_the_model_that_is_opened_in_that_dtype(family: str, tmp_path: Path) -> None:
    model = tiny_model(family, "causal-lm" if family != "bert" else "masked-lm")
    model.save_pretrained(tmp_path)
    opened = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    to_dtype(torch.bfloat16, [model])
    found, expected = (dict(each.named_buffers()) | dict(each.named_parameters()) for each in (model, opened))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype, name
    batch = tiny_batch(model)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, opened(**batch).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["xglm", "esm", "t5"])
def test_buffers_and_modules_of_their_own_kind(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """XGLM adds a buffer that is not saved to its states; ESM saves its frequencies; T5 keeps a matrix in float32."""
    model = UNUSUAL[kind]().eval()
    model.save_pretrained(tmp_path)
    opened = type(model).from_pretrained(tmp_path, dtype=dtype).eval()
    to_dtype(dtype, [model])
    found, expected = (dict(each.named_buffers()) | dict(each.named_parameters()) for each in (model, opened))
    assert {name: tensor.dtype for name, tensor in found.items()} == {
        name: tensor.dtype for name, tensor in expected.items()
    }
    with torch.no_grad():
        model(
            input_ids=torch.tensor([[5, 6, 7]]), **({"decoder_input_ids": torch.tensor([[5]])} if kind == "t5" else {})
        )


def test_what_is_shared_stays_shared() -> None:
    whole = tiny_model("gpt2", "causal-lm")
    trimmed = trim_model(whole, [0, 1, 2, 5, 7, 40])
    to_dtype(torch.bfloat16, [trimmed, whole])
    others = dict(whole.named_parameters())
    shared = [name for name, tensor in trimmed.named_parameters() if tensor.data_ptr() == others[name].data_ptr()]
    assert set(others) - set(shared) == {"transformer.wte.weight"}, "the embedding alone is another"
    for model in (whole, trimmed):
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        assert find_head(model).weight is find_embeddings(model).weight
