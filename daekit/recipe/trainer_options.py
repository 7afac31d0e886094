"""The options of ``stages.X.trainer``: the fields of ``trl.SFTConfig`` that a recipe leaves to its user.

Importing TRL takes about ten seconds, so the fields are read from the installed source files with ``ast``, and made a class
of the same kind as the rest of a recipe.
"""

from __future__ import annotations

import ast
import importlib.util
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Union

from pydantic import BeforeValidator, Field, create_model

from daekit.errors import UserError
from daekit.recipe.objective import Objective
from daekit.recipe.reading import Choice, Flag, Free, Number, Spec, Text, Whole, as_plain
from daekit.recipe.validation import Errors, Problems

# The dataclass and its bases, the most general first.
_CLASSES = (
    ("transformers", "training_args.py", "TrainingArguments"),
    ("trl", "trainer/base_config.py", "_BaseConfig"),
    ("trl", "trainer/sft_config.py", "SFTConfig"),
)
_ENUM_FILES = (("transformers", "trainer_utils.py"), ("transformers", "training_args.py"))
# In the order in which they are tried.
_TYPES: dict[str, Any] = {
    "bool": Flag,
    "int": Whole,
    "float": Number,
    "dict": Free,
    "list": Annotated[list[Any], BeforeValidator(as_plain)],
    "str": Text,
}

_RUN = "daekit decides it for every stage"
# The only value that an option may have, for the trainers of daekit and for recipes -> why.
ONLY_VALUE: dict[str, tuple[Any, str]] = {
    "label_smoothing_factor": (0.0, "label smoothing would change the objective silently"),
    "loss_type": ("nll", "the loss is set by ce_weight, prediction_weight and divergence"),
    "neftune_noise_alpha": (None, "noise on the student's embeddings would change the objective silently"),
    "average_tokens_across_devices": (True, "the loss would be a mean of means; every token counts the same in daekit"),
    "fp16": (False, "the loss has its gradients before the GradScaler scales them: they would underflow; use bf16"),
    "use_liger_kernel": (
        False,
        "daekit has its own loss, which never makes logits of the whole batch, and Liger's other kernels replace layers of the "
        "teachers' family, too; they were not tried",
    ),
    "auto_find_batch_size": (
        False,
        "out of memory it would halve the batch and with it the objective; `daekit plan` says what fits",
    ),
    "truncation_mode": ("keep_start", "rows are cut at their end, and counted when they are"),
}
_ONLY_VALUE_IN_RECIPES = ONLY_VALUE | {
    "logging_nan_inf_filter": (False, "it would hide a loss that is not finite behind the last good one"),
    "save_only_model": (False, "a stage that is stopped could not resume without its optimizer"),
    "ignore_data_skip": (False, "a stage that is resumed would train on other rows than one that was not stopped"),
}
# Refused whatever their value.
_ELSEWHERE = {
    "output_dir": "set `output_dir` of the recipe",
    "seed": "set `seed` of the recipe, or `{stage}.seed`",
    "data_seed": "set `seed` of the recipe",
    "liger_kernel_config": "daekit has its own loss; leave it out",
    "eval_dataset": "validation rows are set per source: `sources.NAME.validation`, `validation_split` or `holdout`",
    "train_dataset": "rows are set in `sources` and `{stage}.data`",
    "peft_config": "set `{stage}.lora`",
    "dataset_text_field": "set `sources.NAME.columns.text`",
    "dataset_kwargs": "rows and their columns are set in `sources`",
    "remove_unused_columns": "the domain of each row is such a column; " + _RUN,
    "model_init_kwargs": "how a model is loaded is set where it is named: `dtype`, `attn_implementation`, `revision`...",
    "trust_remote_code": "how a model is loaded is set where it is named, for instance `{stage}.student.{key}`",
    "chat_template_path": "set `tokenizer.chat_template`",
    "resume_from_checkpoint": "the same command resumes from the last complete checkpoint by itself",
    "hub_token": "a secret does not belong in a recipe; set HF_TOKEN in the environment",
    "local_rank": "the launcher (accelerate, torchrun) sets it",
    **dict.fromkeys(("eos_token", "pad_token"), "the tokenizer is set in `tokenizer`"),
    **dict.fromkeys(("do_train", "do_eval", "do_predict"), _RUN),
    **dict.fromkeys(Objective.model_fields, "the objective is the stage's: set `{stage}.loss.{key}`"),
    **dict.fromkeys(("reference_domains", "overlong", "teacher_max_length", "select"), "set `{stage}.{key}`"),
}
_POSITIVE = {"max_length", "num_train_epochs", "gradient_accumulation_steps"}
_POSITIVE |= {"per_device_train_batch_size", "per_device_eval_batch_size"}
_NOT_NEGATIVE = {"learning_rate", "weight_decay", "max_grad_norm", "warmup_steps", "dataloader_num_workers"}
# What daekit's own configs set in place of TRL's defaults.
_OUR_DEFAULTS = {"assistant_only_loss": None, "router_aux_loss_coef": 0.0}
_OUR_DEFAULTS |= {"logging_nan_inf_filter": False, "disable_tqdm": True}


class _Options(Spec):
    """Fields of trl.SFTConfig."""

    NOUN: ClassVar = "a mapping"

    def problems(self) -> Problems:
        """Values that are refused, and those that the trainer takes as they are and stumbles over later."""
        values = {key: getattr(self, key) for key in self.model_fields_set}
        for key in values.keys() & _ONLY_VALUE_IN_RECIPES:
            only, reason = _ONLY_VALUE_IN_RECIPES[key]
            if values[key] != only:
                yield key, f"{str(values[key]).lower()} is refused: {reason}"
        if values.get("max_steps") == 0:
            yield "max_steps", "0 would train num_train_epochs instead; leave the stage out to train nothing"
        if values.get("packing") and values.get("max_length", 1) is None:
            yield "packing", "fills blocks of max_length tokens, which is null; give a number"


def read_trainer_options(value: Any, errors: Errors | None) -> dict[str, Any]:
    """The options of a stage, each checked against the field of ``trl.SFTConfig`` that has its name.

    Raises:
        ValueError: trl or transformers is not installed; without ``errors``: what is wrong with an option.
    """
    options = trainer_options().model_validate(value, context=errors)
    plain = as_plain(value)
    read = {} if options is None else {key: getattr(options, key) for key in plain if key in options.model_fields_set}
    # a whole number stays one where any number may be
    return {key: plain[key] if type(plain[key]) is int and plain[key] == found else found for key, found in read.items()}


@cache
def trainer_options() -> type[Spec]:
    """The class of what may be set.

    Raises:
        UserError: trl or transformers is not installed, or not of a version whose files are known.
    """
    enums: dict[str, tuple[str, ...]] = {}
    for package, file in _ENUM_FILES:
        for node in _parse(package, file).body:
            if isinstance(node, ast.ClassDef) and node.bases and (values := _enum_values(node)):
                enums[node.name] = values
    fields: dict[str, Any] = {}
    elsewhere = dict(_ELSEWHERE)
    for package, file, name in _CLASSES:
        found = [node for node in _parse(package, file).body if isinstance(node, ast.ClassDef) and node.name == name]
        if not found:
            raise UserError(f"{package}/{file} has no class {name}: this version of {package} is not supported")
        for line in found[0].body:
            if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and line.target.id not in _ELSEWHERE:
                fields[line.target.id] = _field(line, enums)
    for key in [key for key, (kind, _) in fields.items() if kind is None]:
        elsewhere[key] = "cannot be set in a recipe"
        del fields[key]
    options = create_model("TrainerOptions", __base__=_Options, __doc__=_Options.__doc__, **fields)
    options.ELSEWHERE = elsewhere
    return options


def default_options() -> dict[str, Any]:
    """Option -> what a stage has that does not set it, of all that a recipe can set and that are not empty."""
    values = {key: each.default for key, each in trainer_options().model_fields.items()} | _OUR_DEFAULTS
    return {key: value for key, value in values.items() if value not in (None, "")}


@cache
def _parse(package: str, file: str) -> ast.Module:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"{package} is not installed, so its options cannot be checked; run `pip install {package}`")
    source = Path(spec.submodule_search_locations[0]) / file
    if not source.is_file():
        raise UserError(f"{package} has no file {file}: this version of {package} is not supported")
    return ast.parse(source.read_text(encoding="utf-8"))


def _enum_values(node: ast.ClassDef) -> tuple[str, ...]:
    """The values of a class whose body is ``NAME = "value"``."""
    values = [line.value for line in node.body if isinstance(line, ast.Assign)]
    return tuple(value.value for value in values if isinstance(value, ast.Constant) and isinstance(value.value, str))


def _field(line: ast.AnnAssign, enums: dict[str, tuple[str, ...]]) -> tuple[Any, Any]:
    """(type, or None for one that a recipe cannot write; default and documentation) of a field of a dataclass."""
    words: dict[str | None, ast.expr] = {"default": line.value} if line.value is not None else {}
    if isinstance(line.value, ast.Call):
        words = {word.arg: word.value for word in line.value.keywords}
    default, metadata = words.get("default"), _literals(words.get("metadata"))
    value = ast.literal_eval(default) if isinstance(default, (ast.Constant, ast.UnaryOp)) else None
    names = [member.partition("[")[0] for member in ast.unparse(line.annotation).split(" | ")]
    choices = tuple(metadata.get("choices", ())) or next((enums[name] for name in names if name in enums), ())
    kinds = [kind for name, kind in _TYPES.items() if name in names and not (choices and name == "str")]
    if choices:
        kinds.append(Annotated[Literal[choices], Choice])
    if not kinds:
        return None, None
    kind: Any = kinds[0] if len(kinds) == 1 else Annotated[Union[tuple(kinds)], Field(union_mode="left_to_right")]  # noqa: UP007
    key, about = getattr(line.target, "id", ""), " ".join(str(metadata.get("help", "")).split())
    field = Field(value, description=about, gt=0 if key in _POSITIVE else None, ge=0 if key in _NOT_NEGATIVE else None)
    return (kind | None if "None" in names else kind), field


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
