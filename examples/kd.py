r"""Knowledge distillation in a plain TRL script: KDTrainer and KDConfig in place of SFTTrainer and SFTConfig, and a teacher.

    python examples/kd.py                      # small random models and embedded rows: offline, seconds on a CPU
    accelerate launch examples/kd.py --student mistralai/Mistral-7B-v0.1 --teacher mistralai/Mixtral-8x7B-Instruct-v0.1 \
        --data rows.jsonl --lora --per_device_train_batch_size 2 --learning_rate 2e-5 --max_steps 2000

``rows.jsonl`` holds any of TRL's forms: ``messages``, ``prompt`` and ``completion``, or ``text``.
"""

from __future__ import annotations

import argparse

from datasets import load_dataset
from peft import LoraConfig
from tiny_world import random_model, rows, tokenizer_for

from daekit import KDConfig, KDTrainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", help="hub id or directory; without it small random models are used")
    parser.add_argument("--teacher", help="hub id or directory, with the student's tokenizer")
    parser.add_argument("--data", help="JSONL file of training rows")
    parser.add_argument("--lora", action="store_true", help="train a LoRA adapter")
    parser.add_argument("--output_dir", default="runs/example-kd")
    parser.add_argument("--max_steps", type=int, default=20)
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    parser.add_argument("--per_device_train_batch_size", type=int, default=16)
    options = parser.parse_args()

    if options.student:
        student, teacher, tokenizer = options.student, options.teacher, None
        data = load_dataset("json", data_files=options.data, split="train").train_test_split(test_size=0.1, seed=0)
    else:
        data = rows("skills").train_test_split(test_size=0.1, seed=0)
        tokenizer = tokenizer_for(data["train"])
        student, teacher = random_model("mistral", tokenizer), random_model("mixtral", tokenizer, hidden_size=96)

    trainer = KDTrainer(  # in place of SFTTrainer
        model=student,
        teacher=teacher,  # new
        args=KDConfig(  # in place of SFTConfig
            output_dir=options.output_dir,
            max_steps=options.max_steps,
            learning_rate=options.learning_rate,
            per_device_train_batch_size=options.per_device_train_batch_size,
            attention_weight=1.0,  # new: the student also learns where its teacher looks
            logging_steps=5,
            report_to="none",
        ),
        train_dataset=data["train"],
        eval_dataset=data["test"],
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM") if options.lora else None,
    )
    before = trainer.evaluate()["eval_kl"]
    trainer.train()
    print(f"KL to the teacher on held-out rows, nats per token: {before:.4f} before, {trainer.evaluate()['eval_kl']:.4f} after")
    trainer.save_model()


if __name__ == "__main__":
    main()
