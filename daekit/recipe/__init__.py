"""Recipes: what to run, as typed YAML. Loading one takes a fraction of a second: neither torch nor transformers is imported.

``tree`` reads YAML into nodes that know their lines; ``reading`` gives them to pydantic classes and gathers what is wrong in
``validation.Errors``. ``schema`` (``rows``, ``stages`` with ``model``, ``teacher``, ``objective`` and ``trainer_options``) and
``suite`` are these classes; each tells what contradicts itself in it (``problems``). ``checks`` compares parts of a recipe with
each other; ``load`` puts all this together, with overrides and implied defaults; ``dump`` writes a recipe out again.
"""

from daekit.recipe.checks import sharing_notes
from daekit.recipe.dump import generated_key, stage_key, student_key, to_dict, to_yaml
from daekit.recipe.load import load_recipe, load_recipe_text, load_suite, parse_models
from daekit.recipe.schema import Recipe

__all__ = [
    "Recipe",
    "generated_key",
    "load_recipe",
    "load_recipe_text",
    "load_suite",
    "parse_models",
    "sharing_notes",
    "stage_key",
    "student_key",
    "to_dict",
    "to_yaml",
]
