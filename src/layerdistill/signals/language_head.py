"""The final norm and the head of a language model as one function, checked against what the model says itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from layerdistill.core.errors import UserError
from layerdistill.core.padding import padding_token
from layerdistill.core.types import LayerRef, Signal
from layerdistill.matching.vocabulary_head import VocabularyHead
from layerdistill.models import evaluating, find_head, find_stacks, unwrap
from layerdistill.signals.source import run_model

PROBE_LENGTH = 4
"""Tokens of the text that a model is asked about."""

AGREES = {torch.float32: 1e-4, torch.float64: 1e-9}
"""Largest difference, as a share of the largest logit, that rounding may make; in 16 bits COARSELY_AGREES."""

COARSELY_AGREES = 0.05


STRETCHED = 100.0
"""What the largest logit before a cap is brought to, so that any cap shows on a text that says nothing."""

SCALES = {"logit_scale": 1, "output_multiplier": 1, "lm_head_multiplier": 1, "logits_scaling": -1}
"""Fields of configurations that multiply the logits (Cohere, Falcon-H1), or divide them (Granite)."""

CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""Fields that cap them softly (Gemma 2, RecurrentGemma, xLSTM)."""


class LanguageHead:
    """The final norm and the head of a language model as one function of hidden states; its weights stay the model's.

    Logits are `scale` times what the head gives, then `cap * tanh(logits / cap)` where there is a cap. Raises UserError
    for a model that makes them in another way (a projection in between, say): the model is run on a few tokens, with
    what leaves its head made large, and what this reads out of its last layer must be what the model says.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = unwrap(model)
        self.norm = find_stacks(model)[""].final_norm
        head = find_head(model)
        assert head is not None, "a language model has a head"
        self.head: nn.Module = head
        self.copied: VocabularyHead | None = None
        last = LayerRef("", find_stacks(model)[""].depth)
        with stretched(head) as factors:
            signal = probe(self.model, last)
        assert signal.logits is not None, "they were asked for"
        self.vocab_size = signal.logits.shape[-1]
        for scale, cap in dict.fromkeys([configured(self.model), (1.0, None)]):
            self.scale, self.cap = scale, cap
            if factors and self._agrees(signal.hidden[last][0], signal.logits[0], last, factors[0]):
                return
        raise UserError(
            f"{type(self.model).__name__} makes its logits in another way than by its final norm and its head (a "
            "projection in between, or a scale or a cap that is not known), so filters cannot be learned through them. "
            "Use method.filters: unlearned or none."
        )

    def __call__(self, rows: Tensor, layer: LayerRef) -> Tensor:
        """Return the logits `(n, vocab)` of states `(n, hidden)` in the place of `layer`, in the model's dtype.

        The states are normed first, unless `layer` is `final`, which is normed already. The model follows the states to
        their device.
        """
        return self._capped(self._product(rows, layer))

    def matrices(self, device: torch.device) -> VocabularyHead | None:
        """Return the head on a device, None where it is no plain linear layer.

        Its tensors are the model's own. Of a model that is on another device (a teacher whose states are read from a
        cache) the head alone is copied, once: it must not change.
        """
        head = self.head
        if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
            return None
        if head.weight.device == device:
            return VocabularyHead(head.weight, head.bias, self.scale, self.cap)
        if self.copied is None or self.copied.weight.device != device:
            weight, bias = (None if given is None else given.detach().to(device) for given in (head.weight, head.bias))
            assert weight is not None, "a linear layer has a weight"
            self.copied = VocabularyHead(weight, bias, self.scale, self.cap)
        return self.copied

    def _product(self, rows: Tensor, layer: LayerRef) -> Tensor:
        if next(self.head.parameters()).device != rows.device:
            self.model.to(rows.device)
        states = rows.to(next(self.head.parameters()).dtype).unsqueeze(0)
        if self.norm is not None and layer.number >= 0:
            states = self.norm(states)
        return self.head(states).squeeze(0)

    def _capped(self, logits: Tensor) -> Tensor:
        logits = logits if self.scale == 1.0 else logits * self.scale
        return logits if self.cap is None else (logits / self.cap).tanh() * self.cap

    @torch.no_grad()
    def _agrees(self, hidden: Tensor, logits: Tensor, layer: LayerRef, factor: Tensor) -> bool:
        width = next(self.head.parameters()).shape[-1]
        if hidden.shape[-1] != width:
            return False
        ours = self._capped(self._product(hidden, layer) * factor)
        if ours.shape != logits.shape:
            return False
        difference = (ours.cpu().double() - logits.cpu().double()).abs().max()
        allowed = AGREES.get(logits.dtype, COARSELY_AGREES) * logits.abs().max().cpu().double()
        return bool(difference <= allowed)


def language_head(model: nn.Module) -> LanguageHead | None:
    """Return the head of a language model that nothing is wrapped around, None where it is not known."""
    if unwrap(model) is not model or "" not in find_stacks(model):
        return None
    try:
        return LanguageHead(model)
    except UserError:
        return None


def configured(model: PreTrainedModel) -> tuple[float, float | None]:
    """Return the scale and the cap of the logits that a model's configuration names: 1 and None where it names none."""
    config = model.config.get_text_config()
    scale = 1.0
    for name, exponent in SCALES.items():
        value = getattr(config, name, None)
        scale *= float(value) ** exponent if isinstance(value, int | float) and value else 1.0
    caps = [value for name in CAPS if isinstance(value := getattr(config, name, None), int | float) and value]
    return scale, float(caps[0]) if caps else None


@contextmanager
def stretched(head: nn.Module) -> Iterator[list[Tensor]]:
    """Multiply what `head` gives so that its largest entry is STRETCHED, and yield a list that the factor goes into."""
    factors: list[Tensor] = []

    def stretch(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        factors.append(STRETCHED / output.abs().max().clamp(min=torch.finfo(output.dtype).tiny))
        return output * factors[-1]

    hook = head.register_forward_hook(stretch)
    try:
        yield factors
    finally:
        hook.remove()


@torch.no_grad()
def probe(model: PreTrainedModel, layer: LayerRef) -> Signal:
    """Return what a model, in eval mode, says about a text of PROBE_LENGTH tokens; it is left in the mode it was in."""
    padding = padding_token(model.config)
    known = [token for token in range(PROBE_LENGTH + 1) if token != padding]
    ids = torch.tensor([known[:PROBE_LENGTH]], device=model.device)
    with evaluating(model):
        return run_model(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, [layer], logits=True)
