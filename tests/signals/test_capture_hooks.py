"""Captured layers are those of `output_hidden_states`, the last before the final norm, with a graph that trains."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny_models import ENCODER_DECODERS, FAMILIES, tiny_batch, tiny_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, PreTrainedModel

from layerdistill.core.errors import UserError
from layerdistill.core.types import LayerRef
from layerdistill.models import find_stacks
from layerdistill.signals import capture

FIELDS = {"": "hidden_states", "encoder": "encoder_hidden_states", "decoder": "decoder_hidden_states"}
LAST = {"": "last_hidden_state", "encoder": "encoder_last_hidden_state", "decoder": "last_hidden_state"}


def hooks_of(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def all_layers(model: PreTrainedModel) -> list[LayerRef]:
    return [
        LayerRef(name, number) for name, stack in find_stacks(model).items() for number in range(-1, stack.depth + 1)
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_output_hidden_states(family: str) -> None:
    model = tiny_model(family)
    batch = tiny_batch(model)
    with torch.no_grad():
        with capture(model, all_layers(model)) as hidden:
            model(**batch)
        output = model(**batch, output_hidden_states=True)
    for name, stack in find_stacks(model).items():
        expected = output[FIELDS[name]]
        for number in range(stack.depth):
            assert torch.equal(hidden[LayerRef(name, number)], expected[number]), number
        last, final = hidden[LayerRef(name, stack.depth)], hidden[LayerRef(name, -1)]
        assert torch.equal(final, output[LAST[name]])
        if stack.final_norm is None:
            assert torch.equal(last, final)
        else:
            assert not torch.equal(last, final)
            assert torch.equal(stack.final_norm(last), final)


@pytest.mark.parametrize("family", FAMILIES)
def test_only_what_is_asked_for_is_kept(family: str) -> None:
    model = tiny_model(family)
    before = hooks_of(model)
    prefix = "decoder." if family in ENCODER_DECODERS else ""
    with capture(model, [f"{prefix}2"]) as hidden:
        assert hooks_of(model) - before <= 3
        model(**tiny_batch(model))
    assert list(hidden) == [LayerRef.parse(f"{prefix}2")]
    assert f"{prefix}2" in hidden
    assert f"{prefix}1" not in hidden
    with pytest.raises(UserError, match=rf"layer {prefix}1 was not captured.*{prefix}2"):
        hidden[f"{prefix}1"]


def test_layers_are_read_by_number_name_or_reference() -> None:
    model = tiny_model("gpt2")
    with capture(model, layers=[0, "2", "final", LayerRef("", 2)]) as hidden:
        model(**tiny_batch(model))
    assert len(hidden) == 3
    assert hidden[2] is hidden["2"] is hidden[LayerRef("", 2)]
    assert hidden["final"].shape == (3, 8, 32)


def test_hooks_are_gone_afterwards_also_after_an_exception() -> None:
    model = tiny_model("llama")
    before = hooks_of(model)
    with capture(model, [0, 1, "final"]):
        assert hooks_of(model) > before
    assert hooks_of(model) == before
    with pytest.raises(ZeroDivisionError), capture(model, [0, 1, "final"]):
        1 / 0  # noqa: B018
    assert hooks_of(model) == before
    with pytest.raises(ValueError, match="specify exactly one"), capture(model, [0, 1, "final"]):
        model()
    assert hooks_of(model) == before


def test_a_layer_that_was_not_run() -> None:
    with capture(tiny_model("bert"), [1]) as hidden, pytest.raises(UserError, match="the model has not run it"):
        hidden[1]


@pytest.mark.parametrize(
    ("family", "layer", "message"),
    [
        ("bert", 5, r"layer 5 does not exist: the model has 4 blocks"),
        ("bert", "decoder.1", r"one stack of blocks, so write 1"),
        ("bert", "top", r"layer 'top' cannot be read"),
        ("bart", 2, r"encoder\.2 or decoder\.2"),
        ("t5", "encoder.9", r"layer encoder\.9 does not exist: the encoder has 4 blocks"),
    ],
)
def test_layers_that_a_model_does_not_have(family: str, layer: int | str, message: str) -> None:
    model = tiny_model(family)
    before = hooks_of(model)
    with pytest.raises(UserError, match=message), capture(model, [layer]):
        pytest.fail("the error comes before the model is run")
    assert hooks_of(model) == before


def test_each_pass_replaces_the_one_before() -> None:
    model = tiny_model("gpt2")
    first, second = tiny_batch(model, seed=1), tiny_batch(model, seed=2)
    with torch.no_grad(), capture(model, [1]) as hidden:
        model(**first)
        kept = hidden[1]
        model(**second)
        assert not torch.equal(hidden[1], kept)
        assert torch.equal(hidden[1], model(**second, output_hidden_states=True).hidden_states[1])


def loss_of(hidden: Any, layers: list[LayerRef]) -> Tensor:
    """A loss that weighs every layer and every element of it differently."""
    draw = torch.Generator().manual_seed(7)
    return sum(
        (hidden[layer].pow(2) * torch.rand(hidden[layer].shape, generator=draw)).mean() * (n + 1)
        for n, layer in enumerate(layers)
    )


def gradients(model: PreTrainedModel, batch: dict[str, Tensor], inside: bool) -> dict[str, Tensor]:
    """Gradients of a loss on every layer; with `inside` the backward pass runs while the hooks are there."""
    model.zero_grad()
    layers = all_layers(model)
    with capture(model, layers) as hidden:
        model(**batch)
        if inside:
            before = {layer: hidden[layer] for layer in layers}
            loss_of(hidden, layers).backward()
            assert all(hidden[layer] is before[layer] for layer in layers), "recomputation must not capture again"
    if not inside:
        loss_of(hidden, layers).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_equal_under_checkpointing(family: str, inside: bool) -> None:
    model = tiny_model(family).train()
    batch = tiny_batch(model)
    expected = gradients(model, batch, inside)
    assert len(expected) > 20
    # DeBERTa's blocks share the graph of the relative embeddings, which reentrant checkpointing runs through twice.
    for reentrant in (False,) if family == "deberta-v2" else (False, True):
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        assert model.is_activation_checkpointing
        found = gradients(model, batch, inside)
        assert set(found) == set(expected)
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient)


class Block(nn.Module):
    """A block that adds to its input, where it lies (as some remote code does) or in a new tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.in_place = True
        self.inner = nn.Linear(8, 16)
        self.outer = nn.Linear(16, 8)

    def forward(self, hidden: Tensor) -> Tensor:
        update = self.outer(torch.tanh(self.inner(hidden.clone())))
        return hidden.add_(update) if self.in_place else hidden + update


class RemoteModel(PreTrainedModel):
    """Remote code as it may be: blocks that work in place, or are checkpointed together with their hooks."""

    config_class = BertConfig
    reentrant: bool | None = None

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(10, 8)
        self.layers = nn.ModuleList([Block() for _ in range(config.num_hidden_layers)])
        self.post_init()

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.embed_tokens(input_ids).clone()
        for layer in self.layers:
            if self.reentrant is None:
                hidden = layer(hidden)
            else:
                hidden = checkpoint(layer, hidden, use_reentrant=self.reentrant)
        return hidden


def remote_model(in_place: bool) -> RemoteModel:
    torch.manual_seed(0)
    model = RemoteModel(BertConfig(hidden_size=8, num_hidden_layers=3)).train()
    for block in model.layers:
        block.in_place = in_place
    return model


def test_later_in_place_arithmetic_does_not_reach_what_was_captured() -> None:
    model, ids = remote_model(in_place=True), torch.tensor([[1, 2, 3]])
    with capture(model, [0, 1, 2, 3]) as hidden:
        output = model(ids)
    expected = model.embed_tokens(ids)
    for number, block in enumerate(model.layers):
        assert torch.equal(hidden[number], expected)
        expected = block(expected.clone())
    assert torch.equal(hidden[3], output)
    assert not torch.equal(hidden[1], hidden[2])
    sum(hidden[number].sum() for number in range(4)).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_hooks_inside_a_checkpointed_call() -> None:
    model, ids = remote_model(in_place=False), torch.tensor([[1, 2, 3]])

    def run() -> dict[str, Tensor]:
        model.zero_grad()
        with capture(model, [1, 2]) as hidden:
            model(ids)
            kept = hidden[1]
            (hidden[1].pow(2).sum() + hidden[2].pow(3).sum()).backward()
            assert hidden[1] is kept
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = run()
    model.reentrant = False
    found = run()
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)


def test_a_captured_layer_without_its_graph_is_refused_not_silently_useless() -> None:
    model, ids = remote_model(in_place=False), torch.tensor([[1, 2, 3]])
    model.reentrant = True
    with (
        pytest.raises(UserError, match=r"layer 1 was captured without a graph.*use_reentrant: false"),
        capture(model, [1]),
    ):
        model(ids)
    with torch.no_grad(), capture(model, [1]) as hidden:
        model(ids)
    assert not hidden[1].requires_grad, "no graph was asked for, so none is missed"

    frozen = tiny_model("bert").train()
    frozen.embeddings.requires_grad_(False)
    frozen.activation_checkpointing_enable({"use_reentrant": True})
    frozen.disable_input_require_grads()
    with pytest.raises(UserError, match="use_reentrant: false"), capture(frozen, [2]):
        frozen(**tiny_batch(frozen))


def test_a_frozen_model_may_be_captured_with_gradients_on() -> None:
    model = tiny_model("bert").requires_grad_(False)
    with capture(model, [2]) as hidden:
        model(**tiny_batch(model))
    assert not hidden[2].requires_grad


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_inside_distributed_data_parallel() -> None:
    model = tiny_model("llama", "causal-lm")
    wrapped = nn.parallel.DistributedDataParallel(model)
    batch = tiny_batch(model)
    with capture(wrapped, [1, "final"]) as hidden:
        wrapped(**batch)
    expected = model(**batch, output_hidden_states=True).hidden_states
    assert torch.equal(hidden[1], expected[1])
    assert torch.equal(hidden["final"], expected[-1])


@pytest.mark.parametrize(("head", "kind"), [("sequence-classification", "SEQ_CLS"), ("base", "FEATURE_EXTRACTION")])
def test_inside_peft(head: str, kind: str) -> None:
    peft = pytest.importorskip("peft")
    model = tiny_model("bert", head)
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(task_type=kind, target_modules=["query"], init_lora_weights=False)
    ).eval()
    batch = tiny_batch(model)
    with capture(wrapped, [0, 3]) as hidden:
        wrapped(**batch)
    assert torch.equal(hidden[3], wrapped(**batch, output_hidden_states=True).hidden_states[3])
    hidden[3].sum().backward()
    trained = [name for name, parameter in wrapped.named_parameters() if parameter.grad is not None]
    assert trained
    assert all("lora" in name for name in trained)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_dtype_is_the_models(dtype: torch.dtype) -> None:
    model = tiny_model("gpt2").to(dtype)
    with capture(model, [0, 4, "final"]) as hidden:
        model(**tiny_batch(model))
    assert {tensor.dtype for tensor in hidden.values()} == {dtype}
