"""Child process of `code_execution`: confine this process, then run the program that comes on standard input.

Run as a script by `python -I -S`; it imports nothing but the standard library. Processes, with namespaces:

    launcher   prepares the file system and waits
    └ init     process 1 of the new process namespace; when it ends, the kernel kills every other process there
      └ program

Lines of the report: the isolation, then `passed` or the reason.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER = 0x00020000, 0x08000000, 0x10000000
CLONE_NEWPID, CLONE_NEWNET = 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
MNT_DETACH = 2
SYS_MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY = 442, -100, 0x8000, 1
PR_SET_PDEATHSIG, PR_SET_KEEPCAPS, PR_SET_NO_NEW_PRIVS = 1, 8, 38
READ_ANY_FILE = 1 << 2  # CAP_DAC_READ_SEARCH
CAPABILITY_VERSION_3 = 0x20080522
OPEN_FILES = 64
NOBODY = 65534
FIRST_UID = 1_000_000_000  # plus the process id: a user that owns no file and no other process

LIBC = ctypes.CDLL(None, use_errno=True)


def check(result: int) -> None:
    """Raise OSError if a C function has failed."""
    if result != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def main() -> None:
    """Confine this process and run the program."""
    limits = json.loads(sys.argv[1])
    source = sys.stdin.buffer.read()
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.close(null)
    os.umask(0o022)
    report = limits["report"]
    privileged = os.geteuid() == 0
    try:
        if not limits["try_namespaces"]:
            raise PermissionError("namespaces are not wanted")
        enter_namespaces(privileged)
        end_with_parent()
        build_root(os.getcwd(), limits["memory"])
    except OSError:
        drop_privileges(privileged, READ_ANY_FILE)
        end_with_parent()
        os.write(report, b"audit hook\n")
        for module in ("ctypes", "_ctypes"):  # a new import is refused by the hook
            del sys.modules[module]
        sys.addaudithook(audit_hook(os.getcwd()))
        run(source, {**limits, "processes": 0})
    os.write(report, b"namespaces\n")
    wait_for(os.fork() or run_init(source, limits, privileged))


def enter_namespaces(privileged: bool) -> None:
    """Leave the machine's network, processes and mounts; without root, a user namespace gives the right to do so."""
    uid, gid = os.geteuid(), os.getegid()
    flags = CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET
    check(LIBC.unshare(flags if privileged else flags | CLONE_NEWUSER))
    if not privileged:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
        Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")


def build_root(folder: str, num_bytes: int) -> None:
    """Replace the file system by one in memory that has Python and its libraries, read-only, and an empty /tmp."""
    mount(None, "/", None, MS_REC | MS_PRIVATE)
    options = f"size={num_bytes},nr_inodes=1024,mode=755"
    mount("tmpfs", folder, "tmpfs", MS_NOSUID | MS_NODEV, options)
    seen: list[str] = []
    for source in (sys.base_prefix, "/usr", "/lib", "/lib64"):
        if os.path.islink(source):
            os.symlink(os.readlink(source), folder + source)
        elif os.path.isdir(source) and not f"{source}/".startswith(tuple(seen)):
            seen.append(f"{source}/")
            os.makedirs(folder + source, exist_ok=True)
            mount(source, folder + source, None, MS_BIND | MS_REC)
            make_read_only(folder + source)
    os.mkdir(f"{folder}/dev")
    Path(f"{folder}/dev/null").touch()
    mount("/dev/null", f"{folder}/dev/null", None, MS_BIND)
    os.mkdir(f"{folder}/tmp")
    os.chmod(f"{folder}/tmp", 0o1777)
    os.mkdir(f"{folder}/old")
    check(LIBC.pivot_root(folder.encode(), f"{folder}/old".encode()))
    os.chdir("/tmp")
    check(LIBC.umount2(b"/old", MNT_DETACH))
    os.rmdir("/old")


def mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    """Mount a file system or bind a folder."""
    texts = [None if text is None else text.encode() for text in (source, target, kind, options)]
    check(LIBC.mount(texts[0], texts[1], texts[2], ctypes.c_ulong(flags), texts[3]))


def make_read_only(path: str) -> None:
    """Make a mount and everything mounted below it read-only."""
    attributes = (ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY | MS_NOSUID | MS_NODEV, 0, 0, 0)
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    check(LIBC.syscall(SYS_MOUNT_SETATTR, AT_FDCWD, path.encode(), AT_RECURSIVE, attributes, size))


def drop_privileges(privileged: bool, kept: int = 0) -> None:
    """Become a user without rights, for good.

    Args:
        privileged: this process belongs to root.
        kept: bits of capabilities that root keeps: Python may be installed where only root can read.
    """
    if privileged:
        with contextlib.suppress(PermissionError):
            os.setgroups([])
        check(LIBC.prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0))
        try:
            become(FIRST_UID + os.getpid())
        except OSError:  # a container without root's rights may map few users
            become(NOBODY)
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
    rights = kept if privileged else 0
    check(LIBC.capset(header, (ctypes.c_uint32 * 6)(rights, rights)))  # effective, permitted, inheritable; twice
    check(LIBC.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))


def become(user: int) -> None:
    """Change to a user, who then owns the current folder."""
    os.chown(".", user, user)
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)


def run_init(source: bytes, limits: dict[str, Any], privileged: bool) -> int:
    """Be process 1: start the program, wait for it, and report a signal that has ended it. Does not return."""
    end_with_parent()
    program = os.fork()
    if program == 0:
        drop_privileges(privileged)
        run(source, limits)
    while True:
        process, status = os.wait()
        if process == program:
            report_end(limits["report"], status)
            os._exit(0)


def end_with_parent() -> None:
    """Ask the kernel to kill this process when its parent ends; a change of the user cancels that."""
    check(LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))


def wait_for(process: int) -> None:
    """End when the process ends."""
    os.waitpid(process, 0)
    os._exit(0)


def report_end(report: int, status: int) -> None:
    """Report how the program has ended, in case it could not do so itself."""
    if os.WIFSIGNALED(status):
        os.write(report, f"ended by {signal.Signals(os.WTERMSIG(status)).name}\n".encode())
    else:
        os.write(report, b"ended before its last line\n")


def run(source: bytes, limits: dict[str, Any]) -> None:
    """Set the limits and run the program. Does not return."""
    report = limits["report"]
    # The soft limit on CPU time sends SIGXCPU, which names the reason; SIGKILL follows a second later.
    resource.setrlimit(resource.RLIMIT_CPU, (limits["cpu"], limits["cpu"] + 1))
    for kind, limit in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, limits["file"]),
        (resource.RLIMIT_NOFILE, OPEN_FILES),
        (resource.RLIMIT_NPROC, limits["processes"]),
        (resource.RLIMIT_AS, limits["memory"]),
    ):
        resource.setrlimit(kind, (limit, limit))
    sys.argv = ["program.py"]
    program = sys.modules["__main__"] = ModuleType("__main__")  # in place of this module and its functions of C
    try:
        exec(compile(source, "program.py", "exec"), program.__dict__)
        result = "passed"
    except SystemExit:
        result = "ended before its last line"
    except BaseException as error:  # noqa: BLE001  # the program may raise anything
        result = f"{type(error).__name__}: {error}".split("\n")[0][:200]
    os.write(report, f"{result}\n".encode(errors="replace"))
    os._exit(0)


def audit_hook(folder: str) -> Callable[[str, tuple[Any, ...]], None]:
    """Return a hook that refuses network, processes, native code, and files outside of `folder`."""
    network_and_code = "socket. ctypes. shutil. mmap. syslog. gc. os.chdir os.putenv"
    processes = "subprocess. pty. os.fork os.posix_spawn os.exec os.spawn os.system os.kill signal.pthread_kill"
    refused = tuple(f"{network_and_code} {processes}".split())
    entries = "os.remove os.rename os.rmdir os.mkdir os.link os.symlink os.truncate"
    changing = tuple(f"{entries} os.chmod os.chown os.utime os.setxattr os.removexattr".split())
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    libraries = (f"{sys.base_prefix}/", f"{sys.prefix}/", f"{folder}/")

    def inside(path: Any, roots: tuple[str, ...]) -> bool:
        return isinstance(path, str | bytes) and f"{os.path.realpath(os.fsdecode(path))}/".startswith(roots)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        allowed = not event.startswith(refused)
        if event.startswith(changing):
            allowed = all(inside(path, (f"{folder}/",)) for path in arguments if isinstance(path, str | bytes))
        elif event == "open":
            path, _, flags = arguments
            allowed = inside(path, (f"{folder}/",) if flags & writing else libraries)
        elif event in ("os.listdir", "os.scandir"):
            allowed = inside(arguments[0] or ".", libraries)
        elif event == "import":
            allowed = arguments[0] not in ("ctypes", "_ctypes", "_posixsubprocess")
        if not allowed:
            raise PermissionError(f"{event} is not allowed")

    return hook


if __name__ == "__main__":
    main()
