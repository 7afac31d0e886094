"""Leaves the terminal to what daekit itself says, and of several ranks to the main process."""

from __future__ import annotations

import logging
import warnings

import datasets
import transformers
from accelerate import PartialState

# What libraries say of their own affairs at every start; what they say of a user's settings is left alone.
_MESSAGES = (
    ".*pin_memory.*",
    ".*_pattern keys did not match any targeted module.*",  # PEFT, of names that it has converted itself
    "Could not find a config file in .* will assume that the vocabulary was not modified.*",
)


def quieten() -> None:
    """One line per log: progress bars of a second each and warnings of libraries about themselves go."""
    logging.getLogger("daekit").setLevel(logging.ERROR)  # the heading of a stage says what became of its rows
    for known_in_training_only in ("ranks", "rollouts"):
        logging.getLogger(f"daekit.trainers.{known_in_training_only}").setLevel(logging.WARNING)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    for module in ("transformers", "peft", "trl", "torch", "bitsandbytes"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=module)
    for message in _MESSAGES:
        warnings.filterwarnings("ignore", message=message)


def say(*lines: str) -> None:
    """Print lines, of several ranks on the main process alone."""
    for line in lines if PartialState().is_main_process else ():
        print(line, flush=True)
