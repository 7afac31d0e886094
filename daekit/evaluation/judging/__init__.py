"""Answers rated by a judge: MT-Bench through fschat, AlpacaEval through alpaca_eval, both through one client.

===========================  ===============================  =============================================================
domain                       metric                           value
===========================  ===============================  =============================================================
``mt_bench``                 ``judge_score``                  mean rating, 1 to 10 (``show_result``'s "Average")
``mt_bench/turn_1``          ``judge_score``                  of the first turn; ``mt_bench/turn_2`` likewise
``mt_bench/writing``...      ``judge_score``                  of one category, both turns
``mt_bench``                 ``pairwise_win_rate``            share of games won, 0 to 1, as ``show_result`` prints it
``mt_bench``                 ``pairwise_win_rate_adjusted``   the same, a tie being half a win
``mt_bench``                 ``position_consistency``         share of games with the same verdict in both orders
``alpaca_eval``              ``win_rate``                     percent, as alpaca_eval prints it
``alpaca_eval``              ``length_controlled_win_rate``   percent; only with everything official at hand
either                       ``missing_judgments``            judgments that are not there; ``n`` is how many there should be
===========================  ===============================  =============================================================

``n`` counts questions, which are also what the bootstrap resamples. A model with more missing judgments than
``allow_missing`` has no row but ``missing_judgments``; what is missing and why is said in ``Judged.refusals``.
"""

from daekit.evaluation.judging.alpaca import AlpacaEval
from daekit.evaluation.judging.mt_bench import MTBench
from daekit.evaluation.judging.result import Judged, JudgedBenchmark

__all__ = ["AlpacaEval", "Judged", "JudgedBenchmark", "MTBench"]
