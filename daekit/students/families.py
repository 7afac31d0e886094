"""The families that a student can be cut from, and for each: which dimension of which weight is cut along which axis.

Everything in this folder that touches a weight reads these tables: slicing, sorting, counting. An axis is one of

    vocab             the vocabulary: never cut, because distillation needs the teacher's
    hidden            the channels of the residual stream
    neuron            the width of the MLP
    query             query heads x head_dim, head by head
    kv                key/value heads x head_dim, head by head
    query_key_value   heads x (query, key, value) x head_dim: GPT-NeoX's fused projection
    dim               head_dim: weights that all heads of a layer share
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from transformers import GPTNeoXForCausalLM, PreTrainedConfig

from daekit.errors import UserError

NORMS = ("input_layernorm", "post_attention_layernorm")  # of a layer, over the hidden channels
Axes = tuple[str, ...]


@dataclass(frozen=True)
class Module:
    """The axes of a module's weight, and whether it has a bias (along the first of them), as a field of the config may say."""

    axes: Axes
    bias: bool | str = False


_EMBEDDINGS, _NORM, _HEAD_NORM = Module(("vocab", "hidden")), Module(("hidden",)), Module(("dim",))


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        backbone: name of the module that holds embeddings, layers and the final norm.
        outside: modules that are not in a layer, but for the output head.
        head: the output head, which has no weight of its own where it is tied.
        layer: modules of a layer, named from the layer on.
        final_norm: the norm after the last layer.
        attention_output: the module whose input are the heads' outputs.
        mlp_output: the module whose input are the neurons.
        scores: the module that multiplies the attention scores once: scaled when head_dim changes, because the model divides
            the scores by its square root.
        hidden_multiple_of_heads: the config refuses a hidden size that the heads do not divide.
        hidden_is_all_heads: hidden size = heads x head_dim, and no grouped queries.
        partial_rotary: only the first part of head_dim is rotated.
    """

    backbone: str
    outside: Mapping[str, Module]
    head: str
    layer: Mapping[str, Module]
    final_norm: str
    attention_output: str
    mlp_output: str
    scores: str
    hidden_multiple_of_heads: bool = False
    hidden_is_all_heads: bool = False
    partial_rotary: bool = False

    def in_layer(self, layer: int, name: str) -> str:
        """The full name of a module or weight of a layer."""
        return f"{self.backbone}.layers.{layer}.{name}"

    def weights_outside(self, config: PreTrainedConfig) -> dict[str, Axes]:
        """Name -> axes of every weight and bias that is not in a layer of a model of ``config``."""
        head = {} if config.tie_word_embeddings else {self.head: _EMBEDDINGS}
        return _weights({**self.outside, **head}, config)

    def weights_of_layer(self, config: PreTrainedConfig) -> dict[str, Axes]:
        """The same of a layer, named from the layer on."""
        return _weights(self.layer, config)

    def weights(self, config: PreTrainedConfig) -> Iterator[tuple[str, int | None, str, Axes]]:
        """(full name, layer or None, name from the layer on, axes) of every weight and bias of a model of ``config``."""
        for name, axes in self.weights_outside(config).items():
            yield name, None, name, axes
        for layer in range(config.num_hidden_layers):
            for name, axes in self.weights_of_layer(config).items():
                yield self.in_layer(layer, name), layer, name, axes


def _weights(modules: Mapping[str, Module], config: PreTrainedConfig) -> dict[str, Axes]:
    weights = {}
    for name, module in modules.items():
        weights[f"{name}.weight"] = module.axes
        if getattr(config, module.bias) if isinstance(module.bias, str) else module.bias:
            weights[f"{name}.bias"] = module.axes[:1]
    return weights


_QUERY, _KV, _OUTPUT = ("query", "hidden"), ("kv", "hidden"), ("hidden", "query")
_UP, _DOWN = ("neuron", "hidden"), ("hidden", "neuron")


def _like_llama(
    inputs_bias: bool | str = False,
    output_bias: bool | str = False,
    mlp_bias: bool | str = False,
    head_norms: bool = False,
    hidden_multiple_of_heads: bool = False,
) -> Family:
    """``inputs_bias``, ``output_bias``: of the attention's projections; ``head_norms``: of queries and keys, over head_dim."""
    layer = {
        "input_layernorm": _NORM,
        "self_attn.q_proj": Module(_QUERY, inputs_bias),
        "self_attn.k_proj": Module(_KV, inputs_bias),
        "self_attn.v_proj": Module(_KV, inputs_bias),
        "self_attn.o_proj": Module(_OUTPUT, output_bias),
        "post_attention_layernorm": _NORM,
        "mlp.gate_proj": Module(_UP, mlp_bias),
        "mlp.up_proj": Module(_UP, mlp_bias),
        "mlp.down_proj": Module(_DOWN, mlp_bias),
    }
    if head_norms:
        layer |= {"self_attn.q_norm": _HEAD_NORM, "self_attn.k_norm": _HEAD_NORM}
    return Family(
        backbone="model",
        outside={"model.embed_tokens": _EMBEDDINGS, "model.norm": _NORM},
        head="lm_head",
        layer=layer,
        final_norm="model.norm",
        attention_output="self_attn.o_proj",
        mlp_output="mlp.down_proj",
        # whatever scales q_proj is divided out by a norm after it
        scores="self_attn.q_norm" if head_norms else "self_attn.q_proj",
        hidden_multiple_of_heads=hidden_multiple_of_heads,
    )


FAMILIES: Mapping[str, Family] = {
    "llama": _like_llama("attention_bias", "attention_bias", "mlp_bias", hidden_multiple_of_heads=True),
    "mistral": _like_llama(),
    "qwen2": _like_llama(inputs_bias=True),
    "qwen3": _like_llama("attention_bias", "attention_bias", head_norms=True),
    "gpt_neox": Family(
        backbone="gpt_neox",
        outside={"gpt_neox.embed_in": _EMBEDDINGS, "gpt_neox.final_layer_norm": Module(("hidden",), bias=True)},
        # lm_head, and embed_out in older versions of transformers
        head=next(iter(GPTNeoXForCausalLM._tied_weights_keys)).removesuffix(".weight"),
        layer={
            "input_layernorm": Module(("hidden",), bias=True),
            "attention.query_key_value": Module(("query_key_value", "hidden"), "attention_bias"),
            "attention.dense": Module(_OUTPUT, "attention_bias"),
            "post_attention_layernorm": Module(("hidden",), bias=True),
            "mlp.dense_h_to_4h": Module(_UP, bias=True),
            "mlp.dense_4h_to_h": Module(_DOWN, bias=True),
        },
        final_norm="gpt_neox.final_layer_norm",
        attention_output="attention.dense",
        mlp_output="mlp.dense_4h_to_h",
        scores="attention.query_key_value",  # its query rows
        hidden_is_all_heads=True,
        partial_rotary=True,
    ),
}


def family_of(config: PreTrainedConfig) -> Family:
    """The family of a config, otherwise UserError with those that are there."""
    if config.model_type not in FAMILIES:
        hint = ""
        if config.model_type == "mixtral":
            hint = " A Mixtral becomes dense first: mixtral_to_dense (`dense` in a recipe)."
        raise UserError(
            f"model_type {config.model_type!r}: no student can be cut from this family, only from {', '.join(FAMILIES)}.{hint}"
        )
    return FAMILIES[config.model_type]
