"""Knowledge distillation: SFTTrainer plus a teacher. The overrides of TRL's private methods are in this file.

``KDTrainer`` is one class on top of ``trl.SFTTrainer``; what it does beside the loss lies in objects that it holds: rows
(``data.py``), per-domain metrics (``token_metrics.py``), checkpoints and resume (``resume.py``), features (``features.py``).
The loss itself is explained step by step in ``daekit/losses/__init__.py``.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTTrainer

from daekit.data.collator import EXAMPLES, DomainCollator, as_batch
from daekit.data.responses import require_markers
from daekit.models.backbone import add_on_hidden, base_of
from daekit.models.hardware import require_gradient
from daekit.models.restore import restore_weights
from daekit.models.teacher_view import TEACHER_PROMPT_IDS
from daekit.models.vocabulary import known_ids, vocabulary_size
from daekit.protocol import Teacher
from daekit.teachers.parts import frozen_models, require_on_student
from daekit.trainers import given
from daekit.trainers.compiled import compile_layers
from daekit.trainers.config import DomainSFTConfig, KDConfig
from daekit.trainers.data import RowPreparation
from daekit.trainers.distributed import reads_parts, require_distribution, require_wrapped, rounding
from daekit.trainers.distributed_state import load_foreign_optimizer, reading_safely, save_fsdp_state
from daekit.trainers.features import FeatureLosses, Projections, forget_projections, without_projections
from daekit.trainers.loss import (
    counted,
    divergence_metric,
    divided,
    keeping_router_settings,
    require_balancing_loss,
    router_inputs,
    summed_losses,
    teacher_outputs,
)
from daekit.trainers.ranks import drawn
from daekit.trainers.resume import Checkpoints, student_folder
from daekit.trainers.rollouts import Rollouts
from daekit.trainers.selection import METRIC, Select, score
from daekit.trainers.token_metrics import TokenMetrics, counted_rows
from daekit.trainers.validation import refuse_adapter, refuse_arguments

DEFAULT_DOMAIN = "general"


class KDTrainer(SFTTrainer):
    """``trl.SFTTrainer`` whose student follows a teacher's next-token distribution.

    ``loss = (ce_weight * CE + prediction_weight * T^2 * D(teacher, student)) / loss tokens of the global batch`` (nats), and
    attention and hidden-state losses where they have a weight (see ``KDConfig``).
    Rows may have a column ``domain``; without one they all are ``general``; of rows with a column ``teacher_prompt`` the
    teacher sees that in place of the prompt. Logged per domain as true token means over the
    logging window, in nats: ``ce/<domain>``, ``tokens/<domain>``, ``mean_token_accuracy/<domain>``, ``kl/<domain>`` with its
    T^2 (or ``reverse_kl``, ``jsd``...); without suffix over all domains.

    Args:
        model: the student, as for SFTTrainer: a hub id, a directory, a model or a PEFT model.
        teacher: a directory or hub id (its tokenizer is compared before its weights are loaded), a model (compared if its
            tokenizer lies where it was loaded from), an ``AdapterPath`` or ``BASE`` (adapters of a LoRA student's own base,
            which is then loaded once), or any Teacher. None: the labels alone (``DomainSFTTrainer``).
        args: a KDConfig.
        train_dataset: rows in any of TRL's forms.
        processing_class: the tokenizer; default: the student's own.
        sft_arguments: further arguments of SFTTrainer (``eval_dataset``, ``peft_config``, ``callbacks``...).

    Raises:
        UserError: a teacher with another tokenizer, a student without whole weights, vision data, ``compute_loss_func``,
            prompt-learning PEFT, FSDP1, context or sequence parallelism, overlong rows.
    """

    _tag_names = ["trl", "daekit", "kd"]
    _name = "KD"
    loss_is_scaled_for_ga = True
    config_class: type[DomainSFTConfig] = KDConfig
    default_domain: str | None = DEFAULT_DOMAIN
    _domains: list[str] = [DEFAULT_DOMAIN]  # that a packed stream may hold: they cannot be listed without reading it

    def __init__(
        self,
        model: Any,
        teacher: str | PreTrainedModel | Teacher | None,
        args: DomainSFTConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        **sft_arguments: Any,  # of SFTTrainer, which refuses an unknown one
    ) -> None:
        # First what arguments, tokenizers and configs show to be wrong; then weights: the teacher's, the student's.
        args = given.arguments_of(type(self), args, model)
        refuse_arguments(model, teacher, args, train_dataset, sft_arguments)
        self.loss_objective = args.objective()
        tokenizer = processing_class or given.tokenizer_of(model, args)
        if args.assistant_only_loss and args.chat_template_path is None:
            require_markers(tokenizer)
        if teacher is not None:
            teacher = given.as_teacher(teacher, tokenizer, model, isinstance(teacher, str | Path) and reads_parts(args))
            spec = given.spec_of(model, args) if isinstance(model, str) else None
            require_on_student(teacher, isinstance(model, PeftModel) or sft_arguments.get("peft_config") is not None, spec)
        size, init_kwargs = vocabulary_size(tokenizer), args.model_init_kwargs
        if isinstance(model, str):
            split = reads_parts(args, student=True, adapter=sft_arguments.get("peft_config"))
            model = given.load_student(model, args, sft_arguments.pop("quantization_config", None), split)
            args = copy.copy(args)
            args.model_init_kwargs = None  # used; SFTTrainer would say that they are not
        refuse_adapter(model, sft_arguments.get("peft_config"))
        forget_projections(model)
        # Now TRL: it prepares the rows and puts the adapter on the student.
        frozen = [] if teacher is None else [each for _, each in frozen_models(teacher)]
        self.rows = RowPreparation(self.default_domain, self._domains, known_ids([model, *frozen]))
        self.data_counts = self.rows.counts  # data set -> domain -> what preparation did to its rows
        self.checkpoints = Checkpoints(self)
        with keeping_router_settings(model):
            super().__init__(model=model, args=args, train_dataset=train_dataset, processing_class=tokenizer, **sft_arguments)
        self.args.model_init_kwargs = init_kwargs
        # Last what only the student as it will be trained can show, and the teacher beside it.
        self.token_metrics = TokenMetrics(rows=self.loss_objective.normalize == "rows")
        self._captures: ExitStack | None = None  # of the step that runs now
        self._complete_student()
        self.teacher: Any = None if teacher is None else given.completed_teacher(self, teacher, size)
        self.features = FeatureLosses.of(self)
        self.rollouts = Rollouts(self) if self.loss_objective.on_policy else None
        self.selection = args.selection()
        if self.selection is not None:
            self.selection.require_domains(self.data_counts.get("eval", {}))
            self.add_callback(Select(self.selection, divergence_metric(self.loss_objective)))
        if args.torch_compile:
            compile_layers(self)

    def _complete_student(self) -> None:
        """Add what the loss needs, undo what TRL has set, and try the student on a few tokens."""
        self.add_callback(self.checkpoints)
        if isinstance(self.model, PeftModel):  # PEFT saves every adapter it holds; a checkpoint is the student's alone
            student = self.model.active_adapter
            self.model.save_pretrained = functools.partial(self.model.save_pretrained, selected_adapters=[student])
        require_distribution(self)
        attention = base_of(self.model).config.get_text_config()._attn_implementation
        require_gradient(attention, self.accelerator.device, given.name_of(self.model))
        self.data_collator = DomainCollator(self.data_collator)  # type: ignore[has-type]
        # so that the Trainer counts the loss tokens of the global batch, whatever loss the student's class declares
        self.model_accepts_loss_kwargs = self._loss_shifts_labels = True
        self.vocab_size = vocabulary_size(self.processing_class)
        add_on_hidden(self.model)
        given.look_at_student(self)
        require_balancing_loss(self)

    @property
    def _projections(self) -> Projections | None:
        return None if self.features is None else self.features.projections

    # ---- rows -----------------------------------------------------------------------------------------------------

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """TRL's card; of a student without a name on the hub it would say that it is a fine-tuned version of None."""
        super().create_model_card(*args, **kwargs)
        card = Path(self.args.output_dir) / "README.md"
        if self.is_world_process_zero() and card.is_file():
            nameless = "is a fine-tuned version of [None](https://huggingface.co/None)"
            card.write_text(card.read_text().replace(nameless, f"is a student trained by daekit ({self._name})"))

    def _prepare_dataset(self, dataset: Any, *arguments: Any, **named: Any) -> Any:
        return self.rows.prepare(super()._prepare_dataset, dataset, *arguments, **named)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: list[str] = self._signature_columns  # type: ignore[has-type]
        self._signature_columns = list(dict.fromkeys([*columns, "domain", TEACHER_PROMPT_IDS]))

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """The micro-batches of the next step, and what their loss is divided by; see ``ranks.py`` and ``rollouts.py``."""
        if self.rollouts is None:
            batches = drawn(self, epoch_iterator, num_batches)
        else:
            batches = self.rollouts.batches(epoch_iterator, num_batches)
        return batches, self._get_num_items_in_batch(batches, device)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor | int | None:
        if self.loss_objective.normalize == "tokens":
            return super()._get_num_items_in_batch(batch_samples, device)
        rows = torch.tensor(sum(counted(self.loss_objective, as_batch(inputs)) for inputs in batch_samples), device=device)
        return self.accelerator.gather(rows).sum()

    # ---- loss -----------------------------------------------------------------------------------------------------

    @contextmanager
    def until_backward(self) -> Iterator[None]:
        """Inside, what captures the student's features stays: the backward pass runs checkpointed layers once more."""
        with ExitStack() as self._captures:
            try:
                yield
            finally:
                self._captures = None

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """The Trainer's step."""
        with self.until_backward():
            return super().training_step(*args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The weighted sum over loss tokens, divided by the loss tokens of the global batch (all ranks, all micro-batches)."""
        if self._captures is None:  # an evaluation: no backward pass follows
            with self.until_backward():
                return KDTrainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)
        batch = as_batch(inputs)
        with rounding(self.accelerator):  # the frozen models round as the student does
            outputs = teacher_outputs(self, batch)
        compared = None if self.features is None else self._captures.enter_context(self.features.compare(batch, outputs))
        losses = functools.partial(summed_losses, self, batch=batch, teacher_outputs=outputs, comparison=compared)
        out = model(**batch.inputs, **router_inputs(self), on_hidden=losses)
        loss = divided(self, out, batch, num_items_in_batch)
        mode = "train" if self.model.training else "eval"
        values = {name: value for name, value in out.items() if name not in ("loss", "aux_loss")}
        self.token_metrics.add(mode, batch, values, counted_rows(self, inputs[EXAMPLES], mode))
        if not return_outputs:
            return loss
        with torch.no_grad():  # compute_metrics wants logits, which the loss never makes
            return loss, model(**batch.inputs)

    def weights(self) -> dict[str, float]:
        """Metric -> its weight in the loss; the loss is their weighted sum."""
        objective = self.loss_objective
        weights = {"ce": objective.ce_weight, divergence_metric(objective): objective.prediction_weight}
        return weights | (self.features.weights if self.features is not None else {})

    # ---- metrics --------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means of the window since the last log. A collective call, as in TRL."""
        if self.model.training or "train_loss" in logs:  # the last log of a run may come after an evaluation
            logs.update(self.token_metrics.pop("train"))
            if self.rollouts is not None:
                logs.update(self.rollouts.pop_metrics())
            self._total_train_tokens += self.token_metrics.pop_tokens(self.accelerator)
            logs["num_tokens"] = self._total_train_tokens
        if "train_loss" in logs:  # over all steps; after a resume the Trainer divides by the new ones
            # what was not logged before the end is this rank's own
            total = torch.tensor(self._total_loss_scalar, dtype=torch.float64, device=self.args.device)
            logs["train_loss"] = self.accelerator.gather(total).mean().item() / max(self.state.global_step, 1)
        super().log(logs, start_time)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """The Trainer's loop; its loss (a mean of batch means) is replaced by the mean over the tokens of the whole set."""
        require_wrapped(self)
        self.token_metrics.pop("eval")
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        means = self.token_metrics.pop("eval")
        unit = "_rows" if self.loss_objective.normalize == "rows" else ""
        means["loss"] = sum(weight * means.get(f"{name}{unit}", 0.0) for name, weight in self.weights().items())
        if self.selection is not None and metric_key_prefix == "eval":
            means[METRIC] = score(self.selection, means, divergence_metric(self.loss_objective))
        output.metrics.update({f"{metric_key_prefix}_{key}": value for key, value in means.items()})
        return output

    # ---- checkpoints ----------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """``SFTTrainer.train``; resumes only from a committed checkpoint of the same run.

        Raises:
            UserError: nothing to resume, a corrupt checkpoint, another run's, or one without an optimizer; a student of which
                nothing is trained.
        """
        given.require_trained(self.model)
        with self.checkpoints.training(resume_from_checkpoint) as folder:
            output = super().train(folder, *args, **kwargs)
        return output._replace(training_loss=output.metrics["train_loss"])

    def _run_epoch(self, **arguments: Any) -> None:
        """The Trainer's epoch; a run that is resumed at its very end, where the Trainer takes one more step, has none left."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(**arguments)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        self.checkpoints.save(folder, functools.partial(super()._save_checkpoint, model, trial))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        super()._save(output_dir, None if state_dict is None else without_projections(state_dict))
        folder = Path(output_dir or self.args.output_dir)
        (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle that nothing here reads
        if self._projections is not None:
            self._projections.save(folder, self.args.should_save)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_fsdp_enabled:
            save_fsdp_state(self, Path(output_dir))
        else:
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not load_foreign_optimizer(self, Path(checkpoint)):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.checkpoints.save_accumulators(Path(output_dir))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if not self.checkpoints.restarts_random_numbers():
            super()._load_rng_state(checkpoint)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        given.make_room(self)
        with reading_safely(self):
            prepared = super()._prepare_for_training(*args, **kwargs)
        given.read_student(self)
        if self.checkpoints.resumed is not None and self._projections is not None:
            self._projections.load(self.checkpoints.resumed)
        return prepared

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        given.read_student(self)  # the base of an adapter is not in a checkpoint
        restore_weights(model or self.model, student_folder(self.model, Path(resume_from_checkpoint)))

    def _load_best_model(self) -> None:
        best = Path(self.state.best_model_checkpoint)
        restore_weights(self.model, student_folder(self.model, best))
        if self._projections is not None:
            self._projections.load(best)
