"""What a trainer logs per domain: true token means over a logging window, and how many tokens have come by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from daekit.metrics import TokenMeans
from daekit.protocol import Batch
from daekit.trainers.validation import refuse_shared_stream

_OF_LABELS = ("ce", "mean_token_accuracy")


class TokenMetrics:
    """Sums of one trainer since its last log, apart for training and evaluation.

    Args:
        rows: Whether to keep means over rows beside those over tokens, as ``<metric>_rows``.
    """

    def __init__(self, rows: bool = False) -> None:
        self.rows = rows
        self._means = {"train": TokenMeans(), "eval": TokenMeans()}
        self._new_tokens = torch.zeros((), dtype=torch.long)

    def add(self, mode: str, batch: Batch, values: Mapping[str, Tensor], counted_R: list[bool]) -> None:
        """Add ``values``, metric -> ``[N]`` at each loss position, in ``mode`` (train or eval) for the rows that count.

        In rows that the student wrote the values of labels do not count, and the others have the name ``<metric>_on_policy``.
        """
        row_N = batch.row_N
        counted_N = torch.tensor(counted_R, device=row_N.device)[row_N]
        labelled_N = counted_N if batch.labelled_N is None else counted_N & batch.labelled_N
        for name in sorted(values):
            self._add(mode, name, values[name], labelled_N, batch)
            if batch.labelled_N is not None and name not in _OF_LABELS:
                self._add(mode, f"{name}_on_policy", values[name], counted_N & ~batch.labelled_N, batch)
        if mode == "train":
            real_BT = batch.row_BT >= 0
            if not all(counted_R):
                real_BT = real_BT & torch.tensor(counted_R, device=real_BT.device)[batch.row_BT.clamp(min=0)]
            self._new_tokens = self._new_tokens.to(real_BT.device) + real_BT.sum()

    def _add(self, mode: str, name: str, value_N: Tensor, wanted_N: Tensor, batch: Batch) -> None:
        value_N, row_N = value_N.detach()[wanted_N], batch.row_N[wanted_N]
        self._means[mode].add(name, value_N, row_N, batch.domains)
        if self.rows:
            means_R = torch.zeros(len(batch.domains), dtype=torch.float64, device=row_N.device)
            means_R.index_add_(0, row_N, value_N.double() * batch.row_share_N[wanted_N])
            here_R = row_N.unique()
            self._means[mode].add(f"{name}_rows", means_R[here_R], here_R, batch.domains)

    def pop(self, mode: str) -> dict[str, float]:
        """The means over all ranks, with ``tokens/<domain>``; then start anew. A collective call."""
        logs: dict[str, float] = {}
        for key, (mean, count) in self._means[mode].pop().items():
            logs[key] = mean
            if key.startswith("ce/"):
                logs[key.replace("ce/", "tokens/", 1)] = count
            elif (domain := key.partition("_on_policy/")[2]) and "_rows/" not in key:
                logs[f"tokens_on_policy/{domain}"] = count
        return logs

    def pop_tokens(self, accelerator: Accelerator) -> int:
        """Tokens that training has seen on all ranks since the last call. A collective call."""
        new = int(accelerator.reduce(self._new_tokens.to(accelerator.device)))
        self._new_tokens = torch.zeros((), dtype=torch.long)
        return new

    def state(self) -> dict[str, Any]:
        """What has been summed in training since the last log. JSON-able."""
        return {"means": self._means["train"].state(), "new_tokens": int(self._new_tokens)}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state()``."""
        self._means["train"].load(state["means"])
        self._new_tokens = torch.tensor(state["new_tokens"])


def counted_rows(trainer: Any, examples: tuple[int, ...], mode: str) -> list[bool]:
    """Which rows of a batch count: not those that ranks repeat to fill the last batch of a data set."""
    state = trainer.accelerator.gradient_state
    if mode == "train":
        return [example >= 0 for example in examples]
    if trainer.accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder == 0:
        return [True] * len(examples)
    if state.remainder < 0:  # its length is not known, or rows that do not fill a batch are left out
        refuse_shared_stream(trainer.args, mode)
        return [True] * len(examples)
    first = trainer.accelerator.process_index * trainer.args.per_device_eval_batch_size
    return [first + example < state.remainder for example in examples]
