"""The JSON schema of run.yaml: editors complete and check the file with it."""

from __future__ import annotations

from typing import Any

from megatron_cpt.config.model import ACTIVATION_NAMES, GATED_ACTIVATION_NAMES, NORM_NAMES
from megatron_cpt.config.presets import preset_names
from megatron_cpt.config.quantities import COUNT_SCHEMA
from megatron_cpt.config.schema import RunConfig


def run_schema() -> dict[str, Any]:
    """The schema of a run.yaml as a person writes it: with presets and the short forms of amounts."""
    schema = RunConfig.model_json_schema(by_alias=True)
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    sections = schema["$defs"]
    model = sections["ModelConfig"]
    required = model.pop("required")
    # A preset stands for every field that is required.
    model["anyOf"] = [{"required": ["preset"]}, {"required": required}]
    model["properties"]["preset"]["examples"] = list(preset_names())
    sections["ModelConfig"] = {"anyOf": [{"enum": list(preset_names())}, model]}
    sections["Activation"]["enum"] += [*ACTIVATION_NAMES, *GATED_ACTIVATION_NAMES]
    sections["Norm"]["enum"] += NORM_NAMES
    steps = {"type": "integer", "minimum": 0, "description": "steps"}
    fraction = {"type": "number", "minimum": 0, "maximum": 1, "description": "fraction of the run"}
    sections["Span"] = {"anyOf": [steps, fraction, COUNT_SCHEMA, sections["Span"]]}
    return schema
