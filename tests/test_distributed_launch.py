"""Launches: the configurations that ship, what accelerate would do in silence, and teachers that ranks must run together."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env
from peft import LoraConfig

from daekit.errors import UserError
from daekit.losses import Objective, prediction_loss
from daekit.models.backbone import hidden_at_loss_positions
from daekit.models.heads import output_head
from daekit.models.loading import load_model
from daekit.protocol import Batch
from daekit.recipe import load_recipe
from daekit.recipe.schema import ModelSpec
from daekit.runtime.run import run_recipe
from daekit.teachers import EnsembleTeacher, ModelTeacher, RoutedTeacher
from daekit.teachers.sharding import one_token
from daekit.trainers import KDConfig
from daekit.trainers.distributed_state import reading_safely
from tests.helpers import tiny
from tests.helpers.batches import collate, make_rows
from tests.helpers.trainer_world import V, kd, options, sft

CONFIGS = Path(__file__).parents[1] / "recipes" / "accelerate"
KINDS = {
    "ddp": DistributedType.MULTI_GPU,
    "fsdp2": DistributedType.FSDP,
    "zero2": DistributedType.DEEPSPEED,
    "zero3": DistributedType.DEEPSPEED,
}


def launched(*arguments: str) -> Any:
    """What `accelerate launch` makes of its arguments."""
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args([*arguments, "script.py"]))
    return args


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No trace of a launcher, in which these tests may run."""
    for name in ("LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    for name in ("ACCELERATE_USE_CPU", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        monkeypatch.setenv(name, "false")
    return monkeypatch


def test_the_configurations_that_ship() -> None:
    files = {path.stem: path for path in CONFIGS.glob("*.yaml")}
    assert files.keys() == KINDS.keys()
    for name, path in files.items():
        assert load_config_from_file(str(path)).distributed_type == KINDS[name]
        args = launched("--config_file", str(path), "--num_processes", "2")
        chosen = {"ddp": args.multi_gpu, "fsdp2": args.use_fsdp, "zero2": args.use_deepspeed, "zero3": args.use_deepspeed}
        assert chosen[name] and args.num_processes == 2 and not args.cpu
        assert f"--config_file recipes/accelerate/{path.name} " in path.read_text()  # the command in its header
        if name.startswith("zero"):
            assert args.zero_stage == int(name[-1])
            assert name == "zero2" or args.zero3_save_16bit_model


def fsdp_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    args = launched("--config_file", str(CONFIGS / "fsdp2.yaml"), "--num_processes", "2", "--main_process_port", "0")
    for name, value in prepare_multi_gpu_env(args).items():
        if name.startswith(("FSDP", "ACCELERATE")):
            monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    "change",
    [("FSDP_VERSION", "1"), ("FSDP_STATE_DICT_TYPE", "SHARDED_STATE_DICT"), ("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")],
)
def test_settings_of_fsdp_that_cannot_be_followed(change: tuple[str, str], clean: Any, tmp_path: Path) -> None:
    fsdp_environment(clean)
    KDConfig(**options(tmp_path))  # those that ship
    clean.setenv(*change)
    with pytest.raises(UserError, match=f"(?i){change[0]}: {change[1]} is not supported"):
        KDConfig(**options(tmp_path))


def test_fsdp_that_is_not(clean: Any, tmp_path: Path) -> None:
    fsdp_environment(clean)
    with pytest.raises(UserError, match="FSDP was asked for, but the processes run as NO"):
        sft(tmp_path, tiny.rows(4))


@pytest.mark.parametrize(("kind", "bits"), [("mistral", "8bit"), ("mixtral", "4bit")])
def test_a_quantised_student_that_nobody_splits(kind: str, bits: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.model(kind, hidden=64).save_pretrained(tmp_path)
    student = load_model(ModelSpec(path=str(tmp_path), quantization=bits, dtype="float32"))
    lora = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    monkeypatch.setattr("daekit.trainers.distributed.shards_parameters", lambda trainer: True)
    reason = "other quantised weights than" if bits == "8bit" else "quantised experts"
    with pytest.raises(UserError, match=f"{reason}.*ddp.yaml"):
        sft(tmp_path, tiny.rows(4), student, peft_config=lora)


def test_an_optimizer_that_fsdp2_cannot_split(clean: Any, tmp_path: Path) -> None:
    KDConfig(**options(tmp_path, optim="paged_adamw_8bit"))
    fsdp_environment(clean)
    with pytest.raises(UserError, match="optim: paged_adamw_8bit is of bitsandbytes, which cannot step"):
        KDConfig(**options(tmp_path, optim="paged_adamw_8bit"))


def test_evaluation_before_the_training(tmp_path: Path) -> None:
    trainer = sft(tmp_path, tiny.rows(4), eval_dataset=tiny.rows(4))
    trainer.is_deepspeed_enabled = True
    with pytest.raises(UserError, match=r"evaluate\(\) before train\(\)"):
        trainer.evaluate()


def test_reentrant_checkpointing_under_losses_that_look_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def zero3(self: transformers.Trainer) -> None:
        create(self)
        self.is_deepspeed_enabled = True

    create = transformers.Trainer.create_accelerator_and_postprocess
    monkeypatch.setattr(transformers.Trainer, "create_accelerator_and_postprocess", zero3)
    monkeypatch.setattr("daekit.trainers.distributed.shards_parameters", lambda trainer: True)
    monkeypatch.setattr("daekit.trainers.given.shard_teacher", lambda *_: None)
    monkeypatch.setattr("daekit.trainers.given.Sharding", lambda *_: None)
    lora = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    kd(tmp_path, tiny.rows(4), peft_config=lora, attention_weight=1.0)
    with pytest.raises(UserError, match="reentrant checkpointing"):
        kd(tmp_path, tiny.rows(4), peft_config=lora, attention_weight=1.0, gradient_checkpointing=True)


def test_deepspeed_that_is_not_there(clean: Any, tmp_path: Path) -> None:
    clean.setattr("daekit.trainers.distributed.is_deepspeed_available", lambda: False)
    with pytest.raises(UserError, match="DeepSpeed is not installed"):
        KDConfig(**options(tmp_path, deepspeed="ds.json"))
    clean.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UserError, match="DeepSpeed is not installed"):
        KDConfig(**options(tmp_path))
    clean.setattr("daekit.trainers.distributed.is_deepspeed_available", lambda: True)
    clean.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(UserError, match="DeepSpeed would become DDP"):
        KDConfig(**options(tmp_path))


RECIPE = """
name: small
output_dir: OUT
sources: {skills: {domain: general, path: "builtin:skills"}}
stages: {student: {type: sft, student: "nowhere/to-be-found", data: [skills]}}
"""


def test_more_ranks_than_devices(clean: Any, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE.replace("OUT", str(tmp_path / "out")))
    recipe = load_recipe(tmp_path / "r.yaml")
    clean.setattr(torch.accelerator, "is_available", lambda: True)
    clean.setattr(torch.accelerator, "device_count", lambda: 2)
    clean.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    clean.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(UserError, match=r"3 processes were launched .* 2 cuda device\(s\).*--num_processes 2"):
        run_recipe(recipe)
    with pytest.raises(UserError, match="3 processes were launched"):
        KDConfig(**options(tmp_path))
    assert not (tmp_path / "out").exists()


def test_one_process_where_several_were_asked_for(clean: Any, tmp_path: Path) -> None:
    for count in ("1", "2"):
        args = launched("--cpu", "--num_processes", count, "--num_machines", "1", "--mixed_precision", "no")
        environment = prepare_simple_launcher_cmd_env(args)[1]
        for name in ("ACCELERATE_USE_CPU", "ACCELERATE_MIXED_PRECISION", "MASTER_PORT"):
            if name in environment:
                clean.setenv(name, environment[name])
        if count == "1":
            KDConfig(**options(tmp_path))
    with pytest.raises(UserError, match="asked for several processes but has started one"):
        KDConfig(**options(tmp_path))


class EveryTeacherElsewhere:
    """Another rank has rows for every teacher; nothing is split."""

    device, splits = torch.device("cpu"), True

    def split(self, model: Any) -> None:
        self.models = [*getattr(self, "models", []), model]

    def somewhere(self, wanted: list[bool]) -> list[bool]:
        return [True] * len(wanted)


def batch(layout: str) -> Batch:
    return collate([row | {"domain": "shop"} for row in make_rows(7, 4)], layout)


def teacher(seed: int, hidden: int = 32) -> ModelTeacher:
    return ModelTeacher(tiny.model(seed=seed, hidden=hidden), V)


@pytest.mark.parametrize("layout", ["right", "flat"])
def test_a_rank_without_rows_runs_one_token(layout: str) -> None:
    rows, sharding = batch(layout), EveryTeacherElsewhere()
    expert, reference, third = teacher(2, 48), teacher(3), teacher(4)
    router = RoutedTeacher({"general": reference, "shop": expert})
    both = EnsembleTeacher([RoutedTeacher({"general": reference, "shop": expert}), third])
    alone = {speaker: speaker.outputs(rows) for speaker in (router, both)}
    assert [len(outputs) for outputs in alone.values()] == [1, 1]
    for speaker in (router, both):
        speaker.shard(sharding)
    assert sharding.models == [reference.model, expert.model, third.model]  # each once
    student = tiny.model(seed=1)
    expert_alone = ModelTeacher(student, V)  # for its keyword on_hidden
    hidden = hidden_at_loss_positions(expert_alone.model, rows)
    tokens: list[int] = []
    reference.model.base_model.register_forward_pre_hook(
        lambda _, __, kwargs: tokens.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    for speaker, before in alone.items():
        outputs = speaker.outputs(rows)
        kept = [output.positions_M.numel() for output in outputs]
        assert kept == [0, rows.labels_N.numel()]  # one output per teacher, in the order of the routes on every rank
        losses = [
            prediction_loss(hidden, output_head(student, V), rows.labels_N, given, Objective()).loss
            for given in (before, outputs)
        ]
        assert torch.equal(*losses)
    assert tokens == [1, 1]


@pytest.mark.parametrize("layout", ["right", "left", "flat"])
def test_one_token_keeps_nothing(layout: str) -> None:
    rows = batch(layout)
    small = one_token(rows, "general")
    assert small.inputs.keys() - rows.inputs.keys() <= {"attention_mask"}
    assert small.labels_N.numel() == 0 and small.domains == ("general",)
    assert torch.equal(small.layout.bounds_R1, torch.tensor([0, 0]))
    assert small.select([0]) is small
    assert replace(small).inputs["input_ids"].shape == (1, 1)
    assert hidden_at_loss_positions(teacher(2).model, small).shape == (0, 32)


class Anything:
    """What no checkpoint of DeepSpeed holds."""


def test_no_pickle_of_deepspeed_runs_code(tmp_path: Path) -> None:
    scaler = pytest.importorskip("deepspeed.runtime.fp16.loss_scaler").LossScaler(1.0)
    trainer: Any = SimpleNamespace(is_deepspeed_enabled=True)
    for name, content in (("good", scaler), ("bad", Anything())):
        torch.save({"loss_scaler": content}, tmp_path / name)
    with reading_safely(trainer):
        assert torch.load(tmp_path / "good", weights_only=False)["loss_scaler"].cur_scale == 1.0
        with pytest.raises(pickle.UnpicklingError, match="Anything"):
            torch.load(tmp_path / "bad", weights_only=False)
    assert isinstance(torch.load(tmp_path / "bad", weights_only=False)["loss_scaler"], Anything)  # nobody else's setting
