"""A training step with fused predictions is the plain one, and no tensor in it is tokens x vocabulary."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from tiny_models import COMMON, tiny_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from toy import ToyCollator, toy_dataset, toy_rows

import layerdistill as ld
from layerdistill.api import make_pair, method_config
from layerdistill.core.types import Needs, Progress, Signal
from layerdistill.matching import vocabulary_loss
from layerdistill.methods.curriculum import Curriculum, ScheduledTerm
from layerdistill.methods.table import find_method
from layerdistill.models.adapters import add_adapters, train_adapters_and_head
from layerdistill.signals import LiveTeacher
from layerdistill.train.composite import Composite
from layerdistill.train.fused_predictions import FINAL, fused_predictions

START = Progress()
FAMILIES = ("gpt2", "llama", "opt", "gpt-neox", "qwen3", "phi", "gemma2", "granite")
SHAPE: dict[str, Any] = {**COMMON, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few tokens a chunk, as a real vocabulary would make of a real batch."""
    monkeypatch.setattr(vocabulary_loss, "FEWEST_ROWS", 8)
    monkeypatch.setattr(vocabulary_loss, "CHUNK", {"cpu": 1})


def model_of(family: str, layers: int, hidden: int, seed: int, **config: Any) -> Any:
    """A tiny causal language model, in float64."""
    if family not in ("gemma2", "granite"):
        return tiny_model(
            family, "causal-lm", num_layers=layers, hidden_size=hidden, num_heads=hidden // 8, seed=seed, **config
        ).double()
    torch.manual_seed(seed)
    shape = {**SHAPE, "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": hidden // 8}
    made = {
        "gemma2": lambda: hf.Gemma2Config(**shape, intermediate_size=32, final_logit_softcapping=1.0),
        "granite": lambda: hf.GraniteConfig(**shape, intermediate_size=32, logits_scaling=0.25),
    }[family]()
    model = hf.AutoModelForCausalLM.from_config(made)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval().double()


def pair_of(family: str, **config: Any) -> tuple[Any, Any]:
    """A student and a wider, deeper teacher."""
    return model_of(family, 2, 16, 1, **config), model_of(family, 4, 32, 2)


def batch_of(size: int = 4) -> dict[str, Tensor]:
    """Rows of several lengths, the first tokens of each without labels."""
    batch = ToyCollator("causal-lm")(toy_rows("causal-lm", size))
    batch["labels"][:, :2] = -100
    return batch


def composites(student: Any, teacher: Any, method: str, **options: Any) -> list[tuple[Composite, LiveTeacher | None]]:
    """The plain and the fused composite of one student and the same terms."""
    pair = make_pair(teacher, student)
    source = LiveTeacher(teacher) if teacher is not None else None
    stage = next(iter(find_method(method).stages(pair, method_config(method, options), None)))
    fused = fused_predictions(student, source, "causal-lm")
    return [(Composite(student, stage.terms, given), source) for given in (None, fused)]


def step(
    composite: Composite, source: LiveTeacher | None, batch: dict[str, Tensor], progress: Progress = START
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """The value of every mean, and the gradient of the objective in every parameter of the student and the terms."""
    needs = composite.needs(progress)
    teacher = source.signal(batch, needs) if needs.teacher_at_all and source is not None else None
    composite.zero_grad()
    sums = composite(batch, teacher, progress)
    coefficients = {name: term.coefficient(name, progress) for term in composite.terms for name in sums
                    if name.partition("/")[0] == term.name}  # fmt: skip
    sum(coefficients[name] * part / count for name, (part, count) in sums.items()).backward()
    gradients = {name: p.grad.clone() for name, p in composite.named_parameters() if p.grad is not None}
    return {name: (part / count).item() for name, (part, count) in sums.items()}, gradients


def assert_same_step(
    both: list[tuple[Composite, LiveTeacher | None]], batch: dict[str, Tensor], progress: Progress = START
) -> None:
    (plain, source), (fused, _) = both
    assert fused.needs(progress) != plain.needs(progress), "the fused path must be taken"
    assert not fused.needs(progress).teacher_logits
    torch.manual_seed(3)
    values, gradients = step(plain, source, batch, progress)
    torch.manual_seed(3)
    fused_values, fused_gradients = step(fused, source, batch, progress)
    assert list(values) == list(fused_values)
    assert fused_values == pytest.approx(values, rel=1e-6, abs=1e-9)
    assert gradients.keys() == fused_gradients.keys()
    assert max(gradient.abs().max() for gradient in gradients.values()) > 1e-3
    for name, gradient in gradients.items():
        torch.testing.assert_close(fused_gradients[name], gradient, atol=1e-7, rtol=1e-5, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("method", ["none", "kd", "ild", "cka"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_fused_step_is_the_plain_one(family: str, method: str) -> None:
    student, teacher = pair_of(family)
    assert_same_step(composites(student, None if method == "none" else teacher, method), batch_of())


@pytest.mark.parametrize("loss", ["reverse_kl", "js_divergence", "soft_cross_entropy"])
def test_every_divergence_with_weights_and_a_padded_vocabulary(loss: str) -> None:
    student, teacher = model_of("gpt2", 2, 16, 1, vocab_size=72), model_of("gpt2", 4, 32, 2)
    weights = {"task": 0.3, "logits": 0.7}
    assert_same_step(composites(student, teacher, "kd", logits_loss=loss, temperature=3.0, weights=weights), batch_of())
    weights = {"task": 0.0, "logits": 0.7}
    assert_same_step(composites(student, teacher, "kd", logits_loss=loss, weights=weights), batch_of())


@pytest.mark.parametrize("loss", ["forward_kl", "reverse_kl", "js_divergence", "soft_cross_entropy"])
def test_likeliest_tokens_in_place_of_the_teachers_logits(loss: str) -> None:
    student, teacher = model_of("gpt2", 2, 16, 1, vocab_size=72), model_of("gpt2", 4, 32, 2)
    options = {"logits_loss": loss, "logits_top_k": 5, "temperature": 3.0, "weights": {"task": 0.3, "logits": 0.7}}
    both = composites(student, teacher, "kd", **options)
    assert_same_step(both, batch_of())
    needs = both[1][0].needs(START)
    assert not needs.teacher, "its states are not needed, nor its head"
    assert {which.k for which in needs.teacher_top} == {5}


def test_likeliest_tokens_of_a_teacher_whose_head_is_not_known_are_fused_too() -> None:
    student = model_of("gpt2", 2, 16, 1)
    teacher = tiny_model("opt", "causal-lm", hidden_size=32, word_embed_proj_dim=16, seed=2).double()
    assert LiveTeacher(teacher).head is None
    assert_same_step(composites(student, teacher, "kd", logits_top_k=5), batch_of())


def test_dropout_draws_the_same_numbers() -> None:
    dropout = {"resid_pdrop": 0.2, "embd_pdrop": 0.2, "attn_pdrop": 0.2}
    student, teacher = pair_of("gpt2", **dropout)
    both = composites(student.train(), teacher, "ild")
    assert_same_step(both, batch_of())
    torch.manual_seed(4)
    first = step(*both[1], batch_of())[0]
    assert step(*both[1], batch_of())[0] != pytest.approx(first, rel=1e-3), "dropout must really have been on"


def test_untied_heads_frozen_embeddings_adapters_and_checkpointing() -> None:
    student, teacher = pair_of("gpt2", tie_word_embeddings=False)
    assert_same_step(composites(student, teacher, "kd"), batch_of())
    student, teacher = pair_of("llama")
    both = composites(student.train(), teacher, "ild")
    both[1][0].activation_checkpointing_enable()
    assert_same_step(both, batch_of())
    student, teacher = pair_of("gpt2")
    add_adapters(student, 2, 4.0, 0.0, seed=0)
    train_adapters_and_head(student)
    both = composites(student, teacher, "kd")
    assert_same_step(both, batch_of())
    assert all(".lora_" in name for name in step(*both[1], batch_of())[1])


def test_a_batch_without_any_label() -> None:
    batch = batch_of()
    batch["labels"][:] = -100
    student, teacher = pair_of("gpt2")
    for composite, source in composites(student, teacher, "kd"):
        needs = composite.needs(START)
        sums = composite(batch, source.signal(batch, needs) if source is not None else None, START)
        sum(part for part, _ in sums.values()).backward()
        assert {name: (part.item(), count.item()) for name, (part, count) in sums.items()} == {
            "task": (0.0, 0.0),
            "logits": (0.0, 0.0),
        }
    assert not any(p.grad.any() for p in student.parameters() if p.grad is not None)


def test_a_curriculum_is_followed() -> None:
    student, teacher = pair_of("gpt2")
    both = composites(student, teacher, "ild")
    curriculum = Curriculum(start=1, shape="sharp", mode="kd_rem", epochs=3)
    terms = nn.ModuleList([ScheduledTerm(term, curriculum) for term in both[0][0].terms])
    both = [(Composite(student, terms, composite.fused), source) for composite, source in both]
    for epoch, names in [(0, ["task", "logits"]), (1, ["task", "hidden/1-2", "hidden/2-4"])]:
        assert_same_step(both, batch_of(), Progress(epoch=epoch))
        assert list(step(*both[1], batch_of(), Progress(epoch=epoch))[0]) == names


class _Watcher(nn.Module):
    """A term that reads the student's logits itself."""

    name = "watcher"

    def needs(self, progress: Progress) -> Needs:
        return Needs(student_logits=True)

    def coefficient(self, name: str, progress: Progress) -> float:
        return 0.0

    def forward(self, student: Signal, teacher: Signal | None, batch: Any, progress: Progress) -> dict[str, Any]:
        assert student.logits is not None
        return {}


@pytest.mark.parametrize("reason", ["mse", "watcher", "record", "projection", "classes"])
def test_logits_are_made_where_something_has_to_see_them(reason: str) -> None:
    student, teacher = pair_of("gpt2")
    if reason == "projection":
        student = tiny_model("opt", "causal-lm", num_layers=2, hidden_size=16, num_heads=2, word_embed_proj_dim=8)
        assert fused_predictions(student, LiveTeacher(teacher), "causal-lm") is None
        return
    if reason == "classes":
        assert fused_predictions(student, LiveTeacher(teacher), "sequence-classification") is None
        return
    (plain, source), (composite, _) = composites(student, teacher, "kd", logits_loss="mse" if reason == "mse" else None)
    if reason == "watcher":
        terms = nn.ModuleList([*plain.terms, _Watcher()])
        plain, composite = Composite(student, terms), Composite(student, terms, composite.fused)
    if reason == "record":
        fused = fused_predictions(student, SimpleNamespace(signal=source.signal), "causal-lm")  # type: ignore[arg-type,union-attr]
        composite = Composite(student, plain.terms, fused)
    assert composite.needs(START) == plain.needs(START)
    assert step(composite, source, batch_of())[0] == step(plain, source, batch_of())[0]


def test_wrapped_models_are_left_to_themselves() -> None:
    student, teacher = pair_of("gpt2")
    wrapped: Any = get_peft_model(teacher, LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    fused = fused_predictions(student, LiveTeacher(wrapped), "causal-lm")
    assert fused is not None
    assert fused.teacher is None
    assert fused_predictions(wrapped, LiveTeacher(teacher), "causal-lm") is None


def test_predictions_that_nothing_reads_are_not_made() -> None:
    student, teacher = pair_of("gpt2")
    (_, source), (composite, _) = composites(student, teacher, "ild", weights={"task": 0, "logits": 0, "hidden": 1})
    calls: list[int] = []
    student.lm_head.register_forward_hook(lambda *_: calls.append(1))
    values, gradients = step(composite, source, batch_of())
    assert list(values) == ["hidden/1-2", "hidden/2-4"]
    assert gradients
    assert calls == []
    assert FINAL not in composite.needs(START).student | composite.needs(START).teacher


class _Largest(TorchDispatchMode):
    """Notes the elements of the largest tensor that any operation gives, in the forward and the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return made


@pytest.mark.parametrize("method", ["none", "kd", "cka"])
def test_no_tensor_of_tokens_times_vocabulary_is_ever_made(method: str) -> None:
    vocabulary = 2048
    student = model_of("gpt2", 2, 16, 1, vocab_size=vocabulary)
    teacher = model_of("gpt2", 4, 32, 2, vocab_size=vocabulary) if method != "none" else None
    batch = batch_of(16)
    found = []
    for composite, source in composites(student, teacher, method):
        with _Largest() as largest:
            step(composite, source, batch)
        found.append(largest.elements)
    tokens = batch["input_ids"].numel()
    assert found[0] >= tokens * vocabulary
    assert found[1] <= 32 * vocabulary, "the teacher's embeddings are the largest there is"
    assert found[1] < tokens * vocabulary / 4


def trained(folder: Path, fuse: bool, method: str, **changes: Any) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """The student after ten optimizer steps, and the log lines."""
    student = tiny_model("gpt2", "causal-lm", num_layers=2, hidden_size=16, num_heads=2, seed=1)
    teacher = tiny_model("gpt2", "causal-lm", num_layers=4, hidden_size=32, num_heads=4, seed=2)
    args = ld.LayerDistillationConfig(
        output_dir=str(folder), per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=10,
        learning_rate=0.5, optim="sgd", save_strategy="no", use_cpu=True, logging_steps=2, term_gradient_steps=4,
        disable_tqdm=True, **changes,
    )  # fmt: skip
    trainer = ld.LayerDistillationTrainer(
        student, teacher, method, args, toy_dataset("causal-lm"), data_collator=ToyCollator("causal-lm"), fuse=fuse
    )
    assert (trainer.composite.fused is not None) == fuse
    trainer.train()
    return student.state_dict(), [line for line in trainer.state.log_history if "loss" in line]


@pytest.mark.parametrize("method", ["kd", "ild"])
def test_ten_optimizer_steps_and_their_log(tmp_path: Path, method: str) -> None:
    (plain, plain_log), (fused, fused_log) = (trained(tmp_path / str(fuse), fuse, method) for fuse in (False, True))
    for name, tensor in plain.items():
        torch.testing.assert_close(fused[name], tensor, atol=2e-5, rtol=1e-4)
    for ours, theirs in zip(fused_log, plain_log, strict=True):
        assert ours.keys() == theirs.keys()
        for name in (name for name in ours if name.startswith(("distill/", "grad_norm"))):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3), name
    assert any("grad_norm/logits" in line for line in fused_log)


def test_mixed_precision_gives_the_plain_losses(tmp_path: Path) -> None:
    (_, plain), (_, fused) = (trained(tmp_path / str(fuse), fuse, "kd", bf16=True) for fuse in (False, True))
    for ours, theirs in zip(fused, plain, strict=True):
        assert ours["distill/task"] == pytest.approx(theirs["distill/task"], rel=5e-3)
        assert ours["distill/logits"] == pytest.approx(theirs["distill/logits"], rel=3e-2)
