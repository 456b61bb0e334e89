"""Fine-tune a pruned model on chats with TRL and peft, as any other model: pip install trl peft

python examples/fine_tune.py smaller tuned chats.jsonl
"""

import sys

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

pruned, out, chats = sys.argv[1:4]
tokenizer = AutoTokenizer.from_pretrained(pruned)
rows = load_dataset("json", data_files=chats, split="train")  # each with `messages`
trainer = SFTTrainer(
    model=AutoModelForCausalLM.from_pretrained(pruned),
    processing_class=tokenizer,
    train_dataset=rows,
    peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    args=SFTConfig(f"{out}-training", max_length=512, learning_rate=2e-4, bf16=torch.cuda.is_available()),
)
trainer.train()

# The low-rank additions become part of the weights.
trainer.model.merge_and_unload().save_pretrained(out)
tokenizer.save_pretrained(out)
