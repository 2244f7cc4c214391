"""The command line: parsing and calling, nothing else. Status 0 done, 2 wrong input, 130 interrupted, 1 our fault."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from layerdistill.core.errors import Interrupted, UserError
from layerdistill.core.quick_imports import quick_imports

app = typer.Typer(
    help="Layer-wise knowledge distillation of transformer language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()

RecipePath = Annotated[Path, typer.Argument(help="Recipe file (YAML).", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=C", help="Change one key of the recipe; may be repeated.")
]


@app.command()
def train(
    recipe: RecipePath,
    set_: Overrides = None,
    again: Annotated[bool, typer.Option(help="Delete what the output folder holds and start anew.")] = False,
) -> None:
    """Run a recipe; the same command goes on with one that was interrupted."""
    with quick_imports():
        from accelerate import PartialState

        from layerdistill.report.run_table import print_result
        from layerdistill.runner import run

    result = run(recipe, set_, again=again)
    if PartialState().is_main_process:
        print_result(result, console)


@app.command()
def plan(recipe: RecipePath, set_: Overrides = None) -> None:
    """Show the resolved recipe, layer table, vocabulary check, parameters, memory and steps; train nothing."""
    with quick_imports():
        from layerdistill.plan import show_plan
        from layerdistill.recipe import load_recipe

    show_plan(load_recipe(recipe, set_), console)


@app.command()
def cache(recipe: RecipePath, set_: Overrides = None) -> None:
    """Run the teacher once over the training data and keep what the method will read; runs then read that."""
    with quick_imports():
        from layerdistill.caching import fill_cache
        from layerdistill.recipe import load_recipe

    fill_cache(load_recipe(recipe, set_), console)


@app.command()
def kept(
    delete: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Delete this; may be repeated.")] = None,
    delete_unused: Annotated[
        float | None, typer.Option(metavar="DAYS", min=0, help="Delete what was not used for so many days.")
    ] = None,
) -> None:
    """List what runs have kept for later ones (teachers, their caches and predictions), or delete some of it."""
    with quick_imports():
        from layerdistill.kept import delete_kept, kept_table, list_kept

    if delete or delete_unused is not None:
        for entry in delete_kept(delete or (), delete_unused):
            console.print(f"Deleted {entry.kind} {entry.name}, {entry.bytes / 1e6:,.1f} MB.", highlight=False)
        return
    console.print(kept_table(list_kept()))


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="A run folder, a model folder or a hub id.", show_default=False)],
    recipe: RecipePath,
    set_: Overrides = None,
) -> None:
    """Measure a model on a recipe's data: metrics and cost, as JSON."""
    with quick_imports():
        from layerdistill.measurement import evaluate_folder
        from layerdistill.recipe import load_recipe

    console.print_json(json.dumps(evaluate_folder(model, load_recipe(recipe, set_))))


@app.command()
def diagnose(
    source: Annotated[
        Path, typer.Argument(metavar="RECIPE_OR_RUN", help="Recipe file, or a finished run folder.", show_default=False)
    ],
    set_: Overrides = None,
    output: Annotated[Path | None, typer.Option(help="Where results are written.", show_default="diagnose/")] = None,
    examples: Annotated[int, typer.Option(help="Rows of the validation split to look at.")] = 256,
    parts: Annotated[
        str | None,
        typer.Option(help="Some of angles,gradients,similarity,importance,clusterability.", show_default="all"),
    ] = None,
    flatten: Annotated[bool, typer.Option(help="Cluster whole token matrices, padding too, not their means.")] = False,
) -> None:
    """Look at teacher and student: angles and gradients with their null, similarity, importance, clusterability."""
    with quick_imports():
        from layerdistill.diagnosis import diagnose as run_diagnosis

    run_diagnosis(source, set_, output, examples, parts, flatten, console)


@app.command()
def methods() -> None:
    """List the methods."""
    with quick_imports():
        from layerdistill.methods.table import METHODS

    table = Table("method", "what it does", "options")
    for name, method in METHODS.items():
        options = ", ".join(field for field in method.Config.model_fields if field != "name")
        table.add_row(name, method.summary, options)
    console.print(table)


@app.command()
def schema() -> None:
    """Print the JSON schema of recipes, for editors."""
    with quick_imports():
        from layerdistill.recipe import recipe_schema

    typer.echo(json.dumps(recipe_schema(), indent=2))


@app.command()
def demo(output: Annotated[Path, typer.Option(help="Where everything is written.")] = Path("demo")) -> None:
    """Distil a real pretrained encoder by four methods on data every machine has; about five minutes."""
    with quick_imports():
        from layerdistill.demo import run_demo

    run_demo(output, console)


def main() -> None:
    """Run the command line and end the process with the status that says what happened."""
    try:
        if app(standalone_mode=False) == 130:  # typer catches Ctrl-C and returns this; commands return nothing
            raise KeyboardInterrupt
    except UserError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
    except (Interrupted, KeyboardInterrupt, typer.Abort) as error:
        print(str(error) or "Interrupted. Give the same command again to go on.", file=sys.stderr)
        sys.exit(130)
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except Exception as error:
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # click's own usage errors
            if message := error.format_message():
                print(f"error: {escape(message)}", file=sys.stderr)
            sys.exit(2)
        raise
