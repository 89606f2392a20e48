"""Errors with an exit status, and the exit statuses of all commands.

| status | exception | meaning |
| --- | --- | --- |
| 0 | | done |
| 1 | `CptError`, any other | a failure; an unexpected exception keeps its traceback |
| 2 | `UserError` | the user's mistake; nothing was written |
| 3 | `RefusedError` | a corrupt or unsuitable checkpoint or dataset |
| 75 | | stopped after a save, or by `launch` before the first step; start the command again to resume |
| 130 | | ended by Ctrl-C without a save, in training by the second one |

For a `CptError` the command line prints only the message. The message names the field or file and its value, and says
what to do: `--sample 8: the samples of a step are 0 to 7`.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

_CHECKOUT = Path(__file__).resolve().parents[1]

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_USER = 2
EXIT_REFUSED = 3
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h; a scheduler may requeue the job
EXIT_INTERRUPTED = 130  # as shells report a death by SIGINT


class CptError(Exception):
    """Base class of errors that end a command with a message instead of a traceback."""

    exit_status = EXIT_FAILURE


class UserError(CptError):
    """Mistake in the arguments or in run.yaml, found before anything was written."""

    exit_status = EXIT_USER


class RefusedError(CptError):
    """Checkpoint or dataset that is corrupt or does not fit the run."""

    exit_status = EXIT_REFUSED


class ConfigError(UserError):
    """All problems of a configuration in one error.

    Attributes:
        where: path of the file.
        problems: one line per problem: the key, its value, and what to do.
    """

    def __init__(self, where: str, problems: Iterable[str]) -> None:
        self.where = where
        self.problems = list(problems)
        count = len(self.problems)
        head = f"{where}: {count} problem{'' if count == 1 else 's'}"
        super().__init__("\n".join([head, *(f"  - {problem}" for problem in self.problems)]))


def install_command(extra: str) -> str:
    """Return the command that installs an extra of setup.py. The package is on no index, so it names the checkout."""
    if (_CHECKOUT / "setup.py").is_file():
        return f"pip install -e '{_CHECKOUT}[{extra}]'"
    return f"pip install '.[{extra}]' in the folder of megatron-cpt's setup.py"
