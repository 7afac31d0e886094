"""What a cache refuses: other teachers and settings, files that changed, missing rows, losses that it cannot serve."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from daekit.errors import UserError
from daekit.losses import Objective, prediction_loss
from daekit.models.features import require_features
from daekit.protocol import OutputHead
from daekit.teachers import BASE, CachedTeacher, EnsembleTeacher, LabelTeacher, RoutedTeacher, write_cache
from daekit.teachers.parts import require_served
from tests.helpers import tiny
from tests.helpers.cache_cases import V, batch_to, long_rows, model_teacher
from tests.helpers.trainer_world import dae, kd

ROWS = long_rows(8)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    write_cache(model_teacher(), ROWS, tmp_path, tokenizer=tiny.tokenizer(), shard_bytes=10_000)
    return tmp_path


@pytest.mark.parametrize(
    ("named", "change"),
    [
        ("teacher", dict(teacher=lambda: model_teacher(7))),
        ("dtype", dict(teacher=lambda: type(model_teacher())(tiny.model(seed=2, hidden=48).bfloat16(), 43))),
        ("keep", dict(keep="top_k")),
        ("tokenizer", dict(tokenizer=lambda: other_tokenizer())),
    ],
)
def test_a_directory_of_another_cache_is_not_written(named: str, change: dict[str, Any], cache: Path) -> None:
    made = {name: value() if callable(value) else value for name, value in change.items()}
    teacher = made.pop("teacher", None) or model_teacher()
    before = (cache / "manifest.json").read_bytes()
    with pytest.raises(UserError, match=rf"{re.escape(str(cache))}: is the cache of something else .*\b{named}: "):
        write_cache(teacher, ROWS, cache, **({"tokenizer": tiny.tokenizer()} | made))
    assert (cache / "manifest.json").read_bytes() == before


def other_tokenizer() -> Any:
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["new"])
    return tokenizer


@pytest.mark.parametrize(
    ("named", "first", "second"),
    [
        ("temperature", dict(keep="top_k", k=8), dict(keep="top_k", k=8, temperature=2.0)),
        ("k", dict(keep="top_k", k=8), dict(keep="top_k", k=9)),
        ("forced_ids", dict(keep="top_k", k=8), dict(keep="top_k", k=8, forced_ids=[1])),
        ("draws", dict(keep="sampled", draws=8), dict(keep="sampled", draws=9)),
        ("seed", dict(keep="sampled"), dict(keep="sampled", seed=1)),
        ("source", dict(source={"path": "a"}), dict(source={"path": "b"})),
    ],
)
def test_other_settings(named: str, first: dict[str, Any], second: dict[str, Any], tmp_path: Path) -> None:
    write_cache(model_teacher(), ROWS, tmp_path, **first)
    with pytest.raises(UserError, match=rf"\({named}: "):
        write_cache(model_teacher(), ROWS, tmp_path, **second)


@pytest.mark.parametrize(
    ("key", "settings"),
    [
        ("keep", dict(keep="logits")),
        ("temperature", dict(keep="sampled", temperature=2.0)),
        ("draws", dict(keep="sampled", draws=256)),
        ("draws", dict(keep="sampled", draws=0)),
        ("k", dict(keep="top_k", k=2, forced_ids=[1])),
    ],
)
def test_settings_out_of_bounds(key: str, settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"^{key}: "):
        write_cache(model_teacher(), ROWS, tmp_path / "new", **settings)
    assert not (tmp_path / "new").exists()


def test_teachers_that_cannot_be_kept(tmp_path: Path) -> None:
    routed = RoutedTeacher({"shop": model_teacher()})
    cases = [
        (routed, "each of its teachers"),
        (EnsembleTeacher([routed]), "each of its teachers"),
        (LabelTeacher(), "sparse"),
        (BASE, "not a loaded teacher"),
        (EnsembleTeacher([BASE]), "not a loaded teacher"),
    ]
    for teacher, words in cases:
        with pytest.raises(UserError, match=words):
            write_cache(teacher, ROWS, tmp_path / "new")  # type: ignore[arg-type]


def test_rows_that_are_not_tokenised_or_carry_no_loss(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"example 0: .*prompt, completion"):
        write_cache(model_teacher(), [{"prompt": "a", "completion": "b"}], tmp_path)
    with pytest.raises(UserError, match="nothing to keep"):
        write_cache(model_teacher(), [{"input_ids": [3, 4], "labels": [3, -100]}], tmp_path)


# ---- files that changed ------------------------------------------------------------------------------------------------


def test_no_cache_a_begun_one_and_a_foreign_format(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no cache"):
        CachedTeacher(tmp_path / "elsewhere")
    manifest = json.loads((cache / "manifest.json").read_text())
    manifest["facts"]["format"] = 99
    (cache / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="format 99"):
        CachedTeacher(cache)
    (cache / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"manifest.json: is corrupt"):
        CachedTeacher(cache)
    (cache / "manifest.json").unlink()
    with pytest.raises(UserError, match="not complete"):
        CachedTeacher(cache)


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_a_cut_and_a_missing_shard_are_named_when_the_cache_is_opened(cache: Path) -> None:
    shard = cache / "shard-00001.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-5])
    with pytest.raises(UserError, match=rf"shard-00001.safetensors: has {len(whole) - 5:,} of {len(whole):,} bytes"):
        CachedTeacher(cache)
    shard.unlink()
    with pytest.raises(UserError, match=r"shard-00001.safetensors: is missing"):
        CachedTeacher(cache)


@pytest.mark.parametrize("at", [-1, 4, -4000], ids=["last byte", "header", "middle"])
def test_a_flipped_byte_is_found_when_its_shard_is_first_read(at: int, cache: Path) -> None:
    flip(cache / "shard-00001.safetensors", at)
    with pytest.raises(UserError, match=r"shard-00001.safetensors: is not what was written"):
        CachedTeacher(cache).outputs(batch_to(ROWS))


def test_a_flipped_bit_in_a_key_is_no_missing_row(cache: Path) -> None:
    shard = cache / "shard-00001.safetensors"
    key = next(iter(key for key, (number, _) in CachedTeacher(cache).store.index.items() if number == 1))
    flip(shard, shard.read_bytes().index(key))
    with pytest.raises(UserError, match="is not what was written"):
        CachedTeacher(cache).outputs(batch_to(ROWS))


def test_a_flipped_byte_in_the_heads(cache: Path) -> None:
    flip(cache / "heads.safetensors", -1)
    with pytest.raises(UserError, match=r"heads.safetensors: is not what was written"):
        CachedTeacher(cache).outputs(batch_to(ROWS))


def test_a_full_disk_names_the_file_and_leaves_what_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real: Callable[..., Any] = os.fsync
    calls: list[int] = []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"the disk is full \([\d,]+ bytes wanted\)"):
        write_cache(model_teacher(), ROWS, tmp_path, shard_bytes=10_000)
    assert not list(tmp_path.glob("*.tmp"))
    assert (tmp_path / "shard-00000.json").exists() and not (tmp_path / "manifest.json").exists()
    write_cache(model_teacher(), ROWS, tmp_path, shard_bytes=10_000)
    CachedTeacher(tmp_path).outputs(batch_to(ROWS))


def test_two_writers(tmp_path: Path) -> None:
    holder = (
        "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_SH); f.write('process 7 on host'); f.flush();"
        "print('held', flush=True); sys.stdin.read()"
    )
    tmp_path.mkdir(exist_ok=True)
    command = [sys.executable, "-c", holder, str(tmp_path / "writer-0.lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=r"another process writes this cache \(process 7 on host\)"):
            write_cache(model_teacher(), ROWS, tmp_path)
        other.kill()
    write_cache(model_teacher(), ROWS, tmp_path)  # the lock ended with its process


# ---- use ---------------------------------------------------------------------------------------------------------------


def test_missing_rows_are_counted_and_the_first_is_named(cache: Path) -> None:
    others = [{"input_ids": [9, 8, 7], "labels": [9, 8, 7]}, {"input_ids": [9, 8, 7, 6], "labels": [-100, 8, 7, 6]}]
    with pytest.raises(UserError, match=r"2 of 10 rows are not in this cache \(first: 3 tokens \(9 8 7\.\.\.\), 2 with loss\)"):
        CachedTeacher(cache).outputs(batch_to(ROWS + others))


def test_a_batch_without_loss_has_an_empty_output(tmp_path: Path) -> None:
    for keep in ("hidden", "top_k", "sampled"):
        write_cache(model_teacher(), ROWS, tmp_path / keep, keep=keep, k=8)
        (output,) = CachedTeacher(tmp_path / keep).outputs(batch_to([{"input_ids": [9, 8], "labels": [9, -100]}]))
        values = output.members[0].hidden_MH if keep == "hidden" else output.top_k.log_probs_MK  # type: ignore[union-attr]
        assert output.positions_M.numel() == 0 == len(values)
        head, no_label = OutputHead(torch.zeros(V, 6), None, V), torch.zeros(0, dtype=torch.long)
        assert float(prediction_loss(torch.zeros(0, 6), head, no_label, [output], Objective()).loss) == 0.0


def test_hidden_states_under_another_autocast(cache: Path) -> None:
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(UserError, match=r"autocast none .* runs with bfloat16"):
        CachedTeacher(cache).outputs(batch_to(ROWS))


@pytest.mark.parametrize(
    ("kept", "objective", "key"),
    [
        (dict(keep="hidden"), dict(attention_weight=1.0), "attention_weight"),
        (dict(keep="hidden"), dict(hidden_weight=1.0), "attention_weight, hidden_weight"),
        (dict(keep="top_k", k=8), dict(temperature=2.0), "temperature"),
        (dict(keep="sampled"), dict(divergence="reverse_kl"), "divergence"),
        (dict(keep="sampled"), dict(temperature=2.0), "temperature"),
    ],
)
def test_losses_that_a_cache_does_not_serve(kept: dict[str, Any], objective: dict[str, Any], key: str, tmp_path: Path) -> None:
    write_cache(model_teacher(), ROWS, tmp_path, **kept)
    cached = CachedTeacher(tmp_path)
    for teacher in (cached, RoutedTeacher({"shop": cached, "law": model_teacher()})):
        with pytest.raises(UserError, match=f"^{key}"):
            require_served(teacher, Objective(**objective), tiny.tokenizer())
    with pytest.raises(UserError, match="CachedTeacher hands out no features"):
        require_features(cached)


def test_another_tokenizer(cache: Path) -> None:
    with pytest.raises(UserError, match="tokenizer: "):
        CachedTeacher(cache, other_tokenizer())
    CachedTeacher(cache, tiny.tokenizer())


def test_trainers_look_at_caches_before_the_first_step(tmp_path: Path) -> None:
    data = tiny.rows(12)
    prepared = kd(tmp_path / "run", data).train_dataset
    write_cache(model_teacher(), prepared.select(range(9)), tmp_path / "nine", tokenizer=tiny.tokenizer())
    with pytest.raises(UserError, match="3 of 12 rows are not in this cache"):
        kd(tmp_path / "run", data, teacher=CachedTeacher(tmp_path / "nine"))
    shop = [row for row in prepared if row["domain"] == "shop"]
    write_cache(model_teacher(), shop, tmp_path / "shop", tokenizer=tiny.tokenizer())
    cached = CachedTeacher(tmp_path / "shop")
    dae(tmp_path / "run", data, teachers={"shop": cached})
    with pytest.raises(UserError, match=f"{12 - len(shop)} of 12 rows"):
        kd(tmp_path / "run", data, teacher=cached)
    with pytest.raises(UserError, match=r"^attention_weight"):
        kd(tmp_path / "run", data, teacher=cached, attention_weight=1.0)


def test_what_the_student_is_yet_to_write(cache: Path) -> None:
    with pytest.raises(UserError, match=r"on_policy=0.5: a cache holds what its teacher said"):
        CachedTeacher(cache).require_objective(Objective(on_policy=0.5))


def test_a_path_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file: no directory can be made here \(File exists\); choose another path"):
        write_cache(model_teacher(), ROWS, tmp_path / "file", tokenizer=tiny.tokenizer())
