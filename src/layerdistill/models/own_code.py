"""Students with blocks of their own kind: what their class is, and how they are saved so that they open again."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import transformers
from transformers import PretrainedConfig, PreTrainedModel

from layerdistill.core.errors import UserError, one_of
from layerdistill.core.files import read_json, write_json
from layerdistill.models import modeling_compact, modeling_narrow

KINDS: dict[str, ModuleType] = {module.KIND: module for module in (modeling_compact, modeling_narrow)}
"""`config.layerdistill["kind"]` -> the file with `rebuild(model, description)`, which is copied beside the student."""

CODE_FILE = "modeling_layerdistill.py"

AUTO_CLASSES = (
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForMaskedLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
)

GENERATED = '''

class {name}({base}):
    """A {base} with blocks of the kind that `config.layerdistill` describes."""

    def __init__(self, config, *inputs, **options):
        super().__init__(config, *inputs, **options)
        rebuild(self, config.layerdistill)
'''


_CLASSES: dict[tuple[Any, str], Any] = {}


def own_description(config: PretrainedConfig) -> dict[str, Any] | None:
    """Return what a configuration says of blocks of its own kind, None for a stock model.

    Raises UserError for a kind that is not known here.
    """
    description = getattr(config, "layerdistill", None)
    if description is not None and description.get("kind") not in KINDS:
        raise UserError(
            one_of("config.json: layerdistill.kind", description.get("kind"), list(KINDS))
            + " Perhaps a newer version of layerdistill has made this model."
        )
    return description


def has_own_code(model: Any) -> bool:
    """Whether a model has blocks of its own kind, so that it is saved with a modelling file."""
    return own_description(model.config) is not None


def own_class(base_class: Any, kind: str) -> Any:
    """Return the class of models that are a `base_class` with the blocks that `config.layerdistill` describes.

    The same class on every call. Its `save_pretrained` writes the modelling file too.
    """
    if (base_class, kind) not in _CLASSES:
        rebuild = KINDS[kind].rebuild

        def __init__(self: Any, config: PretrainedConfig, *inputs: Any, **options: Any) -> None:
            base_class.__init__(self, config, *inputs, **options)
            rebuild(self, config.layerdistill)

        def save_pretrained(self: Any, save_directory: Any, *inputs: Any, **options: Any) -> None:
            # Code beside a checkpoint reads tensors by the names of its modules; only stock classes are read otherwise.
            base_class.save_pretrained(self, save_directory, *inputs, **{"save_original_format": False, **options})
            write_own_code(self, Path(save_directory))

        members = {
            "__init__": __init__,
            "save_pretrained": save_pretrained,
            "__module__": __name__,
            "__doc__": base_class.__doc__,
        }
        _CLASSES[base_class, kind] = type(own_name(base_class, kind), (base_class,), members)
    return _CLASSES[base_class, kind]


def own_name(base_class: type[PreTrainedModel], kind: str) -> str:
    """Return the name of the class that `own_class` makes."""
    return f"{kind.capitalize()}{base_class.__name__}"


def class_to_open(auto_class: Any, config: PretrainedConfig) -> Any:
    """Return the class that opens a checkpoint with this configuration: the Auto class, or one with its own blocks.

    Raises UserError when transformers has no class for this task and this kind of model.
    """
    description = own_description(config)
    if description is None:
        return auto_class
    known = auto_class._model_mapping
    if type(config) not in known:
        raise UserError(f"{auto_class.__name__} has no class for a {config.model_type} model.")
    return own_class(_first(known[type(config)]), description["kind"])


def class_named(config: PretrainedConfig) -> Any:
    """Return the class that `config.architectures` names, of transformers or with its own blocks; None if unknown."""
    name = next(iter(config.architectures or ()), None)
    description = own_description(config)
    if name is None or description is None:
        return getattr(transformers, name, None) if name else None
    base = getattr(transformers, name.removeprefix(description["kind"].capitalize()), None)
    return own_class(base, description["kind"]) if base is not None else None


def stock_class(model: PreTrainedModel) -> type[PreTrainedModel]:
    """Return the class of transformers that a model is of or derived from; raises UserError when there is none."""
    for base in type(model).__mro__:
        if base.__module__.startswith("transformers.") and issubclass(base, PreTrainedModel):
            return base
    raise UserError(
        f"{type(model).__name__} is defined by code of its own, not by transformers, so it cannot be saved with blocks "
        "of another kind. Take a model of a class that transformers has."
    )


def write_own_code(model: PreTrainedModel, folder: Path) -> None:
    """Complete a folder that `save_pretrained` wrote: the modelling file, and the names of its classes in config.json.

    `AutoModel...from_pretrained(folder, trust_remote_code=True)` then opens it without layerdistill. Nothing is done
    for a stock model. Raises UserError when no Auto class opens models of this class.
    """
    description = own_description(model.config)
    if description is None:
        return
    kind, base = description["kind"], stock_class(model)
    classes = {name: known for name in AUTO_CLASSES if (known := _class_behind(name, model.config)) is not None}
    classes = {name: known for name, known in classes.items() if known is base or name == "AutoModel"}
    if base not in classes.values():
        raise UserError(f"{base.__name__} is opened by no Auto class, so a student of this class cannot be saved.")
    code = [Path(str(KINDS[kind].__file__)).read_text(encoding="utf-8")]
    for known in dict.fromkeys(classes.values()):
        code.append(f"\nfrom {known.__module__} import {known.__name__}  # noqa: E402\n")
        code.append(GENERATED.format(name=own_name(known, kind), base=known.__name__))
    (folder / CODE_FILE).write_text("".join(code), encoding="utf-8")
    path = folder / "config.json"
    stored = read_json(path)
    stored["architectures"] = [own_name(base, kind)]
    module = CODE_FILE.removesuffix(".py")
    stored["auto_map"] = {name: f"{module}.{own_name(known, kind)}" for name, known in classes.items()}
    write_json(path, dict(sorted(stored.items())))


def _class_behind(auto_name: str, config: PretrainedConfig) -> Any:
    mapping = getattr(transformers, auto_name)._model_mapping
    return _first(mapping[type(config)]) if type(config) in mapping else None


def _first(found: Any) -> Any:
    return found[0] if isinstance(found, tuple | list) else found
