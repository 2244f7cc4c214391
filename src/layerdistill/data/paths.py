"""Finding what a recipe names: a local file or folder, or an id on the hub."""

from __future__ import annotations

import re
from pathlib import Path

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
"""`name` or `owner/name`, as on the Hugging Face hub."""


def candidates(given: str, base: Path | None) -> list[Path]:
    """Return the places where a path of a recipe is looked for: below `base` (the recipe's folder), then here."""
    path = Path(given).expanduser()
    if path.is_absolute() or base is None or base.resolve() == Path.cwd():
        return [path]
    return [base / path, path]


def locate(given: str, base: Path | None) -> Path | None:
    """Return the first existing place of `given`, or None."""
    return next((path for path in candidates(given, base) if path.exists()), None)


def listed_places(given: str, base: Path | None) -> str:
    """Return the places tried, as absolute paths, for an error message."""
    return " and ".join(str(path.absolute()) for path in candidates(given, base))


def is_hub_id(given: str, file_suffixes: tuple[str, ...] = ()) -> bool:
    """Return whether `given` can be a hub id; not what begins with a dot, ends like a data file or has more parts."""
    return HUB_ID.fullmatch(given) is not None and not given.lower().endswith(file_suffixes)
