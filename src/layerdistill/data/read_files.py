"""Local data files (csv, tsv, json, jsonl, parquet, txt) read into memory, without any cache and without a network."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from datasets import Dataset

from layerdistill.core.errors import UserError

MAX_CSV_BLOCK = 1 << 30
"""Bytes of a CSV file from which column types are inferred; Arrow reads 32-bit block sizes."""


def read_files(paths: list[Path], text_columns: tuple[str, ...] = ()) -> Dataset:
    """Read and concatenate files of any of `SUFFIXES`.

    A `.txt` file is one row with the column `text`: the whole file, so that a language model reads it as one document.
    Columns named in `text_columns` stay text in csv and tsv files even where they look like numbers. A column missing
    from some of the files is filled with None. Raises UserError for an unknown suffix, a broken file, or columns of one
    name whose types do not go together.
    """
    tables = [_read_file(path, text_columns) for path in paths]
    try:
        return Dataset(pa.concat_tables(tables, promote_options="permissive") if len(tables) > 1 else tables[0])
    except (pa.ArrowInvalid, pa.ArrowTypeError, ValueError) as error:
        raise UserError(
            f"the columns of {', '.join(str(path) for path in paths)} cannot be used: {error}. Give columns of text, "
            "numbers and lists, of the same type in every file."
        ) from error


def known_suffix(path: Path) -> str:
    """Return the suffix that says how a file is read; raises UserError for one that is not known."""
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise UserError(f"{path} cannot be read as data: its name must end in {', '.join(SUFFIXES)}.")
    return suffix


def columns_of(dataset: Dataset, names: Sequence[str]) -> pa.Table:
    """Return columns of any data set, whatever its format or row selection, as one Arrow table."""
    return dataset.select_columns(list(names)).with_format("arrow")[:]


def values_of(dataset: Dataset, name: str) -> list[Any]:
    """Return one column as Python values."""
    return columns_of(dataset, [name])[name].to_pylist()


def table_of(rows: Iterable[dict[str, Any]], where: str) -> pa.Table:
    """Return rows as a table; a key missing from a row is None there. Raises UserError that names `where`."""
    rows = list(rows)
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise UserError(
                f"{where}: row {number} is {row!r}, but every row must be an object such as {{'text': ...}}."
            )
    columns = {key: None for row in rows for key in row}
    try:
        return pa.table({key: [row.get(key) for row in rows] for key in columns})
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise UserError(
            f"{where}: a column holds values of different types: {error}. Give each column one type."
        ) from error


def _read_file(path: Path, text_columns: tuple[str, ...]) -> pa.Table:
    reader = READERS[known_suffix(path)]
    try:
        table = reader(path, text_columns)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} cannot be read as {path.suffix[1:]}: {error}. Check that the file is whole and that its suffix is "
            f"right.{_hint(str(error))}"
        ) from error
    names = table.column_names
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"{path} has more than one column named {', '.join(map(repr, twice))}. Give each its own name.")
    return table


def _hint(error: str) -> str:
    """Return what files of spreadsheets and older systems mostly lack."""
    if "utf" in error.casefold():
        return " Save it as UTF-8."
    return " Columns are separated by commas in csv, by tabs in tsv." if "columns, got" in error else ""


def _read_delimited(path: Path, text_columns: tuple[str, ...], delimiter: str, quotes: bool) -> pa.Table:
    size = path.stat().st_size
    return pyarrow.csv.read_csv(
        path,
        read_options=pyarrow.csv.ReadOptions(block_size=min(max(size, 1) + 1, MAX_CSV_BLOCK)),
        parse_options=pyarrow.csv.ParseOptions(
            delimiter=delimiter, quote_char='"' if quotes else False, newlines_in_values=quotes
        ),
        convert_options=pyarrow.csv.ConvertOptions(column_types={name: pa.string() for name in text_columns}),
    )


def _read_csv(path: Path, text_columns: tuple[str, ...]) -> pa.Table:
    return _read_delimited(path, text_columns, delimiter=",", quotes=True)


def _read_tsv(path: Path, text_columns: tuple[str, ...]) -> pa.Table:
    # The IANA definition of tab-separated values knows no quotes, and GLUE's files hold unpaired ones.
    return _read_delimited(path, text_columns, delimiter="\t", quotes=False)


def _read_parquet(path: Path, _text_columns: tuple[str, ...]) -> pa.Table:
    return pyarrow.parquet.read_table(path)


def _read_jsonl(path: Path, _text_columns: tuple[str, ...]) -> pa.Table:
    rows = []
    with path.open(encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                rows.append(_parse_json(line, f"{path}, line {number}"))
    return table_of(rows, str(path))


def _read_json(path: Path, text_columns: tuple[str, ...]) -> pa.Table:
    text = path.read_text(encoding="utf-8-sig")
    if not text.lstrip().startswith("["):
        return _read_jsonl(path, text_columns)
    return table_of(_parse_json(text, str(path)), str(path))


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where}: not valid JSON ({error}). A .jsonl file holds one object per line; a .json file either that or "
            "one list of objects."
        ) from error


def _read_txt(path: Path, _text_columns: tuple[str, ...]) -> pa.Table:
    text = path.read_text(encoding="utf-8-sig")
    return pa.table({"text": [text]}) if text else pa.table({"text": pa.array([], pa.string())})


READERS: dict[str, Callable[[Path, tuple[str, ...]], pa.Table]] = {
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
    ".txt": _read_txt,
}
SUFFIXES = tuple(READERS)
"""The kinds of files that can be read."""
