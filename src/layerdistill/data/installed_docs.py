"""A labelled corpus that is on every machine: which library does this docstring document?

The texts are the docstrings of the Python standard library and of packages that this project depends on anyway, so that
the demo, the documentation and the tests need no download. It is the same on every machine with the same versions.
"""

from __future__ import annotations

import functools
import gc
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import sys
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, Features, Value

from layerdistill.data.docstrings import docstrings, prose
from layerdistill.data.fingerprint import fingerprint_dataset


@dataclass(frozen=True)
class Library:
    """A class of the corpus: the import name, the distribution it comes from, and the words that would give it away."""

    name: str
    distribution: str
    given_away_by: str


LIBRARIES = (
    Library("datasets", "datasets", r"hf[ _]datasets|datasets(?=\.\w)|(?:hugging ?face|🤗) datasets"),
    Library("matplotlib", "matplotlib", r"matplotlib[a-z]*|pyplot|mpl|plt"),
    Library("numpy", "numpy", r"numpy|np|ufuncs?|numpydoc"),
    Library("pandas", "pandas", r"pandas|pd"),
    Library("python", "", r"c?python\d?(?:\.\d+)*"),
    Library("scipy", "scipy", r"scipy|sp(?=\.\w)"),
    Library("sklearn", "scikit-learn", r"sklearn|scikit-learn|scikits?"),
    Library("sympy", "sympy", r"sympy"),
    Library("torch", "torch", r"py_?torch|(?:lib)?torch[a-z0-9]*|aten"),
    Library("transformers", "transformers", r"transformers|hugging ?face|🤗"),
)
"""Every library is a direct or indirect hard dependency of this project; one that is missing is left out."""

QUOTAS = {"train": 600, "validation": 75, "test": 150}
"""Texts per library and split; a library with fewer gives what it has."""
PER_FILE = 16
"""Texts from one source file, so that no file dominates its library."""
MAX_FILE_BYTES = 100_000
"""Larger files are skipped: parsing is what the time goes into, and they give no more texts than others."""
KEY_LETTERS = 60
"""Two texts are the same when their first this many letters are, ignoring case and everything that is no letter."""
SKIPPED_FOLDERS = frozenset(
    (
        *("tests", "test", "testing", "_testing"),
        *("vendor", "_vendor", "_vendored", "vendored", "third_party", "externals", "extern"),
        *("array_api_compat", "array_api_extra", "site-packages", "dist-packages"),
        *("idlelib", "lib2to3", "turtledemo", "pydoc_data", "ensurepip", "__pycache__"),
    )
)
"""Test code, code copied in from other libraries (it would get a wrong label), and programs of the standard library."""

NAMES = re.compile(
    r"(?<![A-Za-z0-9])(?:" + "|".join(library.given_away_by for library in LIBRARIES) + r")(?![A-Za-z0-9])",
    re.IGNORECASE,
)
"""The name of any library in any text becomes `lib`, so that neither its presence nor its absence tells the label."""


@functools.cache
def installed_docs() -> dict[str, Dataset]:
    """Return train, validation and test with the columns `text`, `label` (a `ClassLabel`) and `module`.

    `module` is `library:path/of/file.py`. All texts of a file are in the same split, chosen by a hash of `module`. A
    text that occurs in two libraries is left out; of texts that repeat within a library the first is kept. Rows are in
    an order that mixes the classes. Built in memory once per process.
    """
    roots = {library.name: _root(library) for library in LIBRARIES}
    with _fast_parsing():
        gathered = {name: _gather(name, root) for name, root in roots.items() if root is not None}
    libraries_of = Counter(key for texts in gathered.values() for key in texts)
    names = [library.name for library in LIBRARIES if gathered.get(library.name)]
    features = Features({"text": Value("string"), "label": ClassLabel(names=names), "module": Value("string")})
    splits = {}
    for split, quota in QUOTAS.items():
        rows: list[dict[str, Any]] = []
        for label, name in enumerate(names):
            unique = [
                {"text": text, "label": label, "module": module}
                for key, (text, module) in gathered[name].items()
                if libraries_of[key] == 1 and split_of(module) == split
            ]
            rows += unique[:quota]
        rows.sort(key=lambda row: _hash(row["text"]))
        splits[split] = Dataset.from_dict({name: [row[name] for row in rows] for name in features}, features=features)
    return splits


def describe() -> dict[str, Any]:
    """Return the corpus's `fingerprint` and, for each library, its `version` and the number of texts in each split."""
    splits = installed_docs()
    counts = {split: Counter(data["label"]) for split, data in splits.items()}
    names = splits["train"].features["label"].names
    versions = {
        library.name: importlib.metadata.version(library.distribution)
        if library.distribution
        else platform.python_version()
        for library in LIBRARIES
        if library.name in names
    }
    return {
        "fingerprint": "-".join(fingerprint_dataset(data)[:8] for data in splits.values()),
        "libraries": {
            name: {"version": versions[name], **{split: counts[split][label] for split in splits}}
            for label, name in enumerate(names)
        },
    }


def split_of(module: str) -> str:
    """Return the split that every text of a source file belongs to: 1/10 validation, 2/10 test, 7/10 train."""
    tenth = int(_hash("split:" + module)[:8], 16) % 10
    return "validation" if tenth == 0 else "test" if tenth <= 2 else "train"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _root(library: Library) -> Path | None:
    """Return the folder of a library's sources without importing it."""
    if not library.distribution:
        return Path(sysconfig.get_path("stdlib"))
    spec = importlib.util.find_spec(library.name)
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    return Path(places[0]) if places else None


@contextmanager
def _fast_parsing() -> Iterator[None]:
    # Syntax trees hold no cycles, yet the collector looks through them again and again: without it, half the time.
    collecting = gc.isenabled()
    gc.disable()
    try:
        with warnings.catch_warnings(action="ignore"):  # about escapes in other people's strings
            yield
    finally:
        if collecting:
            gc.enable()


def _source_files(name: str, root: Path) -> list[str]:
    """Return the paths (with `/`, relative to `root`) of a library's files in an order that a hash decides."""
    found = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [subfolder for subfolder in subfolders if subfolder not in SKIPPED_FOLDERS]
        relative = Path(folder).relative_to(root)
        found += [(relative / file).as_posix() for file in files if file.endswith(".py") and file != "conftest.py"]
    if name == "python":
        found = [path for path in found if re.split(r"[/.]", path)[0] in sys.stdlib_module_names]
    return sorted(found, key=lambda path: _hash(f"{name}:{path}"))


def _gather(name: str, root: Path) -> dict[str, tuple[str, str]]:
    """Return {key: (text, module)} from as many files as fill every quota, with a fifth to spare for duplicates."""
    wanted = {split: quota + quota // 5 for split, quota in QUOTAS.items()}
    texts: dict[str, tuple[str, str]] = {}
    for path in _source_files(name, root):
        module = f"{name}:{path}"
        split = split_of(module)
        file = root / path
        if wanted[split] <= 0 or file.stat().st_size > MAX_FILE_BYTES:
            continue
        fresh: dict[str, tuple[str, str]] = {}
        for docstring in docstrings(file):
            text = prose(docstring, NAMES)
            key = _key(text) if text else ""
            if text and key not in texts:
                fresh.setdefault(key, (text, module))
        kept = sorted(fresh, key=_hash)[:PER_FILE]
        texts.update((key, fresh[key]) for key in kept)
        wanted[split] -= len(kept)
        if all(left <= 0 for left in wanted.values()):
            break
    return texts


def _key(text: str) -> str:
    return "".join(filter(str.isalpha, text.lower()))[:KEY_LETTERS]
