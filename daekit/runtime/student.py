"""A student made from its teacher, as a recipe says: searched, cut, or made of experts; kept in the run's folder."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cached_property
from typing import Any

from transformers import PreTrainedModel

from daekit.errors import UserError
from daekit.evaluation import tokenize_rows
from daekit.files import write_json
from daekit.models.features import ORIGIN
from daekit.models.identity import fingerprint
from daekit.models.scoring import TokenRow
from daekit.recipe.schema import CalibrationSpec, StudentSearchSpec, StudentSpec
from daekit.runtime.data import DataBuilder
from daekit.runtime.folders import StudentFolder, files_of
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


def require_one_process(models: ModelBuilder, name: str) -> None:
    """UserError for a student that is yet to be made by a run of several processes: none could wait for a search of hours."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not models.student_folder(name).is_complete:
        raise UserError(
            f"stages.{name}.student: is made from its teacher in one process; run `daekit init RECIPE` first (if the "
            "teacher is a stage of this recipe: `daekit train RECIPE` without accelerate launch up to there)"
        )


def build_student(models: ModelBuilder, name: str) -> StudentFolder:
    """Make the student that stage ``name`` begins with, unless it is there; a search that was killed goes on.

    Raises:
        UserError: from the rooms that read the data, load the teacher and cut it.
    """
    home, spec = models.student_folder(name), _made(models, name)
    if home.is_complete:
        return home
    home.facts.unlink(missing_ok=True)  # of a student whose files have been lost
    home.root.mkdir(parents=True, exist_ok=True)
    start, maker = time.perf_counter(), _Maker(models, name)
    teacher, *others = (models.model(each, models.recipe.seed).to(models.device) for each in (spec.from_, *spec.with_))
    of = teacher.num_parameters()
    student = maker.make(teacher, others)
    if "layers" not in maker.facts:  # all of them: what the teacher's config says is of the teacher's own origin
        depth = student.config.num_hidden_layers
        setattr(student.config, ORIGIN, {"layers": list(range(depth)), "of": depth})
    seconds, parameters = time.perf_counter() - start, student.num_parameters()
    facts = {"stage": name, "parameters": parameters, "teacher_parameters": of, **maker.facts, "seconds": round(seconds, 1)}
    half = home.model.with_suffix(".half")
    for left in (half, home.model):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    student.save_pretrained(half)
    models.tokenizer.save_pretrained(half)
    half.rename(home.model)
    write_json(home.facts, facts | {"files": files_of(home.root, [home.model])})  # last: the student is complete
    made = f"[{name}] student made from its teacher: {parameters:,} of {of:,} parameters"
    print(f"{made}, in {seconds:.0f} s -> {home.root}", flush=True)
    return home


def _made(models: ModelBuilder, name: str) -> StudentSpec:
    spec = models.student_spec(name).init
    assert spec is not None, f"the student of {name} is made from a teacher"
    return spec


class _Maker:
    """Makes the student of a stage; ``facts`` says what it did."""

    def __init__(self, models: ModelBuilder, name: str) -> None:
        self.models, self.name, self.spec = models, name, _made(models, name)
        self.home, self.seed = models.student_folder(name), models.recipe.seed_of(name)
        self.facts: dict[str, Any] = {}

    @cached_property
    def rows(self) -> Sequence[TokenRow]:
        """The calibration text, read when something is measured on it."""
        return calibration_rows(self.models.data, self.spec.calibration)

    def make(self, teacher: PreTrainedModel, others: list[PreTrainedModel]) -> PreTrainedModel:
        """The student, as the spec says."""
        spec = self.spec
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
        sizes: dict[str, Any] = dict(blocks=search.blocks, min_ratio=search.min_ratio, head_dims=search.head_dims or None)
        space, objective = space_of(teacher.config, importance, search.granularity, search.units, **sizes), search.objective
        scored, is_grid = search.tokens[-1], search.strategy == "grid"
        scorer = CandidateScorer(teacher, self.rows, vocab_size=self.models.vocab_size, tokens=scored, objective=objective)
        rounds = [Round(tokens, search.keep) for tokens in search.tokens]
        result = run_search(
            space,
            _strategy(search, space, self.seed),
            scorer,
            rounds[-1:] if is_grid else rounds,  # a grid scores all on the whole text
            candidates=10**9 if is_grid else search.candidates,
            log=self.home.log,
            identity={"teacher": weights, "seed": self.seed, **search.model_dump(mode="json")},
            progress=lambda line: print(f"[{self.name}] {line}", flush=True),
        )
        self.home.plot.write_text(search_svg(read_log(self.home.log), objective).svg)
        found = {"score": result.best.score, "candidates": result.candidates, "tokens": result.tokens}
        self.facts["search"] = found | {"objective": objective}
        return space.selection(result.best.candidate)


def _strategy(search: StudentSearchSpec, space: Space, seed: int) -> Strategy:
    window = Window(*search.parameters)
    if search.strategy == "grid":
        return grid(space, window)
    return draw(space, window, seed) if search.strategy == "random" else evolve(space, window, seed)


def calibration_rows(data: DataBuilder, spec: CalibrationSpec) -> list[TokenRow]:
    """Training rows of each source, in random order, until they have their share of the tokens."""
    rows: list[TokenRow] = []
    for name in spec.sources:
        wanted, found = -(-spec.tokens // len(spec.sources)), 0
        training = data.source(name)[0].shuffle(seed=data.recipe.seed)
        for row in training:
            tokenized = tokenize_rows([row], data.tokenizer, source=name, domain=data.recipe.sources[name].domain).rows[0]
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


def require_cuttable(models: ModelBuilder, name: str) -> None:
    """Whether the student of stage ``name`` can be made from its teacher, by the teacher's config and the calibration text.

    Raises:
        UserError: a shape that cannot be cut out of the teacher, too little calibration text for what is measured on it.
    """
    spec = _made(models, name)
    config = models.config(spec.from_)
    if config is not None and spec.dense is None and spec.shape:
        require_possible(config, replace(Shape.of(config), **spec.shape))
    if spec.with_ or spec.dense == "average":
        return
    ranked = spec.importance == "activations" and (bool(spec.shape) or spec.search is not None)
    if not (ranked or spec.dense or spec.keep_experts or spec.search or spec.fit_norms):
        return
    rows = calibration_rows(models.data, spec.calibration)
    if ranked and config is not None:
        require_enough(rows, max(config.hidden_size, config.intermediate_size), "channels or neurons")
    scored = sum(label >= 0 for row in rows for label in row["labels"][1:])
    if spec.search is not None and scored < spec.search.tokens[-1]:
        raise UserError(
            f"calibration text too short: {scored:,} of its tokens can be scored, search.tokens asks for "
            f"{spec.search.tokens[-1]:,}; give more text or fewer tokens"
        )
