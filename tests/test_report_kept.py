"""What a report has measured is kept: one that was killed goes on, and one of more models asks these alone; real processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

from daekit.runtime import report
from tests.helpers.processes import forked
from tests.helpers.run_world import train

ARGUMENTS = ["stages.base.trainer.save_steps=4", "evaluation.max_new_tokens=2"]
TWO = 'evaluation.models=[{early: "stage:base@checkpoint-4"}, base]'
THREE = 'evaluation.models=[base, {early: "stage:base@checkpoint-4"}, {late: "stage:base@checkpoint-7"}]'


def evaluated(folder: Path, *arguments: str, killed_at: int = -1) -> list[str]:
    """Train in a process of its own, which is killed at an evaluation; the models that were measured to their end."""
    done = folder / "done.txt"
    done.unlink(missing_ok=True)
    measure = report.evaluate_model

    def watched(name: str, *args: Any, **options: Any) -> Any:
        if len(done.read_text().split() if done.exists() else []) == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
        found = measure(name, *args, **options)
        with done.open("a") as file:
            file.write(f"{name}\n")
        return found

    def action() -> int:
        report.evaluate_model = watched  # type: ignore[assignment]
        return train(folder, *ARGUMENTS, *arguments)

    folder.mkdir(exist_ok=True)
    assert forked(action, folder / "output.txt") == (0 if killed_at < 0 else -signal.SIGKILL)
    return done.read_text().split() if done.exists() else []


def rows_of(folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((folder / "run" / "report" / "report.json").read_text())
    return rows


def test_a_report_that_is_killed_goes_on_to_the_same_rows(tmp_path: Path) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert evaluated(straight, TWO) == ["early", "base"]
    assert evaluated(killed, TWO, killed_at=1) == ["early"]
    assert not (killed / "run" / "report" / "report.json").exists()
    assert evaluated(killed, TWO) == ["base"]
    assert rows_of(killed) == rows_of(straight)
    answers = [(each / "run" / "report" / "samples.jsonl").read_text() for each in (killed, straight)]
    assert answers[0] == answers[1] != ""


def test_only_what_a_change_touches_is_measured_again(tmp_path: Path) -> None:
    assert evaluated(tmp_path, TWO) == ["early", "base"]
    before = rows_of(tmp_path)
    assert evaluated(tmp_path, THREE) == [], "the last checkpoint has the weights of the result"
    after = rows_of(tmp_path)
    assert [row for row in after if row["model"] == "early"] == [row for row in before if row["model"] == "early"]
    late, base = ([row | {"model": ""} for row in after if row["model"] == name] for name in ("late", "base"))
    assert late == base
    assert evaluated(tmp_path, TWO, "evaluation.limit=2") == ["early", "base"]
    assert evaluated(tmp_path, TWO, "evaluation.limit=2", "evaluation.max_new_tokens=3") == ["early", "base"]
    assert evaluated(tmp_path, TWO, "evaluation.bootstrap=10") == [], "the rows' values are the same"


def test_what_a_model_computes_counts_and_so_does_the_order_of_sources(tmp_path: Path) -> None:
    """Values of rows are paired by their place; a config decides what the same weights compute."""
    more = 'sources.more={domain: general, path: "builtin:skills", validation: "builtin:skills", limit: 5, validation_limit: 3}'
    orders = [f"evaluation.sources=[{names}]" for names in ("skills, more", "more, skills")]
    assert evaluated(tmp_path, TWO, more, orders[0]) == ["early", "base"]
    assert evaluated(tmp_path, TWO, more, orders[1]) == ["early", "base"]
    copy = tmp_path / "copy"
    shutil.copytree(tmp_path / "run" / "stages" / "base" / "model", copy)
    models = f"evaluation.models=[base, {{copy: {copy}}}]"
    assert evaluated(tmp_path, more, orders[0], models) == []
    config = json.loads((copy / "config.json").read_text())
    config["sliding_window"] = 2
    (copy / "config.json").write_text(json.dumps(config))
    assert evaluated(tmp_path, more, orders[0], models) == ["copy"]
