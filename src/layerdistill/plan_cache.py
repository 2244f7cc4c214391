"""What a plan says of the teacher's cache: what it takes, what is there already, what a run will do."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn

from layerdistill.core.errors import UserError
from layerdistill.core.types import Needs
from layerdistill.models.config import TeacherConfig
from layerdistill.models.fast_dtype import fast_dtype
from layerdistill.prepare import Prepared, with_shapes
from layerdistill.signals.cache_folder import (
    MANIFEST_FILE,
    differences,
    read_manifest,
    refuse_a_used_folder,
    refuse_another,
)
from layerdistill.signals.cache_rows import StoredDtype
from layerdistill.signals.cache_size import cached_bytes, distinct_lengths
from layerdistill.signals.cached_teacher import kept_names
from layerdistill.teacher_cache import (
    SHARE_OF_DISK,
    WORTH_KEEPING,
    CacheConfig,
    cache_home,
    data_identity,
    free_at,
    spoken,
    stored_dtype,
)
from layerdistill.teacher_needs import AskingStage, needs_of

SAFETENSORS_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}

OF_THE_TEACHER = ("teacher", "teacher's class", "padding token")
"""What a cache belongs to that is known only once the teacher is loaded."""


@dataclass(frozen=True)
class CacheQuote:
    """What signals of a recipe's teacher take on the disk: its shape, the dtype they are kept in, the examples."""

    model: nn.Module
    dtype: StoredDtype
    lengths: list[int]
    language_model: bool

    @classmethod
    def of(cls, prepared: Prepared, section: TeacherConfig) -> CacheQuote:
        """Return the quote for a recipe's teacher and training data."""
        pair = with_shapes(prepared.pair, prepared.teacher_config, prepared.student_config, prepared.labels)
        assert pair.teacher is not None, "a teacher section comes with a model"
        dtype = stored_dtype(CacheConfig("auto", section.cache_dtype), dtype_of_teacher(prepared, section))
        lengths = distinct_lengths(prepared.datasets["train"])
        return cls(pair.teacher, dtype, lengths, prepared.recipe.data.task == "causal-lm")

    def bytes_of(self, needs: Needs, there: Collection[str] = ()) -> int:
        """Return the bytes of what `needs` asks for, without the signals that are `there`."""
        return cached_bytes(needs, self.model, self.dtype, self.lengths, self.language_model, there)

    def names(self, needs: Needs) -> list[str]:
        """Return the names under which `needs` is kept."""
        return kept_names(needs, self.language_model)


def dtype_of_teacher(prepared: Prepared, section: TeacherConfig) -> str:
    """Return the dtype that the teacher's weights will have, as far as it can be told without reading them."""
    if section.dtype != "auto":
        return fast_dtype() if section.dtype == "fast" else section.dtype
    if section.finetune is not None:
        return "float32"  # it is trained, and kept, in full
    known = getattr(prepared.teacher_config, "dtype", None)
    if known is not None:
        return str(known).rpartition(".")[2]
    for path in sorted(Path(str(prepared.teacher_source)).glob("*.safetensors")):
        with safe_open(path, framework="pt") as weights:
            return SAFETENSORS_DTYPES.get(weights.get_slice(next(iter(weights.keys()))).get_dtype(), "")
    return ""


def cache_sentences(
    prepared: Prepared, section: TeacherConfig, stages: Sequence[AskingStage], quote: CacheQuote
) -> Iterator[str]:
    """Yield what of the signals that `stages` read is kept already, and what a run will do about the rest.

    The teacher's weights are not read for it; a run compares them and refuses, or passes over, another teacher's cache.
    """
    here = {**data_identity(prepared.datasets["train"], prepared.tokenizer), "cache_dtype": quote.dtype}
    names = quote.names(needs_of(stages))
    try:
        found = found_cache(section, here, names)
    except UserError as error:
        yield f"A run would refuse this: {' '.join(error.problems)}"
        return
    there = found[1] if found is not None else frozenset()
    certain = all(stage.certain for stage in stages)
    if found is not None:
        lacking = spoken(name for name in names if name not in there)
        state = (f"all of it but {lacking}" if lacking else "all of it") if certain else spoken(sorted(there))
        otherwise = "is refused" if section.cache_folder is not None else "is passed over"
        yield f"{found[0]} holds {state} for these data. (A run compares the weights; another teacher's {otherwise}.)"
    if not certain:
        yield {
            "auto": "A run reads what is there, and keeps what else a stage reads before it, if it is worth while.",
            "fill": "A run reads what is there, and keeps what else a stage reads before it.",
            "require": "A run reads what is there, and is refused at a stage that reads something else.",
        }[section.cache]
    elif said := rest_to_come(section, stages, quote, there):
        yield said


def found_cache(
    section: TeacherConfig, here: Mapping[str, Any], names: Sequence[str]
) -> tuple[Path, frozenset[str]] | None:
    """Return the cache of the data `here` with most of the signals `names`, and all that it holds; None without one.

    Raises UserError for a named folder that a run would refuse. Of an unnamed one, what is broken is passed over.
    """
    if section.cache_folder is not None:
        path = Path(section.cache_folder)
        refuse_a_used_folder(path)
        if not (path / MANIFEST_FILE).exists():
            return None
        manifest = read_manifest(path / MANIFEST_FILE)
        refuse_another(path, of_the_data(manifest), here)
        if lost := lost_shards(path, manifest):
            raise UserError(f"{path} lacks {', '.join(lost[:3])}. Delete the folder to have it made again.")
        return (path, frozenset(manifest["complete"])) if manifest["complete"] else None
    there = []
    for path in sorted(cache_home().glob("*/")):
        with suppress(UserError, OSError):
            manifest = read_manifest(path / MANIFEST_FILE)
            fits = not differences(of_the_data(manifest), here) and not lost_shards(path, manifest)
            if fits and set(names) & set(manifest["complete"]):
                there.append((path, frozenset(manifest["complete"])))
    return max(there, key=lambda found: len(found[1].intersection(names)), default=None)


def of_the_data(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a cache belongs to as far as it is known without its teacher."""
    return {name: value for name, value in manifest["identity"].items() if name not in OF_THE_TEACHER}


def lost_shards(folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    """Return the shards of a manifest that are missing or have another size; their content is not read."""
    shards = {shard["file"]: shard["bytes"] for shard in manifest["shards"]}
    return [
        name
        for name, size in shards.items()
        if not ((folder / name).exists() and (folder / name).stat().st_size == size)
    ]


def rest_to_come(
    section: TeacherConfig, stages: Sequence[AskingStage], quote: CacheQuote, there: frozenset[str]
) -> str:
    """Return what a run does about signals that are not `there`, stage by stage as it will; empty if all are."""
    free = SHARE_OF_DISK * free_at(Path(section.cache_folder) if section.cache_folder else cache_home())
    live, kept = [], 0
    for stage in stages:
        if there.issuperset(names := quote.names(stage.needs)):
            continue
        if section.cache == "require":
            return "A run would refuse this, for not all of it is there. Run `layerdistill cache` first."
        needed = quote.bytes_of(stage.needs, there)
        if section.cache == "auto" and stage.passes < WORTH_KEEPING:
            live.append(f"{stage.passes:.3g} passes over the data are fewer than {WORTH_KEEPING:g}")
        elif needed > free:
            live.append(f"{needed / 1e9:.3g} GB are needed, {free / SHARE_OF_DISK / 1e9:.3g} GB are free")
        elif section.cache == "auto" and needed > section.cache_gb * 1e9:
            live.append(f"{needed / 1e9:.3g} GB are needed, and teacher.cache_gb allows {section.cache_gb:g}")
        else:
            there, free, kept = there.union(names), free - needed, kept + 1
    if live and section.cache == "fill":
        return f"A run would refuse this: {live[0]}."
    if live:
        which = "every step" if len(live) == len(stages) else f"every step of {len(live)} of {len(stages)} stages"
        return f"The teacher would be run at {which}, and not kept: {live[0]}."
    return "A run keeps what is lacking before the first step that reads it." if kept else ""
