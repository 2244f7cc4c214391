"""The final norm and the head of a language model as one function, checked against what the model says itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from layerdistill.core.errors import UserError
from layerdistill.core.types import LayerRef, Signal
from layerdistill.models import find_head, find_stacks, unwrap
from layerdistill.signals.source import run_model

PROBE_LENGTH = 4
"""Tokens of the text that a model is asked about."""

AGREES = {torch.float32: 1e-4, torch.float64: 1e-9}
"""Largest difference, as a share of the largest logit, that rounding may make; in 16 bits COARSELY_AGREES."""

COARSELY_AGREES = 0.05


class LanguageHead:
    """The final norm and the head of a language model as one function of hidden states; its weights stay the model's.

    Raises UserError for a model that makes its logits in another way (a cap, a scale, a projection in between): the
    model is run on a few tokens, and what this reads out of its last layer must be what the model says.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = unwrap(model)
        self.norm = find_stacks(model)[""].final_norm
        head = find_head(model)
        assert head is not None, "a language model has a head"
        self.head: nn.Module = head
        last = LayerRef("", find_stacks(model)[""].depth)
        signal = probe(self.model, last)
        assert signal.logits is not None, "they were asked for"
        self.vocab_size = signal.logits.shape[-1]
        if not self._agrees(signal.hidden[last][0], signal.logits[0], last):
            raise UserError(
                f"{type(self.model).__name__} makes its logits in another way than by its final norm and its head (a "
                "cap, a scale, a projection in between), so filters cannot be learned through them. Use "
                "method.filters: unlearned or none."
            )

    def __call__(self, rows: Tensor, layer: LayerRef) -> Tensor:
        """Return the logits `(n, vocab)` of states `(n, hidden)` in the place of `layer`, in the model's dtype.

        The states are normed first, unless `layer` is `final`, which is normed already. The model follows the states to
        their device.
        """
        if next(self.head.parameters()).device != rows.device:
            self.model.to(rows.device)
        states = rows.to(next(self.head.parameters()).dtype).unsqueeze(0)
        if self.norm is not None and layer.number >= 0:
            states = self.norm(states)
        return self.head(states).squeeze(0)

    @torch.no_grad()
    def _agrees(self, hidden: Tensor, logits: Tensor, layer: LayerRef) -> bool:
        width = next(self.head.parameters()).shape[-1]
        if hidden.shape[-1] != width:
            return False
        difference = (self(hidden, layer).cpu().double() - logits.cpu().double()).abs().max()
        allowed = AGREES.get(logits.dtype, COARSELY_AGREES) * logits.abs().max().cpu().double()
        return bool(difference <= allowed)


@torch.no_grad()
def probe(model: PreTrainedModel, layer: LayerRef) -> Signal:
    """Return what a model, in eval mode, says about a text of PROBE_LENGTH tokens; it is left in the mode it was in."""
    known = [token for token in range(PROBE_LENGTH + 1) if token != model.config.pad_token_id]
    ids = torch.tensor([known[:PROBE_LENGTH]], device=model.device)
    training = model.training
    try:
        return run_model(model.eval(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, [layer], logits=True)
    finally:
        model.train(training)
