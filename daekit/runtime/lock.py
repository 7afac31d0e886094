"""One run per output directory: a lock file that names the host, the process and the start of the run that holds it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from daekit.errors import UserError

_BOOT = Path("/proc/sys/kernel/random/boot_id")
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # file systems without record locks


class RunLock:
    """The right to write into an output directory, from ``acquire`` to ``release``.

    The kernel's record lock decides among the processes of one machine. It ends with its process, so what a killed run has
    left is taken over. Between machines that share a file system such locks cannot be relied on: a lock file that another
    machine has written is respected until somebody deletes it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / "run.lock"
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Take the lock; the output directory is made if it is not there.

        Raises:
            UserError: another run holds it, or the directory cannot be written to.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            while self._descriptor is None:
                self._descriptor = self._opened()
        except OSError as error:
            raise UserError(
                f"output_dir={self.folder}: cannot be written to ({error.strerror}); make it writable, or choose another"
            ) from error
        me = {"host": socket.gethostname(), "machine": _machine(), "process": os.getpid(), "started": time.strftime("%F %T%z")}
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, json.dumps(me).encode(), 0)

    def release(self) -> None:
        """Give the lock back; a second call does nothing."""
        if self._descriptor is not None:
            # it may be gone, or in a directory that has turned read-only; the kernel's lock ends anyway
            with contextlib.suppress(OSError):
                self.path.unlink()  # while it is held: nobody can have taken it in between
            os.close(self._descriptor)
            self._descriptor = None

    def _opened(self) -> int | None:
        """The lock file, locked; None if it was deleted between its opening and its locking."""
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        is_ours = False
        try:
            locked = self._locks(descriptor)
            holder = _read(descriptor)
            if holder is not None and not self._is_stale(holder, locked):
                raise UserError(self._refusal(holder))
            is_ours = self.path.exists() and os.path.samestat(os.fstat(descriptor), self.path.stat())
        finally:
            if not is_ours:
                os.close(descriptor)
        return descriptor if is_ours else None

    def _locks(self, descriptor: int) -> bool:
        """Whether the kernel gave the lock; False where the file system has none."""
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise UserError(self._refusal(_read(descriptor) or {})) from error
            if error.errno not in _NO_LOCKS:
                raise
            return False
        return True

    def _is_stale(self, holder: dict[str, Any], locked: bool) -> bool:
        """Whether the process that wrote the file has ended."""
        if holder["machine"] != _machine():
            # this machine has been started anew since; of a namesake on the same files the kernel's lock would still be held
            return locked and holder["host"] == socket.gethostname()
        return locked or not _is_alive(holder["process"])

    def _refusal(self, holder: dict[str, Any]) -> str:
        process = holder.get("process", "PROCESS")
        who = f"(process {process} on {holder.get('host', '?')}, since {holder.get('started', '?')})"
        if holder.get("machine", _machine()) == _machine():
            return (
                f"output_dir={self.folder}: another run writes there {who}. Wait for it, or end it (kill {process}), or choose "
                "another output_dir."
            )
        return (
            f"output_dir={self.folder}: {self.path.name} was written by a run on another machine {who}, which cannot be seen "
            f"from {socket.gethostname()}. If that run has ended, delete {self.path}; or choose another output_dir."
        )


def _machine() -> str:
    """Names the running kernel: containers of one machine share it, and a machine that is started anew has another."""
    return _BOOT.read_text().strip() if _BOOT.is_file() else socket.gethostname()


def _read(descriptor: int) -> dict[str, Any] | None:
    """The run that has written the file; None if none has, or the machine went down while it was written."""
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:
        return None
    return holder if isinstance(holder, dict) and {"host", "machine", "process", "started"} <= holder.keys() else None


def _is_alive(process: int) -> bool:
    """Not by psutil, which takes the process of another user for ended where /proc hides it."""
    try:
        os.kill(process, 0)
    except OSError as error:
        return isinstance(error, PermissionError)
    return True
