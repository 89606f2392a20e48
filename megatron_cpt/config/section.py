"""Base class of every section of run.yaml."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """One section: frozen, without unknown keys or silent conversion of types."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,  # "8" is not an int and "true" is not a bool; 1 is accepted where a float is expected
        allow_inf_nan=False,
        validate_by_name=False,
        use_attribute_docstrings=True,
    )
