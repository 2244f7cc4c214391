"""The evaluator against one example at a time, and everything that must not change its answer."""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from evaluate_cases import VOCAB, bert, collate, gpt2, rows
from transformers import DistilBertConfig, DistilBertForSequenceClassification

from layerdistill.core.errors import UserError
from layerdistill.evaluate import evaluator
from layerdistill.evaluate.evaluator import EvaluationResult, evaluate_model, token_nll
from layerdistill.evaluate.predictions import save_predictions

COUNT = 23
LABELS = [n * n % 3 for n in range(COUNT)]


def logits_of(result: EvaluationResult) -> np.ndarray:
    return np.array(result.predictions["logits"].to_pylist())


def classify(model, dataset, collator=collate, **changes) -> EvaluationResult:
    return evaluate_model(model, dataset, collator, "sequence-classification", ["accuracy", "macro_f1"], **changes)


def test_every_example_is_answered_as_if_alone_and_in_order() -> None:
    model, dataset = bert(3), rows(LABELS)
    result = classify(model, dataset, batch_size=5)
    model.eval()
    with torch.no_grad():
        alone = [model(input_ids=torch.tensor([ids])).logits[0].double().numpy() for ids in dataset["input_ids"]]
    np.testing.assert_allclose(logits_of(result), alone, atol=1e-5)
    assert result.predictions.column_names == ["example_id", "label", "prediction", "logits"]
    assert result.predictions["example_id"].to_pylist() == dataset["example_id"][:]
    assert result.predictions["label"].to_pylist() == LABELS
    guesses = [int(np.argmax(one)) for one in alone]
    assert len(set(guesses)) > 1
    assert result.predictions["prediction"].to_pylist() == guesses
    assert result.metrics["accuracy"] == sum(a == b for a, b in zip(guesses, LABELS, strict=True)) / COUNT


@pytest.mark.parametrize(("batch_size", "extra"), [(1, 0), (4, 0), (64, 0), (4, 17)])
def test_neither_batch_size_nor_padding_changes_the_answer(batch_size: int, extra: int) -> None:
    model, dataset = bert(3), rows(LABELS)
    reference = classify(model, dataset, batch_size=23)
    other = classify(model, dataset, partial(collate, extra=extra), batch_size=batch_size)
    np.testing.assert_allclose(logits_of(other), logits_of(reference), atol=1e-5)
    assert other.metrics == reference.metrics
    decoder = gpt2()
    a = evaluate_model(decoder, rows(None), collate, "causal-lm", ["perplexity"], batch_size=23)
    b = evaluate_model(
        decoder, rows(None), partial(collate, extra=extra), "causal-lm", ["perplexity"], batch_size=batch_size
    )
    np.testing.assert_allclose(a.predictions["nll"].to_numpy(), b.predictions["nll"].to_numpy(), rtol=1e-5)
    assert a.predictions["tokens"].to_pylist() == b.predictions["tokens"].to_pylist()


def test_batches_hold_examples_of_like_length() -> None:
    seen: list[tuple[int, int]] = []

    def spy(examples):
        lengths = [len(example["input_ids"]) for example in examples]
        seen.append((min(lengths), max(lengths)))
        return collate(examples)

    classify(bert(3), rows(LABELS), spy, batch_size=5)
    assert len(seen) == math.ceil(COUNT / 5)
    assert all(earlier[0] >= later[1] for earlier, later in pairwise(seen))


def test_rows_chosen_from_a_dataset_and_a_torch_format() -> None:
    model, dataset = bert(3), rows(LABELS)
    chosen = [20, 3, 11, 7]
    part = classify(model, dataset.select(chosen).with_format("torch"), batch_size=2)
    np.testing.assert_allclose(logits_of(part), logits_of(classify(model, dataset))[chosen], atol=1e-5)
    assert part.predictions["label"].to_pylist() == [LABELS[n] for n in chosen]


def test_a_dataset_of_the_users_own_names() -> None:
    model, dataset = bert(3), rows(LABELS)
    renamed = dataset.remove_columns("example_id").rename_column("labels", "label")
    own = classify(model, renamed, lambda rows: collate([{**row, "labels": row["label"]} for row in rows]))
    assert own.predictions["example_id"].to_pylist() == list(range(COUNT))
    assert own.metrics == classify(model, dataset).metrics


def test_regression_and_multi_label() -> None:
    targets = [math.sin(n) for n in range(COUNT)]
    result = evaluate_model(bert(1), rows(targets), collate, "regression", ["pearson", "mse"], batch_size=4)
    guesses = logits_of(result)
    assert guesses.shape == (COUNT, 1)
    assert result.predictions["prediction"].to_pylist() == guesses[:, 0].tolist()
    assert result.metrics["mse"] == pytest.approx(np.mean((guesses[:, 0] - targets) ** 2), rel=1e-12)
    marks = [[float(n % 2), float(n % 3 == 0), float(n % 5 == 0)] for n in range(COUNT)]
    result = evaluate_model(
        bert(3), rows(marks), collate, "multi-label-classification", ["accuracy", "f1"], batch_size=4
    )
    decided = (logits_of(result) > 0).astype(int)
    assert result.predictions["prediction"].to_pylist() == decided.tolist()
    assert result.predictions["label"].to_pylist() == marks
    assert result.metrics["accuracy"] == np.mean((decided == np.array(marks)).all(axis=1))


def slow_nll(model, ids: list[int], labels: list[int]) -> tuple[float, int]:
    """-sum of log p(label[t + 1] | ids[..t]) over labels that are not -100, in float64."""
    with torch.no_grad():
        logits = model.double()(input_ids=torch.tensor([ids])).logits[0].numpy()
    total, count = 0.0, 0
    for t in range(len(ids) - 1):
        if labels[t + 1] != -100:
            peak = logits[t].max()
            total += peak + math.log(np.exp(logits[t] - peak).sum()) - logits[t][labels[t + 1]]
            count += 1
    return total, count


def test_perplexity_is_that_of_one_example_at_a_time() -> None:
    dataset = rows(None)
    labels = [
        [-100 if (n + t) % 5 == 0 else value for t, value in enumerate(ids)] for n, ids in enumerate(dataset["labels"])
    ]
    labels[4] = [-100] * len(labels[4])
    dataset = dataset.remove_columns("labels").add_column("labels", labels)
    model = gpt2()
    result = evaluate_model(model, dataset, collate, "causal-lm", ["perplexity"], batch_size=6)
    expected = [slow_nll(model.eval(), ids, own) for ids, own in zip(dataset["input_ids"], labels, strict=True)]
    np.testing.assert_allclose(result.predictions["nll"].to_numpy(), [nll for nll, _ in expected], rtol=1e-5)
    assert result.predictions["tokens"].to_pylist() == [count for _, count in expected]
    assert result.predictions["tokens"][4].as_py() == 0
    total, tokens = (sum(column) for column in zip(*expected, strict=True))
    assert result.metrics["perplexity"] == pytest.approx(math.exp(total / tokens), rel=1e-5)


def test_chunks_and_half_precision_of_token_nll(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(4)
    logits = torch.randn(3, 11, 29, dtype=torch.float64) * 4
    labels = torch.randint(0, 29, (3, 11))
    labels[1, 4:] = -100
    expected = [
        -sum(torch.log_softmax(logits[b, t], 0)[labels[b, t + 1]].item() for t in range(10) if labels[b, t + 1] >= 0)
        for b in range(3)
    ]
    for elements in (1, 3 * 29 * 4, 2**24):
        monkeypatch.setattr(evaluator, "CHUNK_ELEMENTS", elements)
        sums, counts = token_nll(logits, labels)
        np.testing.assert_allclose(sums.numpy(), expected, rtol=1e-13)
        assert counts.tolist() == [10, 3, 10]
    narrow = logits.bfloat16()
    np.testing.assert_allclose(
        token_nll(narrow, labels)[0].numpy(), token_nll(narrow.double(), labels)[0].numpy(), rtol=1e-6
    )


def test_a_large_vocabulary_makes_the_forward_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[tuple[int, int]] = []

    def spy(examples):
        batch = collate(examples)
        sizes.append(tuple(batch["input_ids"].shape))
        return batch

    monkeypatch.setattr(evaluator, "LOGITS_BYTES", 4 * VOCAB * 70)
    evaluate_model(gpt2(), rows(None), spy, "causal-lm", ["perplexity"], batch_size=16)
    assert sum(size for size, _ in sizes) == COUNT
    assert all(size * seq <= 70 or size == 1 for size, seq in sizes)
    assert max(size for size, _ in sizes) > 2


def test_labels_never_reach_the_model_and_its_state_is_put_back() -> None:
    model = bert(3)
    model.train()
    model.bert.encoder.layer[1].eval()
    modes = [module.training for module in model.modules()]
    calls: list[dict] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(
            {**kwargs, "training": module.training, "grad": torch.is_grad_enabled()}
        ),
        with_kwargs=True,
    )
    classify(model, rows(LABELS))
    assert all("labels" not in call and not call["training"] and not call["grad"] for call in calls)
    assert [module.training for module in model.modules()] == modes
    assert torch.is_grad_enabled()
    with pytest.raises(RuntimeError, match="broken"):
        classify(model, rows(LABELS), collator=fail)
    assert [module.training for module in model.modules()] == modes


def fail(examples: list[dict]) -> dict:
    raise RuntimeError("broken")


def test_a_model_without_token_types_reads_a_batch_that_has_them() -> None:
    config = DistilBertConfig(vocab_size=VOCAB, dim=32, n_layers=1, n_heads=4, hidden_dim=64, num_labels=3)
    model = DistilBertForSequenceClassification(config)
    plain = classify(model, rows(LABELS))
    typed = classify(
        model, rows(LABELS), lambda rows: collate(rows) | {"token_type_ids": torch.ones(1, dtype=torch.long)}
    )
    assert logits_of(typed).tolist() == logits_of(plain).tolist()


def test_parquet_round_trip(tmp_path: Path) -> None:
    result = classify(bert(3), rows(LABELS))
    path = tmp_path / "run" / "predictions.parquet"
    save_predictions(result.predictions, path)
    save_predictions(result.predictions, path)
    assert pq.read_table(path).equals(result.predictions)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"predictions\.parquet cannot be written"):
        save_predictions(result.predictions, tmp_path / "file" / "predictions.parquet")


def test_input_that_cannot_be_evaluated() -> None:
    dataset = rows(LABELS)
    with pytest.raises(UserError, match="has no labels"):
        classify(bert(3), dataset.remove_columns("labels"))
    with pytest.raises(UserError, match="not tokenised"):
        classify(bert(3), dataset.remove_columns("input_ids"))
    with pytest.raises(UserError, match="is list"):
        classify(bert(3), [])
    with pytest.raises(UserError, match="no examples"):
        classify(bert(3), dataset.select([]))
    with pytest.raises(UserError, match="must be one of"):
        evaluate_model(bert(3), dataset, collate, "ranking", ["accuracy"])
    with pytest.raises(UserError, match="does not fit"):
        evaluate_model(bert(3), dataset, collate, "regression", ["accuracy"])
    broken = bert(3)
    with torch.no_grad():
        broken.classifier.bias[0] = math.nan
    with pytest.raises(UserError, match="23 of 23"):
        classify(broken, dataset)
    with pytest.raises(UserError, match="has to give `labels`"):
        evaluate_model(
            gpt2(),
            rows(None),
            lambda rows: {name: value for name, value in collate(rows).items() if name != "labels"},
            "causal-lm",
            ["perplexity"],
        )
