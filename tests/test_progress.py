"""A run always shows that it lives: a bar on a terminal, a line now and then elsewhere, and what its rates count."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest

from daekit import progress
from daekit.progress import Progress, clock
from daekit.trainers.progress import ProgressCallback
from tests.helpers import tiny
from tests.helpers.trainer_world import dae


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def hours(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that the module sees; tests move it."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_without_a_terminal_there_is_a_line_now_and_then(hours: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    work = Progress("[report] student", "rows")
    for done in range(0, 101):
        work(done, 100)
        hours[0] += 1
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "[report] student: 30 of 100 rows, 1:10 left",
        "[report] student: 60 of 100 rows, 0:40 left",
        "[report] student: 90 of 100 rows, 0:10 left",
    ]


def test_a_line_of_another_kind_is_a_sign_of_life_too(hours: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    work = Progress("x", "steps")
    for done in range(0, 101):
        work(done, 100)
        hours[0] += 1
        if done % 20 == 0:
            work.say("a log")
    assert set(capsys.readouterr().out.splitlines()) == {"a log"}


def test_parts_are_named_and_timed_apart(hours: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    work = Progress("[report] kd", "rows")
    work.part("shop, likelihood", 1, 50)
    hours[0] = 40
    work.part("shop, answers", 10, 50)
    hours[0] = 80
    work.part("shop, answers", 20, 50)
    assert capsys.readouterr().out.splitlines() == [
        "[report] kd shop, answers: 10 of 50 rows",
        "[report] kd shop, answers: 20 of 50 rows, 2:00 left",
    ]


def test_on_a_terminal_there_is_a_bar_and_lines_stand_above_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(progress.sys, "stderr", terminal)
    work = Progress("[kd]", "steps")
    work(3, 10)
    work.say("a log")
    work(7, 10)
    work.close()
    assert "[kd]" in terminal.getvalue() and "3/10" in terminal.getvalue()
    assert capsys.readouterr().out == "a log\n"


def test_minutes_and_seconds() -> None:
    assert [clock(seconds) for seconds in (0.4, 61, 3700)] == ["0:00", "1:01", "61:40"]


def test_both_rates_are_shown_and_say_what_they_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The clock runs one second per log, so that a rate is a number of tokens."""
    ticks = iter(range(1000))
    monkeypatch.setattr("daekit.trainers.progress.time.perf_counter", lambda: float(next(ticks)))
    trainer = dae(tmp_path, tiny.rows(8), logging_steps=1, max_steps=2, per_device_train_batch_size=4)
    trainer.add_callback(ProgressCallback("dae"))
    trainer.train()
    rates = re.findall(r"(\d+) tokens/s \((\d+) in the loss\)", capsys.readouterr().out)
    assert len(rates) == 2
    rows = trainer.train_dataset
    read = sum(len(row["input_ids"]) for row in rows)
    in_loss = sum(label != -100 for row in rows for label in row["labels"][1:]) if "labels" in rows.column_names else None
    assert sum(int(all_) for all_, _ in rates) == read
    assert in_loss is None or sum(int(some) for _, some in rates) == in_loss < read
