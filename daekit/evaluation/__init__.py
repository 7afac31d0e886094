"""What a model knows: every model x every domain, what was gained and what was forgotten.

=======================  ========  =====================================================================================
metric                   better    value
=======================  ========  =====================================================================================
``nll``                  lower     negative log-likelihood of the loss tokens, nats per token
``perplexity``           lower     ``exp(nll)``
``token_accuracy``       higher    share of loss tokens that are the model's first choice, given the true text before
``exact_match``          higher    share of greedily generated answers that are the row's answer to the letter
``answer_match``         higher    share of generated answers that hold the row's ``answer`` as whole words, in any style
``rouge_l``              higher    F-measure of the longest common subsequence of words of the generated and the row's answer
``accuracy``             higher    minimal pairs: share of pairs whose good sentence is the likelier; multiple choice: share of
                                   questions whose right answer is the likeliest (also ``_per_token``, ``_per_byte``)
``bits_per_byte``        lower     negative log2-likelihood of a text divided by its bytes in UTF-8
``kl_to_reference``      lower     as ``kl_to_teacher``, to the reference of the dae stages or to the model that a suite names
``kl_to_teacher``        lower     KL(teacher || model) on the loss tokens at temperature 1, nats per token
``<metric>_gain``        higher    on the domains: how much better than the baseline (``nll``: how much lower)
``<metric>_forgetting``  lower     on the reference domains: how much worse than the baseline (``nll``: how much higher)
=======================  ========  =====================================================================================

``<metric>`` is any of those above but ``perplexity`` and the KLs. Scores of judges: ``daekit.evaluation.judging``. ``n``
counts rows of the data, which are also what the bootstrap resamples; token metrics are ratios of sums over the rows. A
domain's row pools the rows of all its sources; if it has several, each has rows of its own under ``domain/source``.
"""

from daekit.evaluation.evaluate import ModelEvaluation, compare, evaluate_model, select_samples
from daekit.evaluation.sets import EvaluationSet, tokenize_rows

__all__ = ["EvaluationSet", "ModelEvaluation", "compare", "evaluate_model", "select_samples", "tokenize_rows"]
