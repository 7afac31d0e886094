"""A student made from its teacher, as a recipe says: searched, cut, or made of experts; kept in the run's folder."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property, partial
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from daekit.errors import UserError
from daekit.evaluation import tokenize_rows
from daekit.files import write_json
from daekit.models.features import ORIGIN
from daekit.models.identity import fingerprint
from daekit.models.scoring import TokenRow
from daekit.models.vocabulary import vocabulary_size
from daekit.recipe import student_key
from daekit.recipe.schema import CalibrationSpec, Recipe, StudentSearchSpec, StudentSpec
from daekit.runtime.data import DataBuilder
from daekit.runtime.folders import RunFolder, StudentFolder, files_of
from daekit.runtime.models import ModelBuilder
from daekit.students.calibration import require_enough
from daekit.students.experts import measure_experts
from daekit.students.figure import search_svg
from daekit.students.importance import Importance, at_random, choose, first_n, measure_importance, sort_teacher
from daekit.students.moe import dense_to_mixtral, fewer_experts, mixtral_to_dense
from daekit.students.norms import fit_norms
from daekit.students.scorer import CandidateScorer
from daekit.students.search import Round, read_log, run_search
from daekit.students.selection import Selection
from daekit.students.shapes import Shape, require_possible
from daekit.students.slicing import slice_model
from daekit.students.space import Space, Window, space_of
from daekit.students.strategies import Strategy, draw, evolve, grid

Rows = Sequence[TokenRow]


def require_one_process(recipe: Recipe, name: str, folder: RunFolder) -> None:
    """UserError for a student that is yet to be made by a run of several processes: none could wait for a search of hours."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not folder.student(student_key(recipe, name)).is_complete:
        raise UserError(
            f"stages.{name}.student: is made from its teacher in one process; run `daekit init RECIPE` first (if the "
            "teacher is a stage of this recipe: `daekit train RECIPE` without accelerate launch up to there)"
        )


def build_student(
    recipe: Recipe, name: str, folder: RunFolder, data: DataBuilder, models: ModelBuilder, device: torch.device
) -> StudentFolder:
    """Make the student that stage ``name`` begins with, unless it is there; a search that was killed goes on.

    Raises:
        UserError: from the rooms that read the data, load the teacher and cut it.
    """
    spec = recipe.stages[name].student
    assert spec is not None and spec.init is not None
    home = folder.student(student_key(recipe, name))
    if home.is_complete:
        return home
    home.facts.unlink(missing_ok=True)  # of a student whose files have been lost
    home.root.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    rows = partial(calibration_rows, recipe, spec.init.calibration, data, models.tokenizer)
    maker = _Maker(name, spec.init, home, recipe.seed_of(name), rows, vocabulary_size(models.tokenizer))
    teacher, *others = (models.model(each, recipe.seed).to(device) for each in (spec.init.from_, *spec.init.with_))
    student = maker.make(teacher, others)
    if "layers" not in maker.facts:  # all of them: what the teacher's config says is of the teacher's own origin
        depth = student.config.num_hidden_layers
        setattr(student.config, ORIGIN, {"layers": list(range(depth)), "of": depth})
    sizes = {"parameters": student.num_parameters(), "teacher_parameters": maker.teacher_parameters}
    facts = {"stage": name, **sizes, **maker.facts, "seconds": round(time.perf_counter() - start, 1)}
    half = home.model.with_suffix(".half")
    for left in (half, home.model):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    student.save_pretrained(half)
    models.tokenizer.save_pretrained(half)
    half.rename(home.model)
    write_json(home.facts, facts | {"files": files_of(home.root, [home.model])})  # last: the student is complete
    print(
        f"[{name}] student made from its teacher: {sizes['parameters']:,} of {sizes['teacher_parameters']:,} parameters, in "
        f"{facts['seconds']:.0f} s -> {home.root}",
        flush=True,
    )
    return home


class _Maker:
    """Makes one student; ``facts`` says what it did."""

    def __init__(
        self, name: str, spec: StudentSpec, home: StudentFolder, seed: int, read_rows: Callable[[], Rows], vocab_size: int
    ) -> None:
        self.name, self.spec, self.home, self.seed = name, spec, home, seed
        self.read_rows, self.vocab_size = read_rows, vocab_size
        self.teacher_parameters = 0
        self.facts: dict[str, Any] = {}

    @cached_property
    def rows(self) -> Rows:
        """The calibration text, read when something is measured on it."""
        return self.read_rows()

    def make(self, teacher: PreTrainedModel, others: list[PreTrainedModel]) -> PreTrainedModel:
        """The student, as the spec says."""
        spec = self.spec
        self.teacher_parameters = teacher.num_parameters()
        if others:
            return dense_to_mixtral([teacher, *others], seed=self.seed)
        if spec.keep_experts is not None:
            return fewer_experts(teacher, spec.keep_experts, measure_experts(teacher, self.rows))
        if spec.dense is not None:
            scores = None if spec.dense == "average" else measure_experts(teacher, self.rows)
            teacher = mixtral_to_dense(teacher, spec.dense, scores)
            if not spec.shape and spec.search is None:
                return teacher
        importance = self._importance(teacher)
        if spec.search is not None:
            selection = self._search(spec.search, teacher, importance)
        else:
            selection = choose(teacher.config, importance, replace(Shape.of(teacher.config), **spec.shape))
        self.facts |= {"shape": asdict(selection.shape), "layers": list(selection.layers)}
        fits = fit_norms(teacher, selection, self.rows) if spec.fit_norms else None
        return slice_model(teacher, selection, fits)

    def _importance(self, teacher: PreTrainedModel) -> Importance:
        if self.spec.importance == "first":
            return first_n(teacher.config)
        if self.spec.importance == "random":
            return at_random(teacher.config, self.seed)
        return measure_importance(teacher, self.rows)

    def _search(self, search: StudentSearchSpec, teacher: PreTrainedModel, importance: Importance) -> Selection:
        """What the best candidate keeps of the teacher, which is sorted on the way."""
        weights = fingerprint(teacher)
        sort_teacher(teacher, importance.uniform if search.units == "uniform" else importance)
        space = space_of(
            teacher.config,
            importance,
            search.granularity,
            search.units,
            blocks=search.blocks,
            min_ratio=search.min_ratio,
            head_dims=search.head_dims or None,
        )
        scorer = CandidateScorer(
            teacher, self.rows, vocab_size=self.vocab_size, tokens=search.tokens[-1], objective=search.objective
        )
        rounds = [Round(tokens, search.keep) for tokens in search.tokens]
        result = run_search(
            space,
            _strategy(search, space, self.seed),
            scorer,
            rounds[-1:] if search.strategy == "grid" else rounds,  # a grid scores all on the whole text
            candidates=10**9 if search.strategy == "grid" else search.candidates,
            log=self.home.log,
            identity={"teacher": weights, "seed": self.seed, **search.model_dump(mode="json")},
            progress=lambda line: print(f"[{self.name}] {line}", flush=True),
        )
        self.home.plot.write_text(search_svg(read_log(self.home.log), search.objective).svg)
        self.facts["search"] = {
            "score": result.best.score,
            "candidates": result.candidates,
            "tokens": result.tokens,
            "objective": search.objective,
        }
        return space.selection(result.best.candidate)


def _strategy(search: StudentSearchSpec, space: Space, seed: int) -> Strategy:
    window = Window(*search.parameters)
    if search.strategy == "grid":
        return grid(space, window)
    if search.strategy == "random":
        return draw(space, window, seed)
    return evolve(space, window, seed)


def calibration_rows(
    recipe: Recipe, spec: CalibrationSpec, data: DataBuilder, tokenizer: PreTrainedTokenizerBase
) -> list[Mapping[str, Sequence[int]]]:
    """Training rows of each source, in random order, until they have their share of the tokens."""
    rows: list[Mapping[str, Sequence[int]]] = []
    for name in spec.sources:
        wanted, found = -(-spec.tokens // len(spec.sources)), 0
        training = data.source(name)[0].shuffle(seed=recipe.seed)
        for row in training:
            tokenized = tokenize_rows([row], tokenizer, source=name, domain=recipe.sources[name].domain).rows[0]
            for start in range(0, len(tokenized.input_ids), spec.max_length):
                piece = slice(start, start + spec.max_length)
                rows.append({"input_ids": tokenized.input_ids[piece], "labels": tokenized.labels[piece]})
            found += len(tokenized.input_ids)
            if found >= wanted:
                break
        if found < wanted:
            raise UserError(
                f"calibration text too short: the source {name!r} has {found:,} tokens in {len(training):,} rows, its share of "
                f"calibration.tokens={spec.tokens:,} is {wanted:,}; give fewer tokens, or more sources"
            )
    return rows


def require_cuttable(recipe: Recipe, name: str, data: DataBuilder, models: ModelBuilder) -> None:
    """Whether the student of stage ``name`` can be made from its teacher, by the teacher's config and the calibration text.

    Raises:
        UserError: a shape that cannot be cut out of the teacher, too little calibration text for what is measured on it.
    """
    student = recipe.stages[name].student
    assert student is not None and student.init is not None
    spec = student.init
    config = models.config(recipe, spec.from_)
    if config is not None and spec.dense is None and spec.shape:
        require_possible(config, replace(Shape.of(config), **spec.shape))
    if spec.with_ or spec.dense == "average":
        return
    ranked = spec.importance == "activations" and (bool(spec.shape) or spec.search is not None)
    if not (ranked or spec.dense or spec.keep_experts or spec.search or spec.fit_norms):
        return
    rows = calibration_rows(recipe, spec.calibration, data, models.tokenizer)
    if ranked and config is not None:
        require_enough(rows, max(config.hidden_size, config.intermediate_size), "channels or neurons")
    scored = sum(label >= 0 for row in rows for label in row["labels"][1:])
    if spec.search is not None and scored < spec.search.tokens[-1]:
        raise UserError(
            f"calibration text too short: {scored:,} of its tokens can be scored, search.tokens asks for "
            f"{spec.search.tokens[-1]:,}; give more text or fewer tokens"
        )
