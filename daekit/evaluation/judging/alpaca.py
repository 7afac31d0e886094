"""AlpacaEval: judged through alpaca_eval's own annotators and metrics."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from daekit.errors import UserError
from daekit.evaluation.evaluate import SEED
from daekit.evaluation.intervals import RowValues, interval
from daekit.evaluation.judging import annotators
from daekit.evaluation.judging.annotators import OFFICIAL_ANNOTATOR, OFFICIAL_COUNT, Annotator, Messages, Outputs, Unreadable
from daekit.evaluation.judging.result import Judged, Missing, Reading, describe, not_comparable, other_judge, withhold
from daekit.files import facts_hash, file_hash, write_whole
from daekit.generation.budget import estimate
from daekit.generation.calls import CHARACTERS_PER_TOKEN, ChatRequest, Estimate
from daekit.generation.client import ChatClient, identity, require_sound
from daekit.generation.store import REPLIES, read_replies
from daekit.recipe.judge import JudgeSpec
from daekit.report.contents import Row

_NAME = "alpaca_eval"


def judge_alpaca_eval(
    client: ChatClient,
    annotator: str,
    reference_outputs: Path,
    outputs: Mapping[str, Outputs],
    folder: Path,
    *,
    allow_missing: int = 0,
    limit: int | None = None,
    bootstrap: int = 1000,
) -> Judged:
    """Compare the outputs of all models with the reference outputs.

    Args:
        client: The judge (limits of calls and cost hold for everything that it is asked).
        annotator: one of alpaca_eval's evaluator configs, or a directory that holds one (``configs.yaml`` and a template).
        reference_outputs: a JSON list of ``{"instruction", "output", "generator"}``; its order is the order of everything.
        outputs: model -> ``{"instruction", "output"}`` of every instruction.
        folder: written: ``<model>/<annotator>/annotations.json`` and ``leaderboard.csv``, ``<model>/model_outputs.json``,
            and the calls.
        allow_missing: judgments of a model that may be missing for its scores to be given nonetheless.
        limit: how many instructions, from the first on.
        bootstrap: resamples of the intervals.

    Raises:
        UserError: no such annotator; instructions and outputs do not fit; the judge cannot be asked at all.
    """
    chosen, reference = annotators.read_annotator(annotator), _read_reference(reference_outputs, limit)
    aligned = {model: _aligned(model, its, reference, reference_outputs) for model, its in outputs.items()}
    requests = {model: _requests(client.spec, chosen, reference, its) for model, its in aligned.items()}
    everything = [request for its in requests.values() for request in its]
    client.ask(everything)
    scores: dict[str, list[Row]] = {}
    missing: dict[str, Missing] = {}
    verdicts: list[dict[str, Any]] = []
    notes = _notes(client.spec, chosen, reference)
    for model, its in aligned.items():
        annotations, leaderboard = _annotate(client, chosen, model, reference, its)
        scores[model], its_notes = _rows(model, chosen, annotations, reference, bootstrap, leaderboard)
        missing[model] = _missing(client, chosen, requests[model], annotations)
        verdicts += annotations
        notes += its_notes
        place = folder / model.replace("/", "_")
        _write(place, chosen, its, annotations, leaderboard if missing[model].count <= allow_missing else None)
    reading = Reading(f"the parser of annotator {chosen.name}", "another judge or annotator", client.folder / REPLIES)
    rows, lacks, refusals = withhold(_NAME, scores, missing, allow_missing, client.budget.stopped, reading)
    manifest = describe(client, _NAME, bootstrap, everything) | {
        "annotator": {"name": chosen.name, "made_for": chosen.model, "parameters": chosen.parameters},
        "prompts": {chosen.name: facts_hash(chosen.template_text)},
        "instructions": len(reference),
        "data": {"reference_outputs": file_hash(reference_outputs)},
        "answers": {model: facts_hash(list(its)) for model, its in aligned.items()},
    }
    return Judged(rows, [*notes, *lacks, *client.notes(everything)], refusals, manifest, verdicts)


def estimate_alpaca_eval(
    judge: JudgeSpec,
    annotator: str,
    reference_outputs: Path,
    models: Sequence[str],
    folder: Path,
    *,
    outputs: Mapping[str, Outputs] | None = None,
    limit: int | None = None,
    where: str = "annotator",
) -> Estimate:
    """What ``judge_alpaca_eval`` would still cost; without ``outputs`` each is taken to have 300 tokens.

    ``where`` begins an error about the annotator.
    """
    require_sound(judge)
    chosen, reference = annotators.read_annotator(annotator, where), _read_reference(reference_outputs, limit)
    if outputs is None:
        text = "x" * (300 * CHARACTERS_PER_TOKEN)
        outputs = {model: [{**row, "output": f"{model} {text}"} for row in reference] for model in models}
    aligned = [_aligned(model, its, reference, reference_outputs) for model, its in outputs.items()]
    requests = [request for its in aligned for request in _requests(judge, chosen, reference, its)]
    return estimate(judge, requests, read_replies(folder), identity(judge))


def _read_reference(path: Path, limit: int | None) -> list[dict[str, Any]]:
    if not path.is_file():
        raise UserError(
            f"AlpacaEval: {path} is missing. Set reference_outputs to a JSON list of instruction and output; the official ones "
            "are alpaca_eval_gpt4_baseline.json in the data set tatsu-lab/alpaca_eval (CC BY-NC 4.0)."
        )
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        reference = [
            {"instruction": row["instruction"], "output": row["output"], "generator": row.get("generator", "reference")}
            for row in rows
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"AlpacaEval: {path} is no JSON list of instruction and output ({type(error).__name__}: {error})"
        ) from error
    _require_texts(reference, str(path))
    return reference[:limit]


def _require_texts(rows: Outputs, whose: str) -> None:
    seen = set()
    for number, row in enumerate(rows):
        if not isinstance(row["instruction"], str) or not isinstance(row["output"], str):
            raise UserError(f"AlpacaEval: {whose}: instruction and output of row {number} must both be texts.")
        if row["instruction"] in seen:
            raise UserError(f"AlpacaEval: {whose}: row {number} repeats an instruction: {row['instruction'][:80]!r}; keep one.")
        seen.add(row["instruction"])


def _aligned(model: str, outputs: Outputs, reference: Outputs, path: Path) -> list[dict[str, Any]]:
    """The model's outputs in the order of the reference's."""
    _require_texts(outputs, model)
    by_instruction = {row["instruction"]: row["output"] for row in outputs}
    lacking = [row["instruction"] for row in reference if row["instruction"] not in by_instruction]
    if lacking:
        raise UserError(
            f"AlpacaEval: {model} has no output for {len(lacking)} of {len(reference)} instructions of {path}, such as "
            f"{lacking[0][:80]!r}; generate its outputs again."
        )
    return [
        {"instruction": (its := row["instruction"]), "output": by_instruction[its], "generator": model} for row in reference
    ]


def _parameters(spec: JudgeSpec, annotator: Annotator) -> dict[str, Any]:
    own = {"temperature": spec.temperature, "max_tokens": spec.max_tokens, "seed": spec.seed}
    return annotator.parameters | {key: value for key, value in own.items() if value is not None}


def _requests(spec: JudgeSpec, annotator: Annotator, reference: Outputs, outputs: Outputs) -> list[ChatRequest]:
    parameters = _parameters(spec, annotator)
    return [
        ChatRequest(messages, parameters, label=f"AlpacaEval {outputs[0]['generator']}")
        for messages in annotators.prompts_for(annotator, reference, outputs)
    ]


def _annotate(
    client: ChatClient, annotator: Annotator, model: str, reference: Outputs, outputs: Outputs
) -> tuple[list[dict[str, Any]], Any]:
    """Annotations of every row, and alpaca_eval's leaderboard (None where it has no preference at all)."""
    parameters = _parameters(client.spec, annotator)

    def reply(messages: Messages) -> Any:
        return client.reply(ChatRequest(messages, parameters))

    try:
        leaderboard, annotations = annotators.evaluate(annotator, model, reference, outputs, reply)
        return annotations, leaderboard
    except Unreadable:
        pairs = [(row["instruction"], row["output"], ours["output"]) for row, ours in zip(reference, outputs, strict=True)]
    annotations = [{"instruction": asked, "output_1": theirs, "output_2": ours} for asked, theirs, ours in pairs]
    for row in annotations:
        row["preference"] = 1.5 if row["output_1"] == row["output_2"] else None  # a draw needs no judge
    return annotations, None


def _missing(client: ChatClient, annotator: Annotator, requests: Sequence[ChatRequest], annotations: Outputs) -> Missing:
    unanswered = sum(client.reply(request) is None for request in requests)
    lacking = [row for row in annotations if row["preference"] is None]
    swapped = [{**row, "output_1": row["output_2"], "output_2": row["output_1"]} for row in lacking]  # it asks in either order
    parameters = _parameters(client.spec, annotator)
    replies = (client.reply(ChatRequest(annotators.fill(annotator.template, row), parameters)) for row in lacking + swapped)
    example = next((reply.text for reply in replies if reply is not None), "")
    return Missing(unanswered, len(lacking) - unanswered, len(annotations), example)


def _rows(
    model: str, annotator: Annotator, annotations: list[dict[str, Any]], reference: Outputs, bootstrap: int, leaderboard: Any
) -> tuple[list[Row], list[str]]:
    """Scores and notes; the length-controlled rate is added to annotations and leaderboard, as alpaca_eval does."""
    # a preference of 1: the reference is better, 2: the model is; None: missing
    won = [100 * (float(row["preference"]) - 1) for row in annotations if row["preference"] is not None]
    if not won:
        return [], []
    rows = [_row(model, "win_rate", won, bootstrap)]
    controlled, reason = annotators.length_controlled(annotator, annotations, reference)
    if reason:
        return rows, [f"AlpacaEval: the length-controlled win rate of {model} is not available: {reason}."]
    for annotation, percent in zip(annotations, controlled, strict=True):
        annotation["glm_preference"] = percent / 100
    row = _row(model, "length_controlled_win_rate", controlled, bootstrap)
    leaderboard.loc[model, "length_controlled_winrate"] = row.value
    return [*rows, row], []


def _row(model: str, metric: str, percents: Sequence[float], bootstrap: int) -> Row:
    values = RowValues(np.array(percents), np.ones(len(percents)))
    low, high = interval(values, bootstrap, SEED)
    return Row(model, _NAME, metric, values.mean, low, high, len(percents))


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


def _notes(spec: JudgeSpec, annotator: Annotator, reference: Outputs) -> list[str]:
    count = len(reference)
    deviations = {
        f"the annotator is {annotator.name}, not {OFFICIAL_ANNOTATOR}": annotator.name != OFFICIAL_ANNOTATOR,
        **other_judge(spec, annotator.model),
        f"{count} instructions, not {OFFICIAL_COUNT}": count != OFFICIAL_COUNT,
        "temperature, max_tokens or seed is not the annotator's": _parameters(spec, annotator) != annotator.parameters,
    }
    return not_comparable("AlpacaEval", deviations)
