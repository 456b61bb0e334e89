"""Ask a pruned model in llama.cpp, by four bits a weight, and in vLLM.

python examples/serve.py smaller     # pip install "secateur[llama-cpp]", or vllm in an environment of its own
"""

import importlib.util
import sys
from pathlib import Path

import secateur

pruned = sys.argv[1]
prompt = "The capital of France is"
if importlib.util.find_spec("llama_cpp"):
    from llama_cpp import Llama

    file = Path(f"{pruned}.gguf")
    secateur.export(pruned, file, type_name="q4_k_m", overwrite=True)
    model = Llama(str(file), n_ctx=512, verbose=False)
    print("llama.cpp:", model(prompt, max_tokens=16, temperature=0)["choices"][0]["text"])
else:
    file = Path(f"{pruned}.gguf")
    secateur.export(pruned, file, type_name="q8_0", overwrite=True)  # a type that needs no llama.cpp
    print(f"llama-server -m {file} answers on port 8080.")

if importlib.util.find_spec("vllm"):
    from vllm import LLM, SamplingParams

    answers = LLM(pruned).generate([prompt], SamplingParams(temperature=0, max_tokens=16))
    print("vLLM:", answers[0].outputs[0].text)
