"""Adapters go in, are read, and are merged so that nothing of them is left but their effect, in every family."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from tiny_models import CLASSES, DECODERS, ENCODER_DECODERS, ENCODERS, tiny_batch, tiny_model
from torch import Tensor, nn
from transformers import BertConfig, PreTrainedModel, RobertaConfig

from layerdistill.core.errors import UserError
from layerdistill.core.types import Tap
from layerdistill.models import TeacherConfig, empty_model, make_student
from layerdistill.models.adapter_files import (
    find_peft_folder,
    load_matrices,
    merge_peft_folder,
    peft_folder_shapes,
    planned_adapters,
    save_matrices,
)
from layerdistill.models.adapters import (
    adapted_layers,
    adapter_matrices,
    add_adapters,
    balanced_svd,
    count_adapter_parameters,
    empty_adapters,
    merge_adapters,
    peft_adapters,
    svd_adapters,
    train_adapters_and_head,
)
from layerdistill.models.projections import find_projections, projection_paths
from layerdistill.signals import run_model

FAMILIES = (*ENCODERS, *DECODERS)
FUSED = ("modernbert", "gpt2", "gpt-neox")


def head_of(family: str) -> str:
    return "causal-lm" if family in DECODERS else "sequence-classification"


def disturb(model: nn.Module, seed: int = 3) -> None:
    """Give every B a value, as training does: at 0 a merge changes nothing."""
    draw = torch.Generator().manual_seed(seed)
    for layer in adapted_layers(model).values():
        for b in layer.lora_B.values():
            b.weight.data = 0.3 * torch.randn(b.weight.shape, generator=draw)


def logits(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model.eval()(**batch).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_student_is_the_plain_model_with_the_same_logits(family: str) -> None:
    model = tiny_model(family, head_of(family))
    keys, modules = list(model.state_dict()), [(name, type(module)) for name, module in model.named_modules()]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batch = tiny_batch(model)
    start = logits(model, batch)
    paths = add_adapters(model, rank=3, alpha=12.0, dropout=0.5, seed=1)
    torch.testing.assert_close(logits(model, batch), start, atol=0, rtol=0, msg="B is 0 at the start")
    disturb(model)
    unmerged = logits(model, batch)
    assert (unmerged - start).abs().max() > 1e-2
    merge_adapters(model)
    torch.testing.assert_close(logits(model, batch), unmerged, atol=1e-5, rtol=0)
    assert list(model.state_dict()) == keys
    assert [(name, type(module)) for name, module in model.named_modules()] == modules
    assert not hasattr(model, "peft_config")
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {f"{path}.weight" for path in paths}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_student_opens_with_plain_transformers(family: str, tmp_path: Path) -> None:
    model = tiny_model(family, head_of(family))
    add_adapters(model, rank=2, alpha=4.0, dropout=0.0, seed=1)
    disturb(model)
    merge_adapters(model)
    model.save_pretrained(tmp_path)
    again, info = CLASSES[head_of(family)].from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    batch = tiny_batch(model)
    torch.testing.assert_close(logits(again, batch), logits(model, batch), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("family", [*FAMILIES, *ENCODER_DECODERS])
def test_projections_are_the_self_attentions_of_every_block_in_order(family: str) -> None:
    model = tiny_model(family, num_layers=3)
    for stack, blocks in find_projections(model).items():
        assert len(blocks) == 3
        for number, block in enumerate(blocks):
            assert list(block) == (["query_key_value"] if family in FUSED else ["query", "key", "value"])
            for path in block.values():
                assert f".{number}." in f".{path}"
                assert path.startswith(stack)
                assert not any(word in path for word in ("encoder_attn", "EncDec", "pos_"))
                assert model.get_submodule(path).weight.dim() == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_the_count_and_the_shapes_are_those_of_the_adapters(family: str) -> None:
    model = tiny_model(family, head_of(family))
    expected, shapes = count_adapter_parameters(model, 5), empty_adapters(model, 5)
    on_meta = empty_model(model.config, "base")
    assert count_adapter_parameters(on_meta, 5) == expected
    before = sum(parameter.numel() for parameter in model.parameters())
    paths = add_adapters(model, rank=5, alpha=10.0, dropout=0.0, seed=0)
    assert sum(parameter.numel() for parameter in model.parameters()) - before == expected
    matrices = adapter_matrices(model)
    assert paths == list(shapes) == projection_paths(model)
    assert set(matrices) == set(paths)
    assert {path: a.shape for path, (a, _) in matrices.items()} == {path: a.shape for path, a in shapes.items()}
    assert len(paths) == 4 * (1 if family in FUSED else 3)


@pytest.mark.parametrize(("rank", "parameters"), [(8, 221_184), (32, 884_736), (64, 1_769_472), (128, 3_538_944)])
def test_distilroberta_gets_the_parameters_of_the_notes(rank: int, parameters: int) -> None:
    config = RobertaConfig(num_hidden_layers=6, hidden_size=768, num_attention_heads=12)
    assert count_adapter_parameters(empty_model(config), rank) == parameters


def test_the_draw_depends_on_the_seed_alone() -> None:
    drawn = []
    for seed, noise in ((1, 0), (1, 5), (2, 0)):
        torch.manual_seed(noise)
        model = tiny_model("bert")
        state = torch.random.get_rng_state()
        add_adapters(model, rank=2, alpha=4.0, dropout=0.0, seed=seed)
        assert torch.equal(torch.random.get_rng_state(), state)
        drawn.append(next(iter(adapter_matrices(model).values()))[0])
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize(
    ("family", "head", "trained"),
    [
        ("bert", "sequence-classification", {"classifier", "bert.pooler"}),
        ("roberta", "sequence-classification", {"classifier"}),
        ("llama", "causal-lm", set()),
    ],
)
def test_adapters_and_a_new_head_train_and_nothing_else(family: str, head: str, trained: set[str]) -> None:
    model = tiny_model(family, head)
    add_adapters(model, rank=2, alpha=4.0, dropout=0.0, seed=0)
    train_adapters_and_head(model)
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    rest = {name for name in names if ".lora_" not in name}
    assert len(names) - len(rest) == 2 * 4 * 3
    assert {prefix for prefix in trained if any(name.startswith(prefix) for name in rest)} == trained
    assert all(name.startswith(tuple(trained)) for name in rest)


def test_a_model_with_adapters_is_not_adapted_again() -> None:
    model = tiny_model("bert")
    add_adapters(model, rank=2, alpha=4.0, dropout=0.0, seed=0)
    with pytest.raises(UserError, match="has LoRA adapters already"):
        add_adapters(model, rank=2, alpha=4.0, dropout=0.0, seed=0)


def test_blocks_whose_projections_are_unknown_are_refused() -> None:
    model = tiny_model("bert")
    for layer in model.encoder.layer:
        layer.attention.self.enquiry = layer.attention.self.query
        del layer.attention.self.query
    with pytest.raises(UserError, match=r"no query, key and value projections in encoder\.layer\.0"):
        find_projections(model)


# A teacher


def peft_teacher(family: str, folder: Path | None = None, **options: object) -> PeftModel:
    """A teacher with LoRA as a user makes it: peft's own call, on the projections, with B that is not 0."""
    model = tiny_model(family, head_of(family), num_layers=2, seed=1)
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=projection_paths(model), fan_in_fan_out=family == "gpt2",
        task_type="CAUSAL_LM" if family in DECODERS else "SEQ_CLS", **options,
    )  # fmt: skip
    wrapped = get_peft_model(model, config).eval()
    disturb(wrapped)
    if folder is not None:
        wrapped.save_pretrained(folder)
    return wrapped


@pytest.mark.parametrize("family", FAMILIES)
def test_features_of_a_merged_teacher_are_those_of_the_unmerged_one(family: str, tmp_path: Path) -> None:
    """The input of the merged projection times A is what peft's own A gives, in the first pass over the tokens."""
    unmerged = peft_teacher(family, tmp_path)
    merged = tiny_model(family, head_of(family), num_layers=2, seed=1)
    adapters, replaced = merge_peft_folder(merged, tmp_path)
    assert all(name.split(".")[0] in ("classifier", "score", "head") for name in replaced)
    batch = tiny_batch(merged)
    theirs: dict[str, Tensor] = {}

    def keep(path: str, module: nn.Module, args: tuple, output: Tensor) -> None:
        theirs.setdefault(path, output)

    for path, layer in adapted_layers(unmerged).items():
        layer.lora_A["default"].register_forward_hook(
            lambda module, args, output, path=path: keep(path, module, args, output)
        )
    expected_logits = logits(unmerged, batch)
    taps = {path: Tap(path, "input") for path in adapters}
    with torch.no_grad():
        signal = run_model(merged, batch, (), logits=True, taps=taps.values())
    torch.testing.assert_close(signal.logits, expected_logits, atol=1e-5, rtol=0)
    assert set(theirs) == set(adapters) == set(projection_paths(merged))
    for path, a in adapters.items():
        found = (signal.taps[taps[path]] @ a.T)[batch["attention_mask"].bool()]
        output = theirs[path]
        if output.dim() == 3 and output.shape[0] == len(batch["input_ids"]):
            output = output[batch["attention_mask"].bool()]
        torch.testing.assert_close(found, output.reshape(found.shape), atol=1e-5, rtol=0)


def test_a_peft_teacher_is_read_without_being_changed() -> None:
    wrapped = peft_teacher("bert")
    adapters = peft_adapters(wrapped)
    assert adapters is not None
    assert {path: tuple(a.shape) for path, a in adapters.items()} == dict.fromkeys(projection_paths(wrapped), (4, 32))
    for path, a in adapters.items():
        assert torch.equal(a, wrapped.base_model.model.get_submodule(path).lora_A["default"].weight)
    assert peft_adapters(tiny_model("bert")) is None
    assert peft_adapters(None) is None


def test_other_adapters_than_lora_are_refused() -> None:
    wrapped = get_peft_model(tiny_model("bert"), IA3Config(target_modules=["key"], feedforward_modules=[]))
    with pytest.raises(UserError, match="IA3"):
        peft_adapters(wrapped)


def test_a_trained_head_comes_with_the_adapters(tmp_path: Path) -> None:
    wrapped = peft_teacher("bert", modules_to_save=["classifier"])
    head = wrapped.base_model.model.classifier.modules_to_save["default"]
    head.weight.data += 1.0
    wrapped.save_pretrained(tmp_path)
    plain = tiny_model("bert", "sequence-classification", num_layers=2, seed=1)
    keys = set(plain.state_dict())
    _, replaced = merge_peft_folder(plain, tmp_path)
    assert replaced == {"classifier.weight", "classifier.bias"}
    assert set(plain.state_dict()) == keys
    batch = tiny_batch(plain)
    torch.testing.assert_close(logits(plain, batch), logits(wrapped, batch), atol=1e-5, rtol=0)


def test_folders_that_are_no_adapters_of_this_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no folder with adapter_config\.json"):
        find_peft_folder(str(tmp_path))
    peft_teacher("bert", tmp_path)
    assert find_peft_folder(tmp_path.name, tmp_path.parent) == tmp_path
    other = tiny_model("bert", "sequence-classification", num_layers=1)
    with pytest.raises(UserError, match="does not have"):
        merge_peft_folder(other, tmp_path)
    assert not adapted_layers(other)
    narrow = tiny_model("bert", "sequence-classification", num_layers=2, hidden_size=16)
    with pytest.raises(UserError, match="does not fit the teacher"):
        merge_peft_folder(narrow, tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(UserError, match=r"adapter_model\.safetensors"):
        find_peft_folder(str(tmp_path))


def test_what_is_planned_is_what_will_be(tmp_path: Path) -> None:
    config = tiny_model("bert").config
    task = "sequence-classification"
    shapes = peft_folder_shapes(tmp_path) if peft_teacher("bert", tmp_path) and tmp_path else {}
    assert {tuple(a.shape) for a in shapes.values()} == {(4, 32)}

    def planned(svd: int | None = None, **section: object) -> dict[str, Tensor] | None:
        return planned_adapters(TeacherConfig(model="m", **section), config, task, None, svd)

    assert planned() is None
    assert planned(finetune={"max_steps": 1}) is None
    assert planned_adapters(None, None, task, None, None) is None
    lora = planned(finetune={"lora": {"rank": 6}})
    svd = planned(3, finetune={"max_steps": 1})
    folder = planned(adapters=str(tmp_path))
    assert lora is not None and svd is not None and folder is not None
    assert list(lora) == list(svd) == projection_paths(tiny_model("bert", task))
    assert [len(next(iter(found.values()))) for found in (lora, svd, folder)] == [6, 3, 4]
    for section in ({}, {"finetune": {"lora": {"rank": 6}}}, {"adapters": str(tmp_path)}):
        with pytest.raises(UserError, match="takes adapters out of a full fine-tuning"):
            planned(3, **section)


# Singular values


def test_the_svd_is_balanced_and_the_best_of_its_rank() -> None:
    draw = torch.Generator().manual_seed(0)
    update = torch.randn(7, 5, generator=draw, dtype=torch.float64)
    values = torch.linalg.svdvals(update)
    for rank in (1, 3, 5):
        a, b = balanced_svd(update, rank)
        assert (a.shape, b.shape) == ((rank, 5), (7, rank))
        error = torch.linalg.matrix_norm(update - b @ a)
        assert error == pytest.approx(values[rank:].square().sum().sqrt().item(), abs=1e-10)
        torch.testing.assert_close(a @ a.T, torch.diag(values[:rank]), atol=1e-10, rtol=0)
        torch.testing.assert_close(b.T @ b, torch.diag(values[:rank]), atol=1e-10, rtol=0)
        assert all(row[row.abs().argmax()] > 0 for row in a)
    with pytest.raises(UserError, match=r"method\.rank is 6"):
        balanced_svd(update, 6)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_the_svd_of_a_low_rank_fine_tuning_finds_all_of_it(family: str) -> None:
    before = tiny_model(family)
    after = make_student(before)
    add_adapters(after, rank=3, alpha=6.0, dropout=0.0, seed=1)
    disturb(after)
    given = adapter_matrices(after)
    merge_adapters(after)
    found = svd_adapters(after, before, 3)
    assert list(found) == projection_paths(before)
    for path, (a, b) in found.items():
        torch.testing.assert_close(b @ a, 2.0 * given[path][1] @ given[path][0], atol=1e-5, rtol=0)


def test_matrices_are_kept_and_read_again(tmp_path: Path) -> None:
    model = tiny_model("bert")
    add_adapters(model, rank=2, alpha=4.0, dropout=0.0, seed=0)
    matrices = adapter_matrices(model)
    save_matrices(tmp_path / "inside" / "lora.safetensors", matrices, {"rank": 2})
    again = load_matrices(tmp_path / "inside" / "lora.safetensors")
    assert set(again) == set(matrices)
    assert all(torch.equal(again[path], a) for path, (a, _) in matrices.items())
    (tmp_path / "inside" / "lora.safetensors").write_bytes(b"broken")
    with pytest.raises(UserError, match="is damaged"):
        load_matrices(tmp_path / "inside" / "lora.safetensors")


# The recipe's section


def test_the_lora_section_is_completed_and_checked() -> None:
    section = TeacherConfig(model="m", finetune={"max_steps": 1, "lora": {"rank": 8}})
    assert section.finetune == {"max_steps": 1, "lora": {"rank": 8, "alpha": 16.0, "dropout": 0.05}}
    assert TeacherConfig(**section.model_dump()) == section
    for wrong in ({"rank": 0}, {"ranks": 8}, {"dropout": 1.0}, 8):
        with pytest.raises(ValueError, match=r"teacher\.finetune\.lora is"):
            TeacherConfig(model="m", finetune={"lora": wrong})
    with pytest.raises(ValueError, match="random weights"):
        TeacherConfig(architecture={"model_type": "bert"}, finetune={"lora": {}})
    with pytest.raises(ValueError, match="and no finetune"):
        TeacherConfig(model="m", adapters="a", finetune={"max_steps": 1})


def test_a_bert_of_another_width_counts_its_own() -> None:
    config = BertConfig(num_hidden_layers=2, hidden_size=64, num_attention_heads=4, intermediate_size=64)
    assert count_adapter_parameters(empty_model(config), 3) == 2 * 3 * 3 * (64 + 64)
