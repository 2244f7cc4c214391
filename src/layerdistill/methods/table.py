"""The explicit table of methods; a new method is one line here."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from layerdistill.core.errors import UserError, one_of
from layerdistill.core.types import Method
from layerdistill.methods import cka, ild, iskd, kd, l1_prune, layer_prune, lora_ild, none, rail_kd, ted

METHODS: dict[str, Method] = {
    module.METHOD.name: module.METHOD
    for module in (none, kd, ild, rail_kd, cka, lora_ild, ted, iskd, layer_prune, l1_prune)
}

MethodConfig = Annotated[
    none.NoneConfig
    | kd.KdConfig
    | ild.IldConfig
    | rail_kd.RailKdConfig
    | cka.CkaConfig
    | lora_ild.LoraIldConfig
    | ted.TedConfig
    | iskd.IskdConfig
    | layer_prune.LayerPruneConfig
    | l1_prune.L1PruneConfig,
    Field(discriminator="name"),
]


def find_method(name: str) -> Method:
    """Return a method by its name; raises UserError that lists the names."""
    if name not in METHODS:
        raise UserError(one_of("method.name", name, list(METHODS)))
    return METHODS[name]
