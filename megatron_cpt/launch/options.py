"""torchrun's options: what is added where nothing was said, and what cannot be passed on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megatron_cpt.errors import UserError

_RENDEZVOUS = ("nnodes", "rdzv-backend", "rdzv-endpoint", "master-addr", "master-port", "standalone")
_OURS = {
    "module": "the ranks run a command of megatron-cpt, which is given after --",
    "no-python": "the ranks run a command of megatron-cpt, which is given after --",
    "run-path": "the ranks run a command of megatron-cpt, which is given after --",
    "signals-to-handle": "the stop signals go to the ranks, which save and end",
}
_SHORT = {"m": "module", "t": "tee", "r": "redirects"}


def option_names(options: Sequence[str]) -> set[str]:
    """Long names of the options among some words: `--log_dir=x` and `--log-dir x` are both `log-dir`."""
    names = {word[2:].partition("=")[0].replace("_", "-") for word in options if word.startswith("--")}
    return names | {_SHORT[word[1]] for word in options if word[:1] == "-" and word[1:2] in _SHORT}


def check_options(options: Sequence[str]) -> None:
    """Refuse options of torchrun that this launcher needs for itself.

    Raises:
        UserError: one of them is there.
    """
    for name in sorted(option_names(options) & _OURS.keys()):
        raise UserError(f"launch: --{name} is not an option here: {_OURS[name]}")


def with_defaults(options: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """Options with what a run nearly always wants.

    One node without a rendezvous gets `--standalone`, which takes a free port instead of always 29500. Where logs go to
    a folder they are shown as well.

    Args:
        options: torchrun's, as given.
        environment: where Kubeflow and others give torchrun's options too (`PET_NNODES` is `--nnodes`).
    """
    names = option_names(options)
    names |= {name[4:].lower().replace("_", "-") for name in environment if name.startswith("PET_")}
    added = [] if names.intersection(_RENDEZVOUS) else ["--standalone"]
    if "log-dir" in names and not names & {"tee", "redirects"}:
        added += ["--tee", "3"]
    return [*added, *options]
