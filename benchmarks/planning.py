"""Planned and measured peak memory of whole training runs, in bytes of tensors, on a CPU.

    python benchmarks/planning.py --cases dev            # the cases that the estimator was made with
    python benchmarks/planning.py --cases validation     # chosen after it was frozen
    python benchmarks/planning.py --cases dev --only NAME

Each case is a recipe on models with random weights (built from configs; a quantised one is saved and loaded as any other),
planned by ``daekit.planning`` and run for two optimizer steps by the trainers that ``daekit train`` would build. Measured are
all tensors that live when training begins, and what torch's CPU allocator hands out at most above that, temporaries of
kernels included, from the profiler's allocation events. Each case has a process of its own.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from planning_cases import CASES, recipe_of
from torch.profiler import ProfilerActivity, profile


@contextmanager
def counting_bytes() -> Iterator[dict[str, int]]:
    """``{"peak": bytes}`` of all tensors: those that live before, and what torch's CPU allocator hands out inside.

    Kernels' own temporaries are included. What lives before is counted by its storages: weights are read by other threads and
    from mapped files, which the profiler does not see.
    """
    result: dict[str, int] = {}
    gc.collect()
    before = bytes_of_all_tensors()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield result
    assert profiler.profiler is not None
    live = peak = 0
    events = profiler.profiler.kineto_results.events()
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    result |= {"peak": before + peak, "before": before}


def bytes_of_all_tensors() -> int:
    """Of the storages of every tensor that Python knows, each once."""
    storages: dict[int, int] = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and thing.device.type == "cpu" and type(thing).__name__ != "FakeTensor":
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def write_rows(path: Path, count: int, length: int, words: int) -> None:
    """Rows of ``length`` tokens but for every fourth, which is shorter by a tenth, so that attention has a mask."""
    rng = random.Random(0)
    with path.open("w") as file:
        for index in range(count):
            tokens = [f"w{rng.randrange(words)}" for _ in range(length - (length // 10 if index % 4 == 3 else 0) - 1)]
            file.write(json.dumps({"prompt": tokens[0] + " ", "completion": " ".join(tokens[1:])}) + "\n")


def run(name: str, scale: str) -> dict[str, Any]:
    """Plan and measure one case."""
    from daekit.planning.machine import Machine
    from daekit.planning.plan import plan_recipe
    from daekit.recipe import load_recipe_text

    case = CASES[name].scaled(scale)
    with tempfile.TemporaryDirectory(prefix="daekit-planning-") as folder:
        root = Path(folder)
        prepare(case, root)
        recipe = load_recipe_text(yaml.safe_dump(recipe_of(case, root)), name)
        start = time.perf_counter()
        machine = Machine(memory=64 * 10**9, gpu=False)
        planned = plan_recipe(recipe, machine, only=["main"]).stages[0]
        seconds = time.perf_counter() - start
        measured = train(recipe)
    tensors = planned.memory.total - machine.overhead  # the interpreter's memory is not measured here
    return {
        "case": name,
        "scale": scale,
        "planned": tensors,
        "measured": measured["peak"],
        "measured_before_training": measured["before"],
        "error": round(tensors / measured["peak"] - 1, 4),
        "phase": planned.memory.phase,
        "parts": planned.memory.parts,
        "seconds_of_planning": round(seconds, 2),
    }


def prepare(case: Any, root: Path) -> None:
    """Data and tokenizer, and checkpoints of the models that are loaded."""
    from peft import LoraConfig, get_peft_model
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    words = case.vocabulary - 3
    core = Tokenizer(
        models.WordLevel(
            {w: i for i, w in enumerate(["<pad>", "</s>", "<unk>", *(f"w{i}" for i in range(words))])}, unk_token="<unk>"
        )
    )
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    tokenizer.save_pretrained(root / "tokenizer")
    for name, fields in case.checkpoints.items():
        config = AutoConfig.for_model(**(fields | {"vocab_size": case.vocabulary, "pad_token_id": 0, "eos_token_id": 1}))
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, case.checkpoint_dtype))
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    for name, (base, rank) in case.adapters.items():
        model = AutoModelForCausalLM.from_pretrained(root / base)
        lora = LoraConfig(task_type="CAUSAL_LM", r=rank, target_modules="all-linear")
        get_peft_model(model, lora).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    for domain in ("general", "shop"):
        write_rows(root / f"{domain}.jsonl", 64, case.length, words)


def train(recipe: Any) -> dict[str, int]:
    """The bytes of two optimizer steps of the stage `main`, without checkpoints."""
    from daekit.runtime.data import DataBuilder
    from daekit.runtime.models import ModelBuilder
    from daekit.runtime.trainer import build_trainer

    models = ModelBuilder(DataBuilder(recipe))
    trainer, _ = build_trainer(models, "main")
    with counting_bytes() as measured:
        trainer.train()
    return measured


def table_row(row: dict[str, Any]) -> str:
    """One line per run."""
    return (
        f"{row['case']:<26} {row['scale']:<7} planned {row['planned'] / 1e9:6.3f} GB  "
        f"measured {row['measured'] / 1e9:6.3f} GB  {row['error']:+.1%}  ({row['phase']})"
    )


def main() -> None:
    """Run the chosen cases one after another and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", choices=["dev", "validation"], default="dev")
    parser.add_argument("--only", help="the name of one case")
    parser.add_argument("--scales", default="1,batch,length")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--run", metavar="NAME", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run is not None:
        for scale in options.scales.split(","):
            print(json.dumps(run(options.run, scale)), flush=True)
        return
    results = []
    names = [name for name, case in CASES.items() if case.set == options.cases and options.only in (None, name)]
    for name in names:
        command = [sys.executable, __file__, "--run", name, "--scales", options.scales]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("{") and '"case"' in line:
                    results.append(json.loads(line))
                    print(table_row(results[-1]), flush=True)
        if process.returncode:
            raise SystemExit(f"{name}: failed; run it by itself: {' '.join(command)}")
    if options.json:
        options.json.write_text(json.dumps({"torch": torch.__version__, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
