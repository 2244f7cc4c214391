"""What a recipe would do, as tables: layers, vocabulary, parameters, memory, steps. Nothing is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sized
from dataclasses import replace
from typing import Any

import psutil
import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedConfig

from layerdistill.core.types import Needs, StagePreview
from layerdistill.matching import LayerMap, map_rows
from layerdistill.matching.vocabulary_loss import FEWEST_ROWS
from layerdistill.methods.table import find_method
from layerdistill.models import count_parameters, empty_model
from layerdistill.models.fast_dtype import fast_dtype
from layerdistill.plan_cache import CacheQuote, cache_sentences
from layerdistill.plan_output import found_run
from layerdistill.prepare import Prepared, WholeVocabulary, prepare, with_shapes
from layerdistill.recipe import Recipe, dump_recipe
from layerdistill.teacher_needs import asking_stages, needs_of

BYTES = 4
"""Bytes per float32 number."""

ADAM_COPIES = 4
"""Weights, gradients and the two moments of AdamW, all float32."""

STREAM_CACHE = {
    "auto": "the teacher is run at every step, for nobody knows whether an example of a stream comes again",
    "fill": "what the teacher says of the stream is kept as it is read, up to {gb:g} GB",
    "require": "the teacher is never run, so all of the stream must have been kept before",
}


def show_plan(recipe: Recipe, console: Console) -> Prepared:
    """Print the plan of a recipe and return what was prepared for it; raises UserError with every problem found."""
    prepared = prepare(recipe)
    console.print("[bold]Recipe, complete[/bold]")
    console.print(dump_recipe(recipe), markup=False, highlight=False)
    show_data(prepared, console)
    show_models(prepared, console)
    show_terms(prepared, console)
    show_cache(prepared, console)
    show_training(prepared, console)
    return prepared


def show_data(prepared: Prepared, console: Console) -> None:
    """Print the splits and the vocabulary check."""
    table = Table(title="Data", title_justify="left")
    for column in ("split", "examples", "tokens", "tokens per example"):
        table.add_column(column, justify="right" if column != "split" else "left")
    for name, split in prepared.datasets.items():
        if not isinstance(split, Sized):
            table.add_row(name, "a stream", "", "")
            continue
        tokens = tokens_in(split)
        table.add_row(name, f"{len(split):,}", f"{tokens:,}", f"{tokens / max(len(split), 1):.1f}")
    console.print(table)
    if prepared.labels.num_labels:
        console.print(f"Labels: {prepared.labels.num_labels} ({', '.join(prepared.labels.names or ['a number'])})")
    if prepared.whole is not None:
        console.print(trimmed_sentence(prepared, prepared.whole), highlight=False)
    elif prepared.vocabulary is not None:
        state = "the same token ids" if prepared.vocabulary.identical else f"different: {prepared.vocabulary.reason}"
        console.print(
            f"Vocabulary: teacher and student have {state}; {prepared.vocabulary.vocab_size:,} ids are compared."
        )


def trimmed_sentence(prepared: Prepared, whole: WholeVocabulary) -> str:
    """Return what a trimmed vocabulary keeps, and how much longer it makes texts that were not trained on."""
    share = len(whole.kept) / len(whole.tokenizer)
    longer = [
        f"{name}: {100 * (tokens_in(split) / tokens_in(whole.datasets[name]) - 1):.1f} % more tokens. "
        for name, split in prepared.datasets.items()
        if name != "train"
    ]
    return (
        f"Vocabulary: trimmed to {len(whole.kept):,} of {len(whole.tokenizer):,} tokens ({100 * share:.1f} %): what "
        "the training data needs, special tokens, single characters. " + "".join(longer)
    )


def tokens_in(split: Dataset) -> int:
    """Return the number of tokens in a split."""
    return sum(len(ids) for ids in split["input_ids"])


def show_models(prepared: Prepared, console: Console) -> None:
    """Print the shape and the parameters of both models, and what they need of memory."""
    table = Table(title="Models", title_justify="left")
    for column in ("model", "blocks", "width", "parameters", "of them embeddings", "MB (float32)"):
        table.add_column(column, justify="left" if column == "model" else "right")
    configs = {"teacher": prepared.teacher_config, "student": prepared.student_config}
    pair = prepared.pair
    for name, config in configs.items():
        if config is None:
            continue
        counts = parameters_of(prepared, config)
        depth = pair.teacher_depth if name == "teacher" else pair.student_depth
        width = pair.teacher_width if name == "teacher" else pair.student_width
        table.add_row(
            name, joined(depth), joined(width), f"{counts['total']:,}", f"{counts['embedding']:,}",
            f"{counts['total'] * BYTES / 1e6:.1f}",
        )  # fmt: skip
    console.print(table)
    teacher = parameters_of(prepared, prepared.teacher_config)["total"] if prepared.teacher_config is not None else 0
    student = parameters_of(prepared, prepared.student_config)["total"]
    needed = (ADAM_COPIES * student + teacher) * BYTES + activation_bytes(prepared)
    console.print(
        f"Memory: about {needed / 1e9:.2f} GB while training (student with AdamW, teacher, activations of one batch of "
        f"full length); {free_memory() / 1e9:.1f} GB are free here."
    )


def parameters_of(prepared: Prepared, config: PreTrainedConfig) -> dict[str, int]:
    """Return the parameter counts of a config's model with the task's head, without allocating it."""
    return count_parameters(empty_model(config, prepared.recipe.data.task, prepared.labels.num_labels or None))


def activation_bytes(prepared: Prepared) -> int:
    """Return roughly the bytes a full-length batch holds at most: 16 widths per block and token, and a chunk of logits.

    Beside the chunk there is the gradient of the head, made chunk by chunk.
    """
    recipe = prepared.recipe
    tokens = prepared.arguments.per_device_train_batch_size * recipe.data.max_length
    pair = prepared.pair
    per_token = sum(16 * pair.student_width[stack] * depth for stack, depth in pair.student_depth.items())
    numbers = tokens * per_token
    if recipe.data.task == "causal-lm":
        rows = prepared.student_config.get_text_config().vocab_size
        numbers += 2 * rows * (max(pair.student_width.values()) + FEWEST_ROWS)
    return numbers * BYTES


def free_memory() -> int:
    """Return the free bytes where training would run: the accelerator, else this machine."""
    if torch.accelerator.is_available() and torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    return psutil.virtual_memory().available


def joined(values: Any) -> str:
    """Return `6`, or `6 + 6` for two stacks."""
    return " + ".join(str(value) for value in values.values())


def show_terms(prepared: Prepared, console: Console) -> None:
    """Print the method's terms with their coefficients, and each layer map in both index forms."""
    recipe = prepared.recipe
    console.print(f"Method: [bold]{recipe.method.name}[/bold], {find_method(recipe.method.name).summary}")
    pair = with_shapes(prepared.pair, prepared.teacher_config, prepared.student_config, prepared.labels)
    whole = count_parameters(pair.teacher)["total"] if pair.teacher is not None else 0
    for stage in prepared.method.preview(pair, recipe.method):
        steps = f" ({steps_of(prepared, stage.training):,} steps)" if stage.training is not None else ""
        console.print(f"Stage {stage.name}{steps}: {', '.join(stage.terms)}")
        for layer_map in stage.maps:
            console.print(layer_table(layer_map))
        for note in stage_notes(stage, whole):
            console.print(note, highlight=False)


def show_cache(prepared: Prepared, console: Console) -> None:
    """Print what keeping the teacher's signals would take, what is kept already, and what a run will do."""
    section, stages = prepared.recipe.teacher, asking_stages(prepared)
    if section is None or section.cache == "off" or not stages:
        return
    said, needs = f"Teacher cache ({section.cache}):", needs_of(stages)
    if needs.teacher_padding:
        refused = "" if section.cache == "auto" else " A run would refuse this: write teacher.cache: off."
        console.print(f"{said} none, for the method counts padding.{refused}", highlight=False)
        return
    if not isinstance(prepared.datasets["train"], Sized):
        console.print(f"{said} {STREAM_CACHE[section.cache].format(gb=section.cache_gb)}.", highlight=False)
        return
    quote = CacheQuote.of(prepared, section)
    about = "" if all(stage.certain for stage in stages) else "about "
    console.print(
        f"{said} {about}{quote.bytes_of(needs) / 1e9:.3g} GB in {quote.dtype} for {len(quote.lengths):,} distinct "
        f"examples, {signals_in_words(needs)}."
    )
    if about:
        console.print("Which layers it reads is chosen while the method runs; these are those of one choice.")
    for sentence in cache_sentences(prepared, section, stages, quote):
        console.print(sentence, markup=False, highlight=False)
    if section.dtype == "float32" and fast_dtype() == "bfloat16":
        console.print(
            "This machine multiplies bfloat16 natively: with teacher.dtype: fast the teacher takes less time."
        )


def signals_in_words(needs: Needs) -> str:
    """Return which signals of the teacher are read."""
    layers = [", ".join(map(str, sorted(found))) for found in (needs.teacher, needs.teacher_averages)]
    said = [f"layers {layers[0]}"] * bool(layers[0]) + [f"averages of layers {layers[1]}"] * bool(layers[1])
    said += [f"{len(needs.teacher_taps)} inputs of projections"] * bool(needs.teacher_taps)
    said += [f"its {which.k} likeliest tokens" for which in needs.teacher_top]
    return "; ".join(said + ["logits"] * needs.teacher_logits)


def steps_of(prepared: Prepared, changes: Mapping[str, Any]) -> int:
    """Return the optimisation steps of a stage that makes `changes` to the recipe's training, on one process."""
    return replace(prepared, arguments=prepared.arguments_with(changes)).total_steps


def stage_notes(stage: StagePreview, whole: int) -> list[str]:
    """Return what is to be said of a stage besides its terms; `whole` is the teacher's parameter count."""
    notes = list(stage.notes)
    if stage.thrown_away:
        notes.append(f"Helpers (projections, filters): {stage.thrown_away:,} parameters, trained and thrown away.")
    if stage.student_parameters is not None and whole:
        removed = 100 * (1 - stage.student_parameters / whole)
        notes.append(f"The student then has {stage.student_parameters:,} parameters ({removed:.2f} % removed).")
    return notes


def layer_table(layer_map: LayerMap) -> Table:
    """Return a layer map as a table, layers counted as in hidden_states and blocks from 0."""
    title = f"Layers of the {layer_map.stack or 'model'}: 0 is the embedding output, k the output of block k"
    table = Table(title=title, title_justify="left")
    for column in ("student layer", "teacher layer", "student block (from 0)", "teacher block (from 0)"):
        table.add_column(column, justify="right")
    for row in map_rows(layer_map):
        table.add_row(*(str(cell) for cell in row))
    return table


def show_training(prepared: Prepared, console: Console) -> None:
    """Print how many steps there will be."""
    arguments = prepared.arguments
    batch = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    per_epoch = "of a stream" if prepared.recipe.data.streaming else "per epoch"
    console.print(
        f"Training: steps of {batch} examples on one process, {prepared.steps_per_epoch:,} {per_epoch}, learning rate "
        f"{arguments.learning_rate:g}, seed {prepared.recipe.seed}. Output: {prepared.recipe.output}"
    )
    if said := found_run(prepared):
        console.print(said, markup=False, highlight=False)
    if arguments.train_sampling_strategy == "group_by_length" and prepared.recipe.data.task != "causal-lm":
        console.print(
            "Batches are of examples of like length, which saves padding; a loss over a batch (CKA) then compares "
            "texts of like length. training.train_sampling_strategy: random mixes them."
        )
    console.print("Nothing was trained. `layerdistill train` with the same recipe does it.")
