"""Options of torchrun: defaults, and options that the launcher does not pass on."""

from __future__ import annotations

import socket
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


def check_port(options: Sequence[str]) -> None:
    """Raise `UserError` if torchrun would open a port on this node that another process uses."""
    values = _values(options)
    port = values.get("master-port", "")
    if not port.isdecimal() or port == "0" or values.get("node-rank", "0") != "0" or "rdzv-endpoint" in values:
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", int(port)))
        except (OSError, OverflowError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not a port"
            raise UserError(
                f"launch: --master-port {port}: {reason}; choose another one, or omit the option: on a single node "
                "the launcher chooses a free port"
            ) from error


def _values(options: Sequence[str]) -> dict[str, str]:
    """Return the values of long options, by name: `--master-port 29500` and `--master_port=29500` alike."""
    values = {}
    for word, following in zip(options, [*options[1:], ""], strict=True):
        name, has_value, value = word.partition("=")
        if name.startswith("--"):
            values[name[2:].replace("_", "-")] = value if has_value else following
    return values


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
