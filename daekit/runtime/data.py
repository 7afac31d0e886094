"""The rows of a recipe: each source is read once, mixed for each stage, tokenised for the report."""

from __future__ import annotations

import json

from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from daekit.data.mixture import Mixture, in_common_features, mix
from daekit.data.sources import load_source
from daekit.data.tokenizer import load_tokenizer, source_texts, train_tokenizer
from daekit.errors import UserError
from daekit.evaluation import EvaluationSet, tokenize_rows
from daekit.models.adapters import base_spec
from daekit.models.loading import load_tokenizer_of
from daekit.recipe.schema import MixtureSpec, Recipe, SourceSpec
from daekit.runtime.folders import RunFolder, read_file


class DataBuilder:
    """Sources of one run, read when they are first needed."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self._read: dict[str, tuple[Dataset, Dataset | None]] = {}

    def source(self, name: str) -> tuple[Dataset, Dataset | None]:
        """(training rows, validation rows or None) of a source."""
        if name not in self._read:
            self._read[name] = load_source(name, self.recipe.sources[name], self.recipe.seed)
        return self._read[name]

    def mixture(self, spec: MixtureSpec) -> Mixture:
        """The training rows of a stage."""
        return mix({name: self.source(name)[0] for name in spec.sources}, spec, self.recipe.seed)

    def validation(self, spec: MixtureSpec) -> Dataset | None:
        """The validation rows of the sources of a stage, one after another."""
        parts = [rows for name in spec.sources if (rows := self.source(name)[1]) is not None]
        return concatenate_datasets(in_common_features(parts)) if parts else None

    def evaluation_sets(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, EvaluationSet]:
        """The tokenised validation rows of the report's sources."""
        spec = self.recipe.evaluation
        assert spec is not None
        sets = {}
        for name in spec.sources:
            rows = self.source(name)[1]
            if rows is not None:
                domain = self.recipe.sources[name].domain
                sets[name] = tokenize_rows(rows, tokenizer, source=name, domain=domain, limit=spec.limit)
        return sets

    def tokenizer(self, folder: RunFolder) -> PreTrainedTokenizerBase:
        """The tokenizer of the run: the recipe's own (trained once, then read from the run's folder), or the first student's.

        Raises:
            UserError: it cannot be loaded or trained.
        """
        spec = self.recipe.tokenizer
        if spec is None:
            first = next(iter(self.recipe.stages.values())).student
            first = first.init.from_ if first and first.init else first
            assert first is not None, "checked when the recipe was loaded"
            return load_tokenizer_of(base_spec(first))
        if spec.train is None:
            return load_tokenizer(spec)
        facts: dict[str, object] = {name: _training(self.recipe.sources[name]) for name in spec.train.sources}
        facts["train"] = spec.train.model_dump(mode="json")
        facts_file = folder.tokenizer / "trained_on.json"
        if facts_file.is_file() and read_file(facts_file, delete=folder.tokenizer) != facts:
            raise UserError(
                f"{folder.tokenizer}: was trained with other settings or sources. Delete it and the stages that use it, "
                "or choose another output_dir."
            )
        if not folder.tokenizer.is_dir():
            texts = (text for name in spec.train.sources for text in source_texts(self.source(name)[0]))
            trained = train_tokenizer(texts, spec.train)
            half = folder.tokenizer.with_suffix(".half")
            trained.save_pretrained(half)
            (half / facts_file.name).write_text(json.dumps(facts))
            half.rename(folder.tokenizer)
        return load_tokenizer(spec.model_copy(update={"train": None, "path": str(folder.tokenizer)}))


def _training(source: SourceSpec) -> dict[str, object]:
    """The part of a source's spec that decides its training rows."""
    return {key: value for key, value in source.model_dump(mode="json").items() if not key.startswith("validation")}
