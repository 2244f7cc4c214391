"""Recipes: numbers as everyone means them, overrides, a round trip without loss, one sentence per mistake."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from toy_recipe import toy_recipe

import layerdistill as ld
from layerdistill.core.errors import UserError
from layerdistill.methods.kd import KdConfig
from layerdistill.methods.table import METHODS
from layerdistill.recipe import Recipe, apply_override, dump_recipe, load_recipe, recipe_schema

RECIPE: dict[str, Any] = {
    "teacher": {"model": "teacher"},
    "student": {"num_blocks": 2},
    "data": {"task": "sequence-classification", "train": "train.jsonl", "text": "text"},
    "method": {"name": "kd"},
}


def changed(path: str, value: Any) -> dict[str, Any]:
    """The recipe with one key set."""
    recipe = target = copy.deepcopy(RECIPE)
    *sections, last = path.split(".")
    for section in sections:
        target = target.setdefault(section, {})
    target[last] = value
    return recipe


def problems_of(recipe: Any, overrides: list[str] | None = None) -> tuple[str, ...]:
    with pytest.raises(UserError) as caught:
        load_recipe(recipe, overrides)
    return caught.value.problems


# Numbers


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5e-4", 5e-4), ("5.0e-4", 5e-4), ("5E-4", 5e-4), ("1e3", 1000.0), ("-2e+3", -2000.0), (".5", 0.5),
        ("1.", 1.0), ("1.5", 1.5), (".inf", float("inf")), ("1", 1), ("-3", -3), ("0", 0), ("1_000", 1000),
        ("0x10", 16), ("5e", "5e"), ("e5", "e5"), ("1.2.3", "1.2.3"), ("w5e4", "w5e4"), ("'5e-4'", "5e-4"),
        ('"1"', "1"), ("true", True), ("null", None), ("[1, 5e-4, a]", [1, 5e-4, "a"]),
    ],
)  # fmt: skip
def test_numbers_are_those_of_yaml_1_2(text: str, value: Any, tmp_path: Path) -> None:
    given: dict[str, Any] = {}
    apply_override(given, f"key={text}")
    assert given["key"] == value
    assert type(given["key"]) is type(value), "1 stays a whole number, a quoted number stays a string"


def test_a_file_with_a_rate_as_everyone_writes_it(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(
        "teacher: {model: teacher}\nstudent: {num_blocks: 2}\nmethod: {name: kd, temperature: 4}\n"
        "data: {task: sequence-classification, train: a.csv, text: t, label_names: ['1e3', '2']}\n"
        "training: {learning_rate: 5e-4, max_steps: 10}\nseed: 3\n"
    )
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert recipe.training == {"learning_rate": 0.0005, "max_steps": 10}
    assert type(recipe.training["max_steps"]) is int
    assert recipe.data.label_names == ["1e3", "2"]
    assert recipe.method.temperature == 4.0


# Overrides


def test_overrides_change_nested_keys_lists_and_new_sections() -> None:
    before = copy.deepcopy(RECIPE)
    recipe = load_recipe(
        RECIPE,
        [
            "training.learning_rate=5e-4", "data.train=[a.jsonl, b.jsonl]", "data.label_names=[neg, pos]",
            "method.name=ild", "method.weights.hidden=0.5", "method.layer_map=[[1, 4], [2, final]]", "seed=7",
            "training.lr_scheduler_kwargs={a: 1}", "output=runs/a=b",
        ],
    )  # fmt: skip
    assert recipe.training == {"learning_rate": 0.0005, "lr_scheduler_kwargs": {"a": 1}}
    assert recipe.data.train == ["a.jsonl", "b.jsonl"]
    assert recipe.data.label_names == ["neg", "pos"]
    assert recipe.method.name == "ild"
    assert recipe.method.weights.model_dump() == {"task": 1.0, "logits": 1.0, "hidden": 0.5}
    assert recipe.method.layer_map == [(1, 4), (2, "final")]
    assert recipe.seed == 7
    assert recipe.output == "runs/a=b", "only the first equals sign divides"
    assert before == RECIPE, "the dict that was given is left alone"


def test_a_later_override_wins() -> None:
    assert load_recipe(RECIPE, ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize(
    ("override", "fragments"),
    [
        ("training.max_steps", ["'training.max_steps'", "section.key=value"]),
        ("=3", ["'=3'", "section.key=value"]),
        ("training..max_steps=3", ["section.key=value"]),
        ("student.num_blocks.x=1", ["num_blocks is 2", "no keys below"]),
        ("seed=[1", ["seed=[1", "not valid YAML"]),
        ("training.max_step=3", ["training.max_step ", "'max_steps'"]),
        ("trainig.max_steps=3", ["trainig", "'training'"]),
        ("method.name=ckd", ["'ckd'", ", ".join(METHODS)]),
    ],
)
def test_an_override_that_cannot_be_is_refused(override: str, fragments: list[str]) -> None:
    problems = problems_of(RECIPE, [override])
    assert len(problems) == 1
    for fragment in fragments:
        assert fragment in problems[0]


# Reading and writing


def test_every_form_of_a_recipe_is_read_alike(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    from_file, from_dict = load_recipe(tmp_path / "recipe.yaml"), load_recipe(RECIPE)
    assert from_file.model_dump() == from_dict.model_dump()
    assert from_file.base == tmp_path.resolve()
    assert from_dict.base is None
    changed_again = load_recipe(from_file, ["seed=3"])
    assert changed_again.base == tmp_path.resolve(), "relative paths keep their meaning"
    assert changed_again.seed == 3
    assert from_file.seed == 42


def test_a_recipe_made_in_python_is_read() -> None:
    made = Recipe.model_validate({**RECIPE, "method": KdConfig(temperature=3.0)})
    assert load_recipe(made, ["seed=1"]).method == KdConfig(temperature=3.0)


GROWN = {name: value for name, value in RECIPE.items() if name != "student"}
NEEDED = {"l1_prune": {"removed": 0.3}}
"""What a method cannot do without."""

ROUND_TRIPS: list[dict[str, Any]] = [
    *(
        {**(GROWN if METHODS[name].grows_student else RECIPE), "method": {"name": name, **NEEDED.get(name, {})}}
        for name in METHODS
    ),
    changed("student", {"model": "some/student"}),
    changed("student", {"num_blocks": {"encoder": 2, "decoder": 1}, "copy_map": [0, 2, 1]}),
    changed("method", {"name": "cka", "layer_map": [[1, 4], ["final", "final"]], "weights": {"hidden": 1e-7}}),
    changed("data.label_names", ["5e-4", "1e3", "no", "1", "null", "ja: nein", "ü", "2024-01-01", ".5", ""]),
    changed("training", {"learning_rate": 3e-05, "max_steps": 7, "optim_args": "1e3", "warmup_steps": 0.1}),
    changed("data.text", ["first", "second"]),
    changed("evaluation", {"metrics": ["accuracy"], "latency_batch_sizes": [1, 8]}),
]


@pytest.mark.parametrize("given", ROUND_TRIPS, ids=lambda given: json.dumps(given)[-60:])
def test_what_is_written_is_read_back_as_the_same_recipe(given: dict[str, Any], tmp_path: Path) -> None:
    recipe = load_recipe(given)
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    again = load_recipe(tmp_path / "recipe.yaml")
    assert again.model_dump() == recipe.model_dump()
    assert dump_recipe(again) == dump_recipe(recipe)
    assert again.fingerprint() == recipe.fingerprint()
    written = yaml.safe_load(dump_recipe(recipe))
    assert list(written) == list(Recipe.model_fields), "complete, in the data's order"


def test_only_the_output_does_not_count_for_the_fingerprint() -> None:
    plain = load_recipe(RECIPE).fingerprint()
    assert load_recipe({**RECIPE, "output": "elsewhere"}).fingerprint() == plain
    assert load_recipe(dict(reversed(RECIPE.items()))).fingerprint() == plain
    assert load_recipe(changed("method.temperature", 2.0)).fingerprint() == plain, "a default written out"
    others = [
        "seed=1", "teacher.model=x", "student.num_blocks=3", "data.max_length=64", "method.temperature=3.0",
        "method.name=cka", "training.max_steps=3", "evaluation.latency=false",
    ]  # fmt: skip
    found = {load_recipe(RECIPE, [other]).fingerprint() for other in others}
    assert len(found | {plain}) == len(others) + 1


# The schema


def resolved(schema: dict[str, Any], node: dict[str, Any]) -> dict[str, Any]:
    """Follow a reference inside the schema."""
    while "$ref" in node:
        target: Any = schema
        for part in node["$ref"].removeprefix("#/").split("/"):
            target = target[part]
        node = target
    return node


def nodes(value: Any) -> list[dict[str, Any]]:
    """Every mapping inside a JSON value."""
    inner = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    return [*([value] if isinstance(value, dict) else []), *(node for item in inner for node in nodes(item))]


def test_the_schema_knows_every_section_method_and_option() -> None:
    schema = json.loads(json.dumps(recipe_schema()))
    assert list(schema["properties"]) == list(Recipe.model_fields)
    assert schema["additionalProperties"] is False
    method = resolved(schema, schema["properties"]["method"])
    branches = {resolved(schema, branch)["properties"]["name"]["const"]: branch for branch in method["oneOf"]}
    assert set(branches) == set(METHODS)
    for name, branch in branches.items():
        options = resolved(schema, branch)
        assert set(options["properties"]) == set(METHODS[name].Config.model_fields)
        assert options["additionalProperties"] is False
        undescribed = [key for key, field in options["properties"].items() if "description" not in field]
        assert undescribed == ["name"], "editors show what an option means"
    for node in nodes(schema):
        assert resolved(schema, node) is not None
        assert node.get("type", "object") in ("object", "array", "string", "number", "integer", "boolean", "null") or (
            isinstance(node["type"], dict)  # a property that is called `type`
        )


def test_the_schema_and_the_recipe_agree() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = recipe_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    for given in ROUND_TRIPS:
        assert list(validator.iter_errors(json.loads(json.dumps(given)))) == []
    for wrong in (changed("trainig", {}), changed("method.name", "ckd"), changed("data.task", "classification")):
        assert list(validator.iter_errors(wrong))


# Mistakes

MISTAKES: list[tuple[str, Any, list[str]]] = [
    ("trainig", {}, ["trainig is not a known key.", "'training'", "Allowed here: teacher, student, data"]),
    ("data.max_len", 8, ["data.max_len is not a known key.", "Did you mean 'max_length'?"]),
    ("data.max_length", "long", ["data.max_length is 'long'", "integer"]),
    ("data.max_length", 1, ["data.max_length is 1", "greater than or equal to 2"]),
    ("data.text", ["a", "b", "c"], ["data.text is ['a', 'b', 'c']", "at most 2"]),
    ("data.task", "classification", ["data.task", "Did you mean 'sequence-classification'?"]),
    ("data.padding", "longst", ["data.padding is 'longst'", "Did you mean 'longest'?"]),
    ("teacher", "model", ["teacher is 'model'", "dictionary"]),
    ("student", {}, ["student is empty", "num_blocks"]),
    ("student.num_blocks", 0, ["student.num_blocks is 0: Input should be greater than 0."]),
    ("student.num_blocks", {"encoder": 2, "middle": 1}, ["student.num_blocks.middle", "'encoder' or 'decoder'"]),
    ("student.copy_map", ["a"], ["student.copy_map.0 is 'a'", "integer"]),
    ("student.copy_map", "foward", ["Did you mean 'forward'?"]),
    ("method", {}, ["method.name is missing", ", ".join(METHODS)]),
    ("method.name", "klr", ["method.name is 'klr', which is no method", f"Allowed: {', '.join(METHODS)}."]),
    ("method.temprature", 2, ["method.temprature is not a known key.", "Did you mean 'temperature'?"]),
    ("method.temperature", 0, ["method.temperature is 0: Input should be greater than 0."]),
    ("method.weights", {"logit": 1}, ["method.weights.logit", "Did you mean 'logits'?", "task, logits."]),
    ("method.logits_loss", "forward-kl", ["method.logits_loss is 'forward-kl'", "Did you mean 'forward_kl'?"]),
    ("method", {"name": "ild", "layer_map": "foward"}, ["method.layer_map is 'foward'", "Did you mean 'forward'?"]),
    ("method", {"name": "ild", "layer_map": [[1, 2, 3]]}, ["method.layer_map.0 is [1, 2, 3]", "at most 2"]),
    ("method", {"name": "ild", "layer_map": 5}, ["method.layer_map is 5", "'forward'"]),
    ("evaluation.metrics", ["acuracy"], ["'acuracy'", "Did you mean 'accuracy'?"]),
    ("training", [1], ["training is [1]", "dictionary"]),
    ("training.lerning_rate", 1, ["training.lerning_rate", "Did you mean 'learning_rate'?"]),
    ("training.learning_rate", "5e-4", ["training.learning_rate is '5e-4'", "number"]),
    ("training.max_steps", 20.0, ["training.max_steps is 20.0", "integer"]),
    ("training.seed", 3, ["training.seed cannot be set", "the recipe's `seed`"]),
    ("output", 3, ["output is 3", "string"]),
    ("seed", "x", ["seed is 'x'", "integer"]),
]


@pytest.mark.parametrize(("path", "value", "fragments"), MISTAKES, ids=[f"{p}={v}" for p, v, _ in MISTAKES])
def test_one_mistake_is_one_sentence(path: str, value: Any, fragments: list[str]) -> None:
    problems = problems_of(changed(path, value))
    assert len(problems) == 1, problems
    for fragment in fragments:
        assert fragment in problems[0]
    assert "pydantic" not in problems[0]


@pytest.mark.parametrize("section", ["data", "method"])
def test_a_missing_section_is_named_with_what_it_is_for(section: str) -> None:
    problems = problems_of({name: value for name, value in RECIPE.items() if name != section})
    assert len(problems) == 1
    assert problems[0].startswith(f"{section} is missing. ")
    assert str(Recipe.model_fields[section].description) in problems[0]


def test_a_missing_student_is_named_beside_the_other_mistakes() -> None:
    recipe = {name: value for name, value in changed("training", {"lerning_rate": 1}).items() if name != "student"}
    first, second = problems_of(recipe)
    assert "lerning_rate" in first
    assert second.startswith("student is missing. ")


def test_all_mistakes_are_reported_together_and_each_once() -> None:
    recipe = changed("data.max_len", 8)
    recipe["trainig"] = {}
    recipe["method"] = {"name": "cka", "debiased": "perhaps", "form": "root"}
    recipe["training"] = {"lerning_rate": 1, "seed": 2, "max_steps": "ten"}
    recipe["student"] = {"num_blocks": -1, "hidden": 3}
    problems = problems_of(recipe)
    places = [problem.split()[0] for problem in problems]
    assert sorted(places) == sorted(
        [
            "data.max_len", "trainig", "method.debiased", "method.form", "training.lerning_rate", "training.seed",
            "training.max_steps", "student.num_blocks", "student.hidden",
        ]
    )  # fmt: skip


def test_a_missing_file_suggests_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "sst2.yaml").write_text("{}")
    problems = problems_of(tmp_path / "sst.yaml")
    assert f"There is no recipe file {tmp_path / 'sst.yaml'}. Did you mean 'sst2.yaml'?" in problems[0]


@pytest.mark.parametrize(
    ("content", "fragment"),
    [(b"a: [1", "is not valid YAML"), (b"- 1", "must hold a mapping"), (b"", "None"), (b"\xff\xfe\xfa", "YAML")],
)
def test_a_file_that_is_no_recipe(content: bytes, fragment: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes(content)
    problems = problems_of(tmp_path / "recipe.yaml")
    assert len(problems) == 1
    assert "recipe.yaml" in problems[0]
    assert fragment in problems[0]


def test_no_code_is_run_by_reading(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(f"!!python/object/apply:pathlib.Path.touch [{tmp_path / 'made'}]\n")
    problems_of(tmp_path / "recipe.yaml")
    assert not (tmp_path / "made").exists()


def test_a_recipe_cannot_be_changed_after_it_was_checked() -> None:
    recipe = ld.load_recipe(RECIPE)
    with pytest.raises(Exception, match="frozen"):
        recipe.seed = 3


def test_a_bare_off_in_yaml_is_the_word(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(toy_recipe(tmp_path)).replace("teacher:\n", "teacher:\n  cache: off\n"))
    recipe = load_recipe(path)
    assert recipe.teacher is not None and recipe.teacher.cache == "off"
    again = load_recipe(yaml.safe_load(dump_recipe(recipe)), ["teacher.cache=off"])
    assert again.teacher is not None and again.teacher.cache == "off"
    with pytest.raises(UserError, match=r"teacher\.cache is True"):
        load_recipe(path, ["teacher.cache=true"])
