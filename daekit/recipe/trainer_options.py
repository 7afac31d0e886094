"""The options of ``stages.X.trainer``: which there are, of what type, and which of them a recipe does not leave to the trainer.

They are those of ``trl.SFTConfig``. Importing it takes about ten seconds, so its fields are read from the installed source
files with ``ast``.
"""

from __future__ import annotations

import ast
import importlib.util
from dataclasses import dataclass
from functools import cache
from pathlib import Path as FilePath
from typing import Any

from daekit.errors import UserError
from daekit.recipe.problems import Problems, nearest
from daekit.recipe.tree import Node, Path

# The dataclass and its bases, the most general first.
_CLASSES = (
    ("transformers", "training_args.py", "TrainingArguments"),
    ("trl", "trainer/base_config.py", "_BaseConfig"),
    ("trl", "trainer/sft_config.py", "SFTConfig"),
)
_ENUM_FILES = (("transformers", "trainer_utils.py"), ("transformers", "training_args.py"))
_SIMPLE = {"str": "a text", "int": "a whole number", "float": "a number", "bool": "true or false"}
_SIMPLE |= {"dict": "a mapping", "list": "a list", "None": "null"}

_LOSS = "the objective is the stage's: set `{stage}.loss.{key}`"
_DATA = "rows and their columns are set in `sources`"
_MODEL = "how a model is loaded is set where it is named, for instance `{stage}.student.{key}`"
_TOKENIZER = "the tokenizer is set in `tokenizer`"
_RUN = "daekit decides it for every stage"
# Refused whatever their value.
_ELSEWHERE = {
    "output_dir": "set `output_dir` of the recipe",
    "seed": "set `seed` of the recipe, or `{stage}.seed`",
    "data_seed": "set `seed` of the recipe",
    "label_smoothing_factor": "label smoothing would change the objective silently; leave it out",
    "loss_type": "the objective follows from the stage's `type` and `loss`; leave it out",
    "neftune_noise_alpha": "noise on the student's embeddings would change the objective silently; leave it out",
    "liger_kernel_config": "daekit has its own loss; leave it out",
    "eval_dataset": "validation rows are set per source: `sources.NAME.validation`, `validation_split` or `holdout`",
    "train_dataset": "rows are set in `sources` and `{stage}.data`",
    "peft_config": "set `{stage}.lora`",
    "dataset_text_field": "set `sources.NAME.columns.text`",
    "dataset_kwargs": _DATA,
    "remove_unused_columns": "the domain of each row is such a column; " + _RUN,
    "model_init_kwargs": "how a model is loaded is set where it is named: `dtype`, `attn_implementation`, `revision`...",
    "trust_remote_code": _MODEL,
    "chat_template_path": "set `tokenizer.chat_template`",
    "eos_token": _TOKENIZER,
    "pad_token": _TOKENIZER,
    "resume_from_checkpoint": "the same command resumes from the last complete checkpoint by itself",
    "hub_token": "a secret does not belong in a recipe; set HF_TOKEN in the environment",
    "do_train": _RUN,
    "do_eval": _RUN,
    "do_predict": _RUN,
    "local_rank": "the launcher (accelerate, torchrun) sets it",
    **dict.fromkeys(("ce_weight", "prediction_weight", "attention_weight", "temperature"), _LOSS),
    **dict.fromkeys(("divergence", "beta", "skew_alpha"), _LOSS),
    **dict.fromkeys(("reference_domains", "overlong"), "set `{stage}.{key}`"),
}
# Refused with one value only.
_REFUSED_VALUES: dict[str, tuple[Any, str]] = {
    "average_tokens_across_devices": (False, "the loss would be a mean of means; every token counts the same in daekit"),
    "fp16": (True, "the loss has its gradients before the GradScaler scales them: they would underflow; use bf16"),
    "use_liger_kernel": (True, "daekit has its own loss, which never makes logits of the whole batch"),
    "logging_nan_inf_filter": (True, "it would hide a loss that is not finite behind the last good one"),
    "save_only_model": (True, "a stage that is stopped could not resume without its optimizer"),
    "ignore_data_skip": (True, "a stage that is resumed would train on other rows than one that was not stopped"),
}


@dataclass(frozen=True)
class Option:
    """An option of the trainer: the names of the simple types that it takes, and its allowed values where they are listed."""

    kinds: frozenset[str]
    choices: tuple[str, ...] = ()

    def wanted(self) -> str:
        """What the option asks for, in words."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        return " or ".join(noun for kind, noun in _SIMPLE.items() if kind in self.kinds)


def read_trainer_options(node: Node, path: Path, problems: Problems) -> dict[str, Any]:
    """The options in ``node``, each checked against the field of ``trl.SFTConfig`` that has its name."""
    if not isinstance(node.value, dict):
        problems.add_unread(path, f"wants a mapping of options of trl.SFTConfig, not {node.show()}", node.place)
        return {}
    try:
        known = sft_options()
    except UserError as error:
        problems.add_unread(path, str(error), node.place)
        return {}
    stage = ".".join(str(part) for part in path[:-1])
    values = {}
    for key, below in node.value.items():
        where = (*path, key)
        if problems.unread(where):
            continue
        if key in _ELSEWHERE:
            problems.add_unread(where, f"refused here: {_ELSEWHERE[key].format(stage=stage, key=key)}", below.place)
        elif key not in known or known[key].kinds <= {"None"}:
            reason = "cannot be set in a recipe" if key in known else f"trl.SFTConfig has no such option{nearest(key, known)}"
            problems.add_unread(where, reason, below.place)
        else:
            wrong, values[key] = _read_option(key, below, known[key])
            if wrong:
                problems.add_unread(where, wrong, below.place)
    return values


def _read_option(key: str, node: Node, option: Option) -> tuple[str, Any]:
    """(what is wrong or nothing, the value)."""
    fits, value = _fit(node, option.kinds)
    if not fits:
        return f"wants {option.wanted()}, not {node.show()}", None
    if option.choices and isinstance(value, str) and value not in option.choices:
        return f"{value!r} is not {option.wanted()}{nearest(value, option.choices)}", None
    if key in _REFUSED_VALUES and value == _REFUSED_VALUES[key][0]:
        return f"{node.show()} is refused: {_REFUSED_VALUES[key][1]}", None
    return "", value


def _fit(node: Node, kinds: frozenset[str]) -> tuple[bool, Any]:
    """(whether the value is of one of these kinds, the value)."""
    value = node.value
    name = "None" if value is None else type(value).__name__
    if name in kinds or (name == "int" and "float" in kinds):
        return True, node.plain()
    if name == "float" and "int" in kinds and value == int(value):  # type: ignore[arg-type, call-overload]
        return True, int(value)  # type: ignore[arg-type, call-overload]
    # A plain `no` is the word where a text is wanted: save_strategy: no.
    if "str" in kinds and node.text is not None and node.text.lower() not in ("true", "false"):
        return True, node.text
    return False, None


@cache
def sft_options() -> dict[str, Option]:
    """Every field of the installed ``trl.SFTConfig`` by name.

    Raises:
        UserError: trl or transformers is not installed, or not of a version whose files are known.
    """
    enums: dict[str, tuple[str, ...]] = {}
    for package, file in _ENUM_FILES:
        enums |= _enums(_parse(package, file))
    options: dict[str, Option] = {}
    for package, file, name in _CLASSES:
        found = [node for node in _parse(package, file).body if isinstance(node, ast.ClassDef) and node.name == name]
        if not found:
            raise UserError(f"{package}/{file} has no class {name}: this version of {package} is not supported")
        for field in found[0].body:
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                options[field.target.id] = _option(field, enums)
    return options


@cache
def _parse(package: str, file: str) -> ast.Module:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"{package} is not installed, so its options cannot be checked; run `pip install {package}`")
    source = FilePath(spec.submodule_search_locations[0]) / file
    if not source.is_file():
        raise UserError(f"{package} has no file {file}: this version of {package} is not supported")
    return ast.parse(source.read_text(encoding="utf-8"))


def _enums(module: ast.Module) -> dict[str, tuple[str, ...]]:
    """Classes whose body is ``NAME = "value"``: their values."""
    classes = [node for node in module.body if isinstance(node, ast.ClassDef) and node.bases]
    return {node.name: values for node in classes if (values := _enum_values(node))}


def _enum_values(node: ast.ClassDef) -> tuple[str, ...]:
    values = [line.value for line in node.body if isinstance(line, ast.Assign)]
    return tuple(value.value for value in values if isinstance(value, ast.Constant) and isinstance(value.value, str))


def _option(field: ast.AnnAssign, enums: dict[str, tuple[str, ...]]) -> Option:
    kinds: set[str] = set()
    choices: tuple[str, ...] = ()
    for member in _members(field.annotation):
        if isinstance(member, ast.Subscript):
            member = member.value
        name = "None" if isinstance(member, ast.Constant) and member.value is None else getattr(member, "id", "")
        if name in _SIMPLE:
            kinds.add(name)
        elif name in enums:
            choices = enums[name]
    if isinstance(field.value, ast.Call):
        metadata = [word.value for word in field.value.keywords if word.arg == "metadata"]
        choices = _choices(metadata[0]) or choices if metadata else choices
    return Option(frozenset(kinds), choices)


def _members(annotation: ast.expr) -> list[ast.expr]:
    """The members of ``A | B | None``."""
    if isinstance(annotation, ast.BinOp):
        return [*_members(annotation.left), *_members(annotation.right)]
    return [annotation]


def _choices(metadata: ast.expr) -> tuple[str, ...]:
    """The literal ``"choices": [...]`` of a field's metadata, or nothing."""
    if not isinstance(metadata, ast.Dict):
        return ()
    for key, value in zip(metadata.keys, metadata.values, strict=True):
        if isinstance(key, ast.Constant) and key.value == "choices" and isinstance(value, ast.List):
            return tuple(item.value for item in value.elts if isinstance(item, ast.Constant) and isinstance(item.value, str))
    return ()
