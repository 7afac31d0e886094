"""Students cut from their teachers: exact where nothing is lost, for every family, and refusals that name the rule."""

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from daekit.errors import UserError
from daekit.students.importance import at_random, choose, first_n
from daekit.students.norms import fit_norms
from daekit.students.shapes import Shape, count_parameters, possible_head_dims
from daekit.students.slicing import permute_, slice_model, view_model
from tests.helpers.student_cases import CONFIGS, first_units, logits, rows, silence_channels, teacher
from tests.helpers.tiny import model as tiny_model

CASES = list(CONFIGS)
# an arbitrary student of each: fewer layers, channels, neurons, groups, queries per group, dimensions per head
SMALLER = {
    "llama": Shape(2, 36, 24, 2, 2, 4),
    "llama-biases-tied": Shape(3, 44, 39, 4, 2, 8),
    "mistral": Shape(1, 31, 10, 3, 3, 2),
    "qwen2": Shape(3, 40, 17, 4, 2, 4),
    "qwen3": Shape(2, 47, 24, 2, 1, 4),
    "gpt_neox": Shape(3, 16, 24, 2, 2, 8),
    "gpt_neox-sequential": Shape(2, 20, 8, 5, 5, 4),
}


@pytest.mark.parametrize("case", CASES)
def test_the_whole_is_the_teacher_and_has_its_own_storage(case):
    model = teacher(case)
    student = slice_model(model, first_units(model.config))
    assert torch.equal(logits(student), logits(model))
    theirs = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    assert not theirs & {parameter.untyped_storage().data_ptr() for parameter in student.parameters()}
    assert all(parameter.requires_grad for parameter in student.parameters())
    expected, found = model.config.to_dict(), student.config.to_dict()
    assert {key: found.get(key) for key in expected if key not in ("_name_or_path", "dtype")} == {
        key: value for key, value in expected.items() if key not in ("_name_or_path", "dtype")
    }


@pytest.mark.parametrize("case", CASES)
def test_a_consistent_permutation_changes_only_rounding(case):
    model = teacher(case).double()
    before = logits(model)
    order = choose(model.config, at_random(model.config, seed=3), Shape.of(model.config))
    assert order.hidden != tuple(range(48)) and order.neurons[0] != order.neurons[1]
    student = slice_model(model, order)
    assert (logits(student) - before).abs().max() < 1e-5 * before.abs().max()  # norms run in 32 bits
    permute_(model, order)
    assert (logits(model) - before).abs().max() < 1e-5 * before.abs().max()  # norms run in 32 bits
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), student.parameters(), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_a_smaller_student_is_saved_and_reloaded_exactly_and_counted_right(case, tmp_path):
    model, shape = teacher(case), SMALLER[case]
    student = slice_model(model, choose(model.config, at_random(model.config, seed=1), shape))
    assert Shape.of(student.config) == shape
    assert (
        sum(p.numel() for p in student.parameters())
        == count_parameters(model.config, shape)
        == count_parameters(student.config)
    )
    assert count_parameters(model.config) == sum(p.numel() for p in model.parameters())
    student.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(reloaded) is type(model) and Shape.of(reloaded.config) == shape
    assert torch.equal(logits(reloaded), logits(student))
    assert torch.isfinite(logits(student)).all()


@pytest.mark.parametrize("case", CASES)
def test_a_student_learns_and_its_teacher_does_not(case):
    model = teacher(case)
    before = [parameter.clone() for parameter in model.parameters()]
    student = slice_model(model, choose(model.config, first_n(model.config), SMALLER[case]))
    ids = torch.arange(12)[None]
    student(input_ids=ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in student.parameters())
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def test_layers_keep_their_order_and_their_types():
    model = teacher("qwen2")
    whole = first_units(model.config)
    kept = replace(
        whole, layers=(0, 1, 3), neurons=whole.neurons[:3], kv_heads=whole.kv_heads[:3], query_heads=whole.query_heads[:3]
    )
    student = slice_model(model, kept)
    assert student.config.layer_types == ["full_attention", "sliding_attention", "sliding_attention"]
    assert [layer.self_attn.sliding_window for layer in student.model.layers] == [None, 5, 5]
    del model.model.layers[2]
    model.config.num_hidden_layers = 3
    model.config.layer_types = model.config.layer_types[:2] + model.config.layer_types[3:]
    for place, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = place
    assert torch.equal(logits(student), logits(model))


def silence_pairs(model, head_dim):
    """Make the dimensions that a cut to ``head_dim`` drops do nothing: no query or key reads them, no output their values."""
    from daekit.students.slicing import kept_dims

    dead = torch.ones(Shape.of(model.config).head_dim, dtype=torch.bool)
    dead[kept_dims(model.config, head_dim)] = False
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "query_key_value" in name or any(part in name for part in ("q_proj", "k_proj", "v_proj")):
                parameter.view(-1, len(dead), *parameter.shape[1:])[:, dead] = 0


@pytest.mark.parametrize("case", CASES)
def test_every_kth_pair_turns_with_its_own_frequencies(case):
    model = teacher(case)
    head_dim = possible_head_dims(model.config)[1]
    silence_pairs(model, head_dim)
    shape = replace(Shape.of(model.config), head_dim=head_dim)
    if case.startswith("gpt_neox"):  # its hidden size follows from the heads: drop channels that do nothing, too
        shape = replace(shape, hidden_size=shape.num_attention_heads * head_dim)
        silence_channels(model, shape.hidden_size)
    selection = first_units(model.config, shape)
    fits = fit_norms(model, selection, rows()) if case in ("qwen3", "gpt_neox", "gpt_neox-sequential") else None
    student = slice_model(model, selection, fits)
    assert (logits(student) - logits(model)).abs().max() < 2e-3 * logits(model).abs().max()
    if fits is not None:
        assert (logits(slice_model(model, selection)) - logits(model)).abs().max() > 0.02 * logits(model).abs().max()


@pytest.mark.parametrize("case", CASES)
def test_norms_over_fewer_channels_are_scaled_to_what_they_gave(case):
    model = teacher(case)
    kept = 32 if case == "gpt_neox" else 40 if case == "gpt_neox-sequential" else 36
    silence_channels(model, kept)
    shape = replace(Shape.of(model.config), hidden_size=kept)
    if case.startswith("gpt_neox"):
        shape = replace(shape, num_attention_heads=kept // shape.head_dim, num_key_value_heads=kept // shape.head_dim)
        with torch.no_grad():  # and the dropped heads say nothing
            for layer in model.gpt_neox.layers:
                layer.attention.dense.weight[:, kept:] = 0
    selection = first_units(model.config, shape)
    plain, fitted = slice_model(model, selection), slice_model(model, selection, fit_norms(model, selection, rows()))
    scale = logits(model).abs().max()
    assert (logits(fitted) - logits(model)).abs().max() < 2e-3 * scale
    assert (logits(plain) - logits(model)).abs().max() > 0.02 * scale


def test_the_shift_of_a_layernorm_is_that_of_its_mean():
    """On one token the fit is exact for any channels: its output over the kept channels is then the teacher's."""
    model = teacher("gpt_neox").double()
    selection = first_units(model.config, Shape(4, 32, 40, 2, 2, 16))
    x = torch.randn(48, dtype=torch.double) + 1.5
    model.gpt_neox.embed_in.weight.data[:] = x
    fits = fit_norms(model, selection, [{"input_ids": [3] * 50}])
    student = slice_model(model, selection, fits)
    name = "gpt_neox.layers.0.input_layernorm"
    ours, theirs = student.get_submodule(name)(x[:32]), model.get_submodule(name)(x)[:32]
    assert (ours - theirs).abs().max() < 1e-12
    assert abs(fits[name].shift) > 0.01


@pytest.mark.parametrize("case", ["qwen3", "gpt_neox"])
def test_padding_has_no_part_in_the_fit_of_norms(case):
    model, text = teacher(case), rows()
    hidden, head_dim = (16, 8) if case == "gpt_neox" else (40, 4)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2} if case == "gpt_neox" else {}
    selection = first_units(model.config, replace(Shape.of(model.config), hidden_size=hidden, head_dim=head_dim, **heads))
    one, padded = (fit_norms(model, selection, text, batch_size=size) for size in (1, len(text)))
    assert one.keys() == padded.keys() and len(one) == (17 if case == "qwen3" else 9)
    for name, fit in one.items():
        assert (padded[name].scale, padded[name].shift) == pytest.approx((fit.scale, fit.shift), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_the_first_of_everything_is_a_view(case):
    model = teacher(case)
    own = Shape.of(model.config)
    heads = own.num_key_value_heads - 1
    hidden = heads * own.head_dim if case.startswith("gpt_neox") else 40
    shape = replace(
        own,
        hidden_size=hidden,
        intermediate_size=24,
        num_key_value_heads=heads,
        num_attention_heads=heads * own.queries_per_group,
        num_hidden_layers=3,
    )
    selection = first_units(model.config, shape)
    view, copy = view_model(model, selection), slice_model(model, selection)
    assert torch.equal(logits(view), logits(copy))
    theirs = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    assert {parameter.untyped_storage().data_ptr() for parameter in view.parameters()} <= theirs
    assert not any(parameter.requires_grad for parameter in view.parameters())


def test_of_query_heads_within_groups_only_their_projections_are_copies():
    model = teacher("mistral")
    view = view_model(model, first_units(model.config, replace(Shape.of(model.config), num_attention_heads=3)))
    theirs = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    copied = {name for name, parameter in view.named_parameters() if parameter.untyped_storage().data_ptr() not in theirs}
    assert {name.split(".")[-2] for name in copied} == {"q_proj", "o_proj"}


@pytest.mark.parametrize(
    ("case", "sizes", "words"),
    [
        ("mistral", {"hidden_size": 0, "intermediate_size": 41}, ["hidden_size=0", "intermediate_size=41", "the teacher's 40"]),
        ("mistral", {"num_attention_heads": 4}, ["num_attention_heads=4", "num_key_value_heads=3", "3, 6"]),
        ("mistral", {"head_dim": 6}, ["head_dim=6", "4, 8"]),
        ("mistral", {"hidden_size": 49, "head_dim": 6}, ["hidden_size=49: must lie between 1 and the teacher's 48"]),
        ("llama", {"hidden_size": 41}, ["hidden_size=41", "LlamaConfig", "36, 42"]),
        ("llama", {"hidden_size": 41, "head_dim": 3}, ["hidden_size=41", "head_dim=3"]),
        ("gpt_neox", {"hidden_size": 40}, ["hidden_size=40", "3 x 16", "with 2 heads: hidden_size=32"]),
        ("gpt_neox", {"hidden_size": 32, "num_attention_heads": 2}, ["num_key_value_heads=3"]),
        ("gpt_neox", {"head_dim": 4}, ["head_dim=4", "8, 16"]),  # of four dimensions a quarter would be half a pair
    ],
)
def test_impossible_sizes_name_the_rule_and_the_nearest_valid(case, sizes, words):
    model = teacher(case)
    with pytest.raises(UserError) as error:
        choose(model.config, first_n(model.config), replace(Shape.of(model.config), **sizes))
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("case", CASES)
def test_what_the_rules_allow_can_be_built_and_is_counted_right(case):
    """transformers itself is asked about every combination of a few sizes."""
    from itertools import product

    from daekit.students.shapes import problems_of
    from daekit.students.slicing import empty_model, student_config

    config = CONFIGS[case]
    own, allowed = Shape.of(config), 0
    for hidden, heads, kv_heads, head_dim in product((24, 31, 32, 40, 48), (2, 3, 4, 6), (2, 3, 6), (2, 4, 8, 16)):
        if heads > own.num_attention_heads or kv_heads > own.num_key_value_heads or head_dim > own.head_dim:
            continue
        shape = Shape(2, hidden, 24, heads, kv_heads, head_dim)
        if list(problems_of(config, shape)):
            continue
        allowed += 1
        model = empty_model(student_config(config, first_units(config, shape)))
        assert sum(p.numel() for p in model.parameters()) == count_parameters(config, shape)
    assert allowed > 1


def test_rope_that_scales_by_place_keeps_its_head_dim():
    model = teacher("mistral", rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0})
    with pytest.raises(UserError, match=r"RoPE of type 'yarn'.*nearest valid: 16"):
        choose(model.config, first_n(model.config), replace(Shape.of(model.config), head_dim=8))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layers": (1, 0, 2, 3)}, "teacher's order"),
        ({"layers": (0, 1, 2, 9)}, r"layers: \[9\] do not exist, the teacher has 4"),
        ({"layers": ()}, "layers: keeps nothing"),
        ({"layers": (0, 1)}, "neurons: has 4 layers, but 2 are kept"),
        ({"hidden": (3, 3)}, "hidden: an index is there twice"),
        ({"neurons": ((0, 1), (0,), (0, 1), (2, 3))}, r"neurons: every layer must keep as many as the others, not \[1, 2\]"),
        ({"query_heads": ((0, 2, 1, 3, 4, 5),) * 4}, r"query_heads\[0\].*in that order"),
        ({"kv_heads": ((0, 2),) * 4, "query_heads": ((0, 1, 2, 3),) * 4}, r"query_heads\[0\]"),
    ],
)
def test_selections_that_do_not_fit_are_refused(change, words):
    model = teacher("mistral")
    with pytest.raises(UserError, match=words):
        slice_model(model, replace(first_units(model.config), **change))


def test_models_that_cannot_be_cut_are_refused():
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=2, n_positions=8))
    with pytest.raises(UserError, match=r"'gpt2'.*llama, mistral, qwen2, qwen3, gpt_neox"):
        count_parameters(gpt2.config)
    with pytest.raises(UserError, match="mixtral_to_dense"):
        first_units(tiny_model("mixtral").config)
    adapted = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(UserError, match="merge its adapter first"):
        slice_model(adapted, first_units(tiny_model().config))
    model = tiny_model()
    model.config.quantization_config = {"load_in_4bit": True}
    with pytest.raises(UserError, match="quantised"):
        slice_model(model, first_units(model.config))
    model = tiny_model()
    model.model.layers[0].mlp.extra = torch.nn.Linear(2, 2)
    with pytest.raises(UserError, match=r"mlp\.extra\.bias"):
        slice_model(model, first_units(model.config))


def test_a_student_is_in_its_teachers_dtype():
    model = teacher("qwen3").to(torch.bfloat16)
    student = slice_model(model, first_units(model.config))
    assert student.dtype == student.config.dtype == torch.bfloat16
    assert student.model.rotary_emb.inv_freq.dtype == torch.float32
    assert student.generation_config.to_dict() == model.generation_config.to_dict()
    assert student.generation_config is not model.generation_config
