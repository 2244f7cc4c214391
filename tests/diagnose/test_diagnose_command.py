"""`layerdistill diagnose` from end to end: a recipe, a finished run, a decoder, and wrong input."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from matplotlib.image import imread
from rich.console import Console
from task_recipes import task_recipe
from tiny_models import tiny_batch, tiny_model
from toy_recipe import toy_recipe

from layerdistill import cli, run
from layerdistill.core.errors import UserError
from layerdistill.diagnose.figures import MOST_PANELS, spread
from layerdistill.diagnose.importance import importance_profile
from layerdistill.diagnose.parts import PARTS, chosen_parts
from layerdistill.diagnose.states import LeftOut

FIGURES = {
    "angles": ["angles.png", "angle-histograms.png"],
    "gradients": ["gradients.png"],
    "similarity": ["similarity.png"],
    "importance": ["importance.png"],
    "clusterability": ["clusterability.png"],
}


def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, *arguments: str) -> tuple[int, str, str]:
    """Status, output and errors of one command in this process."""
    monkeypatch.setattr(cli, "console", Console(width=200))
    monkeypatch.setattr(sys, "argv", ["layerdistill", "diagnose", *arguments])
    status: Any = 0
    try:
        cli.main()
    except SystemExit as stopped:
        status = stopped.code or 0
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def written(folder: Path, recipe: dict[str, Any]) -> str:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return str(path)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the toy teacher and data, and a finished run of a narrower student in `run`."""
    folder = tmp_path_factory.mktemp("finished")
    run(toy_recipe(folder, "ild", evaluation={"cost": False}), ["training.max_steps=6"])
    return folder


def test_a_finished_run_before_and_after(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    before = contents(finished)
    status, out, err = call(monkeypatch, capsys, str(finished / "run"), "--examples", "20")
    assert status == 0, err
    place = finished / "run" / "diagnose"
    after = contents(finished)
    assert {name: after[name] for name in before} == before, "the run is only looked at"
    made = {path.name for path in place.iterdir()}
    assert made == {"diagnose.json", "diagnose.md", *(name for names in FIGURES.values() for name in names)}
    assert all(min(imread(place / name).shape[:2]) > 200 for names in FIGURES.values() for name in names)

    found = json.loads((place / "diagnose.json").read_text())
    assert (found["split"], found["examples"], found["students"]) == ("validation", 20, ["start", "trained"])
    assert list(found["parts"]) == list(PARTS)
    assert found["left_out"] == {}
    angles = found["parts"]["angles"]
    assert angles["start"]["alignment"] == "orthogonal"
    assert list(angles["trained"]["student_layers"]) == ["1", "2"]
    layer = angles["trained"]["student_layers"]["2"]
    assert len(layer["mean"]) == len(layer["null"]) == 5
    assert layer["tokens"][0][1] == found["tokens"]
    assert sum(layer["histogram_all_pairs"]["counts"]) == 10 * found["tokens"]
    assert layer["mean"] != angles["start"]["student_layers"]["2"]["mean"]
    released = angles["start"]["released"]
    assert sum(released["histogram"]["counts"]) == released["positions"] > found["tokens"], "padding is counted there"
    assert len(found["parts"]["similarity"]["trained"]["cka"]) == 3
    assert [len(found["parts"]["importance"][name]["block_influence"]) for name in ("teacher", "start")] == [4, 2]
    assert [len(found["parts"]["clusterability"][name]["ari"]) for name in ("teacher", "start")] == [5, 3]

    page = (place / "diagnose.md").read_text()
    said = " ".join(out.split())
    for sentence in (*angles["reading"], *found["parts"]["gradients"]["reading"]):
        assert sentence in page
        assert sentence in said
    assert "20 of the validation split" in said
    assert "mean angle" in out and "null" in out
    numbers = f"{layer['angle']:.1f}", f"{layer['null_angle']:.1f}"
    assert all(number in out for number in numbers), "the null is printed beside the angle"


def test_the_same_command_gives_the_same_numbers(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    for name in ("one", "two"):
        arguments = ["--examples", "12", "--parts", "similarity, angles", "--output", str(tmp_path / name)]
        assert call(monkeypatch, capsys, str(finished / "run"), *arguments)[0] == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    found = json.loads((tmp_path / "one" / "diagnose.json").read_text())
    assert list(found["parts"]) == ["angles", "similarity"]
    assert set(contents(tmp_path / "one")) == {
        "diagnose.json", "diagnose.md", *FIGURES["angles"], *FIGURES["similarity"],
    }  # fmt: skip


def test_a_run_made_again_has_no_diagnosis_of_the_run_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    recipe = toy_recipe(tmp_path, "none", evaluation={"cost": False})
    run(recipe, ["training.max_steps=1"])
    assert call(monkeypatch, capsys, str(tmp_path / "run"), "--examples", "6", "--parts", "similarity")[0] == 0
    assert (tmp_path / "run" / "diagnose").exists()
    run(recipe, ["training.max_steps=1"], again=True)
    assert not (tmp_path / "run" / "diagnose").exists()


def test_a_recipe_of_equal_width_shows_the_start_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    recipe = toy_recipe(tmp_path, "kd", student={"num_blocks": 4, "init": "copy"})
    status, _, err = call(
        monkeypatch, capsys, written(tmp_path, recipe), "--parts", "angles,gradients,similarity,clusterability",
        "--flatten", "--set", "data.max_length=16",
    )  # fmt: skip
    assert status == 0, err
    assert not (tmp_path / "run").exists(), "nothing is trained"
    found = json.loads((tmp_path / "diagnose" / "run" / "diagnose.json").read_text())
    assert found["students"] == ["start"]
    assert found["run"] is None
    assert found["parts"]["angles"]["start"]["alignment"] == "none"
    cka = found["parts"]["similarity"]["start"]["cka"]
    assert [cka[layer][layer] for layer in range(5)] == pytest.approx([1.0] * 5, abs=1e-4), "the student is a copy"
    assert found["parts"]["gradients"]["start"]["student_layers"]["3"]["parameters"][3][0] is None
    assert found["parts"]["clusterability"]["teacher"]["features"] == "flattened"


def test_a_language_model_has_no_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    recipe = written(tmp_path, task_recipe(tmp_path, "causal-lm"))
    status, out, err = call(monkeypatch, capsys, recipe, "--examples", "8", "--output", str(tmp_path / "out"))
    assert status == 0, err
    assert "Left out: clusterability, because the task causal-lm gives no single class" in out
    found = json.loads((tmp_path / "out" / "diagnose.json").read_text())
    assert list(found["parts"]) == ["angles", "gradients", "similarity", "importance"]
    assert list(found["left_out"]) == ["clusterability"]
    status, _, err = call(monkeypatch, capsys, recipe, "--examples", "8", "--parts", "clusterability")
    assert status == 2
    assert "--parts clusterability cannot be measured here: the task causal-lm" in err


WRONG: dict[str, tuple[list[str], list[str]]] = {
    "no-such-file": (["{folder}/nothing.yaml"], ["nothing.yaml"]),
    "folder-without-a-run": (["{folder}/teacher"], ["teacher holds no run", "recipe.yaml"]),
    "unfinished-run": (["{folder}/unfinished"], ["not finished", "layerdistill train"]),
    "unknown-part": (["{folder}/run", "--parts", "angels"], ["angels", "Did you mean 'angles'?"]),
    "no-part": (["{folder}/run", "--parts", ","], ["--parts names nothing"]),
    "one-example": (["{folder}/run", "--examples", "1"], ["--examples is 1", "at least 2"]),
    "another-student": (
        ["{folder}/run", "--set", "student.num_blocks=1"],
        ["student.num_blocks=1", "what this run was"],
    ),
    "output-is-a-file": (["{folder}/run", "--parts", "similarity", "--output", "{folder}/a-file"], ["a-file"]),
    "too-few-for-the-classes": (
        ["{folder}/run", "--parts", "clusterability", "--examples", "3"],
        ["3 examples cannot be put into 3 clusters"],
    ),
    "no-teacher": (["{folder}/alone.yaml"], ["no teacher"]),
    "wider-student": (["{folder}/wider.yaml", "--parts", "angles"], ["32 wide and the teacher's 16"]),
}


@pytest.fixture(scope="module")
def wrong_places(finished: Path) -> Path:
    shutil.copytree(finished / "run", finished / "unfinished")
    (finished / "unfinished" / "evaluation.json").unlink()
    (finished / "a-file").write_text("")
    recipe = toy_recipe(finished, "none")
    whole, cut = {"model": str(finished / "teacher")}, {"model": str(finished / "run" / "student")}
    alone = {key: value for key, value in recipe.items() if key != "teacher"} | {"student": whole}
    (finished / "alone.yaml").write_text(yaml.safe_dump(alone))
    (finished / "wider.yaml").write_text(yaml.safe_dump({**recipe, "teacher": cut, "student": whole}))
    return finished


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input(
    name: str, wrong_places: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    arguments, expected = WRONG[name]
    before = contents(wrong_places)
    status, _, errors = call(monkeypatch, capsys, *(argument.format(folder=wrong_places) for argument in arguments))
    assert status == 2, errors
    assert "Traceback" not in errors
    for fragment in expected:
        assert fragment in " ".join(errors.split())
    assert contents(wrong_places) == before


def test_parts_and_panels() -> None:
    assert chosen_parts(None) == list(PARTS)
    assert chosen_parts("importance,angles,angles") == ["angles", "importance"]
    with pytest.raises(UserError) as error:
        chosen_parts("angels,gradient")
    assert len(error.value.problems) == 2
    assert spread([1, 2, 3]) == [1, 2, 3]
    drawn = spread(list(range(1, 13)))
    assert len(drawn) == MOST_PANELS
    assert drawn[0] == 1 and drawn[-1] == 12


def test_importance_of_two_stacks_is_left_out_with_the_reason() -> None:
    model = tiny_model("bart")
    with pytest.raises(LeftOut, match="one stack of blocks"):
        importance_profile(model, "sequence-classification", [tiny_batch(model)])


def test_a_run_knows_where_its_recipe_lay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    recipe = toy_recipe(tmp_path / "project", "kd", evaluation={"cost": False})
    recipe["data"] |= {"train": "data/train.jsonl", "validation": "data/validation.jsonl"}
    recipe["output"] = str(tmp_path / "run")
    run(written(tmp_path / "project", recipe), ["training.max_steps=2"])
    monkeypatch.chdir(tmp_path)
    status, _, err = call(monkeypatch, capsys, "run", "--parts", "importance", "--examples", "8")
    assert status == 0, err
    (tmp_path / "project").rename(tmp_path / "elsewhere")
    status, _, err = call(monkeypatch, capsys, "run", "--parts", "importance", "--examples", "8")
    assert status == 2 and "no such file" in err
