"""Two runs never write into one output directory, and what a dead run has left is not in the way."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from daekit.errors import UserError
from daekit.runtime import lock
from daekit.runtime.lock import RunLock
from tests.helpers.processes import forked, start, status_of
from tests.helpers.run_world import during_step, train, weights

ELSEWHERE = {"host": "node-7", "machine": "another kernel", "process": 1, "started": "2026-01-01 00:00:00+0000"}


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def hold(folder: Path) -> int:
    """A process that holds the lock until it is killed."""

    def action() -> None:
        RunLock(folder).acquire()
        (folder / "held").touch()
        time.sleep(600)

    process = start(action)
    wait_for((folder / "held").exists)
    return process


def end(process: int) -> None:
    os.kill(process, signal.SIGKILL)
    status_of(process)


def test_a_second_run_is_told_who_writes_there(tmp_path: Path) -> None:
    holder = hold(tmp_path)
    try:
        with pytest.raises(UserError, match=rf"output_dir=.*another run writes there \(process {holder} on .*kill {holder}"):
            RunLock(tmp_path).acquire()
    finally:
        end(holder)


def test_the_lock_of_a_killed_run_is_taken_over(tmp_path: Path) -> None:
    holder = hold(tmp_path)
    end(holder)
    assert json.loads((tmp_path / "run.lock").read_text())["process"] == holder
    mine = RunLock(tmp_path)
    mine.acquire()
    assert json.loads((tmp_path / "run.lock").read_text())["process"] == os.getpid()
    mine.release()
    mine.release()
    assert not (tmp_path / "run.lock").exists()


def test_a_worker_that_outlives_its_run_holds_no_lock(tmp_path: Path) -> None:
    def action() -> None:
        RunLock(tmp_path).acquire()
        worker = start(lambda: time.sleep(600))
        (tmp_path / "worker").write_text(str(worker))
        os.kill(os.getpid(), signal.SIGKILL)

    assert forked(action) == -signal.SIGKILL
    try:
        RunLock(tmp_path).acquire()
    finally:
        os.kill(int((tmp_path / "worker").read_text()), signal.SIGKILL)


def test_a_run_on_another_machine_is_respected(tmp_path: Path) -> None:
    (tmp_path / "run.lock").write_text(json.dumps(ELSEWHERE))
    with pytest.raises(UserError, match=r"another machine \(process 1 on node-7.*delete .*run\.lock"):
        RunLock(tmp_path).acquire()
    assert json.loads((tmp_path / "run.lock").read_text()) == ELSEWHERE


def test_a_machine_that_was_started_anew_has_no_old_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run.lock").write_text(json.dumps(ELSEWHERE))
    monkeypatch.setattr(lock.socket, "gethostname", lambda: "node-7")
    RunLock(tmp_path).acquire()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"process": 1}'])
def test_a_torn_lock_file_is_nobodys(content: str, tmp_path: Path) -> None:
    (tmp_path / "run.lock").write_text(content)
    RunLock(tmp_path).acquire()


def test_a_file_system_without_locks_goes_by_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(lock.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "lockf", refuse)
    holder = hold(tmp_path)
    with pytest.raises(UserError, match=f"process {holder}"):
        RunLock(tmp_path).acquire()
    end(holder)
    RunLock(tmp_path).acquire()


def test_a_lock_file_deleted_before_it_is_locked_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its holder ended between our opening and our locking it: a lock on the deleted file would keep nobody out."""
    original, calls = lock.fcntl.lockf, []

    def delete_first(*arguments: int) -> None:
        if not calls:
            (tmp_path / "run.lock").unlink()
        calls.append(arguments)
        original(*arguments)

    monkeypatch.setattr(lock.fcntl, "lockf", delete_first)
    RunLock(tmp_path).acquire()
    assert len(calls) == 2 and (tmp_path / "run.lock").exists()


def test_of_two_runs_at_once_one_trains(tmp_path: Path) -> None:
    """The second one comes while the first is in its third step."""

    def first() -> int:
        during_step(3, lambda: ((tmp_path / "begun").touch(), wait_for((tmp_path / "tried").exists)))
        return train(tmp_path)

    process = start(first)
    wait_for((tmp_path / "begun").exists)
    assert forked(lambda: train(tmp_path), tmp_path / "second.txt") == 2
    (tmp_path / "tried").touch()
    assert status_of(process) == 0
    assert f"process {process} on" in (tmp_path / "second.txt").read_text()
    assert weights(tmp_path)
    assert forked(lambda: train(tmp_path), tmp_path / "third.txt") == 0
    assert "complete, kept" in (tmp_path / "third.txt").read_text()
