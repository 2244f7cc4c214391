"""A cached teacher says what the live one says, of every kind of signal, whatever the order and the padding."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import tiny_model
from torch import Tensor
from toy import ToyCollator, toy_rows

from layerdistill.core.errors import UserError
from layerdistill.core.types import LayerRef, Needs, Tap, TopK
from layerdistill.models.projections import find_projections
from layerdistill.signals import LiveTeacher
from layerdistill.signals.cache_folder import CacheFolder
from layerdistill.signals.cache_rows import StoredDtype
from layerdistill.signals.cache_size import cached_bytes
from layerdistill.signals.cached_teacher import CachedTeacher
from layerdistill.signals.laid_out import spread

LAYERS = frozenset({LayerRef("", 0), LayerRef("", 2), LayerRef("", -1)})


def batches(rows: list[dict[str, Any]], size: int = 4, to: int | None = None) -> list[dict[str, Tensor]]:
    collate = ToyCollator("causal-lm" if isinstance(rows[0]["labels"], list) else "sequence-classification", to=to)
    return [collate(rows[start : start + size]) for start in range(0, len(rows), size)]


def cached_teacher(folder: Path, model: Any, dtype: StoredDtype = "float32", **options: Any) -> CachedTeacher:
    folder_of = CacheFolder(folder, {"teacher": "t"}, dtype)
    folder_of.prepare()
    language_model = "CausalLM" in type(model).__name__ or "LMHead" in type(model).__name__
    return CachedTeacher(LiveTeacher(model), folder_of, language_model, **options)


def everything(model: Any) -> Needs:
    stack = next(iter(find_projections(model).values()))
    taps = frozenset(Tap(path, "input") for block in stack[:2] for path in block.values())
    return Needs(teacher=LAYERS, teacher_logits=True, teacher_taps=taps, teacher_averages=frozenset({LayerRef("", 1)}))


@pytest.mark.parametrize("family", ["bert", "deberta-v2", "modernbert", "gpt2", "llama"])
def test_every_kind_of_signal_is_the_live_ones_in_any_order_and_padding(family: str, tmp_path: Path) -> None:
    model, rows = tiny_model(family, "sequence-classification"), toy_rows("sequence-classification", size=14, seed=2)
    cached, needs = cached_teacher(tmp_path / "c", model), everything(model)
    cached.fill(batches(rows), needs)
    shuffled = random.Random(3).sample(rows, len(rows))
    for batch in batches(shuffled, 5, to=max(len(row["input_ids"]) for row in rows) + 3):
        found, live = cached.signal(batch, needs), LiveTeacher(model).signal(batch, needs)
        mask = batch["attention_mask"].bool()
        torch.testing.assert_close(found.logits, live.logits, atol=1e-5, rtol=1e-4)
        assert found.hidden.keys() == live.hidden.keys()
        assert found.taps.keys() == live.taps.keys()
        for ours, theirs in (*zip_values(found.hidden, live.hidden), *zip_values(found.taps, live.taps)):
            torch.testing.assert_close(ours[mask], theirs[mask], atol=1e-5, rtol=1e-4)
            assert not ours[~mask].any(), "padding is zero"
        assert found.rows.keys() == found.hidden.keys()
        for rows, laid_out in zip_values(found.rows, found.hidden):
            assert torch.equal(rows, laid_out[mask]), "example by example, without padding"
        for ours, theirs in zip_values(found.averages, live.averages):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def zip_values(first: Any, second: Any) -> list[tuple[Tensor, Tensor]]:
    return [(first[name], second[name]) for name in first]


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_batches_like_those_that_filled_it_are_equal_to_the_last_bit(family: str, tmp_path: Path) -> None:
    model, rows = tiny_model(family, "sequence-classification"), toy_rows("sequence-classification", size=12, seed=2)
    cached, needs = cached_teacher(tmp_path / "c", model), everything(model)
    cached.fill(batches(rows), needs)
    for batch in batches(rows):
        found, live = cached.signal(batch, needs), LiveTeacher(model).signal(batch, needs)
        mask = batch["attention_mask"].bool()
        assert torch.equal(found.logits, live.logits)
        for layer in LAYERS:
            assert torch.equal(found.hidden[layer][mask], live.hidden[layer][mask])


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "gpt-neox"])
def test_a_language_model_keeps_states_and_its_head_makes_the_logits(family: str, tmp_path: Path) -> None:
    model, rows = tiny_model(family, "causal-lm"), toy_rows("causal-lm", size=8, seed=1)
    cached, needs = cached_teacher(tmp_path / "c", model), Needs(teacher_logits=True)
    cached.fill(batches(rows), needs)
    assert cached.names(needs) == ["final"]
    batch = batches(rows, 3)[1]
    found, live = cached.signal(batch, needs), LiveTeacher(model).signal(batch, needs)
    mask = batch["attention_mask"].bool()
    torch.testing.assert_close(found.logits[mask], live.logits[mask], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_two_stacks_have_rows_of_their_own(family: str, tmp_path: Path) -> None:
    model, rows = tiny_model(family, "sequence-classification"), toy_rows("sequence-classification", size=9, seed=2)
    for row in rows:
        row["input_ids"][-1] = 2
    layers = frozenset({LayerRef("encoder", 1), LayerRef("decoder", 2)})
    cached, needs = cached_teacher(tmp_path / "c", model), Needs(teacher=layers, teacher_logits=True)
    cached.fill(batches(rows), needs)
    for batch in batches(rows[::-1], 3):
        found, live = cached.signal(batch, needs), LiveTeacher(model).signal(batch, needs)
        torch.testing.assert_close(found.logits, live.logits, atol=1e-5, rtol=1e-4)
        for layer in layers:
            mask = live.masks[layer.stack].bool()
            torch.testing.assert_close(found.hidden[layer][mask], live.hidden[layer][mask], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("dtype", "error"), [("float16", 1e-3), ("bfloat16", 1e-2), ("int8", 2e-2)])
def test_stored_precision_is_what_is_lost(dtype: StoredDtype, error: float, tmp_path: Path) -> None:
    model, rows = tiny_model("bert", "sequence-classification"), toy_rows("sequence-classification", size=8, seed=2)
    cached, needs = cached_teacher(tmp_path / "c", model, dtype), Needs(teacher=LAYERS)
    cached.fill(batches(rows), needs)
    batch = batches(rows)[0]
    found, live = cached.signal(batch, needs), LiveTeacher(model).signal(batch, needs)
    for layer in LAYERS:
        difference = (found.hidden[layer].float() - live.hidden[layer])[batch["attention_mask"].bool()]
        assert 0 < difference.abs().max() <= error * live.hidden[layer].abs().max()


def test_only_what_is_lacking_is_run(tmp_path: Path) -> None:
    model, rows = tiny_model("bert", "sequence-classification"), toy_rows("sequence-classification", size=12, seed=2)
    runs: list[int] = []
    model.bert.embeddings.register_forward_hook(lambda *_: runs.append(1))
    few, more = Needs(teacher=frozenset({LayerRef("", 1)})), Needs(teacher=frozenset({LayerRef("", k) for k in (1, 2)}))
    cached = cached_teacher(tmp_path / "c", model)
    cached.fill(batches(rows[:8]), few)
    assert len(runs) == 2
    cached.fill(batches(rows), few)
    assert len(runs) == 3
    cached.fill(batches(rows), more)
    assert len(runs) == 6
    cached.fill(batches(rows), more)
    assert len(runs) == 6
    names = [set(shard["signals"]) for shard in cached.folder.shards]
    assert names == [{"1"}, {"1"}, {"2"}], "layer 1 is not kept again"


def test_an_example_that_changed_is_refused_and_so_is_running_what_may_only_be_read(tmp_path: Path) -> None:
    model, rows = tiny_model("bert", "sequence-classification"), toy_rows("sequence-classification", size=8, seed=2)
    needs = Needs(teacher=LAYERS)
    cached = cached_teacher(tmp_path / "c", model, only_cached=True)
    with pytest.raises(UserError, match=r"'require', but the cache in .* lacks 0, 2, final"):
        cached.fill(batches(rows), needs)
    cached_teacher(tmp_path / "c", model).fill(batches(rows), needs)
    rows[3]["input_ids"][1] += 1
    cached.folder.refresh()
    cached.fill(batches(rows[4:]), needs)
    with pytest.raises(UserError, match="do examples change from epoch to epoch"):
        cached.signal(batches(rows)[0], needs)


def test_an_example_with_other_padding_than_it_was_cached_with_is_refused(tmp_path: Path) -> None:
    model, rows = tiny_model("bert", "sequence-classification"), toy_rows("sequence-classification", size=6, seed=2)
    cached, needs = cached_teacher(tmp_path / "c", model), Needs(teacher=LAYERS)
    cached.fill(batches(rows), needs)
    batch = batches(rows)[0]
    # One token more and one less: the number of all rows is as it was.
    batch["attention_mask"][0], batch["attention_mask"][1] = (
        batch["attention_mask"][1],
        batch["attention_mask"][0].clone(),
    )
    assert batch["attention_mask"][0].sum() != batch["attention_mask"][1].sum()
    with pytest.raises(UserError, match="do examples change"):
        cached.signal(batch, needs)


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_rows_are_laid_out_where_the_mask_says(side: str) -> None:
    mask = torch.zeros(3, 6, dtype=torch.bool)
    rows = [torch.randn(count, 2) for count in (4, 1, 3)]
    for number, (row, kept) in enumerate(zip(rows, mask, strict=True)):
        start = {"left": 6 - len(row), "right": 0, "both": number}[side]
        kept[start : start + len(row)] = True
    found = spread(torch.cat(rows), mask)
    assert found.shape == (3, 6, 2)
    assert torch.equal(found[mask], torch.cat(rows))
    assert not found[~mask].any()


def test_a_language_model_whose_head_is_not_known_is_not_cached(tmp_path: Path) -> None:
    model = tiny_model("opt", "causal-lm", word_embed_proj_dim=16)
    cached = cached_teacher(tmp_path / "c", model)
    assert cached.names(Needs(teacher=frozenset({LayerRef("", 2)}))) == ["2"]
    with pytest.raises(UserError, match=r"Write teacher\.cache: off"):
        cached.names(Needs(teacher_logits=True))


@pytest.mark.parametrize(("family", "options"), [("llama", {}), ("opt", {"word_embed_proj_dim": 16})])
@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_likeliest_tokens_are_the_live_ones_and_take_what_was_quoted(
    family: str, options: dict[str, Any], dtype: StoredDtype, tmp_path: Path
) -> None:
    model, rows = tiny_model(family, "causal-lm", **options), toy_rows("causal-lm", size=40, seed=2)
    which = TopK(5, 2.0, 50)
    cached, needs = cached_teacher(tmp_path / "c", model, dtype), Needs(teacher_top=frozenset({which}))
    cached.fill(batches(rows), needs)
    for batch in batches(random.Random(3).sample(rows, len(rows)), 5):
        found, live = cached.signal(batch, needs).top[which], LiveTeacher(model).signal(batch, needs).top[which]
        real = batch["attention_mask"].bool()
        assert torch.equal(found.ids[real], live.ids[real])
        within = 2e-6 if dtype == "float32" else 2**-10
        ours, theirs = found.log_probabilities[real], live.log_probabilities[real]
        torch.testing.assert_close(ours, theirs, rtol=within, atol=within)
    lengths = [len(ids) for ids in {tuple(row["input_ids"]) for row in rows}]
    written = sum(tensor.nbytes for tensor in load_file(next((tmp_path / "c").glob("*.safetensors"))).values())
    assert cached_bytes(needs, model, dtype, lengths, True) == written


def test_likeliest_tokens_are_added_to_a_cache_and_another_k_or_temperature_is_another(tmp_path: Path) -> None:
    model, rows = tiny_model("gpt2", "causal-lm"), toy_rows("causal-lm", size=8, seed=2)
    cached = cached_teacher(tmp_path / "c", model)
    cached.fill(batches(rows), Needs(teacher=frozenset({LayerRef("", 2)})))
    first, second = (Needs(teacher_top=frozenset({TopK(4, temperature)})) for temperature in (1.0, 2.0))
    cached.fill(batches(rows), first)
    only = cached_teacher(tmp_path / "c", model, only_cached=True)
    assert only.signal(batches(rows)[0], first).top
    with pytest.raises(UserError, match=r"lacks log_probabilities:4:2\.0:all, tokens:4:2\.0:all"):
        only.fill(batches(rows), second)


@pytest.mark.parametrize(("family", "distinct"), [("bert", 2), ("gpt2", 2), ("deberta-v2", 2)])
def test_what_enters_query_key_and_value_is_kept_once(family: str, distinct: int, tmp_path: Path) -> None:
    model, rows = tiny_model(family, "sequence-classification"), toy_rows("sequence-classification", size=12, seed=2)
    blocks = next(iter(find_projections(model).values()))[:distinct]
    needs = Needs(teacher_taps=frozenset(Tap(path, "input") for block in blocks for path in block.values()))
    cached = cached_teacher(tmp_path / "c", model)
    cached.fill(batches(rows), needs)
    kept = load_file(next((tmp_path / "c").glob("*.safetensors")))
    assert sum(name.startswith("tap:") and not name.endswith(".counts") for name in kept) == distinct
    assert cached.folder.has(cached.names(needs), [next(iter(cached.folder.places[cached.names(needs)[0]]))])
    lengths = [len(ids) for ids in {tuple(row["input_ids"]) for row in rows}]
    written = sum(tensor.nbytes for tensor in kept.values())
    assert cached_bytes(needs, model, "float32", lengths, False) == written
    reopened = cached_teacher(tmp_path / "c", model, only_cached=True)
    for batch in batches(rows):
        found, live = reopened.signal(batch, needs).taps, LiveTeacher(model).signal(batch, needs).taps
        mask = batch["attention_mask"].bool()
        for tap, tensor in live.items():
            torch.testing.assert_close(found[tap][mask], tensor[mask], atol=1e-6, rtol=1e-5)
        assert len({id(tensor) for tensor in found.values()}) == distinct


def test_a_tap_of_its_own_is_not_taken_for_another(tmp_path: Path) -> None:
    model, rows = tiny_model("bert", "sequence-classification"), toy_rows("sequence-classification", size=6, seed=2)
    block = next(iter(find_projections(model).values()))[0]
    dense = f"{block['query'].rpartition('.self')[0]}.output.dense"
    needs = Needs(teacher_taps=frozenset({Tap(block["query"], "input"), Tap(dense, "input")}))
    cached = cached_teacher(tmp_path / "c", model)
    cached.fill(batches(rows), needs)
    found, live = (source.signal(batches(rows)[0], needs).taps for source in (cached, LiveTeacher(model)))
    mask = batches(rows)[0]["attention_mask"].bool()
    for tap, tensor in live.items():
        torch.testing.assert_close(found[tap][mask], tensor[mask], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("side", ["right", "left"])
def test_on_padding_all_tokens_are_equally_likely(side: str, tmp_path: Path) -> None:
    """Padding has labels in data that were padded beforehand, and before a text that is padded on the left."""
    model, rows = tiny_model("llama", "causal-lm"), toy_rows("causal-lm", size=6, seed=2)
    which, vocabulary = TopK(5, 2.0), model.config.vocab_size
    batch = batches(rows, 6)[0]
    if side == "left":
        batch = {name: tensor.flip(1) for name, tensor in batch.items()}
    cached, needs = cached_teacher(tmp_path / "c", model), Needs(teacher_top=frozenset({which}))
    cached.fill([batch], needs)
    padding = ~batch["attention_mask"].bool()
    assert padding.any()
    for source in (cached, LiveTeacher(model)):
        top = source.signal(batch, needs).top[which]
        torch.testing.assert_close(top.log_probabilities.exp().sum(-1), torch.ones(padding.shape))
        assert top.log_probabilities[padding][:, 0].tolist() == pytest.approx(
            [-math.log(vocabulary)] * int(padding.sum())
        )
        assert all(len(set(ids)) == which.k for ids in top.ids.flatten(0, 1).tolist())
