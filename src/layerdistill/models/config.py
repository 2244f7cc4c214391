"""The recipe's `teacher` and `student` sections."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, ValidationError, field_validator, model_validator

from layerdistill.core.config import SectionConfig
from layerdistill.core.errors import one_of
from layerdistill.models.shrink import COPY_MAPS, Init

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
TeacherDtype = Literal["fast", "auto", "float32", "bfloat16", "float16"]
CacheMode = Literal["auto", "off", "fill", "require"]
CacheDtype = Literal["auto", "float32", "float16", "bfloat16", "int8"]


class AdapterConfig(SectionConfig):
    """LoRA on the query, key and value projections of every block."""

    rank: PositiveInt = 32
    """Rows of A and columns of B."""
    alpha: PositiveFloat | None = None
    """`alpha / rank` multiplies B A; null is twice the rank."""
    dropout: float = Field(0.05, ge=0, lt=1)
    """Share of A's inputs set to 0 while training."""

    @property
    def scale(self) -> float:
        """`alpha`, or its default."""
        return 2.0 * self.rank if self.alpha is None else self.alpha


class TeacherConfig(SectionConfig):
    """The model that is learned from: a pretrained `model`, or an `architecture` to be trained from random weights."""

    model: str | None = None
    """A hub id, a folder, or `package:NAME/folder` inside an installed Python package; safetensors only."""
    architecture: dict[str, Any] | None = None
    """In place of `model`: `model_type` and fields of its transformers config, for example `{model_type: gpt2, n_layer:
    4}`. Starts from random weights, so `finetune` must train it; `data.tokenizer` gives the vocabulary."""
    finetune: dict[str, Any] | None = None
    """`TrainingArguments` fields with which to fit the teacher to the task first; kept and reused. Null: as it is.
    `lora: {rank: 32, alpha: 64, dropout: 0.05}` trains adapters and the head only, and merges them."""
    adapters: str | None = None
    """A folder with a LoRA adapter of peft (safetensors), merged into `model`; instead of `finetune`."""
    trust_remote_code: bool = False
    """Whether Python code that comes with the model may be run."""
    dtype: TeacherDtype = "float32"
    """Type of its weights when it teaches; `auto` takes the checkpoint's, `fast` bfloat16 where this machine multiplies
    it natively, else float32. A student cut out of it is made of the weights before that rounding."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    attn_implementation: str | None = None
    """`eager`, `sdpa`, `flash_attention_2`, ...; null lets transformers choose."""
    cache: CacheMode = "auto"
    """Whether what the teacher says is kept on the disk and read: auto (where that saves work and fits into
    `cache_gb`), off, fill (always), require (only read, never run)."""
    cache_dtype: CacheDtype = "auto"
    """How hidden states are kept; auto: float16, bfloat16 if the teacher is. int8 has a scale for each row. Logits are
    kept in float32."""
    cache_folder: str | None = None
    """Where; null is a folder named by its content in `$LAYERDISTILL_HOME/cache`, shared by all runs it fits."""
    cache_gb: PositiveFloat = 10.0
    """Gigabytes (10^9 bytes) above which `auto` runs the teacher instead."""

    @field_validator("cache", mode="before")
    @classmethod
    def _off_is_a_word(cls, given: Any) -> Any:
        return "off" if given is False else given  # YAML reads a bare off as false

    @field_validator("finetune")
    @classmethod
    def _complete_lora(cls, given: dict[str, Any] | None) -> dict[str, Any] | None:
        if given is None or "lora" not in given:
            return given
        try:
            lora = AdapterConfig.model_validate(given["lora"])
        except ValidationError as error:
            wrong = [f"{'.'.join(map(str, item['loc'])) or 'lora'}: {item['msg']}" for item in error.errors()]
            raise ValueError(
                f"teacher.finetune.lora is {given['lora']!r} ({'; '.join(wrong)}). It may hold "
                f"{', '.join(AdapterConfig.model_fields)}: for example {{rank: 32}}"
            ) from error
        return {**given, "lora": {**lora.model_dump(), "alpha": lora.scale}}

    @model_validator(mode="after")
    def _adapters_fit(self) -> TeacherConfig:
        if self.adapters is not None and (self.model is None or self.finetune is not None):
            raise ValueError(
                "teacher.adapters are merged into teacher.model as it is: give a model with it, and no finetune"
            )
        if self.architecture is not None and "lora" in (self.finetune or {}):
            raise ValueError(
                "teacher.finetune.lora trains adapters of a pretrained model, and teacher.architecture starts from "
                "random weights: leave lora out, or give teacher.model"
            )
        return self

    @model_validator(mode="after")
    def _either_model_or_architecture(self) -> TeacherConfig:
        if (self.model is None) == (self.architecture is None):
            raise ValueError(
                "give teacher.model (a pretrained model) or teacher.architecture (a new one), and not both"
            )
        if self.architecture is not None and self.finetune is None:
            raise ValueError(
                "teacher.architecture starts from random weights, from which nothing can be learned: say how it is "
                "trained, for example teacher.finetune: {num_train_epochs: 3, learning_rate: 5.0e-4}"
            )
        return self

    @property
    def name(self) -> str:
        """What messages call the teacher."""
        return self.model or f"new {(self.architecture or {}).get('model_type')} model"


class StudentConfig(SectionConfig):
    """The model that learns: either another pretrained `model`, or a shape to be made out of the teacher."""

    model: str | None = None
    """A hub id, a folder, or `package:NAME/folder`, to start from; leave the shape out then."""
    num_blocks: PositiveInt | dict[Literal["encoder", "decoder"], PositiveInt] | None = None
    """Number of blocks, or `{encoder: n, decoder: m}`; null keeps the teacher's."""
    hidden_size: PositiveInt | None = None
    """Width, a whole number of the teacher's heads; null keeps the teacher's. Narrower needs `truncate` or `random`, or
    `truncate_raw`, which takes any width."""
    intermediate_size: PositiveInt | None = None
    """Feed-forward width; null keeps the teacher's proportion to the hidden size."""
    num_attention_heads: PositiveInt | None = None
    """Number of heads; null keeps the teacher's head size."""
    init: Init = "copy"
    """`copy` whole teacher blocks, `truncate` every matrix to its first rows and columns but never through a head,
    `truncate_raw` through heads too (parity with released code), or `random`."""
    copy_map: str | list[int] = "forward"
    """Which teacher block each student block is made of: forward, reverse, first, last, skip, spread, random, or a list
    of teacher blocks counted from 0."""
    vocabulary: Literal["full", "trimmed"] = "full"
    """trimmed: only the tokens that the training data needs, all special ones and all single characters; only for a
    student made out of the teacher."""
    freeze_embeddings: bool = False
    """Whether the embedding tables outside the blocks (tokens, positions, token types) keep their first values."""
    trust_remote_code: bool = False
    """Whether Python code that comes with `model` may be run."""
    dtype: Dtype = "float32"
    """Type of the student's weights; `auto` takes the checkpoint's (or the teacher's, for a student made of it)."""
    revision: str | None = None
    """Branch, tag or commit of `model` on the hub."""
    attn_implementation: str | None = None
    """`eager`, `sdpa`, `flash_attention_2`, ...; null lets transformers choose."""

    @model_validator(mode="after")
    def _either_model_or_shape(self) -> StudentConfig:
        shape = {"num_blocks", "hidden_size", "intermediate_size", "num_attention_heads", "init", "copy_map"}
        given = sorted(key for key in shape & self.model_fields_set if getattr(self, key) is not None)
        chosen = [key for key in given if getattr(self, key) != type(self).model_fields[key].default]
        if self.model is not None and chosen:
            raise ValueError(
                f"student has a model ({self.model!r}) and a shape ({', '.join(chosen)}): give one of them. A shape is "
                "made out of the teacher, a model is taken as it is"
            )
        if self.model is not None and self.vocabulary == "trimmed":
            raise ValueError(
                f"student.vocabulary is 'trimmed', but student.model ({self.model!r}) brings weights for its whole "
                "vocabulary, in the teacher's ids: only a student that is made out of the teacher (num_blocks, "
                "hidden_size, ...) can be trimmed with it. Leave one of them out"
            )
        if self.model is None and not given and self.vocabulary == "full":
            raise ValueError(
                "student is empty: give a shape to make out of the teacher (num_blocks, hidden_size, ...) or a model"
            )
        if isinstance(self.copy_map, str) and self.copy_map not in COPY_MAPS:
            raise ValueError(
                one_of("copy_map", self.copy_map, COPY_MAPS).rstrip(".") + ", or a list of teacher blocks, from 0"
            )
        return self
