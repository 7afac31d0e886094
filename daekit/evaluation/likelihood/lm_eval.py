"""EleutherAI's lm-eval as it is: our models in, its values out."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from daekit.errors import UserError, nearest
from daekit.evaluation.likelihood.common import Measured, MetricRow, hash_of
from daekit.progress import ProgressFunction
from daekit.recipe.suite import LMEvalSpec

_Z = 1.959963984540054  # of a 95 % interval
_LONGEST_PATH = 1000  # characters; longer texts are templates


class LMEval:
    """Tasks of lm-eval.

    Raises:
        UserError: lm-eval is not installed, or knows no such task.
    """

    def __init__(self, name: str, spec: LMEvalSpec) -> None:
        self.name, self.spec, self.where = name, spec, f"benchmarks.{name}"
        if importlib.util.find_spec("lm_eval") is None:
            raise UserError(
                f"{self.where}: lm-eval is not installed; run `pip install lm-eval==0.4.13`, or leave this benchmark out"
            )
        from lm_eval.tasks import TaskManager

        self.manager = TaskManager(include_path=spec.include_path)
        known = self.manager.all_tasks
        for task in spec.tasks:
            if task not in known:
                hint = nearest(task, known)
                raise UserError(f"{self.where}.tasks: lm-eval has no task {task!r}{hint}; your own need include_path")
        self.data = inputs(Path(spec.include_path).expanduser(), self.where) if spec.include_path else {}
        self.data["lm_eval"] = importlib.metadata.version("lm_eval")

    def check(self, name: str, tokenizer: Tokenizer, context_length: int | None) -> None:
        """A chat template, if tasks are to use it."""
        if self.spec.apply_chat_template and tokenizer.chat_template is None:
            raise UserError(
                f"{self.where}: the tokenizer of models.{name} has no chat template; leave apply_chat_template out, or set one"
            )

    def measure(
        self, model: PreTrainedModel, tokenizer: Tokenizer, batch_size: int, progress: ProgressFunction | None = None
    ) -> Measured:
        """Every metric of every task, with intervals from lm-eval's own standard errors."""
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        results = simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=list(self.spec.tasks),
            num_fewshot=self.spec.num_fewshot,
            limit=self.spec.limit,
            task_manager=self.manager,
            apply_chat_template=self.spec.apply_chat_template,
            log_samples=False,
        )
        found = Measured(rows=[row for task, values in results["results"].items() for row in self._rows(task, values, results)])
        found.notes.append(
            f"{self.name}: measured by lm-eval {self.data['lm_eval']}; intervals are 1.96 of its standard errors, clipped "
            "nowhere."
        )
        return found

    def _rows(self, task: str, values: dict[str, Any], results: dict[str, Any]) -> list[MetricRow]:
        count = int(results.get("n-samples", {}).get(task, {}).get("effective", 0))
        rows = []
        for key, value in values.items():
            metric, _, variant = key.partition(",")
            if not variant or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            error = values.get(f"{metric}_stderr,{variant}")
            spread = _Z * error if isinstance(error, (int, float)) else math.nan
            name = metric if variant == "none" else f"{metric}_{variant}"
            rows.append((task, name, float(value), value - spread, value + spread, count))
        return rows


def inputs(folder: Path, where: str) -> dict[str, str]:
    """File -> hash: every file in a directory of tasks (their code and templates too), and every local file that a task file
    names (``data_files``)."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and "__pycache__" not in file.parts]
    found = {str(file.relative_to(folder)): hash_of(file, where) for file in files}
    for file in files:
        if file.suffix not in (".yaml", ".yml"):
            continue
        try:
            # whatever their tags: ``!function`` names code, which is not run here
            events = list(yaml.parse(file.read_bytes(), Loader=yaml.SafeLoader))
        except yaml.YAMLError as error:
            raise UserError(f"{where}.include_path: {file} is no YAML ({error})") from error
        for text in (event.value for event in events if isinstance(event, yaml.ScalarEvent)):
            if "\n" not in text and len(text) < _LONGEST_PATH and Path(text).is_file():
                found[text] = hash_of(Path(text), where)
    return found
