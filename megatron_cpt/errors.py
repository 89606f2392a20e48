"""Errors that end a command, each with the exit status the contract gives it.

Anything a person can put right is a `UserError` or a `RefusedError`: the command line prints its message and nothing
else. Every other exception is a defect of ours and keeps its traceback (exit status 1).
"""

from __future__ import annotations

from collections.abc import Iterable

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_USER = 2
EXIT_REFUSED = 3
EXIT_STOPPED = 75  # EX_TEMPFAIL: a checkpoint was saved, a scheduler may requeue


class CptError(Exception):
    """Base of all errors with a defined exit status."""

    exit_status = EXIT_FAILURE


class UserError(CptError):
    """The user's mistake: one clear message, nothing written (exit status 2)."""

    exit_status = EXIT_USER


class RefusedError(CptError):
    """A checkpoint or a data set that must not be used as it is (exit status 3)."""

    exit_status = EXIT_REFUSED


class ConfigError(UserError):
    """Every problem of a configuration at once.

    Attributes:
        problems: one line each: the key, its value, and the way out.
    """

    def __init__(self, where: str, problems: Iterable[str]) -> None:
        self.where = where
        self.problems = list(problems)
        count = len(self.problems)
        head = f"{where}: {count} problem{'' if count == 1 else 's'}"
        super().__init__("\n".join([head, *(f"  - {problem}" for problem in self.problems)]))
