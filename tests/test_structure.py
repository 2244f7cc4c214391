"""The structure of the source: imports go down the ranks, files and functions stay small, and other house rules."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "layerdistill"
FILES = sorted(SOURCE.rglob("*.py"))

RANKS = {
    "core": 0,
    "models": 1, "data": 1, "matching": 1,
    "signals": 2,
    "methods": 3, "evaluate": 3, "diagnose": 3, "train": 3,
    "kept": 5, "recipe": 5,
    "recipe_problems": 6,
    "prepare": 7,
    "teacher_needs": 8,
    "finetune": 9, "teacher_cache": 9, "run_folder": 9, "context": 9,
    "measurement": 10,
    "runner": 11, "api": 11,
    "caching": 12, "plan_cache": 12, "plan_output": 12,
    "plan": 13, "study": 13, "diagnosis": 13,
    "report": 14,
    "demo": 15,
    "cli": 16,
    "__init__": 17, "__main__": 17,
}  # fmt: skip
"""A module may import modules of lower rank, and of its own package."""

FUNCTION_LEVEL_IMPORTS = {"cli", "__init__"}
"""Where imports inside functions are allowed: a command line has to answer `--help` at once."""


def package_of(path: Path) -> str:
    """The first part of a module's name below layerdistill."""
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported(tree: ast.AST) -> list[tuple[str, int]]:
    """Every layerdistill package a tree imports, with the line."""
    found = []
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module] if node.module != "layerdistill" else [f"layerdistill.{a.name}" for a in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found += [(name.split(".")[1], node.lineno) for name in names if name.startswith("layerdistill.")]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_go_down_the_ranks(path: Path) -> None:
    ours = package_of(path)
    assert ours in RANKS, f"{ours} has no rank: add it to RANKS"
    up = [
        f"line {line}: {ours} (rank {RANKS[ours]}) imports {theirs} (rank {RANKS[theirs]})"
        for theirs, line in imported(ast.parse(path.read_text()))
        if theirs != ours and RANKS[theirs] >= RANKS[ours]
    ]
    assert not up


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_files_and_functions_stay_small_and_documented(path: Path) -> None:
    text = path.read_text()
    tree = ast.parse(text)
    assert ast.get_docstring(tree), "a module says in one sentence what it holds"
    assert text.count("\n") <= 400, "more than 400 lines: ask what this file really is"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= 60, f"{node.name} has {length} lines"
    assert undocumented(tree) == []


def undocumented(tree: ast.Module | ast.ClassDef) -> list[str]:
    """Public classes, functions and methods without a docstring (not those inside functions or private classes)."""
    found = []
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            found += [] if ast.get_docstring(node) else [node.name]
            found += undocumented(node) if isinstance(node, ast.ClassDef) else []
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_are_at_the_top(path: Path) -> None:
    if package_of(path) in FUNCTION_LEVEL_IMPORTS:
        return
    inside = [
        f"line {inner.lineno}"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for inner in ast.walk(node)
        if isinstance(inner, ast.Import | ast.ImportFrom)
    ]
    assert not inside


def test_no_pickle_is_read() -> None:
    offenders = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "pickle.load", "pickle.loads"):
                safe = any(
                    keyword.arg == "weights_only" and ast.unparse(keyword.value) == "True" for keyword in node.keywords
                )
                if not safe:
                    offenders.append(f"{path.name}:{node.lineno}")
    assert not offenders


def test_the_readme_has_a_line_for_every_file() -> None:
    readme = (ROOT / "README.md").read_text()
    missing = [
        str(path.relative_to(SOURCE)) for path in FILES if path.name != "__init__.py" and f"{path.name} " not in readme
    ]
    assert not missing, "the file tree in README.md lacks: " + ", ".join(missing)


def test_report_needs_no_torch() -> None:
    for path in (SOURCE / "report").rglob("*.py"):
        names = {
            alias.name.split(".")[0]
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Import)
            for alias in node.names
        } | {
            (node.module or "").split(".")[0]
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.ImportFrom)
        }
        assert not names & {"torch", "transformers"}
