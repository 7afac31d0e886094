"""Recipes and suites with something wrong in them, made at random; a process of its own may run many of them."""

from __future__ import annotations

import json
import os
import random
import re
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from daekit.errors import UserError
from daekit.recipe import Recipe, load_recipe_text, sharing_notes, stage_key, student_key, to_dict, to_yaml
from daekit.recipe.load import load_suite_text, resolve

ROOT = Path(__file__).parent.parent.parent
CPU_SECONDS, MEMORY = 5.0, 2**30  # of one case; of the whole process beside what it begins with
RECIPES = [
    *sorted((ROOT / "recipes").glob("*.yaml")),
    *sorted((ROOT / "recipes" / "paper").glob("*.yaml")),
    ROOT / "daekit" / "resources" / "quickstart.yaml",
]
SUITES = sorted((ROOT / "eval" / "suites").glob("*.yaml"))
ADAPTERS = """
name: shared
output_dir: out
sources: {general: {domain: general, path: "builtin:chat"}, shop: {domain: shop, path: "builtin:shop", holdout: 5}}
stages:
  expert: {type: sft, student: &base {path: base/model, quantization: 4bit}, lora: {r: 8}, data: [shop]}
  kd: {type: kd, student: *base, lora: {r: 4}, teacher: {adapter: ADAPTER}, data: [general]}
  dae:
    type: dae
    student: {adapter: stage:kd}
    teachers: {shop: {ensemble: [{model: {adapter: stage:expert}, weight: 1}]}}
    reference: {adapter: base}
    data: {shop: 0.5, general: 0.5}
  cut: {type: sft, student: {from: a/b, shape: {hidden_size: 8}, calibration: {tokens: 9}}, data: [general]}
evaluation:
  models: [kd, student-as-it-was, {other: a/b}]
  suites: [SUITE]
"""
NOTHING: list[Any] = [None, True, False, "", " ", "no", "null", "~", [], {}, [[]], [None], {"": None}]
NUMBERS: list[Any] = [0, -1, 1, 2**31, 2**64, 10**30, 0.5, -0.0, 1e308]
TEXTS: list[Any] = [
    "x" * 300,
    "stage:",
    "stage:kd",
    "stage:kd@checkpoint-1",
    "é\u2028\u202e",
    "\x7f",
    "a\nb",
    "${x}",
    "4bit",
    "auto",
]
PATHS: list[Any] = [
    "~x/y",
    ".",
    "..",
    "/",
    "/dev/null",
    "/dev/zero",
    "./x",
    "a/b",
    "a/b/c",
    "builtin:",
    "builtin:shop",
    "base+more",
]
PATHS += ["builtin:shop", "base+more", "http://", "http://[::1", "https://k:p@h/v1?x#m", "+"]
OTHERS: list[Any] = [{"a": {"b": []}}, {"type": "kd"}, {"path": "a"}, {"from": {"from": "a"}}, ["a"] * 50, {"name": "x"}]
OTHERS += ["4bit", "auto", {"stage": "kd", "checkpoint": 0}, {"adapter": "base"}, {"ensemble": []}, {"model_type": "x"}]
ODD = [*NOTHING, *NUMBERS, *TEXTS, *PATHS, *OTHERS]
RAW = ["&a [*a]", "&a {<<: *a}", "!!python/name:os.system", "!!int x", "? [a]\n: 1", "<<: 1", "*nobody", "\t", "%YAML 9", "---"]
RAW += ['"\\ud800"', '"\\0"', "9" * 10_000, "[" * 300, "{a: " * 60, "- " * 100, ".nan", ".inf", "1e999", "0x10", "010", "12:30"]
RAW += [
    "|\n  x",
    "'",
    '"',
    "#",
    ": ",
    "a: 1\na: 2",
    "[a, b",
    "x: {y",
    "\u2029",
    "\ufeff",
    "- - - a",
    "? ",
    "!<tag> x",
    "2026-11-28",
]
RAW += ["...", "\x00"]
CHARACTERS = [*":,-[]{}#&*!|>'\"%@` \n\tx0", ""]


class TookTooLong(BaseException):
    """A case used more CPU time than any may."""


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raise ``TookTooLong`` after so many seconds of CPU."""

    def stop(*_: object) -> None:
        raise TookTooLong(f"more than {seconds} s of CPU")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


class Fuzzer:
    """Makes and runs cases; equal seeds make equal cases.

    Args:
        folder: a directory of its own, for the files that cases name.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.suite, self.adapter = folder / "suite.yaml", folder / "adapter"
        self.adapter.mkdir(parents=True, exist_ok=True)
        text = ADAPTERS.replace("SUITE", str(self.suite)).replace("ADAPTER", str(self.adapter))
        self.recipes = [text] * 4 + [path.read_text(encoding="utf-8") for path in RECIPES]
        data = re.compile(r"(path|english): [\w./-]+")  # of files that are not there
        self.suites = [data.sub(r"\1: .", path.read_text(encoding="utf-8")) for path in SUITES]

    def run(self, seed: int) -> str:
        """One case: ``loaded`` or ``refused``; whatever else it raises is a fault."""
        draw = random.Random(seed)
        is_recipe = draw.random() < 0.7
        text = draw.choice(self.recipes if is_recipe else self.suites)
        self.suite.write_text(self.mutated(draw, self.suites[draw.randrange(len(self.suites))], 0.2), errors="replace")
        self.adapter_config(draw)
        changed, overrides = self.mutated(draw, text, 0.95), self.overrides(draw, text)
        with within(CPU_SECONDS):
            try:
                if is_recipe:
                    check_loaded(load_recipe_text(changed, "fuzz.yaml", overrides))
                else:
                    models = {
                        draw.choice(["m", "a.b", "../x", ""]): draw.choice(["a/b", "http://h/v1#m", "x+y", "", "./nowhere"])
                    }
                    suite = load_suite_text(changed, "fuzz.yaml", models, overrides)
                    assert load_suite_text(to_yaml(suite), "again") == suite
            except UserError as error:
                assert str(error) and len(str(error)) < 200_000
                str(error).encode()  # it can be printed
                return "refused"
        return "loaded"

    def mutated(self, draw: random.Random, text: str, chance: float) -> str:
        """The text with one to three things changed in it, or, now and then, as it is."""
        for _ in range(draw.choice([1, 1, 2, 3]) if draw.random() < chance else 0):
            text = draw.choice([_lines, _characters, _raw, _tree, _tree, _tree, _tree])(draw, text)
        return text

    def adapter_config(self, draw: random.Random) -> None:
        """What lies in the directory of the adapter."""
        config: Any = {
            "peft_type": "LORA",
            "base_model_name_or_path": "base/model",
            "target_modules": ["q_proj"],
            "revision": None,
        }
        if draw.random() < 0.1:
            config[draw.choice(list(config))] = draw.choice(ODD)
        text = json.dumps(config if draw.random() < 0.99 else draw.choice(ODD))
        (self.adapter / "adapter_config.json").write_text(text if draw.random() < 0.97 else draw.choice(RAW))

    def overrides(self, draw: random.Random, text: str) -> list[str]:
        """None to two settings at keys that there are, or nearly."""
        paths = [path for path, _ in _places(_plain(text))] or [("a",)]
        found = []
        for _ in range(draw.choice([0, 0, 0, 1, 2])):
            keys = [str(key) for key in draw.choice(paths)] or ["name"]
            if draw.random() < 0.3:
                keys.append(draw.choice(["path", "type", "0", "99", "x", "-1", ""]))
            value = draw.choice(RAW) if draw.random() < 0.3 else json.dumps(draw.choice(ODD))
            found.append(f"{'.'.join(keys)}{draw.choice(['=', '=', '=', '', '=='])}{value}")
        return found


def check_loaded(recipe: Recipe) -> None:
    """What is done with every recipe before anything is loaded."""
    assert resolve(recipe) == recipe
    assert load_recipe_text(to_yaml(recipe), "again") == recipe
    json.dumps(to_dict(recipe), allow_nan=False)
    sharing_notes(recipe)
    for name, stage in recipe.stages.items():
        json.dumps(stage_key(recipe, name), allow_nan=False)
        if stage.student is not None and stage.student.init is not None:
            student_key(recipe, name)


def _lines(draw: random.Random, text: str) -> str:
    lines = text.split("\n")
    at, other = draw.randrange(len(lines)), draw.randrange(len(lines))
    change: Callable[[], object] = draw.choice(
        [
            lambda: lines.pop(at),
            lambda: lines.insert(other, lines[at]),
            lambda: lines.__setitem__(at, " " * draw.randrange(8) + lines[at].lstrip()),
            lambda: lines.__setitem__(slice(at, None), []),
        ]
    )
    change()
    return "\n".join(lines)


def _characters(draw: random.Random, text: str) -> str:
    at = draw.randrange(len(text) + 1)
    return text[:at] + draw.choice(CHARACTERS) + text[at + draw.randrange(3) :]


def _raw(draw: random.Random, text: str) -> str:
    values = [at for at, character in enumerate(text) if character == ":"] or [0]
    at = draw.choice(values)
    end = text.find("\n", at)
    return f"{text[: at + 1]} {draw.choice(RAW)}{text[end if end >= 0 else len(text) :]}"


def _tree(draw: random.Random, text: str) -> str:
    """Change one value of the tree: another value, another key, gone, twice, deeper, or one from elsewhere."""
    tree = _plain(text)
    places = [(path, above) for path, above in _places(tree) if path]
    if not places:
        return text
    path, above = draw.choice(places)
    key: Any = path[-1]
    elsewhere, there = draw.choice(places)
    change = draw.randrange(7)
    if change == 0:
        del above[key]
    elif change == 1 and isinstance(above, dict):
        name = str(key)
        at = draw.randrange(len(name) + 1)
        above[draw.choice([name[:at] + name[at + 1 :], name[:at] + "x" + name[at:], name.upper(), "", "a b"])] = above.pop(key)
    elif change == 2:
        above[key] = {draw.choice(["path", "stage", "sources", "x"]): above[key]}
    elif change == 3:
        above[key] = [above[key]] * draw.choice([1, 2, 30])
    elif change == 4:
        above[key] = json.loads(json.dumps(there[elsewhere[-1]]))
    else:
        above[key] = draw.choice(ODD)
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=draw.random() < 0.5)


def _plain(text: str) -> Any:
    try:
        return json.loads(json.dumps(yaml.safe_load(text), default=str))
    except (yaml.YAMLError, ValueError, TypeError, RecursionError):
        return {}


def _places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """(key path, what holds its last key) of every value below ``tree``."""
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, below in list(pairs)[:40]:
        if len(path) < 12:
            yield (*path, key), tree
            yield from _places(below, (*path, key))


def main(first: int, count: int, folder: str) -> int:
    """Run cases under the limits; prints the seeds of those that fail, and how many were refused."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, now + MEMORY))
    fuzzer, refused, failed = Fuzzer(Path(folder)), 0, 0
    for seed in range(first, first + count):
        try:
            refused += fuzzer.run(seed) == "refused"
        except (Exception, TookTooLong) as error:
            failed += 1
            print(f"seed {seed}: {type(error).__name__}: {str(error)[:300]}", flush=True)
    print(f"{count} cases, {refused} refused, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]))
