"""Frozen, strict models of run.yaml, one class per section. Nothing here reads a disk or imports torch."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, model_validator

from megatron_cpt.config.compute import PrecisionConfig, RecomputeConfig, SpeedConfig
from megatron_cpt.config.data_sections import DocumentsConfig, ExpandPaths, OneUnit, PhaseConfig, SourceConfig
from megatron_cpt.config.model import ModelConfig
from megatron_cpt.config.quantities import Section, TokenCount, parse_count, parse_span
from megatron_cpt.config.resilience import ResilienceConfig

MAX_RAMP_SIZES = 1024


class InitConfig(Section):
    """Weights of the first start; ignored if `output` already has checkpoints."""

    from_: Annotated[str | None, ExpandPaths] = Field(None, alias="from")
    """A checkpoint, or a run directory for its newest checkpoint; null starts from random weights."""
    load: Literal["weights", "weights+optimizer"] = "weights"
    """Parts to load; step, data position and schedule always start from the beginning."""


class RampUpConfig(Section):
    """A global batch that grows, as Megatron-LM's `--rampup-batch-size START INCREMENT SAMPLES`."""

    start: int = Field(gt=0)
    """First global batch, in sequences."""
    increment: int = Field(gt=0)
    """Sequences that each growth adds, until `batch.global` is reached."""
    samples: TokenCount
    """Samples in the ramp-up, shared equally by its batch sizes."""


class BatchConfig(Section):
    """Batch sizes in sequences."""

    global_: int = Field(alias="global", gt=0)
    """Sequences per step over all ranks."""
    micro: int = Field(1, gt=0)
    """Sequences per forward pass of one rank."""
    ramp_up: RampUpConfig | None = None
    """Start with a smaller global batch; null uses `batch.global` from the first step."""

    @property
    def ramp_sizes(self) -> range:
        """Global batches of the ramp-up without the full one; empty without a ramp-up."""
        ramp = self.ramp_up
        return range(0) if ramp is None else range(ramp.start, self.global_, ramp.increment)

    @model_validator(mode="after")
    def _few_sizes(self) -> BatchConfig:
        # Each size is checked, and is a segment of the plan.
        if len(self.ramp_sizes) > MAX_RAMP_SIZES:
            raise ValueError(f"ramp_up grows through more than {MAX_RAMP_SIZES:,} sizes; choose a larger increment")
        return self


class Span(OneUnit):
    """Part of the run, in exactly one unit."""

    steps: int | None = Field(None, ge=0)
    """Length in steps."""
    tokens: Annotated[int, BeforeValidator(parse_count)] | None = Field(None, ge=0)
    """Length in tokens."""
    fraction: float | None = Field(None, ge=0, le=1)
    """Length as a fraction of all steps."""


SpanField = Annotated[Span, BeforeValidator(parse_span)]


class ScheduleConfig(Section):
    """Learning rate over the run."""

    shape: Literal["cosine", "wsd", "linear", "constant"] = "cosine"
    """Curve from `max_lr` to `min_lr`; `wsd` is warmup, stable, decay."""
    max_lr: float = Field(gt=0)
    """Highest learning rate; for continued pretraining the rate at which pretraining ended."""
    min_lr: float = Field(0.0, ge=0)
    """Learning rate at the end of the run."""
    warmup: SpanField = Field(default_factory=lambda: Span(steps=0))
    """Linear increase from 0 to `max_lr` over steps (100), tokens (16B) or a fraction of the run (0.01)."""
    decay: SpanField = Field(default_factory=lambda: Span(fraction=0.2))
    """Length of the decay at the end of the run, in the units of `warmup`; shape `wsd` only."""
    decay_shape: Literal["linear", "cosine", "exponential", "minus_sqrt"] = "linear"
    """Curve of the decay; shape `wsd` only."""


Beta = Annotated[float, Field(strict=True, ge=0, lt=1)]


class OptimizerConfig(Section):
    """Adam with decoupled weight decay (AdamW)."""

    name: Literal["adam"] = "adam"
    """Optimizer."""
    betas: Annotated[tuple[Beta, Beta], Field(strict=False)] = (0.9, 0.95)
    """Decay rates of the first and second moment."""
    eps: float = Field(1e-8, gt=0)
    """Term added to the denominator of the update."""
    weight_decay: float = Field(0.1, ge=0)
    """Decoupled weight decay of all parameters but biases and norms."""
    clip_grad: float = Field(1.0, ge=0)
    """Largest gradient norm over all parameters; 0 disables clipping."""
    moments: Literal["fp32", "bf16"] = "fp32"
    """Format in which both moments are stored; `bf16` saves 4 bytes per parameter. Updates are computed in fp32."""


class ParallelConfig(Section):
    """Split of the model over ranks; the rest of the world size is data parallel."""

    tensor: int = Field(1, gt=0)
    """Tensor-parallel ranks."""
    pipeline: int = Field(1, gt=0)
    """Pipeline-parallel ranks (stages)."""
    virtual_pipeline: int = Field(1, gt=0)
    """Model chunks per pipeline rank; above 1 selects the interleaved schedule."""
    pipeline_layout: list[Annotated[int, Field(ge=0)]] | None = None
    """Layers per model chunk, in the order of the model, such as [9, 9, 9, 5]; null gives every chunk equally many."""
    context: int = Field(1, gt=0)
    """Context-parallel ranks, which share each sequence."""
    sequence: bool = False
    """Sequence parallelism within each tensor-parallel group; no effect with `tensor: 1`."""
    distributed_optimizer: bool = True
    """Shard the optimizer state over the data-parallel ranks."""

    @property
    def model_parallel_size(self) -> int:
        """Ranks per replica of the model."""
        return self.tensor * self.pipeline * self.context


class CheckpointConfig(Section):
    """Saving, deletion and verification of checkpoints."""

    every: int | None = Field(None, gt=0)
    """Steps between checkpoints; null saves only at the end and when the run is stopped."""
    at_end: bool = True
    """Save after the last step of the run; false saves there only if `every` divides it, for example in benchmarks."""
    keep: int | None = Field(None, gt=0)
    """Number of newest checkpoints to keep; null keeps all."""
    keep_every: int | None = Field(None, gt=0)
    """Keep every checkpoint whose step is a multiple of this, besides the newest; null keeps only the newest."""
    async_: bool = Field(False, alias="async")
    """Copy the state, then write it in the background while training continues."""
    verify: Literal["full", "sampled", "none"] = "full"
    """Verification on loading: `full` every checksum, `sampled` 1 shard in 16, `none` only file names and sizes."""


class ValidationConfig(Section):
    """Held-out loss per source; also measured before the first step and after the last."""

    every: int | None = Field(None, gt=0)
    """Steps between validations; null validates only before the first step and after the last."""
    batches: int = Field(20, gt=0)
    """Global batches per source, at most one epoch: the same samples in every run, whatever its seed."""
    sources: Annotated[dict[str, str | list[str]], ExpandPaths] = Field(min_length=1)
    """Held-out data per name: a prefix of .bin/.idx, a document list NAME.docs, a glob, or a list of these."""


EvaluationPoint = Literal["start", "switch", "end"]


class EvaluationConfig(Section):
    """Tasks of lm-evaluation-harness, measured on the model in memory during the run."""

    tasks: list[Annotated[str, Field(min_length=1)]] = Field(min_length=1)
    """Names of tasks, groups or tags."""
    every: int | None = Field(None, gt=0)
    """Steps between evaluations; null evaluates only at the points of `at`."""
    at: list[EvaluationPoint] = Field(default_factory=lambda: list(get_args(EvaluationPoint)))
    """Further evaluations: before the first step (`start`), after the last step of a phase (`switch`), at the `end`."""
    limit: int | None = Field(None, gt=0)
    """Documents per task, the first ones; null takes all."""
    num_fewshot: int | None = Field(None, ge=0)
    """Examples in each prompt, except for tasks that set 0; null uses the number that each task sets."""
    include_path: Annotated[str | None, ExpandPaths] = None
    """Folder with task files of your own, in addition to the tasks of lm-evaluation-harness."""


class EmaConfig(Section):
    """Exponential moving average of the weights, in fp32: ema = decay * ema + (1 - decay) * weight."""

    decay: float = Field(0.999, ge=0, lt=1)
    """Share of the average that an update keeps; 0.999 averages about the last 1,000 updates of the average."""
    every: int = Field(1, gt=0)
    """Steps between updates of the average: after each step whose number is a multiple of it."""


class TeacherConfig(Section):
    """Distillation: a share of the loss is the divergence from a second model, the teacher, which is not trained."""

    from_: Annotated[str | None, ExpandPaths] = Field(None, alias="from")
    """A checkpoint, or a run directory for its newest checkpoint; `init` is the checkpoint in `init.from`."""
    cache: Annotated[str | None, ExpandPaths] = None
    """Folder written by `megatron-cpt teach`, instead of `from`: the teacher's most likely tokens."""
    weight: float = Field(0.5, ge=0, le=1)
    """Share of the divergence in the loss; the cross entropy has the rest. 0 only measures the divergence."""
    temperature: float = Field(1.0, ge=0.01, le=100)
    """Divisor of both models' logits in the divergence, which is multiplied by its square (Hinton et al. 2015)."""
    sources: dict[str, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)
    """Factor on `weight` per source; 0 does not distill the source, a source not named has 1."""
    tensor: int | None = Field(None, gt=0)
    """Tensor-parallel ranks of the teacher: as many as the model has, or 1; null takes as many."""
    pipeline: int | None = Field(None, gt=0)
    """Pipeline stages of the teacher: as many as the model has, or 1, then the ranks of the last stage run it."""
    model: ModelConfig | None = None
    """Shape of the teacher, to plan without its checkpoint; null reads it from the checkpoint."""

    def layout(self, parallel: ParallelConfig) -> tuple[int, int]:
        """Return the tensor-parallel ranks and the pipeline stages of a teacher beside a model with this layout."""
        return self.tensor or parallel.tensor, self.pipeline or parallel.pipeline

    def distills(self, source: str) -> bool:
        """Return whether a source is compared with the teacher."""
        return self.sources.get(source, 1.0) > 0

    def weight_of(self, source: str) -> float:
        """Return the share of the divergence in the loss of a source."""
        return self.weight * self.sources.get(source, 1.0)


class WandbConfig(Section):
    """Logging to Weights & Biases."""

    project: str
    """Project in which the run appears."""
    entity: str | None = None
    """User or team that owns the project; null uses the account's default."""
    mode: Literal["online", "offline"] = "online"
    """`offline` writes to disk for a later `wandb sync`."""


def _parse_hook(entry: Any) -> Any:
    if isinstance(entry, str) and not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*", entry):
        raise ValueError('not of the form "module:Class", as in "my_package.hooks:EvalHook"')
    return entry


HookEntry = Annotated[str, BeforeValidator(_parse_hook)]
Step = Annotated[int, Field(strict=True, gt=0)]


class LogConfig(Section):
    """Logging of metrics."""

    every: int = Field(10, gt=0)
    """Steps between lines on the console and in metrics.jsonl."""
    tensorboard: bool = False
    """Write TensorBoard event files to the run directory."""
    wandb: WandbConfig | None = None
    """Log to Weights & Biases; null does not."""
    hooks: list[HookEntry] = Field(default_factory=list)
    """Your own hooks, "module:Class" each: classes derived from megatron_cpt.Hook, created without arguments."""


class ProfileConfig(Section):
    """Trace of a few steps by torch's profiler, in OUTPUT/profile."""

    steps: Annotated[tuple[Step, Step], Field(strict=False)]
    """First and last step to record, counted from 1."""
    ranks: list[Annotated[int, Field(strict=True, ge=0)]] | None = Field(None, min_length=1)
    """Ranks that record; null records on every rank."""
    record_shapes: bool = False
    """Record the shapes of the operators' inputs."""
    with_stack: bool = False
    """Record the Python source line of each operator; slows down the recorded steps."""


def _model_preset(value: Any) -> Any:
    return {"preset": value} if isinstance(value, str) else value


class RunConfig(Section):
    """A complete run.yaml."""

    name: str = Field(min_length=1)
    """Name of the run in logs and reports."""
    output: Annotated[str, ExpandPaths] = Field(min_length=1)
    """Run directory; `~` and `$NAME` are expanded here and in the other paths."""
    seed: int = Field(1234, ge=0, lt=2**62)  # torch takes 64 bits, and each rank adds to the seed
    """Seed of data order, random weights and dropout."""
    deterministic: bool = False
    """Use only kernels that give identical results in every execution, on a GPU too; slower."""
    model: Annotated[ModelConfig, BeforeValidator(_model_preset)]
    """Shape of the model: a preset, or fields, or a preset and fields that override it; may be omitted, or null, if
    `init.from` is a checkpoint on this machine, whose model it then is."""
    tokenizer: Annotated[str | None, ExpandPaths] = None
    """KIND:PATH of the tokenizer of the data; gives the end-of-document id and is compared on resume."""
    init: InitConfig = Field(default_factory=InitConfig)
    """Weights of the first start."""
    seq_length: int = Field(gt=0)
    """Tokens per sequence."""
    batch: BatchConfig
    """Batch sizes."""
    tokens: TokenCount
    """Length of the run in tokens."""
    stop_at_step: int | None = Field(None, gt=0)
    """Save after this step and end with status 0; the same command later continues; null runs to the end."""
    schedule: ScheduleConfig
    """Learning rate."""
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    """Optimizer."""
    sources: dict[str, SourceConfig] = Field(min_length=1)
    """Sources of tokens per name."""
    phases: list[PhaseConfig] = Field(min_length=1)
    """Phases in order, each with its blend of sources."""
    documents: DocumentsConfig = Field(default_factory=DocumentsConfig)
    """Boundaries between documents."""
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    """Split over ranks."""
    precision: PrecisionConfig = Field(default_factory=PrecisionConfig)
    """Number formats."""
    recompute: RecomputeConfig = Field(default_factory=RecomputeConfig)
    """Activation recomputation."""
    speed: SpeedConfig = Field(default_factory=SpeedConfig)
    """Overlapped communication and fused kernels."""
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    """Checkpoints."""
    validation: ValidationConfig | None = None
    """Held-out loss; null never validates."""
    evaluation: EvaluationConfig | None = None
    """Benchmarks; null never evaluates."""
    ema: EmaConfig | None = None
    """Moving average of the weights, saved and validated beside them; null keeps none."""
    teacher: TeacherConfig | None = None
    """Distillation from another model; null trains on the cross entropy alone."""
    log: LogConfig = Field(default_factory=LogConfig)
    """Metrics."""
    profile: ProfileConfig | None = None
    """Trace of a few steps; null records none."""
    resilience: ResilienceConfig = Field(default_factory=ResilienceConfig)
    """Time limits, hangs and loss spikes."""

    @property
    def tokens_per_step(self) -> int:
        """Tokens in a step of `batch.global` sequences; steps of a ramp-up or phase may differ, see the plan."""
        return self.batch.global_ * self.seq_length

    def length_of(self, phase: PhaseConfig) -> int:
        """Return the tokens per sequence in a phase."""
        return phase.seq_length or self.seq_length

    def batch_of(self, phase: PhaseConfig) -> int:
        """Return the sequences per step in a phase, after the ramp-up."""
        return (phase.batch and phase.batch.global_) or self.batch.global_

    def micro_batch_of(self, phase: PhaseConfig) -> int:
        """Return the sequences per forward pass of one rank in a phase."""
        return (phase.batch and phase.batch.micro) or self.batch.micro

    @property
    def teacher_checkpoint(self) -> str | None:
        """Checkpoint of the teacher; null without one that runs beside the model."""
        if self.teacher is None:
            return None
        return self.init.from_ if self.teacher.from_ == "init" else self.teacher.from_

    @property
    def uses_own_batch(self) -> bool:
        """True if any step or validation splits `batch.global` into micro-batches of `batch.micro`."""
        own = (self.batch.global_, self.batch.micro)
        batches = [(self.batch_of(phase), self.micro_batch_of(phase)) for phase in self.phases]
        return self.validation is not None or own in batches

    @property
    def longest_sequence(self) -> int:
        """Tokens in the longest sequence of any phase."""
        return max(self.length_of(phase) for phase in self.phases)

    def span_length(self, source: str) -> int:
        """Return the tokens per span of a source: the longest sequence of the phases that read it."""
        lengths = (self.length_of(phase) for phase in self.phases if source in phase.blend)
        return max(lengths, default=self.seq_length)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values under the keys of run.yaml."""
        return self.model_dump(mode="json", by_alias=True)
