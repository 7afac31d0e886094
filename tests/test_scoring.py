"""Scores of rows against a direct float64 computation, and greedy answers in batches against one by one."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerFast

from daekit.errors import UserError
from daekit.generation.local import generate, stop_token_ids
from daekit.models.heads import output_head
from daekit.models.scoring import score_rows
from daekit.protocol import Batch, FeatureSpec, Member, OutputHead, TeacherOutput
from tests.helpers.tiny import WORDS
from tests.helpers.tiny import model as tiny_model
from tests.helpers.tiny import tokenizer as tiny_tokenizer

V = len(WORDS)  # the models' vocabulary is padded to more
EOS = 1


def make_model(kind="mistral", seed=0):
    return tiny_model(kind, seed=seed).eval()


def make_rows(count=7, seed=0):
    """Rows of different lengths, with masked labels at the start, in the middle and (one row) nowhere."""
    random = np.random.default_rng(seed)
    rows = []
    for index in range(count):
        ids = random.integers(V, size=int(random.integers(3, 14))).tolist()
        masked = set(random.choice(len(ids) - 1, size=len(ids) // 3, replace=False).tolist()) if index else set()
        rows.append({"input_ids": ids, "labels": [-100 if at in masked else token for at, token in enumerate(ids)]})
    return rows


def naive(model, row, teacher=None):
    """(tokens, nll, correct, kl) of one row by itself: full logits, softmax over the first V columns in float64."""
    ids = torch.tensor([row["input_ids"]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, :, :V].double()
        log_t = None if teacher is None else teacher(input_ids=ids).logits[0, :, :V].double().log_softmax(-1)
    log_p = logits.log_softmax(-1)
    tokens = nll = correct = kl = 0
    for at, label in enumerate(row["labels"][1:]):
        if label == -100:
            continue
        tokens += 1
        nll -= log_p[at, label].item()
        correct += int(logits[at].argmax() == label)
        if log_t is not None:
            kl += (log_t[at].exp() * (log_t[at] - log_p[at])).sum().item()
    return tokens, nll, correct, kl


@pytest.mark.parametrize("kind", ["mistral", "mixtral"])
def test_scores_equal_the_full_softmax_in_float64(kind):
    model, teacher, rows = make_model(kind), make_model("mixtral", seed=1), make_rows()
    scores = score_rows(model, rows, vocab_size=V, batch_size=3, teacher=teacher, chunk_size=5)
    assert scores.tokens_R.sum() > 30 and len(set(scores.tokens_R.tolist())) > 2
    for index, row in enumerate(rows):
        tokens, nll, correct, kl = naive(model, row, teacher)
        assert scores.tokens_R[index] == tokens
        assert scores.correct_R[index] == correct
        assert scores.nll_R[index] == pytest.approx(nll, rel=1e-5)
        assert scores.kl_R[index] == pytest.approx(kl, rel=1e-5)


def test_neither_batch_nor_chunk_size_matters():
    model, rows = make_model().double(), make_rows(11)
    whole = score_rows(model, rows, vocab_size=V, batch_size=11, teacher=make_model(seed=1).double(), chunk_size=10_000)
    small = score_rows(model, rows, vocab_size=V, batch_size=1, teacher=make_model(seed=1).double(), chunk_size=1)
    np.testing.assert_allclose(small.nll_R, whole.nll_R, rtol=1e-12)
    np.testing.assert_allclose(small.kl_R, whole.kl_R, rtol=1e-10)
    np.testing.assert_array_equal(small.correct_R, whole.correct_R)


def test_padding_of_the_vocabulary_changes_nothing():
    model, rows = make_model(), make_rows()
    before = score_rows(model, rows, vocab_size=V, teacher=make_model(seed=1))
    teacher = make_model(seed=1)
    with torch.no_grad():
        model.lm_head.weight[V:] = 50.0
        teacher.lm_head.weight[V:] = -30.0
    after = score_rows(model, rows, vocab_size=V, teacher=teacher)
    np.testing.assert_array_equal(after.nll_R, before.nll_R)
    np.testing.assert_array_equal(after.kl_R, before.kl_R)
    np.testing.assert_array_equal(after.correct_R, before.correct_R)


def test_of_equal_logits_the_lowest_id_is_the_choice():
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    rows = [{"input_ids": [5, 0, 7, 0], "labels": [5, 0, 7, 0]}]
    scores = score_rows(model, rows, vocab_size=V)
    assert scores.correct_R.tolist() == [2]
    assert scores.nll_R[0] == pytest.approx(3 * np.log(V), rel=1e-6)


def test_kl_to_itself_is_zero():
    model = make_model("mixtral")
    assert score_rows(model, make_rows(), vocab_size=V, teacher=model).kl_R.tolist() == [0.0] * 7


def test_a_row_that_keeps_nothing_scores_nothing():
    rows = [{"input_ids": [1, 2, 3], "labels": [-100] * 3}, {"input_ids": [4], "labels": [4]}]
    scores = score_rows(make_model(), rows, vocab_size=V, teacher=make_model(seed=1))
    assert scores.tokens_R.tolist() == [0, 0]
    assert scores.nll_R.tolist() == scores.kl_R.tolist() == [0.0, 0.0]


class TwoMembers:
    """A teacher as ``daekit.protocol`` has it: two models on the even positions, in reverse order, and one on the others."""

    def __init__(self, first, second, average):
        self.first, self.second, self.average = first, second, average
        self.domains = set()

    def outputs(self, batch: Batch, capture: FeatureSpec | None = None) -> list[TeacherOutput]:
        self.domains.update(batch.domains)
        a, b = (
            batch.at_loss_positions(model.model(**batch.inputs).last_hidden_state).detach()
            for model in (self.first, self.second)
        )
        heads: list[OutputHead] = [output_head(model, V) for model in (self.first, self.second)]
        odd = torch.arange(1, len(a), 2)
        even = torch.arange(0, len(a), 2).flip(0)
        both = (Member(a[even], heads[0], 0.25), Member(b[even], heads[1], 0.75))
        return [TeacherOutput(odd, (Member(a[odd], heads[0]),)), TeacherOutput(even, both, self.average)]

    def identity(self):
        return {}

    def to(self, device):
        return self


@pytest.mark.parametrize("average", ["logits", "probabilities"])
def test_kl_to_a_teacher_of_several_members(average):
    model, first, second = make_model(seed=2), make_model(seed=3), make_model(seed=4)
    ids = make_rows(1)[0]["input_ids"]
    teacher = TwoMembers(first, second, average)
    scores = score_rows(model, [{"input_ids": ids, "labels": ids}], vocab_size=V, teacher=teacher, domain="shop", chunk_size=3)
    with torch.no_grad():
        logits = [m(input_ids=torch.tensor([ids])).logits[0, :-1, :V].double() for m in (model, first, second)]
    log_s, log_a = logits[0].log_softmax(-1), logits[1].log_softmax(-1)
    mean = 0.25 * logits[1] + 0.75 * logits[2]
    if average == "probabilities":
        mean = (0.25 * logits[1].softmax(-1) + 0.75 * logits[2].softmax(-1)).log()
    log_t = torch.where(torch.arange(len(ids) - 1)[:, None] % 2 == 0, mean.log_softmax(-1), log_a)
    expected = (log_t.exp() * (log_t - log_s)).sum().item()
    assert scores.kl_R[0] == pytest.approx(expected, rel=1e-5)
    assert teacher.domains == {"shop"}


def lora_model(seed=0):
    model = get_peft_model(make_model(seed=seed), LoraConfig(r=4, target_modules=["q_proj", "down_proj"], lora_dropout=0.5))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return model


def test_the_active_adapter_counts_and_dropout_does_not():
    model, rows = lora_model(), make_rows()
    model.train()
    scores = score_rows(model, rows, vocab_size=V, teacher=make_model())
    assert model.training and all(m.training for m in model.modules() if isinstance(m, nn.Dropout))
    with model.disable_adapter():
        off = score_rows(model, rows, vocab_size=V, teacher=make_model())
    assert off.kl_R.max() < 1e-6 < 0.1 < scores.kl_R.min()
    merged = model.merge_and_unload().eval()
    np.testing.assert_allclose(scores.nll_R, [naive(merged, row)[1] for row in rows], rtol=1e-4)


def test_the_mode_of_every_module_is_restored_and_nothing_needs_gradient():
    model, teacher = make_model(), make_model(seed=1).train()
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    score_rows(model, make_rows(), vocab_size=V, teacher=teacher)
    assert [module.training for module in model.modules()] == modes
    assert teacher.training and all(p.grad is None for p in model.parameters())


def test_a_teacher_in_training_mode_speaks_without_dropout_and_stays_in_it():
    model, teacher, rows = make_model(), lora_model(seed=1), make_rows()
    expected = score_rows(model, rows, vocab_size=V, teacher=teacher.eval()).kl_R
    found = score_rows(model, rows, vocab_size=V, teacher=teacher.train()).kl_R
    np.testing.assert_array_equal(found, expected)
    assert teacher.training


def test_prompt_learning_is_refused():
    model = get_peft_model(make_model(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(UserError, match="PREFIX_TUNING"):
        score_rows(model, make_rows(), vocab_size=V)


@pytest.fixture
def tokenizer():
    return tiny_tokenizer()


def make_prompts(count=9):
    random = np.random.default_rng(3)
    return [random.integers(3, V, size=int(random.integers(1, 12))).tolist() for _ in range(count)]


def greedy(model, prompt, steps, stop):
    """One by one, without cache or padding."""
    ids = list(prompt)
    for _ in range(steps):
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([ids])).logits[0, -1, :V].argmax())
        if token in stop:
            break
        ids.append(token)
    return ids[len(prompt) :]


@pytest.mark.parametrize("kind", ["mistral", "mixtral"])
def test_batched_answers_are_those_of_one_by_one(kind, tokenizer):
    model, prompts = make_model(kind, seed=5), make_prompts()
    with torch.no_grad():
        model.lm_head.weight[EOS] *= 2  # so that some answers end early
    answers = generate(model.train(), tokenizer, prompts, max_new_tokens=12, batch_size=4)
    assert model.training
    expected = [greedy(model.eval(), prompt, 12, {EOS}) for prompt in prompts]
    assert answers == expected
    assert len({len(answer) for answer in answers}) > 1, "no answer ended at EOS: the test would not see a wrong stop"


def test_generation_config_of_the_model_takes_no_part_but_its_stop_tokens(tokenizer, caplog, recwarn):
    model, prompts = make_model(seed=5), make_prompts()
    plain = generate(model, tokenizer, prompts, max_new_tokens=12)
    own = GenerationConfig(do_sample=True, temperature=5.0, repetition_penalty=3.0, max_length=4, num_beams=3, min_new_tokens=9)
    model.generation_config = own
    assert generate(model, tokenizer, prompts, max_new_tokens=12) == plain
    assert model.generation_config is own
    assert not [warning for warning in recwarn if "generat" in str(warning.message).lower()]
    assert not caplog.records
    tokenizer.add_special_tokens({"additional_special_tokens": ["w7"]})
    own.eos_token_id = [tokenizer.convert_tokens_to_ids(word) for word in ("w7", "w9")]  # w9 is an ordinary word
    assert stop_token_ids(model, tokenizer) == [EOS, own.eos_token_id[0]]


def test_padding_ids_are_never_generated(tokenizer):
    model, prompts = make_model(seed=5), make_prompts()
    with torch.no_grad():
        model.lm_head.weight[V:] = model.lm_head.weight[4:9] * 3
    answers = generate(model, tokenizer, prompts, max_new_tokens=12)
    assert answers == [greedy(model, prompt, 12, {EOS}) for prompt in prompts]


def test_adapter_generates_as_the_merged_model(tokenizer):
    model, prompts = lora_model(seed=5), make_prompts()
    answers = generate(model, tokenizer, prompts, max_new_tokens=8, batch_size=4)
    with model.disable_adapter():
        assert generate(model, tokenizer, prompts, max_new_tokens=8) != answers
    assert answers == generate(model.merge_and_unload(), tokenizer, prompts, max_new_tokens=8)


def test_nothing_to_start_from_or_to_stop_at_is_refused(tokenizer):
    with pytest.raises(UserError, match="prompt 1 has no tokens"):
        generate(make_model(), tokenizer, [[5], []], max_new_tokens=2)
    without_eos = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, unk_token="<unk>")
    with pytest.raises(UserError, match="no eos_token"):
        generate(make_model(), without_eos, [[5]], max_new_tokens=2)
