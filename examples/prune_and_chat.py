"""Make a chat model a fifth smaller, then ask it something.

python examples/prune_and_chat.py Qwen/Qwen2.5-0.5B-Instruct smaller [TOKENS]
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

import secateur

dense, out, *tokens = sys.argv[1:]
recipe = {"remove": 0.2, "calibration": {"num_tokens": int(tokens[0]) if tokens else 51_200}}
result = secateur.prune(dense, recipe, out=out, progress=secateur.bars())
print(f"{result.summary.remove_reached:.1%} of the parameters are gone.")

# What was written is an ordinary checkpoint.
model = AutoModelForCausalLM.from_pretrained(out)
tokenizer = AutoTokenizer.from_pretrained(out)
chat = [{"role": "user", "content": "Why is the sky blue?"}]
prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
answer = model.generate(**prompt, max_new_tokens=64, do_sample=False)
print(tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))
