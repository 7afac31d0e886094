"""Contestants of a case, each in a fresh process, in turn: seconds, extra memory, and whether all computed the same.

A script lists its cases and calls ``main``. The parent starts itself once per contestant with ``--run CASE NAME``; that child
builds the inputs, measures, and prints one line of JSON. With ``--resume`` a case whose rows are in the JSON file is not run
again, and ``--until`` begins no further case after a moment: what a time limit cuts off, the next call goes on with.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from measure import Work, measure, settled_level, warm_up_libraries

OURS = "ours"
_PACKAGES = ("daekit", "torch", "transformers", "trl", "liger_kernel", "triton")
LEFT = 3  # exit status: nothing failed, but cases are left for another call
_ASIDE = (
    "json",
    "only",
    "run",
    "resume",
    "until",
    "first",
    "device",
    "dtype",
    "threads",
    "repeats",
)  # change no row, or are facts
_DISTURBED = 1.25  # slower than this times the fastest product of the run: somebody else used the machine
_COLUMNS = (
    f"{'case':<44} {'name':<22} {'seconds':>9} {'held MB':>9} {'peak MB':>9} {'time/ours':>10} {'mem/ours':>9} {'all/ours':>9}"
)


class Unavailable(Exception):
    """This contestant cannot run here; the text says why. It gets a line in the table instead of figures."""


@dataclass(frozen=True)
class Case:
    """One piece of work and those who do it.

    Attributes:
        name: unique in its script.
        contestants: name -> a function that makes the inputs and returns the work. ``ours`` comes first: the ratios are to it.
        tolerance: largest relative difference of loss and gradient norms from ours.
        rehearsals: name -> the same in the small, run once before anything is measured: what is imported late and kept by
            libraries is then not counted as memory that the inputs hold.
    """

    name: str
    contestants: Mapping[str, Callable[[], Work]]
    tolerance: float
    rehearsals: Mapping[str, Callable[[], Work]] = field(default_factory=dict)


def main(
    description: str,
    cases_of: Callable[[argparse.Namespace], Sequence[Case]],
    add_arguments: Callable[[argparse.ArgumentParser], None] | None = None,
) -> None:
    """The command line of a benchmark; ends with status 1 if a contestant failed or computed something else, or ``LEFT``."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: float32 on the CPU, bfloat16 on a GPU")
    parser.add_argument("--threads", type=int, help="of torch on the CPU; default: torch's own choice")
    parser.add_argument("--repeats", type=int, help="timed calls after the first (default 5; 1 with --small)")
    parser.add_argument("--only", default="", help="run the cases whose name contains this")
    parser.add_argument("--small", action="store_true", help="sizes that run in a second: does everything work?")
    parser.add_argument("--json", type=Path, help="write the results here, rewritten after each case")
    parser.add_argument(
        "--resume", action="store_true", help="keep cases that the JSON file holds of this machine and versions"
    )
    parser.add_argument("--until", type=float, metavar="SECONDS", help="begin no case after this moment (seconds since 1970)")
    parser.add_argument("--first", type=int, metavar="N", help="run the first N cases only")
    parser.add_argument("--run", nargs=2, metavar=("CASE", "NAME"), help="one contestant, in this process; prints JSON")
    if add_arguments:
        add_arguments(parser)
    options = parser.parse_args()
    _complete(options)
    cases = [case for case in cases_of(options) if options.only in case.name][: options.first]
    if options.run:
        print(json.dumps(_run_here(options, cases)))
    else:
        sys.exit(_run_all(options, cases))


def _complete(options: argparse.Namespace) -> None:
    options.device = torch.device(options.device)
    dtype = options.dtype or ("bfloat16" if options.device.type == "cuda" else "float32")
    options.dtype = getattr(torch, dtype)
    options.repeats = options.repeats or (1 if options.small else 5)
    if options.threads:
        torch.set_num_threads(options.threads)


# ---- child ----------------------------------------------------------------------------------------------------------


def _run_here(options: argparse.Namespace, cases: Sequence[Case]) -> dict[str, Any]:
    wanted, name = options.run
    case = next(case for case in cases if case.name == wanted)
    torch.manual_seed(0)
    try:
        warm_up_libraries(options.device)
        if name in case.rehearsals:
            case.rehearsals[name]()()
        level = settled_level(options.device)
        work = case.contestants[name]()
        held = (settled_level(options.device) - level) / 2**20
        return {"held_mb": held} | asdict(measure(work, options.device, options.repeats))
    except Unavailable as reason:
        return {"note": str(reason)}
    except torch.OutOfMemoryError:
        return {"note": "out of memory"}


# ---- parent ---------------------------------------------------------------------------------------------------------


def _run_all(options: argparse.Namespace, cases: Sequence[Case]) -> int:
    facts = machine_facts(options)
    results = _kept(options, facts, cases)
    todo = [case for case in cases if case.name not in {row["case"] for row in results}]
    if len(todo) < len(cases):
        print(f"{len(cases) - len(todo)} of {len(cases)} cases are in {options.json} already")
    if not todo:
        return 0
    print(f"{facts['machine']}; {facts['dtype']}; {facts['date']}\n{calibration(options.device)}\n{facts['versions']}")
    print(f"\n{_COLUMNS}", flush=True)
    sound, fastest = True, math.inf
    for number, case in enumerate(todo):
        if options.until is not None and time.time() >= options.until:
            print(f"left, for the time is over: {', '.join(case.name for case in todo[number:])}")
            return LEFT if sound else 1
        rows: list[dict[str, Any]] = []
        for name in case.contestants:
            row = _row(case, name, _run_child(case, name))
            rows.append(row)
            fastest = min([fastest, *row["product_ms"]])
            if row["product_ms"] and max(row["product_ms"]) > _DISTURBED * fastest:
                row["note"] = f"disturbed: a product took {max(row['product_ms']):.1f} ms, at best {fastest:.1f} ms"
            ours = rows[0] if rows[0]["name"] == OURS else {}
            _compare(row, ours)
            sound &= _judge(row, rows, case.tolerance)
            print(_line(row), flush=True)
        results += [row | facts for row in rows]
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            half = options.json.with_name(options.json.name + ".half")
            half.write_text("[\n" + ",\n".join(map(json.dumps, results)) + "\n]\n")
            half.replace(options.json)
    return 0 if sound else 1


def _kept(options: argparse.Namespace, facts: dict[str, Any], cases: Sequence[Case]) -> list[dict[str, Any]]:
    """The rows in the JSON file that another call of the same machine, versions and options would give, of whole cases.

    A case of which a contestant failed or computed something else is not kept. Cases that this call does not ask for are.
    """
    if not options.resume or options.json is None or not options.json.is_file():
        return []
    rows = [row for row in json.loads(options.json.read_text()) if _same(row, facts)]
    broken = {row["case"] for row in rows if row.get("failed") or row["agrees"] is False}
    for case in cases:
        if {row["name"] for row in rows if row["case"] == case.name} != set(case.contestants):
            broken.add(case.name)
    return [row for row in rows if row["case"] not in broken]


def _same(row: dict[str, Any], facts: dict[str, Any]) -> bool:
    return all(row.get(name) == value for name, value in facts.items() if name != "date")


def _run_child(case: Case, name: str) -> dict[str, Any]:
    """This script once more, for one contestant; what it measured, or why it did not."""
    command = [sys.executable, *sys.argv, "--run", case.name, name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    sys.stderr.write(done.stderr)
    killed = done.returncode in (-9, 137)
    return {"note": "killed (out of memory?)" if killed else f"failed with status {done.returncode}", "failed": not killed}


def _row(case: Case, name: str, measured: dict[str, Any]) -> dict[str, Any]:
    fixed = dict(case=case.name, name=name, seconds=None, held_mb=None, peak_mb=None, ratio_time=None, ratio_memory=None)
    return (
        fixed
        | {"ratio_all_memory": None, "seconds_median": None, "check": [], "product_ms": [], "agrees": None, "note": ""}
        | measured
    )


def _compare(row: dict[str, Any], ours: dict[str, Any]) -> None:
    """Contestant / ours: above 1 it takes more than ours."""
    for ratio, figure in (("ratio_time", "seconds"), ("ratio_memory", "peak_mb")):
        if row[figure] is not None and ours.get(figure):
            row[ratio] = row[figure] / ours[figure]
    if row["peak_mb"] is not None and ours.get("peak_mb") is not None:
        row["ratio_all_memory"] = (row["held_mb"] + row["peak_mb"]) / (ours["held_mb"] + ours["peak_mb"])


def _judge(row: dict[str, Any], rows: list[dict[str, Any]], tolerance: float) -> bool:
    """Compare with the first contestant of the case that has a check value: ours, if it ran. False: not sound."""
    first = next((other["check"] for other in rows if other["check"]), None)
    if row["check"] and first:
        pairs = list(zip(row["check"], first, strict=True))
        apart = [(a, b) for a, b in pairs if not math.isclose(a, b, rel_tol=tolerance)]
        row["agrees"] = not apart
        if apart:
            row["note"] = (
                f"!!! COMPUTES SOMETHING ELSE: {apart[0][0]:.8g} instead of {apart[0][1]:.8g} (tolerance {tolerance}) !!!"
            )
    return row["agrees"] is not False and not row.get("failed", False)


def _line(row: dict[str, Any]) -> str:
    def figure(value: float | None, width: int, digits: int) -> str:
        return f"{'-' if value is None else format(value, f'.{digits}f'):>{width}}"

    return (
        f"{row['case']:<44} {row['name']:<22} {figure(row['seconds'], 9, 4)} {figure(row['held_mb'], 9, 1)} "
        f"{figure(row['peak_mb'], 9, 1)} {figure(row['ratio_time'], 10, 2)} {figure(row['ratio_memory'], 9, 2)} "
        f"{figure(row['ratio_all_memory'], 9, 2)}  {row['note']}"
    ).rstrip()


def machine_facts(options: argparse.Namespace) -> dict[str, Any]:
    """What goes into every result: a row then says by itself where it was measured."""
    threads = f"{torch.get_num_threads()} threads of {os.cpu_count()} CPUs"
    gpu = f"{torch.cuda.get_device_name()}, " if options.device.type == "cuda" else ""
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES if importlib.util.find_spec(name)}
    return {
        "machine": f"{gpu}{_cpu_name()}, {threads}",
        "device": options.device.type,
        "dtype": str(options.dtype).removeprefix("torch."),
        "repeats": options.repeats,
        "options": {name: value for name, value in vars(options).items() if name not in _ASIDE},
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "versions": versions,
    }


def calibration(device: torch.device) -> str:
    """How fast this machine is right now: daekit's line, and on a GPU a large matrix product besides."""
    from daekit.runtime.run import calibration as cpu_calibration  # takes seconds to import, and the children do without

    if device.type != "cuda":
        return cpu_calibration()
    a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    seconds = []
    for _ in range(11):
        torch.cuda.synchronize()
        start = time.perf_counter()
        a @ a
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    best = min(seconds[1:])
    speed = f"{best * 1e3:.2f} ms ({2 * 8192**3 / best / 1e12:.0f} TFLOP/s)"
    return f"{cpu_calibration()}\nGPU: 8192^3 bfloat16 matrix product {speed}"


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()
