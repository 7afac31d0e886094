"""What an output directory holds already: is it of this recipe, is it whole, may it be extended?"""

from __future__ import annotations

import json
from typing import Any

from daekit.errors import UserError
from daekit.files import write_whole
from daekit.recipe import stage_key, to_yaml
from daekit.recipe.schema import Recipe
from daekit.runtime.folders import RunFolder, StageFolder, lost, read_file
from daekit.trainers.checkpoint import MANIFEST

_ENDS = {"stage.trainer.max_steps", "stage.trainer.num_train_epochs"}


def ahead(recipe: Recipe) -> dict[str, str]:
    """The stages that a run would train -> why, of one that is complete; an empty text of the others. It reads only.

    A stage counts from its first checkpoint on. A complete stage that has lost its result, or is to be longer, goes on from its
    last checkpoint.

    Raises:
        UserError: another recipe's run; a stage that was begun with other settings and cannot go on with these; damage.
    """
    folder = RunFolder(recipe.output_dir)
    if folder.recipe.is_file() and folder.is_begun:
        theirs = read_file(folder.recipe).get("name")
        if theirs != recipe.name:
            raise UserError(
                f"output_dir={recipe.output_dir}: holds a run of the recipe {theirs!r}, not of {recipe.name!r}. "
                "Choose another output_dir, or delete this one."
            )
    found = {}
    for name in recipe.stages:
        stage = folder.stage(name)
        longer = stage.is_begun and _is_longer(recipe, name, stage)
        if not stage.done.is_file():
            found[name] = ""
        elif longer:
            found[name] = "complete, and goes on to its new end"
        elif missing := lost(stage.root, stage.done):
            found[name] = f"was complete, but {missing} is missing: it is made again"
    return found


def claim(recipe: Recipe) -> None:
    """Write the recipe into its output directory, and declare complete stages that are ``ahead`` incomplete.

    What a run has left that was refused before its first checkpoint is overwritten. For one process; it must hold the lock.
    """
    folder = RunFolder(recipe.output_dir)
    for name, why in ahead(recipe).items():
        if why:
            print(f"[{name}] {why}", flush=True)
            folder.stage(name).done.unlink()
    write_whole(folder.recipe, to_yaml(recipe))


def _is_longer(recipe: Recipe, name: str, stage: StageFolder) -> bool:
    """Whether the recipe differs from the begun stage in its end alone, and the stage can go on to that end.

    Raises:
        UserError: they differ in anything else, or the stage cannot go on.
    """
    if not stage.key.is_file():
        return False  # the checkpoints say what they belong to
    now = json.loads(json.dumps(stage_key(recipe, name)))
    changed = differences(read_file(stage.key, delete=stage.root), now)
    if not changed:
        return False
    where = f"output_dir={recipe.output_dir}: its stage {name!r} was begun with another recipe ({'; '.join(changed.values())})."
    remedy = f"Choose another output_dir, or delete {stage.root} and the stages that use it."
    if not changed.keys() <= _ENDS:
        raise UserError(f"{where} {remedy}")
    if not stage.checkpoints:
        raise UserError(f"{where} It has no checkpoint to go on from (save_strategy). {remedy}")
    newest = stage.checkpoints[-1]
    begun_with = read_file(newest / MANIFEST, delete=newest)["run"]
    if begun_with["end"] is not None:
        raise UserError(
            f"{where} Its learning rate (lr_scheduler_type={begun_with['lr_scheduler_type']}) or on-policy responses depend on "
            f"the end of the run: with another end the steps that it has taken would have been others. {remedy}"
        )
    state = read_file(newest / "trainer_state.json", delete=newest)
    wanted = now["stage"]["trainer"]
    steps = wanted.get("max_steps", -1)
    done, end = (state["global_step"], steps) if steps > 0 else (state["epoch"], wanted.get("num_train_epochs", 3))
    if done > end:
        raise UserError(
            f"{where} It has gone beyond that end already ({newest.name}). An earlier checkpoint can be used as "
            f"`stage:{name}@checkpoint-N`. {remedy}"
        )
    return True


def differences(then: Any, now: Any, path: str = "") -> dict[str, str]:
    """Where two JSON values differ: path -> what they are, in words."""
    if isinstance(then, dict) and isinstance(now, dict):
        found: dict[str, str] = {}
        for key in sorted({*then, *now}):
            found |= differences(then.get(key), now.get(key), f"{path}.{key}" if path else key)
        return found
    return {} if then == now else {path: f"{path}: {json.dumps(then)} then, {json.dumps(now)} now"}
