"""Shows that the tests can fail: breaks one thing of the package at a time and runs the tests that must notice.

``python tests/mutations.py [NAME...]`` (default: all). Each mutation of ``mutations.txt`` is made in a temporary copy of the
package, beside which the tests lie as links; its tests must then fail. Before, all of them must pass on an untouched copy. The
exit status is 1 if a mutation survives or cannot be made.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
LONGEST = 400  # seconds for the tests of one mutation
MUTATIONS = Path(__file__).with_suffix(".txt")


class Mutation(NamedTuple):
    name: str
    file: str
    tests: list[str]
    old: list[str]
    new: list[str]


def mutations() -> list[Mutation]:
    """Those of the file, in its order."""
    found: list[Mutation] = []
    for line in MUTATIONS.read_text().splitlines()[1:]:
        if line[:2] in ("- ", "+ "):
            (found[-1].old if line[0] == "-" else found[-1].new).append(line[2:])
        else:
            name, file, tests = line.split(": ")
            found.append(Mutation(name, file, [f"tests/{each}" for each in tests.split()], [], []))
    return found


def run_tests(world: Path, tests: list[str]) -> None:
    """In a process of its own: exits with pytest's status, 9 where the package is not the copy."""
    os.chdir(world)
    os.environ["PYTHONPATH"] = str(world)
    sys.path[0] = str(world)
    import pytest

    log = os.open(world / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    status = int(pytest.main(["-x", "-q", "-n", "0", "-p", "no:cacheprovider", *tests]))
    ours = Path(sys.modules["daekit"].__file__ or "").is_relative_to(world) if "daekit" in sys.modules else status != 0
    os._exit(status if ours else 9)


def tested(mutation: Mutation | None, tests: list[str]) -> tuple[str, str]:
    """(what became of a mutation, the end of pytest's output); of None the package stays as it is."""
    with tempfile.TemporaryDirectory() as folder:
        world = Path(folder).resolve()
        for path in ROOT.iterdir():
            if path.name not in ("daekit", ".git", ".venv", "build"):
                (world / path.name).symlink_to(path)
        shutil.copytree(ROOT / "daekit", world / "daekit", ignore=shutil.ignore_patterns("__pycache__"))
        if mutation is not None:
            file = world / "daekit" / mutation.file
            text, old, new = file.read_text(), "\n".join(mutation.old), "\n".join(mutation.new)
            if (times := text.count(old)) != 1:
                return f"IMPOSSIBLE: the old text occurs {times} times", ""
            file.write_text(text.replace(old, new))
        process = multiprocessing.get_context("fork").Process(target=run_tests, args=(world, tests))
        process.start()
        process.join(LONGEST if mutation is not None else None)
        if process.is_alive():
            process.kill()
            process.join()
            return "killed", "the tests did not end"
        said = (world / "log").read_text(errors="replace").strip()
        verdict = {0: "SURVIVED", 1: "killed"}.get(process.exitcode or 0, f"NOT RUN (exit status {process.exitcode})")
        return verdict, said[-4000:]


def main(names: list[str]) -> int:
    """Make and test the mutations with these names (none: all); the exit status."""
    chosen = [each for each in mutations() if not names or each.name in names]
    if unknown := {*names} - {each.name for each in chosen}:
        print(f"no such mutation: {', '.join(sorted(unknown))}")
        return 2
    # imported once: each process of tests is a fork of this one
    sys.dont_write_bytecode = True
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    import conftest  # noqa: F401
    import datasets  # noqa: F401
    import peft  # noqa: F401
    from trl import SFTTrainer  # noqa: F401

    del sys.modules["conftest"]
    assert "daekit" not in sys.modules
    verdict, said = tested(None, list(dict.fromkeys(test for each in chosen for test in each.tests)))
    if verdict != "SURVIVED":
        print(f"{said}\nthese tests fail (or cannot be run) without any mutation: {verdict}")
        return 1
    table = []
    for each in chosen:
        start = time.monotonic()
        verdict, said = tested(each, each.tests)
        table.append(f"{each.name:28} {each.file:28} {time.monotonic() - start:4.0f} s  {verdict}")
        print(table[-1] if verdict == "killed" else f"{said}\n{table[-1]}", flush=True)
    failed = [line for line in table if not line.endswith("killed")]
    print("\n".join(["", *table, f"\n{len(table) - len(failed)} of {len(table)} killed", *failed]))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
