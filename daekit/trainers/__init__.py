"""Trainers: trl.SFTTrainer for distillation, for alignment from experts, and for rows with a domain."""

from daekit.trainers.config import DAEConfig, DomainSFTConfig, KDConfig
from daekit.trainers.dae import DAETrainer
from daekit.trainers.kd import KDTrainer
from daekit.trainers.sft import DomainSFTTrainer

__all__ = ["DAEConfig", "DAETrainer", "DomainSFTConfig", "DomainSFTTrainer", "KDConfig", "KDTrainer"]
