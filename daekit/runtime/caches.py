"""The caches of a recipe's teachers: which there are, what is missing of them, made before any model of the stage is loaded."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.state import AcceleratorState
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.utils import cached_file

from daekit.errors import UserError
from daekit.evaluation.models import file_fingerprint
from daekit.files import facts_hash
from daekit.models.adapters import base_spec
from daekit.models.placement import free_memory
from daekit.progress import Progress
from daekit.protocol import Teacher
from daekit.recipe.adapter_config import BARE_BASE, holds_adapter, read_adapter_config
from daekit.recipe.schema import ModelSpec, TeacherSpec
from daekit.runtime.models import ModelBuilder
from daekit.runtime.preflight import held_out_rows
from daekit.runtime.quiet import say
from daekit.teachers import CachedTeacher, ModelTeacher, write_cache
from daekit.teachers.cache.check import check_cache
from daekit.teachers.cache.rows import CacheRow, rows_of_examples
from daekit.teachers.cache.store import MANIFEST, CacheStore, require_facts
from daekit.teachers.parts import DemandingTeacher
from daekit.trainers.distributed import rounding
from daekit.trainers.prepared import rows_of_trainer, rows_trainer

Key = tuple[str | int, ...]  # below a stage


def make_caches(models: ModelBuilder, name: str, given: Mapping[str, Any], check: bool = False) -> dict[Key, CachedTeacher]:
    """Key of a teacher below a stage -> its cache, whole; what is missing is made, one teacher in memory at a time.

    Every rank calls it and writes its part.

    Args:
        models: the models of the run.
        name: name of the stage.
        given: what its trainer is given: its config, the rows of training and evaluation.
        check: compute some rows again, and print what differs.

    Raises:
        UserError: what ``write_cache`` refuses.
    """
    stage = models.recipe.stages[name]
    kept = {key: spec for key, spec in stage.teachers_by_key().items() if spec.cache is not None}
    if not kept:
        return {}
    trainer = rows_trainer(models.tokenizer, given["args"], given["train_dataset"], given["eval_dataset"])
    unset_hf_deepspeed_config()  # the trainer has set it, and a teacher that is loaded now would be split
    rows_of: dict[str, list[CacheRow]] = {}
    for example in rows_of_trainer(trainer):
        rows_of.setdefault(str(example["domain"]), []).extend(rows_of_examples([example]))
    for domain, more in held_out_rows(models.data, name).items():
        rows_of.setdefault(domain, []).extend(rows_of_examples(more))
    sources = _Sources(models, name)
    directories = {key: sources.directory(spec) for key, spec in kept.items()}
    state = PartialState()
    for directory in dict.fromkeys(directories.values()):
        keys = [key for key, other in directories.items() if other == directory]  # equal teachers share it
        domains = {domain for key in keys for domain in stage.domains_of(key, rows_of)}
        rows = [row for domain in rows_of if domain in domains for row in rows_of[domain]]
        with rounding(trainer.accelerator):
            _write_missing(sources, kept[keys[0]], directory, rows, state)
            if check and state.is_main_process:
                for line in check_cache(sources.live(kept[keys[0]]), directory, rows, state.device):
                    say(f"[{name}] {directory}: {line}")
        state.wait_for_everyone()
    if trainer.is_deepspeed_enabled:
        AcceleratorState._reset_state()  # or it would refuse the stage's own trainer
    live = {key: spec.kind for key, spec in stage.teachers_by_key().items() if key not in kept}
    live |= {("reference",): "student"} if stage.type == "dae" and stage.reference is None else {}
    if set(live.values()) <= {"labels"}:
        say(f"[{name}] every frozen model is read from its cache: none is loaded")
    caches = {directory: CachedTeacher(directory, models.tokenizer) for directory in dict.fromkeys(directories.values())}
    return {key: caches[directory] for key, directory in directories.items()}


def is_cached(models: ModelBuilder, name: str, spec: TeacherSpec) -> bool:
    """Whether there is a whole cache of a teacher of stage ``name``; of which rows does not matter."""
    return spec.cache is not None and (_Sources(models, name).directory(spec) / MANIFEST).is_file()


def _write_missing(sources: _Sources, spec: TeacherSpec, directory: Path, rows: list[CacheRow], state: PartialState) -> None:
    """Write what is missing of one cache; the teacher is loaded only if something is, and freed."""
    name, models, facts = sources.name, sources.models, sources.settings(spec) | {"source": sources.of(spec)}
    # a server is asked about the rows of a shard together, and little is lost when it stops
    sizes: dict[str, Any] = {"batch_tokens": 10**9, "shard_bytes": 2**22} if spec.kind == "server" else {}
    if _is_whole(directory, rows, facts):
        say(f"[{name}] cache complete, kept: {directory}")
        return
    teacher, start = sources.live(spec), time.perf_counter()
    if isinstance(teacher, DemandingTeacher):
        teacher.require_served(models.recipe.stages[name].loss, models.tokenizer, rows)
    with closing(Progress(f"[{name}] cache", "loss tokens")) as progress:
        write_cache(
            teacher,
            rows,
            directory,
            tokenizer=models.tokenizer,
            device=state.device,
            ranks=(state.process_index, state.num_processes),
            progress=progress if state.is_main_process else None,
            **facts,
            **sizes,
        )
    tokens = sum(len(row.offsets) for row in rows)
    say(f"[{name}] cache: {tokens:,} loss tokens written in {time.perf_counter() - start:.0f} s -> {directory}")
    del teacher
    free_memory()


def _is_whole(directory: Path, rows: list[CacheRow], facts: Mapping[str, Any]) -> bool:
    try:
        store = CacheStore(directory)
    except UserError:
        return False  # write_cache says what is wrong, or mends it
    require_facts(directory, store.facts, facts)
    return all(row.key in store.index for row in rows if len(row.offsets))


@dataclass(frozen=True)
class _Sources:
    """Whose distributions a stage's caches hold."""

    models: ModelBuilder
    name: str

    def directory(self, spec: TeacherSpec) -> Path:
        """Where the cache of a teacher lies: the recipe's path, or a folder of the run named by what the values depend on."""
        assert spec.cache is not None
        if spec.cache.path is not None:
            return Path(spec.cache.path)
        precision = self.models.recipe.stages[self.name].trainer.get("bf16")  # a frozen model runs under the student's autocast
        return self.models.folder.cache(facts_hash([self.of(spec), self.settings(spec), precision])[:12])

    def settings(self, spec: TeacherSpec) -> dict[str, Any]:
        """The arguments of ``write_cache`` that decide the values."""
        assert spec.cache is not None
        recipe, end = self.models.recipe, self.models.tokenizer.eos_token_id
        if spec.cache.keep == "top_k":
            temperature = recipe.stages[self.name].loss.temperature
            forced = [] if end is None or spec.kind == "server" else [end]
            return {"keep": "top_k", "k": spec.cache.k, "temperature": temperature, "forced_ids": forced}
        if spec.cache.keep == "sampled":
            return {"keep": "sampled", "draws": spec.cache.draws, "seed": recipe.seed_of(self.name)}
        return {"keep": "hidden"}

    def live(self, spec: TeacherSpec) -> Teacher:
        """The teacher itself, loaded; the reference without a model is the student as the stage finds it."""
        models = self.models
        if spec.kind == "student":
            return ModelTeacher(models.student(self.name), models.vocab_size, "reference")
        return models.on_base({"": models.teacher(spec)}, models.student_spec(self.name))[""]

    def of(self, spec: TeacherSpec) -> dict[str, Any]:
        """What tells a teacher from others without loading it: contents of its files, precision, quantisation, weights."""
        student = self.models.student_spec(self.name)
        if spec.server is not None:
            return {"server": spec.server.model}
        if spec.kind == "student":
            seed = {"seed": self.models.recipe.seed_of(self.name)} if student.config else {}
            return {"models": [contents(self.models, self.models.start_of(self.name)) | seed]}
        facts: dict[str, Any] = {"models": [contents(self.models, model, student) for model in spec.models().values()]}
        if spec.ensemble:
            facts |= {"weights": [member.weight for member in spec.ensemble], "average": spec.average}
        return facts


def contents(models: ModelBuilder, spec: ModelSpec, student: ModelSpec | None = None) -> dict[str, Any]:
    """What tells one model from others without loading it; an adapter of the student's base has the facts of the base, too."""
    placed = models.placed(spec)
    if placed.adapter is not None:
        adapter = None if placed.adapter == BARE_BASE else file_fingerprint(Path(placed.adapter))
        base = base_spec(placed if student is None else models.placed(student))
        return {"adapter": adapter, "base": contents(models, base)}
    facts: dict[str, Any] = {"dtype": placed.dtype, "quantization": placed.quantization}
    if placed.config is not None:
        return facts | {"config": json.loads(json.dumps(placed.config, default=str))}
    assert placed.path is not None
    folder = Path(placed.path).expanduser()
    if not folder.is_dir():
        return facts | {"files": _hub_commit(placed)}
    facts["files"] = file_fingerprint(folder)
    if holds_adapter(folder):  # it is merged into the base that it names
        base = read_adapter_config(folder)["base_model_name_or_path"]
        facts["base"] = contents(models, placed.model_copy(update={"path": base, "revision": None}))
    return facts


def _hub_commit(spec: ModelSpec) -> str:
    """``ID@COMMIT`` of a model of the hub."""
    assert spec.path is not None
    config = cached_file(spec.path, "config.json", revision=spec.revision)
    return f"{spec.path}@{Path(config).parent.name}"
