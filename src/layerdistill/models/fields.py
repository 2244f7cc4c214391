"""Where a configuration of any architecture keeps the depth, width and heads of each stack of blocks."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PretrainedConfig

from layerdistill.core.errors import UserError
from layerdistill.core.types import StackName

_DEPTH = ("num_hidden_layers", "num_layers", "n_layers")
_WIDTH = ("hidden_size", "d_model")
_HEADS = ("num_attention_heads", "num_heads", "n_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads")
_HEAD_SIZE = ("head_dim", "d_kv", "kv_channels", "dim_head", "d_head")
INTERMEDIATE_FIELDS = (
    "intermediate_size",
    "ffn_dim",
    "encoder_ffn_dim",
    "decoder_ffn_dim",
    "d_ff",
    "n_inner",
    "hidden_dim",
    "d_inner",
    "dff",
    "dim_ff",
    "ffn_hidden_size",
    "intermediate_size_mlp",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "shared_intermediate_size",
    "dense_intermediate_size",
    "expert_ffn_hidden_size",
)
"""Every name of a feed-forward width; the first that a configuration has is the main one."""


@dataclass(frozen=True)
class StackFields:
    """The fields of one stack: `section` is the configuration that holds them, at `path` inside the whole one.

    `kv_heads` and `head_size` are None when the configuration has no such field; the head size is then width / heads.
    """

    section: PretrainedConfig
    path: tuple[str, ...]
    depth: str
    width: str
    heads: str | None
    kv_heads: str | None
    head_size: str | None
    intermediate: tuple[str, ...]

    def value(self, field: str | None) -> int | None:
        """Return the number in `field`, or None when there is no such field."""
        # Not getattr: a configuration with per-layer overrides refuses to tell its own value.
        return None if field is None else vars(self.section).get(field)


def stack_fields(config: PretrainedConfig) -> dict[StackName, StackFields]:
    """Return the fields of each stack that `config` describes: `""`, or `encoder` and `decoder`.

    Raises UserError when the configuration names no number of blocks or no width.
    """
    if not getattr(config, "is_encoder_decoder", False):
        section, path = _text_section(config, ())
        # A decoder taken out of an encoder-decoder (BartForCausalLM) keeps the fields of both.
        prefixes = ("decoder_",) if getattr(section, "is_decoder", False) else ()
        return {"": _fields(section, path, prefixes)}
    stacks: dict[StackName, StackFields] = {}
    names: tuple[StackName, ...] = ("encoder", "decoder")
    for name in names:
        nested = getattr(config, name, None)
        if isinstance(nested, PretrainedConfig):
            stacks[name] = _fields(*_text_section(nested, (name,)), ())
        else:
            stacks[name] = _fields(config, (), (f"{name}_", f"num_{name}_"))
    return stacks


def depths_from_config(config: PretrainedConfig) -> dict[StackName, int]:
    """Return the number of blocks of each stack, read from a configuration alone."""
    return {name: getattr(fields.section, fields.depth) for name, fields in stack_fields(config).items()}


def widths_from_config(config: PretrainedConfig) -> dict[StackName, int]:
    """Return the hidden size of each stack, read from a configuration alone."""
    return {name: getattr(fields.section, fields.width) for name, fields in stack_fields(config).items()}


def _text_section(config: PretrainedConfig, path: tuple[str, ...]) -> tuple[PretrainedConfig, tuple[str, ...]]:
    """Return the part of a multi-modal configuration that describes the language model, and where it is."""
    text = config.get_text_config(decoder=True)
    for key, value in vars(config).items():
        if value is text and text is not config:
            return text, (*path, key)
    return config, path


def _fields(section: PretrainedConfig, path: tuple[str, ...], prefixes: tuple[str, ...]) -> StackFields:
    depth = _first(section, [p + "layers" for p in prefixes] + list(_DEPTH))
    width = _first(section, _WIDTH)
    if depth is None and isinstance(getattr(section, _DEPTH[0], None), int):
        depth = _DEPTH[0]  # a property: the length of a list with an entry per layer
    if depth is None or width is None:
        raise UserError(
            f"{type(section).__name__} (model type {section.model_type!r}) does not say how many blocks it has or how "
            f"wide they are (looked for {', '.join(_DEPTH)}; {', '.join(_WIDTH)}). This architecture is not supported."
        )
    return StackFields(
        section=section,
        path=path,
        depth=depth,
        width=width,
        heads=_first(section, [p + "attention_heads" for p in prefixes] + list(_HEADS)),
        kv_heads=_first(section, _KV_HEADS),
        head_size=_first(section, _HEAD_SIZE),
        intermediate=tuple(dict.fromkeys(filter(None, (_first(section, [name]) for name in INTERMEDIATE_FIELDS)))),
    )


def _first(section: PretrainedConfig, names: list[str] | tuple[str, ...]) -> str | None:
    """Return the name under which `section` itself stores the first of `names` that has a value."""
    stored = [section.attribute_map.get(name, name) for name in names]
    return next((name for name in stored if vars(section).get(name) is not None), None)
