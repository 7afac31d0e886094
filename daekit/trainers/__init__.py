"""Trainers: trl.SFTTrainer for rows with a domain, for distillation, and for alignment from experts."""

from daekit.trainers.config import DAEConfig, DomainSFTConfig, KDConfig
from daekit.trainers.dae import DAETrainer
from daekit.trainers.domain_sft import DomainSFTTrainer
from daekit.trainers.kd import KDTrainer

__all__ = ["DAEConfig", "DAETrainer", "DomainSFTConfig", "DomainSFTTrainer", "KDConfig", "KDTrainer"]
