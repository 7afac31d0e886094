"""The judge engine: every question is answered once, whatever happens in between."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from daekit.evaluation.judging.calls import Estimate, JudgeReply, JudgeRequest
from daekit.recipe.judge import JudgeSpec


class Engine:
    """Asks one judge, keeps every reply in ``folder``, and asks nothing twice.

    A context manager: while it is open, no other process can use the folder.
    """

    def __init__(self, spec: JudgeSpec, folder: Path) -> None:
        raise NotImplementedError

    def ask(self, requests: Sequence[JudgeRequest]) -> list[JudgeReply | None]:
        """The reply to each request, None where there is none (see ``errors.jsonl``, or a limit was reached)."""
        raise NotImplementedError

    def estimate(self, requests: Sequence[JudgeRequest]) -> Estimate:
        """What asking them would still cost."""
        raise NotImplementedError
