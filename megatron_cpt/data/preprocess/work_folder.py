"""Work folder of one `preprocess` run: files that only grow, and a state that says how much of each file counts.

The state is replaced as a whole, after the bytes that it counts were forced to disk. It names size and checksum of each
file. A resumed run compares them, and truncates each file to its counted size. Example: the state counts 1,000 bytes of
`0.tokens`; a kill leaves 1,300 bytes; the resumed run continues to write at byte 1,000. If a file has only 900 bytes,
or others than the counted ones, the run starts from scratch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from megatron_cpt.errors import CptError, RefusedError
from megatron_cpt.files.atomic import Rename, write_atomically
from megatron_cpt.files.checksum import Checksum
from megatron_cpt.files.identity import FileIdentity, identify
from megatron_cpt.files.resumable import DamagedWorkError, ResumableFolder, read_settings, seal, unseal, verify_part
from megatron_cpt.files.whole_io import DiskFile, exists, read_file

STATE_FILE = "state.json"
_VERSION = 1
_THREADS = 4  # that compare checksums

FileSum = tuple[int, str]
"""Size and checksum of a file."""


@dataclass(frozen=True)
class _Saved:
    """Content of a state file.

    Attributes:
        files: size and checksum of each file that counts, by name.
        renames: renames that publish the files of a finished run; empty before.
    """

    files: dict[str, FileSum]
    state: dict[str, Any]
    renames: list[Rename]

    def verify(self, folder: Path) -> dict[str, Any]:
        """Compare all files with their sums; return their running checksums, by name.

        Raises:
            DamagedWorkError: a file differs.
        """
        published = dict(self.renames)

        def compare(name: str) -> Any:
            path = folder / name
            if not exists(path) and str(path) in published:  # a killed run had renamed it already
                path = Path(published[str(path)])
            return verify_part(path, *self.files[name])

        with ThreadPoolExecutor(_THREADS) as threads:
            return dict(zip(self.files, threads.map(compare, self.files), strict=True))

    def encode(self) -> bytes:
        """Return the content of the file."""
        return seal({"version": _VERSION, **asdict(self)})

    @classmethod
    def read(cls, folder: Path) -> _Saved:
        """Read the state file of a folder.

        Raises:
            DamagedWorkError: it is damaged, or of another version.
            FileNotFoundError: there is none.
        """
        path = folder / STATE_FILE
        try:
            saved = unseal(read_file(path))
            if saved.pop("version") != _VERSION:
                raise ValueError("it is of another version")
            return cls(
                files={name: (int(size), str(checksum)) for name, (size, checksum) in saved["files"].items()},
                state=dict(saved["state"]),
                renames=[(str(source), str(target)) for source, target in saved["renames"]],
            )
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DamagedWorkError(f"{path}: damaged, or written by another version ({error})") from error


class WorkFolder(ResumableFolder):
    """Locked work folder whose files are appended to; see `ResumableFolder`.

    Args:
        notify: called with a sentence if the files of an interrupted run are damaged, so that it starts from scratch.

    Attributes:
        state: the last saved state; empty at the start.
        renames: the renames that publish the files of a finished run; None before `save_result`.
    """

    def __init__(
        self,
        path: str,
        settings: Mapping[str, Any],
        *,
        should_restart: bool = False,
        notify: Callable[[str], None] = lambda text: None,
    ) -> None:
        super().__init__(Path(path), settings, progress_file=STATE_FILE, should_restart=should_restart)
        self._notify = notify
        self.state: dict[str, Any] = {}
        self.renames: list[Rename] | None = None
        self._sizes: dict[str, int] = {}
        self._checksums: dict[str, Any] = {}  # running ones
        self._truncated, self._changed = set[str](), set[str]()
        self._saver = ThreadPoolExecutor(1, "work-folder")
        self._saving: Future[None] | None = None

    def __enter__(self) -> Self:
        super().__enter__()
        try:
            self._resume()
        except BaseException:
            super().__exit__(None, None, None)
            raise
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self._finish_saving()
        except OSError:
            if error[0] is None:  # otherwise the earlier error is the one to report
                raise
        finally:
            self._saver.shutdown()
            super().__exit__(None, None, None)

    def file(self, name: str) -> str:
        """Return the path of one of the folder's files."""
        return os.path.join(self.path, name)

    def append(self, name: str, data: bytes | memoryview) -> None:
        """Append bytes to a file; they count once a later `save` is complete.

        Raises:
            CptError: another program has changed the file.
        """
        size = self._sizes.get(name, 0)
        view = memoryview(data).cast("B")
        with DiskFile(self.path / name, "ab") as file:
            if name not in self._truncated and file.size > size:
                file.truncate(size)
            self._truncated.add(name)
            if file.size != size:
                raise CptError(
                    f"{self.path / name}: has {file.size:,} bytes, {size:,} were written: another program has changed "
                    "it; run the command again with --restart"
                )
            file.write(view)
        self._checksums.setdefault(name, Checksum()).update(view)
        self._sizes[name] = size + view.nbytes
        self._changed.add(name)

    def sums(self) -> dict[str, FileSum]:
        """Return size and checksum of everything that was appended, by name."""
        return {name: (size, self._checksums[name].hexdigest()) for name, size in self._sizes.items()}

    def save(self, state: Mapping[str, Any]) -> None:
        """Make everything appended so far count, together with a state."""
        self.save_in_background(state)
        self._finish_saving()

    def save_in_background(self, state: Mapping[str, Any]) -> None:
        """Start `save` in a thread; first wait until the previous save is complete."""
        self._finish_saving()
        self.state = dict(state)
        content = _Saved(self.sums(), self.state, []).encode()
        changed, self._changed = self._changed, set()
        self._saving = self._saver.submit(self._write_state, changed, content)

    def save_result(self, state: Mapping[str, Any], renames: Sequence[Rename], files: Mapping[str, FileSum]) -> None:
        """Save the final state, with the renames that publish the result; from now on only its files count.

        Args:
            files: size and checksum of each file to rename, by name; they are on the disk.
        """
        self._finish_saving()
        self.state, self.renames = dict(state), list(renames)
        write_atomically(self.path / STATE_FILE, _Saved(dict(files), self.state, self.renames).encode())

    def start_from_scratch(self) -> None:
        """Empty the folder and record this run's settings."""
        self._finish_saving()
        super().start_from_scratch()
        self.state, self.renames, self._sizes, self._checksums = {}, None, {}, {}
        self._truncated, self._changed = set(), set()

    def remove(self) -> None:
        """Remove the folder with everything in it."""
        self._finish_saving()
        super().remove()

    def _resume(self) -> None:
        """Take over the state of an interrupted run, or start from scratch if any of its files is damaged."""
        if not exists(self.path / STATE_FILE):
            return
        try:
            saved = _Saved.read(self.path)
            checksums = saved.verify(self.path)
        except DamagedWorkError as error:
            self._notify(f"starting from scratch, because the work of an interrupted run is damaged: {error}")
            self.start_from_scratch()
            return
        self.state, self.renames = saved.state, saved.renames or None
        if self.renames is None:
            # XXH3 keeps no state that could be saved, so the checksums continue from what was read for the comparison
            self._sizes, self._checksums = {name: size for name, (size, _) in saved.files.items()}, checksums

    def _write_state(self, changed: Iterable[str], content: bytes) -> None:
        for name in changed:
            with DiskFile(self.path / name) as file:
                file.sync()
        write_atomically(self.path / STATE_FILE, content)

    def _finish_saving(self) -> None:
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()


@dataclass(frozen=True)
class FinishedWork:
    """Work folder of a finished shard, or of a joined run that was killed while it published.

    Attributes:
        identities: of its files, which were compared with their sums.
        is_assembled: whether its result is complete and only has to be published.
    """

    settings: dict[str, Any]
    state: dict[str, Any]
    identities: list[FileIdentity]
    is_assembled: bool


def read_finished(path: str) -> FinishedWork | None:
    """Read a finished folder and compare its files with their sums; None if it is missing or not finished.

    Raises:
        RefusedError: a file is damaged.
    """
    folder = Path(path)
    settings = read_settings(folder)
    if settings is None or not exists(folder / STATE_FILE):
        return None
    try:
        saved = _Saved.read(folder)
        if not saved.state.get("done"):
            return None
        identities = identify(folder / name for name in saved.files if exists(folder / name))
        saved.verify(folder)
    except DamagedWorkError as error:
        raise RefusedError(f"{error}; copy {folder} again, or run its command again") from error
    return FinishedWork(settings, saved.state, identities, bool(saved.renames))
