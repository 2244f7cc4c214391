"""The base of every recipe section: unknown keys are refused and values are not coerced silently."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class SectionConfig(BaseModel):
    """A recipe section: pydantic v2, immutable, unknown keys forbidden.

    The unit and the meaning of a field are written under it as a docstring; they reach the JSON schema.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())
