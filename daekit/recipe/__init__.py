"""Recipes: what to run, as typed YAML. Loading one takes a fraction of a second: neither torch nor transformers is imported."""

from daekit.recipe.check_adapter import is_lora, sharing_notes
from daekit.recipe.dump import stage_key, student_key, to_dict, to_yaml
from daekit.recipe.load import has_validation, load_recipe, load_recipe_text, resolve
from daekit.recipe.schema import BUILTIN_CORPORA, Recipe

__all__ = [
    "BUILTIN_CORPORA",
    "Recipe",
    "has_validation",
    "is_lora",
    "load_recipe",
    "load_recipe_text",
    "resolve",
    "sharing_notes",
    "stage_key",
    "student_key",
    "to_dict",
    "to_yaml",
]
