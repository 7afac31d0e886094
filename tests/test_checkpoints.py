"""Killed at any step and between any two files of a checkpoint, a run resumes to the same weights and the same log.

Every kill is a real SIGKILL of a real process. Processes are forked from this one, which has imported everything.
"""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, TrainerCallback

from daekit.errors import UserError
from daekit.trainers import DomainSFTConfig, DomainSFTTrainer, checkpoint
from tests.helpers import tiny
from tests.helpers.processes import forked
from tests.helpers.trainer_world import dae, options, weights

RUNTIMES = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "rollout_rows_per_second")
STUDENTS = ("dense", "lora", "mixtral")
SEED, SAMPLED = 20, 20  # of the file events of a run before which it is killed; the seed is any number
# what changes or makes files: ``open`` for writing, and the rest of the ways in which files come and go
EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir")


def build(student: str, folder: Path, **changes: Any) -> Any:
    """DAE with the student as its own reference. Checkpoints at steps 3, 6, 9 do not fall on the logs at 2, 4, 6, 8."""
    arguments: dict[str, Any] = dict(
        reference=None,
        save_strategy="steps",
        save_steps=3,
        save_total_limit=1,
        logging_steps=2,
        max_steps=10,
        num_train_epochs=5,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        optim="adamw_torch",
        learning_rate=0.01,
        lr_scheduler_type="cosine",
        max_grad_norm=1.0,
        ce_weight=0.2,
    )
    if student == "on-policy":  # buffers from steps 0, 3 | 4, 7 | 8: a checkpoint falls between two of them, two inside one
        arguments |= {"on_policy_fraction": 0.5, "max_new_tokens": 8, "rollout_buffer": 3}
    if student in ("lora", "on-policy"):
        arguments["peft_config"] = LoraConfig(
            r=4, lora_dropout=0.1, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"
        )
    if student == "mixtral":
        arguments["router_aux_loss_coef"] = 0.1
    model = tiny.model("mixtral" if student == "mixtral" else "mistral", seed=1).eval()  # as from_pretrained gives it
    return dae(folder, tiny.rows(14), model, **(arguments | changes))


def run(student: str, folder: Path, callbacks: tuple[TrainerCallback, ...] = (), **changes: Any) -> None:
    """Train to the end, from the newest whole checkpoint if there is one; write the weights and the log."""
    trainer = build(student, folder, **changes)
    for callback in callbacks:
        trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=checkpoint.newest(folder) is not None)
    history = [{k: v for k, v in entry.items() if k not in RUNTIMES} for entry in trainer.state.log_history]
    torch.save({"weights": weights(trainer.model), "history": history}, folder / "result.pt")


@cache
def straight(student: str, folder: Path) -> dict[str, Any]:
    """The result of the run that is not killed."""
    assert forked(lambda: run(student, folder)) == 0
    return torch.load(folder / "result.pt")


@pytest.fixture(scope="session")
def straight_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("straight")


class KillAtStep(TrainerCallback):
    """SIGKILL after a step, before its checkpoint."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


class FileEvents:
    """Counts what happens to files below a folder, and kills the process just before the n-th of them."""

    def __init__(self, folder: Path, kill_at: int | None = None) -> None:
        self.folder, self.kill_at, self.seen = str(folder), kill_at, []
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in EVENTS or not str(arguments[0]).startswith(self.folder) or self._reads(event, arguments):
            return
        self.seen.append((event, str(arguments[0])))
        if len(self.seen) == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    @staticmethod
    def _reads(event: str, arguments: tuple[Any, ...]) -> bool:
        return event == "open" and not (arguments[2] & (os.O_WRONLY | os.O_RDWR))


def file_events(student: str, folder: Path) -> list[tuple[str, str]]:
    """What a whole run does to its files, in order."""

    def action() -> None:
        events = FileEvents(folder)
        run(student, folder)
        (folder / "events.json").write_text(json.dumps(events.seen))

    assert forked(action) == 0
    return [tuple(entry) for entry in json.loads((folder / "events.json").read_text())]


def assert_the_same(student: str, folder: Path, straight_folder: Path) -> None:
    expected, found = straight(student, straight_folder / student), torch.load(folder / "result.pt")
    assert torch.equal(found["weights"], expected["weights"])
    assert found["history"] == expected["history"]


def killed_then_resumed(student: str, folder: Path, kill: Callable[[], None], straight_folder: Path) -> None:
    assert forked(kill) == -signal.SIGKILL
    assert forked(lambda: run(student, folder)) == 0
    assert_the_same(student, folder, straight_folder)


@pytest.mark.parametrize("student", ["dense", "mixtral"])  # "lora" is killed four times in a row below
def test_killed_at_a_step(student: str, tmp_path: Path, straight_folder: Path) -> None:
    step = random.choice([4, 5, 7, 8])
    print(f"killed at step {step}")
    killed_then_resumed(student, tmp_path, lambda: run(student, tmp_path, (KillAtStep(step),)), straight_folder)


def test_killed_inside_a_buffer_of_responses(tmp_path: Path, straight_folder: Path) -> None:
    """What the student of step 4 has written for steps 4 to 6 is trained on after it is gone."""
    assert forked(lambda: run("on-policy", tmp_path, (KillAtStep(8),))) == -signal.SIGKILL
    written = json.loads((tmp_path / "checkpoint-6" / "daekit_state_0.json").read_text())["rollouts"]
    assert written["until"] == 7 and {step for step, _, _ in written["responses"]} == {6}
    assert forked(lambda: run("on-policy", tmp_path)) == 0
    assert_the_same("on-policy", tmp_path, straight_folder)


def kill_points(events: list[tuple[str, str]]) -> list[int]:
    """Two of the second checkpoint: while it is written and before it is sealed; after that, while the first is removed."""
    seal = next(n for n, (event, path) in enumerate(events) if event == "os.rename" and f"6/{checkpoint.MANIFEST}" in path)
    writing = [n for n in range(seal + 1) if "checkpoint-6" in events[n][1]]
    removing = [n for n in range(seal + 1, len(events)) if "checkpoint-3" in events[n][1]]
    return [random.choice(writing) + 1, random.choice(removing) + 1]


@pytest.mark.parametrize("student", STUDENTS)
def test_killed_between_the_files_of_a_checkpoint(student: str, tmp_path: Path, straight_folder: Path) -> None:
    events = file_events(student, tmp_path / "counted")
    for point in kill_points(events):
        print(f"killed before event {point}: {events[point - 1]}")
        folder = tmp_path / "run"

        def kill(folder: Path = folder, point: int = point) -> None:
            FileEvents(folder, point)
            run(student, folder)

        killed_then_resumed(student, folder, kill, straight_folder)
        shutil.rmtree(folder)


def kill_before(points: list[int], student: str, folder: Path, straight_folder: Path, events: list[tuple[str, str]]) -> None:
    """Kill a run before each of these events, in their order, and resume it; once there is a whole checkpoint there is one."""
    whole_before = False
    for point in sorted(points):

        def kill(point: int = point) -> None:
            FileEvents(folder, point)
            run(student, folder)

        assert forked(kill) == -signal.SIGKILL, events[point - 1]
        whole = checkpoint.newest(folder) is not None
        assert whole or not whole_before, f"no whole checkpoint is left before {events[point - 1]}"
        whole_before = whole
        assert forked(lambda: run(student, folder)) == 0, events[point - 1]
        assert_the_same(student, folder, straight_folder)
        shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.parametrize("student", STUDENTS)
def test_killed_before_file_events_of_the_whole_run(student: str, tmp_path: Path, straight_folder: Path) -> None:
    """One event of each stretch of the run, drawn by a seed: what ``make nightly`` does with every event."""
    events = file_events(student, tmp_path / "counted")
    draw = random.Random(f"{SEED} {student}")
    stretch = len(events) / SAMPLED
    points = [1 + int((index + draw.random()) * stretch) for index in range(SAMPLED)]
    kill_before(points, student, tmp_path / "run", straight_folder, events)


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("student", STUDENTS)
def test_killed_before_every_single_file_event(student: str, tmp_path: Path, straight_folder: Path) -> None:
    events = file_events(student, tmp_path / "counted")
    kill_before(list(range(1, len(events) + 1)), student, tmp_path / "run", straight_folder, events)


def test_killed_again_and_again(tmp_path: Path, straight_folder: Path) -> None:
    for step in (2, 4, 5, 8):
        assert forked(lambda step=step: run("lora", tmp_path, (KillAtStep(step),))) == -signal.SIGKILL
    assert forked(lambda: run("lora", tmp_path)) == 0
    assert_the_same("lora", tmp_path, straight_folder)


@pytest.mark.parametrize(
    "end", [dict(max_steps=10), dict(max_steps=-1, num_train_epochs=2)], ids=["inside an epoch", "at its end"]
)
def test_resumed_from_its_last_checkpoint_a_run_trains_no_more(end: dict[str, Any], tmp_path: Path) -> None:
    """Killed between the last checkpoint and the end; the Trainer itself would take one more step, or log less."""
    results = []
    for _ in range(2):
        run("dense", tmp_path, lr_scheduler_type="constant", **end)
        results.append(torch.load(tmp_path / "result.pt"))
    assert torch.equal(results[1]["weights"], results[0]["weights"])
    assert results[1]["history"] == results[0]["history"]


def test_a_run_goes_on_beyond_its_end_where_the_learning_rate_does_not_depend_on_it(tmp_path: Path) -> None:
    """With a constant rate the longer run is the run that was begun; with a warm-up that is a share of it, it is not."""
    constant: dict[str, Any] = {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 2}
    run("dense", tmp_path / "straight", max_steps=9, **constant)
    for end in (3, 9):
        run("dense", tmp_path / "longer", max_steps=end, **constant)
    straight, longer = (torch.load(tmp_path / name / "result.pt") for name in ("straight", "longer"))
    assert torch.equal(longer["weights"], straight["weights"])
    assert longer["history"] == straight["history"]
    with pytest.raises(UserError, match=r"end: .*warmup_steps"):
        run("dense", tmp_path / "longer", max_steps=10, **(constant | {"warmup_steps": 0.5}))


# ---- damaged, foreign and other runs' checkpoints ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps with whole checkpoints at 3 and 6."""
    folder = tmp_path_factory.mktemp("finished")
    build("dense", folder, max_steps=6, save_total_limit=2).train()
    return folder


@pytest.fixture
def output(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def resume(output: Path, **changes: Any) -> Any:
    trainer = build("dense", output, **(dict(max_steps=6, save_total_limit=2) | changes))
    trainer.train(resume_from_checkpoint=True)
    return trainer


DAMAGES: dict[str, Callable[[Path], object]] = {
    "model.safetensors has": lambda folder: os.truncate(folder / "model.safetensors", 1000),
    "optimizer.pt is missing": lambda folder: (folder / "optimizer.pt").unlink(),
    "content of model.safetensors has changed": lambda folder: flip(folder / "model.safetensors"),
    "content of optimizer.pt has changed": lambda folder: flip(folder / "optimizer.pt"),
    "daekit_checkpoint.json cannot be read": lambda folder: os.truncate(folder / checkpoint.MANIFEST, 50),
}


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("problem", DAMAGES)
def test_a_corrupt_checkpoint_is_named_and_not_stepped_over(problem: str, output: Path) -> None:
    DAMAGES[problem](output / "checkpoint-6")
    with pytest.raises(UserError, match=problem) as caught:
        resume(output)
    assert "checkpoint-6" in str(caught.value)
    shutil.rmtree(output / "checkpoint-6")
    assert resume(output).state.global_step == 6


@pytest.mark.parametrize(
    ("what", "changes"),
    [
        ("teacher", {"teachers": {"shop": tiny.model(seed=9, hidden=48)}}),
        ("teacher", {"reference": tiny.model(seed=9)}),
        ("data", {"max_length": 8, "overlong": "truncate"}),
        ("objective.temperature: 1.0 then, 2.0 now", {"temperature": 2.0}),
        ("objective.ce_weight", {"ce_weight": 0.3}),
        ("seed", {"seed": 7}),
        ("batch", {"gradient_accumulation_steps": 1}),
        ("optim: .adamw_torch. then, .sgd. now", {"optim": "sgd"}),
        ("learning_rate: 0.01 then, 0.02 now", {"learning_rate": 0.02}),
        ("lr_scheduler_type", {"lr_scheduler_type": "linear"}),
        ("lr_scheduler_kwargs", {"lr_scheduler_kwargs": {"num_cycles": 1.5}}),
        ("warmup_steps", {"warmup_steps": 2}),
        ("weight_decay", {"weight_decay": 0.1}),
        ("adam_beta2", {"adam_beta2": 0.99}),
        ("max_grad_norm", {"max_grad_norm": 2.0}),
        ("end: .*6.* then, .*8.* now", {"max_steps": 8}),
        ("end", {"max_steps": -1}),
    ],
)
def test_another_run_is_refused(what: str, changes: dict[str, Any], output: Path) -> None:
    with pytest.raises(UserError, match=rf"another run.*{what}"):
        resume(output, **changes)


def test_another_student_or_base_is_refused(tmp_path: Path) -> None:
    adapter = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    data = tiny.rows(8)

    def trainer(base: Any) -> DomainSFTTrainer:
        config = DomainSFTConfig(**options(tmp_path, save_strategy="steps", save_steps=1, max_steps=2))
        return DomainSFTTrainer(base, config, data, processing_class=tiny.tokenizer(), peft_config=adapter)

    trainer(tiny.model(seed=1)).train()
    for other in (tiny.model(seed=2), tiny.model("mixtral", seed=1)):
        with pytest.raises(UserError, match=r"another run.*student"):
            trainer(other).train(resume_from_checkpoint=True)


LORA: dict[str, Any] = dict(r=4, lora_alpha=8, lora_dropout=0.1, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


@pytest.fixture(scope="module")
def with_adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    lora_trainer(folder, {}).train()
    return folder


def lora_trainer(folder: Path, adapter: dict[str, Any], **changes: Any) -> DomainSFTTrainer:
    config = DomainSFTConfig(**options(folder, save_strategy="steps", save_steps=1, max_steps=2, **changes))
    arguments: dict[str, Any] = dict(processing_class=tiny.tokenizer(), peft_config=LoraConfig(**(LORA | adapter)))
    return DomainSFTTrainer(tiny.model(seed=1), config, tiny.rows(8), **arguments)


@pytest.mark.parametrize(
    ("what", "adapter", "changes"),
    [
        (r"adapter\.lora_alpha: 8 then, 16 now", {"lora_alpha": 16}, {}),
        (r"adapter\.lora_dropout: 0.1 then, 0.0 now", {"lora_dropout": 0.0}, {}),
        (r"adapter\.use_rslora: false then, true now", {"use_rslora": True}, {}),
        (r"adapter\.use_dora: false then, true now", {"use_dora": True}, {}),
        ("adapter.target_modules: .*k_proj", {"target_modules": ["k_proj", "v_proj"]}, {}),
        (r"adapter\.r: 4 then, 8 now", {"r": 8}, {}),
        ("bf16: false then, true now", {}, {"bf16": True}),
    ],
)  # fmt: skip
def test_another_adapter_or_precision_is_refused(
    what: str, adapter: dict[str, Any], changes: dict[str, Any], with_adapter: Path
) -> None:
    with pytest.raises(UserError, match=rf"another run.*{what}"):
        lora_trainer(with_adapter, adapter, **changes).train(resume_from_checkpoint=True)


def test_the_same_adapter_is_resumed(with_adapter: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(with_adapter, tmp_path / "run"))
    trainer = lora_trainer(folder, {})
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-1"))
    assert trainer.state.global_step == 2


@pytest.mark.parametrize("packing", [False, True])
def test_another_stream_is_refused_and_the_same_is_resumed(packing: bool, tmp_path: Path) -> None:
    def trainer(seed: int) -> Any:
        data = tiny.rows(40, seed=seed).to_iterable_dataset()
        changes = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, "packing": packing, "max_length": 32}
        return dae(tmp_path, data, **changes)

    trainer(0).train()
    with pytest.raises(UserError, match=r"another run.*data"):
        trainer(1).train(resume_from_checkpoint=True)
    trainer(0).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_the_order_of_checkpoints_is_that_of_steps_and_not_of_a_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that jumps back between two saves, and files that are touched later, change nothing."""
    clock = iter(range(10**9, 0, -1000))
    with monkeypatch.context() as patch:
        patch.setattr("time.time", lambda: next(clock))
        build("dense", tmp_path, max_steps=6, save_total_limit=5).train()
    os.utime(tmp_path / "checkpoint-3" / checkpoint.MANIFEST)
    newest = checkpoint.newest(tmp_path)
    assert newest is not None and newest.name == "checkpoint-6"


def test_a_mixture_of_experts_generates_after_training(tmp_path: Path) -> None:
    """TRL sets output_router_logits for the loss of the router; saved with it, a Mixtral cannot generate with a cache."""
    trainer = build("mixtral", tmp_path, max_steps=3)
    assert trainer.aux_loss_enabled
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    assert "aux_loss" in trainer.state.log_history[0]
    for folder in (tmp_path / "model", tmp_path / "checkpoint-3"):
        saved = AutoModelForCausalLM.from_pretrained(folder)
        assert saved.config.output_router_logits is False
        assert saved.config.router_aux_loss_coef == tiny.model("mixtral").config.router_aux_loss_coef
        assert saved.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=3, use_cache=True, pad_token_id=0).shape[1] > 3


def test_other_data_is_refused(output: Path) -> None:
    trainer = build("dense", output, max_steps=6)
    trainer.train_dataset = trainer.train_dataset.select(range(12))
    with pytest.raises(UserError, match=r"another run.*data"):
        trainer.train(resume_from_checkpoint=True)


def test_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint to resume from"):
        build("dense", tmp_path).train(resume_from_checkpoint=True)


def test_a_model_without_its_optimizer_is_not_resumed(tmp_path: Path) -> None:
    build("dense", tmp_path, max_steps=3, lr_scheduler_type="constant", save_only_model=True).train()
    with pytest.raises(UserError, match=r"no optimizer"):
        build("dense", tmp_path, max_steps=6, lr_scheduler_type="constant").train(resume_from_checkpoint=True)


def test_a_checkpoint_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    foreign = tmp_path / "checkpoint-500"
    foreign.mkdir()
    (foreign / "model.safetensors").write_text("precious")
    with pytest.raises(UserError, match=r"checkpoint-500: has no .*Delete the folder.*, move it away, or"):
        build("dense", tmp_path).train()
    with pytest.raises(UserError, match="not a checkpoint of daekit"):
        build("dense", tmp_path).train(resume_from_checkpoint=str(foreign))
    assert (foreign / "model.safetensors").read_text() == "precious"


def test_a_run_begun_anew_in_the_same_folder_keeps_its_own_checkpoints(output: Path) -> None:
    """The older run's checkpoint-6 has the higher step, yet it is the one to go, and not the one to resume."""
    build("dense", output, max_steps=5, save_total_limit=1, save_steps=4).train()
    assert [folder.name for folder in checkpoint.checkpoints(output)] == ["checkpoint-5"]
    build("dense", output, max_steps=3, save_total_limit=5).train()
    newest = checkpoint.newest(output)
    assert newest is not None and newest.name == "checkpoint-3"


def test_a_deletion_that_is_cut_short_leaves_no_half_checkpoint(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(folder: Path) -> None:
        (folder / "optimizer.pt").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", cut)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.rotate(output, 1, set())
    assert [folder.name for folder in checkpoint.checkpoints(output)] == ["checkpoint-6"]
    checkpoint.clear_partial(output)
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-6"]


def test_checkpoints_hold_no_pickled_arguments(output: Path) -> None:
    names = {path.name for path in (output / "checkpoint-6").iterdir()}
    assert "training_args.bin" not in names
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= names


# ---- a full disk ------------------------------------------------------------------------------------------------------


def assert_full_disk_is_survived(output: Path, fill: Callable[[], Any], empty: Callable[[], Any]) -> None:
    trainer = build("dense", output, save_total_limit=1)

    class Fill(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 6:
                fill()

    trainer.add_callback(Fill())
    with pytest.raises(UserError, match="the disk is full") as caught:
        trainer.train()
    assert "checkpoint-6" in str(caught.value)
    newest = checkpoint.newest(output)
    assert newest is not None and newest.name == "checkpoint-3"
    empty()
    run("dense", output)


@pytest.mark.parametrize("writer", ["torch.save", "safetensors.torch.save_file", "tokenizers.Tokenizer.save", "builtins.open"])
def test_a_full_disk(writer: str, tmp_path: Path, straight_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors import SafetensorError

    original_open = open

    def full(*arguments: Any, **options: Any) -> Any:
        if writer == "builtins.open" and not ("w" in str(arguments[1:]) and "checkpoint-6" in str(arguments[0])):
            return original_open(*arguments, **options)
        if writer == "safetensors.torch.save_file":
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        if writer == "tokenizers.Tokenizer.save":  # raises nothing narrower
            raise Exception("No space left on device (os error 28)")
        raise OSError(errno.ENOSPC, "No space left on device")

    targets = {
        "safetensors.torch.save_file": "transformers.modeling_utils.safe_save_file",
        "tokenizers.Tokenizer.save": "transformers.PreTrainedTokenizerFast.save_pretrained",
    }
    target = targets.get(writer, writer)
    assert_full_disk_is_survived(tmp_path, lambda: monkeypatch.setattr(target, full), monkeypatch.undo)
    assert_the_same("dense", tmp_path, straight_folder)


def test_a_disk_that_is_really_full(tmp_path: Path, straight_folder: Path) -> None:
    """A small file system, filled but for n bytes: each n breaks another writer."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting a file system needs root")
    try:
        for spare in (0, 220_000):
            output = disk / str(spare)
            output.mkdir()
            ballast = disk / "ballast"

            def fill(ballast: Path = ballast, spare: int = spare) -> None:
                with ballast.open("wb") as stream:
                    stream.write(b"\0" * (shutil.disk_usage(disk).free - spare - 8192))

            assert_full_disk_is_survived(output, fill, ballast.unlink)
            assert_the_same("dense", output, straight_folder)
            shutil.rmtree(output)
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)
