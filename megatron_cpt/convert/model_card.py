"""Model card of an export: README.md, which says how the weights came about. All facts are read from the checkpoint."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from megatron_cpt import __version__
from megatron_cpt.checkpoint import layout
from megatron_cpt.checkpoint.record import SavedRun, WeightSet, corrupt_as_refused, read_json, read_saved_run
from megatron_cpt.config import format_count
from megatron_cpt.config.yamlfile import dump_yaml, parse_yaml
from megatron_cpt.convert.side_files import HF_FOLDER
from megatron_cpt.errors import ConfigError, CptError, RefusedError
from megatron_cpt.files.whole_io import read_file, read_text, write_content

logger = logging.getLogger(__name__)

CARD_FILE = "README.md"
BASE_CARD_FILE = "README_base.md"
_METRICS_FILE = "metrics.jsonl"  # written by hooks/jsonl_files.py
_TAGS = ("megatron-core", "megatron-cpt")
_KEPT_KEYS = ("license", "license_name", "license_link", "language")
_MAX_ANCESTORS = 8  # runs that started from runs; also ends a cycle of `init.from`
_HUB_NAME = r"[\w.-]+/[\w.-]+"


@dataclass(frozen=True)
class Base:
    """Checkpoint that a run started from.

    Attributes:
        path: value of `init.from` in the first run of the chain, or the folder that was imported.
        hub_name: name on the Hugging Face Hub, such as `meta-llama/Llama-3.1-8B`; None if it is not known.
    """

    path: str
    hub_name: str | None


def write_model_card(folder: Path, checkpoint: Path, side: Mapping[str, Path], weights: WeightSet = "raw") -> list[str]:
    """Write README.md into an exported folder, and keep the source's own README beside it.

    Nothing is written for a checkpoint without a step of training, whose README describes it already.

    Args:
        folder: the exported folder, with copies of the side files in it.
        checkpoint: one of our checkpoints; a checkpoint of another project has no card.
        side: config, tokenizer and other files of the source by name.
        weights: that were exported.

    Returns:
        Names of the files that were written.
    """
    if not layout.is_checkpoint(checkpoint):
        return []
    kept = {}
    if CARD_FILE in side:
        kept = _front_matter(read_text(side[CARD_FILE], "utf-8-sig", errors="replace"))
    try:
        saved = read_saved_run(checkpoint)
        with corrupt_as_refused(checkpoint):
            card = describe_training(saved, kept, weights) if saved.state["train"]["step"] else None
    except RefusedError as error:  # records of an earlier version, for example; the weights are exported anyway
        logger.warning("no model card is written: %s", error)
        return []
    if card is None:
        return []
    written = [CARD_FILE]
    if CARD_FILE in side:
        written.append(_free_name(side))
        (folder / CARD_FILE).replace(folder / written[-1])
    write_content(folder / CARD_FILE, card.encode())
    return written


def _free_name(taken: Mapping[str, Path]) -> str:
    """Return README_base.md, or README_base_2.md and so on for a model that was exported and trained before."""
    name, number = BASE_CARD_FILE, 2
    while name in taken:
        name, number = BASE_CARD_FILE.replace(".md", f"_{number}.md"), number + 1
    return name


def describe_training(saved: SavedRun, kept: Mapping[str, Any], weights: WeightSet = "raw") -> str:
    """Return the model card of a trained checkpoint.

    Args:
        kept: keys of the front matter of the source's card that hold for the new model too, such as its license.
        weights: the checkpoint's weights that the card is for.
    """
    plan, base = read_json(saved.path / layout.PLAN_FILE), find_base(saved)
    tags = [*(["continued-pretraining"] if base is not None else []), *_TAGS]
    front: dict[str, Any] = {"library_name": "transformers"}
    if base is not None and base.hub_name is not None:
        front["base_model"] = base.hub_name
    front |= {**kept, "tags": tags}
    origin = f"continued from `{base.hub_name or base.path}`" if base is not None else "trained from random weights"
    lines = [
        "---",
        dump_yaml(front).rstrip(),
        "---",
        "",
        f"# {_one_line(saved.run['name'])}",
        "",
        f"This model was {origin} with megatron-cpt. This card was written by `megatron-cpt convert export` "
        f"{__version__} from the records of the checkpoint.",
        *_section("Training", _table(("setting", "value"), _settings(saved, plan, base, weights))),
        *_section("Phases", _table(("phase", "steps", "learning rate", "blend"), _phases(saved, plan))),
        *_section("Data", _table(("source", "samples", "tokens", "epochs"), _sources(saved, plan))),
        *_section("Losses", _losses(saved, weights)),
    ]
    return "\n".join(lines) + "\n"


def find_base(saved: SavedRun) -> Base | None:
    """Return the checkpoint that the first run of a chain started from; None: it started from random weights."""
    run, found = saved.run, None
    for _ in range(_MAX_ANCESTORS):
        start = (run.get("init") or {}).get("from")
        if start is None:
            return found
        found = Base(start, None)
        try:
            parent = read_saved_run(layout.resolve_checkpoint(start))
        except CptError:  # it is on another machine, or of another project
            return found
        imported = parent.state.get("imported")
        if imported is not None:
            return Base(start, _hub_name(parent.path, imported["from"]))
        run = parent.run
    return found


def _hub_name(checkpoint: Path, source: str) -> str | None:
    """Return the Hub's name of an imported model, from its folder in the Hub's cache or from its config.json."""
    cached = re.search(r"/models--([^/]+)--([^/]+)/snapshots/", source)
    if cached is not None:
        return f"{cached[1]}/{cached[2]}"
    file = checkpoint / HF_FOLDER / "config.json"
    name = read_json(file).get("_name_or_path") if file.is_file() else None
    is_name = isinstance(name, str) and re.fullmatch(_HUB_NAME, name) is not None and not Path(name).exists()
    return name if is_name else None


def _front_matter(card: str) -> dict[str, Any]:
    """Return the keys of a card's YAML front matter that also hold for a model trained from it.

    All values are read as text; YAML itself reads the language `no` (Norwegian) as False and a name 1.10 as 1.1.
    """
    found = re.match(r"---\n(.*?)\n---", card, re.DOTALL)
    try:
        front = parse_yaml(found[1], CARD_FILE, schema="text") if found is not None else None
    except ConfigError:
        return {}
    return {key: front[key] for key in _KEPT_KEYS if front.get(key)} if isinstance(front, dict) else {}


def _settings(
    saved: SavedRun, plan: Mapping[str, Any], base: Base | None, weights: WeightSet
) -> Iterator[tuple[str, str]]:
    run, train = saved.run, saved.state["train"]
    schedule, optimizer, precision = run["schedule"], run["optimizer"], run["precision"]
    if base is not None:
        yield "base checkpoint", f"`{base.path}`, {run['init']['load']}"
    if weights == "ema":
        yield "weights", "moving average, decay {decay:g} every {every} steps".format_map(run["ema"])
    yield "steps", f"{train['step']:,} of {plan['steps']:,}"
    yield "tokens", f"{format_count(train['tokens'])} of {format_count(plan['tokens_trained'])}"
    yield "parameters", format_count(plan["parameters"])
    yield "sequence length", f"{run['seq_length']:,} tokens"
    yield "global batch", f"{run['batch']['global']:,} sequences"
    yield "schedule", f"{schedule['shape']}, {schedule['max_lr']:.3g} to {schedule['min_lr']:.3g}"
    warmup = {unit: value for unit, value in schedule["warmup"].items() if value}
    if warmup:
        yield "warmup", ", ".join(f"{value:g} {unit}" for unit, value in warmup.items())
    yield (
        "optimizer",
        f"{optimizer['name']}, betas {optimizer['betas'][0]:g} and {optimizer['betas'][1]:g}, weight decay "
        f"{optimizer['weight_decay']:g}, gradient norm clipped at {optimizer['clip_grad']:g}",
    )
    formats = [name for name in ("fp8", "fp4") if precision.get(name)]
    yield "precision", " and ".join([precision["compute"], *formats])
    yield "seed", str(run["seed"])
    if train.get("skipped"):
        yield "skipped updates", f"{train['skipped']:,}"


def _phases(saved: SavedRun, plan: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    step = saved.state["train"]["step"]
    for phase in plan["phases"]:
        first, last, rate = phase["first_step"], phase["last_step"], phase["lr_last"]
        if first > step:
            return
        planned = ""
        if last > step:
            last, rate, planned = step, saved.state["next_rate"], f" of {phase['last_step']:,}"
        blend = ", ".join(f"{name} {use['weight']:.4g}" for name, use in phase["sources"].items())
        yield phase["name"], f"{first:,} to {last:,}{planned}", f"{phase['lr_first']:.3g} to {rate:.3g}", blend


def _sources(saved: SavedRun, plan: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    """Yield samples, tokens and epochs per source; tokens of samples of several lengths are known at the end only."""
    lengths = {stretch["seq_length"] for phase in plan["phases"] for stretch in phase["stretches"]}
    is_complete = saved.state["train"]["step"] == plan["steps"]
    for name, samples in saved.state["train"]["samples_by_source"].items():
        planned = plan["sources"].get(name, {})
        tokens, epochs = None, None
        if len(lengths) == 1:
            tokens, per_epoch = samples * min(lengths), planned.get("chunks_per_epoch")
            epochs = samples / per_epoch if per_epoch else None
        elif is_complete:
            tokens, epochs = planned.get("tokens"), planned.get("epochs")
        yield (
            name,
            f"{samples:,}",
            "unknown" if tokens is None else format_count(tokens),
            "unknown" if epochs is None else f"{epochs:.2f}",
        )


def _losses(saved: SavedRun, weights: WeightSet) -> list[str]:
    """Return the last losses up to the checkpoint's step; none without metrics.jsonl in its run directory."""
    file, step = saved.path.parent.parent / _METRICS_FILE, saved.state["train"]["step"]
    if not file.is_file():
        return []
    training: dict[str, Any] | None = None
    held_out: list[dict[str, Any]] = []
    key = "validation_ema" if weights == "ema" else "validation"
    for text in read_file(file).splitlines():
        try:
            line = orjson.loads(text)
        except orjson.JSONDecodeError:  # cut by a kill
            continue
        if line["step"] <= step and line.get("loss") is not None:
            training = line
        if line["step"] <= step and key in line:
            held_out.append(line)
    lines = []
    if training is not None:
        by_source = ", ".join(f"{name} {loss:.4f}" for name, loss in training["loss_by_source"].items() if loss)
        of_raw = " of the weights that were averaged" if weights == "ema" else ""
        lines += [f"Training loss{of_raw} at step {training['step']:,}: {training['loss']:.4f} ({by_source}).", ""]
    if held_out:
        first, last = held_out[0], held_out[-1]
        head = ("held-out source", f"step {first['step']:,}", f"step {last['step']:,}")
        rows = (
            (name, f"{first[key][name]:.4f}" if name in first[key] else "", f"{loss:.4f}")
            for name, loss in last[key].items()
        )
        lines += _table(head, rows)
    return lines


def _section(title: str, lines: list[str]) -> list[str]:
    return ["", f"## {title}", "", *lines] if lines else []


def _table(head: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> list[str]:
    cells = [head, ("---",) * len(head), *rows]
    return [f"| {' | '.join(_one_line(cell).replace('|', '/') for cell in row)} |" for row in cells]


def _one_line(text: str) -> str:
    return " ".join(text.split())
