"""Code that a model wrote runs alone: it passes by reaching its end, and can reach nothing else."""

import pytest

from secateur.evaluation import tasks
from secateur.evaluation.tasks import CodeMetric, load_metric, passes

RIGHT, WRONG = "def add(a, b):\n    return a + b", "def add(a, b):\n    return a * b"
TESTS = "assert add(2, 3) == 5"


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """On a busy machine a process may take long to begin."""
    monkeypatch.setattr(tasks, "MAX_SECONDS", 3600)


def test_right_code_passes_and_wrong_code_does_not():
    assert passes(RIGHT, TESTS)
    assert passes("import math, re, collections, heapq\n" + RIGHT, TESTS)
    assert not passes(WRONG, TESTS)
    assert not passes("def add(a, b) return", TESTS)


@pytest.mark.parametrize(
    "harm",
    [
        "import socket\nsocket.socket()",
        "import urllib.request\nurllib.request.urlopen('http://127.0.0.1:9')",
        "import os\nos.system('true')",
        "import subprocess\nsubprocess.run(['true'])",
        "import os\nos.fork()",
        "import os\nos.remove('x')",
        "open('here', 'w').write('x')",
        "import pathlib\npathlib.Path('here').write_text('x')",
        "import os\nos.open('here', os.O_CREAT)",
        "import ctypes\nctypes.CDLL(None)",
        "x = bytearray(2 << 30)",
        "import sys\nsys.exit(0)",
        "import os\nos._exit(0)",
        "raise SystemExit",
    ],
)
def test_what_reaches_out_or_ends_early_does_not_pass(harm):
    assert not passes(f"{harm}\n{RIGHT}", TESTS)


def test_the_tests_of_right_code_decide_even_if_it_prints():
    assert passes(f"print('x' * 1000)\n{RIGHT}", TESTS)
    assert not passes(f"import sys\nprint(sys.argv[-1])\nsys.exit(0)\n{RIGHT}", TESTS)


def test_code_without_an_end_is_stopped(monkeypatch):
    monkeypatch.setattr(tasks, "MAX_SECONDS", 1)
    assert not passes("while True:\n    pass", TESTS)


def test_the_metric_is_the_mean_over_problems():
    found, verdicts = CodeMetric().compute(references=[TESTS, TESTS], predictions=[[RIGHT], [WRONG]], k=[1])
    assert found == {"pass@1": 0.5}
    assert verdicts == {0: [True], 1: [False]}
    assert isinstance(load_metric("code_eval"), CodeMetric)
    with pytest.raises(ValueError, match=r"pass@k is measured for k = 1 alone, got \[10\]"):
        CodeMetric().compute(references=[TESTS], predictions=[[RIGHT]], k=[10])
    with pytest.raises(ValueError, match="the metric bleu is on the hub alone"):
        load_metric("bleu")
