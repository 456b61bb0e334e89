"""README's table of families is what `archs/` says; `python tests/test_docs_families.py` prints it."""

from importlib import resources
from pathlib import Path

from secateur.arch_experts import EXPERT_CHANNELS, EXPERTS
from secateur.arch_spec import load_specs

README = Path(__file__).parents[1] / "README.md"


def table() -> str:
    rows = ["| family | `model_type` | models | groups |", "|---|---|---|---|"]
    for family, spec in load_specs().items():
        text = (resources.files("secateur.archs") / f"{family}.yaml").read_text(encoding="utf-8")
        models = (
            text.splitlines()[0]
            .removeprefix("# ")
            .partition(". ")[0]
            .partition(" and every")[0]
            .partition(": ")[0]
            .removesuffix(".")
        )
        types = ", ".join(f"`{name}`" for name in spec.model_types)
        groups = sorted(spec.groups, key=lambda name: (name != "ffn", name)) + [EXPERTS] * bool(spec.experts)
        groups += [EXPERT_CHANNELS] * bool(spec.experts and spec.experts.channels.num_units)
        rows.append(f"| {family} | {types} | {models} | {', '.join(groups)} |")
    return "\n".join(rows)


def test_the_readme_lists_the_families() -> None:
    assert table() in README.read_text(encoding="utf-8")


def test_every_group_is_offered_or_left_out_with_a_reason() -> None:
    for family, spec in load_specs().items():
        for group in ("kv_heads", "query_heads"):
            assert (group in spec.groups) != (group in spec.omits), f"{family}: {group}"
        assert all(len(reason.split()) > 4 for reason in spec.omits.values())


if __name__ == "__main__":
    print(table())
