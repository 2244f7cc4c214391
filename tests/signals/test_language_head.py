"""The head of a language model as a function and as matrices: scales and caps are believed only when they are seen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from tiny_models import COMMON, tiny_batch, tiny_model
from torch import Tensor

from layerdistill.core.errors import UserError
from layerdistill.core.types import LayerRef
from layerdistill.signals import run_model
from layerdistill.signals.language_head import LanguageHead

FINAL = LayerRef("", -1)
SHAPE: dict[str, Any] = {
    **COMMON, "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 64,
}  # fmt: skip
KINDS = {
    "gemma2": (hf.Gemma2Config, {"head_dim": 8, "final_logit_softcapping": 5.0}, 1.0, 5.0),
    "gemma3": (hf.Gemma3TextConfig, {"head_dim": 8, "final_logit_softcapping": 20.0}, 1.0, 20.0),
    "cohere": (hf.CohereConfig, {"logit_scale": 0.25}, 0.25, None),
    "granite": (hf.GraniteConfig, {"logits_scaling": 8.0}, 0.125, None),
    "llama": (hf.LlamaConfig, {}, 1.0, None),
}


def model_of(kind: str) -> Any:
    torch.manual_seed(0)
    config, fields, *_ = KINDS[kind]
    return hf.AutoModelForCausalLM.from_config(config(**SHAPE, **fields)).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_the_head_and_its_matrices_say_what_the_model_says(kind: str) -> None:
    model = model_of(kind)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(50)
    head = LanguageHead(model)
    matrices = head.matrices(model.device)
    assert matrices is not None
    assert (matrices.scale, matrices.cap) == KINDS[kind][2:]
    assert matrices.weight is model.get_output_embeddings().weight
    with torch.no_grad():
        signal = run_model(model, tiny_batch(model), [FINAL], logits=True)
        assert signal.logits is not None
        torch.testing.assert_close(head(signal.hidden[FINAL].flatten(0, 1), FINAL), signal.logits.flatten(0, 1))
        product: Tensor = matrices.scale * (signal.hidden[FINAL] @ matrices.weight.T)
    ours = product if matrices.cap is None else matrices.cap * torch.tanh(product / matrices.cap)
    torch.testing.assert_close(ours, signal.logits)


def test_what_the_configuration_says_is_not_believed_where_the_model_does_otherwise() -> None:
    model = model_of("llama")
    model.config.final_logit_softcapping, model.config.logit_scale = 5.0, 0.1
    head = LanguageHead(model)
    assert (head.scale, head.cap) == (1.0, None)


def test_a_cap_that_is_not_known_is_refused_though_small_logits_do_not_show_it() -> None:
    model = model_of("gemma2")
    model.get_output_embeddings().weight.data.mul_(1e-3)
    model.config.final_logit_softcapping = 5.0
    assert LanguageHead(model).cap == 5.0
    model.forward = capped_elsewhere(model)
    with pytest.raises(UserError, match="a scale or a cap that is not known"):
        LanguageHead(model)


def capped_elsewhere(model: Any) -> Any:
    """The model's forward, with a second cap that no configuration names."""
    forward = type(model).forward

    def capped(*args: Any, **given: Any) -> Any:
        output = forward(model, *args, **given)
        output.logits = 2 * torch.tanh(output.logits / 2)
        return output

    return capped


def test_of_a_model_elsewhere_the_head_alone_is_copied() -> None:
    model = tiny_model("llama", "causal-lm")
    head = LanguageHead(model)
    matrices = head.matrices(torch.device("meta"))
    assert matrices is not None
    assert matrices.weight.device.type == "meta" and not matrices.weight.requires_grad
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}, "it stays where it is"
    assert head.matrices(torch.device("meta")) is matrices, "once"


def test_only_a_plain_linear_head_is_given_as_matrices() -> None:
    model = tiny_model("llama", "causal-lm")

    class Shifted(torch.nn.Linear):
        def forward(self, states: Tensor) -> Tensor:
            return super().forward(states) + 1

    model.lm_head.__class__ = Shifted
    assert LanguageHead(model).matrices(model.device) is None
