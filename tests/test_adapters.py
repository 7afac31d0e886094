"""Adapters from directories on one base: the merged model's words, several in one forward, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from daekit.errors import UserError
from daekit.models.adapters import load_continued, require_adapters_fit, tokenizer_spec
from daekit.models.backbone import base_of
from daekit.protocol import Batch, FeatureSpec, Teacher, TeacherOutput
from daekit.recipe.schema import ModelSpec
from daekit.teachers import AdapterTeacher, ModelTeacher, RoutedTeacher
from tests.helpers import tiny
from tests.helpers.adapter_world import load, lora, merged, save_adapter, save_base
from tests.helpers.teacher_cases import V, batch_of, log_probs, plain, says

DOMAINS = ("general", "shop", "law")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``base``, and the adapters ``shop`` and ``law`` of it."""
    folder = tmp_path_factory.mktemp("adapters")
    save_base(folder / "base")
    save_adapter(folder / "shop", folder / "base", seed=3)
    save_adapter(folder / "law", folder / "base", seed=4, r=2, target_modules=["q_proj", "up_proj"])
    return folder


def student_on(base: Any, **changes: Any) -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(base, lora(**changes))


def teachers_on(student: PeftModel, world: Path) -> dict[str, Teacher]:
    """General rows follow the bare base, the others an adapter from disk."""
    loaded = {name: AdapterTeacher.from_pretrained(student, world / name, V) for name in ("shop", "law")}
    return {"general": AdapterTeacher(student, None, V), **loaded}


@contextmanager
def forwards(model: PeftModel) -> Iterator[list[tuple[int, ...]]]:
    """The shapes of the token ids that the base embeds."""
    shapes: list[tuple[int, ...]] = []
    embeddings = base_of(model).get_input_embeddings()
    hook = embeddings.register_forward_hook(lambda _, inputs, __: shapes.append(tuple(inputs[0].shape)))
    try:
        yield shapes
    finally:
        hook.remove()


def switched(routes: dict[str, Teacher], batch: Batch) -> list[TeacherOutput]:
    """The plain twin of a routed teacher of adapters: each teacher alone on its rows."""
    outputs = []
    for domain, speaker in routes.items():
        rows = batch.rows_of([domain])
        for output in speaker.outputs(batch.select(rows)) if rows else []:
            outputs.append(replace(output, positions_M=batch.positions_of(rows)[output.positions_M]))
    return outputs


# ---- one adapter ------------------------------------------------------------------------------------------------------

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dora": dict(use_dora=True, init_lora_weights=True),
    "rslora and patterns": dict(use_rslora=True, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3}),
    "a head of its own": dict(modules_to_save=["lm_head"]),
}


@pytest.mark.parametrize("kind", list(KINDS))
def test_an_adapter_from_disk_equals_the_merged_model(kind: str, world: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter", world / "base", seed=5, **KINDS[kind])
    student, batch = student_on(load(world / "base")), batch_of()
    before = {name: parameter.detach().clone() for name, parameter in student.named_parameters()}
    flags = {name: parameter.requires_grad for name, parameter in student.named_parameters()}
    speaker = AdapterTeacher.from_pretrained(student, adapter, V)
    said = says(speaker, batch)
    torch.testing.assert_close(said, says(ModelTeacher(merged(world / "base", adapter), V), batch), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(said, plain(merged(world / "base", adapter), batch), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(said, says(AdapterTeacher(student, None, V), batch), atol=1e-2)
    assert student.active_adapters == ["default"]
    for name, parameter in student.named_parameters():
        assert parameter.requires_grad == flags.get(name, False), name
        assert name not in before or torch.equal(parameter, before[name])


def test_the_drift_on_four_bits_is_that_of_the_base(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The adapter on a 4-bit base is another function than the merged 16-bit model; about as far off as the base alone is."""
    batch = batch_of()
    student = student_on(load(world / "base", quantization="4bit", dtype="float32"))
    speaker = AdapterTeacher.from_pretrained(student, world / "shop", V)

    def kl(p: Tensor, q: Tensor) -> float:
        return float((p.exp() * (p - q)).sum(-1).mean())

    exact, base = ModelTeacher(merged(world / "base", world / "shop"), V), ModelTeacher(load(world / "base"), V)
    drift = kl(says(exact, batch), says(speaker, batch))
    of_base = kl(says(base, batch), says(AdapterTeacher(student, None, V), batch))
    effect = kl(says(exact, batch), says(base, batch))
    print(f"4-bit drift {drift:.4f} nats, of the bare base {of_base:.4f}; the adapter itself {effect:.4f}")
    assert 0 < drift < 3 * of_base and drift < effect / 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_quantised_base_an_adapter_keeps_its_dtype(dtype: torch.dtype, world: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter", world / "base", dtype=dtype)
    student = student_on(load(world / "base", quantization="4bit", dtype="bfloat16"))
    AdapterTeacher.from_pretrained(student, adapter, V, name="expert")
    saved = load_file(adapter / "adapter_model.safetensors")
    found = {name.replace(".expert", ""): p for name, p in student.named_parameters() if ".expert" in name}
    assert found.keys() == saved.keys()
    exact = student_on(load(world / "base"))
    AdapterTeacher.from_pretrained(exact, adapter, V, name="expert")
    assert {p.dtype for name, p in exact.named_parameters() if ".expert" in name} == {torch.float32}
    for name, parameter in found.items():
        assert parameter.dtype == dtype and torch.equal(parameter, saved[name]) and not parameter.requires_grad


def test_a_student_goes_on_with_its_adapter(world: Path) -> None:
    spec = ModelSpec(adapter=str(world / "shop"))
    student = load_continued(spec)
    batch = batch_of()
    assert {name for name, p in student.named_parameters() if p.requires_grad} == {
        name for name, _ in student.named_parameters() if ".default" in name
    }
    expected = plain(merged(world / "base", world / "shop"), batch)
    torch.testing.assert_close(says(ModelTeacher(load_continued(spec), V), batch), expected)
    quantised = load_continued(spec.model_copy(update={"path": str(world / "base"), "quantization": "4bit"}))
    assert base_of(quantised).is_loaded_in_4bit
    assert AdapterTeacher.from_pretrained(quantised, world / "shop", V).identity()["weights"] is not None


# ---- several in one forward -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantization", [None, "4bit"])
@pytest.mark.parametrize("layout", ["right", "left"])
def test_one_forward_is_the_same_as_switching(layout: str, quantization: str | None, world: Path) -> None:
    student = student_on(load(world / "base", quantization=quantization, dtype="float32"), lora_dropout=0.5).train()
    routes, batch = teachers_on(student, world), batch_of(layout)
    kept = batch.labels_N.numel()
    with forwards(student) as shapes:
        outputs = RoutedTeacher(routes).outputs(batch)
    assert shapes == [tuple(batch.labels_BT.shape)] and len(outputs) == 1
    with forwards(student) as shapes:
        twin = switched(routes, batch)
    assert len(shapes) == 3
    torch.testing.assert_close(log_probs(outputs, kept), log_probs(twin, kept), rtol=1e-5, atol=1e-5)
    assert student.training and student.active_adapters == ["default"]
    if quantization is None:
        for domain in ("shop", "law"):
            rows = batch.rows_of([domain])
            expected = plain(merged(world / "base", world / domain), batch.select(rows))
            torch.testing.assert_close(log_probs(outputs, kept)[batch.positions_of(rows)], expected, rtol=1e-5, atol=1e-5)


def test_one_forward_beside_other_teachers(world: Path) -> None:
    """Only the rows of the adapters are run by it, and a teacher of several domains is one of them."""
    student = student_on(load(world / "base"))
    shop = AdapterTeacher.from_pretrained(student, world / "shop", V)
    routes: dict[str, Teacher] = {
        "general": ModelTeacher(tiny.model(seed=4), V),
        "shop": shop,
        "law": AdapterTeacher(student, None, V),
    }
    batch = batch_of()
    with forwards(student) as shapes:
        said = says(RoutedTeacher(routes), batch)
    assert shapes == [(len(batch.rows_of(["shop", "law"])), batch.labels_BT.shape[1])]
    torch.testing.assert_close(said, log_probs(switched(routes, batch), len(said)), rtol=1e-5, atol=1e-5)
    with forwards(student) as shapes:
        RoutedTeacher(dict.fromkeys(DOMAINS, shop)).outputs(batch)
    assert shapes == [tuple(batch.labels_BT.shape)]


def test_features_are_the_same_in_one_forward(world: Path) -> None:
    student = student_on(load(world / "base"))
    routes, batch = teachers_on(student, world), batch_of()
    spec = FeatureSpec(base_of(student).config, attention="uniform", hidden="uniform")
    (together,) = RoutedTeacher(routes).outputs(batch, spec)
    assert together.features is not None
    for domain, speaker in routes.items():
        rows = batch.rows_of([domain])
        (alone,) = speaker.outputs(batch.select(rows), spec)
        assert alone.features is not None
        at = batch.positions_of(rows)
        for layer in range(2):
            ours, theirs = together.features, alone.features
            torch.testing.assert_close(ours.hidden_MH[layer][at], theirs.hidden_MH[layer], rtol=1e-4, atol=1e-5)
            mine, other = ours.attention[layer], theirs.attention[layer]
            torch.testing.assert_close(mine.query_NAD[at], other.query_NAD, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(mine.key_BGTD[rows], other.key_BGTD, rtol=1e-4, atol=1e-5)


SWITCH: dict[str, Callable[[Path, Path], dict[str, Any]]] = {
    "dora": lambda world, folder: dict(law=save_adapter(folder, world / "base", use_dora=True, init_lora_weights=True)),
    "a head of its own": lambda world, folder: dict(law=save_adapter(folder, world / "base", modules_to_save=["lm_head"])),
    "packed": lambda world, folder: dict(layout="packed"),
}


@pytest.mark.parametrize("kind", list(SWITCH))
def test_where_adapters_are_switched_one_after_another(kind: str, world: Path, tmp_path: Path) -> None:
    options = SWITCH[kind](world, tmp_path / "law")
    student = student_on(load(world / "base"))
    routes = teachers_on(student, world)
    if "law" in options:
        routes["law"] = AdapterTeacher.from_pretrained(student, options["law"], V)
    batch = batch_of(options.get("layout", "right"))
    with forwards(student) as shapes:
        said = says(RoutedTeacher(routes), batch)
    assert len(shapes) == 3
    torch.testing.assert_close(said, log_probs(switched(routes, batch), len(said)), rtol=1e-5, atol=1e-5)
    for domain in ("shop", "law"):
        rows = batch.rows_of([domain])
        expected = plain(merged(world / "base", options.get(domain, world / domain)), batch.select(rows))
        torch.testing.assert_close(said[batch.positions_of(rows)], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("autocast", [False, True])
def test_float32_adapters_on_a_bfloat16_base(autocast: bool, world: Path) -> None:
    """PEFT rounds twice in a mixed forward, once otherwise, unless autocast has both in bfloat16."""
    student = student_on(load(world / "base", dtype="bfloat16"))
    routes, batch = teachers_on(student, world), batch_of()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        with forwards(student) as shapes:
            said = says(RoutedTeacher(routes), batch)
        assert len(shapes) == (1 if autocast else 3)
        torch.testing.assert_close(said, log_probs(switched(routes, batch), len(said)), rtol=0, atol=2e-2 if autocast else 0)


def test_adapters_of_several_dtypes_are_switched(world: Path, tmp_path: Path) -> None:
    """bitsandbytes' layers would hand the rows of the second adapter what they have rounded for the first."""
    student = student_on(load(world / "base", quantization="4bit", dtype="float32"))
    routes = teachers_on(student, world)
    rounded = save_adapter(tmp_path / "law", world / "base", dtype=torch.bfloat16)
    routes["law"] = AdapterTeacher.from_pretrained(student, rounded, V)
    with forwards(student) as shapes:
        RoutedTeacher(routes).outputs(batch_of())
    assert len(shapes) == 3


@pytest.mark.parametrize("layout", ["right", "packed"])
def test_frozen_models_see_exactly_the_tokens_of_the_batch(layout: str, world: Path) -> None:
    """One frozen forward per row: neither the expert on general rows nor the reference on the expert's."""
    student = student_on(load(world / "base"))
    batch = batch_of(layout)
    with forwards(student) as shapes:
        RoutedTeacher(teachers_on(student, world)).outputs(batch)
    assert sum(rows * length for rows, length in shapes) == batch.labels_BT.numel()


# ---- refused ----------------------------------------------------------------------------------------------------------


def edited(source: Path, to: Path, **changes: Any) -> Path:
    shutil.copytree(source, to)
    config = json.loads((to / "adapter_config.json").read_text())
    (to / "adapter_config.json").write_text(json.dumps(config | changes))
    return to


def with_weights(source: Path, to: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    shutil.copytree(source, to)
    file = to / "adapter_model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return to


def without_first(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(list(weights.items())[1:])


def unreadable(source: Path, to: Path) -> Path:
    shutil.copytree(source, to)
    (to / "adapter_model.safetensors").write_bytes(b"no")
    return to


REFUSED: dict[str, tuple[Callable[[Path, Path], Path], str]] = {
    "another base": (
        lambda w, to: edited(w / "shop", to, base_model_name_or_path="other/model"),
        "of 'other/model', not of",
    ),
    "another revision": (lambda w, to: edited(w / "shop", to, revision="v2"), "is an adapter of revision 'v2'"),
    "no base": (lambda w, to: edited(w / "shop", to, base_model_name_or_path=None), "names no base model"),
    "not LoRA": (lambda w, to: edited(w / "shop", to, peft_type="IA3"), "of the kind IA3; only LoRA"),
    "biases": (lambda w, to: edited(w / "shop", to, bias="all"), "bias='all' changes biases of the base"),
    "pissa": (lambda w, to: edited(w / "shop", to, init_lora_weights="pissa"), "'pissa' has changed the weights of the base"),
    "missing tensor": (
        lambda w, to: with_weights(w / "shop", to, without_first),
        "1 tensors differ, .*saved: nothing",
    ),
    "left-over tensor": (
        lambda w, to: with_weights(w / "shop", to, lambda weights: weights | {"x": torch.ones(2)}),
        "such as x .*the base wants: nothing",
    ),
    "another width": (
        lambda w, to: edited(
            save_adapter(to / "a", save_base(to / "b", hidden=32)), to / "c", base_model_name_or_path=str(w / "base")
        ),
        r"12 tensors differ, .*saved: \(4, 64\), the base wants: \(4, 128\)",
    ),
    "no such module": (lambda w, to: edited(w / "shop", to, target_modules=["wq"]), "does not fit the base .*wq"),
    "output head": (
        lambda w, to: save_adapter(to, w / "base", target_modules=["q_proj", "lm_head"]),
        "LoRA matrices on lm_head",
    ),
    "embeddings": (
        lambda w, to: save_adapter(to, w / "base", target_modules=["embed_tokens"]),
        "LoRA matrices on embed_tokens",
    ),
    "output head by a pattern": (
        lambda w, to: save_adapter(to, w / "base", target_modules=r".*(q_proj|lm_head)"),
        "LoRA matrices on the output head",
    ),
    "no adapter": (lambda w, to: w / "base", "is no directory with a LoRA adapter"),
    "damaged": (lambda w, to: unreadable(w / "shop", to), "weights of the LoRA adapter cannot be read"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", list(REFUSED))
def test_adapters_that_are_refused(kind: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the weights of the base are read, and again where they are there already."""
    make, message = REFUSED[kind]
    adapter = make(world, tmp_path / "adapter")
    base = ModelSpec(path=str(world / "base"), revision="main" if kind == "another revision" else None)
    with pytest.raises(UserError, match=message):
        require_adapters_fit([adapter], base)
    if kind != "another revision":
        student = student_on(load(world / "base"))
        with pytest.raises(UserError, match=message):
            AdapterTeacher.from_pretrained(student, adapter, V)
        assert list(student.peft_config) == ["default"]
    monkeypatch.setattr("daekit.models.adapters.load_model", lambda *_: pytest.fail("the base was loaded"))
    with pytest.raises(UserError, match=message):
        load_continued(base.model_copy(update={"adapter": str(adapter)}))


def test_a_tied_head_that_an_adapter_would_untie(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", tie_word_embeddings=True)
    adapter = save_adapter(tmp_path / "adapter", base, modules_to_save=["embed_tokens"])
    with pytest.raises(UserError, match=r"holds the .* of its own .*ties embeddings and output head"):
        require_adapters_fit([adapter], ModelSpec(path=str(base)))


def test_a_base_without_a_name(world: Path) -> None:
    with pytest.raises(UserError, match="the student's base has no name to compare with"):
        AdapterTeacher.from_pretrained(student_on(tiny.model(seed=1, hidden=64)), world / "shop", V)


def test_where_the_tokenizer_of_an_adapter_lies(world: Path, tmp_path: Path) -> None:
    """Beside it if it has one; else beside its base, or where that has its own."""
    own, upper = tmp_path / "own", tmp_path / "upper"
    shutil.copytree(world / "shop", own)
    tiny.tokenizer().save_pretrained(own)
    shutil.copytree(world / "law", upper)
    alone = tmp_path / "alone"  # without tokenizer_config.json
    shutil.copytree(world / "shop", alone)
    shutil.copy(own / "tokenizer.json", alone)
    config = json.loads((upper / "adapter_config.json").read_text())
    for base, lies in ((own, own), (alone, alone), (world / "shop", world / "base")):
        (upper / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))
        for spec in (ModelSpec(adapter=str(upper)), ModelSpec(path=str(upper))):
            assert tokenizer_spec(spec).path == str(lies)
        assert tokenizer_spec(ModelSpec(adapter=str(base))).path == tokenizer_spec(ModelSpec(path=str(base))).path == str(lies)
    assert tokenizer_spec(ModelSpec(path=str(world / "base"), revision="main")).revision == "main"
