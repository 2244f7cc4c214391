"""A record of a frozen model says what the live model says, whatever the order and the padding of the batch."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from torch import Tensor
from toy import PAD, ToyCollator, toy_rows

from layerdistill.core.errors import UserError
from layerdistill.core.types import LayerRef, Needs, Tap
from layerdistill.signals import LiveTeacher
from layerdistill.signals.language_head import LanguageHead
from layerdistill.signals.recorded import RecordedTeacher, fits_in, row_keys

LAYERS = [LayerRef("", 2), LayerRef("", 4)]
NEEDS = Needs(teacher=frozenset(LAYERS))


def batches(rows: list[dict[str, Any]], size: int = 4) -> list[dict[str, Tensor]]:
    collate = ToyCollator("causal-lm" if isinstance(rows[0]["labels"], list) else "sequence-classification")
    return [collate(rows[start : start + size]) for start in range(0, len(rows), size)]


def model_and_rows(family: str, head: str = "sequence-classification") -> tuple[Any, list[dict[str, Any]]]:
    model = tiny_model(family, head)
    rows = toy_rows("sequence-classification", size=14, seed=2)
    if family in ("bart", "t5"):
        for row in rows:
            row["input_ids"][-1] = 2
    return model, rows


@pytest.mark.parametrize("family", ["bert", "deberta-v2", "gpt2", "llama"])
@pytest.mark.parametrize("longer", [0, 5])
def test_the_record_is_the_live_model_for_any_order_and_padding(family: str, longer: int) -> None:
    model, rows = model_and_rows(family)
    source = RecordedTeacher(model, batches(rows), LAYERS)
    shuffled = random.Random(3).sample(rows, len(rows))
    longest = max(len(row["input_ids"]) for row in rows)
    collate = ToyCollator("sequence-classification", to=longest + longer if longer else None)
    for start in range(0, len(rows), 5):
        batch = collate(shuffled[start : start + 5])
        found, live = source.signal(batch, NEEDS), LiveTeacher(model).signal(batch, NEEDS)
        mask = batch["attention_mask"].bool()
        assert torch.equal(found.masks[""], batch["attention_mask"])
        for layer in LAYERS:
            assert found.hidden[layer].shape == live.hidden[layer].shape
            torch.testing.assert_close(found.hidden[layer][mask], live.hidden[layer][mask], atol=1e-5, rtol=1e-5)
            assert not found.hidden[layer][~mask].any(), "padding is zero"


def test_a_batch_of_the_first_pass_is_recorded_to_the_last_bit() -> None:
    model, rows = model_and_rows("bert")
    source, first = RecordedTeacher(model, batches(rows), LAYERS), batches(rows)[1]
    live = LiveTeacher(model).signal(first, NEEDS)
    mask = first["attention_mask"].bool()
    for layer in LAYERS:
        assert torch.equal(source.signal(first, NEEDS).hidden[layer][mask], live.hidden[layer][mask])


def test_the_model_is_run_once_and_never_with_dropout() -> None:
    model, rows = model_and_rows("bert")
    model.config.hidden_dropout_prob = 0.5
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    source = RecordedTeacher(model.train(), batches(rows), LAYERS)
    runs: list[int] = []
    model.bert.register_forward_hook(lambda *_: runs.append(1))
    found = [source.signal(batch, NEEDS).hidden[LAYERS[0]] for batch in batches(rows) + batches(rows)]
    assert len(runs) == 4, "14 rows in batches of 4"
    assert torch.equal(torch.cat([x.flatten() for x in found[:4]]), torch.cat([x.flatten() for x in found[4:]]))
    model.eval()
    live = LiveTeacher(model).signal(batches(rows)[0], NEEDS).hidden[LAYERS[0]]
    mask = batches(rows)[0]["attention_mask"].bool()
    torch.testing.assert_close(found[0][mask], live[mask])


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("position", ["first", "last"])
def test_one_position_only(position: Any, side: str) -> None:
    model, rows = model_and_rows("gpt2")
    given = batches(rows)
    if side == "left":
        given = [{name: tensor if name == "labels" else tensor.flip(1) for name, tensor in b.items()} for b in given]
    source = RecordedTeacher(model, given, LAYERS, {"": position})
    batch = given[2]
    found, live = source.signal(batch, NEEDS), LiveTeacher(model).signal(batch, NEEDS)
    assert found.masks[""].tolist() == [[1]] * 4
    for layer in LAYERS:
        assert found.hidden[layer].shape == (4, 1, 32)
        for row in range(4):
            real = batch["attention_mask"][row].nonzero().flatten().tolist()
            place = real[0] if position == "first" else real[-1]
            torch.testing.assert_close(found.hidden[layer][row, 0], live.hidden[layer][row, place])


def test_two_stacks() -> None:
    model, rows = model_and_rows("bart")
    layers = [LayerRef.parse("encoder.1"), LayerRef.parse("decoder.4")]
    needs = Needs(teacher=frozenset(layers))
    source = RecordedTeacher(model, batches(rows), layers)
    batch = batches(rows[::-1])[0]
    found, live = source.signal(batch, needs), LiveTeacher(model).signal(batch, needs)
    for layer in layers:
        mask = live.masks[layer.stack].bool()
        assert torch.equal(found.masks[layer.stack], live.masks[layer.stack])
        torch.testing.assert_close(found.hidden[layer][mask], live.hidden[layer][mask], atol=1e-5, rtol=1e-5)


def test_bfloat16_states_stay_what_they_are() -> None:
    model, rows = model_and_rows("bert")
    model = model.bfloat16()
    batch = batches(rows)[0]
    live = LiveTeacher(model).signal(batch, NEEDS).hidden[LAYERS[1]]
    found = RecordedTeacher(model, batches(rows), LAYERS).signal(batch, NEEDS).hidden[LAYERS[1]]
    assert found.dtype == torch.bfloat16
    assert torch.equal(found[batch["attention_mask"].bool()], live[batch["attention_mask"].bool()])


def test_rows_are_known_by_their_real_tokens_and_types() -> None:
    ids = torch.tensor([[5, 6, 7, PAD], [5, 6, 7, 9], [PAD, 5, 6, 7], [5, 6, 8, PAD]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 0], [0, 1, 1, 1], [1, 1, 1, 0]])
    keys = row_keys({"input_ids": ids, "attention_mask": mask})
    assert keys[0] == keys[1] == keys[2]
    assert keys[3] != keys[0]
    types = torch.tensor([[0, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 1]])
    typed = row_keys({"input_ids": ids, "attention_mask": mask, "token_type_ids": types})
    assert typed[0] == typed[2] != typed[1]


def test_what_is_not_in_the_record_is_not_made_up() -> None:
    model, rows = model_and_rows("bert")
    source = RecordedTeacher(model, batches(rows[:8]), LAYERS)
    with pytest.raises(UserError, match=r"stage_one: \{record_gb: 0\}"):
        source.signal(batches(rows)[-1], NEEDS)
    for needs in (
        Needs(teacher=frozenset([LayerRef("", 3)])),
        Needs(teacher_logits=True),
        Needs(teacher_taps=frozenset([Tap("bert", "output")])),
    ):
        with pytest.raises(ValueError, match="nothing else"):
            source.signal(batches(rows[:8])[0], needs)


def test_a_full_disk_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def __enter__(self) -> Full:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def write(self, _: bytes) -> int:
            raise OSError(28, "No space left on device")

    model, rows = model_and_rows("bert")
    monkeypatch.setattr("layerdistill.signals.recorded.tempfile.TemporaryFile", Full)
    with pytest.raises(UserError, match=r"No space left on device.*TMPDIR"):
        RecordedTeacher(model, batches(rows), LAYERS).signal(batches(rows)[0], NEEDS)


def test_the_size_is_counted_before_a_byte_is_written() -> None:
    model, rows = model_and_rows("bert")
    tokens = sum(len(row["input_ids"]) for row in rows)
    exact = tokens * len(LAYERS) * 32 * 4
    assert fits_in(exact, model, batches(rows), LAYERS, one_position=False)
    assert not fits_in(exact - 1, model, batches(rows), LAYERS, one_position=False)
    assert fits_in(14 * len(LAYERS) * 32 * 4, model, batches(rows), LAYERS, one_position=True)
    assert not fits_in(14 * len(LAYERS) * 32 * 4 - 1, model, batches(rows), LAYERS, one_position=True)
    assert fits_in(exact / 2, model.bfloat16(), batches(rows), LAYERS, one_position=False)


@pytest.mark.parametrize("family", ["gpt2", "opt", "gpt-neox", "llama", "qwen3", "phi"])
def test_a_language_head_says_what_the_model_says(family: str) -> None:
    model = tiny_model(family, "causal-lm")
    head = LanguageHead(model)
    batch = batches(toy_rows("causal-lm", size=3))[0]
    last, final = LayerRef("", 4), LayerRef("", -1)
    signal = LiveTeacher(model).signal(batch, Needs(teacher=frozenset([last, final]), teacher_logits=True))
    mask = batch["attention_mask"].bool()
    for layer in (last, final):
        torch.testing.assert_close(head(signal.hidden[layer][mask], layer), signal.logits[mask], atol=1e-5, rtol=1e-5)
    assert head.vocab_size == 64


def test_a_model_with_more_than_a_norm_and_a_head_is_refused() -> None:
    model = tiny_model("gpt2", "causal-lm")
    model.transformer.register_forward_hook(
        lambda module, args, output: type(output)(last_hidden_state=2 * output.last_hidden_state)
    )
    with pytest.raises(UserError, match=r"GPT2LMHeadModel makes its logits in another way.*unlearned or none"):
        LanguageHead(model)
