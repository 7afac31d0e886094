"""The typed form of how a student is found in its teacher; a part of ``schema.py``, which says how it is used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class CalibrationSpec:
    """Training rows on which a teacher's parts are ranked and candidates scored; nothing is trained on them here.

    Attributes:
        sources: names of sources, which give equally many tokens each (default: those of the stage's data).
        tokens: how many tokens together.
        max_length: longer rows are split into rows of so many tokens.
    """

    sources: tuple[str, ...] = ()
    tokens: int = 100_000
    max_length: int = 1024


@dataclass(frozen=True)
class StudentSearchSpec:
    """The search for the shape of a student, and for what it keeps of its teacher.

    Attributes:
        parameters: the smallest and the largest number of parameters allowed.
        granularity: ``coarse``: sizes only, the parts that count most; ``fine``: also which layers and which parts.
        units: ``layerwise``: parts are ranked (and, if fine, chosen) in each layer by itself; ``uniform``: alike in all layers.
        parts: hidden size and MLP width change in steps of the teacher's divided by this.
        smallest: no size below this share of the teacher's.
        head_dims: widths of a head to choose from (default: the teacher's).
        strategy: ``evolution``, ``random`` or ``grid`` (of a coarse space).
        by: candidates are compared by ``perplexity``, or by their ``kl`` to the teacher.
        candidates: how many to look at (a grid: all).
        tokens: tokens per candidate, rising from stage to stage, at most those of the calibration.
        keep: share of the candidates that reach the next stage.
    """

    parameters: tuple[int, ...]
    granularity: Literal["coarse", "fine"] = "coarse"
    units: Literal["layerwise", "uniform"] = "layerwise"
    parts: int = 8
    smallest: float = 0.25
    head_dims: tuple[int, ...] = ()
    strategy: Literal["evolution", "random", "grid"] = "evolution"
    by: Literal["perplexity", "kl"] = "perplexity"
    candidates: int = 200
    tokens: tuple[int, ...] = (2048, 16384)
    keep: float = 0.25
