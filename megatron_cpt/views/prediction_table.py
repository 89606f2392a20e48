"""Tables of a fitted law and of the losses that it predicts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any

from rich import box
from rich.table import Table
from rich.text import Text

from megatron_cpt.config import format_count, format_number_of
from megatron_cpt.views.plan_table import print_parts


def render_fit(law: Mapping[str, Any], stream: IO[str]) -> None:
    """Write the errors of a fitted law to a stream.

    Args:
        law: content of FIT.json.
    """
    table = _table("held-out source", "points", "loss before", "error of omitted arm", "per doubling beyond")
    for name, one in law["held_out"].items():
        beyond = one["error_per_doubling"]
        table.add_row(
            name,
            f"{one['num_points']:,}",
            f"{one['start']:.4f}",
            f"{one['error']:.2%}",
            "?" if beyond is None else f"{beyond:.2%}",
        )
    fitted, arms = law["fitted"], law["arms"]
    shares = ", ".join(f"{name} {low:.2f} to {high:.2f}" for name, (low, high) in fitted["shares"].items())
    head = (
        f"{format_number_of(sum(map(len, arms)), 'run')} ({format_number_of(len(arms), 'arm')}, "
        f"{format_number_of(law['num_seeds'], 'seed')}) of up to {format_count(int(fitted['tokens']))} tokens; "
        f"rates up to {fitted['highest_rate']:.3g}; shares: {shares}"
    )
    print_parts(stream, [Text(head), table, *_notes(law["notes"], "note"), *_notes(law["warnings"], "warning")])


def render_prediction(prediction: Mapping[str, Any], stream: IO[str]) -> None:
    """Write a prediction to a stream.

    Args:
        prediction: `RunPrediction.to_dict()`.
    """
    held_out = prediction["held_out"]
    table = _table("held-out source", "loss before", "at the end", f"{prediction['confidence']:.0%} interval", "change")
    for name, one in held_out.items():
        interval = f"{one['low']:.4f} to {one['high']:.4f}"
        change = f"{one['final'] - one['start']:+.4f}"
        table.add_row(name, f"{one['start']:.4f}", f"{one['final']:.4f}", interval, change)
    parts: list[Any] = [Text("expected held-out loss", style="bold"), table]
    for title, options in (("last switch", prediction["switches"]), ("other blends", prediction["blends"])):
        if options:
            parts += [_alternatives(title, options, list(held_out)), *_best(title, options)]
    print_parts(stream, [*parts, *_notes(prediction["notes"], "warning")])


def _alternatives(title: str, options: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Table:
    shown = names[:6]
    table = _table(title, "step", *shown, "against the plan", "epochs over the limit")
    for option in options:
        difference = f"{option['difference']:+.2%} ± {option['difference_width']:.2%}"
        table.add_row(
            option["change"],
            "" if option["step"] is None else f"{option['step']:,}",
            *(f"{option['losses'][name]:.4f}" for name in shown),
            difference if option["difference_width"] else "",
            Text(option["repeats"], style="bold yellow"),
        )
    return table


def _best(title: str, options: Sequence[Mapping[str, Any]]) -> Iterator[Text]:
    """Yield the best option, and compare its difference from the plan is more than noise."""
    best = min(options, key=lambda option: option["difference"])
    gain, width = -best["difference"], best["difference_width"]
    if gain <= 0 or not width:
        yield Text("The plan itself has the lowest losses, as the mean over the held-out sources.")
    else:
        verdict = "more than" if gain > width else "within"
        yield Text(f"Lowest: {best['change']}; its gain of {gain:.2%} is {verdict} the error of {width:.2%}.")


def _notes(notes: Sequence[str], word: str) -> Iterator[Text]:
    for note in notes:
        yield Text.assemble((f"{word}: ", "bold yellow"), note)


def _table(*headers: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
    for number, header in enumerate(headers):
        table.add_column(header, justify="left" if number == 0 else "right", overflow="fold")
    return table
