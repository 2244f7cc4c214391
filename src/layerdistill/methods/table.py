"""The explicit table of methods; a new method is one line here."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from layerdistill.core.errors import UserError, one_of
from layerdistill.core.types import Method
from layerdistill.methods import cka, ild, kd, none

METHODS: dict[str, Method] = {module.METHOD.name: module.METHOD for module in (none, kd, ild, cka)}

MethodConfig = Annotated[
    none.NoneConfig | kd.KdConfig | ild.IldConfig | cka.CkaConfig,
    Field(discriminator="name"),
]


def find_method(name: str) -> Method:
    """Return a method by its name; raises UserError that lists the names."""
    if name not in METHODS:
        raise UserError(one_of("method.name", name, list(METHODS)))
    return METHODS[name]
