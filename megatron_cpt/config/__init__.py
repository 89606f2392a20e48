"""Reading of run.yaml into frozen, strict models. Imports neither torch nor megatron-core."""

from megatron_cpt.config.compute import Fp8Config, PrecisionConfig, RecomputeConfig
from megatron_cpt.config.data_sections import FimConfig, PhaseConfig, SourceConfig, Until
from megatron_cpt.config.fields import run_schema
from megatron_cpt.config.load_run import Draft, draft_config, load_config
from megatron_cpt.config.model import Activation, ModelConfig, Norm
from megatron_cpt.config.presets import preset_names
from megatron_cpt.config.quantities import format_bytes, format_count, format_duration, format_number_of, parse_count
from megatron_cpt.config.schema import (
    BatchConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    ScheduleConfig,
    Span,
    TeacherConfig,
)
from megatron_cpt.config.yamlfile import dump_yaml, read_mapping

__all__ = [
    "Activation",
    "BatchConfig",
    "Draft",
    "FimConfig",
    "Fp8Config",
    "ModelConfig",
    "Norm",
    "OptimizerConfig",
    "ParallelConfig",
    "PhaseConfig",
    "PrecisionConfig",
    "RecomputeConfig",
    "RunConfig",
    "ScheduleConfig",
    "SourceConfig",
    "Span",
    "TeacherConfig",
    "Until",
    "draft_config",
    "dump_yaml",
    "format_bytes",
    "format_count",
    "format_duration",
    "format_number_of",
    "load_config",
    "parse_count",
    "preset_names",
    "read_mapping",
    "run_schema",
]
