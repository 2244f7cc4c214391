"""The installed documentation is the same everywhere, leaks nothing between splits, and does not give labels away."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from data_samples import config

from layerdistill.data import installed_docs as module
from layerdistill.data.docstrings import docstrings, prose
from layerdistill.data.fingerprint import fingerprint_dataset
from layerdistill.data.installed_docs import NAMES, QUOTAS, Library, describe, installed_docs
from layerdistill.data.labels import label_space
from layerdistill.data.load import load_splits

PROGRAM = """
import json, sys
from layerdistill.data.installed_docs import describe
before = set(sys.modules)
made = describe()
print(json.dumps([made, sorted({name.split(".")[0] for name in set(sys.modules) - before})]))
"""


def test_another_process_with_another_hash_seed_builds_the_same_and_imports_nothing() -> None:
    seed = "1" if os.environ.get("PYTHONHASHSEED") == "0" else "0"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "PYTHONHASHSEED": seed},
        capture_output=True,
        text=True,
        check=True,
    )
    made, imported = json.loads(done.stdout)
    assert made == describe()
    assert not set(imported) & {"matplotlib", "sklearn", "sympy", "scipy"}


def test_splits_share_no_file_and_no_text() -> None:
    splits = installed_docs()
    modules = {split: set(data["module"]) for split, data in splits.items()}
    assert not modules["train"] & (modules["validation"] | modules["test"])
    assert not modules["validation"] & modules["test"]
    texts = [re.sub(r"[^a-z]", "", text.lower()) for data in splits.values() for text in data["text"]]
    assert len(set(texts)) == len(texts)


def test_labels_tell_the_library_and_classes_are_balanced() -> None:
    splits = installed_docs()
    names = splits["train"].features["label"].names
    assert 8 <= len(names) <= 10
    for split, data in splits.items():
        assert [names[label] for label in data["label"]] == [name.partition(":")[0] for name in data["module"]]
        counts = Counter(data["label"])
        assert set(counts) == set(range(len(names)))
        assert max(counts.values()) <= QUOTAS[split]
        assert min(counts.values()) >= QUOTAS[split] // 4
    first = Counter(splits["train"]["label"][:500])
    assert len(first) == len(names), "rows are in an order that mixes the classes"


def test_no_text_names_a_library_and_every_text_is_prose() -> None:
    own_names = re.compile(
        r"\b(torch|pytorch|numpy|np|pandas|pd|scipy|sklearn|scikit|sympy|matplotlib|pyplot|transformers|python)\b", re.I
    )
    for data in installed_docs().values():
        for text in data["text"]:
            assert not own_names.search(text.replace("_", " ")), text
            assert 40 <= len(text) <= 300
            assert "\n" not in text


def test_the_corpus_is_a_source_that_brings_its_splits() -> None:
    section = config(train="installed-docs", text=None, max_train_examples=50)
    splits = load_splits(section)
    assert list(splits) == ["train", "validation", "test"]
    assert len(splits["train"]) == 50
    assert label_space(splits, section).names == tuple(installed_docs()["train"].features["label"].names)
    as_text = load_splits(config(train="installed-docs", task="causal-lm", text=None))
    assert as_text["train"].column_names == ["example_id", "text"]


def package(root: Path, name: str, files: dict[str, str]) -> None:
    for path, text in {"__init__.py": "", **files}.items():
        file = root / name / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


def test_what_is_taken_from_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = "Turn the alphalib handle until the water runs out of the pump."
    both = "This sentence stands in both libraries and says nothing about either one."
    package(tmp_path, "alphalib", {f"file{n}.py": f'"""{both}"""\ndef f():\n    """{own}"""\n' for n in range(20)})
    package(
        tmp_path, "alphalib", {"tests/test_x.py": '"""A sentence in a test file that must not be taken up at all."""'}
    )
    package(tmp_path, "alphalib", {"broken.py": "def f(:\n"})
    other = '"""Plough the field with seven oxen before the rain comes down."""'
    package(tmp_path, "betalib", {"a.py": f'raise RuntimeError("must not be imported")\ndef f():\n    """{both}"""\n'})
    package(tmp_path, "betalib", {f"b{n}.py": other for n in range(20)})
    monkeypatch.syspath_prepend(tmp_path)
    libraries = tuple(Library(name, name, name) for name in ("alphalib", "betalib", "gammalib"))
    monkeypatch.setattr(module, "LIBRARIES", libraries)
    monkeypatch.setattr(module, "NAMES", re.compile("alphalib|betalib"))
    splits = installed_docs.__wrapped__()
    assert splits["train"].features["label"].names == ["alphalib", "betalib"]
    texts = {text for data in splits.values() for text in data["text"]}
    assert texts == {own.replace("alphalib", "lib"), other.strip('"')}


def test_docstrings_of_modules_classes_and_functions_in_order(tmp_path: Path) -> None:
    file = tmp_path / "some.py"
    file.write_text(
        '"""one"""\nclass A:\n    """two"""\n    def f(self):\n        """three"""\nif True:\n'
        '    async def g():\n        """four"""\ntext = """not one"""\n'
    )
    assert list(docstrings(file)) == ["one", "two", "three", "four"]


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        (
            "Return the mean of :func:`numpy.mean` and `x <https://a.b>`_ of  it.",
            "Return the mean of lib.mean and x of it.",
        ),
        (
            "The first line of the prose is taken here.\n\n>>> import numpy",
            "The first line of the prose is taken here.",
        ),
        (
            "The first line of the prose is taken here.\n\nParameters\n----------\nx",
            "The first line of the prose is taken here.",
        ),
        ("Too short.", None),
        (">>> only code here, which is not taken at all, though long", None),
    ],
)
def test_prose(docstring: str, expected: str | None) -> None:
    assert prose(docstring, NAMES) == expected


def test_long_prose_is_cut_at_a_word() -> None:
    text = prose("word " * 100, NAMES)
    assert text is not None
    assert 290 < len(text) <= 300
    assert set(text.split()) == {"word"}


def test_the_corpus_is_made_once_and_described() -> None:
    assert installed_docs() is installed_docs()
    described = describe()
    assert described["fingerprint"].startswith(fingerprint_dataset(installed_docs()["train"])[:8])
    total = sum(counts["train"] for counts in described["libraries"].values())
    assert total == len(installed_docs()["train"])
