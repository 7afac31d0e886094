"""The command line: ``daekit check | plan | generate | train | eval | chat...``; what the commands do is in ``commands.py``."""

from __future__ import annotations

import argparse
import io
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, get_args

from daekit import __version__, commands
from daekit.environment import rank
from daekit.errors import Stopped, UserError, says_disk_is_full
from daekit.recipe.model import Dtype

_OVERRIDES_HELP = "settings laid over the {}: key.sub=value, the value as YAML ({}=10)"
_COMMANDS = {  # what each does is a function of its name in ``commands``
    "check": "say what is wrong with a recipe, or show it with every default filled in",
    "preview": "show the first N rows of each source as the model will see them (N: 2)",
    "train": "run the stages of a recipe; what is finished is kept, what was stopped resumes",
    "plan": "say what a recipe needs, before anything is loaded: memory by part, what fits",
    "init": "make the students that a recipe makes from their teachers (search, slicing); no training",
    "cache": "write what teachers with a cache say about the rows of a recipe; no training",
    "generate": "write the rows of a recipe's generated sources (or of SOURCE); no training",
    "sweep": "run a recipe with each combination of settings (key=1e-5,3e-5 seed=0,1), and compare",
    "eval": "measure models with a suite: likelihood benchmarks, MT-Bench, AlpacaEval",
    "chat": "ask several models the same, and see their answers side by side",
    "schema": "print the JSON Schema of recipes or suites, by which editors complete them",
    "recipes": "list the recipes that come with daekit, or copy one into this directory",
    "merge": "fold a LoRA adapter into its 16-bit base, and compare the two",
    "quickstart": "KD, then DAE, in the small: on embedded data, on a CPU, in minutes",
}
_OF_A_RECIPE = ("check", "preview", "plan", "init", "cache", "generate", "train", "sweep")
_STATUS_OF_USER_ERROR = 2
_STATUS_OF_INTERRUPT = 130
_PATIENCE = 5.0  # seconds; torchrun looks after its processes ten times a second


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; ``arguments`` default to those of the process. Returns the exit status."""
    options = parse(arguments)
    _outlive_readers()
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_news)
    try:
        return options.run(options) or 0
    except UserError as error:
        _complain(f"daekit: error: {error}")
        return _STATUS_OF_USER_ERROR
    except Exception as error:  # the libraries that write have no class in common for it
        if not says_disk_is_full(error):
            raise
        _complain(f"daekit: error: the disk is full ({error}). Free some space; the same command goes on.")
        return _STATUS_OF_USER_ERROR
    except Stopped as stop:
        if rank() == 0:
            print(f"daekit: {stop}", file=sys.stderr, flush=True)
        return stop.status
    except KeyboardInterrupt:
        _complain("stopped; the same command resumes")
        return _STATUS_OF_INTERRUPT


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, read; overrides may stand behind options."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)  # argparse gives up on a list once an option has come between
    if any(text.startswith("-") for text in rest) or (rest and "overrides" not in options):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides += rest
    return options


class _Outliving(io.FileIO):
    """A stream that ignores a broken pipe (``| head``, a ``| tee`` that was killed): what is written later goes nowhere."""

    def write(self, data: Any, /) -> int:
        """Write; to nowhere once nobody reads."""
        try:
            return super().write(data)  # type: ignore[return-value]  # None where a stream that does not block is full
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            return len(data)


def _outlive_readers() -> None:
    """Keep a run from ending because nobody reads what it prints any more: hours of training are worth more than lines."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None or stream is not getattr(sys, f"__{name}__"):
            continue  # closed, or somebody else's
        stream.flush()
        raw = _Outliving(stream.fileno(), "w", closefd=False)
        how = {key: getattr(stream, key) for key in ("encoding", "errors", "line_buffering", "write_through")}
        setattr(sys, name, io.TextIOWrapper(io.BufferedWriter(raw), **how))


def _complain(message: str) -> None:
    """Print to stderr, of several ranks the main process first: the launcher then ends the others before they say it again.

    A rank that is still there after a while has an error that the main process does not know of.
    """
    if rank() != 0:
        time.sleep(_PATIENCE)
        message = f"[rank {rank()}] {message}"
    print(message, file=sys.stderr, flush=True)


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a record is to be shown: bitsandbytes complains on import of a kernel that daekit does not use."""
    return "Failed to load CPU gemm_4bit_forward" not in str(record.msg)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="daekit",
        description="Distil a large language model into a small one, then align it to a domain without forgetting the rest.",
    )
    parser.add_argument("--version", action="version", version=f"daekit {__version__}")
    parsers = parser.add_subparsers(required=True, metavar="COMMAND")
    command = {name: parsers.add_parser(name, help=helped) for name, helped in _COMMANDS.items()}
    for name, each in command.items():
        each.set_defaults(run=getattr(commands, name))
    for name in _OF_A_RECIPE:
        command[name].add_argument("recipe", metavar="RECIPE", help="a YAML file")
    command["check"].add_argument(
        "--deep", action="store_true", help="open everything that a run will need (rows, tokenizers, models, suites), too"
    )
    command["cache"].add_argument(
        "--check", action="store_true", help="ask the teachers again about some rows, and say what differs"
    )
    command["quickstart"].add_argument("--output-dir", metavar="DIR", help="where to write (default: the recipe's output_dir)")
    _add_plan(command["plan"])
    _add_eval(command["eval"])
    _add_chat(command["chat"])
    _add_looks(command["schema"], command["recipes"])
    _add_merge(command["merge"])
    of_grace = "what SIGTERM, SIGHUP, SIGUSR1 or Ctrl-C leave the run to save a checkpoint at its next step (default: 25)"
    for name in ("init", "cache", "generate", "train", "sweep", "quickstart"):
        command[name].add_argument("--grace", metavar="SECONDS", type=_number(float), default=25.0, help=of_grace)
    for name in ("check", "preview", "cache", "generate", "train", "sweep", "eval", "chat"):
        _add_permissions(command[name])
    of_eval = _OVERRIDES_HELP.format("suite", "benchmarks.blimp.limit")
    of_recipe = _OVERRIDES_HELP.format("recipe", "stages.kd.trainer.max_steps")
    for name in (*_OF_A_RECIPE, "quickstart", "eval"):
        metavar = {"preview": "[N] key=value", "generate": "[SOURCE] key=value"}.get(name, "key=value")
        helped = of_eval if name == "eval" else of_recipe
        command[name].add_argument("overrides", metavar=metavar, nargs="*", default=[], help=helped)
    return parser


def _add_plan(plan: argparse.ArgumentParser) -> None:
    plan.add_argument("--gpu", metavar="SIZE", help="memory of one GPU: 80GB, 24GiB (default: this machine's)")
    plan.add_argument("--cpu", metavar="SIZE", help="memory for a run without GPU")
    plan.add_argument("--gpus", metavar="N", type=int, default=1, help="how many, one process each")
    plan.add_argument("--engine", choices=["ddp", "fsdp2", "zero2", "zero3"], help="how they share the work (default: ddp)")
    plan.add_argument("--tflops", metavar="RATE", type=_number(float), help="TFLOP/s of one device, for the time of a step")
    plan.add_argument("--json", action="store_true", help="print JSON")


def _add_looks(schema: argparse.ArgumentParser, recipes: argparse.ArgumentParser) -> None:
    schema.add_argument("kind", nargs="?", choices=["recipe", "suite"], default="recipe")
    recipes.add_argument("action", nargs="?", choices=["list", "copy"], help="copy: write one here; nothing is overwritten")
    recipes.add_argument("name", nargs="?", metavar="NAME")


def _add_merge(merge: argparse.ArgumentParser) -> None:
    merge.add_argument("adapter", metavar="ADAPTER_DIR", help="a directory with adapter_config.json and its safetensors")
    merge.add_argument("out", metavar="OUT", help="the directory to make")
    merge.add_argument("--dtype", default="auto", choices=get_args(Dtype), help="of the result (default: that of the base)")


def _add_permissions(command: argparse.ArgumentParser) -> None:
    key = "environment variable that may be sent as a key to whatever endpoint the suite names"
    command.add_argument("--allow-key-env", metavar="NAME", action="append", default=[], help=key)
    command.add_argument("--allow-http", action="store_true", help="http to other machines: questions and keys go unencrypted")


def _add_eval(command: argparse.ArgumentParser) -> None:
    command.add_argument("suite", metavar="SUITE", help="a YAML file, such as those in eval/suites")
    model = "a directory, PATH+ADAPTER, a hub id, or http(s)://HOST/v1#MODEL; several are compared"
    command.add_argument("--model", metavar="NAME=MODEL", action="append", default=[], help=model)
    command.add_argument("--output", metavar="DIR", help="where to write (default: the suite's output_dir)")
    command.add_argument("--dry-run", action="store_true", help="say what would be done and what the judge would cost")
    command.add_argument("--max-calls", metavar="N", type=_number(int), help="calls that one judge or endpoint may get")
    command.add_argument("--max-cost", metavar="X", type=_number(float), help="dollars that one judge may cost")
    missing = "give a score although up to N judgments of the model are missing"
    command.add_argument("--allow-missing", metavar="N", type=_number(int, zero=True), default=0, help=missing)
    command.add_argument("--score-parser", choices=["strict", "fastchat"], help="how a rating is read (default: the suite's)")


def _add_chat(command: argparse.ArgumentParser) -> None:
    model = "a directory, PATH+ADAPTER, a hub id, http(s)://HOST/v1#MODEL, or RUN:STAGE; NAME=MODEL gives it a name"
    command.add_argument("models", metavar="MODEL", nargs="+", help=model)
    command.add_argument("--system", metavar="TEXT", help="a system message (default: what the chat template does without one)")
    command.add_argument("--max-new-tokens", metavar="N", type=_number(int), default=512, help="of an answer (default: 512)")
    command.add_argument(
        "--temperature", metavar="T", type=_number(float, zero=True), default=0.0, help="0 (default): the likeliest tokens"
    )
    prompts = "answer these (JSONL, Parquet, or .txt with one on each line) instead"
    command.add_argument("--prompts", metavar="FILE", help=prompts)
    key = "environment variable that holds the key of an endpoint; MODEL= where several hosts are asked"
    command.add_argument("--key-env", metavar="[MODEL=]NAME", action="append", default=[], help=key)
    command.add_argument("--output", metavar="FILE", help="with --prompts: where to write Markdown (default: to the terminal)")


def _number(kind: Callable[[str], float], zero: bool = False) -> Callable[[str], float]:
    """A type for argparse: finite numbers above 0, or (``zero``) from 0 on."""

    def number(text: str) -> float:
        value = kind(text)
        if not 0 <= value < float("inf") or (value == 0 and not zero):
            raise argparse.ArgumentTypeError(f"{text} must {'not be negative' if zero else 'be greater than 0'}")
        return value

    number.__name__ = kind.__name__  # argparse says of other texts: invalid int value
    return number
