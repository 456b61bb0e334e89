"""A job's store from its opening to its end: who may have it, what it goes on from, when it stays."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from damage import flip

from secateur.errors import CheckpointError, NumericsError, RecipeError
from secateur.log import RunLog
from secateur.store import HOW, Store, _Name, changes_of, place_beside

INPUTS = {"recipe": {"remove": {"share": 0.2}, "seed": 0}, "model file": "a" * 64}


class Job:
    """A job that writes `out`: what it said, and what it computed anew."""

    def __init__(self, out: Path) -> None:
        self.out, self.said, self.anew = out, list[str](), list[str]()
        self.log = RunLog()

    @contextmanager
    def begun(self, inputs: dict[str, Any] = INPUTS, *, overwrite: bool = False) -> Iterator[Store]:
        """Open the store."""
        options: dict[str, Any] = {"overwrite": overwrite, "protected": self.out.parent / "model"}
        with Store.open(self.out, inputs, self.log, tell=self.said.append, **options) as store:
            yield store

    def value(self, store: Store, name: str, found: Any = 1, **named: Any) -> Any:
        """Return a step's value and note whether it was computed."""
        return store.value(name, lambda: self.anew.append(name) or found, **named)


def interrupted(out: Path, error: BaseException | None = None, steps: tuple[str, ...] = ("one", "two")) -> Job:
    """Return a job that ended by an error behind these steps."""
    job, error = Job(out), error or KeyboardInterrupt()
    with pytest.raises(type(error)) as caught, job.begun() as store:
        job.value(store, "text", "hash", is_input=True)
        for name in steps:
            job.value(store, name)
        raise error
    job.said += getattr(caught.value, "__notes__", [])
    return job


def test_nothing_is_left_of_a_job_that_ends_well(tmp_path):
    job = Job(tmp_path / "out")
    with job.begun() as store:
        assert place_beside(job.out).is_dir() and job.value(store, "one") == 1
        assert (store.num_found, store.num_saved) == (0, 1)
        store.note_found()
    assert list(tmp_path.iterdir()) == [] and job.said == [] and job.log.lines == []


def test_an_interrupted_job_says_how_to_go_on_and_goes_on(tmp_path):
    job = interrupted(tmp_path / "out")
    assert job.anew == ["text", "one", "two"] and job.said == [HOW]
    half = place_beside(job.out) / ".one.json.tmp"  # as of a job that was killed
    half.write_text("{")
    # What ends a job before any step of its own leaves the earlier one's: a mistake; text that is known later.
    with pytest.raises(RecipeError), Job(job.out).begun():
        assert not half.exists()
        raise RecipeError("x: y.")
    with pytest.raises(CheckpointError, match="had other inputs: the text has changed; give those"):
        with Job(job.out).begun() as store:
            store.check_input("text", "other")
    again = Job(tmp_path / "out")
    with again.begun() as store:
        store.check_input("text", "hash")
        assert again.value(store, "one", 5) == 1 and again.value(store, "three") == 1
        assert again.anew == ["three"] and (store.num_found, store.num_saved) == (1, 1)
        store.note_found()
    assert again.said == [f"{again.out}: goes on from the 2 steps that an earlier run has finished."]
    (note,) = (line["text"] for line in again.log.lines)
    assert note.startswith("1 finished steps are of an earlier run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"recipe": {"remove": {"share": 0.3}, "seed": 0}}, "recipe remove share was 0.2 and is 0.3"),
        ({"recipe": {"remove": {"share": 0.2}}}, "recipe seed was 0 and is None"),
        ({"model file": "b" * 64}, "model file has changed"),
        ({"new": 1}, "new was None and is 1"),
    ],
)
def test_a_job_with_other_inputs_does_not_go_on(changed, said, tmp_path):
    interrupted(tmp_path / "out")
    again = Job(tmp_path / "out")
    with pytest.raises(CheckpointError) as caught, again.begun({**INPUTS, **changed}):
        pytest.fail("it went on")
    assert str(caught.value) == (
        f"OUT {again.out}: an interrupted run had other inputs: {said}; give those to go on with it, or delete "
        f"{tmp_path / '.out.resume'} to begin anew."
    )
    assert getattr(caught.value, "__notes__", []) == [], "nor is it told how to go on"
    with again.begun() as store:  # and what is finished stays
        assert again.value(store, "one", 5) == 1


KEPT: dict[BaseException, bool] = dict.fromkeys((RecipeError("x: y."), NumericsError("x: y.")), False)
KEPT |= dict.fromkeys((CheckpointError("x: y."), OSError("disk"), ValueError("bug"), KeyboardInterrupt()), True)


@pytest.mark.parametrize(("error", "is_kept"), KEPT.items())
def test_what_may_go_well_next_time_is_kept_and_what_would_fail_again_is_not(error, is_kept, tmp_path):
    job = interrupted(tmp_path / "out", error)
    assert list(tmp_path.iterdir()) == [place_beside(job.out)] * is_kept and job.said == [HOW] * is_kept


def test_nothing_is_kept_where_no_step_was_finished(tmp_path):
    job = interrupted(tmp_path / "deep" / "er" / "out", steps=())
    assert list(tmp_path.iterdir()) == [] and job.said == []


def test_only_one_has_it_at_a_time(tmp_path):
    job, other = Job(tmp_path / "out"), Job(tmp_path / "out")
    with job.begun() as store:
        job.value(store, "one")
        with pytest.raises(CheckpointError, match="another process is writing it"), other.begun():
            pytest.fail("both have it")
        assert job.value(store, "one", 5) == 1, "the other one has removed nothing"
    with other.begun():
        pass


def test_a_store_older_than_its_result_is_of_a_job_that_ended(tmp_path):
    """Killed between the last renaming and the removal of the store."""
    out, store = tmp_path / "out", place_beside(tmp_path / "out")
    for seconds, is_left in ((10, False), (-10, True)):
        interrupted(out)
        out.mkdir()
        at = max(file.stat().st_mtime for file in store.iterdir()) + seconds
        os.utime(out, (at, at))
        with pytest.raises(CheckpointError), Job(out).begun():
            pytest.fail("OUT is there")
        assert store.exists() == is_left
        out.rmdir()


def test_log_lines_of_a_step_are_written_again_and_those_before_it_are_not_its_own(tmp_path):
    log, again = RunLog(), RunLog()
    log.write({"event": "before"})
    Store(tmp_path, log=log).value("one", lambda: log.write({"event": "inner"}) or 1)
    assert Store(tmp_path, log=again).value("one", lambda: 2) == 1
    assert [line["event"] for line in log.lines] == ["before", "inner"]
    assert [line["event"] for line in again.lines] == ["inner"]


def test_a_first_run_gets_the_types_that_a_later_one_reads_and_people_can_read_them(tmp_path):
    made = Store(tmp_path).value("one", lambda: {1: (2, 3.5), "path": Path("x")})
    assert made == {"1": [2, 3.5], "path": "x"} == Store(tmp_path).value("one", lambda: None)
    record = json.loads((tmp_path / "one.json").read_text())
    assert next(iter(record)) == "sha256" and record["value"] == made and record["step"] == "one"


def test_steps_of_a_lasting_store_are_known_by_what_they_depend_on(tmp_path):
    store = Store.lasting(tmp_path / "a" / "b", lambda text: None)
    for found in (1, 2, 1):
        assert store.value("x y/z", lambda found=found: found, depends_on={"n": found}) == found
    assert store.num_saved == 2 and store.num_found == 1
    stems = {file.stem for file in (tmp_path / "a" / "b").iterdir()}
    assert len(stems) == 2 and all(stem.startswith("x-y-z-") for stem in stems)
    assert _Name("x", {"a": 1, "b": 2}).stem == _Name("x", {"b": 2, "a": 1}).stem
    names = [_Name("x").stem, _Name("x", None, True).stem]
    names += [_Name(name, {}).stem for name in ("x", "y", "x y", "x-y")]
    assert len(set(names)) == 6


def test_a_promise_is_asked_once_and_not_given_for_what_is_missing(tmp_path):
    store = Store(tmp_path)
    assert not store.has("step")
    store.save("step", {}, {})
    assert store.has("step") and Store(tmp_path).has("step")
    (tmp_path / "step.json").unlink()
    with pytest.raises(CheckpointError, match="step, a step that this run goes on from, was damaged"):
        store.find("step")
    assert Store(tmp_path).find("step") is None


def test_changes_are_told_in_order_and_digests_are_not_spelt_out():
    before = {"b": {"x": 1, "y": 2}, "a": "f" * 64, "same": 1}
    now = {"b": {"x": 3}, "a": "0" * 64, "same": 1}
    assert changes_of(before, now) == ["a has changed", "b x was 1 and is 3", "b y was 2 and is None"]
    assert changes_of({"a": "f" * 64}, {}) == changes_of({}, {"a": "f" * 64}) == ["a has changed"]


@pytest.mark.parametrize("name", ["inputs", "input-text"])
def test_without_its_inputs_nothing_of_it_counts(name, tmp_path):
    interrupted(tmp_path / "out")
    flip(place_beside(tmp_path / "out") / f"{name}.json", -3)
    job = Job(tmp_path / "out")
    with job.begun() as store:
        assert job.value(store, "text", "other", is_input=True) == "other" and job.value(store, "one", 5) == 5
    assert job.said == [f"{job.out}: begins anew; {name}.json of an interrupted run is damaged on disk."]


def test_a_store_half_removed_is_void(tmp_path, monkeypatch):
    """Killed while the store is being removed: without its inputs what is left does not count."""
    monkeypatch.setattr("secateur.store.shutil.rmtree", lambda *_, **__: None)
    job = Job(tmp_path / "out")
    with job.begun() as store:
        job.value(store, "one")
    monkeypatch.undo()
    again = Job(tmp_path / "out")
    with again.begun() as store:
        assert again.value(store, "one", 5) == 5


def test_a_file_that_may_not_be_read_is_no_damage(tmp_path, monkeypatch):
    """Steps are not thrown away because of a permission or a mistake of the system."""
    Store(tmp_path).value("one", lambda: 1)
    monkeypatch.setattr(Path, "read_bytes", Mock(side_effect=PermissionError(13, "denied", "one.json")))
    with pytest.raises(PermissionError):
        Store(tmp_path).value("one", lambda: 2)
    monkeypatch.undo()
    assert Store(tmp_path).value("one", lambda: 2) == 1


def test_inputs_alone_are_nothing_to_go_on_from(tmp_path):
    """Killed before its first step was finished; other inputs do not matter then."""
    interrupted(tmp_path / "out")
    for name in ("one", "two"):
        (place_beside(tmp_path / "out") / f"{name}.json").unlink()
    job = Job(tmp_path / "out")
    with job.begun({"other": 1}) as store:
        assert job.value(store, "one", 5) == 5
    assert job.said == []


def test_beginning_anew_voids_the_old_steps_before_it_removes_them(tmp_path, monkeypatch):
    """Killed in between, none of the steps that are left may count."""
    interrupted(tmp_path / "out")
    flip(place_beside(tmp_path / "out") / "input-text.json", -3)
    gone, unlink, names = list[str](), Path.unlink, Path.iterdir

    def spy(path: Path, missing_ok: bool = False) -> None:
        gone.append(path.name)
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "iterdir", lambda place: iter(sorted(names(place), reverse=True)))
    monkeypatch.setattr(Path, "unlink", spy)
    with Job(tmp_path / "out").begun():
        whole = [name for name in gone if "partial" not in name]
        assert whole == ["inputs.json", "two.json", "one.json", "input-text.json"]
