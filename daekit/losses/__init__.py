"""Losses: each turns the student's state and a teacher's Signal into a sum over kept positions."""

from daekit.losses.divergences import DIVERGENCES, divergence
from daekit.losses.prediction import PredictionSums, PredictionTerms, prediction_loss

__all__ = ["DIVERGENCES", "PredictionSums", "PredictionTerms", "divergence", "prediction_loss"]
