"""Host memory while several ranks load a student and its teacher: each its own part, or (``whole``) each everything.

A Mixtral teacher and a Mistral student of random weights are written in several shards to a temporary folder (deleted
afterwards). The ranks are started by ``accelerate launch`` over gloo; they run a recipe and stop before its first step. Of the
time between the imports and that step (under ZeRO-3 DeepSpeed's optimizer is made before it) this measures

    peak of a rank   its highest resident memory above the level after the imports (mapped pages of files count)
    in sum           the highest sum of the ranks' proportional memory (PSS: a page that n ranks share counts 1/n in each),
                     which is what `daekit plan` plans

and the same without files: the anonymous memory that the system cannot take back. glibc is told to return what is freed
(MALLOC_MMAP_THRESHOLD_): by itself it keeps freed blocks of up to 32 MB, of which aligned ones are not used again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from harness import machine_facts
from loading import write_checkpoint

ROOT = Path(__file__).resolve().parents[1]
GIB = 2**30
TEACHER = dict(hidden_size=1024, intermediate_size=2048, num_hidden_layers=10, num_local_experts=8)  # 1.2 GB in bfloat16
STUDENT = dict(hidden_size=1024, intermediate_size=2816, num_hidden_layers=12)  # 0.36 GB in bfloat16
RECIPE = """\
name: loading
output_dir: FOLDER/run
tokenizer: {path: FOLDER/student}
sources: {text: {domain: general, path: FOLDER/rows.jsonl}}
stages:
  kd:
    type: kd
    student: {path: FOLDER/student, dtype: float32}
    teacher: {path: FOLDER/teacher}
    data: [text]
    trainer: {use_cpu: true, max_steps: 1, per_device_train_batch_size: 1, max_length: 32, optim: sgd, save_strategy: "no",
              gradient_checkpointing: false}
"""
SMALL = dict(hidden_size=256, intermediate_size=512, num_hidden_layers=4)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", default=["fsdp2"], choices=["fsdp2", "zero3"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--names", nargs="+", default=["parts", "whole"], choices=["parts", "whole"])
    parser.add_argument("--small", action="store_true", help="models of a few MB: does everything work?")
    parser.add_argument("--folder", help="where the models are written for the time being")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--run", nargs=2, metavar=("NAME", "FOLDER"), help="be one rank")
    options = parser.parse_args()
    if options.run:
        rank(options.run[0], Path(options.run[1]))
        return
    options.device, options.dtype, options.repeats = torch.device("cpu"), torch.bfloat16, 1
    facts = machine_facts(options)
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        sizes = write_models(folder, options.small)
        rows = [
            measure(engine, count, name, folder) | sizes | facts
            for engine in options.engines
            for count in options.ranks
            for name in options.names
        ]
    finally:
        shutil.rmtree(folder)
    if options.json:
        options.json.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")


def write_models(folder: Path, small: bool) -> dict[str, float]:
    """Student, teacher and a tokenizer; GiB of both in memory: the teacher as stored, the student in float32."""
    sys.path.insert(0, str(ROOT))
    from transformers import AutoModelForCausalLM, MistralConfig

    from tests.helpers import tiny

    teacher = sum(write_checkpoint(folder / "teacher", SMALL | {"num_local_experts": 8} if small else TEACHER))
    config = MistralConfig(**(SMALL if small else STUDENT), vocab_size=1000, num_attention_heads=16, num_key_value_heads=8)
    student = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    student.save_pretrained(folder / "student", max_shard_size="80MB")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny.rows(16, domains=("general",))))
    (folder / "recipe.yaml").write_text(RECIPE.replace("FOLDER", str(folder)))
    for name in ("student", "teacher"):
        tiny.tokenizer().save_pretrained(folder / name)
    return {"teacher_gib": teacher / GIB, "student_gib": student.num_parameters() * 4 / GIB}


def measure(engine: str, ranks: int, name: str, folder: Path) -> dict[str, Any]:
    """One launch."""
    out = folder / f"{engine}-{ranks}-{name}"
    out.mkdir()
    config = ROOT / "recipes" / "accelerate" / f"{engine}.yaml"
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    launcher += ["--num_processes", str(ranks), "--main_process_port", "0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    environment["MALLOC_MMAP_THRESHOLD_"] = str(2**20)
    with open(out / "log", "w") as log:
        process = subprocess.Popen([*launcher, __file__, "--run", name, str(out)], stdout=log, stderr=log, env=environment)
        try:
            highest = watch(process, out, ranks)
        finally:
            process.terminate()  # its launcher ends the ranks
    if process.returncode:
        sys.exit((out / "log").read_text()[-4000:])
    found = [json.loads((out / f"{index}.json").read_text()) for index in range(ranks)]
    row = {"engine": engine, "ranks": ranks, "name": name, "seconds": max(each["seconds"] for each in found)}
    row |= {"rank_peak_gib": [each["peak_gib"] for each in found], "rank_held_gib": [each["held_gib"] for each in found]}
    row |= {f"sum_{key}_gib": value / GIB for key, value in highest.items()}
    row |= {
        "level_sum_gib": sum(each["level"]["Pss"] for each in found) / GIB,
        "planned_gib": planned("ddp" if name == "whole" else engine, ranks, folder),
    }
    peaks = ", ".join(f"{peak:.2f}" for peak in row["rank_peak_gib"])
    print(
        f"{engine} {ranks} ranks {name:<6} peak of each rank {peaks} GiB; in sum {row['sum_Pss_gib']:.2f} GiB (without files "
        f"{row['sum_Pss_Anon_gib']:.2f}, before {row['level_sum_gib']:.2f}), planned {row['planned_gib']:.2f}; "
        f"{row['seconds']:.0f} s",
        flush=True,
    )
    return row


def planned(engine: str, ranks: int, folder: Path) -> float:
    """What `daekit plan` says of a machine's host memory, in GiB; under DDP every rank reads everything."""
    command = [sys.executable, "-m", "daekit", "plan", str(folder / "recipe.yaml"), "--cpu", "8GB", "--gpus", str(ranks)]
    done = subprocess.run([*command, "--engine", engine, "--json"], capture_output=True, text=True, check=True, cwd=ROOT)
    return float(json.loads(done.stdout)["stages"]["kd"]["host_while_loading"]) / GIB


def watch(process: subprocess.Popen[bytes], out: Path, ranks: int) -> dict[str, int]:
    """The highest sums over all ranks, between their imports and their first steps."""
    highest = {"Pss": 0, "Pss_Anon": 0}
    while process.poll() is None:
        pids = [int(file.read_text()) for file in out.glob("*.pid") if file.stat().st_size]
        done = len(list(out.glob("*.json")))
        if len(pids) == ranks and not done:
            now = [rollup(pid) for pid in pids]
            highest = {key: max(value, sum(each.get(key, 0) for each in now)) for key, value in highest.items()}
        time.sleep(0.05)
    return highest


def rollup(pid: int | str) -> dict[str, int]:
    """Bytes by kind of a process's memory; empty if it is gone."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    except OSError:
        return {}
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}


def resident(key: str) -> float:
    """VmRSS or VmHWM of this process in GiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 2**20


def rank(name: str, out: Path) -> None:
    """One rank: run the recipe, and stop before the first step."""
    from accelerate import PartialState

    from daekit.models import zero3_loading
    from daekit.recipe import load_recipe
    from daekit.runtime import models as loading
    from daekit.runtime import trainer as building
    from daekit.runtime.run import run_recipe
    from daekit.trainers import KDTrainer

    if name == "whole":
        building.reads_parts = lambda *_, **__: False  # type: ignore[attr-defined]
        zero3_loading.can_read_parts = lambda: False  # type: ignore[attr-defined]
        loading.in_own_dtype = nullcontext  # type: ignore[attr-defined, assignment]
    index = PartialState(cpu=True).process_index
    recipe = load_recipe(out.parent / "recipe.yaml", [f"output_dir={out / 'run'}"])
    torch.distributed.barrier()
    level, level_gib = rollup("self"), resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the highest level begins anew
    (out / f"{index}.pid").write_text(str(os.getpid()))
    start = time.perf_counter()

    def stop(*_: Any, **__: Any) -> None:
        found = {"level": level, "level_gib": level_gib, "peak_gib": resident("VmHWM") - level_gib}
        found |= {"held_gib": resident("VmRSS") - level_gib, "seconds": time.perf_counter() - start}
        torch.distributed.barrier()
        (out / f"{index}.json").write_text(json.dumps(found))
        torch.distributed.barrier()
        os._exit(0)

    KDTrainer.training_step = stop  # type: ignore[method-assign, assignment]
    run_recipe(recipe)


if __name__ == "__main__":
    main()
