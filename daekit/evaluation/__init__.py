"""What a model knows: every model x every domain, what was gained and what was forgotten.

=======================  ========  =====================================================================================
metric                   better    value
=======================  ========  =====================================================================================
``nll``                  lower     negative log-likelihood of the kept tokens, nats per token
``perplexity``           lower     ``exp(nll)``
``token_accuracy``       higher    share of kept tokens that are the model's first choice, given the true text before
``exact_match``          higher    share of greedily generated answers that are the row's answer to the letter
``answer_match``         higher    share of generated answers that hold the row's ``answer`` as whole words, in any manner
``kl_to_teacher``        lower     KL(teacher || model) on the kept tokens at temperature 1, nats per token
``<metric>_gain``        higher    on the domains: how much better than the baseline (``nll``: how much lower)
``<metric>_forgetting``  lower     on the reference domains: how much worse than the baseline (``nll``: how much higher)
=======================  ========  =====================================================================================

``<metric>`` is ``exact_match``, ``answer_match``, ``token_accuracy`` or ``nll``. ``n`` counts rows of the data, which
are also what the bootstrap resamples; token metrics are ratios of sums over the rows. A domain's row pools the rows of
all its sources; if it has several, each has rows of its own under ``domain/source``.
"""

from daekit.evaluation.compare import compare, select_samples
from daekit.evaluation.evaluate import ModelEvaluation, evaluate_model
from daekit.evaluation.sets import EvaluationSet, TokenizedRow, tokenize_rows

__all__ = [
    "EvaluationSet",
    "ModelEvaluation",
    "TokenizedRow",
    "compare",
    "evaluate_model",
    "select_samples",
    "tokenize_rows",
]
