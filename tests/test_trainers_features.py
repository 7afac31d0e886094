"""Attention and hidden-state losses inside the trainers: against whole attention maps in float64, and what must not matter."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig, PreTrainedModel, Qwen3Config

from daekit.errors import UserError
from daekit.models.backbone import checkpointed_layers
from daekit.models.features import layers_of, match_layers
from daekit.protocol import FeatureSpec
from daekit.trainers import KDConfig
from tests import reference
from tests.helpers import tiny
from tests.helpers.trainer_world import (
    V,
    dae,
    gradients,
    in_float64,
    kd,
    logged,
    loss_and_gradient,
    micro_batches,
    relative,
    weights,
)

ATTENTION = {"attention_weight": 0.7, "prediction_weight": 0.5, "ce_weight": 0.3}
HIDDEN = {"hidden_weight": 0.6, "hidden_loss": "mse", "prediction_weight": 0.5}


def deep(layers: int, seed: int, hidden: int = 32, **fields: Any) -> PreTrainedModel:
    """A tiny Mistral of so many layers."""
    torch.manual_seed(seed)
    config = tiny.model(hidden=hidden, **fields).config
    config.num_hidden_layers = layers
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config)


class InsideTwin:
    """The whole objective, row by row, with the maps that the models themselves return."""

    def __init__(self, student: nn.Module, teachers: dict[str, nn.Module], config: KDConfig, trainer: Any = None) -> None:
        self.student, self.teachers, self.config = student, teachers, config
        self.matrices = trainer.features.projections if trainer is not None else None
        for model in (student, *teachers.values()):
            model.set_attn_implementation("eager")

    def look(self, model: nn.Module, ids: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Logits, attention of every layer, hidden states behind every layer (the last one before the final norm)."""
        hidden: list[Tensor] = []
        hooks = [layer.register_forward_hook(lambda _, __, out: hidden.append(out[0])) for layer in model.model.layers]
        out = model(input_ids=ids, output_attentions=True)
        for hook in hooks:
            hook.remove()
        return out.logits[0, :-1, :V], [each[0] for each in out.attentions], hidden

    def __call__(self, rows: Any) -> tuple[Tensor, float]:
        """The loss per kept token, and the mean attention KL."""
        args, total, tokens, attention_sum = self.config, torch.zeros((), dtype=torch.float64), 0, 0.0
        for row in rows:
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
            kept = labels != -100
            logits, maps, hidden = self.look(self.student, ids)
            teacher = self.teachers[row["domain"]]
            with torch.no_grad():
                their_logits, their_maps, their_hidden = self.look(teacher, ids)
            divergence = nn.functional.kl_div(logits.log_softmax(-1), their_logits.softmax(-1), reduction="none").sum(-1)
            ce = nn.functional.cross_entropy(logits, labels, reduction="none", ignore_index=-100)
            total = total + args.ce_weight * ce[kept].sum() + args.prediction_weight * divergence[kept].sum()
            if args.attention_weight:
                pairs = match_layers(args.attention_layers, len(maps), len(their_maps))
                each = [reference.attention_kl(their_maps[b], maps[a])[:-1][kept].sum() for a, b in pairs.items()]
                attention = sum(each) / (len(pairs) * maps[0].shape[0])
                attention_sum += float(attention)
                total = total + args.attention_weight * attention
            if args.hidden_weight:
                pairs = match_layers(args.hidden_layers, len(hidden), len(their_hidden))
                each = [self.distance(hidden[a], their_hidden[b], a, kept) for a, b in pairs.items()]
                total = total + args.hidden_weight * sum(each) / len(pairs)
            tokens += int(kept.sum())
        return total / tokens, attention_sum / tokens

    def distance(self, hidden: Tensor, theirs: Tensor, layer: int, kept: Tensor) -> Tensor:
        same = hidden.shape[-1] == theirs.shape[-1]
        matrix = None if same else self.matrices.matrix(theirs.shape[-1], layer).detach()
        return reference.hidden_distance(self.config.hidden_loss, hidden[:-1][kept], theirs[:-1][kept], matrix).sum()


@pytest.mark.parametrize("kind", ["mistral", "mixtral"])
@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("method", ["kd", "dae"])
def test_attention_loss_equals_the_models_own_maps(method: str, packing: bool, kind: str, tmp_path: Any) -> None:
    student, shop, general = tiny.model(kind, 1), tiny.model(kind, 2, hidden=48), tiny.model("mistral", 3)
    data, options = tiny.rows(9), ATTENTION | {"packing": packing}
    if method == "kd":
        trainer, teachers = kd(tmp_path, data, student, shop, **options), {"shop": shop, "general": shop}
    else:
        trainer = dae(tmp_path, data, student, teachers={"shop": shop}, reference=general, **options)
        teachers = {"shop": shop, "general": general}
    twin = InsideTwin(in_float64(student), {name: in_float64(each) for name, each in teachers.items()}, trainer.args)
    rows = kd(tmp_path, data).train_dataset if packing else trainer.train_dataset
    expected, attention = twin(rows)
    expected.backward()
    for size in (9, 2):
        loss, gradient = loss_and_gradient(trainer, micro_batches(trainer, size))
        assert loss == pytest.approx(expected.item(), rel=1e-5)
        assert relative(gradient, gradients(twin.student)) < 1e-5
    assert attention > 0.01
    assert student.config._attn_implementation == shop.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("layers", ["uniform", "last_2", [[0, 3], [2, 0]]], ids=str)
def test_layers_of_another_depth(layers: Any, checkpointing: bool, tmp_path: Any) -> None:
    student, teacher = deep(3, 1), deep(5, 2, hidden=48)
    options = ATTENTION | {"attention_layers": layers, "gradient_checkpointing": checkpointing}
    trainer = kd(tmp_path, tiny.rows(8), student, teacher, per_device_train_batch_size=8, max_steps=1, **options)
    twin = InsideTwin(in_float64(student), {d: in_float64(teacher) for d in ("shop", "general")}, trainer.args)
    expected, attention = twin(trainer.train_dataset)
    expected.backward()
    twin_step = torch.optim.SGD(twin.student.parameters(), lr=0.1)
    twin_step.step()
    trainer.train()
    assert logged(trainer, "loss")[0] == pytest.approx(expected.item(), rel=1e-5)
    assert logged(trainer, "attention_kl")[0] == pytest.approx(attention, rel=1e-5)
    assert relative(weights(trainer.model), weights(twin.student)) < 1e-6
    assert student.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("choice", "depths", "pairs"),
    [
        ("uniform", (2, 2), {0: 0, 1: 1}),
        ("uniform", (3, 6), {0: 1, 1: 3, 2: 5}),
        ("uniform", (2, 5), {0: 2, 1: 4}),
        ("uniform", (4, 2), {0: 0, 1: 0, 2: 1, 3: 1}),
        ("last_2", (3, 5), {1: 3, 2: 4}),
        (((0, 4), (2, 1)), (3, 5), {0: 4, 2: 1}),
    ],
)
def test_match_layers(choice: Any, depths: tuple[int, int], pairs: dict[int, int]) -> None:
    assert match_layers(choice, *depths) == pairs


def test_origin_pairs_each_layer_with_that_it_was_cut_from() -> None:
    student, teacher, sibling = deep(2, 1).config, deep(5, 2).config, deep(2, 3).config
    student.daekit_origin = sibling.daekit_origin = {"layers": [0, 3], "of": 5}
    spec = FeatureSpec(student, attention="origin", hidden="origin")
    assert layers_of(spec, teacher).attention == layers_of(spec, teacher).hidden == {0: 0, 1: 3}
    assert layers_of(spec, sibling).attention == {0: 0, 1: 1}, "of the same teacher: the same layers"
    with pytest.raises(UserError, match="cut to 2 of its teacher's 5 layers, but has 2, and is compared with a teacher of 2"):
        layers_of(spec, deep(2, 4).config)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("first_2", "choose uniform, origin, last_K"),
        ("last_4", "student's layer -1 on teacher's layer 1 does not exist"),
        (((0, 5),), "the student has 3 layers, the teacher 5"),
        (((0, 1), (0, 2)), "named twice"),
        ((), "choose uniform"),
    ],
)
def test_layers_that_do_not_exist(choice: Any, message: str, tmp_path: Any) -> None:
    with pytest.raises(UserError, match=message):
        kd(tmp_path, tiny.rows(4), deep(3, 1), deep(5, 2), attention_weight=1.0, attention_layers=choice)


@pytest.mark.parametrize("loss", ["mse", "cosine"])
@pytest.mark.parametrize("width", [32, 48])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_hidden_states_equal_the_formula(loss: str, width: int, checkpointing: bool, tmp_path: Any) -> None:
    student, teacher = deep(2, 1), deep(4, 2, hidden=width)
    options = HIDDEN | ATTENTION | {"hidden_loss": loss, "gradient_checkpointing": checkpointing}
    trainer = kd(tmp_path, tiny.rows(8), student, teacher, **options)
    twin = InsideTwin(in_float64(student), {d: in_float64(teacher) for d in ("shop", "general")}, trainer.args, trainer)
    expected, _ = twin(trainer.train_dataset)
    expected.backward()
    model = trainer.model.train()
    if checkpointing:  # which the Trainer turns on in train() only
        model.gradient_checkpointing_enable({"use_reentrant": False})
    assert checkpointed_layers(model) == ({0, 1} if checkpointing else set())
    batch = micro_batches(trainer, 8)[0]
    with trainer.until_backward():
        value = trainer.compute_loss(model, batch)
        value.backward()
    ours = torch.cat([p.grad.double().flatten() for name, p in sorted(model.named_parameters()) if "projections" not in name])
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    assert relative(ours, gradients(twin.student)) < 1e-5
    assert (trainer.features.projections is None) == (width == 32)


def test_projections_are_trained_resumed_and_not_part_of_the_student(tmp_path: Any) -> None:
    def trainer(folder: str) -> Any:
        options = HIDDEN | {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "optim": "adamw_torch"}
        student = tiny.model(seed=1)
        return kd(tmp_path / folder, tiny.rows(16), student, tiny.model(seed=2, hidden=48), **options)

    straight = trainer("run")
    before = {name: matrix.detach().clone() for name, matrix in straight.features.projections.matrices.items()}
    assert set(before) == {"48_0", "48_1"}
    straight.train()
    assert all(not torch.equal(before[name], matrix) for name, matrix in straight.features.projections.matrices.items())
    resumed = trainer("run")
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert torch.equal(weights(resumed.model), weights(straight.model))  # the projections are among them
    straight.save_model(str(tmp_path / "final"))
    plain, info = AutoModelForCausalLM.from_pretrained(tmp_path / "final", output_loading_info=True)
    assert not info["unexpected_keys"] and not info["missing_keys"]
    assert not any("projection" in name for name in plain.state_dict())
    (tmp_path / "run" / "checkpoint-4" / "hidden_projections.safetensors").unlink()
    with pytest.raises(UserError, match="hidden_projections"):
        trainer("run").train(resume_from_checkpoint=True)


@pytest.mark.parametrize("quantity", ["attention_weight", "hidden_weight"])
@pytest.mark.parametrize("adapter", [False, True])
def test_dae_with_the_student_as_reference_starts_at_zero(quantity: str, adapter: bool, tmp_path: Any) -> None:
    """Its attention and hidden states are its own; and the gradient is not that of the reference's forward on the same base."""
    rows = tiny.rows(8, domains=("general",))
    expert = {"shop": tiny.model(seed=3)}
    data = Dataset.from_list([*rows, {"prompt": "w1 ", "completion": "w2", "domain": "shop"}])
    peft = {"peft_config": LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")} if adapter else {}
    options: dict[str, Any] = {quantity: 1.0, "learning_rate": 1.0, "max_steps": 2, "per_device_train_batch_size": 8}
    trainer = dae(tmp_path, data, tiny.model(seed=1), teachers=expert, reference=None, **peft, **options)
    assert isinstance(trainer.model, PeftModel) == adapter
    name = {"attention_weight": "attention_kl", "hidden_weight": "hidden_cosine"}[quantity]
    first = trainer.evaluate(Dataset.from_list(list(rows)))
    assert first[f"eval_{name}/general"] == pytest.approx(0.0, abs=1e-6)
    trainer.train()
    assert trainer.evaluate(Dataset.from_list(list(rows)))[f"eval_{name}/general"] > 1e-5


def test_evaluation_reports_the_whole_loss(tmp_path: Any) -> None:
    data = tiny.rows(8)
    trainer = kd(tmp_path, data, tiny.model(seed=1), tiny.model(seed=2), eval_dataset=data, **ATTENTION)
    twin = InsideTwin(in_float64(trainer.model), {d: in_float64(tiny.model(seed=2)) for d in ("shop", "general")}, trainer.args)
    expected, attention = twin(trainer.train_dataset)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert metrics["eval_attention_kl"] == pytest.approx(attention, rel=1e-5)


def test_lora_with_checkpointing_equals_without(tmp_path: Any) -> None:
    results = []
    for checkpointing in (False, True):
        peft = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        torch.manual_seed(0)
        trainer = kd(
            tmp_path, tiny.rows(8), tiny.model(seed=1), tiny.model(seed=2, hidden=48), peft_config=peft,
            gradient_checkpointing=checkpointing, max_steps=2, **ATTENTION,
        )  # fmt: skip
        trainer.train()
        results.append((weights(trainer.model), logged(trainer, "loss"), logged(trainer, "attention_kl")))
    (straight, *logs), (checkpointed, *others) = results
    assert relative(checkpointed, straight) < 1e-6
    torch.testing.assert_close(torch.tensor(others), torch.tensor(logs))


def test_only_kept_tokens_and_their_rows_count(tmp_path: Any) -> None:
    """Padding and masked prompts are no queries: the sum over micro-batches of any size is the same."""
    trainer = kd(tmp_path, tiny.rows(9), tiny.model(seed=1), tiny.model(seed=2), **ATTENTION)
    loss, gradient = loss_and_gradient(trainer, micro_batches(trainer, 9))
    for size in (4, 1):
        other, too = loss_and_gradient(trainer, micro_batches(trainer, size))
        assert other == pytest.approx(loss, rel=1e-5)
        assert relative(too, gradient) < 1e-5


def other_family(kind: str) -> PreTrainedModel:
    common: dict[str, Any] = dict(
        vocab_size=tiny.PADDED_VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=256, initializer_range=0.2, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    configs = {"llama": LlamaConfig, "qwen3": Qwen3Config, "gpt_neox": GPTNeoXConfig}
    groups = {} if kind == "gpt_neox" else {"num_key_value_heads": 2}
    torch.manual_seed(5)
    return AutoModelForCausalLM.from_config(configs[kind](**common, **groups))


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt_neox"])
def test_other_families(kind: str, tmp_path: Any) -> None:
    """Teacher and student of one family with the same weights: zero; with other weights: more, and it falls."""
    student = other_family(kind)
    same = kd(tmp_path, tiny.rows(8), student, copy.deepcopy(student), attention_weight=1.0, hidden_weight=1.0)
    metrics = same.evaluate(tiny.rows(8))
    assert metrics["eval_attention_kl"] == 0 and metrics["eval_hidden_cosine"] == pytest.approx(0, abs=1e-6)
    trainer = kd(
        tmp_path, tiny.rows(8), student, tiny.model(seed=2), attention_weight=1.0, prediction_weight=0.0,
        per_device_train_batch_size=8, max_steps=6, num_train_epochs=6, optim="adamw_torch", learning_rate=0.01,
    )  # fmt: skip
    trainer.train()
    values = logged(trainer, "attention_kl")
    assert values[-1] < 0.9 * values[0]


def test_relation_heads_in_a_trainer(tmp_path: Any) -> None:
    torch.manual_seed(1)
    config = tiny.model().config
    config.num_attention_heads = config.num_key_value_heads = 2
    config.head_dim = 16
    student = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UserError, match=r"student has 2 attention heads, its teacher 4: .*attention_relation_heads"):
        kd(tmp_path, tiny.rows(4), student, tiny.model(seed=2), attention_weight=1.0)
    trainer = kd(
        tmp_path, tiny.rows(8), student, tiny.model(seed=2), attention_weight=1.0, attention_relation_heads=8,
        prediction_weight=0.0, per_device_train_batch_size=8,
        max_steps=6, num_train_epochs=6, optim="adamw_torch", learning_rate=0.01,
    )  # fmt: skip
    trainer.train()
    values = logged(trainer, "attention_kl")
    assert 0 < values[-1] < 0.9 * values[0]


def test_windows_equal_the_models_own(tmp_path: Any) -> None:
    student, teacher = tiny.model(seed=1, sliding_window=4), tiny.model(seed=2, sliding_window=3)
    trainer = kd(tmp_path, tiny.rows(8), student, teacher, **ATTENTION)
    twin = InsideTwin(in_float64(student), {d: in_float64(teacher) for d in ("shop", "general")}, trainer.args)
    expected, _ = twin(trainer.train_dataset)
    loss, _ = loss_and_gradient(trainer, micro_batches(trainer, 8))
    assert loss == pytest.approx(expected.item(), rel=1e-5)
