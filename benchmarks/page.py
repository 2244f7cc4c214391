"""Writes the page: `python -m benchmarks.page RESULTS.json PAGE.md`; the benchmark calls it by itself."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.arms.table import FLOOR, REFERENCE, WITH_HIDDEN
from benchmarks.summary import (
    PLAIN,
    STUDY_BATCH,
    STUDY_EPOCHS,
    STUDY_EXAMPLES,
    STUDY_METHODS,
    STUDY_RUN_WAYS,
    STUDY_SEEDS,
    STUDY_STEPS,
    WAYS,
    Ratio,
    Results,
    disagreements,
    hidden_share,
    not_the_students,
    peak_over_base,
    per_step,
    positions_per_step,
    ratio,
    share_of_part,
    study_seconds,
)

HOW = f"""Every arm runs in a process of its own, the tools compared with in an environment of their own (installed by
name from the package index). All start from the same models with random weights and the same random texts. The
processes take turns, block by block: A B C A B C ... A ratio is that of two blocks of one round; the tables give the
median over rounds and, in brackets, the smallest and the largest. Memory is the peak during the blocks over what was in
use when models and data were loaded, optimizer states and all. **R0** is the {REFERENCE.name}: the teacher in float32
under `no_grad` with `output_hidden_states=True` at every step, shuffled batches, dynamic padding, `torch.optim.AdamW`.
The **{FLOOR.name}** is the same loop with the teacher's outputs in memory: the student's own forward, backward and
optimizer step, and the losses. "Not the student's own" is the share of a step beyond the floor, where the batches are
the floor's; "teacher" the share in which the teacher is run or, from a cache, read, "hidden terms" the one in which
these are computed, forward and backward (both by the processor's clock, so not on an accelerator, and after the first
block). "Positions" are those of a step's batch on average, padding too: where texts of similar length come together
there are fewer, and blocks differ more from one another. layerdistill runs the models' blocks on packed texts, with
little of that padding, where that saves a tenth of the work (`training.padding_free`).

Before anything is timed, every arm does one step without dropout on the same first batch, and its loss terms are
compared with R0's; the column on the right says where they differ, and why."""


HIDDEN_ARMS = (REFERENCE.name, "layerdistill, cached, float32", "layerdistill, cached")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown; all columns but the first and the last are numbers."""
    align = ["---", *("---:" for _ in head[1:-1]), "---"]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, align, *rows))


def milliseconds(seconds: float | None) -> str:
    """Return a time per step for a cell."""
    return "" if seconds is None else f"{seconds * 1000:,.0f}" if seconds >= 0.1 else f"{seconds * 1000:.1f}"


def times(found: Ratio | None) -> str:
    """Return a ratio for a cell."""
    if found is None:
        return ""
    middle = f"{found.middle:.2f}"
    return middle if found.least == found.most == 1 else f"{middle} [{found.least:.2f}-{found.most:.2f}]"


def remarks(results: Results, name: str) -> str:
    """Return what is to be said of an arm: that it failed, or how its losses compare and what it does differently."""
    result = results[name]
    note = [result["note"]] if result.get("note") else []
    if "failed" in result:
        return f"**failed:** {result['failed']}".replace("|", "/")
    if name == REFERENCE.name:
        return "R0"
    different = disagreements(results, name)
    first = "first losses agree" if not different else "; ".join(different)
    return "; ".join([first, *note])


def percent(share: float | None) -> str:
    """Return a share for a cell."""
    return "" if share is None else f"{share:.1%}"


def work_table(results: Results, on_gpu: bool) -> str:
    """Return one work's table; on a GPU the time on the wall is what counts."""
    clock = "wall" if on_gpu else "cpu"
    reference = peak_over_base(results[REFERENCE.name]) if REFERENCE.name in results else None
    rows = []
    for name, result in results.items():
        peak, share = peak_over_base(result), not_the_students(results, name, clock)
        positions = positions_per_step(result)
        rows.append([
            name, milliseconds(per_step(result, "cpu")), times(ratio(results, name, "cpu")),
            milliseconds(per_step(result, "wall")), times(ratio(results, name, "wall")),
            "" if positions is None else f"{positions:,.0f}",
            "" if peak is None else f"{peak / 1e6:,.0f}",
            "" if peak is None or not reference else f"{peak / reference:.2f}",
            "" if share is None else f"{share:.0%}", "" if on_gpu else percent(share_of_part(result, "teacher")),
            "" if on_gpu else percent(share_of_part(result, "hidden")), remarks(results, name),
        ])  # fmt: skip
    head = [
        "arm", "CPU ms", "CPU / R0", "wall ms", "wall / R0", "positions", "MB over base", "/ R0",
        "not the student's own", "teacher", "hidden terms", "",
    ]  # fmt: skip
    return table(head, rows)


def study_section(works: Mapping[str, Results], on_gpu: bool) -> str:
    """Return the section on the study W4, which is computed from the parts."""
    clock = "wall" if on_gpu else "cpu"
    found = [(way.name, study_seconds(works, way, clock)) for way in WAYS]
    reference = dict(found).get(REFERENCE.name)
    rows = [
        [name, f"{seconds / 3600:.1f}", "" if reference is None else f"{seconds / reference:.2f}", ""]
        for name, seconds in found
        if seconds is not None
    ]
    if not rows:
        return ""
    methods = ", ".join(f"{method} ({work})" for method, work in STUDY_METHODS.items())
    text = f"""## W4: a study

**Computed, not run.** {len(STUDY_METHODS)} methods x {STUDY_SEEDS} seeds x {STUDY_EPOCHS} epochs over as many examples
as SST-2's train split has ({STUDY_EXAMPLES:,}: {STUDY_STEPS:,} steps of {STUDY_BATCH} in a pass), with the texts'
lengths of W1. The methods, and where their median times per step were measured: {methods}. Each is multiplied by its
steps; loading, evaluating and saving are not in it. Where a cache is filled, the first pass over the data has the cost
of filling it and all later ones, of every method and seed, that of reading it.

"""
    return text + table(["way", f"hours ({'wall' if on_gpu else 'process CPU'})", "/ R0", ""], rows)


def run_section(study: Mapping[str, Any] | None) -> str:
    """Return the section on the study as it was run on few examples, empty where it was not."""
    if study is None:
        return ""
    seconds, batches = study["seconds"], study["batches"]
    whole = {way: sum(seconds[way].values()) for way in STUDY_RUN_WAYS}
    rows = [
        [way, *(f"{seconds[way][method]:,.0f}" for method in STUDY_METHODS), f"{whole[way]:,.0f}",
         f"{whole[way] / whole[REFERENCE.name]:.2f}", ""]
        for way in STUDY_RUN_WAYS
    ]  # fmt: skip
    runs = len(STUDY_METHODS) * STUDY_SEEDS
    text = f"""### The same study, run

{len(STUDY_METHODS)} methods x {STUDY_SEEDS} runs x {STUDY_EPOCHS} epochs over {batches * STUDY_BATCH} examples ({runs}
runs of {batches * STUDY_EPOCHS} steps for each way), by `python -m benchmarks.study --batches {batches}` at commit
{study["machine"]["commit"]}, load {study["machine"]["load"]:.2f} before the start. Process seconds from making the
models to the last step, so that a cache's filling and checks and each run's setting up are in it. The methods are run
in this order: kd fills a cache with logits, and ild runs the teacher once more for the layers. So few examples are
unkind to a cache: what a run takes besides its steps weighs more than in a real study.

"""
    return text + table(["way", *STUDY_METHODS, "whole", "/ R0", ""], rows)


def hidden_section(works: Mapping[str, Results]) -> str:
    """Return the section on what hidden terms cost, empty where the work without them was not measured."""
    rows = []
    for work, arm in ((work, arm) for work in WITH_HIDDEN for arm in HIDDEN_ARMS if arm in works.get(work, {})):
        timed, without = share_of_part(works[work][arm], "hidden"), hidden_share(works, work, arm)
        rows.append([work, arm, percent(timed), percent(without), ""])
    if not any(without for *_, without, _ in rows):
        return ""
    text = f"""## What hidden terms cost

"Timed" is the share of a step in which they are computed, forward and backward. "Beyond {PLAIN}" is the share that
the same way (the cached one, whatever its products) does not take on {PLAIN}, which has no hidden terms: with it
the optimizer of the projections, and running the teacher or reading its states; a difference of two processes' steps.

"""
    return text + table(["work", "arm", "timed", f"beyond {PLAIN}", ""], rows)


def measured_on(given: Mapping[str, Any]) -> str:
    """Return the list of machine, versions and settings."""
    machine = given["machine"]
    lines = [
        f"Last part: {given['date']}; commit {machine['commit']}; command: `{given['command']}`",
        f"Processor: {machine['processor']}, {machine['cores']} cores, {machine['memory_gb']} GB; "
        f"{', '.join(machine['flags']) or 'none of the flags that matter'}",
        f"Torch threads: {given['threads']}; device: {given['device']}",
        f"{machine['system']}, Python {machine['python']}",
    ]
    versions: dict[str, str] = {}
    for results in given["works"].values():
        for result in results.values():
            versions |= result.get("versions", {})
    lines.append("Versions: " + ", ".join(f"{name} {found}" for name, found in sorted(versions.items())))
    return "\n".join(f"- {line}" for line in lines)


def write_page(given: Mapping[str, Any], path: Path) -> None:
    """Write the page from a result."""
    on_gpu = given["device"] != "cpu"
    parts = ["# Benchmarks", "What a step of distillation costs. Repeat it with `make bench`.", measured_on(given), HOW]
    for name, results in given["works"].items():
        machine = given["machine"]
        about = {
            "rounds": given["rounds"], "date": given["date"], "commit": machine["commit"], "load": machine["load"],
            **given["about"][name],
        }  # fmt: skip
        size = (
            f"{about['rounds']} rounds of blocks of {about['steps']} steps, {about['date']}, commit {about['commit']}, "
            f"load {about['load']:.2f} before the start."
        )
        parts += [f"## {name}: {about['title']}", f"{about['words']} {size}", work_table(results, on_gpu)]
    if not on_gpu:
        parts.append(hidden_section(given["works"]))
    parts.append(study_section(given["works"], on_gpu))
    parts.append(run_section(given.get("study")))
    path.write_text("\n\n".join(part for part in parts if part) + "\n")


if __name__ == "__main__":
    write_page(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
