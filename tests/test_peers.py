"""`benchmarks/peers.py`: its rows are complete, its measured children tell cost and error, its table says both."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import peers


@pytest.mark.parametrize("name", peers.PEERS)
def test_a_row_is_pinned_and_its_script_is_python(name):
    peer = peers.PEERS[name]
    compile(peers.PRELUDE + peer.script, name, "exec")
    assert bool(peer.venv) == bool(peer.requirements) and peer.defaults
    if peer.venv:
        (own,) = [word for word in peer.requirements if word.startswith(peer.package)]
        assert "==" in own or len(own.rpartition("@")[2]) == 40  # a release or a commit


@pytest.mark.parametrize(
    ("errors", "line"),
    [
        ("Traceback:\n  x\nTypeError: got 3\n  of 4\n", "TypeError: got 3"),
        ("KeyError: 'a'\nDuring that:\ntorch.cuda.OutOfMemoryError: b\n", "torch.cuda.OutOfMemoryError: b"),
        ("ERROR: No matching distribution found for a\n", "ERROR: No matching distribution found for a"),
        ("warned of an Error: none\nkilled\n", "killed"),
        ("\n", "no message"),
    ],
)
def test_the_line_that_names_the_error_is_quoted(errors, line):
    assert peers.quoted(errors) == line


def test_a_page_has_no_directories_of_a_machine():
    error = "ImportError: cannot import `A` from\n'b.c' (/home/me/.venv/lib/d.py), 3/4 of tokens/s"
    assert peers.shown(error) == "ImportError: cannot import 'A' from 'b.c' (d.py), 3/4 of tokens/s"


def test_a_child_is_measured(tmp_path):
    held = bytearray(b"1") * 600_000_000  # what starts the child does not count
    code = "import time; held = bytearray(200_000_000); sum(range(10**7)); print(time.process_time())"
    used = peers.measured([sys.executable, "-c", code], tmp_path / "child.log", 60)
    assert float((tmp_path / "child.out").read_text()) <= used["seconds"] <= used["wall_seconds"] + 0.1
    assert 200e6 < used["peak_bytes"] < 400e6 < len(held)


def test_a_child_that_fails_or_is_late_is_quoted(tmp_path):
    with pytest.raises(RuntimeError, match=r"^ValueError: no such layer$"):
        code = "raise ValueError('no such layer')"
        peers.measured([sys.executable, "-c", code], tmp_path / "child.log", 60)
    with pytest.raises(RuntimeError, match=r"^no result after 1 s$"):
        peers.measured([sys.executable, "-c", "import time; time.sleep(60)"], tmp_path / "child.log", 1)


def test_the_table_has_the_best_first_and_quotes_what_failed():
    cost = {"versions": ["1.0", "2", "3"], "seconds": 5.0, "peak_bytes": 1.5e9, "removed": 0.2}
    dense = {"dense_nats": {"web": 2.0, "code": 2.0}, "difference_error": 0.1}
    rows = [
        {"row": "mergekit", "nats": {"web": 4.0, "code": 4.0}} | cost | dense,
        {"row": "optipfair-readme", "failed": "run", "error": "TypeError: no"},
        {"row": "secateur-unpolished", "nats": {"web": 3.0, "code": 2.0}} | cost | dense,
        {"row": "carvelm-readme", "failed": "load", "error": "OSError: no config.json"} | cost,
    ]
    del rows[3]["removed"]
    lines = peers.table(rows).splitlines()
    assert lines[2] == "| **secateur-unpolished** | 1.0 | 20.0% | 12.18 | 1.65 | +0.500 ± 0.100 | yes | 5 | 1.5 |"
    assert lines[3].startswith("| mergekit | 1.0 | 20.0% | 54.60 | 7.39 | +2.000")
    assert lines[5] == "| carvelm-readme | 1.0 |  |  |  |  | no | 5 | 1.5 |"
    assert lines[6] == "| dense |  | 0.0% | 7.39 | 1.00 |  | yes |  |  |"
    assert "- `optipfair-readme`, at run: `TypeError: no`" in lines
