"""`secateur demo`: what it says before and after, and what it leaves, on a tiny model in place of SmolLM2."""

from recipes import grouped
from run_cli import run_cli


def test_it_prunes_times_writes_the_page_and_says_where_to_go(checkpoints, recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("secateur.cli.measure.DEMO_MODEL", str(checkpoints["llama"]))
    monkeypatch.setattr("secateur.cli.measure.DEMO_RECIPE", grouped({**recipe, "remove": 0.2}))
    monkeypatch.setattr("secateur.cli.measure.DEMO_WORKLOAD", {"prompt_tokens": 16, "new_tokens": 2, "repeats": 1})
    out = tmp_path / f"a long {'name ' * 20}indeed"
    run = run_cli("demo", out)
    assert run.status == 0, run.stderr
    assert f"\nThe page: {out / 'report.html'}\nThe best result: " in run.stdout, "a path is on one line"
    assert f"Written to {out}. Load it with AutoModelForCausalLM.from_pretrained('{out}').\n" in run.stdout
    told = " ".join(run.stdout.split())
    parts = (
        "by a fifth",
        "minutes on two idle cores",
        "Written to",
        "prefill",
        "The page:",
        "--remove 0.2 --preset best, an hour",
    )
    places = [told.index(part) for part in parts]
    assert places == sorted(places), "what it will do, size and quality, speed, the page, what is best"
    assert {"model.safetensors", "result.json", "bench.json", "report.html"} <= {path.name for path in out.iterdir()}
    assert "tokens/s" in (out / "report.html").read_text()
    again = run_cli("demo", out)
    assert again.status == 2 and "already exists; choose a new directory or give --overwrite" in again.stderr
