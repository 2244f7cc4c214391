"""The recipe: the sections' configs composed; load, override, report every problem at once, dump, JSON schema."""

from __future__ import annotations

import re
import types
import typing
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, Field, PrivateAttr, ValidationError

from layerdistill.core.config import SectionConfig
from layerdistill.core.errors import UserError, did_you_mean
from layerdistill.core.fingerprint import fingerprint_json
from layerdistill.data import DataConfig
from layerdistill.evaluate import EvaluationConfig
from layerdistill.methods.table import METHODS, MethodConfig
from layerdistill.models import StudentConfig, TeacherConfig
from layerdistill.train.arguments import training_problems


class Recipe(SectionConfig):
    """One run, completely: what is distilled into what, on which data, how, measured how, and written where."""

    teacher: TeacherConfig | None = None
    """The model to learn from; may be left out when student.model is given and the method is `none`."""

    student: StudentConfig | None = None
    """The model to train: a shape cut out of the teacher, or a pretrained model of its own; left out where the method
    makes the student out of the teacher step by step."""

    data: DataConfig
    """Task, files, columns."""

    method: MethodConfig
    """The method and its options; `layerdistill methods` lists them."""

    training: dict[str, Any] = Field(default_factory=dict)
    """transformers.TrainingArguments fields, under their own names."""

    evaluation: EvaluationConfig = EvaluationConfig()
    """Metrics and cost."""

    output: str = "runs/run"
    """The run folder; made relative to the current folder."""

    seed: int = Field(42, ge=0, lt=2**32)
    """Every random draw of the run is a function of it."""

    _base: Path | None = PrivateAttr(default=None)

    @property
    def base(self) -> Path | None:
        """The folder of the recipe file: relative paths are looked for there first, then in the current folder."""
        return self._base

    @property
    def student_loading(self) -> StudentConfig | TeacherConfig:
        """The section that says how the student is loaded: its own, or its teacher's where it grows out of that."""
        section = self.student or self.teacher
        assert section is not None, "prepare() has seen to it"
        return section

    def fingerprint(self) -> str:
        """Return what identifies the result: everything but where it is written."""
        return fingerprint_json({**self.model_dump(mode="json"), "output": None})


class RecipeLoader(yaml.SafeLoader):
    """YAML with the numbers of YAML 1.2: `5e-4` is a number, as everyone who writes it means."""


class RecipeDumper(yaml.SafeDumper):
    """Puts quotes around words that RecipeLoader would read as numbers."""


for reads_or_writes in (RecipeLoader, RecipeDumper):
    reads_or_writes.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\d[\d_]*\.?\d*|\.\d+)([eE][-+]?\d+)?$|^[-+]?\.(inf|Inf)$|^\.nan$"),
        list("-+0123456789."),
    )
RecipeLoader.yaml_implicit_resolvers = {
    key: sorted(value, key=lambda pair: pair[0] != "tag:yaml.org,2002:int")
    for key, value in RecipeLoader.yaml_implicit_resolvers.items()
}


def load_recipe(
    source: str | Path | dict[str, Any] | Recipe, overrides: list[str] | None = None, base: Path | None = None
) -> Recipe:
    """Read a recipe from a YAML file, a dict or a Recipe, with `a.b=c` overrides applied.

    Relative paths of data begin in `base`, by default in the file's folder.
    Raises UserError with one sentence per problem: unknown keys, wrong types, impossible training arguments.
    """
    if isinstance(source, Recipe):
        base, given = base or source.base, source.model_dump(mode="json")
    elif isinstance(source, dict):
        given = dict(source)
    else:
        path = Path(source)
        given, base = read_yaml(path), base or path.resolve().parent
    for override in overrides or []:
        apply_override(given, override)
    problems = [] if not isinstance(given.get("training"), dict) else training_problems(given["training"])
    problems += student_problems(given)
    try:
        recipe = Recipe.model_validate(given)
    except ValidationError as error:
        raise UserError(*explain(error), *problems) from error
    if problems:
        raise UserError(*problems)
    recipe._base = base
    return recipe


def student_problems(given: dict[str, Any]) -> list[str]:
    """Return whether the student section is missing, or there though the method makes the student itself."""
    method = given.get("method")
    name = method.get("name") if isinstance(method, dict) else None
    grows = name in METHODS and METHODS[str(name)].grows_student
    there = given.get("student") is not None
    if there and grows:
        return [f"student cannot be set: the method {name!r} makes the student out of the teacher. Leave it out."]
    if not there and not grows:
        return ["student is missing. Give a shape to cut out of the teacher (num_blocks: 3), or a model of its own."]
    return []


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping; raises UserError for a missing file, bad YAML, or anything but a mapping."""
    if not path.is_file():
        near = sorted(other.name for other in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
        raise UserError(f"There is no recipe file {path}.{did_you_mean(path.name, near)} Give the path of a YAML file.")
    try:
        given = yaml.load(path.read_text(encoding="utf-8"), Loader=RecipeLoader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(given, dict):
        raise UserError(
            f"{path} must hold a mapping with the sections {', '.join(Recipe.model_fields)}; it holds {given!r:.60}."
        )
    return given


def apply_override(given: dict[str, Any], override: str) -> None:
    """Apply one `a.b=c`; the value is read as YAML. Raises UserError when it is not of that form."""
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise UserError(
            f"--set {override!r} cannot be read: write section.key=value, for example training.max_steps=20."
        )
    try:
        value = yaml.load(text, Loader=RecipeLoader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        raise UserError(f"--set {override!r}: the value is not valid YAML ({error}). Put it in quotes.") from error
    for part in parts[:-1]:
        if not isinstance(given.setdefault(part, {}), dict):
            raise UserError(f"--set {override!r}: {part} is {given[part]!r}, which has no keys below it.")
        given[part] = dict(given[part])
        given = given[part]
    given[parts[-1]] = value


def explain(error: ValidationError, within: tuple[str, ...] = ()) -> list[str]:
    """Return one sentence per problem of a recipe (or of the section `within` it), in this project's own words."""
    found: dict[tuple[int | str, ...], Any] = {}
    for item in error.errors():
        location = tuple(part for part in (*within, *item["loc"]) if not is_type_name(part))
        # Of a union's branches, the one whose type fits says what is wrong; the others only say that theirs does not.
        if location not in found or (is_wrong_type(found[location]) and not is_wrong_type(item)):
            found[location] = item
    outer = {location[:depth] for location in found for depth in range(len(location))}
    return [explain_one(item, location) for location, item in found.items() if location not in outer]


def is_wrong_type(item: Any) -> bool:
    """Whether pydantic's error item says that a value is of the wrong kind altogether."""
    return item["type"].endswith("_type")


def is_type_name(part: int | str) -> bool:
    """Whether pydantic put this part into a location to say which branch of a union it tried."""
    return isinstance(part, str) and ("[" in part or part in ("int", "str", "float", "bool", "constrained-int"))


def explain_one(item: Any, location: tuple[int | str, ...]) -> str:
    """Return the sentence for one of pydantic's error items."""
    place = ".".join(str(part) for part in location if part not in METHODS)
    given = item.get("input")
    if item["type"] == "extra_forbidden":
        allowed = allowed_keys(location[:-1])
        listed = f" Allowed here: {', '.join(allowed)}." if allowed else ""
        return f"{place} is not a known key.{did_you_mean(str(location[-1]), allowed)}{listed}"
    if item["type"] == "missing":
        return f"{place} is missing. {field_doc(location)}".rstrip()
    if item["type"] == "union_tag_invalid":
        tag = str(item["ctx"]["tag"])
        return (
            f"{place}.name is {tag!r}, which is no method.{did_you_mean(tag, METHODS)} Allowed: {', '.join(METHODS)}."
        )
    if item["type"] == "union_tag_not_found":
        return f"{place}.name is missing: say which method, one of {', '.join(METHODS)}."
    if item["type"] == "value_error" and isinstance(given, dict):
        return f"{item['msg'].removeprefix('Value error, ')}."
    hint = ""
    if item["type"] == "literal_error" and isinstance(given, str):
        hint = did_you_mean(given, item["ctx"]["expected"].replace("'", "").replace(" or ", ", ").split(", "))
    return f"{place} is {given!r:.80}: {item['msg'].removeprefix('Value error, ')}.{hint}"


def section_at(location: tuple[int | str, ...]) -> type[BaseModel] | None:
    """Return the config class at a place of the recipe, or None where there is none."""
    current: type[BaseModel] | None = Recipe
    for part in location:
        if part in METHODS and current is None:
            current = METHODS[str(part)].Config
            continue
        if current is None or str(part) not in current.model_fields:
            return METHODS[str(part)].Config if part in METHODS else None
        current = model_in(current.model_fields[str(part)].annotation)
    return current


def model_in(annotation: Any) -> type[BaseModel] | None:
    """Return the only config class inside an annotation such as `DataConfig | None`."""
    candidates = (
        typing.get_args(annotation)
        if typing.get_origin(annotation) in (typing.Union, types.UnionType)
        else (annotation,)
    )
    models = [item for item in candidates if isinstance(item, type) and issubclass(item, BaseModel)]
    return models[0] if len(models) == 1 else None


def allowed_keys(location: tuple[int | str, ...]) -> list[str]:
    """Return the keys that a section may have."""
    section = section_at(location)
    return list(section.model_fields) if section is not None else []


def field_doc(location: tuple[int | str, ...]) -> str:
    """Return what a field is for."""
    section = section_at(location[:-1])
    field = section.model_fields.get(str(location[-1])) if section is not None else None
    return (field.description or "") if field is not None else ""


def dump_recipe(recipe: Recipe) -> str:
    """Return the complete recipe, defaults included, as YAML."""
    given = recipe.model_dump(mode="json")
    return yaml.dump(given, Dumper=RecipeDumper, sort_keys=False, allow_unicode=True, width=120)


def recipe_schema() -> dict[str, Any]:
    """Return the JSON schema that editors use to complete and check a recipe."""
    return Recipe.model_json_schema()
