"""Output heads sharded by FSDP2 or ZeRO-3 over two real processes equal whole ones, with one gather per call of the loss."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from daekit.losses import Objective, PredictionSums, prediction_loss
from daekit.protocol import Member, OutputHead, TeacherOutput

V, H, TEACHER_H = 11, 6, 8
KEPT = [(5, 3), (4, 0), (0, 7), (0, 0)]  # positions of the two ranks
OBJECTIVE = Objective(ce_weight=0.3, prediction_weight=0.7, temperature=2.0)


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def linear(seed: int, hidden: int, trains: bool) -> nn.Linear:
    layer = nn.Linear(hidden, 13).double()
    layer.weight.data, layer.bias.data = random(seed, 13, hidden), random(seed + 1, 13)
    return layer.requires_grad_(trains)


def head_of(layer: nn.Linear) -> OutputHead:
    return OutputHead(layer.weight, layer.bias, V)


def loss_of(hidden: Tensor, teacher_hidden: Tensor, labels: Tensor, student: OutputHead, teacher: OutputHead) -> PredictionSums:
    half = torch.arange(len(hidden)) < len(hidden) // 2
    parts = (half.nonzero().flatten(), (~half).nonzero().flatten())  # two outputs of one head
    outputs = [TeacherOutput(part, (Member(teacher_hidden[part], teacher),)) for part in parts]
    return prediction_loss(hidden, student, labels, outputs, OBJECTIVE, 2)


def data(kept: tuple[int, int], rank: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states of student and teacher and labels of one rank, or (None) of both together."""
    whole = random(1, sum(kept), H), random(2, sum(kept), TEACHER_H), torch.arange(sum(kept)) % V
    mine = slice(None) if rank is None else slice(kept[0]) if rank == 0 else slice(kept[0], None)
    hidden, teacher_hidden, labels = (x[mine].clone() for x in whole)
    return hidden.requires_grad_(True), teacher_hidden, labels


class Student(nn.Module):
    """A model that computes the loss inside its forward, as the trainers do."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(H, H).double(), linear(10, H, True)
        self.body.weight.data, self.body.bias.data = random(5, H, H), random(6, H)

    def forward(self, x: Tensor, teacher_hidden: Tensor, labels: Tensor, teacher: OutputHead) -> Tensor:
        return loss_of(self.body(x), teacher_hidden, labels, head_of(self.head), teacher).loss


def run_fsdp(folder: Path) -> None:
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    gathers: list[Any] = []
    original = DTensor.full_tensor
    DTensor.full_tensor = lambda self, **options: (gathers.append(self.shape), original(self, **options))[1]
    results = []
    for kept in KEPT:
        student, teacher = linear(10, H, True), linear(20, TEACHER_H, False)
        for layer in (student, teacher):
            fully_shard(layer, mesh=mesh)
        hidden, teacher_hidden, labels = data(kept, rank)
        gathers.clear()
        sums = loss_of(hidden, teacher_hidden, labels, head_of(student), head_of(teacher))
        sums.loss.backward()
        count = len(gathers)
        assert isinstance(student.weight.grad, DTensor)
        gradients = [original(p.grad) for p in (student.weight, student.bias)]
        whole = Student()
        fully_shard(whole, mesh=mesh)
        gathers.clear()
        whole(hidden.detach(), teacher_hidden, labels, head_of(linear(20, TEACHER_H, False))).backward()
        inside = [original(p.grad) for p in whole.parameters()]
        results.append([sums.loss.detach(), hidden.grad, gradients, inside, count, len(gathers)])
    torch.save(results, folder / f"{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


class Scorer(nn.Module):
    """A teacher of which only the head matters here."""

    def __init__(self) -> None:
        super().__init__()
        self.head = linear(20, TEACHER_H, False)


def run_zero3(folder: Path) -> None:
    """One SGD step of rate 1 of the engine, which gathers and reduces by its own hooks."""
    import deepspeed

    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    rank = torch.distributed.get_rank()
    torch.set_default_dtype(torch.float64)
    # where a CPU has float16 (AVX512-FP16) DeepSpeed refuses float64, which it casts to its own dtype everywhere else
    deepspeed.get_accelerator().is_fp16_supported = lambda: False
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 1e9,
    }
    gathers: list[int] = []
    original = deepspeed.zero.GatheredParameters

    class Counted(original):
        def __enter__(self) -> Any:
            gathers.append(len(self.params))
            return super().__enter__()

    results = []
    for kept in KEPT:
        student, teacher = Student(), Scorer()
        optimizer = torch.optim.SGD(student.parameters(), lr=1.0)
        engine = deepspeed.initialize(model=student, optimizer=optimizer, config=config)[0]
        deepspeed.initialize(model=teacher, config=config)
        assert student.head.weight.numel() == teacher.head.weight.numel() == 0  # sharded
        hidden, teacher_hidden, labels = data(kept, rank)
        gathers.clear()
        deepspeed.zero.GatheredParameters = Counted
        loss = engine(hidden.detach(), teacher_hidden, labels, head_of(teacher.head))
        deepspeed.zero.GatheredParameters = original
        engine.backward(loss)
        engine.step()
        with original(list(student.parameters())):
            results.append([loss.detach(), [p.detach().clone() for p in student.parameters()], list(gathers)])
    torch.save(results, folder / f"{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def results_of(engine: str, folder: Path) -> list[Any]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    subprocess.run([*launcher, __file__, engine, str(folder)], check=True, env=environment, timeout=300)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_zero3_steps_as_one_process(tmp_path: Path) -> None:
    for kept, first, second in zip(KEPT, *results_of("zero3", tmp_path), strict=True):
        hidden, teacher_hidden, labels = data(kept, None)
        whole = Student()
        loss = whole(hidden.detach(), teacher_hidden, labels, head_of(linear(20, TEACHER_H, False)))
        loss.backward()
        for rank in (first, second):
            for mine, parameter in zip(rank[1], whole.parameters(), strict=True):
                expected = parameter.detach() - parameter.grad / 2
                torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)  # the engine steps in float32
            assert rank[2] == [
                2
            ]  # the teacher's weight and bias; the engine gathers the student's where its forward reads them
        torch.testing.assert_close(first[0] + second[0], loss.detach(), rtol=1e-5, atol=1e-5)


def test_two_ranks_with_unequal_positions_equal_one(tmp_path: Path) -> None:
    for kept, first, second in zip(KEPT, *results_of("fsdp", tmp_path), strict=True):
        student, teacher = linear(10, H, True), linear(20, TEACHER_H, False)
        hidden, teacher_hidden, labels = data(kept, None)
        sums = loss_of(hidden, teacher_hidden, labels, head_of(student), head_of(teacher))
        sums.loss.backward()
        whole = Student()
        whole(hidden.detach(), teacher_hidden, labels, head_of(teacher)).backward()
        torch.testing.assert_close(first[0] + second[0], sums.loss.detach())
        torch.testing.assert_close(torch.cat([first[1], second[1]]), hidden.grad)
        for rank in (first, second):
            for mine, parameter in zip(rank[2], (student.weight, student.bias), strict=True):
                torch.testing.assert_close(mine, parameter.grad / 2)  # the mean over the ranks, as of every other parameter
            for mine, parameter in zip(rank[3], whole.parameters(), strict=True):
                torch.testing.assert_close(mine, parameter.grad / 2)
            assert rank[4:] == [4, 0]  # weight and bias of each head, once; inside the root's forward they are whole


if __name__ == "__main__":
    {"fsdp": run_fsdp, "zero3": run_zero3}[sys.argv[1]](Path(sys.argv[2]))
