"""run.yaml as frozen, strict models: one class a section. Nothing here reads a disk or imports torch."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from megatron_cpt.config.model import ModelConfig
from megatron_cpt.config.quantities import COUNT_SCHEMA, TokenCount, parse_count, parse_span
from megatron_cpt.config.resilience import ResilienceConfig
from megatron_cpt.config.section import Section
from megatron_cpt.config.speed import SpeedConfig

MOST_RAMP_SIZES = 1024


class InitConfig(Section):
    """Where the weights come from at the first start; a start from an `output` with checkpoints ignores it."""

    from_: str | None = Field(None, alias="from")
    """A checkpoint, or a run directory (its newest). Left out: random weights."""
    load: Literal["weights", "weights+optimizer"] = "weights"
    """What to take: step, data and schedule always start anew."""


class RampUpConfig(Section):
    """A global batch that grows; the meaning is that of Megatron-LM's `--rampup-batch-size START INCREMENT SAMPLES`."""

    start: int = Field(gt=0)
    """The first global batch."""
    increment: int = Field(gt=0)
    """What it grows by, again and again, up to batch.global."""
    samples: Annotated[int, BeforeValidator(parse_count), Field(gt=0), WithJsonSchema(COUNT_SCHEMA)]
    """The samples over which it grows: each size has an equal share of them."""


class BatchConfig(Section):
    """Batch sizes in sequences."""

    global_: int = Field(alias="global", gt=0)
    """Sequences in one step over all ranks."""
    micro: int = Field(1, gt=0)
    """Sequences in one forward pass of one rank."""
    ramp_up: RampUpConfig | None = None
    """Begin with a smaller global batch; left out: batch.global from the first step on."""

    @property
    def ramp_sizes(self) -> range:
        """The global batches of the ramp, the full one left out; empty where nothing grows."""
        ramp = self.ramp_up
        return range(0) if ramp is None else range(ramp.start, self.global_, ramp.increment)

    @model_validator(mode="after")
    def _few_sizes(self) -> BatchConfig:
        if len(self.ramp_sizes) > MOST_RAMP_SIZES:  # each is checked, and planned as a segment of its own
            raise ValueError(f"ramp_up grows through more than {MOST_RAMP_SIZES:,} sizes; choose a larger increment")
        return self


class Span(Section):
    """A length of the run, in exactly one unit."""

    steps: int | None = Field(None, ge=0)
    tokens: Annotated[int, BeforeValidator(parse_count)] | None = Field(None, ge=0)
    fraction: float | None = Field(None, ge=0, le=1)
    """Of the whole run."""

    @model_validator(mode="after")
    def _one_unit(self) -> Span:
        if sum(x is not None for x in (self.steps, self.tokens, self.fraction)) != 1:
            raise ValueError("give exactly one of steps, tokens, fraction")
        return self


SpanField = Annotated[Span, BeforeValidator(parse_span)]


class ScheduleConfig(Section):
    """The learning rate over the run."""

    shape: Literal["cosine", "wsd", "linear", "constant"] = "cosine"
    max_lr: float = Field(gt=0)
    """The highest rate; for a continued run the rate that pretraining ended on."""
    min_lr: float = Field(0.0, ge=0)
    """The rate at the end of the run."""
    warmup: SpanField = Field(default_factory=lambda: Span(steps=0))
    """Linear from 0 to max_lr over this span: steps (100), tokens (16B) or a fraction of the run (0.01)."""
    decay: SpanField = Field(default_factory=lambda: Span(fraction=0.2))
    """wsd only: the span at the end over which the rate falls."""
    decay_shape: Literal["linear", "cosine", "exponential", "minus_sqrt"] = "linear"
    """wsd only: how it falls."""


Beta = Annotated[float, Field(strict=True, ge=0, lt=1)]


class OptimizerConfig(Section):
    """Adam with decoupled weight decay (AdamW)."""

    name: Literal["adam"] = "adam"
    betas: Annotated[tuple[Beta, Beta], Field(strict=False)] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    """Not applied to biases and norms."""
    clip_grad: float = Field(1.0, ge=0)
    """Global gradient norm; 0: no clipping."""


class FimConfig(Section):
    """Fill in the middle: pieces of documents rearranged to prefix, suffix, middle or suffix, prefix, middle."""

    rate: float = Field(0.5, gt=0, le=1)
    """Share of the pieces that are rearranged."""
    spm_rate: float = Field(0.5, ge=0, le=1)
    """Share of those that have the suffix first."""
    prefix_id: int = Field(ge=0)
    """The token in front of the prefix."""
    middle_id: int = Field(ge=0)
    """The token in front of the middle."""
    suffix_id: int = Field(ge=0)
    """The token in front of the suffix."""


class SourceConfig(Section):
    """One source of tokens."""

    path: str | list[str]
    """A prefix of .bin/.idx, a list of them, or a glob."""
    max_epochs: float | None = Field(None, gt=0)
    """How often this source may be read over the run."""
    on_exhausted: Literal["error", "renormalize"] = "error"
    """At max_epochs. error: refuse the plan; renormalize: the others of the blend share its weight from there on."""
    fim: FimConfig | None = None
    """Fill in the middle, for code; left out: documents as they are."""
    cache: str | None = None
    """A folder on each node's own disk that keeps what was read, where path is an object store or a shared disk."""
    tokens: TokenCount | None = None
    """Its size, for planning on a machine that does not have the files; where they are, their own size counts."""

    @property
    def paths(self) -> list[str]:
        """The prefixes or globs as a list."""
        return [self.path] if isinstance(self.path, str) else list(self.path)


class Until(Section):
    """Where a phase ends, in exactly one unit, counted from the start of the run."""

    lr: float | None = Field(None, gt=0, lt=1)
    """The last step whose rate is above this fraction of max_lr."""
    tokens: TokenCount | None = None
    step: int | None = Field(None, gt=0)
    """The last step of the phase."""

    @model_validator(mode="after")
    def _one_unit(self) -> Until:
        if sum(x is not None for x in (self.lr, self.tokens, self.step)) != 1:
            raise ValueError("give exactly one of lr, tokens, step")
        return self


class PhaseBatchConfig(Section):
    """Batch sizes of a phase, where they are not the run's own."""

    global_: int | None = Field(None, alias="global", gt=0)
    """Sequences in one step over all ranks; the ramp-up has no say in this phase."""
    micro: int | None = Field(None, gt=0)
    """Sequences in one forward pass of one rank."""


class PhaseConfig(Section):
    """A part of the run with one blend."""

    name: str = Field(min_length=1)
    """What metrics and plans call it."""
    blend: dict[str, float] = Field(min_length=1)
    """Weight of each source; they need not sum to 1."""
    until: Until | None = None
    """Where it ends; the last phase has none and runs to the end."""
    seq_length: int | None = Field(None, gt=0)
    """Tokens in a sequence of this phase; left out: the run's own."""
    batch: PhaseBatchConfig | None = None
    """Batch sizes of this phase; left out: the run's own."""


class DocumentsConfig(Section):
    """What happens where one document ends and the next begins inside a sample."""

    reset_attention: bool = False
    """A token attends only to its own document."""
    reset_positions: bool = False
    """Positions start at 0 in each document."""
    eod_loss: bool = True
    """Count the loss of what follows an end-of-document token."""
    eod_id: int | None = Field(None, ge=0)
    """The end-of-document id; left out: the tokenizer's."""


class ParallelConfig(Section):
    """How the model is split; what is left of the world size is data parallel."""

    tensor: int = Field(1, gt=0)
    pipeline: int = Field(1, gt=0)
    virtual_pipeline: int = Field(1, gt=0)
    """Model chunks a pipeline rank; above 1: the interleaved schedule."""
    context: int = Field(1, gt=0)
    sequence: bool = False
    """Sequence parallelism in the tensor-parallel group (no effect at tensor: 1)."""
    distributed_optimizer: bool = True
    """Shard the optimizer over the data-parallel ranks."""

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one replica."""
        return self.tensor * self.pipeline * self.context


class Fp8Config(Section):
    """FP8 in the linear layers of the transformer; embedding, output layer and attention stay in `compute`."""

    backend: Literal["transformer_engine", "emulated"] = "transformer_engine"
    """emulated: the numbers of FP8 on any device, at no gain in speed; for recipes delayed and tensorwise."""
    recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] = "delayed"
    """How scaling factors come about: tensorwise is current scaling."""
    format: Literal["hybrid", "e4m3"] = "hybrid"
    """hybrid: E4M3, gradients E5M2."""
    first_last_bf16: int = Field(0, ge=0)
    """Layers at each end of the model that stay in `compute`; not with recipe delayed, as in megatron-core."""
    amax_history: int = Field(1024, gt=0)
    """delayed only: entries of the history of largest magnitudes."""
    amax_compute: Literal["max", "most_recent"] = "max"
    """delayed only: which of them sets the scale."""
    margin: int = Field(0, ge=0)
    """delayed only: powers of two to stay below the top of the format."""
    params: bool = False
    """Keep the weights of these layers in FP8 and gather them so; not for gated MLPs, nor emulated."""


class Fp4Config(Section):
    """FP4 in the linear layers of the transformer, by Transformer Engine on Blackwell GPUs; not beside FP8."""

    recipe: Literal["nvfp4"] = "nvfp4"
    """nvfp4: blocks of 16 values with an FP8 scale each, and one fp32 scale a tensor."""
    first_last_bf16: int = Field(0, ge=0)
    """Layers at each end of the model that stay in bf16."""


class PrecisionConfig(Section):
    """Number formats."""

    compute: Literal["fp32", "bf16"] = "bf16"
    """bf16 keeps fp32 master weights and fp32 gradients."""
    fp8: Fp8Config | None = None
    fp4: Fp4Config | None = None

    @property
    def uses_transformer_engine(self) -> bool:
        """Whether matrix products run in FP8 or FP4, which takes Transformer Engine."""
        return self.fp4 is not None or (self.fp8 is not None and self.fp8.backend == "transformer_engine")

    @property
    def has_fp8_weights(self) -> bool:
        """Whether the weights themselves are in FP8."""
        return self.fp8 is not None and self.fp8.params


class RecomputeConfig(Section):
    """Activation recomputation."""

    granularity: Literal["none", "selective", "full"] = "none"
    """selective: core attention; full: whole layers."""
    method: Literal["uniform", "block"] = "uniform"
    """full only."""
    num_layers: int = Field(1, gt=0)
    """full only: layers a unit (uniform) or layers recomputed a stage (block)."""


class CheckpointConfig(Section):
    """When checkpoints are written and how many stay."""

    every: int | None = Field(None, gt=0)
    """Steps between checkpoints; left out: only at the end and when stopped."""
    keep: int | None = Field(None, gt=0)
    """How many of the newest stay; left out: all."""
    keep_every: int | None = Field(None, gt=0)
    """Those whose step it divides stay for ever, beside the newest."""
    async_: bool = Field(False, alias="async")
    """Copy the state and write it in the background while training goes on."""
    verify: Literal["full", "sampled", "none"] = "full"
    """On loading: full: every checksum; sampled: one shard in 16; none: that every file is there and has its size."""


class ValidationConfig(Section):
    """Held-out loss by source; also measured before the first step and after the last."""

    every: int | None = Field(None, gt=0)
    """Steps between validations; left out: only before the first step and after the last."""
    batches: int = Field(20, gt=0)
    """Global batches of each source; at most one epoch of it."""
    sources: dict[str, str | list[str]] = Field(min_length=1)
    """NAME: a prefix of .bin/.idx, a list of them, or a glob."""


class WandbConfig(Section):
    """Weights & Biases."""

    project: str
    """Where the run appears."""
    entity: str | None = None
    mode: Literal["online", "offline"] = "online"


def _parse_hook(entry: Any) -> Any:
    if isinstance(entry, str) and not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*", entry):
        raise ValueError('not of the form "module:Class", as in "my_package.hooks:EvalHook"')
    return entry


HookEntry = Annotated[str, BeforeValidator(_parse_hook)]


class LogConfig(Section):
    """What is written down and how often."""

    every: int = Field(10, gt=0)
    """Steps between lines on the console and in metrics.jsonl."""
    tensorboard: bool = False
    wandb: WandbConfig | None = None
    hooks: list[HookEntry] = Field(default_factory=list)
    """Your own hooks, "module:Class" each: classes derived from megatron_cpt.Hook, created without arguments."""


def _model_preset(value: Any) -> Any:
    return {"preset": value} if isinstance(value, str) else value


class RunConfig(Section):
    """A whole run.yaml."""

    name: str = Field(min_length=1)
    """What logs and reports call it."""
    output: str = Field(min_length=1)
    """The run directory."""
    seed: int = Field(1234, ge=0, lt=2**62)  # torch takes 64 bits, and ranks add to it
    model: Annotated[ModelConfig, BeforeValidator(_model_preset)]
    tokenizer: str | None = None
    """KIND:PATH of the tokenizer the data were made with: gives the end-of-document id and is compared on resume."""
    init: InitConfig = Field(default_factory=InitConfig)
    seq_length: int = Field(gt=0)
    """Tokens in a sequence."""
    batch: BatchConfig
    tokens: TokenCount
    """Length of the run."""
    stop_at_step: int | None = Field(None, gt=0)
    """Save there and end with status 0; a later call goes on."""
    schedule: ScheduleConfig
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    sources: dict[str, SourceConfig] = Field(min_length=1)
    phases: list[PhaseConfig] = Field(min_length=1)
    documents: DocumentsConfig = Field(default_factory=DocumentsConfig)
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    precision: PrecisionConfig = Field(default_factory=PrecisionConfig)
    recompute: RecomputeConfig = Field(default_factory=RecomputeConfig)
    speed: SpeedConfig = Field(default_factory=SpeedConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    validation: ValidationConfig | None = None
    log: LogConfig = Field(default_factory=LogConfig)
    resilience: ResilienceConfig = Field(default_factory=ResilienceConfig)

    @property
    def tokens_per_step(self) -> int:
        """Tokens in a step of the run's own batch and length; of ramp-up and phases the plan's segments tell."""
        return self.batch.global_ * self.seq_length

    def length_of(self, phase: PhaseConfig) -> int:
        """Tokens in a sequence of a phase."""
        return phase.seq_length or self.seq_length

    def micro_batch_of(self, phase: PhaseConfig) -> int:
        """Sequences in one forward pass of one rank in a phase."""
        return (phase.batch and phase.batch.micro) or self.batch.micro

    @property
    def uses_own_batch(self) -> bool:
        """Whether some steps are of `batch.global` in micro-batches of `batch.micro`, as those of a validation are."""
        own = (self.batch.global_, self.batch.micro)
        batches = [
            ((phase.batch and phase.batch.global_) or self.batch.global_, self.micro_batch_of(phase))
            for phase in self.phases
        ]
        return self.validation is not None or own in batches

    @property
    def longest_sequence(self) -> int:
        """Tokens in the longest sequence of any phase."""
        return max(self.length_of(phase) for phase in self.phases)

    def span_length(self, source: str) -> int:
        """Tokens in the chunks that a source is cut into: the longest sequences it is read in."""
        lengths = (self.length_of(phase) for phase in self.phases if source in phase.blend)
        return max(lengths, default=self.seq_length)

    def to_dict(self) -> dict[str, Any]:
        """Plain values under the names of run.yaml."""
        return self.model_dump(mode="json", by_alias=True)
