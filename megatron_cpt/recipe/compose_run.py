"""Composition of a run.yaml from the choices of a recipe: keys in the order of the contract, each with its reason."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_cpt.config import ModelConfig, RecomputeConfig, ScheduleConfig, format_count, format_number_of
from megatron_cpt.config.fields import key_help
from megatron_cpt.errors import UserError
from megatron_cpt.planning.cluster.advise import Advice
from megatron_cpt.planning.cost.memory import GIB
from megatron_cpt.planning.timeline.epochs import REPEAT_LIMIT
from megatron_cpt.planning.timeline.schedule import Schedule
from megatron_cpt.recipe.blend_weights import BlendWeights, SizedSource, weigh_sources
from megatron_cpt.recipe.commented_yaml import Node, Reasoned
from megatron_cpt.recipe.hold_out import RecipeSource
from megatron_cpt.recipe.pretraining import Pretraining
from megatron_cpt.recipe.training_values import PAPER, choose_min_lr
from megatron_cpt.recipe.weak_areas import WeakArea

SWITCH_LR = 0.2
SEED = 1234
_PAPER_RANGE = (100_000_000_000, 1_000_000_000_000)
_EPOCHS = "arXiv 2305.16264"
_GENERAL, _QA = "general", "qa"
_MOST_EVERY = 500  # steps between checkpoints and between validations
_POINTS = 10  # at least so many of both in a short run


@dataclass(frozen=True, kw_only=True)
class RecipeChoices:
    """Choices from which a run.yaml follows.

    Attributes:
        name: name of the run.
        init_from: checkpoint that training starts from, whether or not it exists.
        tokens: length of the run.
        max_lr: eta_max.
        seq_length: tokens per sequence.
        global_batch: sequences per step.
        general, qa: sources with their held-out data.
        quality: factor per general source, if it is not 1.
        areas: weak area per QA source, if an evaluation was given.
        evaluation: its file, for comments.
        layout_of: layouts of the adviser; None: one process.
    """

    name: str
    pretraining: Pretraining
    init_from: Reasoned[str]
    tokens: int
    max_lr: Reasoned[float]
    seq_length: Reasoned[int]
    global_batch: Reasoned[int]
    general: Sequence[RecipeSource]
    qa: Sequence[RecipeSource]
    quality: Mapping[str, float]
    areas: Mapping[str, WeakArea]
    evaluation: str | None
    advice: Advice | None = None

    @property
    def schedule(self) -> Schedule:
        """Learning-rate schedule of the run."""
        tokens_per_step = self.global_batch.value * self.seq_length.value
        section = ScheduleConfig(max_lr=self.max_lr.value, min_lr=choose_min_lr(self.max_lr.value).value)
        return Schedule.resolve(section, -(-self.tokens // tokens_per_step), tokens_per_step)


def compose_run(choices: RecipeChoices) -> dict[str, Node]:
    """Return the sections of a run.yaml.

    Raises:
        UserError: the run is too short for two phases.
        TooLongRunError: the run is too long for four epochs of the general sources.
    """
    schedule, record = choices.schedule, choices.pretraining.record
    switch = schedule.last_step_above(SWITCH_LR * schedule.max_lr)
    if switch >= schedule.steps:
        raise UserError(
            f"--tokens {choices.tokens}: makes {format_number_of(schedule.steps, 'step')}, too few to reach a fifth of "
            "the learning rate; raise it, or lower --global-batch"
        )
    weights = _weigh(choices, switch, schedule.steps)
    paper = f"the paper's pretraining and continued run ({PAPER})"
    tokenizer = choices.pretraining.tokenizer
    min_lr = choose_min_lr(choices.max_lr.value)
    every = max(1, min(_MOST_EVERY, schedule.steps // _POINTS))
    return {
        "name": Reasoned(choices.name, "of the model and the length of the run; any other is fine"),
        "output": Reasoned(f"runs/{choices.name}", "run directory: checkpoints, metrics and report"),
        "seed": Reasoned(SEED, "the default; another seed draws the data in another order"),
        "model": _model(choices.pretraining.model, choices.pretraining.model_source),
        **({"tokenizer": tokenizer} if tokenizer is not None else {}),
        "init": {
            "from": choices.init_from,
            "load": Reasoned(
                "weights",
                f"the paper found little difference between loading Adam's state and starting without it ({PAPER})",
            ),
        },
        "seq_length": choices.seq_length,
        "batch": {"global": choices.global_batch, "micro": _micro(choices)},
        "tokens": Reasoned(
            choices.tokens,
            f"given by --tokens: {format_count(choices.tokens)} = {schedule.steps:,} steps; "
            f"{_length_note(choices.tokens)}",
        ),
        "schedule": {
            "shape": Reasoned("cosine", f"the shape of the paper ({PAPER})"),
            "max_lr": choices.max_lr,
            "min_lr": min_lr,
            "warmup": Reasoned(0, f"every warm-up that the paper tried hurt ({PAPER})"),
        },
        "optimizer": {
            "name": Reasoned("adam", f"AdamW, as in {paper}"),
            "betas": record.betas or Reasoned([0.9, 0.95], f"not recorded: {paper}"),
            "eps": record.eps or Reasoned(1e-8, "not recorded: the default of Adam"),
            "weight_decay": record.weight_decay or Reasoned(0.1, f"not recorded: {paper}"),
            "clip_grad": record.clip_grad or Reasoned(1.0, f"not recorded: {paper}"),
        },
        "sources": {source.name: _source(source) for source in (*choices.general, *choices.qa)},
        "phases": _phases(choices, weights, switch, schedule.steps),
        **_layout(choices),
        "checkpoint": {
            "every": Reasoned(every, f"a tenth of the run, at most {_MOST_EVERY} steps"),
            "keep": Reasoned(3, "if the newest is damaged, the run falls back to an older one"),
        },
        "validation": {
            "every": Reasoned(every, "as often as checkpoints"),
            "batches": Reasoned(20, "20 global batches per source, at most its whole held-out data"),
            "sources": {source.name: _held_out(source) for source in (*choices.general, *choices.qa)},
        },
        "log": {"every": Reasoned(10, "the default: steps between lines of metrics")},
    }


def _length_note(tokens: int) -> str:
    inside = _PAPER_RANGE[0] <= tokens <= _PAPER_RANGE[1]
    return (
        f"{'inside' if inside else 'OUTSIDE'} the 100B to 1T for which the paper shows that the recipe works ({PAPER})"
    )


def _weigh(choices: RecipeChoices, switch: int, steps: int) -> BlendWeights:
    batch, length = choices.global_batch.value, choices.seq_length.value

    def sized(source: RecipeSource, factor: float) -> SizedSource:
        return SizedSource(source.tokens, source.samples(length), factor)

    areas = choices.areas
    return weigh_sources(
        {source.name: sized(source, choices.quality.get(source.name, 1.0)) for source in choices.general},
        {
            source.name: sized(source, areas[source.name].factor if source.name in areas else 1.0)
            for source in choices.qa
        },
        general_samples=switch * batch,
        qa_samples=(steps - switch) * batch,
    )


def _model(model: ModelConfig, where: str) -> dict[str, Node]:
    """Return the fields of a model that have no default or another value, as `plan` needs them before the import."""
    fields = model.model_dump(mode="json", exclude_defaults=True, exclude={"preset"})
    if model.rope_scaling is not None:
        fields["rope_scaling"] = model.rope_scaling.model_dump(mode="json")
    return _model_section(fields, ("model",), where)


def _model_section(fields: Mapping[str, object], path: tuple[str, ...], where: str) -> dict[str, Node]:
    section: dict[str, Node] = {}
    for key, value in fields.items():
        if isinstance(value, Mapping):
            section[key] = _model_section(value, (*path, key), where)
        else:
            meaning = key_help((*path, key)).partition(";")[0].partition(":")[0]
            section[key] = Reasoned(value, f"{meaning} ({where})")
    return section


def _source(source: RecipeSource) -> dict[str, Node]:
    measured = f"{source.tokens:,} tokens in {source.documents:,} documents, counted"
    if source.split_from:
        measured += f"; {', '.join(source.split_from)} without the documents held out for validation"
    return {
        "path": Reasoned(_path(source.path), measured),
        "max_epochs": Reasoned(
            REPEAT_LIMIT,
            f"up to 4 epochs repeated tokens are worth almost as much as new ones ({_EPOCHS}); `plan` refuses more",
        ),
    }


def _held_out(source: RecipeSource) -> Reasoned[str | list[str]]:
    how = "given by --held-out; `megatron-cpt overlap` compares it with the sources"
    if source.split_from:
        how = f"held out of {', '.join(source.split_from)} by a hash of each document, so no copy of one is trained on"
    return Reasoned(_path(source.held_out or ()), f"{source.held_out_tokens:,} tokens, {how}")


def _path(paths: Sequence[str]) -> str | list[str]:
    return paths[0] if len(paths) == 1 else list(paths)


def _phases(choices: RecipeChoices, weights: BlendWeights, switch: int, steps: int) -> list[dict[str, Node]]:
    rest = 1.0 - weights.qa_share
    total = sum(source.tokens * choices.quality.get(source.name, 1.0) for source in choices.general)
    general = {
        source.name: Reasoned(weights.general[source.name], _general_reason(choices, weights, source, total))
        for source in choices.general
    }
    qa = {
        source.name: Reasoned(weights.qa_phase[source.name], f"{rest:.4g} of its weight in phase {_GENERAL}")
        for source in choices.general
    }
    qa |= {
        source.name: Reasoned(weights.qa_phase[source.name], _qa_reason(choices, weights, source))
        for source in choices.qa
    }
    rate = SWITCH_LR * choices.max_lr.value
    return [
        {
            "name": Reasoned(_GENERAL, f"the pretraining sources, with more weight on the better ones ({PAPER})"),
            "blend": general,
            "until": {
                "lr": Reasoned(
                    SWITCH_LR,
                    f"the switch at eta_max / 5 = {rate:.4g}, the best of the paper's experiments ({PAPER}): after "
                    f"step {switch:,}, {switch / steps:.2%} of the run",
                )
            },
        },
        {
            "name": Reasoned(_QA, f"the general blend, with {weights.qa_share:.2%} of questions and answers ({PAPER})"),
            "blend": qa,
        },
    ]


def _general_reason(choices: RecipeChoices, weights: BlendWeights, source: RecipeSource, total: float) -> str:
    quality = choices.quality.get(source.name, 1.0)
    product = f"{format_count(source.tokens)} tokens" + (f" x {quality:g} (--quality)" if quality != 1.0 else "")
    return f"{product} of {format_count(total)} in all; {_epochs(weights, source.name)}"


def _qa_reason(choices: RecipeChoices, weights: BlendWeights, source: RecipeSource) -> str:
    product = f"{format_count(source.tokens)} tokens"
    area = choices.areas.get(source.name)
    if area is not None:
        scores = ", ".join(f"{task} {accuracy:.3f}" for task, accuracy in area.accuracies.items())
        product += (
            f" x {area.factor:.3g} for the weakness of the model: error {area.error:.3f} / mean error over the areas "
            f"(accuracy in {choices.evaluation}: {scores})"
        )
    share = f"its part of the {weights.qa_share:.2%} for QA data (10 % in the paper, {PAPER}), by {product}"
    return f"{share}; {_epochs(weights, source.name)}"


def _epochs(weights: BlendWeights, name: str) -> str:
    epochs = f"{weights.epochs[name]:.2f} epochs in the run"
    if name not in weights.cut:
        return epochs
    return f"CUT from {weights.wanted[name]:.4g} to stay within 4 epochs ({_EPOCHS}), others share the rest; {epochs}"


def _micro(choices: RecipeChoices) -> Reasoned[int]:
    if choices.advice is None:
        return Reasoned(1, "sequences per forward pass: least memory, no effect on the result")
    return Reasoned(choices.advice.ranking[0].config.batch.micro, _adviser(choices.advice))


def _adviser(advice: Advice) -> str:
    return f"adviser, for {advice.num_gpus:,} x {advice.gpu.name}"


def _layout(choices: RecipeChoices) -> dict[str, Node]:
    """Return the sections `parallel`, `precision` and `recompute`."""
    advice = choices.advice
    if advice is None:
        return {
            "parallel": {
                "tensor": Reasoned(1, "one process; with --gpus and --gpu the adviser chooses a layout"),
                "pipeline": Reasoned(1, "one process"),
            },
            "precision": {"compute": Reasoned("fp32", "no GPU was named, and a CPU computes fp32 fastest")},
        }
    best = advice.ranking[0]
    parallel, recompute, reason = best.config.parallel, best.config.recompute, _adviser(advice)
    speed = (best.plain or best.speed).tokens_per_gpu
    first = (
        f"{reason}: the fastest of {advice.num_tried:,} layouts by estimate, {speed:,.0f} tokens/s per GPU and "
        f"{best.memory.total / GIB:.1f} of {advice.gpu.memory_gib:.1f} GiB; `plan --advise` shows others"
    )
    keys: dict[str, Node] = {
        "tensor": Reasoned(parallel.tensor, first),
        "pipeline": Reasoned(parallel.pipeline, reason),
        "virtual_pipeline": Reasoned(parallel.virtual_pipeline, reason),
        "context": Reasoned(parallel.context, reason),
        "sequence": Reasoned(parallel.sequence, f"{reason}: saves memory wherever tensor is above 1"),
        "distributed_optimizer": Reasoned(True, f"{reason}: the replicas share Adam's state"),
    }
    if parallel.pipeline_layout is not None:
        keys["pipeline_layout"] = Reasoned(
            parallel.pipeline_layout, f"{reason}: layers per model chunk that balance the time of the stages"
        )
    return {
        "parallel": keys,
        "precision": {"compute": Reasoned("bf16", f"{advice.gpu.title}: matrix products in bf16, fp32 master weights")},
        "recompute": _recompute(recompute, reason),
    }


def _recompute(recompute: RecomputeConfig, reason: str) -> dict[str, Node]:
    section: dict[str, Node] = {"granularity": Reasoned(recompute.granularity, reason)}
    if recompute.granularity == "full":
        section["method"] = Reasoned(recompute.method, reason)
        section["num_layers"] = Reasoned(recompute.num_layers, reason)
    return section
