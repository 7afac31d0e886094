"""The options of ``stages.X.trainer``: which there are, of what type, and which of them a recipe does not leave to the trainer.

They are those of ``trl.SFTConfig``. Importing it takes about ten seconds, so its fields are read from the installed source
files with ``ast``.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path as FilePath
from typing import Any

from daekit.errors import UserError, nearest
from daekit.recipe.objective import Objective
from daekit.recipe.reading import Leaf, Written, as_plain, as_text
from daekit.recipe.validation import Errors, dotted

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
    **dict.fromkeys(Objective.model_fields, _LOSS),
    **dict.fromkeys(("reference_domains", "overlong", "teacher_max_length"), "set `{stage}.{key}`"),
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
_POSITIVE = frozenset(
    {
        "max_length",
        "num_train_epochs",
        "per_device_train_batch_size",
        "per_device_eval_batch_size",
        "gradient_accumulation_steps",
    }
)
_NOT_NEGATIVE = frozenset({"learning_rate", "weight_decay", "max_grad_norm", "warmup_steps", "dataloader_num_workers"})
# What daekit's own configs set in place of TRL's defaults.
_OUR_DEFAULTS = {
    "assistant_only_loss": None,
    "router_aux_loss_coef": 0.0,
    "logging_nan_inf_filter": False,
    "disable_tqdm": True,
}


@dataclass(frozen=True)
class Option:
    """An option of the trainer.

    Attributes:
        kinds: names of the simple types that it takes.
        choices: its allowed values where they are listed.
        default: where it is a plain value; otherwise None.
        help: what TRL or transformers say of it, on one line.
    """

    kinds: frozenset[str]
    choices: tuple[str, ...] = ()
    default: Any = None
    help: str = ""

    def wanted(self) -> str:
        """What the option asks for, in words."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        return " or ".join(noun for kind, noun in _SIMPLE.items() if kind in self.kinds)


def read_trainer_options(value: Any, errors: Errors | None) -> Any:
    """The options of a stage, each checked against the field of ``trl.SFTConfig`` that has its name.

    Args:
        value: as it was written, or plain.
        errors: take what is wrong, one by one; None: it is raised.

    Raises:
        ValueError: without ``errors``: what is wrong.
    """
    if not isinstance(value, Mapping):
        return value
    path = value.path if isinstance(value, Written) else ("trainer",)
    values, wrong = {}, {}
    try:
        known = sft_options()
    except UserError as error:
        known, wrong[path] = {}, str(error)
    for key, below in value.items() if known else ():
        where = (*path, key)
        if errors is not None and errors.is_unread(where):
            continue
        reason, values[key] = _read_option(key, below, known, dotted(path[:-1]) or "stages.NAME")
        if reason:
            del values[key]
            wrong[where] = reason
    values_wrong = {(*path, key): reason for key, reason in _contradictions(values)}
    for where, reason in (wrong | values_wrong).items():
        if errors is None:
            raise ValueError(f"{dotted(where)}: {reason}")
        errors.add_unread(where, reason)
    return values


def _read_option(key: str, value: Any, known: Mapping[str, Option], stage: str) -> tuple[str, Any]:
    """(what is wrong or nothing, the value)."""
    if key in _ELSEWHERE:
        return f"refused here: {_ELSEWHERE[key].format(stage=stage, key=key)}", None
    if key not in known:
        return f"trl.SFTConfig has no such option{nearest(key, known)}", None
    option, shown = known[key], value.node.show() if isinstance(value, Leaf) else repr(value)
    if option.kinds <= {"None"}:
        return "cannot be set in a recipe", None
    fits, plain = _fit(value, option.kinds)
    if not fits:
        return f"wants {option.wanted()}, not {_shown(value)}", None
    if option.choices and isinstance(plain, str) and plain not in option.choices:
        return f"{plain!r} is not {option.wanted()}{nearest(plain, option.choices)}", None
    if key in _REFUSED_VALUES and plain == _REFUSED_VALUES[key][0]:
        return f"{shown} is refused: {_REFUSED_VALUES[key][1]}", None
    if plain is not None and key in _POSITIVE and plain <= 0:
        return f"{shown} must be greater than 0", None
    if plain is not None and key in _NOT_NEGATIVE and plain < 0:
        return f"{shown} must not be negative", None
    return "", plain


def _contradictions(options: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(option, reason) of values that the trainer takes as they are and stumbles over later."""
    if options.get("max_steps") == 0:
        yield "max_steps", "0 would train num_train_epochs instead; leave the stage out to train nothing"
    if options.get("packing") and options.get("max_length", 1) is None:
        yield "packing", "fills blocks of max_length tokens, which is null; give a number"
    if options.get("load_best_model_at_end") and (options.get("eval_strategy") or "no") == "no":
        yield "load_best_model_at_end", "needs evaluations to choose by; set eval_strategy"


def _shown(value: Any) -> str:
    if isinstance(value, Leaf):
        return value.node.show()
    return {"dict": "a mapping", "list": "a list"}.get(type(as_plain(value)).__name__, repr(value))


def _fit(written: Any, kinds: frozenset[str]) -> tuple[bool, Any]:
    """(whether the value is of one of these kinds, the value)."""
    value = as_plain(written)
    name = "None" if value is None else type(value).__name__
    if name in kinds or (name == "int" and "float" in kinds):
        return True, value
    if isinstance(value, float) and "int" in kinds and value.is_integer():
        return True, int(value)
    # A plain `no` is the word where a text is wanted: save_strategy: no.
    text = as_text(written)
    return ("str" in kinds and isinstance(text, str)), text


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
    words: dict[str | None, ast.expr] = {"default": field.value} if field.value is not None else {}
    if isinstance(field.value, ast.Call):
        words = {word.arg: word.value for word in field.value.keywords}
    metadata = _literals(words.get("metadata"))
    choices = tuple(metadata.get("choices", ())) or choices
    default = words.get("default")
    value = ast.literal_eval(default) if isinstance(default, (ast.Constant, ast.UnaryOp)) else None
    return Option(frozenset(kinds), choices, value, " ".join(str(metadata.get("help", "")).split()))


def default_options() -> dict[str, Any]:
    """Option -> what a stage has that does not set it, of all that a recipe can set and that are not empty."""
    values = {key: option.default for key, option in sft_options().items() if key not in _ELSEWHERE} | _OUR_DEFAULTS
    return {key: value for key, value in values.items() if value not in (None, "")}


def options_schema() -> dict[str, Any]:
    """The JSON Schema of ``trainer``."""
    types = {"str": "string", "int": "integer", "float": "number", "bool": "boolean", "dict": "object", "list": "array"}
    properties: dict[str, Any] = {}
    for key, option in sft_options().items():
        if key in _ELSEWHERE or option.kinds <= {"None"}:
            continue
        kinds = [types.get(kind, "null") for kind in sorted(option.kinds)]
        properties[key] = {"description": option.help, "type": kinds if len(kinds) > 1 else kinds[0]}
        if option.choices and not option.kinds & {"dict", "list", "int", "float", "bool"}:
            properties[key] |= {"enum": [*option.choices, *([None] if "None" in option.kinds else [])]}
    about = "Fields of trl.SFTConfig."
    return {"description": about, "type": "object", "properties": properties, "additionalProperties": False}


def _members(annotation: ast.expr) -> list[ast.expr]:
    """The members of ``A | B | None``."""
    if isinstance(annotation, ast.BinOp):
        return [*_members(annotation.left), *_members(annotation.right)]
    return [annotation]


def _literals(metadata: ast.expr | None) -> dict[str, Any]:
    """The entries of a field's metadata that are literals."""
    found: dict[str, Any] = {}
    for key, value in zip(metadata.keys, metadata.values, strict=True) if isinstance(metadata, ast.Dict) else ():
        if isinstance(key, ast.Constant) and isinstance(value, (ast.Constant, ast.List)):
            try:
                found[str(key.value)] = ast.literal_eval(value)
            except ValueError:  # an item that is no literal
                continue
    return found
