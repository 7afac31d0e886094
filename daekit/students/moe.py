"""Students with other experts than their teacher: a Mixtral made dense or with fewer experts, dense models made a Mixtral.

Apart from the MLPs Mixtral and Mistral have the same weights under the same names, so these are taken as they are.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import MistralConfig, MixtralConfig, PreTrainedConfig, PreTrainedModel

from daekit.errors import UserError
from daekit.students.experts import ExpertScores, require_model_type
from daekit.students.slicing import empty_model, fill

Merge = Literal["best_expert", "average", "routed_average", "top_neurons"]
# every field that both configs have: defaults differ (sliding_window: 4096 and none; rope_theta; rms_norm_eps), so all are set
_SHARED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache", "pad_token_id",
    "bos_token_id", "eos_token_id", "tie_word_embeddings", "rope_parameters", "sliding_window", "attention_dropout",
)  # fmt: skip


@torch.no_grad()
def mixtral_to_dense(
    model: PreTrainedModel, how: Merge, scores: ExpertScores | None = None, intermediate_size: int | None = None
) -> PreTrainedModel:
    """A Mistral with a Mixtral's attention, norms and embeddings, and one MLP per layer made of its MoE experts.

    ==================  ================================================================================================
    ``best_expert``     the expert that adds most to the output, per layer
    ``average``         the mean of the experts' weights (of neurons that need not be alike from expert to expert)
    ``routed_average``  the mean by routing weight
    ``top_neurons``     of the neurons of all experts those with the largest routing weight x |activation| x |output column|;
                        their output columns are multiplied by the expert's mean routing weight
    ==================  ================================================================================================

    The first three are exact where the experts of a layer are equal; so is ``top_neurons`` if it keeps all neurons.

    Args:
        scores: The result of ``measure_experts``; only ``average`` does without.
        intermediate_size: The width of the MLP, for ``top_neurons`` only (default: that of one expert).

    Raises:
        UserError: The model has another architecture or quantised weights, scores are missing, or the width is impossible.
    """
    require_model_type(model, "mixtral")
    experts, neurons = model.config.num_local_experts, model.config.intermediate_size
    width = neurons if intermediate_size is None else intermediate_size
    if width != neurons and how != "top_neurons":
        raise UserError(f"intermediate_size={width}: {how} makes an MLP as wide as one expert, {neurons}; use top_neurons")
    if not 1 <= width <= experts * neurons:
        raise UserError(f"intermediate_size={width}: {experts} experts have {experts * neurons} neurons together")
    if scores is None and how != "average":
        raise UserError(f"{how}: needs the experts' scores on calibration text (measure_experts); only average does without")
    tensors = _outside_mlps(model)
    for layer in range(model.config.num_hidden_layers):
        block = model.get_submodule(f"model.layers.{layer}.mlp.experts")
        mlp = _merged(block.gate_up_proj, block.down_proj, how, scores, layer, width)  # type: ignore[arg-type]
        tensors |= {f"model.layers.{layer}.mlp.{name}.weight": tensor for name, tensor in mlp.items()}
    config = MistralConfig(**_shared(model.config) | {"intermediate_size": width}, dtype=model.dtype)
    return _finish(config, tensors, model)


@torch.no_grad()
def fewer_experts(model: PreTrainedModel, experts: int, scores: ExpertScores) -> PreTrainedModel:
    """A Mixtral with the ``experts`` of each layer that add most to its output, and their rows of the router.

    Args:
        scores: The result of ``measure_experts``.

    Raises:
        UserError: The model has another architecture or quantised weights, or it has fewer experts than ``experts``, or
            ``experts`` is below ``num_experts_per_tok``.
    """
    require_model_type(model, "mixtral")
    active = model.config.num_experts_per_tok
    if not 1 <= active <= experts <= model.config.num_local_experts:
        raise UserError(
            f"experts={experts}, num_experts_per_tok={active}: must be 1 <= num_experts_per_tok <= experts <= "
            f"{model.config.num_local_experts}, the teacher's experts"
        )
    tensors = _outside_mlps(model)
    for layer in range(model.config.num_hidden_layers):
        block = model.get_submodule(f"model.layers.{layer}.mlp")
        best = scores.contribution_LE[layer].sort(descending=True, stable=True).indices[:experts].sort().values
        for name, tensor in block.named_parameters():  # gate.weight, experts.gate_up_proj, experts.down_proj: by expert
            tensors[f"model.layers.{layer}.mlp.{name}"] = tensor.detach()[best.to(tensor.device)]
    config = copy.deepcopy(model.config)
    config.num_local_experts, config.name_or_path = experts, ""
    return _finish(config, tensors, model)


@torch.no_grad()
def dense_to_mixtral(models: Sequence[PreTrainedModel], *, seed: int = 0) -> PreTrainedModel:
    """A Mixtral whose experts are the MLPs of Mistral models of one shape; two of 7B give a 2x7B of 12.9 billion parameters.

    Attention, norms, embeddings and output head are the first model's; the routers are small random values, for a student that
    is trained next. A token is sent to two experts: of two both always run, the router only weighs them, and there is no
    load to balance. A mixture of equal models computes the same as each of them.

    Args:
        seed: Seed of the routers' random values.

    Raises:
        UserError: A model has another architecture, their shapes differ, or there are too few.
    """
    _require_alike(models)
    first, config = models[0], models[0].config
    generator = torch.Generator().manual_seed(seed)
    tensors = _outside_mlps(first)
    for layer in range(config.num_hidden_layers):
        mlps = [model.get_submodule(f"model.layers.{layer}.mlp") for model in models]
        gate_up = [torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]) for mlp in mlps]  # type: ignore[list-item, union-attr]
        prefix = f"model.layers.{layer}.mlp"
        router_EH = torch.randn((len(models), config.hidden_size), generator=generator) * config.initializer_range
        tensors[f"{prefix}.gate.weight"] = router_EH.to(first.device, first.dtype)
        tensors[f"{prefix}.experts.gate_up_proj"] = torch.stack([each.to(first.device, first.dtype) for each in gate_up])
        down = [mlp.down_proj.weight.to(first.device, first.dtype) for mlp in mlps]  # type: ignore[union-attr, operator]
        tensors[f"{prefix}.experts.down_proj"] = torch.stack(down)
    moe = MixtralConfig(
        **_shared(config),
        num_local_experts=len(models),
        num_experts_per_tok=2,
        output_router_logits=False,
        router_aux_loss_coef=0.0,  # no loss that nobody asked for
        router_jitter_noise=0.0,
        dtype=first.dtype,
    )
    return _finish(moe, tensors, first)


def _merged(
    gate_up_EGH: Tensor, down_EHF: Tensor, how: Merge, scores: ExpertScores | None, layer: int, width: int
) -> Mapping[str, Tensor]:
    """The three weights of a dense MLP."""
    experts = len(gate_up_EGH)
    if scores is None or how == "average":
        share_E = torch.full((experts,), 1 / experts, dtype=torch.float64)
    elif how == "top_neurons":
        return _top_neurons(gate_up_EGH, down_EHF, scores, layer, width)
    elif how == "routed_average":
        share_E = scores.routing_LE[layer]
    else:
        share_E = torch.nn.functional.one_hot(scores.contribution_LE[layer].argmax(), experts).double()
    gate_FH, up_FH = (half.clone() for half in _weighted(share_E, gate_up_EGH).chunk(2))  # one storage each, to be saved
    return {"gate_proj": gate_FH, "up_proj": up_FH, "down_proj": _weighted(share_E, down_EHF)}


def _weighted(share_E: Tensor, weight_E: Tensor) -> Tensor:
    """The sum of the experts' weights by their shares; one expert at a time in 32 bits."""
    total = torch.zeros_like(weight_E[0], dtype=torch.float32)
    for share, weight in zip(share_E.tolist(), weight_E, strict=True):
        if share:
            total.add_(weight.float(), alpha=share)
    return total.to(weight_E.dtype)


def _top_neurons(gate_up_EGH: Tensor, down_EHF: Tensor, scores: ExpertScores, layer: int, width: int) -> Mapping[str, Tensor]:
    neurons = down_EHF.shape[2]
    column_EF = down_EHF.float().norm(dim=1).double().cpu()
    score_X = (scores.neurons_LEF[layer] * column_EF).flatten()  # X: the neurons of all experts
    best_W = score_X.sort(descending=True, stable=True).indices[:width].sort().values
    expert_W, neuron_W = (best_W // neurons).to(down_EHF.device), (best_W % neurons).to(down_EHF.device)
    share_W1 = scores.routing_LE[layer][best_W // neurons, None].to(down_EHF.device)
    columns_WH = down_EHF[expert_W, :, neuron_W].float() * share_W1
    return {
        "gate_proj": gate_up_EGH[expert_W, neuron_W],
        "up_proj": gate_up_EGH[expert_W, neurons + neuron_W],
        "down_proj": columns_WH.T.contiguous().to(down_EHF.dtype),
    }


def _require_alike(models: Sequence[PreTrainedModel]) -> None:
    for model in models:
        require_model_type(model, "mistral")
    if len(models) < 2:
        raise UserError(f"a mixture needs at least two models, not {len(models)}")
    first, *others = (_shared(model.config) for model in models)
    for index, other in enumerate(others, start=1):
        if differ := [f"{name}: {first[name]!r} and {other[name]!r}" for name in _SHARED if other[name] != first[name]]:
            raise UserError(f"models 0 and {index} do not fit into one mixture: {'; '.join(differ)}")


def _shared(config: PreTrainedConfig) -> dict[str, Any]:
    return {name: copy.deepcopy(getattr(config, name)) for name in _SHARED}


def _outside_mlps(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters() if ".mlp." not in name}


def _finish(config: PreTrainedConfig, tensors: Mapping[str, Tensor], like: PreTrainedModel) -> PreTrainedModel:
    """The model, with storage of its own: what was taken whole from another model is copied."""
    theirs = {parameter.untyped_storage().data_ptr() for parameter in like.parameters()}
    own = {
        name: tensor.clone() if tensor.untyped_storage().data_ptr() in theirs else tensor.contiguous()
        for name, tensor in tensors.items()
    }
    return fill(empty_model(config), own, like=like)
