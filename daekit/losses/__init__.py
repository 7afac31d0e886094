"""Losses: each turns the student's state and a teacher's Signal into a sum over kept positions."""

from daekit.losses.divergences import divergence, forward_kl, jsd, reverse_kl
from daekit.losses.prediction import PredictionSums, PredictionTerms, prediction_loss

__all__ = ["PredictionSums", "PredictionTerms", "divergence", "forward_kl", "jsd", "prediction_loss", "reverse_kl"]
