"""Imports point one way, heavy packages stay out of the way, modules and functions stay short. Read from the source."""

import ast
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "secateur"
MAX_MODULE_LINES, MAX_FUNCTION_LINES = 400, 60

# Bottom up; a module imports from layers below its own, never from its own. `cli.*` is one command each.
LAYERS = [
    # what knows nothing of the rest
    "errors facts progress memory runlog whole_file reload_child checkpoint_quiet modeling_per_layer overlap page svg "
    "knapsack arch_conv recover_recipe recover_loss",
    "ranks_group plugins",
    "ranks",
    "device",
    "layers_on_device gram",
    # what a run is described by; readers and writers of single files
    "stats arch_spec recipe json_file text_files installed_text checkpoint_tensors checkpoint_locate output "
    "llama_cpp gguf_sentencepiece recover_teacher recover_store journal",
    "arch_hidden arch_numbers arch_logits gguf_family serving",
    "arch_group",
    "arch_experts",
    "arch",
    # stages and measurements, each by itself
    "budget cut walk kl bench verify in_memory sources checkpoint_config staged_file plots "
    "evaluate_harness evaluate_rows evaluate_wikitext gguf_tokenizer progress_bar study per_layer on_disk "
    "staged_directory",
    "loss",
    "resolve_depth resolve_experts recover_judge",
    "prices",
    # stages that are made of others
    "obs compensate measure taylor domain_weights calibration checkpoint summary "
    "bench_llama_cpp evaluate_tasks compare_page budget_curve budget_global level_database recover_record",
    "fingerprint depth gguf_rules expert_stacks selection",
    "checkpoint_tokenizer expert_refit gguf_parts",
    "opening",
    "resolve",
    "experts ranks_check calibration_sampled calibration_facts repair depth_choice "
    "estimate bench_memory evaluate_domains evaluate_cache gguf_metadata gguf_check recover_pair recover_cost",
    "work inspection_groups probe recover_text resume",
    "profile budget_search recover_trainer recover_sharded",
    "recover_logits",
    "recover_job recover_guard",
    "channels expert_channels run inspection gguf_tensors evaluate_differences evaluate_parts",
    "group_step round_plan safety_net pruned_checkpoint",
    # what people read, and the other outputs
    "recover_tasks depth_step loop gguf_export evaluate",
    "card benchmark export compare evaluate_table",
    "recover_table",
    "result_files bench_tables recover_output",
    "report_run report_quality report_evaluation",
    "report_recovery",
    "report",
    # the whole job, and the ways to start it
    "recovering",
    "preparation run_result",
    "pruning",
    "api",
    "secateur",
    "cli.app cli.launched",
    "cli.*",
    "cli",
    "__main__",
]

# A stage knows arch types, devices, errors and progress; besides these only what is named here.
STAGES = {
    "gram": "",
    "stats": "gram",
    "score": "stats gram taylor",
    "obs": "score",
    "domain_weights": "score stats gram",
    "compensate": "score stats gram",
    "budget": "",
    "cut": "",
    "walk": "layers_on_device",
    "loss": "walk",
    "kl": "",
    "bench": "ideal",
    "calibration": "sources",
}
STAGES_MAY_IMPORT = {"arch", "device", "errors", "memory", "plugins", "progress", "ranks"}

HUGGING_FACE = {"transformers", "datasets", "huggingface_hub"}
HUGGING_FACE_ALLOWED = (
    "checkpoint*", "output", "calibration*", "sources", "evaluate*", "bench*", "compare", "gguf_*",
    "in_memory", "pruning", "opening", "ranks_check", "job", "loop", "run", "pruned_checkpoint", "on_disk",
    "reload_child", "modeling_per_layer", "per_layer", "propose", "recover*", "prune_recover",
)  # fmt: skip
ONLY_INSIDE_FUNCTIONS = {"lm_eval", "peft", "matplotlib", "gguf", "pyarrow", "datasets", "llama_cpp"}


def module_name(file: Path) -> str:
    parts = file.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts if parts[-1] != "__init__" else parts[:-1]) or "secateur"


MODULES = {module_name(file): file for file in sorted(SOURCE.rglob("*.py"))}


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def layer(module: str) -> int:
    places = {name: number for number, names in enumerate(LAYERS) for name in names.split()}
    exact, pattern = places.get(module), [n for name, n in places.items() if "*" in name and fnmatch(module, name)]
    if exact is None and not pattern:
        pytest.fail(f"tests/test_imports.py: place the new module '{module}' in LAYERS, above all that it imports")
    return pattern[0] if exact is None else exact


def imported(nodes: Iterator[ast.AST]) -> set[str]:
    """Return the dotted names that import statements among the nodes name."""
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, "relative import; write from secateur.x import y"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def own_imports(module: str) -> set[str]:
    """Return the modules of secateur that this one imports, also inside functions."""
    found = set()
    for name in imported(ast.walk(tree(module))):
        root, _, inside = name.partition(".")
        if root == "secateur":
            while inside and inside not in MODULES:
                inside = inside.rpartition(".")[0]
            found.add(inside or "secateur")
    return found - {module}


def outside_functions(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        yield child
        yield from outside_functions(child)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module):
    # Strictly below: so there are no cycles either. The command line's package imports its commands, not the reverse.
    wrong = sorted(name for name in own_imports(module) if layer(name) >= layer(module))
    assert not wrong, f"{module} imports {wrong}, which are not below it in LAYERS"


@pytest.mark.parametrize("module", STAGES)
def test_stages_do_not_import_each_other(module):
    assert own_imports(module) <= STAGES_MAY_IMPORT | set(STAGES[module].split())


@pytest.mark.parametrize("module", MODULES)
def test_hugging_face_libraries_stay_at_the_edges(module):
    if not any(fnmatch(module, pattern) for pattern in HUGGING_FACE_ALLOWED):
        roots = {name.partition(".")[0] for name in imported(ast.walk(tree(module)))}
        assert not roots & HUGGING_FACE


@pytest.mark.parametrize("module", MODULES)
def test_optional_packages_are_imported_where_they_are_used(module):
    roots = {name.partition(".")[0] for name in imported(outside_functions(tree(module)))}
    assert not roots & ONLY_INSIDE_FUNCTIONS


@pytest.mark.parametrize("module", MODULES)
def test_modules_and_functions_are_short(module):
    assert len(MODULES[module].read_text(encoding="utf-8").splitlines()) <= MAX_MODULE_LINES
    functions = (node for node in ast.walk(tree(module)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    lengths = {node.name: (node.end_lineno or 0) - node.lineno + 1 for node in functions}
    assert {name: length for name, length in lengths.items() if length > MAX_FUNCTION_LINES} == {}
    assert ast.get_docstring(tree(module)), "a module begins with what goes in and what comes out"


def test_the_rules_can_fail():
    module = ast.parse(
        "import datasets\nif TYPE_CHECKING:\n    import peft\ndef f():\n    from gguf import GGUFReader\n"
    )
    assert imported(outside_functions(module)) == {"datasets"}
    assert imported(ast.walk(module)) == {"datasets", "peft", "gguf.GGUFReader"}
    assert layer("errors") < layer("walk") < layer("loop") < layer("pruning") < layer("cli.prune") < layer("cli")
    assert {"cli.app", "recipe"} <= own_imports("cli.prune") and "loop" in own_imports("pruning")
