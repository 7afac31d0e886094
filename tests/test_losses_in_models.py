"""The prediction loss inside real models: gradients of every parameter, and how large a tensor ever is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from daekit.losses import Objective, prediction, prediction_loss
from daekit.models.backbone import add_on_hidden, hidden_at_loss_positions
from daekit.models.heads import output_head
from daekit.protocol import Batch
from daekit.teachers import ModelTeacher
from tests import reference
from tests.helpers.loss_cases import V, make_case, make_terms, ours, relative_error, twin
from tests.helpers.loss_models import random_batch, tiny_model


class Recorder(TorchDispatchMode):
    """Every output of every operation: its size, and the operations that gave a matrix product of a shape."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.products: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            self.products.append(tuple(out.shape))
        return out


@pytest.mark.parametrize("trains_head", [True, False])
def test_the_gradient_of_a_frozen_head_is_not_computed(trains_head: bool) -> None:
    case = make_case(n=23)
    with Recorder() as recorder:
        _, gradients = ours(case, make_terms(0.3, 0.7, chunk_tokens=4), trains_head=trains_head)
    assert ((V, 6) in recorder.products) == trains_head
    assert (gradients[1] is not None) == trains_head
    torch.testing.assert_close(gradients[0], twin(case, make_terms(0.3, 0.7))[1][0])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["mistral", "mixtral"])
def test_gradients_of_all_parameters_of_a_model(kind: str, tied: bool) -> None:
    """The student through ``on_hidden`` in float32; the twin is the same model in float64 with all its logits."""
    vocab, terms = 43, make_terms(0.3, 0.7, temperature=2.0, chunk_tokens=4)
    student, teacher = tiny_model(1, kind, tie_word_embeddings=tied), tiny_model(2, vocab_size=51, hidden_size=24)
    plain, plain_teacher = tiny_model(1, kind, tie_word_embeddings=tied).double(), tiny_model(2, vocab_size=51, hidden_size=24)
    batch = random_batch(vocab)
    add_on_hidden(student)
    outputs = ModelTeacher(teacher, vocab).outputs(batch)
    hidden = hidden_at_loss_positions(student, batch)
    sums = prediction_loss(hidden, output_head(student, vocab), batch.labels_N, outputs, *terms.both)
    sums.loss.backward()

    places = reference.kept(batch.labels_BT.tolist(), batch.row_BT.tolist())
    ids = batch.inputs["input_ids"]
    with torch.no_grad():
        teacher_logits = plain_teacher.double()(input_ids=ids).logits
    student_logits = plain(input_ids=ids).logits
    at = [(b, t) for b, t, _, _ in places]
    pick = lambda logits: torch.stack([logits[b, t, :vocab] for b, t in at])  # noqa: E731
    loss = reference.loss(
        pick(student_logits), torch.tensor([label for _, _, label, _ in places]),
        reference.probabilities(pick(teacher_logits), 2.0), "forward_kl", 0.5, 2.0, 0.3, 0.7,
    )  # fmt: skip
    loss.backward()
    assert relative_error(sums.loss.detach(), loss.detach()) < 1e-5
    expected = dict(plain.named_parameters())
    for name, parameter in student.named_parameters():
        assert relative_error(parameter.grad, expected[name].grad) < 1e-5, name


def test_the_first_token_of_the_response_is_learnt() -> None:
    """Prompt of three tokens, response of two: the loss is that of the positions 2 and 3, read off the model's own logits."""
    student = tiny_model(1)
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    batch = Batch({"input_ids": ids}, torch.tensor([[-100, -100, -100, 8, 9]]), torch.zeros(1, 5, dtype=torch.long), ("g",))
    log_probs = student(input_ids=ids).logits[0, :, :43].log_softmax(-1)
    add_on_hidden(student)
    hidden = hidden_at_loss_positions(student, batch)
    sums = prediction_loss(hidden, output_head(student, 43), batch.labels_N, [], Objective(ce_weight=1.0))
    torch.testing.assert_close(sums.ce_N, torch.stack([-log_probs[2, 8], -log_probs[3, 9]]))


def largest_tensor(chunk: int, size: int = 4, length: int = 64, vocab: int = 3000) -> int:
    student, teacher = tiny_model(1, vocab_size=vocab), tiny_model(2, vocab_size=vocab)
    add_on_hidden(student)
    batch, speaker = random_batch(vocab, size, length), ModelTeacher(teacher, vocab)
    with Recorder() as recorder:
        outputs = speaker.outputs(batch)
        hidden = hidden_at_loss_positions(student, batch)
        terms = make_terms(0.5, 0.5, "jsd", 0.5, temperature=2.0, chunk_tokens=chunk)
        prediction_loss(
            hidden, output_head(student, vocab), batch.labels_N, outputs, terms.objective, terms.chunk_tokens
        ).loss.backward()
    return recorder.largest


def test_logits_exist_for_one_chunk_at_a_time() -> None:
    """Teacher, student, loss and backward: nothing is larger than the head's own gradient."""
    assert largest_tensor(chunk=4) <= 3000 * 16
    assert largest_tensor(chunk=10**6) > 80 * 3000  # the recorder does see logits where there are some


def test_a_bfloat16_head_makes_no_second_gradient_of_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prediction, "_TILE_VALUES", 30)
    with Recorder() as recorder:
        ours(make_case(n=12).to(torch.bfloat16), make_terms(0.3, 0.7, chunk_tokens=4))
    assert (5, 6) in recorder.products and (V, 6) not in recorder.products
