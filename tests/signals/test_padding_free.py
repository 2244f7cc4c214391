"""Blocks that run on packed texts say the same of every real token, or do not run on them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
import transformers as hf
from tiny_models import COMMON, DECODERS, ENCODERS, tiny_model
from torch import Tensor, nn

from layerdistill.core.types import LayerRef, Needs, Tap
from layerdistill.models import find_stacks
from layerdistill.signals import LiveTeacher, packable, run_model
from layerdistill.signals.packable import packing_problem
from layerdistill.signals.packing import pack_texts, texts_to_try
from layerdistill.signals.padding_free import packed_blocks

LENGTHS = [3, 5, 24, 7, 4, 9]
PACKABLE = [
    (head, family)
    for head, families in (("sequence-classification", (*ENCODERS, *DECODERS)), ("causal-lm", DECODERS),
                           ("token-classification", ("bert", "llama", "t5")))
    for family in families if family != "deberta-v2"
]  # fmt: skip
LAYERS = [LayerRef.parse(name) for name in ("0", "2", "4", "final")]
SHAPE: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 64,
    **COMMON,
}  # fmt: skip


def padded_batch(left: bool = False, seq: int = 24) -> dict[str, Tensor]:
    """Six random texts, the longest 24 tokens long."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.zeros(len(LENGTHS), seq, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(LENGTHS):
        there = slice(seq - length, seq) if left else slice(0, length)
        ids[row, there] = torch.randint(3, 64, (length,), generator=draw)
        mask[row, there] = 1
    return {"input_ids": ids, "attention_mask": mask}


def tried_texts(mask: Tensor) -> Tensor:
    """The numbers of the texts on which a model would be tried."""
    chosen = texts_to_try(mask.sum(1).tolist(), None)
    assert chosen
    return torch.tensor(chosen)


def problem_of(model: Any, batch: dict[str, Tensor]) -> str | None:
    """What a try on a batch finds."""
    mask = batch["attention_mask"]
    return packing_problem(model, True, batch, mask, tried_texts(mask))


def near(expected: Tensor) -> dict[str, float]:
    """How close: to rounding, of the largest number among those that are added up."""
    rounding = 1e-10 if expected.dtype == torch.float64 else 1e-5
    return {"atol": rounding * max(float(expected.detach().abs().max()), 1.0), "rtol": 0.0}


def assert_same(model: nn.Module, batch: dict[str, Tensor], layers: Iterable[LayerRef] = LAYERS) -> None:
    """The model says the same of real tokens, in its value and in the gradient of its weights."""
    layers = list(layers)
    real = batch["attention_mask"].bool()
    said = []
    for padding_free in (False, True):
        model.zero_grad()
        signal = run_model(model, batch, layers, logits=True, padding_free=padding_free)
        assert signal.logits is not None
        states = [signal.hidden[layer][real] for layer in layers]
        logits = signal.logits[real] if signal.logits.dim() == 3 else signal.logits
        torch.stack([state.double().square().sum() for state in (*states, logits)]).sum().backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        said.append(({**dict(zip(layers, states, strict=True)), "logits": logits}, gradients))
        if padding_free:
            assert set(signal.rows) == set(layers), "packed"
            for layer, state in zip(layers, states, strict=True):
                assert torch.equal(signal.rows[layer], state)
                assert not signal.hidden[layer][~real].any() or layer.number in (-1, len(layers))
    (plain, plain_gradients), (packed, packed_gradients) = said
    for name, expected in plain.items():
        torch.testing.assert_close(packed[name], expected, **near(expected), msg=lambda m, n=name: f"{n}: {m}")
    assert plain_gradients.keys() == packed_gradients.keys()
    for name, expected in plain_gradients.items():
        found = packed_gradients[name]
        torch.testing.assert_close(found, expected, **near(expected), msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("head", "family"), PACKABLE)
def test_packed_texts_are_what_they_are_alone(head: str, family: str, attention: str, left: bool) -> None:
    model = tiny_model(family, head)
    model.set_attn_implementation(attention)
    if attention == "sdpa":
        model.double()  # eager attention rounds to float32, in which a float64 mask is infinite
    batch = padded_batch(left)
    if left and head == "sequence-classification" and family in ENCODERS:
        # It reads the first position, padding here, of which a packed model says nothing.
        assert not run_model(model, batch, [], logits=True, padding_free=True).rows
        return
    assert_same(model, batch)


@pytest.mark.parametrize("seq", [32, 128])
def test_a_batch_padded_further_than_to_its_longest_text(seq: int) -> None:
    assert_same(tiny_model("bert", "sequence-classification").double(), padded_batch(seq=seq))


FURTHER = {
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**SHAPE, num_key_value_heads=2, sliding_window=4)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(
        hf.Gemma2Config(**SHAPE, num_key_value_heads=2, head_dim=8, sliding_window=4)
    ),
    "mpnet": lambda: hf.MPNetForSequenceClassification(hf.MPNetConfig(**SHAPE)),
    "falcon": lambda: hf.FalconForCausalLM(hf.FalconConfig(**SHAPE, alibi=True)),
}
"""Windows in all blocks or in some, relative positions, and distances added to the mask (ALiBi)."""


@pytest.mark.parametrize("name", FURTHER)
def test_windows_and_relative_positions_stay_what_they_were(name: str) -> None:
    torch.manual_seed(0)
    assert_same(FURTHER[name]().eval(), padded_batch(), [LayerRef("", 1), LayerRef("", 2)])


OTHERS = {
    "deberta-v2": lambda: tiny_model("deberta-v2", "sequence-classification"),
    "bloom": lambda: hf.BloomForCausalLM(hf.BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4)),
}
"""Architectures that hand their blocks positions, or masks, in ways of their own."""


@pytest.mark.parametrize("name", OTHERS)
def test_architectures_that_do_not_allow_it_run_as_they_are(name: str) -> None:
    torch.manual_seed(0)
    model: Any = OTHERS[name]().eval()
    batch = padded_batch()
    plain = run_model(model, batch, [LayerRef("", 2)], logits=True)
    packed = run_model(model, batch, [LayerRef("", 2)], logits=True, padding_free=True)
    assert plain.logits is not None
    assert packed.logits is not None
    assert not packed.rows
    (problem,) = packable._PROBLEMS[model].values()
    assert "packed rows" in str(problem)
    assert torch.equal(packed.logits, plain.logits)


def test_convolutions_are_not_packed_however_little_new_ones_do() -> None:
    torch.manual_seed(0)
    config = hf.FalconH1Config(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1,
        initializer_range=1e-3,
    )  # fmt: skip
    model: Any = hf.FalconH1ForCausalLM(config).eval()
    found = run_model(model, padded_batch(), [LayerRef("", 2)], logits=True, padding_free=True)
    assert not found.rows
    assert "convolutions" in str(list(packable._PROBLEMS[model].values()))


class Leaky(nn.Module):
    """A block that lets each token see the mean of its whole row."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        output = self.inner(hidden, *args, **kwargs)
        return output + 0.01 * hidden.mean(1, keepdim=True)


def test_a_block_that_lets_texts_see_each_other_is_found_out() -> None:
    model: Any = tiny_model("bert", "sequence-classification")
    model.bert.encoder.layer = nn.ModuleList(Leaky(block) for block in model.bert.encoder.layer)
    batch = padded_batch()
    problem = problem_of(model, batch)
    assert problem is not None
    assert problem.startswith("hidden states change by")
    assert not run_model(model, batch, LAYERS, logits=True, padding_free=True).rows


def test_a_head_that_reads_padding_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = tiny_model("bert", "sequence-classification")
    monkeypatch.setattr(model.bert.pooler, "forward", lambda hidden: hidden.mean(1))
    batch = padded_batch()
    problem = problem_of(model, batch)
    assert problem is not None
    assert problem.startswith("logits change by")


def test_a_try_on_as_many_tokens_as_the_batch_is_wide() -> None:
    model: Any = tiny_model("t5", "token-classification")
    mask = torch.zeros(4, 32, dtype=torch.long)
    for row, length in enumerate((2, 20, 4, 6)):
        mask[row, :length] = 1
    assert mask[tried_texts(mask)].sum() == mask.shape[1]
    batch = {"input_ids": mask * 7, "attention_mask": mask}
    assert problem_of(model, batch) is None


def test_trying_a_model_leaves_it_and_the_random_numbers_as_they_were() -> None:
    model: Any = tiny_model("bert", "sequence-classification", hidden_dropout_prob=0.5).train()
    model.bert.encoder.layer[1].eval()
    modes = [module.training for module in model.modules()]
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    batch, state = padded_batch(), torch.get_rng_state()
    assert problem_of(model, batch) is None
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()] == hooks


def test_hooks_are_gone_after_an_exception() -> None:
    model: Any = tiny_model("bert")
    packing = pack_texts(padded_batch()["attention_mask"], 32)
    with pytest.raises(ZeroDivisionError), packed_blocks(find_stacks(model)[""], packing):
        raise ZeroDivisionError
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_activation_checkpointing_runs_with_padding() -> None:
    model: Any = tiny_model("llama", "causal-lm").double().train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    signal = run_model(model, padded_batch(), LAYERS, logits=True, padding_free=True)
    assert not signal.rows
    assert signal.logits is not None
    signal.logits.sum().backward()
    with torch.no_grad():
        assert run_model(model, padded_batch(), LAYERS, logits=True, padding_free=True).rows


def test_dropped_blocks_run_with_padding() -> None:
    model: Any = tiny_model("opt", "causal-lm", layerdrop=0.5).train()
    assert not run_model(model, padded_batch(), [], logits=True, padding_free=True).rows


def test_places_inside_blocks_and_a_model_that_is_run_no_further_than_needed() -> None:
    model: Any = tiny_model("bert", "sequence-classification")
    tap = Tap("bert.encoder.layer.1.output.dense", "output")
    real = padded_batch()["attention_mask"].bool()
    with torch.no_grad():
        plain, packed = (
            run_model(model, padded_batch(), [LayerRef("", 1)], logits=False, taps=[tap], padding_free=padding_free)
            for padding_free in (False, True)
        )
        stopped = run_model(model, padded_batch(), [LayerRef("", 1)], logits=False, padding_free=True)
    torch.testing.assert_close(packed.taps[tap][real], plain.taps[tap][real])
    assert not packed.taps[tap][~real].any()
    for found in (packed, stopped):
        torch.testing.assert_close(found.hidden[LayerRef("", 1)][real], plain.hidden[LayerRef("", 1)][real])


def test_an_encoder_with_a_decoder_runs_as_it_is() -> None:
    model: Any = tiny_model("bart", "sequence-classification")
    batch = padded_batch()
    batch["input_ids"][:, 0] = 2  # a classifier reads the end of a text
    assert not run_model(model, batch, [LayerRef("encoder", 1)], logits=False, padding_free=True).rows


def test_a_teacher_is_packed_unless_its_padding_is_read() -> None:
    teacher = LiveTeacher(tiny_model("bert", "sequence-classification"), padding_free=True)
    needs = Needs(teacher=frozenset(LAYERS[:2]), teacher_averages=frozenset(LAYERS[1:3]), teacher_logits=True)
    packed = teacher.signal(padded_batch(), needs)
    assert set(packed.rows) == set(packed.hidden) == needs.teacher
    plain = teacher.signal(padded_batch(), needs | Needs(teacher_padding=True))
    assert not plain.rows
    real = padded_batch()["attention_mask"].bool()
    for layer in needs.teacher:
        torch.testing.assert_close(packed.hidden[layer][real], plain.hidden[layer][real])
    for layer in needs.teacher_averages:
        torch.testing.assert_close(packed.averages[layer], plain.averages[layer])
    torch.testing.assert_close(packed.logits, plain.logits)


def test_rows_are_no_longer_than_a_model_allows() -> None:
    config = hf.GPTNeoConfig(
        vocab_size=64, hidden_size=32, num_layers=2, num_heads=4, intermediate_size=64, max_position_embeddings=64,
        attention_types=[[["global", "local"], 1]], window_size=4, **COMMON,
    )  # fmt: skip
    torch.manual_seed(0)
    model = hf.GPTNeoForCausalLM(config).eval()
    assert_same(model, padded_batch(), [LayerRef("", 1), LayerRef("", 2)])
    lengths = [60, *[33] * 12]
    mask = (torch.arange(60) < torch.tensor(lengths).unsqueeze(1)).long()
    run_model(model, {"input_ids": mask * 5, "attention_mask": mask}, [], logits=True, padding_free=True)


def test_a_batch_as_wide_as_there_are_heads() -> None:
    model: Any = tiny_model("t5", "token-classification", num_heads=8).double()
    mask = (torch.arange(8) < torch.tensor([[8], [2], [2], [2], [2], [2]])).long()
    batch = {"input_ids": mask * 5, "attention_mask": mask}
    assert_same(model, batch, [LayerRef("", 1), LayerRef("", 2)])


def test_texts_that_see_each_other_do_not_hide_in_the_rounding_of_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(packable, "kept_apart_problem", lambda block: None)
    config = hf.ConvBertConfig(**SHAPE, embedding_size=32, conv_kernel_size=3)
    model = hf.ConvBertForSequenceClassification(config).eval().to(torch.bfloat16)
    assert not run_model(model, padded_batch(), [], logits=True, padding_free=True).rows
    (problem,) = packable._PROBLEMS[model].values()
    assert "change by" in str(problem)
    llama: Any = tiny_model("llama", "causal-lm").to(torch.bfloat16)
    assert run_model(llama, padded_batch(), [LayerRef("", 1)], logits=True, padding_free=True).rows
    assert next(llama.parameters()).dtype == torch.bfloat16


def test_memory_that_does_not_suffice_says_nothing_of_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = tiny_model("bert", "sequence-classification")

    def refused(*given: Any) -> str | None:
        raise torch.OutOfMemoryError("full")

    with monkeypatch.context() as patched:
        patched.setattr(packable, "packing_problem", refused)
        assert not run_model(model, padded_batch(), LAYERS, logits=True, padding_free=True).rows
    assert run_model(model, padded_batch(), LAYERS, logits=True, padding_free=True).rows


def test_whether_a_batch_is_packed_does_not_depend_on_the_batches_before_it() -> None:
    model: Any = tiny_model("bert", "sequence-classification")
    mask = (torch.arange(8) < torch.tensor([[4], [1], [2]])).long()
    few = {"input_ids": mask * 5, "attention_mask": mask}
    for batch, packed in ((few, False), (padded_batch(), True), (few, False)):
        fresh: Any = tiny_model("bert", "sequence-classification")
        for one in (model, fresh):
            assert bool(run_model(one, batch, LAYERS, logits=True, padding_free=True).rows) == packed


def test_taps_of_one_tensor_stay_one_tensor() -> None:
    model: Any = tiny_model("bert", "sequence-classification")
    taps = [Tap(f"bert.encoder.layer.1.attention.self.{name}", "input") for name in ("query", "key", "value")]
    found = run_model(model, padded_batch(), [LayerRef("", 1)], logits=True, taps=taps, padding_free=True)
    assert found.rows
    assert len({id(tensor) for tensor in found.taps.values()}) == 1
