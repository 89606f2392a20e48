"""The base of every section of run.yaml."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """One section: frozen, no unknown keys, no silent conversion of types."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,  # the text "8" is no number and "true" no switch; a whole number may stand for a fraction
        allow_inf_nan=False,
        validate_by_name=False,
        use_attribute_docstrings=True,
    )
