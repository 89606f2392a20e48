"""Recipe of a continued run: from a checkpoint and sources to a run.yaml that the planner accepts."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_cpt.checkpoint.layout import is_checkpoint
from megatron_cpt.checkpoint.record import read_run
from megatron_cpt.config import ModelConfig, RunConfig, draft_config, format_count
from megatron_cpt.config.yamlfile import parse_yaml
from megatron_cpt.errors import UserError
from megatron_cpt.files.atomic import write_atomically
from megatron_cpt.files.output_path import output_problem
from megatron_cpt.files.whole_io import is_folder
from megatron_cpt.planning import RunPlan
from megatron_cpt.planning.cluster.advise import Advice, advise
from megatron_cpt.planning.cluster.estimate import Cluster, find_gpu, place_on_cluster
from megatron_cpt.prepare import PreparedRun, prepare_config
from megatron_cpt.recipe.blend_weights import TooLongRunError
from megatron_cpt.recipe.commented_yaml import Reasoned, dump_commented, without_reasons
from megatron_cpt.recipe.compose_run import RecipeChoices, compose_run
from megatron_cpt.recipe.hold_out import RecipeSource, expect_rest, group_by_name, read_source, split_sources
from megatron_cpt.recipe.longest_run import advise_tokens
from megatron_cpt.recipe.pretraining import Pretraining, read_pretraining
from megatron_cpt.recipe.repeated_data import refuse_repeated_data
from megatron_cpt.recipe.training_values import PAPER, choose_batch, choose_max_lr, choose_seq_length
from megatron_cpt.recipe.weak_areas import WeakArea, find_weak_areas

_MAX_NAME = 100


@dataclass(frozen=True, kw_only=True)
class RecipeOptions:
    """Options of a recipe.

    Attributes:
        general: pretraining sources, `NAME=PREFIX` each; a name that occurs again adds a prefix.
        qa: sources of questions and answers, likewise.
        tokens: length of the run.
        quality: `NAME=FACTOR` of general sources: their tokens count so many times.
        held_out: `NAME=PREFIX` of held-out data per source.
        split: share of the documents to hold out of sources without held-out data; None: none.
        split_folder: place of the data that `split` writes; None: folder `split` beside the run.yaml.
        evaluation: results.json of `megatron-cpt evaluate`.
        areas: `TASK=SOURCE`: the QA source that teaches what a task measures.
        max_lr: learning rate that pretraining ended on; None: as recorded.
        propose_lr: propose one if it is not recorded.
        seq_length, global_batch: None: as recorded, or by the paper.
        num_gpus, gpu: cluster for which the adviser chooses a layout; None: one process.
        import_to: checkpoint that a Hugging Face folder or a Megatron checkpoint will be imported to; None:
            `checkpoints/NAME`.
        model: preset, or YAML file with a model section, for checkpoints without a usable config.
        allow_pickle: accept `.bin` weights of a Hugging Face folder.
        tokenizer: KIND:PATH; None: the checkpoint's.
    """

    general: Sequence[str]
    qa: Sequence[str]
    tokens: int
    quality: Sequence[str] = ()
    held_out: Sequence[str] = ()
    split: float | None = None
    split_folder: Path | None = None
    evaluation: Path | None = None
    areas: Sequence[str] = ()
    max_lr: float | None = None
    propose_lr: bool = False
    seq_length: int | None = None
    global_batch: int | None = None
    num_gpus: int | None = None
    gpu: str | None = None
    import_to: Path | None = None
    model: str | None = None
    allow_pickle: bool = False
    tokenizer: str | None = None


@dataclass(frozen=True)
class Recipe:
    """Written recipe.

    Attributes:
        import_command: command to run before training; None: the checkpoint is ready.
        cluster: speed and time on the cluster; None without one.
    """

    text: str
    config: RunConfig
    plan: RunPlan
    cluster: Cluster | None
    import_command: str | None


def write_recipe(
    checkpoint: Path,
    output: Path,
    options: RecipeOptions,
    *,
    overwrite: bool = False,
    progress: Callable[[int], None] = lambda amount: None,
) -> Recipe:
    """Write a run.yaml by the paper's rules, once the planner has accepted it.

    Args:
        checkpoint: a Hugging Face folder, a Megatron checkpoint, one of our checkpoints, or a run directory.
        output: the run.yaml to write.
        overwrite: replace the run.yaml; earlier splits are never replaced.
        progress: called with the number of bytes after each block of a split.

    Raises:
        UserError: an option is wrong, or the planner refuses the run; nothing was written.
        RefusedError: the checkpoint or a dataset is damaged or unsuitable; nothing was written.
    """
    if (output.exists() or output.is_symlink()) and not overwrite:
        raise UserError(f"{output}: exists already; choose another --output, or replace it: --overwrite")
    if output.is_dir():
        raise UserError(f"--output {output}: is a folder; give a file, such as {output / 'run.yaml'}")
    if not is_folder(output.parent):
        raise UserError(f"--output {output}: {output.parent}: no such folder; create it, or choose another output")
    if problem := output_problem(output.parent if output.exists() else output, ending=".tmp"):
        raise UserError(f"--output {output}: {problem}")
    choices, import_command = _choose(checkpoint, options)
    general, qa = [source.name for source in choices.general], [source.name for source in choices.qa]
    sources = [*choices.general, *choices.qa]
    with ExitStack() as stack:
        if options.split is not None and not all(source.held_out for source in sources):
            # Before hours of splitting: a refusal of the planner, with all documents in training and validation.
            rest = [source if source.held_out else expect_rest(source, options.split) for source in sources]
            with _shorter_run_in_errors(_with_sources(choices, rest), options):
                _finish(_with_sources(choices, [_self_validated(source) for source in sources]), output, options)
            folder = options.split_folder or output.parent / "split"
            split = split_sources(sources, folder, share=options.split, progress=progress)
            sources = stack.enter_context(split)
        _check_held_out(sources, choices.seq_length.value)
        assert [source.name for source in sources] == [*general, *qa]
        choices = _with_sources(choices, sources)
        with _shorter_run_in_errors(choices, options):
            text, prepared, cluster = _finish(choices, output, options)
        write_atomically(output, text)
    return Recipe(text, prepared.config, prepared.plan, cluster, import_command)


def _choose(checkpoint: Path, options: RecipeOptions) -> tuple[RecipeChoices, str | None]:
    """Return the choices before documents are held out, and the command that imports the checkpoint, if necessary."""
    general, qa = _read_sources(options)
    areas = _areas(options, [source.name for source in qa])
    pretraining = read_pretraining(
        checkpoint, named_model=options.model, allow_pickle=options.allow_pickle, tokenizer=options.tokenizer
    )
    init_from, import_command = _start(checkpoint, pretraining, options)
    seq_length = choose_seq_length(pretraining, options.seq_length)
    _check_lengths([*general, *qa], seq_length.value)
    choices = RecipeChoices(
        name=_file_name(f"{pretraining.name}-{format_count(options.tokens)}"),
        pretraining=pretraining,
        init_from=init_from,
        tokens=options.tokens,
        max_lr=choose_max_lr(pretraining, given=options.max_lr, propose=options.propose_lr),
        seq_length=seq_length,
        global_batch=_batch(pretraining, seq_length.value, options.tokens, options),
        general=general,
        qa=qa,
        quality=_factors(options.quality, [source.name for source in general]),
        areas=areas,
        evaluation=str(options.evaluation) if options.evaluation else None,
    )
    return choices, import_command


def _batch(pretraining: Pretraining, seq_length: int, tokens: int, options: RecipeOptions) -> Reasoned[int]:
    return choose_batch(pretraining, seq_length, tokens, given=options.global_batch, num_gpus=options.num_gpus)


@contextmanager
def _shorter_run_in_errors(choices: RecipeChoices, options: RecipeOptions) -> Iterator[None]:
    """Name the length that passes in the error of a run that is too long for its data."""

    def shorten(tokens: int) -> RecipeChoices:
        batch = _batch(choices.pretraining, choices.seq_length.value, tokens, options)
        return replace(choices, tokens=tokens, global_batch=batch)

    try:
        yield
    except TooLongRunError as error:
        tokens = advise_tokens(choices.tokens, shorten)
        advice = "shorten the run" if tokens is None else f"give --tokens {tokens}"
        raise UserError(f"{error}: {advice}, or add data") from error


def _read_sources(options: RecipeOptions) -> tuple[list[RecipeSource], list[RecipeSource]]:
    general, qa = group_by_name(options.general, "--general"), group_by_name(options.qa, "--qa")
    held_out = group_by_name(options.held_out, "--held-out")
    if both := sorted(general.keys() & qa.keys()):
        raise UserError(f"--qa {both[0]}: is also a general source; give the two different names")
    _require_known(held_out, [*general, *qa], "--held-out")
    if long := [name for name in (*general, *qa) if len(name) > _MAX_NAME]:
        raise UserError(f"{long[0][:20]}...: a source's name of {len(long[0])} characters; give at most {_MAX_NAME}")
    if options.split is not None and not 0 < options.split < 1:
        raise UserError(f"--split {options.split:g}: give a share of the documents above 0 and below 1, such as 0.1%")
    without = [name for name in (*general, *qa) if name not in held_out]
    if without and options.split is None:
        raise UserError(
            f"source {without[0]}: no held-out data, so nothing would show what the model learns or forgets; give "
            f"--held-out {without[0]}=PREFIX, or let the command hold documents out: --split 0.1%"
        )
    read = {
        name: read_source(name, paths, held_out.get(name))
        for sources in (general, qa)
        for name, paths in sources.items()
    }
    refuse_repeated_data(list(read.values()), options.split)
    return [read[name] for name in general], [read[name] for name in qa]


def _areas(options: RecipeOptions, qa: Sequence[str]) -> dict[str, WeakArea]:
    if options.evaluation is None and options.areas:
        raise UserError(f"--area {options.areas[0]}: needs the result of an evaluation: --evaluation results.json")
    if options.evaluation is None:
        return {}
    sources = group_by_name(options.areas, "--area")
    tasks: dict[str, list[str]] = {}
    for task, names in sources.items():
        _require_known(names, qa, f"--area {task}")
        for name in names:
            tasks.setdefault(name, []).append(task)
    if not tasks:
        raise UserError("--evaluation: name the QA source that teaches what a task measures: --area TASK=SOURCE")
    return find_weak_areas(options.evaluation, tasks)


def _factors(entries: Sequence[str], general: Sequence[str]) -> dict[str, float]:
    found = {}
    grouped = group_by_name(entries, "--quality")
    _require_known(grouped, general, "--quality")
    for name, values in grouped.items():
        try:
            factor = float(values[-1])
        except ValueError:
            factor = 0.0
        if not 0 < factor <= 1000 or len(values) > 1:
            raise UserError(f"--quality {name}={','.join(values)}: give one factor above 0, at most 1,000, such as 2")
        found[name] = factor
    return found


def _require_known(names: Iterable[str], known: Sequence[str], option: str) -> None:
    for name in names:
        if name not in known:
            raise UserError(f"{option} {name}: no such source; choose one of {', '.join(known)}")


def _check_lengths(sources: Sequence[RecipeSource], seq_length: int) -> None:
    for source in sources:
        if not source.samples(seq_length):
            raise UserError(
                f"source {source.name}: {source.tokens:,} tokens are too few for one sample of seq_length + 1 = "
                f"{seq_length + 1:,}; add data, shorten the sequences (--seq-length) or omit the source"
            )


def _check_held_out(sources: Sequence[RecipeSource], seq_length: int) -> None:
    for source in sources:
        if source.held_out_tokens <= seq_length:
            raise UserError(
                f"source {source.name}: its held-out data has {source.held_out_tokens:,} tokens, too few for one "
                f"sample of seq_length + 1 = {seq_length + 1:,}; hold out more: a larger --split, or --held-out "
                f"{source.name}=PREFIX"
            )


def _start(checkpoint: Path, pretraining: Pretraining, options: RecipeOptions) -> tuple[Reasoned[str], str | None]:
    """Return the checkpoint to start from, and the command that creates it if it does not exist."""
    if pretraining.can_start:
        if options.import_to is not None:
            raise UserError(f"--checkpoint-dir: {pretraining.path} needs no import; omit the option")
        return Reasoned(str(pretraining.path), f"the checkpoint to continue ({PAPER})"), None
    target = options.import_to or Path("checkpoints", _file_name(pretraining.name))
    reason = f"{checkpoint} as `megatron-cpt convert import` writes it"
    if is_checkpoint(target):
        if ModelConfig.model_validate(read_run(target).get("model")) != pretraining.model:
            raise UserError(
                f"--checkpoint-dir {target}: holds another model than {checkpoint}; choose another folder, or continue "
                "that checkpoint itself: give it as CHECKPOINT"
            )
        return Reasoned(str(target), reason), None
    words = ["megatron-cpt", "convert", "import", str(checkpoint), str(target)]
    words += ["--model", options.model] if options.model is not None else []
    words += ["--allow-pickle"] if options.allow_pickle else []
    command = shlex.join(words)
    return Reasoned(str(target), f"{reason}: run `{command}` before training"), command


def _file_name(name: str) -> str:
    """Return a name without the characters that would make other folders of it."""
    return re.sub(r"[^\w.+-]+", "-", name).strip("-.")[:_MAX_NAME] or "run"


def _self_validated(source: RecipeSource) -> RecipeSource:
    return source if source.held_out else replace(source, held_out=source.path, held_out_tokens=source.tokens)


def _with_sources(choices: RecipeChoices, sources: Sequence[RecipeSource]) -> RecipeChoices:
    count = len(choices.general)
    return replace(choices, general=sources[:count], qa=sources[count:])


def _finish(choices: RecipeChoices, output: Path, options: RecipeOptions) -> tuple[str, PreparedRun, Cluster | None]:
    """Return the text of the run.yaml, and the run as the planner accepts it.

    Raises:
        UserError: the planner refuses it, or no layout fits the GPUs.
        RefusedError: a dataset is damaged, or of another tokenizer.
    """
    if options.num_gpus is not None and options.gpu is not None:
        choices = replace(choices, advice=_advise(choices, output, options.num_gpus, options.gpu))
    sections = compose_run(choices)
    text = dump_commented(sections, _head(choices))
    data = parse_yaml(text, str(output))
    assert data == without_reasons(sections), "the text of the recipe does not hold its values"
    config = draft_config(data).finish(str(output))
    prepared = prepare_config(config, need_files=False, num_gpus=options.num_gpus)
    if choices.advice is None:
        return text, prepared, None
    cluster = place_on_cluster(prepared.config, prepared.plan, choices.advice.gpu, options.num_gpus)
    return text, prepared, cluster


def _advise(choices: RecipeChoices, output: Path, num_gpus: int, gpu: str) -> Advice:
    data = {**without_reasons(compose_run(choices)), "precision": {"compute": "bf16"}}
    config = draft_config(data).finish(str(output))
    advice = advise(config, prepare_config(config, need_files=False).plan, num_gpus, find_gpu(gpu, config))
    if advice.ranking:
        return advice
    if advice.other_batch is not None:
        batch = advice.other_batch.config.batch.global_
        raise UserError(
            f"--gpus {num_gpus}: no layout divides a batch of {config.batch.global_}; give --global-batch {batch}, or "
            "another number of GPUs"
        )
    split, reason = next(iter(advice.misfits.items()))
    raise UserError(f"--gpus {num_gpus} --gpu {gpu}: no layout fits; {split}: {reason}; give more GPUs")


def _head(choices: RecipeChoices) -> str:
    path = choices.pretraining.path
    return (
        f'Continued pretraining of {path} by the rules of "Reuse, Don\'t Retrain" ({PAPER}), written by '
        "`megatron-cpt recipe`. Each value has its reason beside or above it. The weights follow the paper's "
        "descriptions; it does not print its own weights."
    )
