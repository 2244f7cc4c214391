"""The `data` section of a recipe."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from layerdistill.core.config import SectionConfig
from layerdistill.core.errors import did_you_mean
from layerdistill.data.tasks import TASKS, Task

INSTALLED_DOCS = "installed-docs"
"""The source that is on every machine: docstrings of the standard library and of the project's dependencies."""

IN_MEMORY = "in-memory"
"""The source of data handed over in Python; written in the recipe so that `recipe.yaml` says so."""

SPLITS = ("train", "validation", "test")

Source = str | Annotated[list[str], Field(min_length=1)]
"""A file, several files, a folder, `owner/name[:config[:split]]` on the hub, `installed-docs` or `in-memory`."""


class DataConfig(SectionConfig):
    """Where the examples come from, which columns hold what, and how they are cut into model inputs."""

    task: Annotated[str, Field(json_schema_extra={"enum": list(TASKS)})]
    """Name of the task."""
    train: Source
    """Training data: file(s) (csv, tsv, json, jsonl, parquet, txt), a folder of `train`, `validation`, `test` files, a
    hub id `owner/name`, `owner/name:config` or `owner/name:config:split`, or `installed-docs`. A folder and
    `installed-docs` also bring the validation and test data that are not given."""
    validation: Source | None = None
    """Data looked at during training; same forms as `train`."""
    test: Source | None = None
    """Data touched only by the final evaluation and by `layerdistill evaluate`; same forms as `train`."""
    text: str | Annotated[list[str], Field(min_length=1, max_length=2)] | None = None
    """Column of the text, or two columns for pairs. May be left out (`text`) for `installed-docs` and `causal-lm`."""
    label: str | Annotated[list[str], Field(min_length=1)] = "label"
    """Column of the label. Multi-label: one column of lists (class ids, names, or 0/1 vectors) or several 0/1 columns.
    Not read for `causal-lm`."""
    label_names: Annotated[list[str], Field(min_length=2)] | None = None
    """Class names in the order of their ids. Default: the names stored with the data, else sorted words."""
    tokenizer: str | None = None
    """Folder or hub id of the tokenizer; default: the student's, else the teacher's."""
    max_length: int = Field(default=128, ge=2)
    """Tokens per example, special tokens included; longer texts are cut (their number is reported). With packing, the
    length of a block."""
    max_train_examples: int | None = Field(default=None, ge=1)
    """At most this many training examples: a subset that is the same whatever the recipe's seed. Causal LM: the first
    this many blocks."""
    max_eval_examples: int | None = Field(default=None, ge=1)
    """The same for validation and for test, each."""
    drop_empty: bool = False
    """Drop rows that have no text or no label instead of refusing the data; the number dropped is reported."""
    padding: Literal["longest", "max_length"] = "longest"
    """Pad a batch to its longest example, or always to `max_length`."""
    pad_to_multiple_of: int | None = Field(default=8, ge=1)
    """Round the padded length up to a multiple of this many tokens (never above `max_length`); most devices like it."""
    pack: bool = True
    """Causal LM: join the documents and cut them into full blocks of `max_length`. False: one document per example."""
    separator: Literal["eos", "none"] = "eos"
    """Causal LM: `eos` puts the end-of-text token after every row (rows are documents); `none` joins rows as they are
    (rows are lines of a running text, as in WikiText)."""
    stride: int | None = Field(default=None, ge=1)
    """Causal LM, held-out data: step in tokens between overlapping windows; what a window repeats is context and not
    scored. Default: windows do not overlap."""

    streaming: bool = False
    """Causal LM, training data: read and cut into blocks while they are trained on, and not held in memory; the files
    are then of one kind, and `training.max_steps` says when to stop."""
    shuffle_buffer: int = Field(default=1000, ge=0)
    """Streaming: the next block is drawn at random out of so many; 0 keeps their order."""

    @field_validator("task")
    @classmethod
    def _task_is_supported(cls, value: str) -> str:
        if value not in TASKS:
            raise ValueError(f"that task is not supported.{did_you_mean(value, TASKS)} Supported: {', '.join(TASKS)}")
        return value

    @field_validator("label_names")
    @classmethod
    def _names_differ(cls, value: list[str] | None) -> list[str] | None:
        if value is not None and len(set(value)) < len(value):
            raise ValueError("a name occurs twice; give each class its own name")
        return value

    @model_validator(mode="after")
    def _fits_the_task(self) -> Self:
        problems = [*self._column_problems(), *self._language_model_problems(), *self._stream_problems()]
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _column_problems(self) -> list[str]:
        problems = []
        if self.text is None and not self._text_may_be_left_out:
            problems.append("data.text is missing: name the column that holds the text, for example `text: sentence`")
        if len(self.text_columns) > self.kind.text_columns:
            problems.append(f"data.text names {len(self.text_columns)} columns, but {self.task} reads one; name one")
        for field, columns in (("text", self.text_columns), ("label", self.label_columns)):
            if twice := next((column for column in columns if columns.count(column) > 1), None):
                problems.append(f"data.{field} names the column {twice!r} twice; name each once")
        if both := set(self.text_columns) & set(self.label_columns):
            problems.append(
                f"data.text and data.label both name the column {both.pop()!r}; the label is what the text must tell"
            )
        if isinstance(self.label, list) and self.task != "multi-label-classification":
            problems.append(
                f"data.label names several columns ({', '.join(self.label)}), which only multi-label-classification "
                f"reads, but data.task is {self.task}; name one column"
            )
        return problems

    def _language_model_problems(self) -> list[str]:
        if self.stride is None:
            return []
        if self.kind.label_kind != "tokens" or not self.pack:
            return [f"data.stride is {self.stride}, but it has a meaning only for causal-lm with pack: true. Remove it"]
        if self.stride > self.max_length:
            return [
                f"data.stride ({self.stride}) is above data.max_length ({self.max_length}), so tokens between windows "
                f"would not be scored. Give at most {self.max_length}"
            ]
        return []

    def _stream_problems(self) -> list[str]:
        if self.streaming and (self.kind.label_kind != "tokens" or not self.pack):
            return ["data.streaming is true, but only causal-lm with pack: true can be streamed. Remove it"]
        if not self.streaming and self.shuffle_buffer != type(self).model_fields["shuffle_buffer"].default:
            return ["data.shuffle_buffer has a meaning only with data.streaming: true. Remove it, or add that"]
        return []

    @property
    def _text_may_be_left_out(self) -> bool:
        return self.kind.label_kind == "tokens" or INSTALLED_DOCS in (self.train, self.validation, self.test)

    @property
    def kind(self) -> Task:
        """The task's row in the table."""
        return TASKS[self.task]

    @property
    def text_columns(self) -> tuple[str, ...]:
        """The one or two columns that hold the text."""
        if self.text is None:
            return ("text",)
        return (self.text,) if isinstance(self.text, str) else tuple(self.text)

    @property
    def label_columns(self) -> tuple[str, ...]:
        """The column or columns that hold the label; none for language models."""
        if self.kind.label_kind == "tokens":
            return ()
        return (self.label,) if isinstance(self.label, str) else tuple(self.label)
