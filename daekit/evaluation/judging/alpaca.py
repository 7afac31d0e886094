"""AlpacaEval: judged through alpaca_eval's own annotators and metrics."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from daekit.errors import UserError
from daekit.evaluation.intervals import RowValues
from daekit.evaluation.judging import annotators
from daekit.evaluation.judging.annotators import OFFICIAL_ANNOTATOR, OFFICIAL_COUNT, Annotator, Messages, Outputs, Unreadable
from daekit.evaluation.judging.result import Answers, Judged, JudgedBenchmark, Missing, not_comparable, own_parameters
from daekit.files import facts_hash, file_hash, write_whole
from daekit.generation.calls import ChatReply, ChatRequest
from daekit.generation.client import ChatClient
from daekit.recipe.judge import JudgeSpec
from daekit.report.contents import Row


class AlpacaEval(JudgedBenchmark):
    """AlpacaEval; answers are ``{"instruction", "output"}`` of every instruction.

    Args:
        reference_outputs: a JSON list of ``{"instruction", "output", "generator"}``; its order is the order of everything.
        annotator: one of alpaca_eval's evaluator configs, or a directory that holds one (``configs.yaml`` and a template).
        limit: how many instructions, from the first on.
        where: begins an error about the annotator.

    Raises:
        UserError: no such annotator; reference outputs that are none.
    """

    name = "alpaca_eval"

    def __init__(self, reference_outputs: Path, annotator: str, limit: int | None = None, where: str = "annotator") -> None:
        self.annotator = annotators.read_annotator(annotator, where)
        self.reference, self.path = _read_reference(reference_outputs)[:limit], reference_outputs

    def invented(self, model: str, text: str) -> Outputs:
        """An output for every instruction."""
        return [{**row, "output": text} for row in self.reference]

    def requests(self, judge: JudgeSpec, answers: Answers) -> list[ChatRequest]:
        """One for every output that is not the reference's own."""
        return [request for model, its in answers.items() for request in self._requests(judge, self._aligned(model, its))]

    def judge(
        self, client: ChatClient, answers: Answers, folder: Path, *, allow_missing: int = 0, bootstrap: int = 1000
    ) -> Judged:
        """See ``JudgedBenchmark``. Written: ``<model>/<annotator>/annotations.json`` and ``leaderboard.csv``, and
        ``<model>/model_outputs.json``."""
        annotator = self.annotator
        aligned = {model: self._aligned(model, its) for model, its in answers.items()}
        requests = {model: self._requests(client.spec, its) for model, its in aligned.items()}
        everything = [request for its in requests.values() for request in its]
        client.ask(everything)
        scores: dict[str, list[Row]] = {}
        missing: dict[str, Missing] = {}
        verdicts: list[dict[str, Any]] = []
        notes = self._notes(client.spec)
        for model, its in aligned.items():
            annotations, leaderboard = self._annotate(client, model, its)
            scores[model], its_notes = self._rows(model, annotations, bootstrap, leaderboard)
            missing[model] = self._missing(client, requests[model], annotations)
            verdicts += annotations
            notes += its_notes
            place = folder / model.replace("/", "_")
            _write(place, annotator, its, annotations, leaderboard if missing[model].count <= allow_missing else None)
        parser = f"the parser of annotator {annotator.name}", "another judge or annotator"
        rows, lacks, refusals = self._withhold(client, scores, missing, allow_missing, parser)
        manifest = self._manifest(client, bootstrap, everything) | {
            "annotator": {"name": annotator.name, "made_for": annotator.model, "parameters": annotator.parameters},
            "prompts": {annotator.name: facts_hash(annotator.template_text)},
            "instructions": len(self.reference),
            "data": {"reference_outputs": file_hash(self.path)},
            "answers": {model: facts_hash(its) for model, its in aligned.items()},
        }
        return Judged(rows, [*notes, *lacks, *client.notes(everything)], refusals, manifest, verdicts)

    def _aligned(self, model: str, outputs: Outputs) -> list[dict[str, Any]]:
        """The model's outputs in the order of the reference's."""
        _require_texts(outputs, model)
        by_instruction = {row["instruction"]: row["output"] for row in outputs}
        instructions = [row["instruction"] for row in self.reference]
        lacking = [instruction for instruction in instructions if instruction not in by_instruction]
        if lacking:
            raise UserError(
                f"AlpacaEval: {model} has no output for {len(lacking)} of {len(instructions)} instructions of "
                f"{self.path}, such as {lacking[0][:80]!r}; generate its outputs again."
            )
        return [{"instruction": each, "output": by_instruction[each], "generator": model} for each in instructions]

    def _request(self, judge: JudgeSpec, messages: Messages, label: str = "") -> ChatRequest:
        return ChatRequest(messages, self.annotator.parameters | own_parameters(judge), label=label)

    def _requests(self, judge: JudgeSpec, outputs: Outputs) -> list[ChatRequest]:
        prompts = annotators.prompts_for(self.annotator, self.reference, outputs)
        return [self._request(judge, messages, f"AlpacaEval {outputs[0]['generator']}") for messages in prompts]

    def _annotate(self, client: ChatClient, model: str, outputs: Outputs) -> tuple[list[dict[str, Any]], Any]:
        """Annotations of every row, and alpaca_eval's leaderboard (None where it has no preference at all)."""

        def reply(messages: Messages) -> ChatReply | None:
            return client.reply(self._request(client.spec, messages))

        try:
            leaderboard, annotations = annotators.evaluate(self.annotator, model, self.reference, outputs, reply)
            return annotations, leaderboard
        except Unreadable:
            pairs = [
                (row["instruction"], row["output"], its["output"]) for row, its in zip(self.reference, outputs, strict=True)
            ]
        annotations = [{"instruction": asked, "output_1": theirs, "output_2": ours} for asked, theirs, ours in pairs]
        for row in annotations:
            row["preference"] = 1.5 if row["output_1"] == row["output_2"] else None  # a draw needs no judge
        return annotations, None

    def _missing(self, client: ChatClient, requests: Sequence[ChatRequest], annotations: Outputs) -> Missing:
        unanswered = sum(client.reply(request) is None for request in requests)
        lacking = [row for row in annotations if row["preference"] is None]
        swapped = [{**row, "output_1": row["output_2"], "output_2": row["output_1"]} for row in lacking]  # it asks either order
        prompts = (annotators.fill(self.annotator.template, row) for row in lacking + swapped)
        replies = (client.reply(self._request(client.spec, messages)) for messages in prompts)
        example = next((reply.text for reply in replies if reply is not None), "")
        return Missing(len(annotations), unanswered, len(lacking) - unanswered, example)

    def _rows(
        self, model: str, annotations: list[dict[str, Any]], bootstrap: int, leaderboard: Any
    ) -> tuple[list[Row], list[str]]:
        """Scores and notes; the length-controlled rate is added to annotations and leaderboard, as alpaca_eval does."""
        # a preference of 1: the reference is better, 2: the model is; None: missing
        won = [100 * (float(row["preference"]) - 1) for row in annotations if row["preference"] is not None]
        if not won:
            return [], []
        rows = [RowValues.of(won).row(model, self.name, "win_rate", bootstrap)]
        controlled, reason = annotators.length_controlled(self.annotator, annotations, self.reference)
        if reason:
            return rows, [f"AlpacaEval: the length-controlled win rate of {model} is not available: {reason}."]
        for annotation, percent in zip(annotations, controlled, strict=True):
            annotation["glm_preference"] = percent / 100
        row = RowValues.of(controlled).row(model, self.name, "length_controlled_win_rate", bootstrap)
        leaderboard.loc[model, "length_controlled_winrate"] = row.value
        return [*rows, row], []

    def _notes(self, judge: JudgeSpec) -> list[str]:
        annotator, count, theirs = self.annotator.name, len(self.reference), self.annotator.parameters
        deviations = {
            f"the annotator is {annotator}, not {OFFICIAL_ANNOTATOR}": annotator != OFFICIAL_ANNOTATOR,
            f"{count} instructions, not {OFFICIAL_COUNT}": count != OFFICIAL_COUNT,
            "temperature, max_tokens or seed is not the annotator's": theirs | own_parameters(judge) != theirs,
        }
        return not_comparable("AlpacaEval", judge, self.annotator.model, deviations)


def _read_reference(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise UserError(
            f"AlpacaEval: {path} is missing. Set `path` to a JSON list of instruction and output; the official ones "
            "are alpaca_eval_gpt4_baseline.json in the data set tatsu-lab/alpaca_eval (CC BY-NC 4.0)."
        )
    try:
        reference = [
            {"instruction": row["instruction"], "output": row["output"], "generator": row.get("generator", "reference")}
            for row in json.loads(path.read_text(encoding="utf-8"))
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"AlpacaEval: {path} is no JSON list of instruction and output ({type(error).__name__}: {error})"
        ) from error
    _require_texts(reference, str(path))
    return reference


def _require_texts(rows: Outputs, whose: str) -> None:
    seen = set()
    for number, row in enumerate(rows):
        if not isinstance(row["instruction"], str) or not isinstance(row["output"], str):
            raise UserError(f"AlpacaEval: {whose}: instruction and output of row {number} must both be texts.")
        if row["instruction"] in seen:
            raise UserError(f"AlpacaEval: {whose}: row {number} repeats an instruction: {row['instruction'][:80]!r}; keep one.")
        seen.add(row["instruction"])


def _write(folder: Path, annotator: Annotator, outputs: Outputs, annotations: Outputs, leaderboard: Any) -> None:
    """In alpaca_eval's formats; no leaderboard where scores are withheld."""
    frame = annotators.module("utils").convert_to_dataframe(list(annotations))
    write_whole(folder / "model_outputs.json", json.dumps(list(outputs), indent=2, ensure_ascii=False))
    write_whole(folder / annotator.name / "annotations.json", frame.to_json(orient="records", indent=2))
    board = folder / annotator.name / "leaderboard.csv"
    if leaderboard is None:
        board.unlink(missing_ok=True)  # of an earlier run
    else:
        write_whole(board, leaderboard.to_csv())
