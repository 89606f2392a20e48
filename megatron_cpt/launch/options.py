"""Options of torchrun: defaults, and options that the launcher does not pass on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megatron_cpt.errors import UserError

_RENDEZVOUS = ("nnodes", "rdzv-backend", "rdzv-endpoint", "master-addr", "master-port", "standalone")
_REFUSED = {
    **dict.fromkeys(("module", "no-python", "run-path"), "the ranks run a command of megatron-cpt; give it after --"),
    "signals-to-handle": "the launcher passes stop signals to the ranks, which save a checkpoint and end",
}
_SHORT = {"m": "module", "t": "tee", "r": "redirects"}


def option_names(options: Sequence[str]) -> set[str]:
    """Return the long names of options: `log-dir` for `--log_dir=x` and for `--log-dir x`."""
    names = {word[2:].partition("=")[0].replace("_", "-") for word in options if word.startswith("--")}
    return names | {_SHORT[word[1]] for word in options if word[:1] == "-" and word[1:2] in _SHORT}


def check_options(options: Sequence[str]) -> None:
    """Raise `UserError` for an option of torchrun that the launcher sets itself."""
    for name in sorted(option_names(options) & _REFUSED.keys()):
        raise UserError(f"launch: --{name} is not supported: {_REFUSED[name]}")


def with_defaults(options: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """Add defaults to options of torchrun.

    Without a rendezvous, `--standalone` is added, which chooses a free port instead of 29500. With `--log-dir`, logs
    are also printed.

    Args:
        environment: environment variables, which can hold options too: Kubeflow sets `PET_NNODES` for `--nnodes`.
    """
    names = option_names(options)
    names |= {name[4:].lower().replace("_", "-") for name in environment if name.startswith("PET_")}
    added = [] if names.intersection(_RENDEZVOUS) else ["--standalone"]
    if "log-dir" in names and not names & {"tee", "redirects"}:
        added += ["--tee", "3"]
    return [*added, *options]
