"""Tasks without the hub are the harness's own: same rows, same answers; groups, few-shot, resume, what is missing."""

import json
import shutil
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pyarrow
import pytest
from damage import edit_json
from run_cli import run_cli
from shown import assert_sentences, refusal

from secateur.evaluation.evaluate import evaluate
from secateur.evaluation.tasks import (
    TaskOptions,
    _code_found,
    load_tasks,
    passes,
    quiet_harness,
    saved_rows,
    task_manager,
)

lm_eval = pytest.importorskip("lm_eval")

LETTERS = ["A", "B", "C", "D"]
ARC = [
    {
        "id": f"q{number}",
        "question": f"What comes after {number}?",
        "choices": {"text": [str(number + step) for step in (1, 2, 10, -3)], "label": LETTERS},
        "answerKey": LETTERS[number % 4],
    }
    for number in range(8)
]
WINOGRANDE = [
    {
        "sentence": f"Ann gave Bea {number} because _ asked.",
        "option1": "Ann",
        "option2": "Bea",
        "answer": "12"[number % 2],
    }
    for number in range(6)
]
# The harness makes its questions out of these with `Dataset.map`, which has a bar.
HELLASWAG = [
    {
        "activity_label": "Counting",
        "ctx_a": f"She counts to {number}.",
        "ctx_b": "then she",
        "endings": ["stops.", "goes on.", "sings.", "sleeps."],
        "label": str(number % 4),
    }
    for number in range(4)
]
GSM8K = [
    {"question": f"What is {number} and 1?", "answer": f"It is {number + 1}.\n#### {number + 1}"} for number in range(3)
]
MBPP = [
    {
        "task_id": number,
        "text": "Write a function that adds.",
        "code": "def add(a, b): return a + b",
        "test_list": [f"assert add({number}, {step}) == {number + step}" for step in range(3)],
    }
    for number in range(2)
]
XWINOGRAD = ["en", "fr", "jp", "pt", "ru", "zh"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Data sets as save_to_disk writes them."""
    import datasets

    directory = tmp_path_factory.mktemp("tasks-data")
    splits = {
        "allenai/ai2_arc/ARC-Easy": {"train": ARC[4:], "validation": ARC[:4], "test": ARC},
        "allenai/winogrande/winogrande_xl": {"validation": WINOGRANDE},
        "openai/gsm8k/main": {"test": GSM8K},
        "google-research-datasets/mbpp/full": {"test": MBPP},
        "Rowan/hellaswag/default": {"train": HELLASWAG, "validation": HELLASWAG},
    }
    with quiet_harness():
        for name, rows in splits.items():
            each = {split: datasets.Dataset.from_list(items) for split, items in rows.items()}
            datasets.DatasetDict(each).save_to_disk(directory / name)
        for config in XWINOGRAD:
            rows = [{**row, "answer": "1" if config == "fr" else row["answer"]} for row in WINOGRANDE]
            datasets.DatasetDict({"test": datasets.Dataset.from_list(rows)}).save_to_disk(
                directory / "Muennighoff/xwinograd" / config
            )
    return directory


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out"


def direct(checkpoint: Path, task: str, rows: dict[str, list], tmp_path: Path, **options) -> dict:
    """The harness by itself: its own loading of parquet files with the same rows, its own model wrapper."""
    import datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    with quiet_harness():
        files = {split: str(tmp_path / f"{task}-{split}.parquet") for split in rows}
        for split, file in files.items():
            datasets.Dataset.from_list(rows[split]).to_parquet(file)
        missing = {f"{split.replace('train', 'training')}_split": None for split in {"train", "test"} - set(rows)}
        own = {"task": task, "dataset_path": "parquet", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
        found = lm_eval.simple_evaluate(
            model=lm_eval.models.huggingface.HFLM(pretrained=model.eval(), tokenizer=tokenizer, batch_size=1),
            tasks=[{"group": "direct", "task": [{**own, **missing}]}],
            task_manager=task_manager(),
            **options,
        )
    return found["results"][task]


@pytest.mark.parametrize(
    ("task", "rows", "options"),
    [
        ("arc_easy", {"train": ARC[4:], "test": ARC}, TaskOptions(limit=5, num_fewshot=2)),
        ("winogrande", {"validation": WINOGRANDE}, TaskOptions()),
    ],
)
def test_equal_to_the_harness_alone(task, rows, options, checkpoints, saved, out, tmp_path):
    asked = {"limit": options.limit, "num_fewshot": options.num_fewshot}
    written = evaluate(checkpoints["llama"], tasks=(task,), tasks_data=saved, out=out, **asked).to_json()
    found = json.loads(written)["pruned"]["tasks"]
    found |= found.pop("more")
    expected = direct(checkpoints["llama"], task, rows, tmp_path, limit=options.limit, num_fewshot=options.num_fewshot)
    assert found["results"][task] == expected
    assert found["n-shot"][task] == (options.num_fewshot or 0)
    assert found["n-samples"][task]["effective"] == (options.limit or max(len(each) for each in rows.values()))
    assert {"results", "groups", "group_subtasks", "configs", "versions", "n-shot", "higher_is_better"} <= set(found)


def test_a_group_is_its_tasks_and_their_average(checkpoints, saved, out):
    seen: list[tuple[str, int, int]] = []
    result = evaluate(
        checkpoints["llama"],
        tasks=("xwinograd",),
        tasks_data=saved,
        out=out,
        progress=lambda *parts: seen.append(parts) if "tasks" in parts[0] else None,
    )
    found = json.loads(result.to_json())["pruned"]["tasks"]
    found |= found.pop("more")
    leaves = found["group_subtasks"]["xwinograd"]
    scores = [found["results"][name]["acc,none"] for name in leaves]
    assert sorted(leaves) == [f"xwinograd_{config}" for config in XWINOGRAD] and len(set(scores)) == 2
    assert found["results"]["xwinograd"]["acc,none"] == pytest.approx(sum(scores) / len(scores))
    assert found["groups"]["xwinograd"] == found["results"]["xwinograd"]
    assert seen[0] == ("pruned: questions of tasks", 0, 36) and seen[-1] == ("pruned: questions of tasks", 36, 36)


def test_a_study_asks_the_dense_model_and_each_cell(checkpoints, saved, out, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"the quick brown fox jumps over the lazy dog {number}\n" for number in range(400)))
    calibration = {"num_tokens": 256, "sequence_length": 32, "domains": {"text": {"files": [str(text)]}}}
    study = {
        "question": "What do tasks say?",
        "model": str(checkpoints["llama"]),
        "ratios": [0.1],
        "seeds": [0],
        "recipe": {"remove": {"align": 1}, "calibration": calibration, "polish": False},
        "evaluation": {"num_blocks": 2, "tasks": ["arc_easy", "winogrande"], "tasks_data": str(saved)},
        "methods": {"ours": {}},
    }
    path = tmp_path / "study.yaml"
    path.write_text(json.dumps(study))
    shown = run_cli("compare", path, out)
    assert shown.status == 0, shown.stderr
    dense, ours = json.loads((out / "results.json").read_text())["cells"]
    own = evaluate(checkpoints["llama"], tasks=("arc_easy", "winogrande"), tasks_data=saved, out=tmp_path / "own")
    for task, score in own.pruned.scores.items():
        assert dense["tasks"][task]["acc,none"] == score["acc,none"].value
        assert 0 <= ours["tasks"][task]["acc,none"] <= 1
    mean = statistics.mean(ours["tasks"][task]["acc,none"] for task in ours["tasks"])
    assert f"{mean:.3f}" in shown.stdout + (out / "table.md").read_text()


def test_pairs_of_answers_give_the_error_of_a_difference_and_none_is_asked_twice(checkpoints, saved, out):
    models, scores = {"dense": checkpoints["llama"], "pruned": checkpoints["llama-tied"]}, {}
    places = {"dense": out / "dense", "pruned": out}
    for which, model in models.items():
        evaluate(model, tasks=("arc_easy",), tasks_data=saved, out=places[which])
        (part,) = (places[which] / "evaluation").glob("task-*")
        scores[which] = json.loads(part.read_text())["value"]["item_scores"]["acc,none"]
    written, tasks = part.stat().st_mtime_ns, ("winogrande", "arc_easy")
    found = evaluate(models["pruned"], models["dense"], tasks=tasks, tasks_data=saved, out=out)
    assert part.stat().st_mtime_ns == written and len(list((out / "evaluation").glob("task-*"))) == 4
    pairs = [after - before for before, after in zip(scores["dense"], scores["pruned"], strict=True)]
    assert any(pairs)
    assert found.pruned.scores["arc_easy"]["acc,none"].value == pytest.approx(statistics.mean(scores["pruned"]))
    assert found.differences is not None and found.differences.tasks is not None
    change = found.differences.tasks["arc_easy"]["acc,none"]
    assert change.value == pytest.approx(statistics.mean(pairs))
    assert change.error == pytest.approx(statistics.stdev(pairs) / len(pairs) ** 0.5)


def test_nothing_is_printed_and_nothing_of_this_machine_is_written(checkpoints, saved, out):
    options = ("--tasks", "arc_easy,hellaswag", "--tasks-data", saved, "--out", out, "--json")
    shown = run_cli("evaluate", checkpoints["llama"], *options)
    assert shown.status == 0, shown.stderr
    sources = json.loads(shown.stdout)["pruned"]["tasks"]["sources"]
    assert sources["arc_easy"] == "allenai/ai2_arc/ARC-Easy in --tasks-data"
    written = (out / "evaluation.json").read_text()
    assert str(saved) not in written and "site-packages" not in written


def test_mistakes_are_one_sentence(checkpoints, saved, out, monkeypatch):
    said = dict[str, str]()

    def ask(*asked: str) -> None:
        outcome = run_cli("evaluate", checkpoints["llama"], "--tasks", *asked, "--tasks-data", saved, "--out", out)
        assert outcome.status == 2 and outcome.stdout == "" and "Traceback" not in outcome.stderr
        *_, said[" ".join(asked)] = outcome.stderr.splitlines()

    for asked in ("arc_eazy", "gsm8k_platinum", "winogrande --num-fewshot 3", "mbpp_instruct"):
        ask(*asked.split())
    assert not out.exists()
    ask("gsm8k_cot_zeroshot")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    ask("piqa")
    assert_sentences("evaluation/tasks", said, saved)


def test_rows_that_cannot_be_read_are_one_sentence(monkeypatch, tmp_path):
    for error in (ValueError("no rows"), OSError("no rows"), pyarrow.ArrowInvalid("no rows")):
        monkeypatch.setattr("datasets.load_from_disk", Mock(side_effect=error))
        assert "cannot be read (no rows); write or download it again" in refusal(saved_rows, tmp_path)


NEEDS = {
    "langdetect": "task ifeval: needs the package langdetect; install it.",
    "tokenizers/punkt_tab": "task ifeval: needs nltk's punkt_tab; run: python -m nltk.downloader punkt_tab.",
}


@pytest.mark.parametrize("missing", NEEDS)
def test_what_a_task_needs_beside_the_harness_is_known_first(missing, checkpoints, saved, out, monkeypatch):
    nltk = pytest.importorskip("nltk")
    for name in [name for name in sys.modules if name.startswith("lm_eval.tasks.ifeval")]:
        monkeypatch.delitem(sys.modules, name)
    # What nltk looks for where it keeps its data.
    monkeypatch.setattr(nltk.data, "path", [])
    if missing == "langdetect":
        monkeypatch.setattr(nltk, "download", lambda _: True)
        monkeypatch.setitem(sys.modules, missing, None)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    said = refusal(evaluate, checkpoints["llama"], tasks=("ifeval",), tasks_data=saved, out=out)
    assert said == f"RecipeError: {NEEDS[missing]}"


def test_tasks_that_generate_ask_through_the_chat_template_and_run_code_when_asked(
    checkpoints, saved, out, tmp_path, monkeypatch
):
    # The shared model has too few positions for answers of 256 tokens.
    long = shutil.copytree(checkpoints["llama"], tmp_path / "long")
    edit_json(long / "config.json", max_position_embeddings=1024)
    programs, chats = list[tuple[str, str]](), list[str]()

    def passed(program: str, tests: str) -> bool:
        programs.append((program, tests))
        return "assert add(1" in tests

    wrapper = pytest.importorskip("lm_eval.models.huggingface").HFLM
    as_chat = wrapper.apply_chat_template

    def counted(self, *arguments, **options):
        chats.append(as_chat(self, *arguments, **options))
        return chats[-1]

    monkeypatch.setattr("secateur.evaluation.tasks.passes", passed)
    monkeypatch.setattr(wrapper, "apply_chat_template", counted)
    names = ("gsm8k_cot_zeroshot", "mbpp_instruct", "arc_easy")
    options = {"tasks_data": saved, "out": out, "num_fewshot": 0, "batch_size": 2, "run_code": True, "limit": 2}
    found = evaluate(long, tasks=names, **options)
    results = json.loads(found.to_json())["pruned"]["tasks"]["results"]
    assert [each for each in chats if "What is 1 and 1?" in each and each.startswith("[user]")]
    assert not [each for each in chats if "What comes after" in each]
    # Of two problems the tests of one pass.
    assert results["mbpp_instruct"]["pass_at_1,extract_code"] == 0.5
    assert {tests.splitlines()[0] for _, tests in programs} >= {MBPP[0]["test_list"][0], MBPP[1]["test_list"][0]}
    assert "gsm8k_cot_zeroshot, mbpp_instruct" in " ".join(found.notes)


@pytest.mark.parametrize(
    "answer",
    [
        "def add(a, b):\n    return a + b\n```\nIt adds.",
        "```python\ndef add(a, b):\n    return a + b\n```\nIt adds.",
        "import math\n\ndef add(a, b):\n    return a + b\n```",
        "It adds:\n```python\ndef add(a, b):\n    return a + b\n```",
    ],
    ids=["behind the fence", "in a fence of its own", "with an import", "behind a sentence"],
)
def test_code_passes_wherever_an_answer_begins_it(saved, answer, monkeypatch):
    task = load_tasks(("mbpp_instruct",), TaskOptions(run_code=True), saved).tasks["mbpp_instruct"]
    instance = SimpleNamespace(resps=[answer], doc=MBPP[0], filtered_resps={})
    with _code_found(task):
        [pipeline.apply([instance]) for pipeline in task._filters]
    [program] = instance.filtered_resps["extract_code"]
    monkeypatch.setattr("secateur.evaluation.tasks.MAX_SECONDS", 3600)  # on a busy machine code may take long
    assert passes(program, "\n".join(MBPP[0]["test_list"]))
