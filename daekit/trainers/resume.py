"""Resuming: which run a checkpoint belongs to, and what makes a resumed run the straight run, to the bit."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft import PeftModel
from transformers import TrainerCallback
from trl import SFTConfig

from daekit.data.fingerprint import data_fingerprint
from daekit.errors import UserError, says_disk_is_full
from daekit.files import write_json
from daekit.models.identity import hash_tensors
from daekit.models.sharded import shape_of
from daekit.models.split_loading import waits
from daekit.trainers import checkpoint
from daekit.trainers.distributed_state import optimizer_files
from daekit.trainers.machines import by_main, require_same, require_shared
from daekit.trainers.ranks import keep_global_batch, order_facts, ranks_of, read_states, restart_random_numbers, states_file

_OPTIMIZATION = (
    *("optim", "optim_args", "optim_target_modules", "learning_rate", "weight_decay", "max_grad_norm"),
    *("adam_beta1", "adam_beta2", "adam_epsilon", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"),
)
_ADAPTER = (
    *("peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "target_modules", "exclude_modules"),
    *("target_parameters", "modules_to_save", "layers_to_transform", "rank_pattern", "alpha_pattern", "bias"),
)
_ENDLESS = ("constant", "constant_with_warmup", "inverse_sqrt", "reduce_lr_on_plateau")  # schedules that do not see the end
_SUMS = ("total_loss_scalar", "globalstep_last_logged", "total_train_tokens")  # of the Trainer, as private attributes
_STREAM_ROWS = 64  # of a stream, to tell it from another one


class Checkpoints(TrainerCallback):
    """Saves and resumes one trainer; what lies on disk is the business of ``checkpoint.py``.

    Attributes:
        resumed: the checkpoint that the training resumes from; None: it begins anew.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.resumed: Path | None = None
        self._start = 0

    @contextmanager
    def training(self, resume: str | bool | None) -> Iterator[str | None]:
        """Run a training; yields the checkpoint to resume from. See ``KDTrainer.train`` for what is refused."""
        trainer, args = self.trainer, self.trainer.args
        output_dir = Path(args.output_dir)
        require_shared(output_dir)
        self.resumed = self._resumable(output_dir, resume) if resume else None
        if not waits(trainer.model):  # else once it is read
            self.compare_facts()
        if args.should_save:
            checkpoint.clear_partial(output_dir)
            self._start = checkpoint.start_of(self.resumed, output_dir)
        trainer.accelerator.wait_for_everyone()
        # the Trainer would delete older checkpoints before the newer one is committed, and file by file
        self._keep, args.save_total_limit = args.save_total_limit, None
        try:
            yield str(self.resumed) if self.resumed else None
        finally:
            args.save_total_limit = self._keep

    def _resumable(self, output_dir: Path, wanted: str | bool) -> Path:
        """The checkpoint to resume from; the main process hashes its files, which for a large student takes a while."""
        folder = by_main(lambda: self._whole(output_dir, wanted))
        keep_global_batch(self.trainer, folder, checkpoint.facts_of(folder)["batch"])
        needed = optimizer_files(self.trainer)
        if not list(folder.glob(needed)):
            raise UserError(f"{folder}: has no {needed} (save_only_model?), so the run cannot go on from it")
        return folder

    def compare_facts(self) -> None:
        """With those of the other machines and of the checkpoint: when the student's weights are read, before the latter's."""
        require_same(self.facts)
        if self.resumed is not None:
            checkpoint.require_same_run(self.resumed, self.facts())

    def _whole(self, output_dir: Path, wanted: str | bool) -> Path:
        folder = checkpoint.newest(output_dir) if wanted is True else Path(str(wanted))
        if folder is None:
            raise UserError(f"{output_dir}: holds no checkpoint to resume from; train without resume_from_checkpoint")
        if wanted is not True and (problem := checkpoint.corruption(folder)):  # the newest was looked at already
            raise UserError(f"{folder}: cannot be resumed: {problem}")
        return folder

    def save(self, folder: Path, write: Callable[[], None]) -> None:
        """Save by ``write``, the Trainer's own way, commit, then remove older ones; UserError where the disk is full."""
        trainer = self.trainer
        try:
            if trainer.args.should_save:
                checkpoint.begin(folder)
            trainer.accelerator.wait_for_everyone()
            write()
            facts = self.facts()  # all ranks: sharded weights are gathered to be hashed
            trainer.accelerator.wait_for_everyone()
            if trainer.args.should_save:
                checkpoint.commit(folder, facts, self._start)
        except Exception as error:  # the libraries that write have no class in common for a full disk
            if _is_full_disk(error, folder.parent):
                raise UserError(
                    f"{folder}: the disk is full, so this checkpoint was not saved; earlier ones are whole. Free some space "
                    "and run again: it resumes from the newest committed checkpoint."
                ) from error
            raise
        if trainer.args.should_save:
            best = trainer.state.best_model_checkpoint
            checkpoint.rotate(folder.parent, self._keep, {folder} | ({Path(best)} if best else set()))

    # ---- which run it is ------------------------------------------------------------------------------------------

    def facts(self) -> dict[str, Any]:
        """What must be the same for a resumed run to be the same run. JSON-able.

        All options of the optimizer and its schedule belong to it: the checkpoint's would win over new ones without a word.
        The end (``max_steps``, ``num_train_epochs``) may move only where the learning rate does not depend on it (constant,
        inverse_sqrt...), for there the longer run is the run that was begun. An optimizer object of the user's own is not seen.
        """
        trainer, args = self.trainer, self.trainer.args
        facts = {
            "trainer": type(trainer).__name__,
            "student": self._student,
            "zero_stage": trainer.accelerator.state.deepspeed_plugin.zero_stage if trainer.is_deepspeed_enabled else None,
            "data": self._data,
            "seed": [args.seed, args.data_seed],
            "end": _end(args, sees_end=bool(trainer.loss_objective.on_policy)),  # the last buffer ends there
            "bf16": bool(args.bf16),
            "router_aux_loss_coef": trainer.router_aux_loss_coef,
        }
        facts |= order_facts(trainer) | {name: getattr(args, name) for name in _OPTIMIZATION}
        facts |= {f"objective.{name}": value for name, value in trainer.loss_objective.model_dump().items()}
        if isinstance(trainer.model, PeftModel):  # what changes what the adapter computes or how it learns
            config = trainer.model.peft_config[trainer.model.active_adapter]
            values = {name: getattr(config, name, None) for name in _ADAPTER}
            facts |= {f"adapter.{name}": sorted(v) if isinstance(v, set | frozenset) else v for name, v in values.items()}
        return facts | ({} if trainer.teacher is None else {"teacher": trainer.teacher.identity()})

    @cached_property
    def _student(self) -> dict[str, Any]:
        """Read once: to hash a sharded base it is gathered, parameter by parameter."""
        model = self.trainer.model
        named = list(model.named_parameters())
        return {
            "class": type(model).__name__.removeprefix("FSDP"),
            "parameters": sum(shape_of(parameter).numel() for _, parameter in named),
            "dtypes": sorted({str(parameter.dtype) for _, parameter in named if parameter.requires_grad}),
            # the base of an adapter; what is trained comes from the checkpoint
            "frozen": hash_tensors((name, parameter) for name, parameter in named if not parameter.requires_grad),
        }

    @cached_property
    def _data(self) -> str:
        """A hash of all rows; of a stream, which has no end that is known, of the first ones."""
        rows = self.trainer.train_dataset
        if isinstance(rows, IterableDataset):
            rows = Dataset.from_list(list(itertools.islice(rows, _STREAM_ROWS)))
        return data_fingerprint(rows)

    # ---- the window since the last log ----------------------------------------------------------------------------

    def save_accumulators(self, folder: Path) -> None:
        """Write what has been summed since the last log and is not in the Trainer's own state; each rank its own."""
        trainer = self.trainer
        sums = {name: getattr(trainer, f"_{name}") for name in _SUMS} | {"tr_loss": trainer._tr_loss.item()}
        sums |= {"aux_loss": trainer._metrics["train"].get("aux_loss")}
        sums |= {"rollouts": trainer.rollouts and trainer.rollouts.state()}
        write_json(states_file(folder, trainer.args.process_index), trainer.token_metrics.state() | sums)

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Go on from there, at the one moment between the Trainer's reset of its sums and its first step.

        It would begin a new window, and log other values than a straight run.
        """
        trainer = self.trainer
        if self.resumed is None:
            return
        state = read_states(self.resumed, trainer.args.process_index, trainer.args.world_size)
        trainer.token_metrics.load(state)
        trainer._tr_loss = torch.tensor(state["tr_loss"], device=trainer.args.device)
        for name in _SUMS:
            setattr(trainer, f"_{name}", state[name])
        if trainer.rollouts is not None:
            trainer.rollouts.load(state["rollouts"])
        if state["aux_loss"]:
            trainer._metrics["train"]["aux_loss"] = state["aux_loss"]

    def restarts_random_numbers(self) -> bool:
        """Whether the random states of the checkpoint are of other ranks; then those of now have been begun anew."""
        args = self.trainer.args
        if self.resumed is None or ranks_of(self.resumed) == args.world_size:
            return False
        restart_random_numbers(args, self.trainer.state.global_step)
        return True


def student_folder(model: Any, folder: Path) -> Path:
    """Where PEFT saves the student: an adapter called ``default`` at the top, any other in a folder of its name."""
    name = model.active_adapter if isinstance(model, PeftModel) else "default"
    return folder if name == "default" else folder / name


def _end(args: SFTConfig, sees_end: bool) -> dict[str, float] | None:
    """Where the run ends, if it depends on that; a ``warmup_steps`` below 1 is a share of the whole run."""
    endless = args.lr_scheduler_type in _ENDLESS and (args.lr_scheduler_type == "constant" or not 0 < args.warmup_steps < 1)
    if endless and not sees_end:
        return None
    name = "max_steps" if args.max_steps > 0 else "num_train_epochs"
    return {name: getattr(args, name)}


def _is_full_disk(error: Exception, folder: Path) -> bool:
    if isinstance(error, RuntimeError) and not says_disk_is_full(error):
        try:  # torch.save says "unexpected pos" or "iostream error", whatever the reason was
            with tempfile.TemporaryFile(dir=folder) as probe:
                probe.write(bytes(1 << 20))
        except OSError as refusal:
            return says_disk_is_full(refusal)
    return says_disk_is_full(error)
