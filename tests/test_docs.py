"""The documentation is true: links lead somewhere, recipes load, code runs, tables say what the code says."""

from __future__ import annotations

import ast
import os
import re
from dataclasses import fields
from itertools import groupby
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml
from pydantic import BaseModel, TypeAdapter
from safetensors.torch import load_file
from test_structure import RANKS
from toy_recipe import toy_recipe, write_data, write_teacher
from transformers import TrainingArguments

from layerdistill import run
from layerdistill.cli import app
from layerdistill.core.files import read_json
from layerdistill.data import TASKS, DataConfig
from layerdistill.evaluate import EvaluationConfig
from layerdistill.evaluate.config import DEFAULT_METRICS, TASK_METRICS
from layerdistill.methods.table import METHODS, MethodConfig
from layerdistill.models import StudentConfig, TeacherConfig
from layerdistill.recipe import Recipe, RecipeLoader, load_recipe, recipe_schema
from layerdistill.train.config import RESERVED, LayerDistillationConfig

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "layerdistill"
README = ROOT / "README.md"
RECIPES = ROOT / "docs" / "recipes.md"
PAGES = sorted([README, ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
SECTIONS: dict[str, type[BaseModel]] = {
    "The whole": Recipe,
    "teacher": TeacherConfig,
    "student": StudentConfig,
    "data": DataConfig,
    "evaluation": EvaluationConfig,
}
PHRASES = ("**Idea.**", "**Equation.**", "**When to use it.**", "**When not.**", "**Cost.**", "**Measured:**")


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(path: Path, language: str) -> list[str]:
    """The fenced code blocks of a page in one language (`""`: those that name none)."""
    found: list[tuple[str, list[str]]] = []
    inside = False
    for line in path.read_text().splitlines():
        if line.startswith("```"):
            inside = not inside
            if inside:
                found.append((line.removeprefix("```"), []))
        elif inside:
            found[-1][1].append(line)
    assert not inside, f"{named(path)} has a fence that is not closed"
    return ["\n".join(lines) for given, lines in found if given == language]


def read_yaml(text: str) -> Any:
    """YAML as recipes read it."""
    return yaml.load(text, Loader=RecipeLoader)  # noqa: S506 - a SafeLoader


def yaml_blocks() -> list[Any]:
    return [
        pytest.param(text, id=f"{named(path)}-{number}")
        for path in PAGES
        for number, text in enumerate(blocks(path, "yaml"))
    ]


def part(path: Path, heading: str) -> str:
    """The text below a heading of the second level."""
    found = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", path.read_text(), re.MULTILINE | re.DOTALL)
    assert found, f"{named(path)} has no part {heading!r}"
    return found[1]


def tables(text: str) -> list[list[list[str]]]:
    """The tables of a text: rows of cells, without the header and the ruler."""
    found = []
    for is_table, lines in groupby(text.splitlines(), key=lambda line: line.startswith("|")):
        if is_table:
            rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
            assert len({len(row) for row in rows}) == 1, f"cells are missing in the table that begins {rows[0]}"
            found.append(rows[2:])
    return found


def unquoted(cell: str) -> str:
    return cell.strip("`")


def anchors(path: Path) -> set[str]:
    """The anchors that a page's headings get: lower case, blanks become dashes."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=named)
def test_links_lead_somewhere(path: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        place, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        file = (path.parent / place).resolve() if place else path
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert not broken, f"{named(path)} links to what is not there: {', '.join(broken)}"


# Recipes


@pytest.mark.parametrize("text", yaml_blocks())
def test_yaml_is_a_recipe_or_sections_of_one(text: str) -> None:
    given = read_yaml(text)
    if {"teacher", "data", "method"} <= set(given):
        assert load_recipe(given).method.name == given["method"]["name"]
    else:
        rest = {
            "teacher": {"model": "somewhere"},
            "student": {"num_blocks": 1},
            "data": {"task": "causal-lm", "train": "some.txt"},
            "method": {"name": "none"},
        }
        if METHODS[given.get("method", rest["method"])["name"]].grows_student:
            del rest["student"]
        assert load_recipe({**rest, **given}).output


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").rglob("*.yaml")), ids=named)
def test_recipes_that_come_with_the_project_load(path: Path) -> None:
    assert load_recipe(path).method.name == read_yaml(path.read_text())["method"]["name"]


def choices(schema: Any) -> set[str]:
    """Every word that a JSON schema lists as allowed."""
    if isinstance(schema, list):
        return set().union(*map(choices, schema))
    if not isinstance(schema, dict):
        return set()
    own = {word for word in schema.get("enum", []) if isinstance(word, str)}
    return own | choices([value for key, value in schema.items() if key not in ("enum", "propertyNames")])


def default_of(section: type[BaseModel], key: str) -> Any:
    """The default as YAML would write it; `required` where there is none."""
    field = section.model_fields[key]
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    return list(value) if isinstance(value, tuple) else value


@pytest.mark.parametrize("name", SECTIONS)
def test_every_key_of_a_section_is_documented_with_its_default(name: str) -> None:
    section = SECTIONS[name]
    rows = {unquoted(row[0]): row for row in tables(part(RECIPES, name))[0]}
    assert list(rows) == list(section.model_fields)
    schema = section.model_json_schema()["properties"]
    for key, row in rows.items():
        given, default = read_yaml(unquoted(row[2])), default_of(section, key)
        if isinstance(default, BaseModel):
            assert default == type(default)()
            assert given == "all defaults"
        else:
            assert given == default, f"{name}.{key}: the page says {given!r}, the code {default!r}"
        if key != "task" and section is not Recipe:
            missing = [word for word in choices(schema[key]) if f"`{word}`" not in row[1]]
            assert not missing or key == "num_blocks", f"{name}.{key} may also be {missing}"
        assert len(row[3]) > 10, f"{name}.{key} has no meaning"


def leaves(config: type[BaseModel], prefix: str = "") -> dict[str, tuple[type[BaseModel], str]]:
    """Every key of a method's config with where it is declared; the keys of `weights` one by one."""
    found: dict[str, tuple[type[BaseModel], str]] = {}
    for key, field in config.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            assert field.default == field.annotation(), "the defaults are those of the inner section"
            found |= leaves(field.annotation, f"{prefix}{key}.")
        else:
            found[prefix + key] = (config, key)
    return found


def option_rows(method: str) -> dict[str, list[str]]:
    """The rows `key | of | type | default | meaning` of a method: of the shared table, and of its own if it has one."""
    text = part(RECIPES, "method")
    shared = tables(text)[0]
    rows = [row for row in shared if row[1] == "all" or method in row[1].split(", ")]
    _, heading, own = text.partition(f"### {method}\n")
    if heading:
        rows += [[row[0], method, *row[1:]] for row in tables(own)[0]]
    return {unquoted(row[0]): row for row in rows}


@pytest.mark.parametrize("method", METHODS)
def test_every_option_of_a_method_is_documented_with_its_default(method: str) -> None:
    ours = option_rows(method)
    expected = leaves(METHODS[method].Config)
    assert set(ours) == set(expected)
    for key, (section, field) in expected.items():
        row = ours[key]
        if key == "name":
            assert f"`{method}`" in row[2]
            continue
        given = read_yaml(unquoted(row[3]))
        assert given == default_of(section, field), f"method.{key}: the page says {given!r}"
        allowed = choices(section.model_json_schema()["properties"][field])
        assert {word for word in allowed if f"`{word}`" not in row[2]} == set(), f"choices of method.{key}"


def test_the_table_of_methods_names_no_option_that_is_gone() -> None:
    known = set().union(*(leaves(method.Config) for method in METHODS.values()))
    assert set().union(*(option_rows(method) for method in METHODS)) == known
    named = re.findall(r"^### (.*)$", part(RECIPES, "method"), flags=re.MULTILINE)
    assert set(named) <= set(METHODS)


def test_training_defaults_and_reserved_fields_are_documented() -> None:
    text = part(RECIPES, "training")
    theirs = {item.name: item for item in fields(TrainingArguments)}
    changed = {
        item.name
        for item in fields(LayerDistillationConfig)
        if item.name not in theirs or theirs[item.name].default != item.default
    }
    changed.remove("dataloader_pin_memory")  # its default depends on the machine
    assert "`dataloader_pin_memory`" in text
    documented = {unquoted(row[0]): read_yaml(unquoted(row[1])) for row in tables(text)[0]}
    assert changed <= set(documented)
    ours = {item.name: item.default for item in fields(LayerDistillationConfig)}
    assert documented == {name: ours[name] for name in documented}
    refused = text[text.index("Refused") :]
    assert [name for name in RESERVED if f"`{name}`" not in refused] == []
    mentioned = set(re.findall(r"`([a-z0-9_]+)(?::[^`]*)?`", text[: text.index("Defaults to know")]))
    assert len(mentioned) > 8
    assert mentioned <= set(theirs), f"not fields of TrainingArguments: {mentioned - set(theirs)}"


def test_tasks_and_their_metrics_are_documented() -> None:
    rows = tables(part(RECIPES, "data"))[1]
    metrics = {unquoted(row[0]): re.findall(r"`(\w+)`", row[2]) for row in rows}
    assert list(metrics) == list(TASKS)
    for task, names in metrics.items():
        assert set(names) == set(TASK_METRICS[task])
        assert tuple(names[: len(DEFAULT_METRICS[task])]) == DEFAULT_METRICS[task]


def test_the_schema_tells_every_field() -> None:
    schema = recipe_schema()
    silent = [
        f"{name}.{key}"
        for name, section in {"Recipe": schema, **schema["$defs"]}.items()
        for key, field in section["properties"].items()
        if "description" not in field and key != "name"
    ]
    assert not silent


def test_messages_that_are_explained_are_messages_of_the_code() -> None:
    said = []
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                said.append(
                    "".join(str(piece.value) if isinstance(piece, ast.Constant) else "{}" for piece in node.values)
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                said.append(node.value)
    rows = tables(part(RECIPES, "When something goes wrong"))[0]
    quoted = [unquoted(row[0]) for row in rows if row[0].startswith("`")]
    assert len(quoted) >= 12
    assert [message for message in quoted if not any(message in text for text in said)] == []


# Methods


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_its_page(method: str) -> None:
    page = ROOT / "docs" / "methods" / f"{method}.md"
    text = page.read_text()
    assert text.startswith(f"# {method}: ")
    assert [phrase for phrase in PHRASES if phrase not in text] == []
    examples = [read_yaml(block) for block in blocks(page, "yaml")]
    configs = [TypeAdapter(MethodConfig).validate_python(example["method"]) for example in examples]
    assert configs
    assert {config.name for config in configs} == {method}
    unnamed = [key for key in METHODS[method].Config.model_fields if key != "name" and f"`{key}`" not in text]
    assert not unnamed, f"docs/methods/{method}.md does not name the options {unnamed}"


def test_the_readme_lists_every_method_with_its_page() -> None:
    rows = tables(part(README, "Methods"))[0]
    assert {unquoted(row[0]): row[3] for row in rows} == {name: f"[page](docs/methods/{name}.md)" for name in METHODS}


# README and CONTRIBUTING


def test_the_file_tree_is_the_tree() -> None:
    tree = blocks(README, "")[0].splitlines()
    assert tree[0] == "src/layerdistill/"
    listed, folder = [], ""
    for line in tree[1:]:
        name, description = re.fullmatch(r" +(\S+) +(\S.*)", line).groups()  # type: ignore[union-attr]
        assert len(description) > 3
        if name.endswith("/"):
            folder = name
        else:
            listed.append((folder if line.startswith("    ") else "") + name)
    files = [str(path.relative_to(SOURCE)) for path in SOURCE.rglob("*.py") if path.name != "__init__.py"]
    assert sorted(listed) == sorted(files)
    assert len(listed) == len(set(listed))


def test_the_ranks_in_contributing_are_those_that_are_checked() -> None:
    line = next(block for block in blocks(ROOT / "CONTRIBUTING.md", "") if block.startswith("cli"))
    groups = [set(rank.split(" | ")) for rank in line.strip().split(" > ")]
    ranked = {name: rank for name, rank in RANKS.items() if not name.startswith("__")}
    assert groups == [
        {name for name in ranked if ranked[name] == rank} for rank in sorted(set(ranked.values()), reverse=True)
    ]


def test_commands_of_the_readme_exist() -> None:
    known = {command.name or command.callback.__name__ for command in app.registered_commands}
    used: set[str] = set()
    for path in (README, RECIPES):
        used |= set(re.findall(r"`layerdistill ([a-z]+)", path.read_text()))
        used |= set(re.findall(r"^layerdistill ([a-z]+)", "\n".join(blocks(path, "bash")), re.MULTILINE))
    assert used == known
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    pages = README.read_text() + (ROOT / "CONTRIBUTING.md").read_text()
    assert set(re.findall(r"`make ([a-z-]+)`", pages)) <= targets


def python_blocks() -> list[str]:
    return blocks(README, "python")


def test_the_examples_are_short() -> None:
    sizes = [len([line for line in text.splitlines() if line.strip()]) for text in python_blocks()]
    assert max(sizes) <= 12, "the Python example has twelve lines at most"
    recipe = [line for line in blocks(README, "yaml")[0].splitlines() if not line.startswith("#")]
    assert len(recipe) <= 10, "the recipe has ten lines at most"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the README's examples find: a teacher, data files, and a finished run in runs/first."""
    folder = tmp_path_factory.mktemp("readme")
    write_teacher(folder / "teacher", hidden_size=256)
    write_data(folder)
    recipe = toy_recipe(folder / "toy", "cka", output=str(folder / "runs" / "first"))
    recipe["teacher"]["dtype"] = "bfloat16"
    run(recipe, ["training.max_steps=2"])
    return folder


def test_the_python_of_the_readme_runs(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", place / "cache")
    loading, distilling = python_blocks()
    names: dict[str, Any] = {}
    exec(compile(loading, "README.md", "exec"), names)
    assert names["model"].config.num_hidden_layers == 2
    assert names["tokenizer"]("w1 w2")["input_ids"]
    names = {}
    exec(compile(distilling, "README.md", "exec"), names)
    result = names["result"]
    assert set(result.metrics) == set(DEFAULT_METRICS["sequence-classification"])
    config = result.student.config
    assert (config.num_hidden_layers, config.hidden_size, config.num_labels) == (3, 192, 3)
    log = (place / "runs" / "python" / "metrics.jsonl").read_text()
    assert "distill/hidden/3-4" in log or "train_loss" in log
    assert (place / "student" / "model.safetensors").exists()


def test_dtypes_are_those_the_readme_says(place: Path) -> None:
    folder = place / "runs" / "first"
    stored = {tensor.dtype for tensor in load_file(folder / "student" / "model.safetensors").values()}
    assert stored == {torch.float32}, "student.dtype is float32, whatever the teacher's is"
    cost = read_json(folder / "evaluation.json")["cost"]
    assert (cost["student"]["dtype"], cost["teacher"]["dtype"]) == ("float32", "bfloat16")


def test_a_run_folder_holds_what_concepts_says(place: Path) -> None:
    folder = place / "runs" / "first"
    named_there = [row[0] for row in tables(part(ROOT / "docs" / "concepts.md", "Files"))[0]]
    words = re.findall(r"`([^`]+)`", " ".join(named_there))
    tops = {word.split("/")[0] for word in words}
    assert tops - {"decisions.json"} == set(os.listdir(folder)), "this run's method had nothing to decide"
    assert (folder / "checkpoints" / "distill" / "finished").is_dir()
