"""The pass-through to lm-eval: its values are those of our own minimal pairs on the same items."""

from __future__ import annotations

import importlib.util
import itertools
import json

import pytest
import yaml

from daekit.errors import UserError
from daekit.evaluation.likelihood import likelihood_benchmark
from daekit.evaluation.likelihood.lm_eval import inputs
from daekit.recipe.suite import LMEvalSpec, MinimalPairsSpec
from tests.helpers import tiny
from tests.helpers.suite_world import build_world

MISSING = importlib.util.find_spec("lm_eval") is None


@pytest.mark.skipif(not MISSING, reason="lm-eval is installed")
def test_without_lm_eval_the_remedy_is_named():
    with pytest.raises(UserError, match="pip install lm-eval"):
        likelihood_benchmark("lm", LMEvalSpec(tasks=("arc_easy",)))


@pytest.mark.skipif(MISSING, reason="lm-eval is not installed")
def test_a_task_of_ones_own_offline(tmp_path):
    world = build_world(tmp_path)
    file = world / "pairs" / "paradigm_1.jsonl"
    task = {
        "task": "mine",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"train": str(file)}},
        "output_type": "multiple_choice",
        "validation_split": "train",
        "doc_to_text": "",
        "doc_to_target": 0,
        "doc_to_choice": "{{[sentence_good, sentence_bad]}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "mine.yaml").write_text(yaml.safe_dump(task))
    model, tokenizer = tiny.model(seed=1).eval(), tiny.tokenizer()
    benchmark = likelihood_benchmark("lm", LMEvalSpec(tasks=("mine",), include_path=str(tmp_path / "tasks")))
    found = benchmark.measure(model, tokenizer, 4)
    (row,) = [row for row in found.rows if row[1] == "acc"]
    ours = likelihood_benchmark("p", MinimalPairsSpec(path=str(file))).measure(model, tokenizer, 4)
    assert row[0] == "mine" and row[5] == len(file.read_text().splitlines())
    assert row[2] == pytest.approx(ours.values["p", "paradigm_1", "accuracy"].mean)
    assert row[3] < row[2] < row[4] and json.dumps(found.rows)
    with pytest.raises(UserError, match="no task 'mina'; did you mean 'mine'"):
        likelihood_benchmark("lm", LMEvalSpec(tasks=("mina",), include_path=str(tmp_path / "tasks")))


def test_everything_that_a_task_reads_decides_whether_it_is_measured_again(tmp_path):
    data, tasks = tmp_path / "data.jsonl", tmp_path / "tasks"
    (tasks / "a").mkdir(parents=True)
    (tasks / "b").mkdir()
    data.write_text("{}")
    for name in ("a", "b"):
        text = f"task: {name}\ndataset_kwargs: {{data_files: {{test: [{data}]}}}}\ndoc_to_text: !function utils.text\n"
        (tasks / name / "task.yaml").write_text(text)
        (tasks / name / "utils.py").write_text("def text(doc): return 1")
    seen = [inputs(tasks, "benchmarks.lm")]
    for file in (data, tasks / "a" / "task.yaml", tasks / "b" / "task.yaml", tasks / "a" / "utils.py"):
        file.write_text(file.read_text() + "\n")
        seen.append(inputs(tasks, "benchmarks.lm"))
    assert all(one != two for one, two in itertools.pairwise(seen))
    assert inputs(tasks, "benchmarks.lm") == seen[-1] and len(seen[-1]) == 5
    (tasks / "a" / "task.yaml").write_text("{")
    with pytest.raises(UserError, match=r"task\.yaml is no YAML"):
        inputs(tasks, "benchmarks.lm")
