"""Retry of requests to disks and stores that fail for a moment, with growing delays."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")

DISK_DELAYS: tuple[float, ...] = (0.5, 1, 2, 4)
"""Mean seconds before each further attempt on a disk: 5 attempts over about 8 seconds."""

_PASSING_ERRNOS = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN}  # Python itself retries EINTR
_PATH_ERRNOS = {
    None,
    errno.ENOENT,
    errno.EEXIST,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
}
_jitter = random.Random()  # a generator of its own: a retry must not move the global one, which runs are seeded with


def retry(name: str, request: Callable[[], T], is_passing: Callable[[Exception], bool], delays: Sequence[float]) -> T:
    """Return the result of a request; after an error that may pass, repeat it after each delay times 0.5 to 1.5.

    The random factor keeps the ranks of a run, which all met the same failure, from asking again all at once.

    Args:
        name: file that the warnings name.
    """
    for attempt, delay in enumerate(delays, 1):
        try:
            return request()
        except Exception as error:
            if not is_passing(error):
                raise
            wait = delay * _jitter.uniform(0.5, 1.5)
            reason = (
                error.strerror if isinstance(error, OSError) and error.errno else f"{type(error).__name__}: {error}"
            )
            text = "%s: attempt %d of %d failed (%s); retrying in %.1f s"
            logger.warning(text, name, attempt, len(delays) + 1, reason, wait)
        time.sleep(wait)
    return request()


def retry_disk(path: str | os.PathLike[str], request: Callable[[], T], first: OSError | None = None) -> T:
    """Return the result of a request to a file system; repeat it after EIO, ESTALE, ETIMEDOUT and EAGAIN.

    A network file system gives these errors for seconds while its server restarts. They say nothing about the content
    of a file, so they must never count as damage.

    Args:
        path: file that the request is about; it is added to an `OSError` without a file name.
        first: error of the first attempt, if the caller has made it.
    """
    if first is None:
        try:
            return request()  # the usual case, without the cost of the preparations below
        except OSError as error:
            first = error
    failures = [first]

    def named_request() -> T:
        with name_file_in_errors(path):
            if failures:
                raise failures.pop()
            return request()

    return retry(os.fspath(path), named_request, _is_passing_disk_error, DISK_DELAYS)


@contextlib.contextmanager
def name_file_in_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Add a file's name to an `OSError` that has none, because the failed call knew only a file descriptor."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:  # without a number the text would be lost
            error.filename = os.fspath(path)
        raise


def is_path_error(error: OSError) -> bool:
    """Return whether an error is about the path (missing, a folder, no permission) and not about the disk.

    Code that turns an `OSError` into a refusal or into the user's mistake raises all others unchanged.
    """
    return error.errno in _PATH_ERRNOS


def _is_passing_disk_error(error: Exception) -> bool:
    return isinstance(error, OSError) and error.errno in _PASSING_ERRNOS
