"""The Python side: the same methods on models and data in memory, and names that stay what they are."""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_batch, tiny_model
from toy import ToyCollator, toy_dataset
from toy_recipe import toy_recipe, toy_tokenizer
from transformers import PreTrainedModel, TrainingArguments

import layerdistill as ld
from layerdistill.api import make_pair, task_of
from layerdistill.core.fingerprint import fingerprint_model
from layerdistill.core.types import LayerRef, Needs
from layerdistill.methods.table import METHODS
from layerdistill.signals import LiveTeacher

CLASSES, LANGUAGE = "sequence-classification", "causal-lm"
FAMILY = {CLASSES: "bert", LANGUAGE: "gpt2"}


def models(task: str = CLASSES, **options: Any) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A teacher of 4 blocks x 32 and a student of 2 x 16."""
    teacher = tiny_model(FAMILY[task], task, num_layers=4, hidden_size=32, num_heads=4, seed=1)
    return teacher, tiny_model(FAMILY[task], task, num_layers=2, hidden_size=16, num_heads=2, seed=2, **options)


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    """transformers' own arguments."""
    return TrainingArguments(
        output_dir=str(folder),
        **{
            "max_steps": 4, "per_device_train_batch_size": 8, "learning_rate": 1e-3, "report_to": "none",
            "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1, **options,
        },
    )  # fmt: skip


def distil(folder: Path, method: Any, task: str = CLASSES, pair: Any = None, **options: Any) -> ld.DistillResult:
    """Distil toy models on toy data."""
    teacher, student = pair or models(task)
    data, held_out = toy_dataset(task, 32), toy_dataset(task, 16, seed=5)
    args = options.pop("args", None) or arguments(folder)
    return ld.distill(
        teacher, student, data, held_out, method=method, processing_class=toy_tokenizer(), args=args, **options
    )


# distill


@pytest.mark.parametrize("task", [CLASSES, LANGUAGE])
@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.one_stage])
def test_a_method_of_one_stage_trains_the_student_in_place(method: str, task: str, tmp_path: Path) -> None:
    teacher, student = models(task)
    before = fingerprint_model(teacher), fingerprint_model(student)
    result = distil(tmp_path, method, task, (teacher, student))
    assert result.student is student
    assert fingerprint_model(teacher) == before[0]
    assert fingerprint_model(student) != before[1]
    rows = toy_dataset(task, 16, seed=5)
    batch = ToyCollator(task)(list(rows))
    with torch.no_grad():
        logits = student.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.double()
    if task == CLASSES:
        right = (logits.argmax(-1) == batch["labels"]).double().mean().item()
        assert result.metrics["accuracy"] == pytest.approx(right)
        assert set(result.metrics) == {"accuracy", "macro_f1"}
    else:
        nll = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
        assert result.metrics == {"perplexity": pytest.approx(nll.exp().item(), rel=1e-4)}


@pytest.mark.parametrize("task", [CLASSES, LANGUAGE])
@pytest.mark.parametrize(
    ("method", "options"),
    [("layer_prune", {"num_removed": 1, "calibration": {"examples": 4}}), ("l1_prune", {"removed": 0.1})],
)
def test_a_student_that_grows_out_of_the_teacher(
    method: str, options: dict[str, Any], task: str, tmp_path: Path
) -> None:
    teacher, student = models(task)
    before = fingerprint_model(teacher)
    args = ld.LayerDistillationConfig(output_dir=str(tmp_path), max_steps=2, use_cpu=True, disable_tqdm=True)
    given = {"method": method, "processing_class": toy_tokenizer(), "args": args, **options}
    with pytest.raises(ld.UserError, match="student=None"):
        ld.distill(teacher, student, toy_dataset(task, 24), **given)
    result = ld.distill(teacher, None, toy_dataset(task, 24), toy_dataset(task, 16, seed=5), **given)
    assert fingerprint_model(teacher) == before
    sizes = [sum(parameter.numel() for parameter in model.parameters()) for model in (result.student, teacher)]
    assert sizes[0] < sizes[1]
    assert result.metrics


def test_without_arguments_and_evaluation_nothing_is_left_behind(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    teacher, student = models()
    before = fingerprint_model(student)
    rows = toy_dataset(CLASSES, 8)
    result = ld.distill(teacher, student, rows, method="kd", processing_class=toy_tokenizer())
    assert result.metrics == {}
    assert fingerprint_model(student) != before
    assert list(tmp_path.iterdir()) == []


def test_options_reach_the_method(tmp_path: Path) -> None:
    found = [
        fingerprint_model(distil(tmp_path / str(number), method, **options).student)
        for number, (method, options) in enumerate(
            [
                ("kd", {}),
                ("kd", {"temperature": 8.0}),
                ("kd", {"weights": {"task": 0.0}}),
                ({"name": "kd", "temperature": 8.0}, {}),
                (METHODS["kd"].Config(temperature=8.0), {}),
            ]
        )
    ]
    assert len({found[0], found[1], found[2]}) == 3
    assert found[1] == found[3] == found[4], "a name with options, a dict and a config say the same"


def test_no_teacher_is_needed_to_fine_tune(tmp_path: Path) -> None:
    _, student = models()
    alone = distil(tmp_path / "a", "none", pair=(None, student))
    beside = distil(tmp_path / "b", "none")
    assert fingerprint_model(alone.student) == fingerprint_model(beside.student)
    assert alone.metrics == beside.metrics


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("ckd", {}, r"method\.name is 'ckd', which is no method\. Did you mean 'c?kd?a?'\?"),
        ("kd", {"temprature": 3}, r"method\.temprature is not a known key\. Did you mean 'temperature'\?"),
        ("kd", {"temperature": -1}, r"method\.temperature is -1: Input should be greater than 0"),
        ("none", {"temperature": 2.0}, r"method\.temperature is not a known key"),
        ("ild", {"layer_map": [(1, 9)]}, r"teacher's layer in layer_map is 9, but must be from 0 to 4"),
        ("cka", {"layer_map": [(3, 1)]}, r"student's layer in layer_map is 3, but must be from 0 to 2"),
        ("ild", {"projection": "identity"}, r"\[16\] wide and the teacher \[32\]"),
        ("cka", {"form": "sqrt", "debiased": True}, "debiased CKA can be negative"),
    ],
)
def test_a_wrong_method_is_refused_before_training(
    method: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    teacher, student = models()
    before = fingerprint_model(student)
    with pytest.raises(ld.UserError, match=message):
        distil(tmp_path / "state", method, pair=(teacher, student), **options)
    assert fingerprint_model(student) == before
    assert not (tmp_path / "state").exists()


def wrong_pairs() -> dict[str, tuple[Any, Any, str]]:
    teacher, student = models()
    five = tiny_model("bert", CLASSES, num_layers=2, num_labels=5)
    base = tiny_model("bert", num_layers=2)
    language = tiny_model("gpt2", LANGUAGE, num_layers=2)
    return {
        "no-head": (teacher, base, "BertModel has no head for a task that is supported here"),
        "teacher-without-head": (base, student, "BertModel has no head"),
        "other-labels": (five, student, "The teacher has 5 labels, the student 3"),
        "other-task": (language, student, "The teacher is made for causal-lm, the student for sequence-classification"),
        "no-teacher": (None, student, "The method 'kd' learns from a teacher"),
    }


@pytest.mark.parametrize("name", wrong_pairs())
def test_models_that_do_not_fit_are_refused(name: str, tmp_path: Path) -> None:
    teacher, student, message = wrong_pairs()[name]
    with pytest.raises(ld.UserError, match=message):
        distil(tmp_path, "kd", pair=(teacher, student))


def test_without_a_tokenizer_nobody_knows_how_to_pad(tmp_path: Path) -> None:
    with pytest.raises(ld.UserError, match="processing_class is missing"):
        ld.distill(*models(), toy_dataset(CLASSES, 8), method="kd", args=arguments(tmp_path))


def test_a_second_distillation_into_the_same_folder_is_refused(tmp_path: Path) -> None:
    args = arguments(tmp_path)
    first = distil(tmp_path, "kd", args=args)
    student = fingerprint_model(first.student)
    with pytest.raises(ld.UserError, match=r"holds the state of another distillation \(method were different\)"):
        distil(tmp_path, "cka", args=args)
    with pytest.raises(ld.UserError, match=r"\(student were different\)"):
        distil(tmp_path, "kd", args=args, pair=(models()[0], first.student))
    with pytest.raises(ld.UserError, match=r"\(args were different\)"):
        distil(tmp_path, "kd", args=arguments(tmp_path, learning_rate=1.0))
    again = distil(tmp_path, "kd", args=args)
    assert fingerprint_model(again.student) == student, "the same call again finds its own end"
    assert again.metrics == first.metrics


def test_an_interrupted_distillation_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = distil(tmp_path / "whole", "ild")
    args = arguments(tmp_path / "cut", save_strategy="steps", save_steps=2)
    trainer = importlib.import_module("layerdistill.train.trainer").StageTrainer
    really, steps = trainer.compute_loss, []

    def stop(self: Any, *given: Any, **options: Any) -> Any:
        steps.append(self.state.global_step)
        if steps == [0, 1, 2, 3]:
            raise MemoryError("the machine went down")
        return really(self, *given, **options)

    monkeypatch.setattr(trainer, "compute_loss", stop)
    with pytest.raises(MemoryError):
        distil(tmp_path / "cut", "ild", args=args)
    result = distil(tmp_path / "cut", "ild", args=args)
    assert steps == [0, 1, 2, 3, 2, 3]
    assert fingerprint_model(result.student) == fingerprint_model(whole.student)


# The Trainer


def trained(folder: Path, task: str, method: str, data: Any, **options: Any) -> ld.LayerDistillationTrainer:
    teacher, student = models(task)
    trainer = ld.LayerDistillationTrainer(
        model=student, teacher_model=teacher, method=method, args=arguments(folder), train_dataset=data, **options
    )
    assert trainer.student is student
    trainer.train()
    return trainer


@pytest.mark.parametrize("task", [CLASSES, LANGUAGE])
def test_the_trainer_works_with_a_tokenizer_and_transformers_own_arguments(task: str, tmp_path: Path) -> None:
    data = toy_dataset(task, 32)
    ours = trained(tmp_path / "a", task, "cka", data, processing_class=toy_tokenizer())
    theirs = trained(tmp_path / "b", task, "cka", data, data_collator=ToyCollator(task))
    for name, tensor in ours.student.state_dict().items():
        torch.testing.assert_close(tensor, theirs.student.state_dict()[name], atol=1e-5, rtol=1e-4, msg=name)
    first = ours.state.log_history[0]
    assert {"distill/task", "distill/logits", "distill/hidden/1-2", "distill/hidden/2-4"} <= set(first)
    total = first["distill/task"] + first["distill/logits"]
    total += (first["distill/hidden/1-2"] + first["distill/hidden/2-4"]) / 2
    assert first["loss"] == pytest.approx(total, rel=1e-3), "the loss is the weighted sum of what is logged"


def test_what_distill_does_is_what_the_trainer_does(tmp_path: Path) -> None:
    by_trainer = trained(tmp_path / "a", CLASSES, "ild", toy_dataset(CLASSES, 32), processing_class=toy_tokenizer())
    assert fingerprint_model(by_trainer.student) == fingerprint_model(distil(tmp_path / "b", "ild").student)


def test_explicit_layers_are_logged_by_their_names(tmp_path: Path) -> None:
    trainer = trained(
        tmp_path, LANGUAGE, "cka", toy_dataset(LANGUAGE, 32), data_collator=ToyCollator(LANGUAGE),
        method_options={"layer_map": [("final", "final"), (0, 0), (2, 3)]},
    )  # fmt: skip
    names = {name for name in trainer.state.log_history[0] if name.startswith("distill/hidden")}
    assert names == {"distill/hidden/final-final", "distill/hidden/0-0", "distill/hidden/2-3"}


def test_a_trainer_without_the_teacher_it_needs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ld.UserError, match="Pass teacher_model="):
        ld.LayerDistillationTrainer(models()[1], method="kd", args=arguments(tmp_path))


@pytest.mark.parametrize(
    ("labels", "problem", "expected"),
    [
        (3, None, "sequence-classification"),
        (3, "single_label_classification", "sequence-classification"),
        (3, "multi_label_classification", "multi-label-classification"),
        (3, "regression", "regression"),
        (1, None, "regression"),
    ],
)
def test_the_task_is_told_by_the_student(labels: int, problem: str | None, expected: str) -> None:
    model = tiny_model("bert", CLASSES, num_layers=1, num_labels=labels, problem_type=problem)
    assert task_of(model) == expected


def test_language_models_are_compared_on_the_rows_that_both_have() -> None:
    teacher, student = models(LANGUAGE, vocab_size=80)
    assert make_pair(teacher, student).vocab_size == 64
    assert make_pair(*models()).vocab_size is None


def test_the_teacher_follows_the_batch_to_its_device() -> None:
    teacher, _ = models()
    batch = {"input_ids": tiny_batch(teacher)["input_ids"].to("meta")}
    signal = LiveTeacher(teacher).signal(batch, Needs(teacher=frozenset({LayerRef("", 2)}), teacher_logits=True))
    assert signal.logits is not None
    assert signal.logits.device.type == signal.hidden[LayerRef("", 2)].device.type == "meta"


# Names

CONTRACT = (
    "load_recipe", "run", "distill", "LayerDistillationTrainer", "LayerDistillationConfig", "make_student",
    "load_student", "capture", "layer_map", "matching", "UserError",
)  # fmt: skip
MATCHING = (
    "linear_cka", "cka_loss", "masked_mse", "cosine_loss", "forward_kl", "reverse_kl", "js_divergence", "layer_angles",
)  # fmt: skip


def test_importing_every_module_puts_none_in_the_place_of_a_public_name() -> None:
    for module in pkgutil.walk_packages(ld.__path__, "layerdistill."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    for name in {*CONTRACT, *ld.__all__} - {"matching", "__version__"}:
        assert not inspect.ismodule(getattr(ld, name)), name
        assert callable(getattr(ld, name)), name
    assert inspect.ismodule(ld.matching)
    assert set(CONTRACT) <= set(ld.__all__)
    for name in MATCHING:
        assert callable(getattr(ld.matching, name)), name
    with pytest.raises(AttributeError, match="no_such_name"):
        ld.no_such_name  # noqa: B018


def test_capture_is_a_context_manager_under_its_public_name() -> None:
    model = tiny_model("bert", num_layers=3)
    batch = tiny_batch(model)
    with torch.no_grad():
        expected = model(**batch, output_hidden_states=True)
    before = count_hooks(model)  # transformers leaves some of its own
    with torch.no_grad(), ld.capture(model, layers=[0, 2, "final"]) as hidden:
        model(**batch)
    assert torch.equal(hidden[0], expected.hidden_states[0])
    assert torch.equal(hidden[2], expected.hidden_states[2])
    assert torch.equal(hidden["final"], expected.last_hidden_state)
    assert count_hooks(model) == before


def count_hooks(model: torch.nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_the_python_contract_of_maps_and_losses() -> None:
    assert ld.layer_map("forward", student_layers=3, teacher_layers=6, seed=0).pairs == [(1, 2), (2, 4), (3, 6)]
    x, y = torch.randn(2, 5, 8), torch.randn(2, 5, 12)
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]])
    flat = ld.matching.linear_cka(x[mask.bool()], y[mask.bool()])
    torch.testing.assert_close(ld.matching.linear_cka(x, y, mask=mask, debiased=False), flat)
    torch.testing.assert_close(ld.matching.cka_loss(x, y, mask).value, 1 - flat)


def test_a_run_from_python_is_a_run_from_the_command_line(tmp_path: Path) -> None:
    recipe = toy_recipe(tmp_path, "kd", evaluation={"cost": False})
    result = ld.run(ld.load_recipe(recipe, overrides=["training.max_steps=2"]))
    assert isinstance(result, ld.RunResult)
    assert result.folder == tmp_path / "run"
    assert json.loads((result.folder / "evaluation.json").read_text())["student"] == result.metrics
