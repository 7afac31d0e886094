"""The cases of ``planning.py``: shapes of models, and the recipe of each."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Case:
    """One training run.

    Attributes:
        set: ``dev`` or ``validation``.
        stage: of the recipe, without data and sizes of the batch; a model is named ``@NAME`` where it is a checkpoint.
        checkpoints: name -> config of models that are saved first and loaded as any other.
        checkpoint_dtype: of these.
        adapters: name -> (the checkpoint that it is an adapter of, its rank).
        trainer: further options.
    """

    set: str
    stage: dict[str, Any]
    checkpoints: dict[str, dict[str, Any]] = field(default_factory=dict)
    checkpoint_dtype: str = "float32"
    adapters: dict[str, tuple[str, int]] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    vocabulary: int = 4000
    rows: int = 2
    length: int = 256

    def scaled(self, scale: str) -> Case:
        """The case itself (``1``), with the double batch (``batch``) or the double sequence (``length``)."""
        if scale == "batch":
            return replace(self, rows=2 * self.rows)
        return replace(self, length=2 * self.length) if scale == "length" else self


def recipe_of(case: Case, root: Path) -> dict[str, Any]:
    """The recipe as YAML would hold it; its files lie in ``root``."""

    def placed(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: placed(each) for key, each in value.items()}
        return str(root / value[1:]) if isinstance(value, str) and value.startswith("@") else value

    trainer = dict(
        max_steps=2,
        per_device_train_batch_size=case.rows,
        max_length=case.length,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
    )
    domains = {"general": "general", "shop": "ecommerce"}
    sources = {name: {"domain": domain, "path": str(root / f"{name}.jsonl")} for name, domain in domains.items()}
    data = {"shop": 0.5, "general": 0.5} if case.stage["type"] == "dae" else ["general"]
    stage = placed(case.stage) | {"data": data, "overlong": "drop", "trainer": trainer | case.trainer}
    return {
        "name": "planning",
        "output_dir": str(root / "run"),
        "tokenizer": str(root / "tokenizer"),
        "sources": sources,
        "stages": {"main": stage},
    }


def llama(
    hidden: int, layers: int, heads: int = 8, groups: int = 4, inner: int | None = None, kind: str = "llama", **more: Any
) -> dict[str, Any]:
    """A config of the Llama family."""
    return (
        dict(
            model_type=kind,
            hidden_size=hidden,
            intermediate_size=inner or 3 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=groups,
            max_position_embeddings=4096,
        )
        | more
    )


CASES = {
    # ---- small ones, for the tests ----
    "small-full": Case(
        "test",
        {
            "type": "kd",
            "student": {"config": llama(192, 4)},
            "teacher": {"config": llama(192, 3, kind="mixtral", num_local_experts=4)},
            "loss": {"hidden_weight": 1},
        },
        vocabulary=2000,
    ),
    "small-dae": Case(
        "test",
        {"type": "dae", "student": {"path": "@s"}, "teachers": {"ecommerce": {"adapter": "base"}}, "lora": {"r": 16}},
        {"s": llama(192, 4)},
        trainer={"gradient_checkpointing": False, "gradient_accumulation_steps": 2},
        vocabulary=2000,
        length=128,
    ),
    # ---- those that the estimator was made with ----
    "sft-full": Case("dev", {"type": "sft", "student": {"config": llama(384, 6)}}),
    "sft-full-plain": Case(
        "dev",
        {"type": "sft", "student": {"config": llama(384, 6)}},
        trainer={"gradient_checkpointing": False, "gradient_accumulation_steps": 2},
    ),
    "kd-attention": Case(
        "dev",
        {
            "type": "kd",
            "student": {"config": llama(256, 6)},
            "teacher": {"config": llama(512, 6)},
            "loss": {"attention_weight": 1},
        },
        trainer={"gradient_checkpointing": False},
    ),
    "kd-attention-ckpt-bf16": Case(
        "dev",
        {
            "type": "kd",
            "student": {"config": llama(256, 6, kind="mistral", sliding_window=None)},
            "teacher": {"config": llama(512, 6, kind="mistral", sliding_window=None)},
            "loss": {"attention_weight": 1, "hidden_weight": 1},
        },
        trainer={"bf16": True},
        vocabulary=16000,
    ),
    "kd-moe": Case(
        "dev",
        {
            "type": "kd",
            "student": {"config": llama(256, 4, kind="qwen3", head_dim=64, tie_word_embeddings=True)},
            "teacher": {"config": llama(256, 4, kind="mixtral", num_local_experts=4, num_experts_per_tok=2)},
        },
        trainer={"gradient_accumulation_steps": 2},
        vocabulary=16000,
    ),
    "lora": Case(
        "dev",
        {
            "type": "kd",
            "student": {"path": "@s", "dtype": "bfloat16"},
            "teacher": {"path": "@t", "dtype": "bfloat16"},
            "lora": {"r": 32, "lora_dropout": 0.1},
        },
        {"s": llama(384, 6), "t": llama(512, 4)},
        trainer={"gradient_checkpointing": False, "bf16": True},
    ),
    "qlora-dae": Case(
        "dev",
        {
            "type": "dae",
            "student": {"path": "@s", "dtype": "float32", "quantization": "4bit"},
            "teachers": {"ecommerce": {"path": "@t"}},
            "lora": {"r": 32, "lora_dropout": 0.1},
        },
        {"s": llama(512, 6), "t": llama(512, 4)},
        trainer={"gradient_checkpointing": False},
        length=128,
    ),
    # ---- chosen after the estimator was frozen ----
    "full-kd": Case(
        "validation",
        {
            "type": "kd",
            "student": {"config": llama(512, 4, inner=1024, kind="mistral", sliding_window=None)},
            "teacher": {"config": llama(512, 4, inner=1024, kind="mixtral", num_local_experts=8)},
            "loss": {"attention_weight": 1},
        },
        trainer={"gradient_checkpointing": False},
        vocabulary=24000,
    ),
    "lora-kd": Case(
        "validation",
        {
            "type": "kd",
            "student": {"path": "@s"},
            "teacher": {"config": llama(768, 4, heads=12, inner=1024, kind="mixtral", num_local_experts=8)},
            "lora": {"r": 64, "lora_dropout": 0.1},
        },
        {"s": llama(768, 6, heads=12, inner=2048)},
        trainer={"gradient_checkpointing": False},
        vocabulary=16000,
        length=192,
    ),
    "qlora-kd": Case(
        "validation",
        {
            "type": "kd",
            "student": {"path": "@s", "dtype": "float32", "quantization": "4bit"},
            "teacher": {"config": llama(768, 4, heads=12, inner=1024, kind="mixtral", num_local_experts=8)},
            "lora": {"r": 64},
        },
        {"s": llama(768, 8, heads=12, inner=2048)},
        trainer={"gradient_checkpointing": False},
        vocabulary=16000,
        length=192,
    ),
    "dae-shared-base": Case(
        "validation",
        {
            "type": "dae",
            "student": {"path": "@s"},
            "teachers": {"ecommerce": {"adapter": "@expert"}},
            "lora": {"r": 128, "lora_dropout": 0.05},
        },
        {"s": llama(768, 6, heads=12, inner=3072, kind="qwen3", head_dim=64)},
        adapters={"expert": ("s", 128)},
        trainer={"gradient_checkpointing": False},
        vocabulary=24000,
        length=192,
    ),
}
# below 1 GB at its first size
CASES["qlora-kd-longer"] = replace(CASES["qlora-kd"], length=320)
