"""Nothing is left behind: children that die with their parent, and the platforms that can take part."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import signal
import sys

from swarm_protocol.errors import UnsupportedPlatformError

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int | None = None) -> None:
    """Ask the kernel to kill this process when its parent ends, however that ends (Linux: `prctl`).

    Args:
        parent: the expected parent's process id; if it is already gone, this process ends at once.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if parent is not None and os.getppid() != parent:
        os._exit(1)


def bound_to_parent(command: list[str]) -> list[str]:
    """The command line that runs `command` as a child which dies with this process, and which Ctrl-C does not reach."""
    code = (
        "import ctypes,os,sys;ctypes.CDLL(None).prctl(1,9,0,0,0);os.setpgid(0,0);"
        "os.getppid()==int(sys.argv[1]) or os._exit(1);os.execvp(sys.argv[2],sys.argv[2:])"
    )
    return [sys.executable, "-ISc", code, str(os.getpid()), *command]


def reuse_freed_memory() -> None:
    """Tell the allocator (glibc) to keep freed buffers of some megabytes for the next ones of that size.

    As a rule it gives them back to the kernel at once, which then has to zero every page again: as costly as the work on
    them. Call it before threads are started. Changes nothing where the C library is another one.
    """
    trim_threshold, mmap_threshold, arena_max = -1, -3, -8
    with contextlib.suppress(AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_threshold, 16 << 20)
        libc.mallopt(trim_threshold, 32 << 20)
        libc.mallopt(arena_max, 1)


def wait_politely() -> None:
    """Let OpenMP's threads sleep while they wait for each other, unless the environment says otherwise.

    By default they spin. On a machine that does something else as well, a donor's for example, a step then takes many
    times as long, because the thread that all wait for is not scheduled. Call it before torch is imported.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def require_platform() -> None:
    """Raises `UnsupportedPlatformError` where hivemind's daemon does not run."""
    system, machine = platform.system(), platform.machine()
    if system != "Linux" or machine not in ("x86_64", "AMD64"):
        raise UnsupportedPlatformError(
            f"swarm-node runs on Linux x86-64 (WSL counts), because its peer daemon does; this is {system} {machine}."
        )
