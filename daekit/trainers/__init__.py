"""Trainers for TRL scripts and recipes.

There is one trainer, ``KDTrainer``: ``trl.SFTTrainer`` whose student follows a teacher. ``DAETrainer`` is a KDTrainer whose
teacher routes each row by its domain; ``DomainSFTTrainer`` is a KDTrainer without a teacher. Each has a config: what all share
is in ``DomainSFTConfig``, to which ``KDConfig`` adds the weights of the losses and ``DAEConfig`` the reference's domains.
"""

from daekit.trainers.config import DAEConfig, DomainSFTConfig, KDConfig
from daekit.trainers.dae import DAETrainer
from daekit.trainers.kd import KDTrainer
from daekit.trainers.sft import DomainSFTTrainer

__all__ = ["DAEConfig", "DAETrainer", "DomainSFTConfig", "DomainSFTTrainer", "KDConfig", "KDTrainer"]
