"""Docstrings of Python source files, read with `ast` (nothing is imported), and cleaned into short plain prose."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

MAX_CHARACTERS = 300
"""Texts are cut at the last whole word before this many characters; about 70 tokens."""
MIN_CHARACTERS = 40
MIN_WORDS = 6
"""Shorter texts ("Return the length.") say nothing about their library."""

NOT_PROSE = re.compile(
    r"\s*(>>>|\.\. |:(param|type|returns?|rtype|raises)\b|@\w+|[#|+]{3,}|```"
    r"|(Args|Arguments|Attributes|Parameters|Params|Returns?|Yields|Raises|Examples?|Notes?|Usage) *::?\s*$)"
)
"""A line that begins so ends the prose: doctests, directives, fields, tables, decorators, sections."""
UNDERLINE = re.compile(r"\s*[-=~*]{3,}\s*")
"""A line under a heading, which ends the prose before the heading."""
ROLE = re.compile(r":[\w:]+:(?=`)|\s*<[^<>]*>`_*|[`*\[\]]|\b(?:https?|ftp)://\S+")
SPACE = re.compile(r"\s+")

Documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def docstrings(path: Path) -> Iterator[str]:
    """Yield the docstrings of a module, its classes and its functions, in source order, unindented.

    A file that is not valid Python (templates, code for other versions) yields nothing.
    """
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, RecursionError):
        return
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, Documented) and (text := ast.get_docstring(node)):
            yield text
        waiting.extend(child for child in reversed(getattr(node, "body", ())) if hasattr(child, "body"))


def prose(docstring: str, names: re.Pattern[str]) -> str | None:
    """Return the leading prose of a docstring as one line, or None when too little is left.

    Code, sections and markup are left out, because they would name the library; every match of `names` becomes `lib`.
    """
    lines: list[str] = []
    for line in docstring.splitlines():
        if UNDERLINE.fullmatch(line):
            lines = lines[:-1]
            break
        if NOT_PROSE.match(line) or sum(map(len, lines)) > 2 * MAX_CHARACTERS:
            break
        lines.append(line)
    text = ROLE.sub("", " ".join(lines))
    text = SPACE.sub(" ", names.sub("lib", text)).strip()
    if len(text) > MAX_CHARACTERS:
        text = text[: MAX_CHARACTERS + 1].rsplit(" ", 1)[0]
    return text if len(text) >= MIN_CHARACTERS and len(text.split()) >= MIN_WORDS else None
