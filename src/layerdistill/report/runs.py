"""Finished run folders into one row per method over its seeds: `python -m layerdistill.report.runs FOLDER`."""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from layerdistill.core.errors import UserError
from layerdistill.core.files import read_json
from layerdistill.report.comparison import ComparisonRow, markdown_table

VARIED = ("method", "student", "training", "seed", "output")
"""Sections that may differ between the runs of one table; its reader has to know in what."""


def collect_rows(folder: Path) -> list[ComparisonRow]:
    """Return the teacher's row and one per method, with the metrics of all its finished runs directly below `folder`.

    A run's folder is called METHOD-SEED; METHOD may say more than the method's name (`kd-6blocks-13`). Costs are those
    of the method's first run. Runs of different recipes (another teacher, data or evaluation) do not belong into one
    table: UserError names the first key that differs. So does a folder without a finished run.
    """
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    shared: dict[str, Any] | None = None
    for path in sorted(folder.glob("*/evaluation.json")):
        recipe = yaml.safe_load((path.parent / "recipe.yaml").read_text(encoding="utf-8"))
        rest = {key: value for key, value in recipe.items() if key not in VARIED}
        shared = shared or rest
        if differ := [key for key in rest if rest[key] != shared.get(key)]:
            raise UserError(f"{path.parent} has another {differ[0]} section than the runs before it in {folder}.")
        found[label_of(path.parent, recipe)].append(read_json(path))
    if not found:
        raise UserError(f"There is no finished run (a folder with evaluation.json) directly below {folder}.")
    first = next(iter(found.values()))[0]
    rows = []
    if "teacher" in first:  # a run of `none` may have had none
        cost = cost_of(first, "teacher")
        rows.append(ComparisonRow.from_cost("teacher", first["teacher"], cost, True, first.get("chance")))
    for method in sorted(found, key=lambda name: (name != "none", name != "kd", name)):
        runs = found[method]
        metrics = {name: [run["student"][name] for run in runs] for name in runs[0]["student"]}
        rows.append(
            ComparisonRow.from_cost(
                f"{method} ({len(runs)} seeds)",
                metrics,
                cost_of(runs[0], "student"),
                thrown_away=runs[0].get("thrown_away_parameters"),
            )
        )
    return rows


def cost_of(run: dict[str, Any], model: str) -> dict[str, Any]:
    """Return what a model of a run costs; empty where `evaluation.cost` was off."""
    return run.get("cost", {}).get(model, {})


def label_of(folder: Path, recipe: dict[str, Any]) -> str:
    """Return what the table calls a run: its folder's name without the seed at its end, else its method's name."""
    return folder.name.removesuffix(f"-{recipe['seed']}") or recipe["method"]["name"]


def main(arguments: Sequence[str]) -> None:
    """Print the table of the folder named in the arguments; wrong input ends the process with status 2."""
    parser = ArgumentParser(
        "python -m layerdistill.report.runs", description="Finished runs as one table, in Markdown."
    )
    parser.add_argument("folder", type=Path, help="the folder that holds the run folders")
    try:
        sys.stdout.write(markdown_table(collect_rows(parser.parse_args(arguments).folder)))
    except UserError as error:
        parser.error(" ".join(error.problems))


if __name__ == "__main__":
    main(sys.argv[1:])
