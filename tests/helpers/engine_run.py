"""One rank of a test of an engine: trains the cases it is given, says what engine it saw, writes weights and logs.

``accelerate launch --config_file recipes/accelerate/ENGINE.yaml --num_processes 2
tests/helpers/engine_run.py ENGINE FOLDER '["kd"]'``
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import transformers.modeling_utils as library
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import SequentialSampler
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from daekit.models import loading, zero3_loading
from daekit.models.sharded import is_sharded, whole
from daekit.models.split_loading import waits
from daekit.trainers import config, dae, distributed, kd
from daekit.trainers import data as trainer_data
from tests.helpers.ddp_run import trainer_of

KINDS = {
    "ddp": (DistributedType.MULTI_CPU, DistributedType.MULTI_GPU),
    "fsdp2": (DistributedType.FSDP,),
    "zero2": (DistributedType.DEEPSPEED,),
    "zero3": (DistributedType.DEEPSPEED,),
}


def is_split(parameter: Tensor) -> bool:
    """Whether this rank holds a part of the parameter only."""
    if isinstance(parameter, DTensor):
        return parameter.to_local().numel() < parameter.numel()
    return hasattr(parameter, "ds_id") and parameter.numel() == 0


def require_engine(engine: str, trainer: Any) -> None:
    """The engine that the test is about, and student and teachers split where it splits them."""
    accelerator = trainer.accelerator
    assert accelerator.distributed_type in KINDS[engine], accelerator.distributed_type
    assert accelerator.num_processes == torch.distributed.get_world_size() == 2
    if engine.startswith("zero"):
        assert accelerator.state.deepspeed_plugin.zero_stage == int(engine[-1])
        assert type(trainer.model_wrapped).__name__ == "DeepSpeedEngine"
    splits = engine in ("fsdp2", "zero3")
    for model in (trainer.model, *teacher_models(trainer.teacher)):
        packed = getattr(model, "is_quantized", False) and engine != "fsdp2"
        if model is not trainer.model and (packed or getattr(trainer.teacher, "_whole", False)):
            assert not any(map(is_sharded, model.parameters()))  # whole on each rank
            continue
        matrices = [is_split(p) for p in model.parameters() if p.ndim > 1 or hasattr(p, "ds_id")]
        assert matrices and all(split == splits for split in matrices), (type(model), matrices)


def teacher_models(teacher: Any) -> list[nn.Module]:
    if hasattr(teacher, "routes"):
        return [model for each in teacher.routes.values() for model in teacher_models(each)]
    members = teacher.members if hasattr(teacher, "members") else []
    return [model for each in members for model in teacher_models(each)] or [teacher.model]


def whole_weights(model: nn.Module) -> Tensor:
    """All trainable parameters in one vector, gathered; a collective call."""
    named = sorted((name, p) for name, p in model.named_parameters() if p.requires_grad)
    return torch.cat([whole(p).double().flatten() for _, p in named])


def connect(args: Any) -> None:
    """As in daekit, with ZeRO-3 told to split small parameters, too: all of a tiny model's would stay gathered."""
    distributed.connect(args)
    if args.deepspeed_plugin is not None:
        args.deepspeed_plugin.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0


def run(engine: str, case: str, folder: Path) -> None:
    unset_hf_deepspeed_config()  # of the case before: with ZeRO-3 random weights would be other ones
    trainer = trainer_of(case, folder, 2)
    assert waits(trainer.model) == (engine == "fsdp2" and "read" in case)
    trainer.train()
    require_engine(engine, trainer)
    metrics = trainer.evaluate()
    history = [entry for entry in trainer.state.log_history if "kl" in entry]
    rank = trainer.args.process_index
    result = {"weights": whole_weights(trainer.model), "history": history, "metrics": metrics}
    torch.save(result, folder / f"{case}-2-{rank}.pt")


def run_twice(engine: str, case: str, folder: Path) -> None:
    """Models that each rank reads its part of, and the same ones read whole: the same training, to the bit."""
    results: list[dict[str, Any]] = []
    for whole_models in (False, True):
        unset_hf_deepspeed_config()
        with pytest.MonkeyPatch.context() as patch:
            waiting = spy(patch)
            for module in (kd, dae) if whole_models else ():
                patch.setattr(module, "reads_parts", lambda *_, **__: False)
            if whole_models:  # then it is transformers under ZeRO-3, else it would fail here
                patch.setattr(zero3_loading, "can_read_parts", lambda: False)
            else:
                patch.setattr(library, "_load_state_dict_into_zero3_model", None)
            output = folder / case / str(whole_models)
            saving = dict(save_strategy="steps", save_steps=2, max_steps=4, optim="adamw_torch")
            trainer = trainer_of(case, output, 2, bf16="bf16" in case, **saving)
            assert waits(trainer.model) == (engine == "fsdp2" and not whole_models)
            trainer.train()
            require_engine(engine, trainer)
            assert not waits(trainer.model) and bool(waiting) == (engine == "fsdp2" and not whole_models)
            history = [entry for entry in trainer.state.log_history if "kl" in entry]
            result = {"weights": whole_weights(trainer.model), "history": history, "facts": trainer.checkpoints.facts()}
            results.append(result)
    parts, wholes = results
    assert torch.equal(parts["weights"], wholes["weights"]), case
    assert parts["history"] == wholes["history"] and parts["facts"] == wholes["facts"], case


def run_best(engine: str, case: str, folder: Path) -> None:
    """The worst checkpoint is called the best one, and loaded at the end: these weights are saved, and are those that run."""
    unset_hf_deepspeed_config()
    output = folder / case
    saving = dict(save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True)
    best = dict(metric_for_best_model="eval_kl", greater_is_better=True, save_only_model=False)
    trainer = trainer_of(case, output, 2, max_steps=2, **saving, **best)
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    value = trainer.evaluate()["eval_kl"]
    trainer.save_model(str(output / "model"))
    first = next(entry["eval_kl"] for entry in trainer.state.log_history if "eval_kl" in entry)
    assert value == pytest.approx(first), (value, first)
    if trainer.args.should_save:
        saved, wanted = (load_file(output / name / "model.safetensors") for name in ("model", "checkpoint-1"))
        assert all(torch.equal(saved[name], tensor) for name, tensor in wanted.items())


def spy(patch: pytest.MonkeyPatch) -> list[Any]:
    """The models that were made to wait for their weights."""
    made: list[Any] = []
    original = loading.waiting_model

    def noted(load: Any) -> Any:
        made.append(original(load))
        return made[-1]

    patch.setattr(loading, "waiting_model", noted)
    return made


def run_resumed(engine: str, case: str, folder: Path) -> None:
    """A straight run of four steps, and one that goes on from its second; then what was saved."""
    results = {}
    for name in ("straight", "resumed"):
        unset_hf_deepspeed_config()
        output = folder / case / name
        optimizer = "sgd" if "sgd" in case else "adamw_torch"
        trainer = trainer_of(case, output, 2, optim=optimizer, save_strategy="steps", save_steps=2, max_steps=4)
        if name == "resumed":
            if trainer.args.should_save:
                shutil.copytree(folder / case / "straight" / "checkpoint-2", output / "checkpoint-2")
            torch.distributed.barrier()
        trainer.train(resume_from_checkpoint=name == "resumed")
        require_engine(engine, trainer)
        results[name] = whole_weights(trainer.model)
        results[name + " history"] = [entry for entry in trainer.state.log_history if "kl" in entry]
        trainer.save_model(str(output / "model"))
    torch.save(results, folder / f"{case}-resumed-{trainer.args.process_index}.pt")


def run_rounded(engine: str, case: str, folder: Path) -> None:
    """In bfloat16 the reference rounds as the student does: at the first step it says the same, exactly."""
    unset_hf_deepspeed_config()
    trainer = trainer_of(case, folder / case, 2, bf16=True, max_steps=2)
    trainer.train()
    require_engine(engine, trainer)
    first, second = (entry["kl/general"] for entry in trainer.state.log_history if "kl/general" in entry)
    assert first == 0 < second, (case, first, second)


if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as patch:
        # keep the rows that have nothing to learn, and the order of all
        patch.setattr(trainer_data, "fit_to_length", lambda dataset, *_: (dataset, {}))
        patch.setattr(transformers.Trainer, "_get_train_sampler", lambda self, *_: SequentialSampler(self.train_dataset))
        patch.setattr(config, "connect", connect)
        for name in json.loads(sys.argv[3]):
            each = {"resumed": run_resumed, "rounded": run_rounded, "twice": run_twice, "best": run_best}.get(
                name.rsplit("-", 1)[-1], run
            )
            each(sys.argv[1], name, Path(sys.argv[2]))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
