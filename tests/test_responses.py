"""Which tokens of ``messages`` rows carry loss: the response, told by markers or as the last assistant turn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from trl import chat_template_utils

from daekit.data.responses import ResponseLabels
from daekit.errors import UserError
from tests.helpers import tiny
from tests.helpers.shared_data import MODELS
from tests.helpers.trainer_world import dae, kd, logged, sft

# as of many real models: no generation markers
UNMARKED = (
    "{% for message in messages %}{{ 'w9 ' if message['role'] == 'system' else 'w1 ' if message['role'] == 'assistant' else "
    "'w0 ' }}{{ message['content'] }} </s> {% endfor %}{% if add_generation_prompt %}w1 {% endif %}"
)
SYSTEM, ASKED, AGAIN = ({"role": role, "content": text} for role, text in (("system", "w5"), ("user", "w6 w7"), ("user", "w8")))
FIRST, LAST = ({"role": "assistant", "content": text} for text in ("w20 w21", "w30 w31 w32"))
CONVERSATION = [SYSTEM, ASKED, FIRST, AGAIN, LAST]


def tokenizer(template: str | None = UNMARKED) -> PreTrainedTokenizerFast:
    made = tiny.tokenizer()
    made.chat_template = template
    return made


def loss_words(row: dict[str, Any], using: PreTrainedTokenizerFast) -> str:
    (tokenised,) = ResponseLabels.of(using).label([row], using, ["row 0"])
    labelled = [token for token, label in zip(tokenised["input_ids"], tokenised["labels"], strict=True) if label != -100]
    assert [label for label in tokenised["labels"] if label != -100] == labelled
    return " ".join(using.convert_ids_to_tokens(labelled))


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([ASKED, FIRST], "w20 w21 </s>"),
        (CONVERSATION, "w30 w31 w32 </s>"),
        ([*CONVERSATION, AGAIN], "w30 w31 w32 </s>"),  # what follows the last answer is no answer
    ],
)
def test_the_last_assistant_turn_where_the_template_has_no_markers(messages: list[Any], expected: str) -> None:
    assert loss_words({"messages": messages}, tokenizer()) == expected
    assert not ResponseLabels.of(tokenizer()).markers


def test_all_assistant_turns_where_it_has_markers() -> None:
    assert loss_words({"messages": CONVERSATION}, tokenizer(tiny.CHAT_TEMPLATE)) == "w20 w21 </s> w30 w31 w32 </s>"


def test_a_marked_turn_whose_last_character_has_no_token_is_refused() -> None:
    dropped = tiny.CHAT_TEMPLATE.replace("{% endgeneration %}", "{{ '\\n' }}{% endgeneration %}")
    with pytest.raises(UserError, match="2 assistant turns are 1 marked pieces"):
        loss_words({"messages": CONVERSATION}, tokenizer(dropped))


def test_a_prompt_beside_messages_does_not_change_what_carries_loss(tmp_path: Path) -> None:
    rows = [{"messages": CONVERSATION, "prompt": "w6 w7"}] * 4
    trainer = sft(tmp_path, Dataset.from_list(rows))
    assert trainer.data_counts["train"]["general"].loss_tokens == 4 * 7


@pytest.mark.parametrize("family", ["qwen3", "llama3", "gemma", "phi3"])
def test_common_families_have_templates_with_markers(family: str) -> None:
    found = ResponseLabels.of(tokenizer(getattr(chat_template_utils, f"{family}_chat_template")))
    assert found == ResponseLabels(True, getattr(chat_template_utils, f"{family}_training_chat_template"))


def test_a_prompt_whose_tokens_change_with_the_answer_is_refused() -> None:
    counting = "w{{ messages | length }} " + UNMARKED
    with pytest.raises(UserError, match=r"row 3: .*Set tokenizer\.chat_template"):
        ResponseLabels.of(tokenizer(counting)).label([{"messages": [ASKED, FIRST]}], tokenizer(counting), ["row 3"])


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (UNMARKED, [SYSTEM, ASKED], "row 3: has no assistant tokens"),
        (tiny.CHAT_TEMPLATE, [ASKED], "row 3: has no assistant tokens"),
        (UNMARKED, [FIRST, ASKED], "row 3: begins with its only assistant turn"),
        ("{{ raise_exception('roles must alternate') }}", [ASKED, FIRST], "row 3: .*refuses .*roles must alternate"),
        (None, [ASKED, FIRST], r"tokenizer\.chat_template is missing"),
    ],
)
def test_rows_without_a_response_are_named(template: str | None, messages: list[Any], message: str) -> None:
    using = tokenizer(template)
    with pytest.raises(UserError, match=message):
        ResponseLabels.of(using).label([{"messages": messages}], using, ["row 3"])


def rows(column: str = "messages") -> Dataset:
    made: list[Any] = [CONVERSATION, [ASKED, FIRST]]
    if column == "conversations":
        made = [[{"from": turn["role"], "value": turn["content"]} for turn in turns] for turns in made]
    return Dataset.from_list(
        [{column: turns, "domain": domain} for turns, domain in zip(made, ("shop", "general"), strict=True)]
    )


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("column", ["messages", "conversations"])
@pytest.mark.parametrize("method", [sft, kd, dae])
def test_trainers_take_the_response_unless_told_otherwise(method: Any, column: str, streaming: bool, tmp_path: Path) -> None:
    data = rows(column).to_iterable_dataset() if streaming else rows(column)
    trainer = method(tmp_path, data, max_steps=1)  # with the tiny tokenizer's markers: all assistant turns
    trainer.train()
    assert (logged(trainer, "tokens/shop"), logged(trainer, "tokens/general")) == ([7], [3])


def test_false_is_all_tokens_and_true_needs_markers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    everything = sft(tmp_path, rows(), assistant_only_loss=False, max_steps=1)
    everything.train()
    whole = sum(len(row["input_ids"]) - 1 for row in everything.train_dataset)
    assert logged(everything, "tokens/shop")[0] + logged(everything, "tokens/general")[0] == whole
    unmarked = tokenizer()
    monkeypatch.setattr(tiny, "tokenizer", lambda: unmarked)
    with pytest.raises(UserError, match=r"assistant_only_loss=True: tokenizer\.chat_template has no"):
        sft(tmp_path, rows(), assistant_only_loss=True)
    last = sft(tmp_path, rows(), max_steps=1).train_dataset
    kept = {row["domain"]: sum(label != -100 for label in row["labels"]) for row in last}
    assert kept == {"shop": 4, "general": 3}


@pytest.mark.skipif(not (MODELS / "smollm2").is_dir(), reason="the real chat model is not here")
def test_the_template_of_a_real_model() -> None:
    """SmolLM2: ChatML with a system prompt of its own, which TRL does not know; the answer, its end of turn, nothing else."""
    real = AutoTokenizer.from_pretrained(MODELS / "smollm2")
    turns = [
        {"role": "user", "content": "Where is my parcel?"},
        {"role": "assistant", "content": "It left our warehouse on Monday."},
        {"role": "user", "content": "And when will it be here?"},
        {"role": "assistant", "content": "On Thursday, before noon."},
    ]
    found = ResponseLabels.of(real)
    assert not found.markers
    (tokenised,) = found.label([{"messages": turns}], real, ["row 0"])
    labelled = [label for label in tokenised["labels"] if label != -100]
    assert real.decode(labelled) == "On Thursday, before noon.<|im_end|>\n"
    assert tokenised["input_ids"] == real.apply_chat_template(turns, return_dict=True)["input_ids"]
