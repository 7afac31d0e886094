"""SFTTrainer for rows that have a domain. With whole_checkpoint.py and student.py what leans on private names of TRL.

It changes three things and leaves the rest to TRL: the domain survives preparation, packing and collation; overlong rows are
counted instead of cut in silence; the loss is a sum over kept tokens inside the model's forward, divided once.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from datasets import Dataset, IterableDataset, concatenate_datasets, interleave_datasets
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from daekit.data.collator import EXAMPLES, DomainCollator, as_batch
from daekit.data.preparation import DomainCount, fit_stream_to_length, fit_to_length, require_domains, require_values
from daekit.errors import UserError
from daekit.losses import prediction_loss
from daekit.metrics import TokenMeans
from daekit.models.backbone import add_on_hidden, require_plain_head
from daekit.models.heads import output_head
from daekit.models.vocabulary import vocabulary_size
from daekit.protocol import Batch, Signal
from daekit.trainers.config import DomainSFTConfig
from daekit.trainers.engines import refuse_engine, require_wrapped, rounding
from daekit.trainers.refusals import refuse_arguments, refuse_expert_adapter, refuse_shared_stream
from daekit.trainers.student import load_student, name_of, tokenizer_of
from daekit.trainers.whole_checkpoint import WholeCheckpointTrainer

logger = logging.getLogger(__name__)
_WHOLE_ROWS = ("bfd", None)  # packing strategies that never split a row over two blocks; None: no packing
_DEFAULT_DOMAIN = "general"


class DomainSFTTrainer(WholeCheckpointTrainer):
    """Supervised fine-tuning with per-domain metrics: ``trl.SFTTrainer`` and its arguments.

    Rows may have a column ``domain``; without one they all are ``general``. Logged per domain as true token means over the
    logging window, in nats: ``ce/<domain>``, ``tokens/<domain>``, ``mean_token_accuracy/<domain>``; without suffix over all.

    Raises:
        UserError: a student without whole weights, vision data, ``compute_loss_func``, prompt-learning PEFT, FSDP1,
            context or sequence parallelism, overlong rows.
    """

    _tag_names = ["trl", "daekit", "sft"]
    _name = "domain SFT"
    loss_is_scaled_for_ga = True
    config_class: type[DomainSFTConfig] = DomainSFTConfig
    default_domain: str | None = _DEFAULT_DOMAIN

    def __init__(
        self,
        model: Any,
        args: DomainSFTConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        **sft_arguments: Any,  # of SFTTrainer, which refuses an unknown one
    ) -> None:
        args = args if args is not None else self.config_class(f"{name_of(model)}-{self._name.replace(' ', '-')}")
        if not isinstance(args, self.config_class):
            raise UserError(f"args: {type(self).__name__} needs a {self.config_class.__name__}, not a {type(args).__name__}")
        refuse_arguments(model, args, train_dataset, sft_arguments)
        init_kwargs = args.model_init_kwargs
        if isinstance(model, str):
            sft_arguments["processing_class"] = sft_arguments.get("processing_class") or tokenizer_of(model, args)
            model = load_student(model, args, sft_arguments.pop("quantization_config", None))
            args = copy.copy(args)
            args.model_init_kwargs = None  # used; SFTTrainer would say that they are not
        refuse_expert_adapter(model, sft_arguments.get("peft_config"))
        self.data_counts: dict[str, dict[str, DomainCount]] = {}
        super().__init__(model=model, args=args, train_dataset=train_dataset, **sft_arguments)
        self.args.model_init_kwargs = init_kwargs
        refuse_engine(self)
        self.data_collator = DomainCollator(self.data_collator)  # type: ignore[has-type]
        # so that the Trainer counts the kept tokens of the global batch, whatever loss the student's class declares
        self.model_accepts_loss_kwargs = self._loss_shifts_labels = True
        self.vocab_size = vocabulary_size(self.processing_class)
        add_on_hidden(self.model)
        require_plain_head(self.model, self.vocab_size)
        self.terms = args.terms()
        self._means = {"train": TokenMeans(), "eval": TokenMeans()}
        self._new_tokens = torch.zeros((), dtype=torch.long)

    # ---- data -----------------------------------------------------------------------------------------------------

    def _prepare_dataset(
        self,
        dataset: Dataset | IterableDataset,
        processing_class: PreTrainedTokenizerBase,
        args: DomainSFTConfig,
        packing: bool,
        formatting_func: Callable[[dict[str, Any]], str] | None,
        dataset_name: str,
    ) -> Dataset | IterableDataset:
        """TRL's preparation in two steps, tokenise then pack, with the length policy between and the domain kept."""
        if isinstance(dataset, IterableDataset) and dataset_name != "train":
            refuse_shared_stream(args, dataset_name)
        dataset = require_domains(dataset, dataset_name, self.default_domain)
        if "seq_lengths" in (dataset.column_names or ()):
            return dataset  # prepared and packed before: `evaluate` was given one of our own data sets
        if formatting_func is None:
            dataset = require_values(dataset, dataset_name, args.dataset_text_field)
        whole = copy.copy(args)
        whole.max_length, whole.shuffle_dataset = None, False
        dataset = super()._prepare_dataset(dataset, processing_class, whole, False, formatting_func, dataset_name)
        strategy = args.packing_strategy if packing else None
        limit = args.max_length if strategy in _WHOLE_ROWS else None
        if isinstance(dataset, IterableDataset):
            dataset = fit_stream_to_length(dataset, limit, args.overlong, dataset_name)
        else:
            dataset, self.data_counts[dataset_name] = fit_to_length(dataset, limit, args.overlong, dataset_name)
            self._log_counts(dataset_name)
        if packing:
            return self._pack_by_domain(dataset, processing_class, args, dataset_name)
        return dataset.shuffle(seed=args.seed) if args.shuffle_dataset else dataset

    def _pack_by_domain(
        self, dataset: Dataset | IterableDataset, processing_class: PreTrainedTokenizerBase, args: Any, name: str
    ) -> Dataset | IterableDataset:
        """Pack the rows of each domain by TRL's packing, so that a block has one domain."""
        streaming = isinstance(dataset, IterableDataset)
        domains = self._stream_domains() if streaming else list(dict.fromkeys(dataset["domain"]))
        if streaming:
            dataset = dataset.map(self._require_known_domain)
        packed = []
        for domain in domains:
            part = dataset.filter(lambda row, domain=domain: row["domain"] == domain)
            part = super()._prepare_dataset(part, processing_class, args, True, None, f"{name} ({domain})")
            packed.append(part.map(lambda row, domain=domain: {"domain": domain}))
        if streaming:
            return interleave_datasets(packed, stopping_strategy="all_exhausted_without_replacement")
        together = concatenate_datasets(packed)
        return together.shuffle(seed=args.seed) if args.shuffle_dataset else together

    def _stream_domains(self) -> list[str]:
        """The domains that a stream may hold, for they cannot be listed without reading it."""
        return [_DEFAULT_DOMAIN]

    def _require_known_domain(self, row: dict[str, Any]) -> dict[str, Any]:
        """Pass a row of a stream on, for packing by domain would leave out the rows of a domain that is not listed."""
        if row["domain"] not in self._stream_domains():
            raise UserError(
                f"a packed stream has a row of domain {row['domain']!r} but may hold only {', '.join(self._stream_domains())}: "
                "domains are packed apart, and a stream does not list its own. Use packing=False or a map-style Dataset."
            )
        return row

    def _log_counts(self, name: str) -> None:
        for domain, count in self.data_counts[name].items():
            lost = {what: n for what in ("truncated", "dropped", "emptied", "blank") if (n := getattr(count, what))}
            level = logging.WARNING if lost else logging.INFO
            logger.log(level, "%s, %s: %d rows, %d kept tokens %s", name, domain, count.rows, count.kept_tokens, lost or "")

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: list[str] = self._signature_columns  # type: ignore[has-type]
        self._signature_columns = list(dict.fromkeys([*columns, "domain"]))

    # ---- loss -----------------------------------------------------------------------------------------------------

    def teacher_signals(self, batch: Batch) -> list[Signal]:
        """What the teachers say about the batch; nobody, here."""
        return []

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The weighted sum over kept tokens, divided by the kept tokens of the global batch (all ranks, all micro-batches)."""
        batch = as_batch(inputs)
        with rounding(self.accelerator):  # the frozen models round as the student does
            signals = self.teacher_signals(batch)
        out = model(**self._forward_inputs(batch), on_hidden=lambda outputs: self._losses(outputs, batch, signals))
        self._measure(batch, out, inputs[EXAMPLES])
        items = batch.labels_N.numel() if num_items_in_batch is None else num_items_in_batch
        loss = out["loss"] / torch.as_tensor(items, device=out["loss"].device).clamp(min=1)
        if num_items_in_batch is not None:  # DDP averages over ranks what is to be summed
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        if "aux_loss" in out:  # a mean per micro-batch, as in TRL
            steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
            loss = loss + self.router_aux_loss_coef * out["aux_loss"] / steps
            aux_loss = self.accelerator.gather_for_metrics(out["aux_loss"].detach()).mean().item()
            self._metrics["train" if self.model.training else "eval"]["aux_loss"].append(aux_loss)
        if not return_outputs:
            return loss
        with torch.no_grad():  # compute_metrics wants logits, which the loss never makes
            return loss, model(**batch.inputs)

    def weights(self) -> dict[str, float]:
        """Metric -> its weight in the loss; the loss is their weighted sum."""
        return {"ce": self.terms.ce_weight, _metric_of(self.terms.divergence): self.terms.prediction_weight}

    def _forward_inputs(self, batch: Batch) -> dict[str, Any]:
        router = {"output_router_logits": True} if self.aux_loss_enabled else {}
        return batch.inputs | router

    def _losses(self, outputs: Any, batch: Batch, signals: list[Signal]) -> dict[str, Tensor]:
        """Runs inside the student's forward, where autocast and the hooks of DDP and FSDP hold."""
        head = output_head(self.model, self.vocab_size)
        sums = prediction_loss(batch.keep(outputs.last_hidden_state), head, batch.labels_N, signals, self.terms)
        out = {"loss": sums.loss, "ce": sums.ce_N, "mean_token_accuracy": sums.correct_N}
        if sums.divergence_N is not None:
            out[_metric_of(self.terms.divergence)] = sums.divergence_N
        if self.aux_loss_enabled:
            config = self.model.config.get_text_config()
            mask = batch.inputs.get("attention_mask")
            out["aux_loss"] = load_balancing_loss_func(
                outputs.router_logits, config.num_experts, config.num_experts_per_tok, mask
            )
        return out

    # ---- metrics --------------------------------------------------------------------------------------------------

    def _measure(self, batch: Batch, out: Mapping[str, Tensor], examples: tuple[int, ...]) -> None:
        mode = "train" if self.model.training else "eval"
        row_N = batch.row_N
        counted = torch.tensor(self._counted(examples, mode), device=row_N.device)[row_N]
        for name in out.keys() - {"loss", "aux_loss"}:
            self._means[mode].add(name, out[name].detach()[counted], row_N[counted], batch.domains)
        if mode == "train":
            self._new_tokens = self._new_tokens.to(batch.row_BT.device) + (batch.row_BT >= 0).sum()

    def _counted(self, examples: tuple[int, ...], mode: str) -> list[bool]:
        """Which rows count: not those that a distributed evaluation repeats to fill its last batch."""
        state = self.accelerator.gradient_state
        if mode == "train" or self.accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder == 0:
            return [True] * len(examples)
        if state.remainder < 0:  # its length is not known, or rows that do not fill a batch are left out
            refuse_shared_stream(self.args, mode)
            return [True] * len(examples)
        first = self.accelerator.process_index * self.args.per_device_eval_batch_size
        return [first + example < state.remainder for example in examples]

    def run_facts(self) -> dict[str, Any]:
        """See WholeCheckpointTrainer; the objective belongs to them."""
        return super().run_facts() | {"terms": vars(self.terms), "router_aux_loss_coef": self.router_aux_loss_coef}

    def accumulators(self) -> dict[str, Any]:
        """What has been summed since the last log; it goes into the checkpoint."""
        return super().accumulators() | {
            "means": self._means["train"].state(),
            "new_tokens": int(self._new_tokens),
            "total_train_tokens": self._total_train_tokens,
            "aux_loss": self._metrics["train"].get("aux_loss"),
        }

    def restore_accumulators(self, state: dict[str, Any]) -> None:
        """Go on from ``accumulators()``."""
        super().restore_accumulators(state)
        self._means["train"].load(state["means"])
        self._new_tokens = torch.tensor(state["new_tokens"])
        self._total_train_tokens = state["total_train_tokens"]
        if state["aux_loss"]:
            self._metrics["train"]["aux_loss"] = state["aux_loss"]

    def _pop_means(self, mode: str) -> dict[str, float]:
        logs: dict[str, float] = {}
        for key, (mean, count) in self._means[mode].pop().items():
            logs[key] = mean
            if key.startswith("ce/"):
                logs[key.replace("ce/", "tokens/", 1)] = count
        return logs

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means of the window since the last log. A collective call, as in TRL."""
        if self.model.training or "train_loss" in logs:  # the last log of a run may come after an evaluation
            logs.update(self._pop_means("train"))
            self._total_train_tokens += int(self.accelerator.reduce(self._new_tokens.to(self.accelerator.device)))
            self._new_tokens = torch.zeros((), dtype=torch.long)
            logs["num_tokens"] = self._total_train_tokens
        super().log(logs, start_time)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """The Trainer's loop; its loss (a mean of batch means) is replaced by the mean over the tokens of the whole set."""
        require_wrapped(self)
        self._means["eval"].pop()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        means = self._pop_means("eval")
        means["loss"] = sum(weight * means.get(name, 0.0) for name, weight in self.weights().items())
        output.metrics.update({f"{metric_key_prefix}_{key}": value for key, value in means.items()})
        return output


def _metric_of(divergence: str) -> str:
    """The name under which a divergence is logged: its own, and ``kl`` for the usual one."""
    return "kl" if divergence == "forward_kl" else divergence
