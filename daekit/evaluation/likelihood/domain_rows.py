"""Rows of a domain: likelihood of their answers, generated answers, and the distance to a reference model."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from daekit.data.fingerprint import data_fingerprint
from daekit.data.sources import load_rows
from daekit.errors import UserError
from daekit.evaluation.evaluate import evaluate_model
from daekit.evaluation.likelihood.common import Measured, require_context
from daekit.evaluation.models import file_fingerprint
from daekit.evaluation.sets import EvaluationSet, tokenize_rows
from daekit.models.adapters import tokenizer_spec
from daekit.models.loading import load_model, load_tokenizer_of
from daekit.models.vocabulary import differences
from daekit.progress import ProgressFunction
from daekit.recipe.schema import EvaluationSpec, SourceSpec
from daekit.recipe.suite import RowsSpec


class Rows:
    """Rows of a domain, read as a recipe reads its validation rows.

    Raises:
        UserError: what ``daekit.data.sources`` says of the file.
    """

    def __init__(self, name: str, spec: RowsSpec) -> None:
        self.name, self.spec, self.where = name, spec, f"benchmarks.{name}"
        self.domain = spec.domain or name
        same = ("path", "split", "name", "revision", "columns", "chat")
        source = SourceSpec(domain=self.domain, **{key: getattr(spec, key) for key in same})
        self.dataset = load_rows(self.where, source, spec.limit)
        self.data = {Path(spec.path).name: data_fingerprint(self.dataset)}
        if spec.reference is not None and spec.reference.path is not None:
            for file, digest in (file_fingerprint(Path(spec.reference.path).expanduser()) or {}).items():
                self.data[f"reference/{file}"] = digest  # it may be trained again under the same name

    def check(self, name: str, tokenizer: Tokenizer, context_length: int | None) -> None:
        """The rows can be tokenised and fit; the reference has the model's tokenizer."""
        rows = self.rows(tokenizer).rows
        lengths = [len(row.input_ids) for row in rows]
        if self.spec.generate:
            lengths += [len(row.prompt_ids) + self.spec.max_new_tokens for row in rows if row.prompt_ids is not None]
        remedy = "set max_length and overlong: drop to leave such rows out, or a smaller max_new_tokens"
        require_context(name, self.where, max(lengths), context_length, remedy)
        if self.spec.reference is not None:
            names = f"models.{name}", "the reference"
            try:
                theirs = load_tokenizer_of(tokenizer_spec(self.spec.reference))
            except UserError as error:
                raise UserError(f"{self.where}.reference: {error}") from error
            if found := differences(tokenizer, theirs, names):
                raise UserError(
                    f"{self.where}.reference: its tokenizer is not that of {names[0]}, so that its distribution is over other "
                    f"tokens: {'; '.join(found)}. Use a reference that shares the tokenizer, or leave it out."
                )

    def measure(
        self, model: PreTrainedModel, tokenizer: Tokenizer, batch_size: int, progress: ProgressFunction | None = None
    ) -> Measured:
        """What ``evaluate_model`` measures."""
        rows = self.rows(tokenizer)
        reference: PreTrainedModel | None = None
        if self.spec.reference is not None:
            loaded = load_model(self.spec.reference)
            reference = loaded if self.spec.reference.quantization else loaded.to(model.device)
        how = EvaluationSpec(generate=self.spec.generate, max_new_tokens=self.spec.max_new_tokens, batch_size=batch_size)
        shown = None if progress is None else lambda _, done, total: progress(done, total)
        result = evaluate_model("", model, tokenizer, {self.name: rows}, spec=how, reference=reference, progress=shown)
        items = [{"row": at, "generated": text} for at, text in enumerate(result.generated.get(self.name, []))]
        return Measured(result.values, items, rows.notes(self.name), result.generated)

    def rows(self, tokenizer: Tokenizer) -> EvaluationSet:
        """The rows as a tokenizer cuts them."""
        spec = self.spec
        return tokenize_rows(
            self.dataset, tokenizer, source=self.name, domain=self.domain, max_length=spec.max_length, overlong=spec.overlong
        )
