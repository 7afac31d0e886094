r"""Domain Alignment from Expert in a plain TRL script: rows of a domain follow its expert, general rows the student as it was.

    python examples/dae.py                     # small random models and embedded rows: offline, seconds on a CPU
    accelerate launch examples/dae.py --student my/student --expert ecommerce=my/expert \
        --data rows.jsonl --lora --per_device_train_batch_size 2 --learning_rate 2e-5 --max_steps 2000

``rows.jsonl`` holds any of TRL's forms and a ``domain`` in each row: ``ecommerce``, say, or ``general``.
"""

from __future__ import annotations

import argparse

from datasets import concatenate_datasets, load_dataset
from peft import LoraConfig
from tiny_world import random_model, rows, tokenizer_for

from daekit import DAEConfig, DAETrainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", help="hub id or directory; without it small random models are used")
    parser.add_argument("--expert", action="append", default=[], metavar="DOMAIN=MODEL", help="may be given several times")
    parser.add_argument("--data", help="JSONL file of training rows with a domain each")
    parser.add_argument("--lora", action="store_true", help="train a LoRA adapter; its copy is the reference")
    parser.add_argument("--output_dir", default="runs/example-dae")
    parser.add_argument("--max_steps", type=int, default=20)
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    parser.add_argument("--per_device_train_batch_size", type=int, default=16)
    options = parser.parse_args()

    if options.student:
        student, tokenizer = options.student, None
        teachers = dict(expert.split("=", 1) for expert in options.expert)
        data = load_dataset("json", data_files=options.data, split="train").train_test_split(test_size=0.1, seed=0)
    else:
        data = concatenate_datasets([rows("skills"), rows("shop", domain="shop")]).train_test_split(test_size=0.1, seed=0)
        tokenizer = tokenizer_for(data["train"])
        student, teachers = random_model("mistral", tokenizer), {"shop": random_model("mixtral", tokenizer)}

    trainer = DAETrainer(  # in place of SFTTrainer
        model=student,
        teachers=teachers,  # new; reference=None: general rows follow the student as it stands now
        args=DAEConfig(  # in place of SFTConfig
            output_dir=options.output_dir,
            max_steps=options.max_steps,
            learning_rate=options.learning_rate,
            per_device_train_batch_size=options.per_device_train_batch_size,
            logging_steps=5,
            report_to="none",
        ),
        train_dataset=data["train"],
        eval_dataset=data["test"],
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM") if options.lora else None,
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    for domain in [*teachers, "general"]:
        key = f"eval_kl/{domain}"
        print(f"{domain}: KL to its teacher, nats per token: {before[key]:.4f} before, {after[key]:.4f} after")
    trainer.save_model()


if __name__ == "__main__":
    main()
