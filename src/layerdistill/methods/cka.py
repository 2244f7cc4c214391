"""Hidden-state matching by centred kernel alignment (Dasgupta and Cohn, ICLR 2025, https://openreview.net/forum?id=IcVSKhVpKu)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from torch import Tensor, nn

from layerdistill.core.types import Mean, Pair, RunContext, Stage, StagePreview
from layerdistill.matching import cka_loss, cka_target
from layerdistill.matching.hsic import Side
from layerdistill.methods.distributed import differentiable_sum
from layerdistill.methods.hidden_term import HiddenTerm
from layerdistill.methods.matched import TokensConfig, build_maps, matched_problems, prediction_terms
from layerdistill.methods.preview import preview_stages


class CkaConfig(TokensConfig):
    """`method: {name: cka, ...}`."""

    name: Literal["cka"] = "cka"

    form: Literal["cka", "sqrt"] = "cka"
    """cka: 1 - CKA; sqrt: 1 - sqrt(CKA), what the authors' released code computes."""

    debiased: bool = False
    """Whether HSIC is estimated without bias (HSIC_1), so that small batches of unrelated states give about 0."""


class CkaDistance:
    """`1 - CKA` over the real tokens of the batch, exact over all processes of a distributed run."""

    def __init__(self, form: str, debiased: bool) -> None:
        self.form = form
        self.debiased = debiased

    def __call__(self, student: Tensor, teacher: Side, mask: Tensor | None) -> Mean:
        """Return the loss of one pair, from the student's rows `(tokens, hidden)` and what `prepare` returned."""
        return cka_loss(
            student, teacher, mask, sqrt=self.form == "sqrt", debiased=self.debiased, all_reduce=differentiable_sum()
        )

    def prepare(self, teacher: Tensor) -> Side:
        """Return the teacher's side of all pairs that share these rows, `(tokens, hidden)`."""
        return cka_target(teacher, debiased=self.debiased, all_reduce=differentiable_sum())


class CentredKernelAlignment:
    """Knowledge distillation plus `1 - CKA` between matched hidden states; widths may differ, no projection is needed.

    CKA is a ratio of sums over the batch: the mean over micro-batches is not the CKA of the accumulated batch, so
    gradient accumulation changes this term (distributed processes do not). Deviations from the released code, which
    `form: sqrt, embeddings: true, reduce: sum, temperature: 1.0` undoes: 1 - CKA, averaged over pairs, no embeddings.
    """

    name = "cka"
    summary = "kd plus centred kernel alignment of matched hidden states; no projection, any width"
    Config = CkaConfig
    one_stage = True
    grows_student = False

    def stages(self, pair: Pair, config: CkaConfig, context: RunContext | None = None) -> Iterator[Stage]:
        """One stage with the task, logits and hidden terms."""
        distance = CkaDistance(config.form, config.debiased)
        hidden = HiddenTerm(
            build_maps(config, pair),
            distance,
            config.weights.hidden,
            reduce=config.reduce,
            whole_batch=True,
            prepare=distance.prepare,
            dtype=config.products,
        )
        yield Stage("distill", pair.student, nn.ModuleList([*prediction_terms(config, pair), hidden]))

    def preview(self, pair: Pair, config: CkaConfig) -> list[StagePreview]:
        """The one stage."""
        return preview_stages(self.stages(pair, config))

    def problems(self, config: CkaConfig, pair: Pair) -> list[str]:
        """A layer map out of range, a loss that does not fit, or a square root of what can be negative."""
        problems = matched_problems(config, pair)
        if config.form == "sqrt" and config.debiased:
            problems.append(
                "method.form is 'sqrt' and method.debiased is true, but debiased CKA can be negative and has no square "
                "root then. Write form: cka, or debiased: false."
            )
        return problems


METHOD = CentredKernelAlignment()
