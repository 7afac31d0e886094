"""Caches: what is read is what the live teacher says, wherever a row lies; what a stopped or repeated writing leaves."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from daekit.errors import UserError
from daekit.losses import Objective, prediction_loss
from daekit.models.heads import teacher_log_probs
from daekit.protocol import OutputHead, TeacherOutput
from daekit.teachers import CachedTeacher, EnsembleTeacher, RoutedTeacher, write_cache
from daekit.teachers.cache import write as writing
from daekit.teachers.cache.asking import AskedTeacher
from daekit.teachers.cache.check import check_cache
from daekit.teachers.cache.rows import rows_of_batch, rows_of_examples
from daekit.teachers.cache.values import bytes_to_ids, ids_to_bytes
from tests import reference
from tests.helpers.batches import collate
from tests.helpers.cache_cases import V, batch_to, bytes_of, hidden_of, long_rows, model_teacher


def loss_and_gradient(output: TeacherOutput, labels: Tensor, **objective: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, and gradients for hidden states and head, of a random student that follows ``output``."""
    generator = torch.Generator().manual_seed(9)
    hidden = torch.randn(len(labels), 6, generator=generator).requires_grad_(True)
    weight = torch.randn(V, 6, generator=generator).requires_grad_(True)
    sums = prediction_loss(hidden, OutputHead(weight, None, V), labels, [output], Objective(**objective))
    sums.loss.backward()
    return sums.loss.detach(), hidden.grad, weight.grad  # type: ignore[return-value]


@pytest.mark.parametrize("layout", ["right", "left", "flat", "blocks", "packed to 8"])
def test_a_row_has_one_key_in_every_layout(layout: str) -> None:
    rows = long_rows(9, longest=12)
    wanted = {row.key for row in rows_of_examples(rows)}
    assert {row.key for row in rows_of_batch(collate(rows, layout))} == wanted
    assert len(wanted) == 9


def test_a_key_changes_with_a_token_a_label_and_the_length() -> None:
    row = {"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 7, 8], "domain": "shop"}
    others = [
        row | {"input_ids": [5, 6, 7, 9]},
        row | {"labels": [-100, -100, 7, 8]},
        {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
        {"input_ids": [5, 6, 7, 8, 8], "labels": [-100, 6, 7, 8, -100]},
    ]
    assert len({each.key for each in rows_of_examples([row, *others])}) == 5
    assert len({each.key for each in rows_of_examples([row, row | {"domain": "law"}])}) == 1


def test_hidden_states_equal_the_live_teacher_to_the_bit_in_any_order_and_batch(tmp_path: Path) -> None:
    rows, teacher = long_rows(40), model_teacher()
    write_cache(teacher, rows, tmp_path, batch_tokens=300, shard_bytes=30_000)
    cached = CachedTeacher(tmp_path)
    assert len(cached.store.shards) > 2
    random.Random(3).shuffle(rows)
    for size in (1, 7, 40):
        for start in range(0, 40, size):
            for length in (64, 128):
                batch = batch_to(rows[start : start + size], length)
                assert torch.equal(hidden_of(cached, batch)[0], hidden_of(teacher, batch)[0])
    live, kept = (each.outputs(batch)[0] for each in (teacher, cached))
    for objective in ({"divergence": "reverse_kl", "temperature": 2.0}, {"divergence": "jsd", "ce_weight": 0.5}):
        for a, b in zip(*(loss_and_gradient(o, batch.labels_N, **objective) for o in (live, kept)), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("layout", ["right", "left", "flat", "blocks"])
def test_other_shapes_differ_from_the_live_teacher_by_rounding_alone(layout: str, tmp_path: Path) -> None:
    rows, teacher = long_rows(12), model_teacher()
    write_cache(teacher, rows, tmp_path)
    batch = collate(rows, layout)
    (mine,), (theirs,) = hidden_of(CachedTeacher(tmp_path), batch), hidden_of(teacher, batch)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=2e-5)


@pytest.mark.parametrize("average", ["logits", "probabilities"])
def test_an_ensemble_keeps_its_members_weights_and_mean(average: str, tmp_path: Path) -> None:
    rows = long_rows(6)
    teacher = EnsembleTeacher([model_teacher(2), model_teacher(3, 32)], [0.3, 0.7], average)
    write_cache(teacher, rows, tmp_path)
    batch = batch_to(rows)
    (live,), (kept,) = teacher.outputs(batch), CachedTeacher(tmp_path).outputs(batch)
    assert [member.weight for member in kept.members] == [0.3, 0.7] and kept.average == average
    for a, b in zip(*(loss_and_gradient(o, batch.labels_N, temperature=1.5) for o in (live, kept)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("fields", [{"kind": "mixtral"}, {"tie_word_embeddings": True}])
def test_other_models(fields: dict[str, Any], tmp_path: Path) -> None:
    rows, teacher = long_rows(6), model_teacher(**fields)
    write_cache(teacher, rows, tmp_path)
    batch = batch_to(rows)
    assert torch.equal(hidden_of(CachedTeacher(tmp_path), batch)[0], hidden_of(teacher, batch)[0])


def test_routed_caches_serve_a_mixed_batch(tmp_path: Path) -> None:
    rows = long_rows(12)
    teachers = {name: model_teacher(seed) for seed, name in enumerate(("general", "shop", "law"))}
    for name, teacher in teachers.items():
        write_cache(teacher, [row for row in rows if row["domain"] == name], tmp_path / name)
    batch = collate(rows, "blocks")
    cached = RoutedTeacher({name: CachedTeacher(tmp_path / name) for name in teachers})
    said = [
        {
            int(p): member
            for output in routed.outputs(batch)
            for p, member in zip(output.positions_M, output.members[0].hidden_MH, strict=True)
        }
        for routed in (RoutedTeacher(teachers), cached)
    ]
    assert said[0].keys() == said[1].keys() == set(range(batch.labels_N.numel()))
    for position, hidden in said[0].items():
        torch.testing.assert_close(said[1][position], hidden, rtol=0, atol=2e-5)


def test_top_k_keeps_label_forced_ids_and_the_mass_of_the_tail(tmp_path: Path) -> None:
    rows, teacher = long_rows(8), model_teacher()
    write_cache(teacher, rows, tmp_path, keep="top_k", k=6, temperature=2.0, forced_ids=[1])
    batch = batch_to(rows)
    (live,), (kept,) = teacher.outputs(batch), CachedTeacher(tmp_path).outputs(batch)
    top_k = kept.top_k
    assert top_k is not None and top_k.tail_log_mass_M is not None and top_k.temperature == 2.0
    log_probs = teacher_log_probs(live, slice(None), 2.0).double()
    assert ((top_k.ids_MK == batch.labels_N[:, None]).any(-1) & (top_k.ids_MK == 1).any(-1)).all()
    torch.testing.assert_close(top_k.log_probs_MK.double(), log_probs.gather(-1, top_k.ids_MK), rtol=2**-10, atol=1e-4)
    others = log_probs.scatter(-1, top_k.ids_MK, -torch.inf)
    torch.testing.assert_close(top_k.tail_log_mass_M.double(), others.logsumexp(-1), rtol=0, atol=1e-5)
    free = others.masked_fill(torch.nn.functional.one_hot(batch.labels_N, V).bool(), -torch.inf)
    named = log_probs.gather(-1, top_k.ids_MK).topk(4).values[:, -1]  # all but label and end of turn are the most likely
    assert (free.max(-1).values <= named + 1e-9).all()


def test_top_k_of_all_tokens_equals_the_live_teacher_to_rounding(tmp_path: Path) -> None:
    rows, teacher = long_rows(8), model_teacher()
    write_cache(teacher, rows, tmp_path, keep="top_k", k=V)
    batch = batch_to(rows)
    (live,), (kept,) = teacher.outputs(batch), CachedTeacher(tmp_path).outputs(batch)
    for divergence in ("forward_kl", "reverse_kl", "jsd", "tv"):
        pairs = zip(*(loss_and_gradient(o, batch.labels_N, divergence=divergence) for o in (live, kept)), strict=True)
        for a, b in pairs:  # 16-bit logarithms
            assert float((a - b).norm() / a.norm()) < 2e-3


def test_top_k_gives_the_named_tokens_the_gradient_of_the_whole_distribution(tmp_path: Path) -> None:
    """d forward KL / d logit of a named token is s - t, whatever happens in the tail."""
    rows, teacher = long_rows(5), model_teacher()
    write_cache(teacher, rows, tmp_path, keep="top_k", k=5)
    batch = batch_to(rows)
    (live,), (kept,) = teacher.outputs(batch), CachedTeacher(tmp_path).outputs(batch)
    eye = OutputHead(torch.eye(V), None, V)
    gradients = []
    for output in (live, kept):
        logits = torch.randn(batch.labels_N.numel(), V, generator=torch.Generator().manual_seed(1)).requires_grad_(True)
        prediction_loss(logits, eye, batch.labels_N, [output], Objective()).loss.backward()
        gradients.append(logits.grad.gather(-1, kept.top_k.ids_MK))  # type: ignore[union-attr]
    torch.testing.assert_close(*gradients, rtol=0, atol=2e-3)


def test_sampled_equals_its_twin_in_value_and_gradient(tmp_path: Path) -> None:
    rows, teacher = long_rows(5), model_teacher()
    write_cache(teacher, rows, tmp_path, keep="sampled", draws=9)
    batch = batch_to(rows)
    (kept,) = CachedTeacher(tmp_path).outputs(batch)
    top_k = kept.top_k
    assert top_k is not None and top_k.tail_log_mass_M.isneginf().all()  # type: ignore[union-attr]
    counts = (9 * top_k.log_probs_MK.double().exp()).round().long()
    assert (counts.sum(-1) == 9).all() and (counts == 0).any()
    drawn = [ids.repeat_interleave(times).tolist() for ids, times in zip(top_k.ids_MK, counts, strict=True)]
    logits = torch.randn(len(drawn), V, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 3
    mine, twin = (logits.clone().requires_grad_(True) for _ in range(2))
    sums = prediction_loss(mine, OutputHead(torch.eye(V).double(), None, V), batch.labels_N, [kept], Objective())
    expected = reference.drawn_kl(reference.probabilities(twin, 1.0), drawn)
    torch.testing.assert_close(sums.divergence_N, expected.detach(), rtol=1e-6, atol=1e-6)
    sums.loss.backward()
    expected.sum().backward()
    torch.testing.assert_close(mine.grad, twin.grad, rtol=1e-6, atol=1e-7)


def test_sampled_is_unbiased_over_seeds(tmp_path: Path) -> None:
    """The mean gradient for the logits over seeds is that of the whole distribution, within three standard errors or so."""
    rows, teacher, seeds = long_rows(3), model_teacher(), 40
    batch = batch_to(rows)
    total = torch.zeros(batch.labels_N.numel(), V)
    for seed in range(seeds):
        write_cache(teacher, rows, tmp_path / str(seed), keep="sampled", draws=10, seed=seed)
        top_k = CachedTeacher(tmp_path / str(seed)).outputs(batch)[0].top_k
        total.scatter_add_(-1, top_k.ids_MK, top_k.log_probs_MK.exp())  # type: ignore[union-attr]
    p = teacher_log_probs(teacher.outputs(batch)[0], slice(None)).exp()
    z = (total / seeds - p) / (p * (1 - p) / (10 * seeds)).sqrt().clamp(min=1e-4)
    assert 0.8 < float(z[p > 0.02].std()) < 1.2  # of independent draws: 1
    assert float(z[p > 0.02].abs().max()) < 4.5


def test_the_mean_gradient_over_seeds_is_that_of_the_whole_distribution(tmp_path: Path) -> None:
    """Within three standard errors, but for the few of many values that chance puts beyond."""
    rows, teacher, seeds = long_rows(3), model_teacher(), 60
    batch = batch_to(rows)
    whole = torch.cat([g.flatten() for g in loss_and_gradient(teacher.outputs(batch)[0], batch.labels_N)[1:]])
    drawn = []
    for seed in range(seeds):
        write_cache(teacher, rows, tmp_path / str(seed), keep="sampled", draws=5, seed=seed)
        (output,) = CachedTeacher(tmp_path / str(seed)).outputs(batch)
        drawn.append(torch.cat([g.flatten() for g in loss_and_gradient(output, batch.labels_N)[1:]]))
    stacked = torch.stack(drawn)
    z = (stacked.mean(0) - whole) / (stacked.std(0) / seeds**0.5).clamp(min=1e-6)
    assert float((z.abs() < 3).double().mean()) > 0.99 and float(z.abs().max()) < 6
    one = (stacked[0] - whole) / (stacked.std(0) / seeds**0.5).clamp(min=1e-6)
    assert float((one.abs() < 3).double().mean()) < 0.6  # one cache alone is far away: the test can fail


@pytest.mark.parametrize(
    ("settings", "wrong"),
    [(dict(keep="hidden"), "hidden.0: "), (dict(keep="top_k", k=6), "ids: "), (dict(keep="sampled", draws=9), "draws: ")],
)
def test_a_check_finds_equal_bits_and_another_teacher(settings: dict[str, Any], wrong: str, tmp_path: Path) -> None:
    rows = long_rows(50)
    write_cache(model_teacher(), rows, tmp_path, **settings)
    lines = check_cache(model_teacher(), tmp_path, rows_of_examples(rows))
    assert lines[0].startswith(wrong)
    for line in lines:  # one row at a time the head's products are rounded otherwise
        gap = line.partition("by ")[2].partition(" at most")[0]
        assert "values are equal to the bit (32 rows)" in line or (settings["keep"] == "top_k" and float(gap) < 5e-3)
    lines = check_cache(model_teacher(3), tmp_path, rows_of_examples(rows))
    assert "values differ" in lines[0]
    near = model_teacher()
    near.model.model.norm.weight.data *= 1 + 1e-6
    if settings["keep"] == "hidden":
        (line,) = check_cache(near, tmp_path, rows_of_examples(rows))
        assert 1e-8 < float(line.split("by ")[1].split(" at most")[0]) < 1e-4


def test_sampled_does_not_depend_on_order_and_shards(tmp_path: Path) -> None:
    rows, teacher = long_rows(12), model_teacher()
    write_cache(teacher, rows, tmp_path / "a", keep="sampled", draws=9)
    write_cache(teacher, rows[::-1], tmp_path / "b", keep="sampled", draws=9, shard_bytes=2000, batch_tokens=200)
    batch = batch_to(rows)
    a, b = (CachedTeacher(tmp_path / name).outputs(batch)[0].top_k for name in "ab")
    assert torch.equal(a.ids_MK, b.ids_MK) and torch.equal(a.log_probs_MK, b.log_probs_MK)  # type: ignore[union-attr]


def test_bytes_per_token(tmp_path: Path) -> None:
    rows, teacher = long_rows(40), model_teacher()
    for keep, k, wanted in (("hidden", 64, 48 * 4), ("top_k", 16, 5 * 16 + 4)):
        write_cache(teacher, rows, tmp_path / keep, keep=keep, k=k)
        store = CachedTeacher(tmp_path / keep).store
        with_keys = wanted * store.tokens + len(rows) * 24
        assert sum(shard.bytes for shard in store.shards) == pytest.approx(with_keys, abs=600)


def test_ids_survive_three_bytes() -> None:
    ids = torch.tensor([[0, 255, 256, 65_536, 262_143, 2**24 - 1]])
    assert torch.equal(bytes_to_ids(ids_to_bytes(ids)), ids)


# ---- writing again, in parts, by several ranks -------------------------------------------------------------------------


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every forward from here on."""
    seen: list[int] = []
    ask = AskedTeacher.ask
    monkeypatch.setattr(AskedTeacher, "ask", lambda self, rows: (seen.append(len(rows)), ask(self, rows))[1])
    return seen


def test_writing_again_computes_only_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, teacher = long_rows(20), model_teacher()
    write_cache(teacher, rows[:12], tmp_path, shard_bytes=20_000)
    before = bytes_of(tmp_path)
    seen = counted(monkeypatch)
    write_cache(teacher, rows[:12] * 2, tmp_path, shard_bytes=20_000)
    assert sum(seen) == 1 and bytes_of(tmp_path) == before  # one row: is it the same teacher?
    seen.clear()
    write_cache(teacher, rows, tmp_path, shard_bytes=20_000)
    assert sum(seen) == 1 + 8
    after = bytes_of(tmp_path)
    assert all(after[name] == digest for name, digest in before.items() if name != "manifest.json")
    batch = batch_to(rows)
    assert torch.equal(hidden_of(CachedTeacher(tmp_path), batch)[0], hidden_of(teacher, batch)[0])


def test_a_stopped_writing_goes_on_and_ends_in_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, teacher = long_rows(20), model_teacher()
    write_cache(teacher, rows, tmp_path / "straight", shard_bytes=10_000)
    shards = len(CachedTeacher(tmp_path / "straight").store.shards)
    assert shards > 4
    real, written = writing.write_shard, []

    def stopping(directory: Path, number: int, *rest: Any) -> Any:
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(number)
        return real(directory, number, *rest)

    monkeypatch.setattr(writing, "write_shard", stopping)
    with pytest.raises(KeyboardInterrupt):
        write_cache(teacher, rows, tmp_path / "stopped", shard_bytes=10_000)
    with pytest.raises(UserError, match="not complete"):
        CachedTeacher(tmp_path / "stopped")
    (tmp_path / "stopped" / "shard-00003.safetensors").write_bytes(b"half")  # renamed, but not committed
    (tmp_path / "stopped" / "shard-00004.safetensors.tmp").write_bytes(b"half")
    monkeypatch.setattr(writing, "write_shard", lambda *given: (written.append(given[1]), real(*given))[1])
    write_cache(teacher, rows, tmp_path / "stopped", shard_bytes=10_000)
    assert sorted(written) == list(range(shards))  # each once
    assert bytes_of(tmp_path / "stopped") == bytes_of(tmp_path / "straight")


def test_a_stopped_writing_that_goes_on_with_other_rows_keeps_no_shard_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, teacher = long_rows(20), model_teacher()
    with monkeypatch.context() as patched:
        patched.setattr(writing, "finish", lambda *given: None)  # stopped before the manifest
        write_cache(teacher, rows[:11], tmp_path, shard_bytes=10_000)
    write_cache(teacher, rows[5:], tmp_path, shard_bytes=10_000)
    batch, cached = batch_to(rows[5:]), CachedTeacher(tmp_path)
    assert len(cached.store.index) == 15
    assert torch.equal(hidden_of(cached, batch)[0], hidden_of(teacher, batch)[0])


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_ranks_write_the_same_bytes_as_one(order: tuple[int, ...], tmp_path: Path) -> None:
    rows, teacher = long_rows(20), model_teacher()
    write_cache(teacher, rows, tmp_path / "one", shard_bytes=10_000)
    for rank in order:
        assert not (tmp_path / "three" / "manifest.json").exists()
        write_cache(teacher, rows, tmp_path / "three", shard_bytes=10_000, ranks=(rank, 3))
    assert bytes_of(tmp_path / "three") == bytes_of(tmp_path / "one")


def test_a_lost_shard_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, teacher = long_rows(20), model_teacher()
    write_cache(teacher, rows, tmp_path, shard_bytes=10_000)
    before, shards = bytes_of(tmp_path), json.loads((tmp_path / "manifest.json").read_text())["shards"]
    (tmp_path / "shard-00001.safetensors").unlink()
    (tmp_path / "shard-00003.safetensors").write_bytes(b"cut")
    seen = counted(monkeypatch)
    write_cache(teacher, rows, tmp_path, shard_bytes=10_000)
    assert sum(seen) == 1 + shards[1]["rows"] + shards[3]["rows"]
    assert CachedTeacher(tmp_path).store.tokens == sum(shard["tokens"] for shard in shards)
    assert bytes_of(tmp_path).keys() >= before.keys() - {"manifest.json"}
