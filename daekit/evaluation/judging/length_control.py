"""AlpacaEval's length-controlled win rate: only where everything that its model was fitted for is at hand."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from daekit.evaluation.judging.annotators import Annotator, module

OFFICIAL_ANNOTATOR, OFFICIAL_COUNT = "weighted_alpaca_eval_gpt4_turbo", 805
_REPOSITORY, _BASELINE, _GAMED = "tatsu-lab/alpaca_eval", "alpaca_eval_gpt4_baseline.json", "df_gamed.csv"


def length_controlled(
    annotator: Annotator, annotations: Sequence[Mapping[str, Any]], reference: Sequence[Mapping[str, Any]]
) -> tuple[list[float], str]:
    """(length-controlled preference of each row in percent, "") or ([], why it is not available)."""
    if annotator.name != OFFICIAL_ANNOTATOR:
        return [], f"it belongs to the annotator {OFFICIAL_ANNOTATOR}"
    if len(reference) != OFFICIAL_COUNT:
        return [], f"it needs all {OFFICIAL_COUNT} official instructions, and there are {len(reference)}"
    if any(row["preference"] is None for row in annotations):
        return [], "judgments are missing"
    glm = module("metrics.glm_winrate")
    try:
        baseline, _ = (
            glm.hf_hub_download(repo_id=_REPOSITORY, filename=file, repo_type="dataset") for file in (_BASELINE, _GAMED)
        )
    except OSError as error:  # no network, offline mode, not in the cache
        return [], f"{_BASELINE} and {_GAMED} of {_REPOSITORY} cannot be had ({type(error).__name__})"
    with open(baseline, encoding="utf-8") as file:
        official = [(row["instruction"], row["output"]) for row in json.load(file)]
    if official != [(row["instruction"], row["output"]) for row in reference]:
        return [], f"the reference outputs are not those of {_BASELINE} in their order"
    frame = module("utils").convert_to_dataframe(list(annotations))
    glm.get_length_controlled_winrate(frame, save_weights_dir=None, is_warn_extreme_changes=False)  # adds a column
    return [100 * float(value) for value in frame["glm_preference"]], ""
