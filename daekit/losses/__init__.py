"""Losses: each turns the student's state and its teachers' outputs into a sum over loss positions.

The loss of one step, in the order in which it is computed:

1.  A position t of a row carries loss if the token at t + 1 has a label (is not -100); these are the N loss positions
    (``Batch.loss_mask_BT``: the one shift in the project).
2.  The teachers run first, without gradient and in eval mode, each on its own rows (``teachers/routed.py``). Each gives, for
    the M of the N positions that it covers, its hidden states and its output head (or its K most likely tokens).
3.  The student runs, without its output head: ``[B, T, H]`` hidden states, of which N are taken. While it runs its attention
    and hidden states are compared with the teachers' features, layer by layer (``attention.py``, ``hidden.py``).
4.  In chunks of some hundred positions (``prediction.py``) hidden states times output head give logits of both models, only
    the V columns that the tokenizer has.
5.  Of a chunk's logits (``chunk.py``; on CUDA one kernel, ``kernels/prediction.py``): CE with the label at temperature 1, and
    ``T^2 * D(teacher, student)`` at temperature T (``divergences.py``; of top-K teachers ``top_k.py``), in nats per position;
    and the gradient of ``ce_weight * CE + prediction_weight * T^2 * D`` with respect to the logits, written over them.
6.  The gradient of the logits is at once turned into that of hidden states and head, and the chunk's logits are dropped:
    nothing of size N x V exists, and the backward pass only scales what is there (``gradients.py``, under all three losses).
7.  All values are summed over the positions, in float64. With attention_weight and hidden_weight times the means over layers
    (and heads) of their sums this is the sum of the micro-batch.
8.  The trainer divides once, by the loss tokens of the global batch: all ranks, all micro-batches (``trainers/loss.py``).
"""

from daekit.losses.prediction import PredictionSums, prediction_loss
from daekit.recipe.objective import DIVERGENCES, Objective

__all__ = ["DIVERGENCES", "Objective", "PredictionSums", "prediction_loss"]
