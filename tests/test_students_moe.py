"""Mixtures made dense, smaller or new: exact where the experts of a layer are equal, and with every field of the config."""

from dataclasses import fields

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, MistralConfig, MixtralConfig, PreTrainedConfig

from daekit.errors import UserError
from daekit.students.experts import ExpertScores, measure_experts
from daekit.students.moe import _SHARED, dense_to_mixtral, fewer_experts, mixtral_to_dense
from tests.helpers.student_cases import logits, rows

SIZES = dict(
    vocab_size=40,
    hidden_size=24,
    intermediate_size=20,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.3,
    pad_token_id=None,
)


def mixtral(experts=4, equal=False, seed=0, **changes):
    torch.manual_seed(seed)
    config = MixtralConfig(**SIZES, num_local_experts=experts, num_experts_per_tok=2, **changes)
    model = AutoModelForCausalLM.from_config(config).eval()
    if equal:
        with torch.no_grad():
            for layer in model.model.layers:
                for weight in (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):
                    weight[:] = weight[:1].clone()
    return model


def mistral(seed=0, **changes):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(MistralConfig(**SIZES, **changes)).eval()


def difference(one, other):
    return ((logits(one) - logits(other)).abs().max() / logits(other).abs().max()).item()


def reloaded(model, tmp_path):
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model))
    return again


@pytest.mark.parametrize(
    ("how", "width"), [("best_expert", None), ("average", None), ("routed_average", None), ("top_neurons", 4 * 20)]
)
def test_equal_experts_become_one_exactly(how, width, tmp_path):
    model = mixtral(equal=True)
    student = mixtral_to_dense(model, how, measure_experts(model, rows()), intermediate_size=width)
    assert difference(student, model) < 4e-6
    assert student.config.model_type == "mistral" and student.config.intermediate_size == (width or 20)
    reloaded(student, tmp_path)


def test_fewer_of_equal_experts_compute_the_same(tmp_path):
    model = mixtral(experts=8, equal=True)
    student = fewer_experts(model, 2, measure_experts(model, rows()))
    assert difference(student, model) < 4e-6
    assert sum(p.numel() for p in student.parameters()) < sum(p.numel() for p in model.parameters())
    assert reloaded(student, tmp_path).config.num_local_experts == 2


def test_two_equal_models_become_a_mixture_that_computes_the_same(tmp_path):
    model = mistral(sliding_window=6)
    student = dense_to_mixtral([model, mistral(sliding_window=6)])
    assert difference(student, model) < 4e-6
    again = reloaded(student, tmp_path)
    assert again.config.sliding_window == 6 and again.config.num_local_experts == 2


def test_experts_that_nobody_is_sent_to_are_left_out_exactly():
    model, alive = mixtral(experts=6, seed=1), [[1, 4], [0, 5]]
    for layer, pair in zip(model.model.layers, alive, strict=True):
        layer.mlp.gate.forward = always(layer.mlp.gate, pair)
    scores, before = measure_experts(model, rows()), logits(model)
    assert [(layer > 0).nonzero().flatten().tolist() for layer in scores.routing_LE] == alive
    assert torch.equal(scores.routing_LE > 0, scores.contribution_LE > 0)
    student = fewer_experts(model, 2, scores)
    assert (logits(student) - before).abs().max() < 4e-6 * before.abs().max()


def always(gate, alive):
    """A router that sends every token to the same two experts."""

    def forward(hidden):
        scores = nn.functional.linear(hidden.reshape(-1, hidden.shape[-1]), gate.weight)
        chosen = torch.tensor(alive).expand(len(scores), -1)
        return scores, scores.gather(1, chosen).softmax(-1), chosen

    return forward


def plain_scores(model, rows):
    """Every expert on every token, weighed by a softmax over the two best."""
    inputs = {}
    for place, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_pre_hook(lambda m, i, p=place: inputs.setdefault(p, []).append(i[0][0].double()))
    with torch.no_grad():
        for row in rows:
            model(input_ids=torch.tensor([row["input_ids"]]))
    results = []
    for place, layer in enumerate(model.model.layers):
        x = torch.cat(inputs[place])
        probabilities = (x @ layer.mlp.gate.weight.double().T).softmax(-1)
        second = probabilities.sort(descending=True).values[:, 1:2]
        weights = probabilities * (probabilities >= second)
        weights = weights / weights.sum(dim=1, keepdim=True)
        neurons, sizes = [], []
        for expert, weight in enumerate(weights.T):
            gate, up = (x @ layer.mlp.experts.gate_up_proj[expert].double().T).chunk(2, dim=-1)
            activation = nn.functional.silu(gate) * up
            neurons.append((weight[:, None] * activation.abs()).mean(dim=0))
            sizes.append((weight[:, None] * activation @ layer.mlp.experts.down_proj[expert].double().T).norm(dim=1).mean())
        results.append((weights.mean(dim=0), torch.stack(sizes), torch.stack(neurons)))
    return [torch.stack(parts).detach() for parts in zip(*results, strict=True)]


@pytest.mark.parametrize("batch_size", [1, 5])
def test_scores_are_those_of_every_expert_on_every_token(batch_size):
    model = mixtral(seed=2)
    scores = measure_experts(model, rows(), batch_size=batch_size)
    found = (scores.routing_LE, scores.contribution_LE, scores.neurons_LEF)
    for ours, plain in zip(found, plain_scores(model, rows()), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-6)
    assert scores.routing_LE.sum(dim=1) == pytest.approx([1.0, 1.0])


def given_scores(best):
    """Scores of 2 layers x 4 experts x 20 neurons with the given best expert per layer."""
    contribution = torch.ones(2, 4, dtype=torch.float64)
    for layer, expert in enumerate(best):
        contribution[layer, expert] = 2.0
    routing = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.7, 0.1, 0.1, 0.1]], dtype=torch.float64)
    return ExpertScores(routing, contribution, torch.ones(2, 4, 20, dtype=torch.float64))


def test_each_layer_takes_what_its_scores_say():
    model, scores = mixtral(seed=3), given_scores((2, 1))
    experts = [layer.mlp.experts for layer in model.model.layers]
    best = mixtral_to_dense(model, "best_expert", scores)
    assert torch.equal(best.model.layers[0].mlp.gate_proj.weight, experts[0].gate_up_proj[2, :20])
    assert torch.equal(best.model.layers[1].mlp.up_proj.weight, experts[1].gate_up_proj[1, 20:])
    assert torch.equal(best.model.layers[1].mlp.down_proj.weight, experts[1].down_proj[1])
    average = mixtral_to_dense(model, "average")
    torch.testing.assert_close(average.model.layers[1].mlp.down_proj.weight, experts[1].down_proj.mean(dim=0))
    routed = mixtral_to_dense(model, "routed_average", scores)
    expected = (scores.routing_LE[0].float()[:, None, None] * experts[0].gate_up_proj).sum(dim=0)
    torch.testing.assert_close(routed.model.layers[0].mlp.gate_proj.weight, expected[:20])


@torch.no_grad()
def test_the_top_neurons_are_those_with_the_largest_activation_times_column():
    model = mixtral(seed=4)
    for layer in model.model.layers:
        layer.mlp.experts.down_proj *= 0.01
    wanted = [[(0, 3), (1, 19), (3, 0)], [(2, 2), (2, 7), (3, 3)]]
    scores = given_scores((0, 0))
    for layer, pairs in enumerate(wanted):
        for expert, neuron in pairs[:2]:
            model.model.layers[layer].mlp.experts.down_proj[expert, :, neuron] *= 1000  # one way to be large
        scores.neurons_LEF[layer, pairs[2][0], pairs[2][1]] = 1e6  # the other
    student = mixtral_to_dense(model, "top_neurons", scores, intermediate_size=3)
    for layer, pairs in enumerate(wanted):
        experts, mlp = model.model.layers[layer].mlp.experts, student.model.layers[layer].mlp
        for place, (expert, neuron) in enumerate(pairs):
            assert torch.equal(mlp.gate_proj.weight[place], experts.gate_up_proj[expert, neuron])
            assert torch.equal(mlp.up_proj.weight[place], experts.gate_up_proj[expert, 20 + neuron])
            share = scores.routing_LE[layer, expert].float()
            torch.testing.assert_close(mlp.down_proj.weight[:, place], share * experts.down_proj[expert, :, neuron])


def test_the_parts_around_the_experts_are_the_same_and_not_shared():
    model = mixtral()
    student = mixtral_to_dense(model, "average")
    ours, theirs = dict(student.named_parameters()), dict(model.named_parameters())
    assert len({p.untyped_storage().data_ptr() for p in ours.values()}) == len(ours)
    common = ours.keys() & theirs.keys()
    assert len(common) == 3 + 2 * 6  # embeddings, norm, head; four projections and two norms per layer
    assert all(torch.equal(ours[name], theirs[name]) for name in common)
    assert not {p.untyped_storage().data_ptr() for p in ours.values()} & {
        p.untyped_storage().data_ptr() for p in theirs.values()
    }


def test_a_mixture_of_two_models_has_their_mlps():
    models = [mistral(seed=0), mistral(seed=1)]
    student = dense_to_mixtral(models)
    for index, model in enumerate(models):
        expected = torch.cat([model.model.layers[1].mlp.gate_proj.weight, model.model.layers[1].mlp.up_proj.weight])
        assert torch.equal(student.model.layers[1].mlp.experts.gate_up_proj[index], expected)
    assert torch.equal(student.model.layers[0].self_attn.q_proj.weight, models[0].model.layers[0].self_attn.q_proj.weight)


def test_random_routers_follow_the_seed():
    models = [mistral(seed=0), mistral(seed=1)]
    one, again, other = (dense_to_mixtral(models, seed=seed).model.layers[0].mlp.gate.weight for seed in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)


UNUSUAL = dict(
    max_position_embeddings=77,
    rms_norm_eps=3e-4,
    hidden_act="gelu",
    use_cache=False,
    bos_token_id=5,
    eos_token_id=7,
    tie_word_embeddings=True,
    attention_dropout=0.25,
    head_dim=8,
    rope_parameters={"rope_type": "default", "rope_theta": 12345.0},
)


@pytest.mark.parametrize("window", [None, 9])
def test_no_field_of_the_config_falls_back_to_a_default(window):
    model = mixtral(**UNUSUAL, sliding_window=window)
    dense = mixtral_to_dense(model, "average")
    moe = dense_to_mixtral([dense, dense])
    for name in _SHARED:
        assert getattr(dense.config, name) == getattr(model.config, name) == getattr(moe.config, name), name
    assert moe.config.router_aux_loss_coef == 0.0
    assert difference(moe, dense) < 4e-6


def test_every_field_that_mistral_has_is_among_those_that_are_copied():
    own = {field.name for field in fields(MistralConfig)} - {field.name for field in fields(PreTrainedConfig)}
    assert own <= set(_SHARED)


def test_what_cannot_be_done_is_refused():
    model, scores = mixtral(), given_scores((0, 0))
    with pytest.raises(UserError, match=r"best_expert: needs the experts' scores"):
        mixtral_to_dense(model, "best_expert")
    with pytest.raises(UserError, match=r"intermediate_size=10: average makes an MLP as wide as one expert, 20"):
        mixtral_to_dense(model, "average", intermediate_size=10)
    with pytest.raises(UserError, match=r"intermediate_size=81: 4 experts have 80 neurons"):
        mixtral_to_dense(model, "top_neurons", scores, intermediate_size=81)
    with pytest.raises(UserError, match=r"'mistral': this works with mixtral"):
        mixtral_to_dense(mistral(), "average")
    with pytest.raises(UserError, match=r"experts=1, num_experts_per_tok=2"):
        fewer_experts(model, 1, scores)
    with pytest.raises(UserError, match=r"experts=5"):
        fewer_experts(model, 5, scores)
    with pytest.raises(UserError, match=r"sliding_window: 4096 and None"):
        dense_to_mixtral([mistral(), mistral(sliding_window=None)])
    with pytest.raises(UserError, match="at least two models"):
        dense_to_mixtral([mistral()])
    with pytest.raises(UserError, match=r"\d+ tokens in 1 rows, but 20 neurons of an expert"):
        measure_experts(model, rows(1, longest=10))
    model.config.quantization_config = {"load_in_4bit": True}
    with pytest.raises(UserError, match="quantised"):
        measure_experts(model, rows())
