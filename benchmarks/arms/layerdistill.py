"""layerdistill as its users have it: `LayerDistillationTrainer` and a method by its name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from datasets import Dataset

import layerdistill as ld
from benchmarks.arms.timed import TimedTeacher, TimedTerm
from benchmarks.arms.trainer_subclass import AfterStep, arguments_of
from benchmarks.setting import Setting, StepDone
from benchmarks.works import Work, make_projections, make_student, make_teacher
from layerdistill.core.types import Needs, Signal
from layerdistill.models.fast_dtype import fast_dtype
from layerdistill.signals.cache_folder import CacheFolder
from layerdistill.signals.cached_teacher import CachedTeacher, Filler


def layer_pairs(work: Work) -> list[tuple[int | str, int | str]]:
    """Return the matched layers by our names, which tell a block's output from what the final norm makes of it."""
    if work.family == "bert":
        return list(work.pairs)
    return [*work.pairs[:-1], ("final", "final")]


def method_of(work: Work, hidden_dtype: str | None) -> dict[str, Any]:
    """Return a work's objective as a recipe's method section."""
    if work.hidden == "none":
        return {"name": "kd", "temperature": work.temperature}
    method = {"temperature": work.temperature, "layer_map": layer_pairs(work), "hidden_dtype": hidden_dtype}
    return {"name": "cka", **method} if work.hidden == "cka" else {"name": "ild", "distance": work.hidden, **method}


class Live:
    """The teacher run at every step, everything at its default."""

    hidden_dtype: str | None = None
    """The recipe's `method.hidden_dtype`."""
    training: Mapping[str, Any] = {}
    """Fields of the recipe's training section."""

    def __init__(self, setting: Setting) -> None:
        self.work = setting.work
        self.student = make_student(self.work)
        self.trainer = ld.LayerDistillationTrainer(
            model=self.student,
            teacher_model=self.make_teacher().to(setting.device),
            method=method_of(self.work, self.hidden_dtype),
            args=ld.LayerDistillationConfig(**arguments_of(setting), **self.training),
            train_dataset=Dataset.from_list(setting.examples),
            data_collator=setting.collate,
            cache=self.make_cache(setting),
        )
        source = self.make_source(setting, self.trainer.teacher_source)
        self.trainer.teacher_source = self.teacher = TimedTeacher(source)
        self.start_projections()
        self.hidden = [TimedTerm(term) for term in self.trainer.composite.terms if term.name == "hidden"]

    def make_teacher(self) -> Any:
        """Return the teacher as it is run."""
        return make_teacher(self.work)

    def make_cache(self, setting: Setting) -> ld.CacheConfig | None:
        """Return where what the teacher says is kept, None to run it at every step."""
        return None

    def make_source(self, setting: Setting, found: Any) -> Any:
        """Return what says what the teacher says, the trainer's own unless it is to be another."""
        return found

    @property
    def parts(self) -> dict[str, float]:
        """The processor seconds of parts of the steps since the start."""
        hidden = {"hidden": sum(term.seconds for term in self.hidden)} if self.hidden else {}
        return {"teacher": self.teacher.seconds, **hidden}

    def start_projections(self) -> None:
        """Begin with the projections that every arm begins with."""
        hidden = [term for term in self.trainer.composite.terms if term.name == "hidden"]
        if not hidden or not len(hidden[0].projections):
            return
        maps = hidden[0].projections["only"].maps
        for given, (ours, _) in zip(make_projections(self.work), layer_pairs(self.work), strict=True):
            maps[str(ours)].load_state_dict(given.state_dict())

    @property
    def losses(self) -> dict[str, torch.Tensor]:
        """The terms since the last log line, the hidden one averaged over its pairs."""
        means = {name: total / count for name, (total, count) in self.trainer.term_log.sums.items()}
        grouped: dict[str, list[torch.Tensor]] = {}
        for name, mean in means.items():
            grouped.setdefault(name.partition("/")[0], []).append(mean)
        return {name: torch.stack(found).mean() for name, found in grouped.items()}

    def train(self, step_done: StepDone) -> None:
        """Train until `step_done` raises."""
        self.trainer.add_callback(AfterStep(step_done))
        self.trainer.train()


class BestLive(Live):
    """Teacher and hidden products in what is fast here; batches of similar length and the rest are defaults."""

    hidden_dtype = "fast"

    def make_teacher(self) -> Any:
        """Return the teacher as `teacher.dtype: fast` has it."""
        return make_teacher(self.work).to(getattr(torch, fast_dtype()))


class Cached(BestLive):
    """The teacher read from the disk; it was run once over the data before the first step."""

    def make_cache(self, setting: Setting) -> ld.CacheConfig:
        """A cache of this process."""
        return ld.CacheConfig("fill", folder=setting.folder / "cache")


class CachedFloat32(Cached):
    """The same with the products of hidden terms in float32."""

    hidden_dtype = None


class CachedMixed(Cached):
    """The same with texts of all lengths in a batch, as the reference has them."""

    training: Mapping[str, Any] = {"train_sampling_strategy": "random"}


class FirstPass(BestLive):
    """The pass that fills the cache: the teacher is run on every batch, and what it says is kept."""

    def make_source(self, setting: Setting, found: Any) -> Any:
        """Return a source that keeps what the live one says."""
        kept = "bfloat16" if fast_dtype() == "bfloat16" else "float16"
        folder = CacheFolder(setting.folder / "cache", {"teacher": "the work's"}, kept)
        folder.prepare()
        return Keeping(CachedTeacher(found, folder, self.work.family == "gpt2"))


class Keeping:
    """A teacher source that runs the teacher and keeps what it says."""

    def __init__(self, cached: CachedTeacher) -> None:
        self.cached = cached
        self.model = cached.model
        self.filler: Filler | None = None

    def signal(self, batch: Any, needs: Needs) -> Signal:
        """Return what the live teacher says."""
        self.filler = self.filler or Filler(self.cached, needs)
        return self.filler.add(batch) or self.cached.live.signal(batch, needs)
