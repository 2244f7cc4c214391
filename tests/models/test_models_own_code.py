"""A student with blocks of its own kind opens again: here, and with plain transformers where layerdistill is not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from compact_models import compact_model
from safetensors.torch import load_file, save_file
from tiny_models import DECODERS, ENCODERS, tiny_batch, tiny_model
from torch import nn
from toy_recipe import toy_tokenizer
from transformers import PreTrainedModel

import layerdistill as ld
from layerdistill.models import count_parameters, empty_model, find_stacks, load_config, load_model, shrink_config
from layerdistill.models.modeling_compact import CompactBlock
from layerdistill.models.own_code import KINDS, own_class
from layerdistill.train.composite import Composite
from layerdistill.train.trainer import load_stage, save_student

FAMILIES = (*ENCODERS, *DECODERS)

WITHOUT_LAYERDISTILL = """
import json, sys
sys.modules["layerdistill"] = None
import torch, transformers
from safetensors.torch import load_file

def opened(folder, auto_class):
    model, info = auto_class.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    batch = load_file(folder + "/batch.safetensors")
    logits = batch.pop("logits")
    found = {"class": type(model).__name__, "keys": [len(info[kind]) for kind in ("missing_keys", "unexpected_keys")]}
    with torch.no_grad():
        found["same"] = torch.equal(model.eval()(**batch).logits, logits)
    if model.can_generate():
        options = {"max_new_tokens": 6, "num_beams": 2, "do_sample": False}
        texts = [model.generate(batch["input_ids"][:1], use_cache=cached, **options) for cached in (True, False)]
        found["cached"] = torch.equal(*texts)
    model.save_pretrained(folder + "/again")
    again = auto_class.from_pretrained(folder + "/again", trust_remote_code=True)
    found["kept"] = all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    return found

for folder, name in zip(sys.argv[1::2], sys.argv[2::2]):
    print(json.dumps(opened(folder, getattr(transformers, name))))
"""

ELSEWHERE = [
    ("gpt2", "causal-lm", "AutoModelForCausalLM"),
    ("qwen3", "causal-lm", "AutoModelForCausalLM"),
    ("gpt-neox", "causal-lm", "AutoModelForCausalLM"),
    ("deberta-v2", "sequence-classification", "AutoModelForSequenceClassification"),
    ("modernbert", "sequence-classification", "AutoModelForSequenceClassification"),
    ("llama", "sequence-classification", "AutoModelForSequenceClassification"),
]


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(**tiny_batch(model)).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_student_opens_here(tmp_path: Path, family: str) -> None:
    model = compact_model(family)
    save_student(model, tmp_path, toy_tokenizer())
    stored = load_file(tmp_path / "model.safetensors")
    tied = set(model.state_dict()) - set(stored)
    assert all(name.endswith(("lm_head.weight", "decoder.weight", "decoder.bias")) for name in tied), tied
    student = ld.load_student(tmp_path)
    assert torch.equal(logits(student), logits(model))
    assert student.state_dict().keys() == model.state_dict().keys()
    task = "causal-lm" if family in DECODERS else "sequence-classification"
    loaded = load_model(str(tmp_path), task)
    assert type(loaded.model) is type(student)
    assert loaded.fresh_keys == ()
    assert torch.equal(logits(loaded.model), logits(model))
    empty = empty_model(load_config(str(tmp_path)), task)
    assert count_parameters(empty) == count_parameters(student)
    assert [type(block) is CompactBlock for block in find_stacks(empty)[""].blocks] == [True, False, True, True]


@pytest.mark.parametrize("family", ["gpt2", "gpt-neox"])
def test_a_student_that_was_opened_is_saved_and_resumed_like_any_other(tmp_path: Path, family: str) -> None:
    model = compact_model(family)
    save_student(model, tmp_path / "first")
    student = ld.load_student(tmp_path / "first")
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.01)
    save_student(student, str(tmp_path / "second"))  # a folder as text, as the README gives it
    for name in ("config.json", "modeling_layerdistill.py"):
        assert (tmp_path / "first" / name).read_text() == (tmp_path / "second" / name).read_text()
    other = ld.load_student(tmp_path / "first")
    load_stage(Composite(other, nn.ModuleList()), tmp_path / "second")
    assert torch.equal(logits(other), logits(student))
    assert not torch.equal(logits(other), logits(model))


def test_it_opens_where_layerdistill_is_not_installed(tmp_path: Path) -> None:
    given, models = [], []
    for family, head, auto_class in ELSEWHERE:
        model, folder = compact_model(family, head=head), tmp_path / f"{family}-{head}"
        save_student(model, folder)
        save_file({**tiny_batch(model), "logits": logits(model)}, folder / "batch.safetensors")
        given += [str(folder), auto_class]
        models.append(model)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_LAYERDISTILL, *given],
        capture_output=True, text=True, check=False, env=environment, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == len(models)
    for model, found in zip(models, lines, strict=True):
        expected = {"class": f"Compact{type(model).__name__}", "keys": [0, 0], "same": True, "kept": True}
        assert found == expected | ({"cached": True} if model.can_generate() else {})


def test_the_base_model_opens_with_its_blocks_too(tmp_path: Path) -> None:
    model = compact_model("gpt2")
    save_student(model, tmp_path)
    base = load_model(str(tmp_path), "base").model
    batch = tiny_batch(model)
    with torch.no_grad():
        assert torch.equal(base(**batch)[0], model.base_model(**batch)[0])
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert set(auto_map) == {"AutoModel", "AutoModelForCausalLM"}


@pytest.mark.parametrize("kind", KINDS)
def test_modelling_files_stand_alone(kind: str) -> None:
    source = Path(str(KINDS[kind].__file__)).read_text()
    imported = {line.split()[1].split(".")[0] for line in source.splitlines() if line.startswith(("import ", "from "))}
    assert imported <= {"__future__", "collections", "copy", "inspect", "typing", "torch", "transformers"}
    assert own_class(transformers.BertModel, kind) is own_class(transformers.BertModel, kind)


def test_a_stock_student_has_no_code_beside_it(tmp_path: Path) -> None:
    save_student(tiny_model("gpt2", "causal-lm"), tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())


def test_an_unknown_kind_is_named(tmp_path: Path) -> None:
    save_student(compact_model("gpt2"), tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"kind": "compact"', '"kind": "compcat"'))
    with pytest.raises(ld.UserError, match="Did you mean 'compact'"):
        ld.load_student(tmp_path)


def test_no_other_student_is_cut_out_of_it() -> None:
    model = compact_model("gpt2")
    copied = ld.make_student(model)
    assert torch.equal(logits(copied), logits(model))
    assert copied is not model
    with pytest.raises(ld.UserError, match="blocks of its own kind"):
        ld.make_student(model, num_blocks=2)
    with pytest.raises(ld.UserError, match="compact blocks in the places"):
        shrink_config(model.config, num_blocks=2)
    assert shrink_config(model.config).layerdistill == model.config.layerdistill
