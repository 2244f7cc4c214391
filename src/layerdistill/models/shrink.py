"""Shrink a configuration: fewer blocks, narrower, with every field that follows from that; no weights are needed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any, Literal, get_args

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PretrainedConfig, PreTrainedModel

from layerdistill.core.errors import UserError, one_of
from layerdistill.core.seeds import random_for
from layerdistill.core.types import StackName
from layerdistill.models.fields import INTERMEDIATE_FIELDS, StackFields, depths_from_config, stack_fields
from layerdistill.models.overrides import FOLLOWS_WIDTH, LAYER_INDEX_FIELDS

Init = Literal["copy", "truncate", "truncate_raw", "random"]
INITS: tuple[str, ...] = get_args(Init)
COPY_MAPS = ("forward", "reverse", "first", "last", "skip", "spread", "random")
NumBlocks = int | Mapping[str, int] | None


def block_sources(
    depths: Mapping[StackName, int], num_blocks: NumBlocks, copy_map: str | Sequence[int] = "forward", seed: int = 0
) -> dict[StackName, tuple[int, ...]]:
    """Return, for each stack, the 0-based teacher block that each student block is made of.

    With N_T teacher and N_S student blocks, block n is made of `forward`: ceil((n + 1) N_T / N_S) - 1 (LoRAILD's map);
    `reverse`: the forward targets backwards; `first`, `last`: the first or last N_S blocks; `skip`: floor(n N_T / N_S)
    (2n when halving, as in the CKA authors' code); `spread`: n (N_T - 1) / (N_S - 1), half rounded up, so that first
    and last are among them (one block: the first), as the layer-selection authors start T5; `random`: distinct blocks,
    drawn with `seed`, in the teacher's order.
    A list names the blocks itself. `num_blocks` None keeps the depth (or takes the length of the list).
    Raises UserError for an unknown map, a depth below 1 or above the teacher's, and a list that does not fit.
    """
    if isinstance(num_blocks, Mapping) and set(num_blocks) != set(depths):
        raise UserError(
            f"num_blocks names the stacks {sorted(num_blocks)}, but the teacher's are "
            f"{[name or '(only one: give a plain number)' for name in depths]}."
        )
    sources: dict[StackName, tuple[int, ...]] = {}
    for name, depth in depths.items():
        wanted = num_blocks[name] if isinstance(num_blocks, Mapping) else num_blocks
        if wanted is None:
            wanted = depth if isinstance(copy_map, str) else len(copy_map)
        if not 1 <= wanted <= depth:
            where = f" ({name})" if name else ""
            raise UserError(f"num_blocks{where} is {wanted}, but the teacher has {depth} blocks: give 1 to {depth}.")
        sources[name] = _sources(name, depth, wanted, copy_map, seed)
    return sources


def _sources(name: StackName, depth: int, wanted: int, copy_map: str | Sequence[int], seed: int) -> tuple[int, ...]:
    if not isinstance(copy_map, str):
        if len(copy_map) != wanted or any(not 0 <= block < depth for block in copy_map):
            raise UserError(
                f"copy_map is {list(copy_map)}, but must list {wanted} teacher blocks (one for each student block), "
                f"counted from 0 to {depth - 1}."
            )
        return tuple(copy_map)
    forward = tuple(math.ceil((n + 1) * depth / wanted) - 1 for n in range(wanted))
    gaps = max(wanted - 1, 1)
    maps = {
        "forward": forward,
        "reverse": forward[::-1],
        "first": tuple(range(wanted)),
        "last": tuple(range(depth - wanted, depth)),
        "skip": tuple(n * depth // wanted for n in range(wanted)),
        "spread": tuple((2 * n * (depth - 1) + gaps) // (2 * gaps) for n in range(wanted)),
        "random": tuple(sorted(random_for(seed, "copy_map", name).sample(range(depth), wanted))),
    }
    if copy_map not in maps:
        raise UserError(one_of("copy_map", copy_map, COPY_MAPS) + " Or a list of teacher blocks, counted from 0.")
    return maps[copy_map]


def shrink_config(
    config: PretrainedConfig,
    num_blocks: NumBlocks = None,
    hidden_size: int | None = None,
    intermediate_size: int | None = None,
    num_attention_heads: int | None = None,
    init: Init = "copy",
    copy_map: str | Sequence[int] = "forward",
    seed: int = 0,
) -> PretrainedConfig:
    """Return the configuration of the student that `make_student` would make; `config` is left as it is.

    Fields with an entry per block (layer types, windows) follow the blocks that are copied; a `random` student takes
    those of the first blocks. Heads keep their size (with `truncate_raw` only where nothing else is asked for), grouped
    key/value heads their group size, and the feed-forward width its proportion to the hidden size. Raises UserError for
    a shape that cannot be made of this teacher.
    """
    if init not in INITS:
        raise UserError(one_of("init", init, INITS))
    stacks = stack_fields(config)
    sources = block_sources(depths_from_config(config), num_blocks, "first" if init == "random" else copy_map, seed)
    replaced = (getattr(config, "layerdistill", None) or {}).get("replaced")
    if replaced and (hidden_size or intermediate_size or num_attention_heads or _depth_changes(config, sources)):
        raise UserError(
            f"the model has compact blocks in the places {replaced}, so no smaller student can be cut out of it. Take "
            "it as the student itself (student.model), or cut one out of a stock model."
        )
    data = config.to_dict()
    for name, fields in stacks.items():
        section = data
        for key in fields.path:
            section = section[key]
        changes = _layers(fields, sources[name])
        changes |= _intermediate(fields, hidden_size, intermediate_size, changes)
        changes |= _width(fields, hidden_size, num_attention_heads, init)
        by_depth = {fields.depth, "max_window_layers"}
        changed = [
            key
            for key, value in changes.items()
            if isinstance(value, int) and value != fields.value(key) and key not in by_depth
        ]
        if init == "copy" and changed:
            raise UserError(
                "init: copy takes whole teacher blocks, so a student must keep the teacher's hidden_size, heads and "
                f"intermediate_size; this one changes {', '.join(changed)}. Use init: truncate or init: random."
            )
        section.update(changes)
    try:
        shrunk = type(config).from_dict(data)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise UserError(f"{type(config).__name__} cannot be shrunk to the shape asked for: {error}") from error
    wanted = {name: len(blocks) for name, blocks in sources.items()}
    if depths_from_config(shrunk) != wanted:
        raise UserError(f"{type(config).__name__} does not let its number of blocks be set to {wanted}.")
    shrunk._attn_implementation = config._attn_implementation
    return shrunk


def _depth_changes(config: PretrainedConfig, sources: Mapping[StackName, Sequence[int]]) -> bool:
    return any(list(sources[name]) != list(range(depth)) for name, depth in depths_from_config(config).items())


def build_on_meta(config: PretrainedConfig, build: Callable[[PretrainedConfig], PreTrainedModel]) -> PreTrainedModel:
    """Return what `build` (a model class, or an Auto class's `from_config`) makes, without memory for its weights.

    Raises UserError when it cannot be built.
    """
    try:
        with torch.device("meta"):
            return build(config)
    except (ValueError, TypeError, KeyError, IndexError, RuntimeError, AssertionError) as error:
        raise UserError(
            f"a model cannot be built from this {type(config).__name__}: {type(error).__name__}: {error}. "
            "If it is the student's, choose another num_blocks, hidden_size or copy_map."
        ) from error


def _layers(fields: StackFields, sources: tuple[int, ...]) -> dict[str, Any]:
    """Return the changed fields that depend on which blocks are kept."""
    depth = fields.value(fields.depth)
    stored = fields.section.to_dict()
    changes: dict[str, Any] = {fields.depth: len(sources)} if fields.depth in stored else {}
    for key, value in stored.items():
        if key in LAYER_INDEX_FIELDS and isinstance(value, list):
            changes[key] = [n for n, source in enumerate(sources) if source in value]
        elif isinstance(value, list) and len(value) == depth and has_an_entry_per_layer(key, value):
            changes[key] = [value[source] for source in sources]
    if stored.get("max_window_layers") is not None:
        changes["max_window_layers"] = min(stored["max_window_layers"], len(sources))
    if "attention_types" in stored and "attention_layers" in changes:
        changes["attention_types"] = [[changes["attention_layers"], 1]]  # GPT-Neo expands the one into the other
    if isinstance(stored.get("per_layer_config"), dict):
        given = {int(layer): override for layer, override in stored["per_layer_config"].items()}
        changes["per_layer_config"] = {n: given[source] for n, source in enumerate(sources) if source in given}
    return changes


def has_an_entry_per_layer(key: str, values: list[Any]) -> bool:
    """Whether a field's list, as long as the model is deep, says one thing of each block."""
    words = ("layer", "block", "pattern", "types", "modes")
    if "token" in key or key in ("architectures", "pos_att_type"):
        return False
    return any(word in key for word in words) or all(isinstance(value, int | float) for value in values)


def _width(fields: StackFields, hidden_size: int | None, heads: int | None, init: Init) -> dict[str, Any]:
    """Return the changed fields that depend on the hidden size and the heads."""
    width = getattr(fields.section, fields.width)
    wanted = width if hidden_size is None else hidden_size
    if wanted == width and heads is None:
        return {}
    if getattr(fields.section, "is_heterogeneous", False):
        raise UserError(
            f"hidden_size: {type(fields.section).__name__} gives its layers different shapes, so it cannot be "
            "narrowed; num_blocks can be lowered."
        )
    if not 1 <= wanted <= width:
        raise UserError(f"hidden_size is {wanted}, but the teacher's is {width}: give at most that.")
    changes: dict[str, Any] = {fields.width: wanted}
    changes |= {key: wanted for key in FOLLOWS_WIDTH if vars(fields.section).get(key) == width}
    if init == "truncate_raw":
        return changes | _heads_cut_through(fields, width, wanted, heads)
    return changes | _heads(fields, width, wanted, heads, init)


def _heads(fields: StackFields, width: int, wanted: int, given: int | None, init: Init) -> dict[str, Any]:
    heads, kv_heads = fields.value(fields.heads), fields.value(fields.kv_heads)
    if fields.heads is None or heads is None:
        return {}
    group = heads // kv_heads if kv_heads and kv_heads > 1 else 1
    allowed = [width * n // heads for n in range(group, heads + 1, group) if width * n % heads == 0]
    if given is None:
        if wanted not in allowed:
            below = [size for size in allowed if size < wanted][-1:]
            above = [size for size in allowed if size > wanted][:1]
            raise UserError(
                f"hidden_size {wanted} is not a whole number of the teacher's heads ({heads} heads in {width}"
                + (f", in groups of {group}" if group > 1 else "")
                + f"). The nearest widths that are: {', '.join(map(str, below + above))}."
            )
        given = heads * wanted // width
    keeps_size = fields.head_size is not None or Fraction(wanted, given) == Fraction(width, heads)
    if not 1 <= given <= heads or given % group or (fields.head_size is None and wanted % given):
        raise UserError(
            f"num_attention_heads is {given}, but must be a multiple of {group} up to the teacher's {heads} that "
            f"divides hidden_size {wanted}."
        )
    if init == "truncate" and not keeps_size:
        raise UserError(
            f"init: truncate keeps whole heads, but hidden_size {wanted} with {given} heads makes heads of "
            f"{wanted / given:g} where the teacher's have {width / heads:g}. Leave num_attention_heads out, or use "
            "init: random."
        )
    changes = {fields.heads: given}
    if fields.kv_heads is not None and kv_heads is not None:
        changes[fields.kv_heads] = max(1, given // group) if kv_heads > 1 else kv_heads
    return changes


def _heads_cut_through(fields: StackFields, width: int, wanted: int, given: int | None) -> dict[str, Any]:
    """Return the changed fields of `truncate_raw`: any number of heads that divides the width, of whatever size."""
    heads, kv_heads, size = (fields.value(name) for name in (fields.heads, fields.kv_heads, fields.head_size))
    if fields.heads is None or heads is None:
        return {}
    group = heads // kv_heads if kv_heads and kv_heads > 1 else 1
    if given is None:
        whole = heads * wanted // width
        keeps_size = heads * wanted % width == 0 and whole % group == 0 and wanted % whole == 0
        given = whole if keeps_size else heads
    rope = getattr(fields.section, "rope_parameters", None)
    own_size = size is not None and size * heads != width
    head = size if own_size and size else wanted // max(given, 1)
    rotated = 0 if rope is None else int(head * rope.get("partial_rotary_factor", 1))
    if given < 1 or wanted % given or given % group or rotated % 2:
        raise UserError(
            f"num_attention_heads is {given} for hidden_size {wanted}, but must divide it"
            + (f" and be a multiple of {group}" if group > 1 else "")
            + (", into heads of which an even number of dimensions is rotated" if rope is not None else "")
            + ". Give num_attention_heads, or another hidden_size."
        )
    changes = {fields.heads: given}
    if fields.kv_heads is not None and kv_heads is not None:
        changes[fields.kv_heads] = given // group if kv_heads > 1 else kv_heads
    if fields.head_size is not None and not own_size:
        changes[fields.head_size] = head
    return changes


def _intermediate(
    fields: StackFields, hidden_size: int | None, intermediate: int | None, changes: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the feed-forward widths, all scaled alike; `changes` holds lists already cut to the blocks kept."""
    values = {key: changes.get(key, vars(fields.section)[key]) for key in fields.intermediate}
    width = getattr(fields.section, fields.width)
    ratio = Fraction(width if hidden_size is None else hidden_size, width)
    if intermediate is not None:
        main = next((key for key, value in values.items() if isinstance(value, int)), None)
        limit = 4 * width if main is None else values[main]
        # Where the field is empty the width is implied to be 4 x hidden_size (GPT-2), and can be written into it.
        empty = [key for key in INTERMEDIATE_FIELDS if key in vars(fields.section) and key not in values]
        if main is None and not empty:
            raise UserError(
                f"intermediate_size is {intermediate}, but {type(fields.section).__name__} has no such field: "
                "leave it out."
            )
        if not 1 <= intermediate <= limit:
            raise UserError(f"intermediate_size is {intermediate}, but the teacher's is {limit}: give at most that.")
        if main is None:
            return {empty[0]: intermediate}
        ratio = Fraction(intermediate, limit)
    return {
        key: [_scaled(number, ratio) for number in value] if isinstance(value, list) else _scaled(value, ratio)
        for key, value in values.items()
    }


def _scaled(number: int, ratio: Fraction) -> int:
    """Return `number * ratio`, rounded; only 0 gives 0."""
    return max(1, round(number * ratio)) if number else 0
