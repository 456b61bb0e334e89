"""The store of finished steps: whatever of it is damaged on disk is found, said in one line, and done again."""

import json
from collections.abc import Callable
from functools import partial
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from damage import flip
from recipes import grouped
from stops import Stopped, stopped_after, weights

import secateur
from secateur.files import sha256_of
from secateur.store import Store, place_beside

# The second round is begun, so that a damaged step lies in a round through which no stream goes any more.
RECIPE = {"remove": 0.35, "budget": "curve", "rounds": 2, "groups": ["ffn"]}
NUM_STEPS = 12

# A file of each kind.
STEPS = ("round-1-layer-1-ffn.safetensors", "round-1-layer-1-ffn.json", "round-1-plan.json", "evaluate dense.json")
INPUTS = ("inputs.json", "input-calibration text.json")


DAMAGES: dict[str, Callable[[Path], object]] = {
    "first byte": lambda file: flip(file, 0),
    "header": lambda file: flip(file, 20, 4),
    "middle": lambda file: flip(file, file.stat().st_size // 2, 6),
    "last byte": lambda file: flip(file, -1),
}


def test_damaged_steps_are_done_again(checkpoints, recipe, unproved, tmp_path):
    """A file of each kind, and two that are whole but not what their names say."""
    asked, whole, out = grouped({**recipe, **RECIPE}), tmp_path / "whole", tmp_path / "out"
    secateur.prune(checkpoints["llama"], asked, out=whole)
    with pytest.raises(Stopped), stopped_after(NUM_STEPS):
        secateur.prune(checkpoints["llama"], asked, out=out)
    store = place_beside(out)
    names = {file.name for file in store.iterdir()}
    assert {*STEPS, *INPUTS} < names and any(name.startswith("round-2") for name in names)
    num_found = sum(name.endswith(".json") for name in names) - len(INPUTS) - 5
    for name, spoil in zip(STEPS, DAMAGES.values(), strict=True):
        spoil(store / name)
    for kind in (".json", ".safetensors"):
        one, other = (store / f"round-1-layer-{layer}-ffn{kind}" for layer in (0, 2))
        one.rename(store / "aside")
        other.rename(one)
        (store / "aside").rename(other)

    heard = list[str]()
    result = secateur.prune(checkpoints["llama"], asked, out=out, tell=heard.append)
    heard = [line.removeprefix(f"{out}: ") for line in heard if ": removes " not in line]  # what the run will do
    damaged = ", finished by an earlier run, is damaged on disk, so it is done again."
    spoilt = {"round-1-layer-0-ffn", "round-1-layer-1-ffn", "round-1-layer-2-ffn", "round-1-plan", "evaluate dense"}
    assert {line.removesuffix(damaged) for line in heard[:-1]} == spoilt
    assert heard[-1] == f"goes on from the {num_found} steps that an earlier run has finished."
    assert any(note.startswith(f"{num_found} finished steps are of an earlier run") for note in result.summary.warnings)
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "out"} and weights(out) == weights(whole)


def kept(directory: Path) -> Store:
    """Return a store with a step of either kind."""
    store = Store(directory)
    store.save("tensors", {"a": torch.arange(4.0), "b": torch.tensor([[7, 8]])}, {"seconds": 1.5})
    store.value("number", lambda: 0.1)
    store.value("part", lambda: [1, 2], depends_on={"model": "abc"})
    return store


def test_what_was_kept_is_found(tmp_path):
    kept(tmp_path)
    store = Store(tmp_path)
    assert store.has("tensors") and not store.has("other") and store.find("other") is None
    tensors, line = store.find("tensors") or ({}, {})
    assert line == {"seconds": 1.5} and tensors["a"].tolist() == [0, 1, 2, 3] and tensors["b"].tolist() == [[7, 8]]
    assert store.value("number", lambda: None) == 0.1 and store.num_found == 2
    assert store.value("part", lambda: None, depends_on={"model": "abc"}) == [1, 2]
    assert store.value("part", lambda: "new", depends_on={"model": "abd"}) == "new"


def test_every_bit_counts(tmp_path):
    """One bit in every seventh byte of every file, by turns; and a file that ends too soon."""
    kept(tmp_path)
    files = {file: file.read_bytes() for file in sorted(tmp_path.iterdir())}
    assert len(files) == 4
    for file, raw in files.items():
        damages = [partial(flip, file, place, place % 8) for place in range(0, len(raw), 7)]
        damages += [partial(file.write_bytes, part) for part in (raw[:-9], b"")]
        for damage in damages:
            heard = list[str]()
            damage()
            store = Store(tmp_path, tell=heard.append)
            found = [
                store.find("tensors") is not None,
                store.value("number", lambda: "anew") == 0.1,
                store.value("part", lambda: "anew", depends_on={"model": "abc"}) == [1, 2],
            ]
            assert found.count(False) == len(heard) == 1, (file.name, damage)
            assert heard[0].endswith("is damaged on disk, so it is done again.")
            for whole, content in files.items():  # a step that is done again is written again
                whole.write_bytes(content)


@pytest.mark.parametrize("damage", [lambda a: a.with_suffix(".safetensors").unlink(), lambda a: flip(a, -3)])
def test_a_damaged_step_is_removed_and_told_once(damage, tmp_path):
    Store(tmp_path).save("a", {"a": torch.ones(2)}, {})
    damage(tmp_path / "a.json")
    heard = list[str]()
    store = Store(tmp_path, tell=heard.append)
    assert not store.has("a") and store.find("a") is None and store.find("a") is None
    assert heard == [f"{tmp_path}: a, finished by an earlier run, is damaged on disk, so it is done again."]
    assert list(tmp_path.iterdir()) == []


def test_a_store_without_a_directory_keeps_nothing():
    store = Store()
    store.save("a", {}, {})
    assert store.value("b", lambda: (1, 2)) == [1, 2] and store.find("a") is None and not store.has("b")
    assert store.num_saved == store.num_found == 0


FOREIGN = {
    "no mapping": [],
    "no name": {"depends_on": None, "is_input": False, "value": 1, "lines": []},
    "name of another kind": {"step": 3, "depends_on": None, "is_input": False, "value": 1, "lines": []},
    "no dependencies": {"step": "number", "is_input": False, "value": 1, "lines": []},
    "no value": {"step": "number", "depends_on": None, "is_input": False, "lines": []},
    "lines of another kind": {"step": "number", "depends_on": None, "is_input": False, "value": 1, "lines": [7]},
    "tensors without a line": {"step": "number", "depends_on": None, "is_input": False, "tensors": "TENSORS"},
    "deep": {"step": "number", "depends_on": None, "is_input": False, "value": "DEEP", "lines": []},
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_another_program_has_sealed_is_damage(name, tmp_path):
    """Its digest is right, and it has not what a step has."""
    kept(tmp_path)
    digest = sha256_of(tmp_path / "tensors.safetensors")
    (tmp_path / "number.safetensors").write_bytes((tmp_path / "tensors.safetensors").read_bytes())
    text = json.dumps(FOREIGN[name]).replace("TENSORS", digest).replace('"DEEP"', "[" * 5000 + "]" * 5000)
    body = text[1:].encode()
    (tmp_path / "number.json").write_bytes(b'{"sha256": "%s",' % sha256(body).hexdigest().encode() + body)
    heard = list[str]()
    assert Store(tmp_path, tell=heard.append).value("number", lambda: "anew") == "anew"
    said = "number, finished by an earlier run, is damaged on disk, so it is done again."
    assert len(heard) == 1 and heard[0].endswith(said)


@pytest.mark.parametrize("first", [True, False])
def test_of_several_ranks_the_first_alone_tells_of_a_lasting_store(first, tmp_path, monkeypatch):
    monkeypatch.setattr("secateur.store.is_first", lambda: first)
    told: list[str] = []
    Store.lasting(tmp_path / "parts", told.append).tell("a line")
    assert told == ["a line"] * first
