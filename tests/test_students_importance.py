"""What a teacher can do without is found on calibration text, and leaving it out changes nothing."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from daekit.errors import UserError
from daekit.students.families import family_of
from daekit.students.importance import at_random, choose, first_n, measure_importance, sort_teacher
from daekit.students.norms import fit_norms
from daekit.students.shapes import Shape
from daekit.students.slicing import permute_, slice_model, view_model
from tests.helpers.student_cases import CONFIGS, first_units, logits, rows, silence_channels, teacher

CASES = list(CONFIGS)


def layer_weights(model, layer, *parts):
    """The parameters of a layer whose name holds one of ``parts``."""
    prefix = family_of(model.config).in_layer(layer, "")
    return [p for name, p in model.named_parameters() if name.startswith(prefix) and any(part in name for part in parts)]


@torch.no_grad()
def plant_dead_neurons(model, dead):
    for layer, neurons in enumerate(dead):
        for weight in layer_weights(model, layer, "up_proj", "h_to_4h"):
            weight[neurons] = 0


@torch.no_grad()
def plant_dead_heads(model, dead):
    """Key/value heads that say nothing: their values are zero."""
    own = Shape.of(model.config)
    for layer, heads in enumerate(dead):
        for weight in layer_weights(model, layer, "v_proj"):
            weight.view(own.num_key_value_heads, own.head_dim, -1)[heads] = 0
        for weight in layer_weights(model, layer, "query_key_value"):
            weight.view(own.num_attention_heads, 3, own.head_dim, -1)[heads, 2] = 0


@torch.no_grad()
def plant_noop_layer(model, layer):
    for weight in layer_weights(model, layer, "o_proj", "down_proj", "dense.", "dense_4h_to_h"):
        weight.zero_()


def same(student, model):
    return (logits(student) - logits(model)).abs().max() < 1e-4 * logits(model).abs().max()


@pytest.mark.parametrize("case", CASES)
def test_dead_neurons_are_found_in_every_layer_and_left_out(case):
    model = teacher(case)
    dead = [[0, 7, 33], [1, 2, 3], [39, 0, 20], [5, 6, 30]]
    plant_dead_neurons(model, dead)
    selection = choose(model.config, measure_importance(model, rows()), replace(Shape.of(model.config), intermediate_size=37))
    assert [sorted(set(range(40)) - set(kept)) for kept in selection.neurons] == [sorted(d) for d in dead]
    student = slice_model(model, selection)
    assert student.config.intermediate_size == 37 and same(student, model)


@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("gpt_neox")])
def test_dead_groups_are_found_in_every_layer_and_left_out(case):
    model = teacher(case)
    plant_dead_heads(model, [[0], [2], [1], [0]])
    own = Shape.of(model.config)
    shape = replace(own, num_key_value_heads=2, num_attention_heads=4)
    selection = choose(model.config, measure_importance(model, rows()), shape)
    assert [sorted(kept) for kept in selection.kv_heads] == [[1, 2], [0, 1], [0, 2], [1, 2]]
    assert same(slice_model(model, selection), model)


@pytest.mark.parametrize("case", ["gpt_neox", "gpt_neox-sequential"])
def test_dead_heads_and_channels_of_gpt_neox_go_together(case):
    model = teacher(case)
    own = Shape.of(model.config)
    silence_channels(model, 48 - own.head_dim)
    plant_dead_heads(model, [[0], [2], [1], [0]])
    with torch.no_grad():  # biases of its values remain
        for layer, head in enumerate([0, 2, 1, 0]):
            layer_weights(model, layer, "dense.")[0].view(48, -1, own.head_dim)[:, head] = 0
    heads = own.num_attention_heads - 1
    shape = replace(own, hidden_size=heads * own.head_dim, num_attention_heads=heads, num_key_value_heads=heads)
    selection = choose(model.config, measure_importance(model, rows()), shape)
    assert sorted(selection.hidden) == list(range(48 - own.head_dim))
    assert [sorted(set(range(heads + 1)) - set(kept)) for kept in selection.query_heads] == [[0], [2], [1], [0]]
    student = slice_model(model, selection, fit_norms(model, selection, rows()))
    assert (logits(student) - logits(model)).abs().max() < 2e-3 * logits(model).abs().max()


def test_queries_are_ranked_within_their_groups():
    """The heads that count least are all of one group: each group still gives up just one."""
    model = teacher("mistral")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.view(48, 6, 16)[:, [1, 2, 5]] = 0
    scores = first_n(model.config)
    scores = replace(scores, queries_LA=torch.tensor([[0.2, 0.1, 7, 8, 9, 6]]).double().expand(4, -1))
    selection = choose(model.config, scores, replace(Shape.of(model.config), num_attention_heads=3))
    assert selection.query_heads == ((3, 4, 0),) * 4 and selection.kv_heads == ((1, 2, 0),) * 4
    assert same(slice_model(model, selection), model)


@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("gpt_neox")])
def test_dead_channels_are_found_and_left_out(case):
    model = teacher(case)
    silence_channels(model, 36)
    order = choose(model.config, at_random(model.config, seed=2), Shape.of(model.config))
    permute_(model, order)
    alive = {place for place, channel in enumerate(order.hidden) if channel < 36}
    selection = choose(model.config, measure_importance(model, rows()), replace(Shape.of(model.config), hidden_size=36))
    assert set(selection.hidden) == alive
    student = slice_model(model, selection, fit_norms(model, selection, rows()))
    assert (logits(student) - logits(model)).abs().max() < 2e-3 * logits(model).abs().max()


@pytest.mark.parametrize("case", CASES)
def test_a_layer_that_does_nothing_is_found_and_left_out(case):
    model = teacher(case)
    plant_noop_layer(model, 1)
    scores = measure_importance(model, rows())
    assert scores.layers_L[1].abs() < 1e-6 < 1e-3 < scores.layers_L[[0, 2, 3]].min()
    selection = choose(model.config, scores, replace(Shape.of(model.config), num_hidden_layers=3))
    assert selection.layers == (0, 2, 3)
    assert same(slice_model(model, selection), model)


@pytest.mark.parametrize("case", CASES)
def test_the_first_of_a_sorted_teacher_is_the_best_of_it(case):
    model = teacher(case)
    before, scores = logits(model), measure_importance(model, rows())
    own = Shape.of(model.config)
    heads = own.num_key_value_heads - 1
    hidden = heads * own.head_dim if case.startswith("gpt_neox") else 36
    shape = Shape(4, hidden, 24, heads * own.queries_per_group, heads, own.head_dim)
    best = slice_model(model, choose(model.config, scores, shape))
    sort_teacher(model, scores)
    assert (logits(model) - before).abs().max() < 1e-4 * before.abs().max()
    first = view_model(model, first_units(model.config, shape))
    assert (logits(first) - logits(best)).abs().max() < 1e-4 * before.abs().max()
    assert measure_importance(model, rows()).hidden_H.diff().max() < 1e-6  # the scores of a sorted teacher fall


def plain_scores(model, rows):
    """The scores of one mistral, row by row, from its own hidden states and hooks that keep everything."""
    kept: dict[str, list[torch.Tensor]] = {}

    def keep(name, tensor):
        kept.setdefault(name, []).append(tensor[0].double())

    for place, layer in enumerate(model.model.layers):
        for name in ("input_layernorm", "post_attention_layernorm"):
            layer.get_submodule(name).register_forward_hook(lambda m, i, o, n=f"{place}.{name}": keep(n, o))
        layer.self_attn.o_proj.register_forward_pre_hook(lambda m, i, n=f"{place}.heads": keep(n, i[0]))
        layer.mlp.down_proj.register_forward_pre_hook(lambda m, i, n=f"{place}.neurons": keep(n, i[0]))
    cosines: list[list[float]] = [[] for _ in model.model.layers]
    for row in rows:
        states: list[tuple[torch.Tensor, torch.Tensor]] = []
        see = partial(lambda states, module, inputs, output: states.append((inputs[0], output)), states)
        handles = [layer.register_forward_hook(see) for layer in model.model.layers]
        with torch.no_grad():
            model(input_ids=torch.tensor([row["input_ids"]]))
        for handle in handles:
            handle.remove()
        for place, (before, after) in enumerate(states):
            cosines[place] += torch.cosine_similarity(before[0].double(), after[0].double(), dim=-1).tolist()

    def score(name):
        return sum(row.abs().mean(dim=0) ** 2 for row in kept[name]) ** 0.5

    layers = range(len(model.model.layers))
    return (
        torch.tensor([1 - sum(values) / len(values) for values in cosines]),
        sum(score(f"{place}.{name}") for place in layers for name in ("input_layernorm", "post_attention_layernorm")),
        torch.stack([score(f"{place}.neurons") for place in layers]),
        torch.stack([score(f"{place}.heads").view(6, -1).norm(dim=-1) for place in layers]),
    )


@pytest.mark.parametrize("batch_size", [1, 5, 100])
def test_scores_are_those_of_one_row_at_a_time(batch_size):
    model = teacher("mistral")
    found = measure_importance(model, rows(), batch_size=batch_size)
    for ours, plain in zip(
        (found.layers_L, found.hidden_H, found.neurons_LF, found.queries_LA), plain_scores(model, rows()), strict=True
    ):
        torch.testing.assert_close(ours.float(), plain.float(), rtol=1e-4, atol=1e-6)


def test_measuring_leaves_the_model_as_it_was():
    model = teacher("qwen3").train()
    model.model.layers[0].eval()
    measure_importance(model, rows())
    assert [layer.training for layer in model.model.layers] == [False, True, True, True]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_uniform_importance_keeps_the_same_units_in_every_layer():
    model = teacher("mistral")
    shape = Shape(3, 40, 20, 2, 2, 16)
    scores = measure_importance(model, rows())
    own, same_ones = choose(model.config, scores, shape), choose(model.config, scores.uniform, shape)
    assert len(set(own.neurons)) > 1 and len(set(own.query_heads)) > 1
    assert len(set(same_ones.neurons)) == len(set(same_ones.query_heads)) == 1
    assert own.hidden == same_ones.hidden and own.layers == same_ones.layers
    loud = replace(scores, neurons_LF=scores.neurons_LF * torch.tensor([[1000.0], [1], [1], [1]]))
    assert choose(model.config, loud.uniform, shape) == same_ones  # a layer of large activations does not decide alone


def test_baselines():
    config = CONFIGS["mistral"]
    shape = Shape(2, 40, 20, 2, 2, 16)
    assert choose(config, first_n(config), shape) == first_units(config, shape)
    assert choose(config, first_n(config).uniform, shape) == first_units(config, shape)
    one, again, other = (choose(config, at_random(config, seed), shape) for seed in (1, 1, 2))
    assert one == again != other


def test_calibration_text_that_is_too_short_is_refused_with_the_numbers():
    model = teacher("mistral")
    short = rows(2, longest=10)
    tokens = sum(len(row["input_ids"]) for row in short)
    with pytest.raises(UserError, match=rf"{tokens} tokens in 2 rows, but 48 channels or neurons"):
        measure_importance(model, short)
    with pytest.raises(UserError, match=r"0 tokens in 0 rows, but 48 channels"):
        fit_norms(model, first_units(model.config), [])
