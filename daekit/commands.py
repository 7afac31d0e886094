"""What the commands of the command line do. Heavy imports happen inside, so that ``daekit --help`` answers at once."""

from __future__ import annotations

import argparse
import importlib.resources
import json
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from daekit.errors import UserError
from daekit.recipe import Recipe, load_recipe, load_recipe_text, load_suite, parse_models, sharing_notes, to_yaml
from daekit.recipe.trainer_options import default_options

if TYPE_CHECKING:
    from daekit.generation import Permissions


def eval(options: argparse.Namespace) -> None:
    """Measure models with a suite."""
    suite = load_suite(options.suite, parse_models(options.model), _with_output(options.overrides, options.output))

    from daekit.evaluation.suites import Options, run_suite
    from daekit.report import format_report

    limits = (options.max_calls, options.max_cost, options.allow_missing, options.score_parser)
    report = run_suite(suite, Options(options.dry_run, *limits, _permissions(options)))
    if report is not None:
        print(f"\n{format_report(report)}\n\nReport: {suite.output_dir}/report.html", flush=True)


def _with_output(overrides: Sequence[str], directory: str | None) -> list[str]:
    return [*overrides, *([] if directory is None else [f"output_dir={json.dumps(directory)}"])]


def _permissions(options: argparse.Namespace) -> Permissions:
    from daekit.generation.keys import Permissions

    return Permissions(frozenset(options.allow_key_env), options.allow_http)


def check(options: argparse.Namespace) -> None:
    """Say what is wrong with a recipe, or show it with every default."""
    recipe = load_recipe(options.recipe, options.overrides)
    if options.deep:
        _show_prepared(recipe, 1, _permissions(options))
        print(f"\n{recipe.name}: everything that the run needs is there")
        return
    print(to_yaml(recipe), end="")
    print("# trainer: what a stage does not set there is, by TRL and daekit:")
    print("".join(f"#   {key}: {json.dumps(value)}\n" for key, value in default_options().items()), end="")
    for note in sharing_notes(recipe):
        print(f"# note: {note}")


def preview(options: argparse.Namespace) -> None:
    """Show the first rows of each source."""
    overrides = list(options.overrides)
    rows = int(overrides.pop(0)) if overrides and overrides[0].isdecimal() else 2
    _show_prepared(load_recipe(options.recipe, overrides), rows, _permissions(options))


def _show_prepared(recipe: Recipe, rows: int, allowed: Permissions) -> None:
    from daekit.runtime.prepare import prepare
    from daekit.runtime.preview import preview
    from daekit.runtime.quiet import quieten

    quieten()
    print(preview(prepare(recipe, allowed), rows))


def schema(options: argparse.Namespace) -> None:
    """Print a JSON Schema."""
    from daekit.recipe.json_schema import json_schema

    print(json.dumps(json_schema(options.kind), indent=1, ensure_ascii=False))


def recipes(options: argparse.Namespace) -> None:
    """List the recipes of the package, or copy one."""
    from daekit.recipe.shipped import copy_recipe, list_recipes

    if options.action in (None, "list"):
        print(list_recipes())
    elif options.name is None:
        raise UserError("daekit recipes copy: which one? `daekit recipes` lists their names")
    else:
        print("\n".join(f"-> {path}" for path in copy_recipe(options.name.removesuffix(".yaml"), Path())))


def plan(options: argparse.Namespace) -> None:
    """Say what a recipe needs."""
    recipe = load_recipe(options.recipe, options.overrides)

    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded for a plan
    from daekit.planning.machine import machine_of
    from daekit.planning.plan import plan_recipe
    from daekit.planning.show import format_plan, plan_json

    rows = prompts = None
    if any(source.generated is not None for source in recipe.sources.values()):
        from daekit.runtime.generated import prompt_facts

        prompts = prompt_facts(recipe)
    if any(teacher.cache for stage in recipe.stages.values() for teacher in stage.teachers_by_key().values()):
        from daekit.runtime.data import stage_rows

        rows = stage_rows(recipe)
    machine = machine_of(options.gpu, options.cpu, options.gpus, options.engine)

    plan = plan_recipe(
        recipe, machine, lambda more: load_recipe(options.recipe, [*options.overrides, *more]), rows=rows, prompts=prompts
    )
    print(json.dumps(plan_json(plan, options.tflops), indent=2) if options.json else format_plan(plan, options.tflops))


def init(options: argparse.Namespace) -> None:
    """Make the students that are made from their teachers."""
    recipe = load_recipe(options.recipe, options.overrides)

    from daekit.runtime.run import init_students

    init_students(recipe, options.grace)


def cache(options: argparse.Namespace) -> None:
    """Write the caches of teachers."""
    recipe = load_recipe(options.recipe, options.overrides)

    from daekit.runtime.run import cache_teachers

    cache_teachers(recipe, options.grace, _permissions(options), options.check)


def generate(options: argparse.Namespace) -> None:
    """Write the rows of generated sources."""
    overrides = list(options.overrides)
    names = [overrides.pop(0)] if overrides and "=" not in overrides[0] else []
    recipe = load_recipe(options.recipe, overrides)

    from daekit.runtime.run import generate_sources

    generate_sources(recipe, names, options.grace, _permissions(options))


def train(options: argparse.Namespace) -> None:
    """Run the stages of a recipe."""
    recipe = load_recipe(options.recipe, options.overrides)

    from daekit.planning.announcement import announce
    from daekit.runtime.run import run_recipe

    announce(recipe, reload=lambda more: load_recipe(options.recipe, [*options.overrides, *more]))
    run_recipe(recipe, options.grace, _permissions(options))


def sweep(options: argparse.Namespace) -> None:
    """Run a recipe with each combination of settings."""
    from daekit.runtime.sweep import run_sweep, swept_runs

    run_sweep(*swept_runs(options.recipe, options.overrides), options.grace, _permissions(options))


def chat(options: argparse.Namespace) -> int:
    """Chat with several models at once. Returns the exit status: 1 where no prompt of a file was answered."""
    models = parse_models(options.models)
    if options.output is not None and options.prompts is None:
        raise UserError("--output belongs to --prompts; what is said in a chat is not written")
    written = None if options.output is None else _new_file(Path(options.output).expanduser())

    from daekit.generation.local import Sampling
    from daekit.runtime.chat import Chat, answer_prompts, keys_of, read_prompts, speakers_of, talk
    from daekit.runtime.quiet import quieten

    quieten()
    prompts = None if options.prompts is None else read_prompts(options.prompts)
    speakers = speakers_of(models, _permissions(options), keys_of(models, options.key_env))
    each = Chat(speakers, Sampling(options.max_new_tokens, options.temperature), options.system)
    if prompts is None:
        talk(each, sys.stdout)
        return 0
    with nullcontext(sys.stdout) if written is None else written.open("w", encoding="utf-8") as out:
        answered = answer_prompts(each, prompts, out)
    if not answered:
        print(f"daekit: no model answered a prompt: {'; '.join(each.failed.values())}", file=sys.stderr, flush=True)
    return 0 if answered else 1


def _new_file(path: Path) -> Path:
    """A file that can be written and does not exist yet, found out before models are loaded."""
    if path.is_file() or path.is_dir():
        raise UserError(f"--output {path}: exists already, and nothing is overwritten; choose another file")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise UserError(f"--output {path}: {path.parent} is no directory that may be written to; choose another")
    return path


def merge(options: argparse.Namespace) -> None:
    """Fold an adapter into its base."""
    from daekit.models.merge import save_merged

    print(f"{save_merged(options.adapter, options.out, options.dtype)}\n-> {options.out}")


def quickstart(options: argparse.Namespace) -> None:
    """Run the recipe on embedded data."""
    text = (importlib.resources.files("daekit") / "resources" / "quickstart.yaml").read_text(encoding="utf-8")
    recipe = load_recipe_text(text, "quickstart.yaml", _with_output(options.overrides, options.output_dir))

    from daekit.runtime.run import calibration, run_recipe

    print(calibration())
    run_recipe(recipe, options.grace)
