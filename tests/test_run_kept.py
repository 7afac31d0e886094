"""An output directory is kept where it is whole and of this recipe, extended where that is exact, refused by name otherwise."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from daekit.errors import UserError
from daekit.runtime import run as runner
from daekit.runtime.folders import StageFolder
from tests.helpers.processes import forked
from tests.helpers.run_world import assert_same_run, checkpoints, during_step, stage_of, train, weights

NOBODY = 65534


def said(folder: Path, *arguments: str, status: int = 0) -> str:
    """Train in a process of its own; what it printed."""
    assert forked(lambda: train(folder, *arguments), folder / "output.txt") == status, (folder / "output.txt").read_text()
    return (folder / "output.txt").read_text()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    assert forked(lambda: train(folder, "stages.base.trainer.save_total_limit=2")) == 0
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run; its recipe writes into the copy."""
    shutil.copytree(finished / "run", tmp_path / "run")
    return tmp_path


# ---- a stage that never started ---------------------------------------------------------------------------------------


def test_a_stage_that_was_refused_does_not_bind_its_output_directory(tmp_path: Path) -> None:
    """Refused for its rows, then for its rate, then run under another name."""
    assert "max_length" in said(tmp_path, "stages.base.trainer.max_length=3", status=2)
    assert "lr_scheduler" in said(tmp_path, "stages.base.trainer.lr_scheduler_type=constantly", status=2)
    said(tmp_path, "stages.base.trainer.max_length=96", "name=another", "tokenizer.train.vocab_size=290")
    assert "another" in said(tmp_path, status=2)


def test_a_run_that_was_killed_before_its_first_checkpoint_does_not_bind_it(tmp_path: Path) -> None:
    def action() -> int:
        during_step(3, lambda: os._exit(9))
        return train(tmp_path)

    assert forked(action) == 9
    said(tmp_path, "stages.base.trainer.learning_rate=0.02")


def test_a_stage_with_a_checkpoint_binds_it(run: Path) -> None:
    (stage_of(run) / "stage.json").unlink()
    assert "learning_rate: 0.01 then, 0.02 now" in said(run, "stages.base.trainer.learning_rate=0.02", status=2)


def test_a_finished_stage_of_other_settings_stays_finished(run: Path) -> None:
    refusal = said(run, "stages.base.trainer.learning_rate=0.02", status=2)
    assert "was begun with another recipe (stage.trainer.learning_rate: 0.01 then, 0.02 now)" in refusal
    assert (stage_of(run) / "stage.json").is_file()


# ---- a longer run -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", [["max_steps=11"], ["max_steps=-1", "num_train_epochs=3"]], ids=["steps", "epochs"])
def test_a_finished_stage_goes_on_to_a_later_end_to_the_bit(end: list[str], run: Path, tmp_path: Path) -> None:
    longer = [f"stages.base.trainer.{each}" for each in end]
    assert "goes on to its new end" in said(run, *longer)
    assert checkpoints(run)[0] in ("checkpoint-11", "checkpoint-15")
    (tmp_path / "straight").mkdir()
    said(tmp_path / "straight", *longer)
    assert_same_run(run, tmp_path / "straight")
    assert "complete, kept" in said(run, *longer)


def test_a_killed_extension_goes_on(run: Path, tmp_path: Path) -> None:
    longer = "stages.base.trainer.max_steps=11"

    def action() -> int:
        during_step(10, lambda: os._exit(9))
        return train(run, longer)

    assert forked(action) == 9
    said(run, longer)
    (tmp_path / "straight").mkdir()
    said(tmp_path / "straight", longer)
    assert_same_run(run, tmp_path / "straight")


def test_a_shorter_end_is_refused(run: Path) -> None:
    before = weights(run)
    assert "beyond that end already (checkpoint-7)" in said(run, "stages.base.trainer.max_steps=5", status=2)
    assert weights(run).keys() == before.keys() and (stage_of(run) / "stage.json").is_file()


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_a_rate_that_depends_on_the_end_cannot_be_extended(schedule: str, tmp_path: Path) -> None:
    how = f"stages.base.trainer.lr_scheduler_type={schedule}"
    said(tmp_path, how)
    refusal = said(tmp_path, how, "stages.base.trainer.max_steps=9", status=2)
    assert f"lr_scheduler_type={schedule}" in refusal and "max_steps: 7 then, 9 now" in refusal
    assert "complete, kept" in said(tmp_path, how)


def test_a_stage_without_checkpoints_cannot_be_extended(tmp_path: Path) -> None:
    said(tmp_path, "stages.base.trainer.save_strategy=no")
    refusal = said(tmp_path, "stages.base.trainer.save_strategy=no", "stages.base.trainer.max_steps=9", status=2)
    assert "no checkpoint to go on from" in refusal


# ---- results that are lost or damaged ---------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["model", "model/model.safetensors", "model/tokenizer.json"])
def test_a_stage_that_lost_its_result_makes_it_again(missing: str, run: Path, finished: Path) -> None:
    path = stage_of(run) / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    output = said(run)
    assert "is missing: it is made again" in output and "resumed at step 7/7" in output
    assert_same_run(run, finished)


@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_a_damaged_result_is_named(damage: str, run: Path) -> None:
    path = stage_of(run) / "model" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content[:-5] if damage == "cut" else content)
    assert f"{path}: its content has changed" in said(run, status=2)
    shutil.rmtree(path.parent)
    assert "is made again" in said(run)


def test_a_checkpoint_whose_manifest_is_gone_is_named_with_the_remedy(run: Path) -> None:
    (stage_of(run) / "stage.json").unlink()
    folder = stage_of(run) / "checkpoint-7"
    (folder / "daekit_checkpoint.json").unlink()
    refusal = said(run, status=2)
    assert "checkpoint-7" in refusal and "delete" in refusal.lower() and "Traceback" not in refusal
    shutil.rmtree(folder)
    said(run)


def test_a_checkpoint_of_a_stage_is_found_by_its_step(run: Path) -> None:
    stage = StageFolder(stage_of(run))
    assert stage.checkpoint(7) == stage.root / "checkpoint-7"
    with pytest.raises(UserError, match=r"stage:base@checkpoint-5: .*there are: checkpoint-7"):
        stage.checkpoint(5)
    (stage.root / "checkpoint-7" / "optimizer.pt").unlink()
    with pytest.raises(UserError, match=r"stage:base@checkpoint-7: .*optimizer\.pt is missing"):
        stage.checkpoint(7)


SECOND = """stages.second={type: sft, student: "stage:base@checkpoint-STEP", data: [skills],
    trainer: {max_steps: 1, optim: sgd, learning_rate: 1.0e-30, gradient_checkpointing: false}}"""


def test_a_stage_begins_with_a_checkpoint_of_an_earlier_one(tmp_path: Path) -> None:
    """The second stage takes one step that changes nothing."""
    every = ["stages.base.trainer.save_steps=4", "stages.base.trainer.save_total_limit=3"]
    assert "will have no checkpoint-5" in said(tmp_path, *every, SECOND.replace("STEP", "5"), status=2)
    said(tmp_path, *every, SECOND.replace("STEP", "4"))
    second = load_file(stage_of(tmp_path).parent / "second" / "model" / "model.safetensors")
    fourth = load_file(stage_of(tmp_path) / "checkpoint-4" / "model.safetensors")
    assert all(torch.equal(second[name], fourth[name]) for name in fourth)
    last = weights(tmp_path)
    assert not all(torch.equal(second[name], last[name]) for name in fourth)


# ---- a directory that cannot be written to ----------------------------------------------------------------------------


def become_nobody(folder: Path) -> None:
    """Root may write anywhere. The directories above ``folder`` are opened for others; for a process that ends soon."""
    for parent in (folder, *folder.parents[:3]):
        parent.chmod(parent.stat().st_mode | 0o055)
    if os.getuid() == 0:
        os.setuid(NOBODY)


def test_a_read_only_output_directory_is_refused_at_once(run: Path) -> None:
    said(run)  # writes the recipe
    (run / "run").chmod(0o555)
    assert forked(lambda: become_nobody(run) or train(run), run / "output.txt") == 2
    assert "cannot be written to (Permission denied)" in (run / "output.txt").read_text()


def test_an_output_directory_that_turns_read_only_is_told_at_the_next_save(tmp_path: Path) -> None:
    def turn() -> None:
        stage_of(tmp_path).chmod(0o555)
        become_nobody(tmp_path)

    def action() -> int:
        during_step(7, turn)
        return train(tmp_path)

    assert forked(action, tmp_path / "output.txt") == 2, (tmp_path / "output.txt").read_text()
    output = (tmp_path / "output.txt").read_text()
    assert "cannot be written" in output and "make the directory writable" in output and "Traceback" not in output
    stage_of(tmp_path).chmod(0o755)
    assert "complete in" in said(tmp_path)


def test_an_error_of_another_place_stays_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied", "/elsewhere/file")

    monkeypatch.setattr(runner, "prepare", refuse)
    with pytest.raises(PermissionError):
        train(tmp_path)


def test_the_facts_of_a_stage_list_its_files(finished: Path) -> None:
    files = json.loads((stage_of(finished) / "stage.json").read_text())["files"]
    assert {"model/model.safetensors", "model/config.json", "model/provenance.json"} <= files.keys()
