"""The recipes that come with daekit: in a wheel below ``daekit/resources``, in the repository where people read them."""

from __future__ import annotations

import re
from pathlib import Path

import daekit
from daekit.errors import UserError, listed, nearest

_SCHEMA = "recipe.schema.json"


def shipped_recipes() -> dict[str, Path]:
    """Name -> file."""
    package = Path(daekit.__file__).parent
    folder = package / "resources" / "recipes"
    if not folder.is_dir():
        folder = package.parent / "recipes"
    return {file.stem: file for file in (*sorted(folder.glob("*.yaml")), *sorted(folder.glob("paper/*.yaml")))}


def list_recipes() -> str:
    """One line per recipe: its name and the first sentence of its header."""
    lines = []
    for name, file in shipped_recipes().items():
        what = re.search(r"^# What:? +(.*(?:\n#  +.*)*)", file.read_text(encoding="utf-8"), re.MULTILINE)
        text = re.sub(r"\s*\n#\s*", " ", what[1]) if what else ""
        lines.append(f"{name:20}  {re.split(r'(?<=[a-z)])[.:;] ', text)[0].rstrip('.')}")
    return "\n".join(lines)


def copy_recipe(name: str, folder: Path) -> list[Path]:
    """Write a recipe, and beside it the JSON Schema by which editors complete it, unless that is there.

    Returns:
        The files that were written.

    Raises:
        UserError: there is no such recipe, or a file of its name; nothing is ever overwritten.
    """
    recipes = shipped_recipes()
    if name not in recipes:
        raise UserError(f"there is no recipe {name!r} (there are: {listed(recipes)}){nearest(name, recipes)}")
    text = recipes[name].read_text(encoding="utf-8")
    schema = next(parent / _SCHEMA for parent in recipes[name].parents if (parent / _SCHEMA).is_file())
    files = {folder / f"{name}.yaml": re.sub(r"(?<=\$schema=)\S+", _SCHEMA, text, count=1)}
    if not (folder / _SCHEMA).exists():
        files[folder / _SCHEMA] = schema.read_text(encoding="utf-8")
    for path, content in files.items():
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(content)
        except FileExistsError:
            raise UserError(f"{path} is there already, and is not overwritten; copy into another directory") from None
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror}") from error
    return list(files)
