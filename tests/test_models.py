"""Models: output heads, fingerprints, tokenizers, loading and restoring."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast, RobertaConfig, RobertaForCausalLM

from daekit.errors import UserError
from daekit.models.backbone import add_on_hidden, frozen_forward
from daekit.models.heads import head_logits, output_head
from daekit.models.identity import fingerprint
from daekit.models.loading import load_tokenizer_of
from daekit.models.start_checks import require_plain_head
from daekit.models.vocabulary import differences, require_same, vocabulary_size
from daekit.recipe.schema import ModelSpec
from daekit.teachers import ModelTeacher
from tests.helpers import tiny

V = len(tiny.WORDS)
IDS = torch.tensor([[5, 6, 7, 8, 9]])


# ---- output heads -----------------------------------------------------------------------------------------------------------

_SHAPE: dict[str, Any] = dict(
    vocab_size=48, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
    head_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.3,
)  # fmt: skip
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "mistral": {},
    "mixtral": dict(num_local_experts=4),
    "phi": {},  # a head with a bias
    "cohere": dict(logit_scale=0.25),
    "granite": dict(logits_scaling=4.0),
    "gemma2": dict(final_logit_softcapping=2.0),
    "falcon_h1": dict(
        lm_head_multiplier=0.3, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_chunk_size=4
    ),
}


@pytest.mark.parametrize("model_type", list(ARCHITECTURES))
def test_logits_are_those_of_the_model(model_type: str) -> None:
    """Bias, scale and soft cap as each architecture means them; only the columns of the tokenizer."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **(_SHAPE | ARCHITECTURES[model_type]))
    model = AutoModelForCausalLM.from_config(config).eval()
    bias = model.get_output_embeddings().bias
    if bias is not None:
        torch.nn.init.normal_(bias)
    assert (bias is not None) == (model_type == "phi")
    add_on_hidden(model)
    with torch.no_grad():
        expected = model(input_ids=IDS).logits[0, :, :V]
        hidden = model(input_ids=IDS, on_hidden=lambda out: out.last_hidden_state[0])
        head = output_head(model, V)
        torch.testing.assert_close(head_logits(hidden, head), expected, rtol=1e-5, atol=1e-5)
    plain = hidden @ head.weight[:V].T
    assert torch.allclose(plain, expected, atol=1e-3) == (model_type in ("mistral", "mixtral"))


def test_logits_follow_autocast_and_come_in_float32() -> None:
    model = tiny.model()
    hidden, head = torch.randn(3, 32), output_head(model, V)
    exact = head_logits(hidden, head)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = head_logits(hidden, head)
    assert exact.dtype == rounded.dtype == torch.float32
    assert torch.equal(rounded, (hidden.bfloat16() @ head.weight[:V].bfloat16().T).float())
    assert not torch.equal(rounded, exact)
    assert head_logits(hidden.double(), head).dtype == torch.float64


def test_a_head_narrower_than_the_tokenizer_is_an_error() -> None:
    with pytest.raises(UserError, match="48 columns but the tokenizer has 50 ids"):
        output_head(tiny.model(), 50)


def test_a_head_with_an_adapter_is_an_error_and_a_trained_head_is_the_active_one() -> None:
    def adapted(tied: bool = False, **lora: Any) -> Any:
        base = tiny.model(tie_word_embeddings=tied)
        return get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **({"target_modules": ["q_proj"]} | lora)))

    with pytest.raises(UserError, match="lm_head"):
        output_head(adapted(target_modules=["q_proj", "lm_head"]), V)
    with pytest.raises(UserError, match="trainable_token_indices"):
        output_head(adapted(tied=True, trainable_token_indices=[3]), V)
    model = adapted(modules_to_save=["lm_head"])
    with torch.no_grad():
        model.get_output_embeddings().modules_to_save["default"].weight.add_(1.0)
    trained = output_head(model, V).weight
    assert trained.requires_grad
    with model.disable_adapter():
        torch.testing.assert_close(output_head(model, V).weight + 1.0, trained)


def test_frozen_forward_restores_every_mode_after_an_error() -> None:
    model = tiny.model().train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    with pytest.raises(KeyError), frozen_forward(model):
        assert not model.training and not torch.is_grad_enabled()
        raise KeyError
    assert [module.training for module in model.modules()] == before
    assert torch.is_grad_enabled()


def test_a_deep_copy_runs_its_own_weights() -> None:
    model = tiny.model()
    add_on_hidden(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.get_output_embeddings().weight.mul_(2)
        assert torch.equal(twin(input_ids=IDS).logits, 2 * model(input_ids=IDS).logits)


# ---- fingerprints ----------------------------------------------------------------------------------------------------------


def test_fingerprints() -> None:
    model = tiny.model(seed=1)
    same, other = tiny.model(seed=1), tiny.model(seed=2)
    assert fingerprint(model) == fingerprint(same) != fingerprint(other)
    assert fingerprint(copy.deepcopy(model).to(torch.bfloat16)) != fingerprint(model)
    for name, parameter in same.named_parameters():
        before = fingerprint(same)
        with torch.no_grad():
            parameter.mul_(1.001)  # any one parameter that has been trained
        assert fingerprint(same) != before, name


# ---- tokenizers --------------------------------------------------------------------------------------------------------------


def words(vocabulary: list[str], splitter: Any = None, **special: str) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    core.pre_tokenizer = splitter or pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, **({"eos_token": "</s>", "unk_token": "<unk>"} | special))


def test_equal_tokenizers_have_no_differences() -> None:
    assert differences(tiny.tokenizer(), tiny.tokenizer()) == []
    assert differences(tiny.tokenizer(), words(tiny.WORDS, pad_token="w0")) == []  # padding takes no part
    require_same(tiny.tokenizer(), words(tiny.WORDS), "teacher")


def added() -> PreTrainedTokenizerFast:
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["new"])
    return tokenizer


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: words([*tiny.WORDS[:3], *tiny.WORDS[:2:-1]]), "under another id are 40 tokens"),
        (lambda: words(tiny.WORDS, eos_token="w1"), "eos_token_id is 1 for the student and 4 for the teacher"),
        (lambda: words(tiny.WORDS, bos_token="w1"), "bos_token_id is None for the student and 4"),
        (lambda: words(tiny.WORDS, pre_tokenizers.Whitespace()), "the same text is cut differently"),
        (lambda: words([*tiny.WORDS[:-1], "new"]), "only the teacher's tokenizer has 1 tokens .such as 'new'"),
        (added, "only the teacher's tokenizer has 1 tokens .such as 'new'"),
    ],
    ids=["permuted", "eos", "bos", "pre-tokenizer", "replaced", "added"],
)
def test_tokenizers_are_compared_by_content(other: Callable[[], PreTrainedTokenizerFast], message: str) -> None:
    with pytest.raises(UserError, match=f"teacher expert: .*{message}"):
        require_same(tiny.tokenizer(), other(), "expert")


def test_vocabulary_size_counts_added_tokens_and_gaps() -> None:
    assert vocabulary_size(tiny.tokenizer()) == V
    assert vocabulary_size(added()) == V + 1


def test_a_teacher_of_another_tokenizer_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    words(tiny.WORDS, eos_token="w1").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="eos_token_id"):
        ModelTeacher.from_pretrained(str(tmp_path), tiny.tokenizer(), V)


@pytest.mark.parametrize("path", ["", "nobody/no-such-model"])
def test_no_tokenizer_is_an_error(path: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tokenizer could be loaded"):
        load_tokenizer_of(ModelSpec(path=path or str(tmp_path)))


def test_a_model_that_transforms_its_hidden_states_is_refused() -> None:
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=48, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, is_decoder=True
    )
    model = RobertaForCausalLM(config)
    torch.nn.init.normal_(model.lm_head.dense.weight)  # the transform that stands between backbone and head
    add_on_hidden(model)
    with pytest.raises(UserError, match="not supported"):
        require_plain_head(model, 43)


@pytest.mark.parametrize("kind", ["mistral", "mixtral"])
def test_a_plain_head_is_taken(kind: str) -> None:
    model = tiny.model(kind)
    add_on_hidden(model)
    require_plain_head(model, 43)
