"""A teacher on another machine, behind a completions API that scores prompts (vLLM's ``prompt_logprobs``)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from daekit.errors import UserError
from daekit.generation.keys import Permissions
from daekit.generation.prompt_scores import Entry, ScoreClient, ScoreRequest
from daekit.models.teacher_view import last_response
from daekit.models.vocabulary import probe_text
from daekit.protocol import IGNORE_INDEX, Batch, FeatureSpec, TeacherOutput, TopK
from daekit.recipe.judge import JudgeSpec, url_problems
from daekit.recipe.objective import Objective
from daekit.teachers.cache.rows import CacheRow, rows_of_batch

_SLACK = 1e-3  # of a sum of probabilities: servers print float32 logarithms of models in 16 bits


class ServerTeacher:
    """Asks a server for the K most likely tokens at each loss position, the label among them.

    The log-mass of all others is 1 - their sum, which is rounding where they hold more than 1 - 1e-6. Each batch waits for the
    server: what is asked again in every epoch is better kept (``write_cache``).

    Args:
        base_url: such as ``http://localhost:8000/v1``.
        model: The name that the server knows the model by. A cache and a resumed run know the teacher by it, too.
        vocab_size: V, the number of ids of the student's tokenizer.
        k: K, at most the server's ``--max-logprobs``.
        api_key_env: Environment variable that holds the key.
        concurrency: Calls under way at a time; one call holds one row.
        max_retries: How often a call that failed in passing is sent again.
        timeout: Seconds for a whole call.
        allowed: which keys may be sent where.
        first_wait: Seconds before a failed call is first repeated; doubled each time.

    Raises:
        UserError: a URL or key that may not be used.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        vocab_size: int,
        k: int = 20,
        *,
        api_key_env: str | None = None,
        concurrency: int = 8,
        max_retries: int = 6,
        timeout: float = 120.0,
        allowed: Permissions = Permissions(),
        first_wait: float = 1.0,
    ) -> None:
        for problem in url_problems(base_url):
            raise UserError(f"base_url: {problem}")
        if k < 2:
            raise UserError(f"k: {k} leaves no room beside the label; ask for 2 tokens at least")
        limits = {"concurrency": concurrency, "max_retries": max_retries, "timeout": timeout}
        spec = JudgeSpec(base_url=base_url, model=model, api_key_env=api_key_env, **limits)
        self.served, self.vocab_size, self.k = model, int(vocab_size), min(k, int(vocab_size))
        self.client = ScoreClient(spec, f"teacher {model}", allowed, first_wait)
        self._where = f"teacher {model} at {spec.endpoint}"
        self._looked_at: int | None = None  # the longest response that it was asked about

    def outputs(self, batch: Batch, capture: FeatureSpec | None = None) -> list[TeacherOutput]:
        """One sparse output for all loss positions, on the device of the batch.

        Raises:
            UserError: no answer after ``max_retries``; an answer that holds no distributions over the row's tokens.
        """
        device = batch.labels_BT.device
        rows = [row for row in rows_of_batch(batch) if len(row.offsets)]
        positions_M = torch.arange(batch.labels_N.numel(), device=device)
        return [TeacherOutput(positions_M, (), top_k=self._ask(rows, device))]

    def _ask(self, rows: Sequence[CacheRow], device: torch.device) -> TopK:
        requests = [ScoreRequest(tuple(row.input_ids.tolist()), self.k) for row in rows]
        named = [
            self._named(scores.entries[at], int(row.input_ids[at]), f"token {at} of a row ({row})")
            for row, scores in zip(rows, self.client.ask(requests), strict=True)
            for at in (row.offsets + 1).tolist()
        ]
        pairs_MK2 = torch.tensor(named, dtype=torch.float64).reshape(-1, self.k, 2)  # also of no row
        ids_MK, exact_MK = pairs_MK2[..., 0].long().to(device), pairs_MK2[..., 1].contiguous()
        if self.k == self.vocab_size:
            return TopK(ids_MK, exact_MK.log_softmax(-1).float().to(device), 1.0)
        tail_M = (-torch.expm1(exact_MK.logsumexp(-1))).clamp(min=torch.finfo(torch.float32).tiny).log()
        return TopK(ids_MK, exact_MK.float().to(device), 1.0, tail_M.float().to(device))

    def _named(self, entry: Entry | None, label: int, where: str) -> list[tuple[int, float]]:
        """The K tokens of one position, by id: the label and the most likely others.

        Raises:
            UserError: it does not name the label, names fewer tokens, or names no distribution.
        """
        try:
            named = {int(token): float(about["logprob"]) for token, about in (entry or {}).items()}
        except (TypeError, ValueError, KeyError):
            named = {label: math.nan}
        if label not in named:
            raise UserError(
                f"{self._where}: what it says of {where} does not hold that token itself ({label}): its scores are shifted, or "
                "it has other tokens. The server must score prompts as vLLM does (prompt_logprobs), by the student's tokenizer."
            )
        if not all(map(math.isfinite, named.values())):
            raise UserError(f"{self._where}: its log-probabilities of {where} are not finite (NaN in the model it serves?)")
        mass = math.fsum(map(math.exp, named.values())) if max(named.values()) < 1 else math.inf
        if mass > 1 + _SLACK or max(named) >= self.vocab_size:
            raise UserError(
                f"{self._where}: the {len(named)} probabilities of {where} sum to {mass:.6g}, token ids reach {max(named)} of "
                f"{self.vocab_size}: no distribution over the student's tokens. Serve a model with that tokenizer, and with "
                "--logprobs-mode raw_logprobs."
            )
        if len(named) < self.k:
            raise UserError(
                f"{self._where}: names {len(named)} tokens for {where}, and k is {self.k}. Start the server with a larger "
                "--max-logprobs, or ask for fewer."
            )
        likeliest = sorted(named, key=lambda token: (token != label, -named[token], token))[: self.k]
        return [(token, named[token]) for token in sorted(likeliest)]

    def require_served(self, objective: Objective, tokenizer: PreTrainedTokenizerBase, rows: Iterable[CacheRow]) -> None:
        """Refuse what it does not serve, then ask it once about a text, the longest row, and what is longest of what the
        student may write (``on_policy``).

        Raises:
            UserError: features of layers, another temperature than 1; another tokenizer; and see ``outputs``.
        """
        if objective.attention_weight or objective.hidden_weight:
            raise UserError(
                "attention_weight, hidden_weight: a server sends distributions, not what its layers did. Set both to 0."
            )
        if objective.prediction_weight and objective.temperature != 1.0:
            raise UserError(
                f"temperature: the loss has {objective.temperature}, and {self._where} sends log-probabilities at 1, whose "
                "tail cannot be tempered. Use 1."
            )
        new = objective.max_new_tokens if objective.on_policy else 0
        if self._looked_at is not None and new <= self._looked_at:
            return
        self._require_tokenizer(tokenizer)
        longest, prompt = None, np.zeros(0, np.int32)
        for row in rows:
            if len(row.offsets):
                longest = row if longest is None else max(longest, row, key=lambda each: len(each.input_ids))
                prompt = max(prompt, _prompt(row), key=len) if new else prompt
        if longest is None:
            return
        self._ask([longest], torch.device("cpu"))
        if new:  # and the longest that the student may write
            written = np.append(prompt, np.repeat(prompt[-1:], new))
            self._ask([CacheRow(written, np.array([len(prompt) - 1]))], torch.device("cpu"))
        self._looked_at = new

    def _require_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        text = probe_text(tokenizer)
        ours = tokenizer(text)["input_ids"]
        (scores,) = self.client.ask([ScoreRequest(text, 0)])
        theirs = scores.token_ids or [ours[0], *(int(next(iter(each))) for each in scores.entries[1:] if each)]
        if theirs != ours:
            at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
            raise UserError(
                f"{self._where}: its tokenizer is not the student's: a text that is {len(ours)} tokens here is {len(theirs)} "
                f"there, first different at token {at} ({ours[at : at + 3]} here, {list(theirs[at : at + 3])} there). Serve a "
                "model that shares the student's tokenizer."
            )

    def to(self, device: torch.device) -> ServerTeacher:
        """Nothing to move: outputs are on the device of the batch."""
        return self

    def identity(self) -> dict[str, object]:
        """The name that it is served by, and K: where the server runs does not matter."""
        return {"kind": "server", "model": self.served, "k": self.k}


def _prompt(row: CacheRow) -> np.ndarray:
    """What comes before the last stretch of tokens that carry loss, in whose place the student writes; int32 ``[tokens]``."""
    labels = np.full_like(row.input_ids, IGNORE_INDEX)
    labels[row.offsets + 1] = row.input_ids[row.offsets + 1]
    return row.input_ids[: last_response(labels)]
