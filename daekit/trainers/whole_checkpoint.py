"""SFTTrainer whose checkpoints are whole or do not exist, and whose resumed run is the straight run, to the bit."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import IterableDataset
from peft import PeftModel
from torch import Tensor, nn
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from daekit.data.fingerprint import fingerprint as data_fingerprint
from daekit.errors import UserError, says_disk_is_full
from daekit.files import write_json
from daekit.models.identity import hash_tensors
from daekit.models.restore import restore_weights
from daekit.models.sharded import shape_of
from daekit.trainers import checkpoint
from daekit.trainers.engine_state import load_stateless, optimizer_files, reading_safely, save_fsdp_state
from daekit.trainers.engines import engine_of

_OPTIMIZATION = (
    *("optim", "optim_args", "optim_target_modules", "learning_rate", "weight_decay", "max_grad_norm"),
    *("adam_beta1", "adam_beta2", "adam_epsilon", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"),
)
_ENDLESS = ("constant", "constant_with_warmup", "inverse_sqrt", "reduce_lr_on_plateau")  # schedules that do not see the end


class WholeCheckpointTrainer(SFTTrainer):
    """``trl.SFTTrainer`` with sealed checkpoints (see ``checkpoint.py``) and a strict resume."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._resume_folder: Path | None = None
        self._data_hash: str | None = None
        self._student: dict[str, Any] | None = None
        self._keep: int | None = None
        super().__init__(*args, **kwargs)
        self.add_callback(_RestoreAccumulators(self))
        if isinstance(self.model, PeftModel):  # PEFT saves every adapter it holds; a checkpoint is the student's alone
            student = self.model.active_adapter
            self.model.save_pretrained = functools.partial(self.model.save_pretrained, selected_adapters=[student])

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """``SFTTrainer.train``; resumes only from a whole checkpoint of the same run.

        Raises:
            UserError: nothing to resume, a damaged checkpoint, another run's, or one without an optimizer.
        """
        output_dir = Path(self.args.output_dir)
        self._resume_folder = None
        if resume_from_checkpoint:
            self._resume_folder = self._resumable(output_dir, resume_from_checkpoint)
        if self.args.should_save:
            checkpoint.clear_remains(output_dir)
        self.accelerator.wait_for_everyone()
        # the Trainer would delete older checkpoints before the newer one is whole, and file by file
        self._keep, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            output = super().train(str(self._resume_folder) if self._resume_folder else None, *args, **kwargs)
        finally:
            self.args.save_total_limit = self._keep
        return output._replace(training_loss=output.metrics["train_loss"])

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The Trainer's log, with ``train_loss`` over all steps (after a resume the Trainer divides by the new ones)."""
        if "train_loss" in logs:
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 1)
        super().log(logs, start_time)

    def _resumable(self, output_dir: Path, wanted: str | bool) -> Path:
        """The checkpoint to resume from; its files are hashed once, which for a large student takes a while."""
        if wanted is True:
            newest = checkpoint.newest_whole(output_dir)
            if newest is None:
                raise UserError(f"{output_dir}: holds no whole checkpoint to resume from; train without resume_from_checkpoint")
            folder = newest
        else:
            folder = Path(str(wanted))
            problem = checkpoint.damage(folder)
            if problem:
                raise UserError(f"{folder}: cannot be resumed: {problem}")
        checkpoint.require_same_run(folder, self.run_facts())
        if not list(folder.glob(optimizer_files(self))):
            raise UserError(f"{folder}: has no {optimizer_files(self)} (save_only_model?), so the run cannot go on from it")
        return folder

    def run_facts(self) -> dict[str, Any]:
        """What must be the same for a resumed run to be the same run. JSON-able.

        All options of the optimizer and its schedule belong to it: the checkpoint's would win over new ones without a word.
        The end (``max_steps``, ``num_train_epochs``) may move only where the learning rate does not depend on it (constant,
        inverse_sqrt...), for there the longer run is the run that was begun. An optimizer object of the user's own is not seen.
        """
        args = self.args
        return {
            "trainer": type(self).__name__,
            "student": self._student_facts(),
            "engine": engine_of(self),
            "data": self._data_fingerprint(),
            "seed": [args.seed, args.data_seed],
            "batch": [args.per_device_train_batch_size, args.gradient_accumulation_steps, args.world_size],
            "end": _end(args),
        } | {name: getattr(args, name) for name in _OPTIMIZATION}

    def _student_facts(self) -> dict[str, Any]:
        """Read once: to hash a sharded base it is gathered, parameter by parameter."""
        if self._student is None:
            named = list(self.model.named_parameters())
            self._student = {
                "class": type(self.model).__name__.removeprefix("FSDP"),
                "parameters": sum(shape_of(parameter).numel() for _, parameter in named),
                # the base of an adapter; what is trained comes from the checkpoint
                "frozen": hash_tensors((name, parameter) for name, parameter in named if not parameter.requires_grad),
            }
        return self._student

    def _data_fingerprint(self) -> str | None:
        if isinstance(self.train_dataset, IterableDataset):
            return None
        if self._data_hash is None:
            self._data_hash = data_fingerprint(self.train_dataset)
        return self._data_hash

    def accumulators(self) -> dict[str, Any]:
        """What has been summed since the last log and is not in the Trainer's own state. JSON-able."""
        return {
            "tr_loss": self._tr_loss.item(),
            "total_loss_scalar": self._total_loss_scalar,
            "globalstep_last_logged": self._globalstep_last_logged,
        }

    def restore_accumulators(self, state: dict[str, Any]) -> None:
        """Go on from ``accumulators()``: the Trainer would begin a new window, and log other values than a straight run."""
        self._tr_loss = torch.tensor(state["tr_loss"], device=self.args.device)
        self._total_loss_scalar = state["total_loss_scalar"]
        self._globalstep_last_logged = state["globalstep_last_logged"]

    def _run_epoch(self, **arguments: Any) -> None:
        """The Trainer's epoch; a run that is resumed at its very end, where the Trainer takes one more step, has none left."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(**arguments)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save, seal, and only then remove older checkpoints."""
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        try:
            if self.args.should_save:
                checkpoint.begin(folder)
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            facts = self.run_facts()  # all ranks: sharded weights are gathered to be hashed
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                checkpoint.seal(folder, facts)
        except Exception as error:  # the libraries that write have no class in common for a full disk
            if _is_full_disk(error, folder.parent):
                raise UserError(
                    f"{folder}: the disk is full, so this checkpoint was not saved; earlier ones are whole. Free some space "
                    "and run again: it resumes from the newest whole checkpoint."
                ) from error
            raise
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            checkpoint.rotate(folder.parent, self._keep, {folder} | ({Path(best)} if best else set()))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        super()._save(output_dir, state_dict)
        # a pickle that nothing here reads
        (Path(output_dir or self.args.output_dir) / "training_args.bin").unlink(missing_ok=True)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_fsdp_enabled:
            save_fsdp_state(self, Path(output_dir))
        else:
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not load_stateless(self, Path(checkpoint)):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        with reading_safely(self):
            prepared = super()._prepare_for_training(*args, **kwargs)
        if self._resume_folder is not None:
            self._restore_further(self._resume_folder)
        return prepared

    def _restore_further(self, folder: Path) -> None:
        """What a checkpoint holds beside the student; its weights and the optimizer are restored."""

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        write_json(self._accumulators_file(Path(output_dir)), self.accumulators())

    def _accumulators_file(self, folder: Path) -> Path:
        return folder / f"daekit_state_{self.args.process_index}.json"

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        restore_weights(model or self.model, self._weights_folder(Path(resume_from_checkpoint)))

    def _load_best_model(self) -> None:
        restore_weights(self.model, self._weights_folder(Path(self.state.best_model_checkpoint)))

    def _weights_folder(self, folder: Path) -> Path:
        """Where PEFT saves the student: an adapter called ``default`` at the top, any other in a folder of its name."""
        name = self.model.active_adapter if isinstance(self.model, PeftModel) else "default"
        return folder if name == "default" else folder / name


class _RestoreAccumulators(TrainerCallback):
    """The one moment between the Trainer's reset of its sums and its first step."""

    def __init__(self, trainer: WholeCheckpointTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        trainer = self.trainer
        if trainer._resume_folder is not None:
            trainer.restore_accumulators(json.loads(trainer._accumulators_file(trainer._resume_folder).read_text()))


def _end(args: SFTConfig) -> dict[str, float] | None:
    """Where the run ends, if its learning rate depends on that; a ``warmup_steps`` below 1 is a share of the whole run."""
    if args.lr_scheduler_type in _ENDLESS and (args.lr_scheduler_type == "constant" or not 0 < args.warmup_steps < 1):
        return None
    name = "max_steps" if args.max_steps > 0 else "num_train_epochs"
    return {name: getattr(args, name)}


def _is_full_disk(error: Exception, folder: Path) -> bool:
    if says_disk_is_full(error):
        return True
    if not isinstance(error, RuntimeError):
        return False
    try:  # torch.save says "unexpected pos" or "iostream error", whatever the reason was
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(1 << 20))
    except OSError as refusal:
        return says_disk_is_full(refusal)
    return False
