"""The families that a student can be cut from, and for each: which dimension of which weight is cut along which axis.

Everything in this room that touches a weight reads these tables: slicing, sorting, counting. An axis is one of

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


@dataclass(frozen=True)
class Weight:
    """The axes of a weight's dimensions, and the field of the config that says whether it is there (empty: always)."""

    axes: tuple[str, ...]
    when: str = ""

    def exists(self, config: PreTrainedConfig) -> bool:
        """Whether a model of ``config`` has it."""
        if self.when.startswith("not "):
            return not getattr(config, self.when.removeprefix("not "))
        return not self.when or bool(getattr(config, self.when))


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        backbone: name of the module that holds embeddings, layers and the final norm.
        outside: weights that are not in a layer.
        layer: weights of a layer, named from the layer on.
        norms: the norms over the hidden channels in a layer.
        final_norm: the norm after the last layer.
        attention_output: the module whose input are the heads' outputs.
        mlp_output: the module whose input are the neurons.
        score_weights: weights that multiply the attention scores once: scaled when head_dim changes, because the model divides
            the scores by its square root.
        hidden_multiple_of_heads: the config refuses a hidden size that the heads do not divide.
        hidden_is_all_heads: hidden size = heads x head_dim, and no grouped queries.
        partial_rotary: only the first part of head_dim is rotated.
    """

    backbone: str
    outside: Mapping[str, Weight]
    layer: Mapping[str, Weight]
    final_norm: str
    attention_output: str
    mlp_output: str
    score_weights: tuple[str, ...]
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    hidden_multiple_of_heads: bool = False
    hidden_is_all_heads: bool = False
    partial_rotary: bool = False

    def in_layer(self, layer: int, name: str) -> str:
        """The full name of a module or weight of a layer."""
        return f"{self.backbone}.layers.{layer}.{name}"

    def weights(self, config: PreTrainedConfig) -> Iterator[tuple[str, int | None, str, Weight]]:
        """(full name, layer or None, name in the table, weight) of every weight of a model of ``config``."""
        for name, weight in self.outside.items():
            if weight.exists(config):
                yield name, None, name, weight
        for layer in range(config.num_hidden_layers):
            for name, weight in self.layer.items():
                if weight.exists(config):
                    yield self.in_layer(layer, name), layer, name, weight


_QUERY, _KV, _OUTPUT = ("query", "hidden"), ("kv", "hidden"), ("hidden", "query")
_UP, _DOWN = ("neuron", "hidden"), ("hidden", "neuron")

_OUTSIDE = {
    "model.embed_tokens.weight": Weight(("vocab", "hidden")),
    "model.norm.weight": Weight(("hidden",)),
    "lm_head.weight": Weight(("vocab", "hidden"), when="not tie_word_embeddings"),
}
_LAYER = {
    "input_layernorm.weight": Weight(("hidden",)),
    "self_attn.q_proj.weight": Weight(_QUERY),
    "self_attn.k_proj.weight": Weight(_KV),
    "self_attn.v_proj.weight": Weight(_KV),
    "self_attn.o_proj.weight": Weight(_OUTPUT),
    "post_attention_layernorm.weight": Weight(("hidden",)),
    "mlp.gate_proj.weight": Weight(_UP),
    "mlp.up_proj.weight": Weight(_UP),
    "mlp.down_proj.weight": Weight(_DOWN),
}
# lm_head.weight, and embed_out.weight in older versions of transformers
_NEOX_HEAD = next(iter(GPTNeoXForCausalLM._tied_weights_keys))
_Q_PROJ = ("self_attn.q_proj.weight", "self_attn.q_proj.bias")


def _attention_biases(*letters: str, when: str = "") -> dict[str, Weight]:
    axis = {"q": "query", "k": "kv", "v": "kv", "o": "hidden"}
    return {f"self_attn.{letter}_proj.bias": Weight((axis[letter],), when) for letter in letters}


def _like_llama(extra: Mapping[str, Weight], score_weights: tuple[str, ...] = _Q_PROJ, hidden_rule: bool = False) -> Family:
    return Family(
        backbone="model",
        outside=_OUTSIDE,
        layer=_LAYER | dict(extra),
        final_norm="model.norm",
        attention_output="self_attn.o_proj",
        mlp_output="mlp.down_proj",
        score_weights=score_weights,
        hidden_multiple_of_heads=hidden_rule,
    )


FAMILIES: Mapping[str, Family] = {
    "llama": _like_llama(
        {
            **_attention_biases("q", "k", "v", "o", when="attention_bias"),
            "mlp.gate_proj.bias": Weight(("neuron",), when="mlp_bias"),
            "mlp.up_proj.bias": Weight(("neuron",), when="mlp_bias"),
            "mlp.down_proj.bias": Weight(("hidden",), when="mlp_bias"),
        },
        hidden_rule=True,
    ),
    "mistral": _like_llama({}),
    "qwen2": _like_llama(_attention_biases("q", "k", "v")),
    "qwen3": _like_llama(
        {
            **_attention_biases("q", "k", "v", "o", when="attention_bias"),
            "self_attn.q_norm.weight": Weight(("dim",)),
            "self_attn.k_norm.weight": Weight(("dim",)),
        },
        score_weights=("self_attn.q_norm.weight",),  # whatever scales q_proj is divided out by the norm after it
    ),
    "gpt_neox": Family(
        backbone="gpt_neox",
        outside={
            "gpt_neox.embed_in.weight": Weight(("vocab", "hidden")),
            "gpt_neox.final_layer_norm.weight": Weight(("hidden",)),
            "gpt_neox.final_layer_norm.bias": Weight(("hidden",)),
            _NEOX_HEAD: Weight(("vocab", "hidden"), when="not tie_word_embeddings"),
        },
        layer={
            "input_layernorm.weight": Weight(("hidden",)),
            "input_layernorm.bias": Weight(("hidden",)),
            "attention.query_key_value.weight": Weight(("query_key_value", "hidden")),
            "attention.query_key_value.bias": Weight(("query_key_value",), when="attention_bias"),
            "attention.dense.weight": Weight(_OUTPUT),
            "attention.dense.bias": Weight(("hidden",), when="attention_bias"),
            "post_attention_layernorm.weight": Weight(("hidden",)),
            "post_attention_layernorm.bias": Weight(("hidden",)),
            "mlp.dense_h_to_4h.weight": Weight(_UP),
            "mlp.dense_h_to_4h.bias": Weight(("neuron",)),
            "mlp.dense_4h_to_h.weight": Weight(_DOWN),
            "mlp.dense_4h_to_h.bias": Weight(("hidden",)),
        },
        final_norm="gpt_neox.final_layer_norm",
        attention_output="attention.dense",
        mlp_output="mlp.dense_4h_to_h",
        score_weights=("attention.query_key_value.weight", "attention.query_key_value.bias"),  # their query rows
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
