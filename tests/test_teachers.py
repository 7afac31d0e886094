"""Teachers: who speaks for which token, with which weights, and what is left behind in the student."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from trl.trainer.utils import add_fused_lm_head

from daekit.errors import UserError
from daekit.models.backbone import add_on_hidden, frozen_copy, hidden_at_loss_positions
from daekit.protocol import Batch, FeatureSpec, Teacher, TeacherOutput
from daekit.teachers import EnsembleTeacher, ModelTeacher, RoutedTeacher
from tests.helpers import tiny
from tests.helpers.batches import collate
from tests.helpers.teacher_cases import ROWS, V, batch_of, plain, says


def wide(seed: int, **fields: Any) -> Any:
    return tiny.model(seed=seed, hidden=48, **fields)


def teacher(seed: int, **fields: Any) -> ModelTeacher:
    return ModelTeacher(tiny.model(seed=seed, **fields), V)


@contextmanager
def tokens_through(*models: Any) -> Iterator[list[int]]:
    """The number of tokens of every forward of these models' backbones."""
    counted: list[int] = []

    def count(module: Any, args: Any, kwargs: Any) -> None:
        counted.append(kwargs["input_ids"].numel())

    handles = [model.base_model.register_forward_pre_hook(count, with_kwargs=True) for model in models]
    yield counted
    for handle in handles:
        handle.remove()


# ---- one model ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["right", "left", "packed"])
def test_a_model_teacher_says_what_the_model_says(layout: str) -> None:
    model = wide(1)
    expected = plain(copy.deepcopy(model).eval(), batch_of()).detach()
    speaker = ModelTeacher(model, V)
    torch.testing.assert_close(says(speaker, batch_of(layout)), expected, rtol=1e-4, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in model.parameters()) and not model.training


def test_a_teacher_of_too_few_columns_is_an_error() -> None:
    with pytest.raises(UserError, match="48 columns but the tokenizer has 49 ids"):
        ModelTeacher(tiny.model(), 49)


def test_a_dropout_of_the_teacher_never_acts() -> None:
    model = tiny.model(attention_dropout=0.5)
    speaker = ModelTeacher(model, V)
    model.train()  # as an enclosing module's train() would do
    assert torch.equal(says(speaker, batch_of()), says(speaker, batch_of()))
    assert model.training


def test_identity_tells_models_apart() -> None:
    assert teacher(1).identity() == teacher(1).identity() != teacher(2).identity()


def test_a_frozen_copy_runs_its_own_weights() -> None:
    """TRL and we hang forwards on the instance that close over it; a copy that keeps them would run the original."""
    original = tiny.model(seed=1)
    before = plain(original, batch_of()).detach()
    add_fused_lm_head(original)
    add_on_hidden(original)
    twin = frozen_copy(original)
    reference = ModelTeacher(twin, V)
    with torch.no_grad():
        for parameter in original.parameters():
            parameter.add_(torch.randn_like(parameter))
    torch.testing.assert_close(says(reference, batch_of()), before, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(plain(twin, batch_of()), before, rtol=1e-4, atol=1e-5)  # its own logits as well
    changed = hidden_at_loss_positions(original, batch_of())
    assert not torch.allclose(changed, reference.outputs(batch_of())[0].members[0].hidden_MH, atol=1e-2)


def test_the_forward_without_on_hidden_is_as_before() -> None:
    model, ids = tiny.model(seed=1), torch.tensor([[5, 6, 7]])
    before = model(input_ids=ids).logits
    add_on_hidden(model)
    add_on_hidden(model)
    assert torch.equal(model(input_ids=ids).logits, before)
    assert model(input_ids=ids, on_hidden=lambda out: out.last_hidden_state).shape == (1, 3, 32)


# ---- by row -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["right", "left", "packed", "blocks"])
def test_one_frozen_forward_per_row(layout: str) -> None:
    batch = batch_of(layout)
    general, shop = teacher(1), ModelTeacher(wide(2), V)
    routed = RoutedTeacher({"general": general, "law": general, "shop": shop})
    with tokens_through(general.model, shop.model) as counted:
        said = says(routed, batch)
    assert sum(counted) == batch.labels_BT.numel()
    assert len(counted) == 2  # `general` runs once for its two domains
    alone = torch.full_like(said, float("nan"))
    for row, domain in enumerate(batch.domains):
        speaker = shop if domain == "shop" else general
        alone[batch.positions_of([row])] = says(speaker, batch.select([row]))
    torch.testing.assert_close(said, alone, rtol=1e-4, atol=1e-5)


def test_an_unknown_domain_names_the_nearest() -> None:
    routed = RoutedTeacher({"general": teacher(1), "shopp": teacher(2), "law": teacher(3)})
    with pytest.raises(UserError, match=r"'shop' has rows but no teacher .*did you mean 'shopp'\?"):
        routed.outputs(batch_of())


@pytest.mark.parametrize("layout", ["right", "packed"])
def test_routing_with_one_teacher_is_distillation(layout: str) -> None:
    batch, speaker = batch_of(layout), teacher(1)
    (routed,) = RoutedTeacher(dict.fromkeys(["general", "shop", "law"], speaker)).outputs(batch)
    (alone,) = speaker.outputs(batch)
    assert torch.equal(routed.positions_M, alone.positions_M)
    assert torch.equal(routed.members[0].hidden_MH, alone.members[0].hidden_MH)


def test_a_teacher_whose_rows_keep_nothing_is_heard_without_harm() -> None:
    rows = [ROWS[0], ROWS[1] | {"labels": [-100] * len(ROWS[1]["labels"])}]
    batch = collate(rows, "right")
    routed = RoutedTeacher({"general": teacher(1), "shop": teacher(2)})
    torch.testing.assert_close(says(routed, batch), says(routed.routes["general"], batch), rtol=1e-4, atol=1e-5)


def test_identity_of_a_routed_teacher_names_domains() -> None:
    a, b = teacher(1), teacher(2)
    assert RoutedTeacher({"x": a, "y": b}).identity() == RoutedTeacher({"y": b, "x": a}).identity()
    assert RoutedTeacher({"x": a, "y": b}).identity() != RoutedTeacher({"x": b, "y": a}).identity()


# ---- several at once ------------------------------------------------------------------------------------------------------


def mean(members: list[tuple[float, Teacher]], batch: Batch, average: str, temperature: float) -> Tensor:
    if average == "logits":
        logits = sum(weight * says(member, batch) / temperature for weight, member in members)
        return torch.log_softmax(logits, -1)
    return torch.log(sum(weight * says(member, batch, temperature).exp() for weight, member in members))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("average", ["logits", "probabilities"])
def test_ensembles(average: str, temperature: float) -> None:
    batch = batch_of()
    members = [(0.5, teacher(1)), (0.3, ModelTeacher(wide(2), V)), (0.2, teacher(3, tie_word_embeddings=True))]
    ensemble = EnsembleTeacher([m for _, m in members], [w for w, _ in members], average)
    said = says(ensemble, batch, temperature)
    torch.testing.assert_close(said, mean(members, batch, average, temperature), rtol=1e-4, atol=1e-5)
    turned = EnsembleTeacher([m for _, m in members[::-1]], [w for w, _ in members[::-1]], average)
    torch.testing.assert_close(says(turned, batch, temperature), said, rtol=1e-5, atol=1e-6)
    alone = EnsembleTeacher([members[1][1]], average=average)
    assert torch.equal(says(alone, batch, temperature), says(members[1][1], batch, temperature))


@pytest.mark.parametrize("average", ["logits", "probabilities"])
def test_compositions_agree(average: str) -> None:
    """Routed of ensembles = ensemble of routed, and an ensemble inside an ensemble = one with the weights multiplied."""
    batch = batch_of("packed")
    a, b, c = teacher(1), teacher(2), ModelTeacher(wide(3), V)
    inside = RoutedTeacher(
        {
            "general": EnsembleTeacher([a, b], [0.7, 0.3], average),
            "shop": EnsembleTeacher([c, b], [0.7, 0.3], average),
            "law": EnsembleTeacher([c, a], [0.7, 0.3], average),
        }
    )
    first = RoutedTeacher({"general": a, "shop": c, "law": c})
    second = RoutedTeacher({"general": b, "shop": b, "law": a})
    outside = EnsembleTeacher([first, second], [0.7, 0.3], average)
    torch.testing.assert_close(says(inside, batch), says(outside, batch), rtol=1e-4, atol=1e-5)
    nested = EnsembleTeacher([EnsembleTeacher([a, b], [0.6, 0.4], average), c], [0.5, 0.5], average)
    flat = EnsembleTeacher([a, b, c], [0.3, 0.2, 0.5], average)
    torch.testing.assert_close(says(nested, batch), says(flat, batch), rtol=1e-4, atol=1e-5)


class Shuffled:
    """A teacher of a user's own that lists its positions in another order, as the protocol allows."""

    def __init__(self, inner: Teacher) -> None:
        self.inner = inner

    def outputs(self, batch: Batch, capture: FeatureSpec | None = None) -> list[TeacherOutput]:
        (output,) = self.inner.outputs(batch)
        order = torch.randperm(output.positions_M.numel(), generator=torch.Generator().manual_seed(0))
        members = tuple(replace(member, hidden_MH=member.hidden_MH[order]) for member in output.members)
        return [replace(output, positions_M=output.positions_M[order], members=members)]

    def identity(self) -> dict[str, object]:
        return self.inner.identity()

    def to(self, device: torch.device) -> Teacher:
        return self


def test_members_may_list_positions_in_any_order() -> None:
    batch = batch_of()
    assert isinstance(Shuffled(teacher(2)), Teacher)
    straight = EnsembleTeacher([teacher(1), teacher(2)])
    for members in ([teacher(1), Shuffled(teacher(2))], [Shuffled(teacher(1)), teacher(2)]):
        torch.testing.assert_close(says(EnsembleTeacher(members), batch), says(straight, batch), rtol=1e-5, atol=1e-6)


def test_what_an_ensemble_refuses() -> None:
    a, b = teacher(1), teacher(2)
    for weights in ([1.0], [0.5, 0.6], [1.5, -0.5], [1.0, 0.0]):
        with pytest.raises(UserError, match="one positive weight per teacher, sum 1"):
            EnsembleTeacher([a, b], weights)
    with pytest.raises(UserError, match="of 0 teachers"):
        EnsembleTeacher([])
    with pytest.raises(UserError, match="average: 'mean' is unknown"):
        EnsembleTeacher([a], average="mean")
    mixed = EnsembleTeacher([EnsembleTeacher([a, b], average="probabilities"), b])
    with pytest.raises(UserError, match="averages logits cannot hold one that averages probabilities"):
        mixed.outputs(batch_of())
