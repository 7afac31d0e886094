"""What the trainers refuse, each with one sentence that names the option, before any work is done."""

from __future__ import annotations

from typing import Any
from unittest.mock import MagicMock

import pytest
from accelerate import Accelerator
from datasets import Dataset, IterableDataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM
from trl import SFTConfig

from daekit.errors import UserError
from daekit.losses import Objective
from daekit.teachers import ModelTeacher
from daekit.trainers import DAEConfig, DAETrainer, DomainSFTConfig, DomainSFTTrainer, KDConfig, KDTrainer
from daekit.trainers.token_metrics import counted_rows
from tests.helpers import tiny
from tests.helpers.trainer_world import dae, kd, options, sft

MESSAGE = {"role": "assistant", "content": "w1"}


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("label_smoothing_factor", 0.1),
        ("loss_type", "dft"),
        ("neftune_noise_alpha", 5.0),
        ("fp16", True),
        ("average_tokens_across_devices", False),
        ("truncation_mode", "keep_end"),
        ("attention_weight", -0.5),
        ("hidden_weight", -1.0),
        ("hidden_loss", "l2"),
        ("attention_relation_heads", 0),
        ("temperature", 0.0),
        ("ce_weight", -0.1),
        ("overlong", "cut"),
        ("divergence", "kl"),
    ],
)
def test_options_that_change_the_objective(option: str, value: Any) -> None:
    with pytest.raises(UserError, match=option) as caught:
        KDConfig("unused", use_cpu=True, **{option: value})
    assert str(value) in str(caught.value)


def test_all_weights_zero() -> None:
    with pytest.raises(UserError, match="nothing to learn"):
        KDConfig("unused", use_cpu=True, prediction_weight=0.0)


def test_beta_must_be_inside_its_interval() -> None:
    with pytest.raises(UserError, match="beta"):
        KDConfig("unused", use_cpu=True, divergence="jsd", beta=1.0)


@pytest.mark.parametrize(("divergence", "alpha"), [("skew_kl", 1.0), ("skew_reverse_kl", -0.1)])
def test_skew_alpha_must_be_inside_its_interval(divergence: str, alpha: float) -> None:
    with pytest.raises(UserError, match="skew_alpha"):
        KDConfig("unused", use_cpu=True, divergence=divergence, skew_alpha=alpha)


def test_a_config_has_the_settings_and_defaults_of_the_objective() -> None:
    config, objective = KDConfig("unused", use_cpu=True), Objective()
    assert config.objective() == objective
    settings = KDConfig.settings(objective)
    assert len(settings) == len(Objective.model_fields) and {name: getattr(config, name) for name in settings} == settings
    changed = KDConfig("unused", use_cpu=True, attention_layers=[[0, 1]], hidden_loss="mse", temperature=2.0).objective()
    assert (changed.attention_layers, changed.hidden_loss, changed.temperature) == (((0, 1),), "mse", 2.0)


def test_configs_choose_float32_on_a_cpu_and_only_there() -> None:
    assert not KDConfig("unused", use_cpu=True).bf16
    assert KDConfig("unused", use_cpu=True, bf16=True).bf16


def test_compute_loss_func(tmp_path: Any) -> None:
    with pytest.raises(UserError, match="compute_loss_func"):
        KDTrainer(
            tiny.model(),
            tiny.model(seed=2),
            KDConfig(**options(tmp_path)),
            tiny.rows(2),
            tiny.tokenizer(),
            compute_loss_func=lambda *_: 0,
        )


def test_another_config_class(tmp_path: Any) -> None:
    with pytest.raises(UserError, match="DAEConfig"):
        config: Any = KDConfig(**options(tmp_path))
        config.reference_domains = ["general"]
        DAETrainer(tiny.model(), {"shop": tiny.model(seed=2)}, None, config, tiny.rows(4), tiny.tokenizer())


def test_arguments_of_trl_and_what_is_no_mapping(tmp_path: Any) -> None:
    """Slips of somebody who comes from SFTTrainer."""
    arguments: Any = SFTConfig(str(tmp_path), use_cpu=True)
    given: Any = {"teachers": tiny.model(seed=2)}
    with pytest.raises(UserError, match="DAETrainer needs a DAEConfig, not a SFTConfig"):
        DAETrainer(tiny.model(), {"shop": tiny.model(seed=2)}, None, arguments, tiny.rows(4), tiny.tokenizer())
    with pytest.raises(UserError, match=r"teachers: is a MistralForCausalLM; name the domain of each"):
        dae(tmp_path, tiny.rows(4), **given)
    with pytest.raises(UserError, match="reference_domains: is the text 'general'; write a list"):
        dae(tmp_path, tiny.rows(4), reference_domains="general")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"instruction": "w1", "output": "w2"}, "columns 'instruction', 'output' and 'domain': none to train on. Name them"),
        ({"prompt": "w1", "response": "w2"}, "none to train on"),
        ({"text": 3}, r"row 0: text is '3' \(int\); it must be a text"),
        ({"messages": "w1"}, r"row 0: messages is 'w1' \(str\); it must be a list of messages"),
        ({"prompt": "w1", "completion": [MESSAGE]}, "one of prompt and completion is a text, the other a list of messages"),
        ({"input_ids": [1, 2, 3], "labels": [1, 2]}, "row 0: has 3 input_ids, but 2 labels; give as many"),
        ({"input_ids": [1, 9999]}, r"row 0: input_ids holds 9999, and the tokenizer's ids end at \d+"),
    ],
)
def test_columns_that_hold_nothing_to_train_on(row: dict[str, Any], reason: str, streaming: bool, tmp_path: Any) -> None:
    data = Dataset.from_list([row | {"domain": "general"}] * 4)
    with pytest.raises(UserError, match=reason):
        kd(tmp_path, data.to_iterable_dataset() if streaming else data, max_steps=1).train()


def test_a_column_of_labels_that_is_no_list_is_not_of_its_tokens(tmp_path: Any) -> None:
    rows = [{"input_ids": [1, 2, 3], "attention_mask": None, "labels": [1, 2, 3], "assistant_masks": 7}] * 4
    assert len(kd(tmp_path, Dataset.from_list(rows)).train_dataset) == 4


def test_a_later_row_whose_labels_are_not_as_many_as_its_tokens(tmp_path: Any) -> None:
    rows = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 1500 + [{"input_ids": [1, 2, 3], "labels": [1]}]
    with pytest.raises(UserError, match="row 1500: has 3 input_ids, but 1 labels"):
        kd(tmp_path, Dataset.from_list(rows))


@pytest.mark.parametrize("wrapped", [False, True])
def test_prompt_learning(wrapped: bool, tmp_path: Any) -> None:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(UserError, match="prompt-learning"):
        if wrapped:
            kd(tmp_path, tiny.rows(4), get_peft_model(tiny.model(), config))
        else:
            kd(tmp_path, tiny.rows(4), peft_config=config)


def test_a_student_of_which_nothing_is_trained(tmp_path: Any) -> None:
    with pytest.raises(UserError, match="has no trained parameter"):
        kd(tmp_path, tiny.rows(4), tiny.model().requires_grad_(False)).train()


def test_vision_columns(tmp_path: Any) -> None:
    with pytest.raises(UserError, match="images"):
        kd(tmp_path, tiny.rows(4).add_column("image", ["x"] * 4))


def test_skipped_preparation(tmp_path: Any) -> None:
    with pytest.raises(UserError, match="skip_prepare_dataset"):
        kd(tmp_path, tiny.rows(4), dataset_kwargs={"skip_prepare_dataset": True})


def test_lora_on_the_output_head(tmp_path: Any) -> None:
    with pytest.raises(ValueError, match="lm_head"):
        kd(tmp_path, tiny.rows(4), peft_config=LoraConfig(target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM"))


def test_dae_needs_the_domain_column(tmp_path: Any) -> None:
    with pytest.raises(UserError, match="no column 'domain'"):
        dae(tmp_path, tiny.rows(4).remove_columns("domain"))


def test_a_row_whose_domain_is_no_name(tmp_path: Any) -> None:
    data = Dataset.from_list([{"text": "w1 w2", "domain": "shop"}, {"text": "w1 w2", "domain": None}])
    with pytest.raises(UserError, match="row 1: domain is None"):
        dae(tmp_path, data)
    with pytest.raises(UserError, match="row 0: domain is 1, not a name"):
        dae(tmp_path, Dataset.from_list([{"text": "w1 w2", "domain": 1}]))


@pytest.mark.parametrize("domain", [None, 1, ""])
def test_a_row_of_a_stream_whose_domain_is_no_name(domain: Any, tmp_path: Any) -> None:
    data = Dataset.from_list([{"text": "w1 w2", "domain": domain}] * 4).to_iterable_dataset()
    with pytest.raises(UserError, match="row 0: domain is"):
        kd(tmp_path, data, max_steps=1).train()


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("row", [{"text": "w1"}, {"prompt": "w1 ", "completion": "w2"}, {"messages": [MESSAGE]}])
def test_a_row_without_a_value(row: dict[str, Any], streaming: bool, tmp_path: Any) -> None:
    column = list(row)[-1]
    data = Dataset.from_list([{**row, column: None}, row, row, {**row, column: None}]).select([1, 2, 3])
    with pytest.raises(UserError, match=rf"row 2: {column} is None"):
        sft(tmp_path, data.to_iterable_dataset() if streaming else data, max_steps=3).train()


@pytest.mark.parametrize("where", ["train", "stream", "eval"])
def test_a_data_set_without_rows(where: str, tmp_path: Any) -> None:
    none = tiny.rows(4).select([])
    with pytest.raises(UserError, match="data set is empty"):
        if where == "eval":
            kd(tmp_path, tiny.rows(4), eval_dataset=none)
        else:
            kd(tmp_path, none if where == "train" else IterableDataset.from_generator(none.__iter__), max_steps=1)


def test_rows_that_are_no_data_set(tmp_path: Any) -> None:
    with pytest.raises(TypeError, match="train_dataset"):
        kd(tmp_path, [{"text": "w1 w2"}])


@pytest.mark.parametrize("where", ["train", "eval", "eval dict"])
def test_a_misspelt_domain_names_the_nearest(where: str, tmp_path: Any) -> None:
    good, bad = tiny.rows(8), tiny.rows(8, domains=("general", "shopp", "shop"))
    with pytest.raises(UserError, match=r"'shopp'.*did you mean 'shop'"):
        if where == "train":
            dae(tmp_path, bad)
        else:
            dae(tmp_path, good, eval_dataset=bad if where == "eval" else {"a": good, "b": bad})


def test_a_misspelt_domain_is_named_before_its_idle_teacher(tmp_path: Any) -> None:
    with pytest.raises(UserError, match="did you mean 'shop'"):
        dae(tmp_path, tiny.rows(8, domains=("general", "shopp")))


def test_a_teacher_without_rows(tmp_path: Any) -> None:
    with pytest.raises(UserError, match="'shop' has no rows"):
        dae(tmp_path, tiny.rows(8, domains=("general",)))


def test_a_domain_with_two_teachers(tmp_path: Any) -> None:
    with pytest.raises(UserError, match="can follow only one of them"):
        dae(tmp_path, tiny.rows(8), reference_domains=["shop", "general"])


def test_a_teacher_that_is_the_student(tmp_path: Any) -> None:
    student = tiny.model()
    for given in (student, get_peft_model(student, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))):
        with pytest.raises(UserError, match="the student itself"):
            kd(tmp_path, tiny.rows(4), given, student)


def test_something_that_is_no_teacher(tmp_path: Any) -> None:
    with pytest.raises(UserError, match="int is no teacher"):
        kd(tmp_path, tiny.rows(4), teacher=3)


def test_another_tokenizer_is_found_before_the_teachers_weights_are_loaded(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.model(seed=2).save_pretrained(tmp_path / "teacher")
    other = tiny.tokenizer()
    other.backend_tokenizer.post_processor = TemplateProcessing("</s> $A", special_tokens=[("</s>", 1)])
    other.save_pretrained(tmp_path / "teacher")

    def loaded(*_: Any, **__: Any) -> None:
        raise AssertionError("the teacher's weights were loaded")

    monkeypatch.setattr("daekit.teachers.model.load_model", loaded)
    for method, teacher in (
        (kd, {"teacher": str(tmp_path / "teacher")}),
        (dae, {"teachers": {"shop": str(tmp_path / "teacher")}}),
    ):
        with pytest.raises(UserError, match="cut differently"):
            method(tmp_path, tiny.rows(4), **teacher)
    # the same tokenizer gets as far as the loader
    tiny.tokenizer().save_pretrained(tmp_path / "teacher")
    with pytest.raises(AssertionError, match="weights were loaded"):
        kd(tmp_path, tiny.rows(4), teacher=str(tmp_path / "teacher"))


def test_another_tokenizer_beside_a_teacher_that_is_loaded_already(tmp_path: Any) -> None:
    tiny.model(seed=2).save_pretrained(tmp_path / "teacher")
    teacher = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher")
    kd(tmp_path, tiny.rows(4), teacher=teacher)  # no tokenizer there to compare with
    other = tiny.tokenizer()
    other.backend_tokenizer.post_processor = TemplateProcessing("</s> $A", special_tokens=[("</s>", 1)])
    other.save_pretrained(tmp_path / "teacher")
    with pytest.raises(UserError, match="cut differently"):
        kd(tmp_path, tiny.rows(4), teacher=teacher)
    with pytest.raises(UserError, match="cut differently"):
        dae(tmp_path, tiny.rows(4), teachers={"shop": teacher})


def test_a_teacher_without_outputs(tmp_path: Any) -> None:
    class Silent(ModelTeacher):
        def outputs(self, batch: Any, capture: Any = None) -> list[Any]:
            return []

    trainer = kd(tmp_path, tiny.rows(4), teacher=Silent(tiny.model(seed=2), len(tiny.WORDS)))
    with pytest.raises(UserError, match="has no output"):
        trainer.train()


def test_a_teacher_with_a_head_that_is_too_narrow(tmp_path: Any) -> None:
    narrow = tiny.model(seed=2)
    narrow.resize_token_embeddings(40)
    with pytest.raises(UserError, match="40 columns"):
        kd(tmp_path, tiny.rows(4), teacher=narrow)


def test_a_chat_template_that_brings_tokens_the_teacher_lacks(tmp_path: Any) -> None:
    source = tiny.tokenizer()
    source.add_tokens([f"<new{index}>" for index in range(3)])
    source.save_pretrained(tmp_path / "source")
    tiny.model().save_pretrained(tmp_path / "source")
    with pytest.raises(UserError, match=r"chat_template_path.*added \d+ tokens"):
        kd(tmp_path, tiny.rows(4), chat_template_path=str(tmp_path / "source"))


def test_parallelism_over_the_sequence(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    parallel = MagicMock(cp_enabled=True, sp_enabled=False, tp_size=1, sp_backend="none")
    monkeypatch.setattr(Accelerator, "parallelism_config", property(lambda _: parallel))
    with pytest.raises(UserError, match="context and sequence parallelism"):
        kd(tmp_path, tiny.rows(4))


def test_a_stream_that_several_processes_would_evaluate(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that fill the last batch would count twice: refused when it is given, and at the latest at the last batch."""
    stream = tiny.rows(4).to_iterable_dataset()
    trainer = sft(tmp_path, tiny.rows(4), eval_dataset=stream)
    monkeypatch.setattr(DomainSFTConfig, "world_size", 2)
    with pytest.raises(UserError, match=r"eval data set is a stream, evaluated by 2 processes"):
        trainer.evaluate(stream)
    trainer.accelerator = MagicMock(num_processes=2, process_index=1)
    trainer.accelerator.gradient_state = MagicMock(end_of_dataloader=True, remainder=-1)
    with pytest.raises(UserError, match=r"evaluated by 2 processes"):
        counted_rows(trainer, (0, 1), "eval")
    trainer.args.dataloader_drop_last = True  # nothing is repeated then
    assert counted_rows(trainer, (0, 1), "eval") == [True, True]
    trainer.accelerator.gradient_state = MagicMock(end_of_dataloader=True, remainder=5)
    assert counted_rows(trainer, (0, 1), "eval") == [True, False]


def test_dae_config_is_a_kd_config_with_reference_domains() -> None:
    assert DAEConfig("unused", use_cpu=True).reference_domains == ["general"]


@pytest.mark.parametrize("name", ["prediction_weight", "attention_weight", "hidden_weight"])
def test_a_weight_that_needs_a_teacher_is_refused_without_one(name: str, tmp_path: Any) -> None:
    """The loss would be 0, or lack a part, without a word."""
    weights = {"ce_weight": 1.0, "prediction_weight": 0.0}
    with pytest.raises(UserError, match=rf"{name}=0.5: compares the student with a teacher, but there is none"):
        DomainSFTTrainer(tiny.model(), KDConfig(**options(tmp_path, **(weights | {name: 0.5}))), tiny.rows(4))
    alone = KDTrainer(tiny.model(), None, KDConfig(**options(tmp_path, **weights)), tiny.rows(4), tiny.tokenizer())
    assert alone.weights() == {"ce": 1.0, "kl": 0.0}
