"""FIT.json: a fitted law as a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from megatron_cpt.errors import RefusedError, UserError
from megatron_cpt.files.atomic import write_atomically
from megatron_cpt.files.checksum import Checksum
from megatron_cpt.files.jsonl_log import write_errors_as_cpt_errors
from megatron_cpt.files.whole_io import read_file
from megatron_cpt.law.curve_fit import CurveFit
from megatron_cpt.law.fitted_law import FittedRange, HeldOutLaw, RunLaw
from megatron_cpt.law.terms import LawShape, term_names
from megatron_cpt.provenance.run_history import MALFORMED
from megatron_cpt.report.write_report import check_output

_CHECKSUM = "checksum"
FORMAT = 1
"""Version of FIT.json; it changes when a term of the law changes, so an old file never gives other numbers."""


def law_to_dict(law: RunLaw) -> dict[str, Any]:
    """Return the content of FIT.json."""
    return {
        "format": FORMAT,
        "arms": [list(runs) for runs in law.arms],
        "num_seeds": law.num_seeds,
        "trunks": list(law.trunks),
        "compared": dict(law.compared),
        "data": law.data,
        "sources": list(law.sources),
        "terms": term_names(law.sources),
        "fitted": asdict(law.fitted),
        "held_out": {one.name: _held_out_to_dict(one) for one in law.held_out},
        "notes": list(law.notes),
        "warnings": list(law.warnings),
    }


def check_law_output(path: Path, run_directories: Sequence[Path], *, overwrite: bool) -> None:
    """Check that FIT.json may be written to a path. It may replace an earlier FIT.json.

    Args:
        path: the output.
        run_directories: the runs to fit; the output must be outside them.
        overwrite: replace a file of another kind.

    Raises:
        UserError: the path is in one of the runs, is no file, or is a file of another kind that would be lost.
    """
    for place in (path.resolve(), path.parent.resolve() / path.name):
        for folder in run_directories:
            if place.is_relative_to(folder.resolve()):
                raise UserError(f"--output {path}: is inside the run {folder}; choose a path outside the runs to fit")
    check_output(path)
    if not path.exists() and not path.is_symlink():
        return
    if not path.is_file():
        raise UserError(f"--output {path}: exists and is no regular file; choose another output")
    if not overwrite and not _is_law_file(path):
        raise UserError(f"{path}: exists already and is no fit; choose another --output, or replace it: --overwrite")


def _is_law_file(path: Path) -> bool:
    try:
        content = orjson.loads(read_file(path))
    except OSError as error:
        raise UserError(f"--output {path}: cannot be read: {error.strerror}; choose another output") from error
    except ValueError:
        return False
    return isinstance(content, dict) and {"format", "held_out", "terms"} <= content.keys()


def write_law(path: Path, law: RunLaw) -> None:
    """Write FIT.json atomically.

    Raises:
        CptError: the file cannot be written.
    """
    with write_errors_as_cpt_errors(path):
        content = law_to_dict(law)
        content[_CHECKSUM] = _checksum(content)
        write_atomically(path, orjson.dumps(content, option=orjson.OPT_INDENT_2) + b"\n")


def _checksum(content: Mapping[str, Any]) -> str:
    """Return the checksum of all values and their order; spaces and line breaks of the file do not count."""
    return Checksum(orjson.dumps({key: value for key, value in content.items() if key != _CHECKSUM})).hexdigest()


def read_law(path: Path) -> RunLaw:
    """Read FIT.json.

    The checksum finds every edit: a changed number or order would give other predictions without any sign of it.

    Raises:
        UserError: it cannot be read.
        RefusedError: it is no FIT.json, of another version, or damaged.
    """
    again = "write it again with `megatron-cpt fit`"
    try:
        content = orjson.loads(read_file(path))
    except OSError as error:
        reason = f"cannot be read: {error.strerror}"
        raise UserError(f"{path}: {reason}; give a file that `megatron-cpt fit` wrote") from error
    except ValueError as error:
        raise RefusedError(f"{path}: damaged: no JSON ({error}); {again}") from error
    version = content.get("format") if isinstance(content, dict) else None
    if type(version) is not int or version != FORMAT:
        reason = f"its format is {version!r}, this version reads {FORMAT}"
        raise RefusedError(f"{path}: damaged, or no fit of this version: {reason}; {again}")
    try:
        if content.get(_CHECKSUM) != _checksum(content):
            raise ValueError("its content has another checksum than it was written with")
        return _parse(content)
    except MALFORMED as error:
        raise RefusedError(f"{path}: damaged ({error}); {again}, and do not edit it") from error


def _parse(content: Mapping[str, Any]) -> RunLaw:
    sources = tuple(map(str, content["sources"]))
    fitted = content["fitted"]
    arms = tuple(tuple(map(str, runs)) for runs in content["arms"])
    return RunLaw(
        arms=arms,
        num_seeds=int(content["num_seeds"]),
        trunks=tuple(content["trunks"]),
        compared=dict(content["compared"]),
        data={key: dict(content["data"][key]) for key in ("sources", "validation.sources")},
        sources=sources,
        held_out=tuple(_parse_held_out(name, one, sources, len(arms)) for name, one in content["held_out"].items()),
        fitted=FittedRange(
            tokens=_positive(fitted["tokens"]),
            area=_positive(fitted["area"]),
            highest_rate=_positive(fitted["highest_rate"]),
            first_rates=_pair(fitted["first_rates"]),
            shares={name: _pair(fitted["shares"][name]) for name in sources},
        ),
        notes=tuple(map(str, content["notes"])),
        warnings=tuple(map(str, content["warnings"])),
    )


def _held_out_to_dict(law: HeldOutLaw) -> dict[str, Any]:
    return {
        "start": law.start,
        "num_points": law.num_points,
        "error": law.error,
        "error_per_doubling": law.error_per_doubling,
        "fit": _fit_to_dict(law.fit),
        "without": [_fit_to_dict(fit) for fit in law.without],
    }


def _fit_to_dict(fit: CurveFit) -> dict[str, Any]:
    return {"shape": fit.shape.to_dict(), "coefficients": fit.coefficients.tolist()}


def _parse_held_out(name: str, content: Mapping[str, Any], sources: tuple[str, ...], num_arms: int) -> HeldOutLaw:
    per_doubling = content["error_per_doubling"]
    without = tuple(_parse_fit(fit, sources) for fit in content["without"])
    if len(without) < 2 or len(without) != num_arms:
        raise ValueError(f"{name}: {len(without)} fits without an arm, for {num_arms} arms")
    return HeldOutLaw(
        name=name,
        start=_positive(content["start"]),
        fit=_parse_fit(content["fit"], sources),
        without=without,
        error=float(content["error"]),
        error_per_doubling=None if per_doubling is None else float(per_doubling),
        num_points=int(content["num_points"]),
    )


def _parse_fit(content: Mapping[str, Any], sources: tuple[str, ...]) -> CurveFit:
    coefficients = np.array(content["coefficients"], dtype=np.float64)
    if coefficients.shape != (len(term_names(sources)),) or not np.isfinite(coefficients).all():
        raise ValueError(f"{len(coefficients)} coefficients for {len(term_names(sources))} terms, or not finite")
    shape = LawShape(**{name: _positive(value) for name, value in content["shape"].items()})
    return CurveFit(shape, coefficients)


def _positive(value: Any) -> float:
    if not (isinstance(value, int | float) and 0 < value < float("inf")):
        raise ValueError(f"{value!r} is no positive number")
    return float(value)


def _pair(value: Any) -> tuple[float, float]:
    low, high = map(float, value)
    return low, high
