"""A suite from its spec to its report: prepared, checked, measured model by model, judged, written.

::

    OUTPUT_DIR/
      suite.yaml                    the suite, every default written out
      report.html, .md, .json       the report; samples.jsonl
      manifest.json                 what makes the scores repeatable
      BENCHMARK/results/MODEL.json  what was measured, kept for the next run; items/MODEL.jsonl: row by row
      BENCHMARK/model_answer/       answers in FastChat's format
      BENCHMARK/model_judgment/     judgments in FastChat's or alpaca_eval's formats, and every reply of the judge
"""

from daekit.evaluation.suites.prepare import Options, Prepared, prepare
from daekit.evaluation.suites.run import require_askable, run_prepared, run_suite

__all__ = ["Options", "Prepared", "prepare", "require_askable", "run_prepared", "run_suite"]
