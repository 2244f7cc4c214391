"""Labels of every form (words, ids, lists, 0/1 columns, numbers) brought into the one form of their task."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import ClassLabel, Dataset, Features, List, Value

from layerdistill.core.errors import UserError
from layerdistill.data.config import DataConfig
from layerdistill.data.read_files import values_of
from layerdistill.data.tasks import ProblemType

SHOWN = 5
"""How many rows or labels an error message lists."""

LONGEST = 40
"""Characters of a label that an error message shows."""

MANY_ROWS = 20
"""Rows from which on a class for every second one is a sign of a wrong column."""

logger = logging.getLogger(__name__)

Word = str | int
"""A class as the data give it: its name or its id."""


@dataclass(frozen=True)
class LabelSpace:
    """The classes of the data in the order of their ids, and the word `transformers` has for the kind of problem.

    `num_labels` is 1 for regression and 0 for language models.
    """

    num_labels: int
    names: tuple[str, ...]
    problem_type: ProblemType | None

    @property
    def named(self) -> bool:
        """Whether the names say more than the ids: LABEL_0, LABEL_1, ... are made up where the data hold bare ids."""
        return self.names != made_up_names(self.num_labels)


def made_up_names(classes: int) -> tuple[str, ...]:
    """Return what transformers, too, calls classes that have no names."""
    return tuple(f"LABEL_{number}" for number in range(classes))


def rows_named(rows: Sequence[int]) -> str:
    """Return `row 3` or `12 rows (the first: 3, 8, 9, 11, 20)`; rows count from 0, header not counted."""
    if len(rows) == 1:
        return f"row {rows[0]}"
    return f"{len(rows)} rows (the first: {', '.join(map(str, rows[:SHOWN]))})"


def missing_labels(dataset: Dataset, columns: Sequence[str]) -> list[int]:
    """Return the numbers of the rows where a label is None, NaN or a blank word (an empty field of a CSV file)."""
    found: set[int] = set()
    for column in columns:
        found.update(number for number, value in enumerate(values_of(dataset, column)) if _is_missing(value))
    return sorted(found)


def _is_missing(value: Any) -> bool:
    blank = isinstance(value, str) and not value.strip()
    return value is None or blank or (isinstance(value, float) and math.isnan(value))


def read_labels(splits: Mapping[str, Dataset], config: DataConfig) -> tuple[dict[str, list[Any]], Any]:
    """Return each split's labels and the feature that describes them.

    Class: ids with `ClassLabel(names)`. Classes: sorted lists of ids with `List(ClassLabel(names))`. Number: floats
    with `Value("float32")`. Raises UserError for labels of the wrong kind, ids that are not 0..n-1, and classes that
    the training data lack.
    """
    if config.kind.label_kind == "number":
        return {split: _numbers(data, config.label_columns[0], split) for split, data in splits.items()}, Value(
            "float32"
        )
    if config.kind.label_kind == "class":
        column = config.label_columns[0]
        words = {split: [[word] for word in _words(data, column, split)] for split, data in splits.items()}
        stored = _stored_names(splits["train"].features[column])
    else:
        words, stored = _word_lists(splits, config)
    names = _class_names(words["train"], config, stored)
    known: dict[Word, int] = {name: number for number, name in enumerate(names)}
    if stored is not None or config.label_names is not None or not _are_names(words["train"]):
        known.update((number, number) for number in range(len(names)))
    ids = {split: _ids(rows, known, names, split, config) for split, rows in words.items()}
    _enough_classes(ids["train"], names, config)
    feature = ClassLabel(names=names)
    if config.kind.label_kind == "class":
        return {split: [row[0] for row in rows] for split, rows in ids.items()}, feature
    return {split: [sorted(set(row)) for row in rows] for split, rows in ids.items()}, List(feature)


def label_space(splits: Mapping[str, Dataset], config: DataConfig) -> LabelSpace:
    """Return the label space of splits that came from `load_splits`."""
    kind = config.kind
    if kind.label_kind == "tokens":
        return LabelSpace(0, (), None)
    features: Features = splits["train"].features
    if kind.label_kind == "number":
        return LabelSpace(1, (config.label_columns[0],), kind.problem_type)
    feature = features["label"] if kind.label_kind == "class" else features["label"].feature
    return LabelSpace(len(feature.names), tuple(feature.names), kind.problem_type)


def _numbers(dataset: Dataset, column: str, split: str) -> list[float]:
    feature, values = dataset.features[column], values_of(dataset, column)
    wrong = [number for number, value in enumerate(values) if not isinstance(value, (int, float))]
    if isinstance(feature, ClassLabel) or wrong:
        # One word makes a whole column of a CSV file words, the numbers among them.
        number = next((number for number in wrong if not _is_number(values[number])), wrong[0] if wrong else None)
        given = "class labels" if number is None else f"{values[number]!r} in row {number}"
        raise UserError(f"data.{split}: column {column!r} holds {given}, but regression needs numbers.")
    infinite = [row for row, value in enumerate(values) if not math.isfinite(value)]
    if infinite:
        raise UserError(f"data.{split}: column {column!r} is infinite in {rows_named(infinite)}. Give finite numbers.")
    return [float(value) for value in values]


def _is_number(word: Any) -> bool:
    try:
        float(word)
    except (TypeError, ValueError):
        return False
    return True


def _stored_names(feature: Any) -> list[str] | None:
    feature = getattr(feature, "feature", feature)
    return list(feature.names) if isinstance(feature, ClassLabel) else None


def _words(dataset: Dataset, column: str, split: str) -> list[Word]:
    """Return each row's class as a word or an id; booleans count as the ids 0 and 1."""
    reader = _word_reader(dataset.features[column])
    values = values_of(dataset, column)
    words = [reader(value) for value in values]
    if wrong := [number for number, word in enumerate(words) if word is None]:
        # One fraction makes all numbers of a column fractions: it is the one to show.
        number = next((number for number in wrong if not _is_whole(values[number])), wrong[0])
        raise UserError(
            f"data.{split}: column {column!r} holds {values[number]!r} in row {number}, but a class is a whole number "
            "from 0 or a word. For numbers on a scale, set data.task: regression; for several classes per row, "
            "data.task: multi-label-classification."
        )
    return [word for word in words if word is not None]


def _is_whole(value: Any) -> bool:
    return isinstance(value, float) and value.is_integer()


def _word_reader(feature: Any) -> Callable[[Any], Word | None]:
    stored = _stored_names(feature)

    def read(value: Any) -> Word | None:
        if isinstance(value, int):
            return stored[value] if stored is not None and 0 <= value < len(stored) else int(value)
        return value if isinstance(value, str) else None

    return read


def _word_lists(
    splits: Mapping[str, Dataset], config: DataConfig
) -> tuple[dict[str, list[list[Word]]], list[str] | None]:
    columns = config.label_columns
    if len(columns) > 1:
        rows = {
            split: [list(row) for row in zip(*(values_of(data, column) for column in columns), strict=True)]
            for split, data in splits.items()
        }
        names = config.label_names or list(columns)
        return {split: _from_vectors(part, names, split) for split, part in rows.items()}, names
    column = columns[0]
    rows = {split: values_of(data, column) for split, data in splits.items()}
    for split, part in rows.items():
        number = next((n for n, row in enumerate(part) if not isinstance(row, (list, tuple))), None)
        if number is not None:
            raise UserError(
                f"data.{split}: column {column!r} holds {part[number]!r} in row {number}, but multi-label data need a "
                "list per row (class ids, class names, or 0/1 for every class) or several 0/1 columns in data.label."
            )
    stored = _stored_names(splits["train"].features[column])
    if stored is None and _are_vectors(rows["train"]):
        width = len(rows["train"][0])
        names = config.label_names or list(made_up_names(width))
        return {split: _from_vectors(part, names, split) for split, part in rows.items()}, names
    return {
        split: _listed_words(part, splits[split].features[column], column, split) for split, part in rows.items()
    }, stored


def _are_vectors(rows: list[list[Any]]) -> bool:
    """Lists of one length (at least 2) that hold only 0 and 1 are 0/1 vectors: as ids they would repeat themselves."""
    width = len(rows[0])
    return width >= 2 and all(len(row) == width and all(value in (0, 1) for value in row) for row in rows)


def _from_vectors(rows: list[list[Any]], names: list[str], split: str) -> list[list[Word]]:
    for number, row in enumerate(rows):
        if len(row) != len(names):
            raise UserError(
                f"data.{split}: the label in row {number} has {len(row)} entries, but there are {len(names)} classes "
                f"({', '.join(names[:SHOWN])}{', ...' if len(names) > SHOWN else ''}). Give one 0 or 1 for each."
            )
        if wrong := [value for value in row if value not in (0, 1)]:
            raise UserError(
                f"data.{split}: the label in row {number} holds {wrong[0]!r}, but a 0/1 label holds 0 and 1 only."
            )
    return [[name for name, value in zip(names, row, strict=True) if value] for row in rows]


def _listed_words(rows: list[list[Any]], feature: Any, column: str, split: str) -> list[list[Word]]:
    reader = _word_reader(feature)
    lists = []
    for number, row in enumerate(rows):
        words = [reader(value) for value in row]
        if None in words:
            raise UserError(
                f"data.{split}: column {column!r} holds {list(row)!r} in row {number}, but a list of classes holds "
                "whole numbers from 0 or words (or 0/1 for every class, with lists of one length)."
            )
        lists.append([word for word in words if word is not None])
    return lists


def _class_names(train: list[list[Word]], config: DataConfig, stored: list[str] | None) -> list[str]:
    if config.label_names is not None:
        return list(config.label_names)
    if stored is not None:
        return stored
    words = {word for row in train for word in row}
    if _are_names(train):
        names = sorted(str(word) for word in words)
        _warn_of_odd_names(names, len(train))
        return names
    if words != set(range(len(words))):
        raise UserError(
            f"the training labels are {_listed(words)}, but class ids must be 0, 1, ... without a gap. Renumber them, "
            "write the classes as words (they get ids in sorted order), or, when the training data lack a class, name "
            "every class in data.label_names. (-1 often marks labels that are hidden.)"
        )
    return list(made_up_names(len(words)))


def _warn_of_odd_names(names: list[str], rows: int) -> None:
    """Say what is rarely meant: names that differ in capital letters or blanks alone, and nearly as many as rows."""
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(name.strip().casefold(), []).append(name)
    for group in (group for group in alike.values() if len(group) > 1):
        logger.warning("The labels %s are different classes.", ", ".join(map(repr, group)))
    if rows >= MANY_ROWS and 2 * len(names) > rows:
        logger.warning("The training data have %d classes in %d rows. Check data.label.", len(names), rows)


def _are_names(rows: list[list[Word]]) -> bool:
    return all(isinstance(word, str) for row in rows for word in row)


def _ids(
    rows: list[list[Word]], known: dict[Word, int], names: list[str], split: str, config: DataConfig
) -> list[list[int]]:
    wrong = [number for number, row in enumerate(rows) if any(word not in known for word in row)]
    if wrong:
        unknown = {word for number in wrong for word in rows[number] if word not in known}
        hint = " Labels of -1 are usually hidden ones: such a split cannot be scored." if -1 in unknown else ""
        raise UserError(
            f"data.{split}: label {_listed(unknown)} in {rows_named(wrong)} of column "
            f"{', '.join(config.label_columns)!r} is not among the classes {_listed(names)} "
            f"({'data.label_names' if config.label_names else 'those of the training data'}).{hint}"
        )
    return [[known[word] for word in row] for row in rows]


def _enough_classes(train: list[list[int]], names: list[str], config: DataConfig) -> None:
    present = {number for row in train for number in row}
    if not present:
        raise UserError("no training row has any label, so there is nothing to learn. Check data.label and data.train.")
    if config.kind.label_kind == "class" and len(present) < 2:
        raise UserError(
            f"every training row has the same label ({names[present.pop()]!r}), so there is nothing to learn. Check "
            "data.label and data.train."
        )


def _listed(words: Any) -> str:
    ordered = list(words) if isinstance(words, list) else sorted(words, key=lambda word: (isinstance(word, str), word))
    shown = (text if len(text := str(word)) <= LONGEST else f"{text[: LONGEST - 3]}..." for word in ordered[:20])
    return ", ".join(shown) + (f" and {len(ordered) - 20} more" if len(ordered) > 20 else "")
