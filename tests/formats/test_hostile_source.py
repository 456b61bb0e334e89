"""Sources that mean harm: no code that they name ever runs or is named by a result, no file from outside is carried."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bpe_tokenizer import bpe_tokenizer
from damage import edit_json
from models import saved, tiny_ids, tiny_llama
from recipes import grouped
from tiny_tokenizer import tiny_tokenizer
from tokenizers import Tokenizer as BackendTokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from warm import fresh

import secateur
from secateur.errors import CheckpointError
from secateur.files import lies_in
from secateur.formats.reload_child import runs_own_code
from secateur.formats.save import OWN_CODE, save_checkpoint, verify_reload
from secateur.model.checkpoint import check_in_memory, load_tokenizer, open_checkpoint

CODE = """
import os
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
with open(os.environ["MARKER"], "a") as marker:
    marker.write("ran")
class EvilTokenizer(PreTrainedTokenizerFast): pass
class EvilConfig(LlamaConfig): pass
class EvilModel(LlamaForCausalLM): pass
"""
COMMIT = "0" * 40


def name_code(directory: Path, module: str) -> Path:
    """Make every config of the directory name code in `module`."""
    edit_json(
        directory / "config.json",
        auto_map={"AutoConfig": f"{module}.EvilConfig", "AutoModelForCausalLM": f"{module}.EvilModel"},
        custom_pipelines={"text-generation": {"impl": f"{module}.EvilPipeline"}},
    )
    edit_json(directory / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, f"{module}.EvilTokenizer"]})
    edit_json(directory / "generation_config.json", auto_map={"AutoConfig": f"{module}.EvilConfig"}, top_p=0.5)
    edit_json(directory / "preprocessor_config.json", auto_map={"AutoImageProcessor": f"{module}.Evil"}, size=7)
    images = {"auto_map": {"AutoProcessor": f"{module}.Evil"}, "x": 1}
    edit_json(directory / "processor_config.json", image_processor=images)
    return directory


def save_source(directory: Path) -> Path:
    return saved(directory, tiny_llama(), bpe_tokenizer())


def save(source: Path | None, out: Path, model: Any = None, tokenizer: Any = None) -> tuple[str, ...]:
    out.mkdir()
    return save_checkpoint(model or tiny_llama(), tokenizer or tiny_tokenizer(), out, carry_from=source)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Two hostile sources: `local` holds its code, `hub` names that of a repository in the user's cache."""
    place = tmp_path_factory.mktemp("hostile")
    for name, module in {"local": "evil", "hub": "evil/code--evil"}.items():
        name_code(save_source(place / name), module)
    repository = place / "cache" / "models--evil--code"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    for file in ("local/evil.py", "local/custom_generate/generate.py", repository / "snapshots" / COMMIT / "evil.py"):
        (place / file).parent.mkdir(parents=True, exist_ok=True)
        (place / file).write_text(CODE)
    return place


@pytest.fixture(scope="module")
def marker(place) -> Iterator[Path]:
    """What the hostile code writes when it runs, here or in a child, with that repository in the cache."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(place / "cache"))
        patched.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(place / "modules"))
        patched.setenv("HF_HUB_CACHE", str(place / "cache"))
        patched.setenv("MARKER", str(place / "marker"))
        yield place / "marker"


@pytest.fixture(scope="module")
def results(place, marker, recipe) -> dict[str, secateur.Result]:
    """Each source pruned to layers of different widths, whose proof trusts code; none of the source's ran."""
    found = {}
    for source in ("local", "hub"):
        AutoTokenizer.from_pretrained(place / source, trust_remote_code=True)
        assert marker.exists(), "the trap works: who trusts it runs it"
        marker.unlink()
        asked = grouped({**recipe, "protected_layers": [0], "remove": 0.1, "evaluate": False})
        found[source] = secateur.prune(place / source, asked, out=place / f"{source}-out")
        assert not marker.exists()
    return found


def copy_of(result: secateur.Result, tmp_path: Path) -> tuple[Path, torch.Tensor]:
    """Return a copy of the directory, and the model's logits."""
    assert result.out is not None
    with torch.inference_mode():
        logits = result.model(tiny_ids(), use_cache=False).logits
    return Path(shutil.copytree(result.out, tmp_path / "out")), logits


@pytest.mark.parametrize("source", ["local", "hub"])
def test_code_that_a_source_names_neither_runs_nor_travels(source, results, marker, tmp_path):
    out, _ = copy_of(results[source], tmp_path)
    secateur.evaluate(out)
    secateur.export(out, tmp_path / "out.gguf", check=False)
    assert secateur.verify(out).mismatches == ()
    assert not marker.exists()
    assert [file.name for file in out.rglob("*.py")] == [OWN_CODE.name]
    assert (out / OWN_CODE.name).read_bytes() == OWN_CODE.read_bytes()
    configs = {file.name: json.loads(file.read_text(encoding="utf-8")) for file in out.glob("*config.json")}
    names = configs["config.json"].pop("auto_map")
    assert names == {
        "AutoConfig": "modeling_per_layer.PerLayerLlamaConfig",
        "AutoModel": "modeling_per_layer.PerLayerLlamaModel",
        "AutoModelForCausalLM": "modeling_per_layer.PerLayerLlamaForCausalLM",
    }
    said = json.dumps(configs)
    assert "evil" not in said and "auto_map" not in said and "custom_pipelines" not in said
    assert configs["generation_config.json"]["top_p"] == 0.5 and configs["preprocessor_config.json"] == {"size": 7}
    assert configs["processor_config.json"] == {"image_processor": {"x": 1}}


class OwnTokenizer(PreTrainedTokenizerFast):
    """A class of this file, which saving a tokenizer would copy."""

    _auto_class = "AutoTokenizer"


def test_a_class_that_a_user_registered_is_not_copied(tmp_path):
    tokenizer = OwnTokenizer(tokenizer_object=tiny_tokenizer().backend_tokenizer)
    tokenizer.save_pretrained(tmp_path / "theirs")
    assert (tmp_path / "theirs" / Path(__file__).name).is_file()
    save(None, tmp_path / "out", tokenizer=tokenizer)
    assert list((tmp_path / "out").glob("*.py")) == []
    assert "auto_map" not in (tmp_path / "out" / "tokenizer_config.json").read_text(encoding="utf-8")


def test_a_config_that_is_not_json_is_not_carried(tmp_path):
    source = save_source(tmp_path / "source")
    (source / "processor_config.json").write_text("[" * 100_000)
    (source / "preprocessor_config.json").write_text('{"auto_map"')
    save(source, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*processor_config.json"))


def test_a_word_called_auto_map_stays_in_the_vocabulary(tmp_path):
    said = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    size = said["model"]["vocab"]["auto_map"] = len(said["model"]["vocab"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=BackendTokenizer.from_str(json.dumps(said)))
    save(None, tmp_path / "out", tiny_llama(vocab_size=size + 1), tokenizer)
    assert load_tokenizer(open_checkpoint(tmp_path / "out")).get_vocab()["auto_map"] == size


def test_the_proof_trusts_its_own_file_alone(results, marker, tmp_path):
    out, logits = copy_of(results["hub"], tmp_path)
    # A tokenizer that names code: the model's own file is run, and this is not.
    edit_json(out / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "evil/code--evil.EvilTokenizer"]})
    with fresh():  # whose cache a process reads as it starts
        assert verify_reload(out, tiny_ids(), logits).max_abs_difference == 0
    assert not marker.exists()
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    named = config["auto_map"]
    assert runs_own_code(str(out), config)
    for other in ({}, named | {"AutoConfig": "evil/code--modeling_per_layer.A"}, named | {"AutoModel": "other.B"}):
        assert not runs_own_code(str(out), config | {"auto_map": other})
    (out / "custom_generate").mkdir()
    (out / "custom_generate" / "generate.py").write_text(CODE)
    assert not runs_own_code(str(out), config)
    shutil.rmtree(out / "custom_generate")
    (out / OWN_CODE.name).write_text(OWN_CODE.read_text(encoding="utf-8") + CODE, encoding="utf-8")
    assert not runs_own_code(str(out), config)
    with pytest.raises(CheckpointError, match="cannot reload it in a fresh process"):
        verify_reload(out, tiny_ids(), logits)
    assert not marker.exists()


def test_models_and_tokenizers_in_memory_that_run_foreign_code_are_refused():
    foreign = type("Foreign", (), {"__module__": "transformers_modules.evil.code"})
    with pytest.raises(CheckpointError, match=r"^tokenizer: it runs its checkpoint's code, .*trust_remote_code\.$"):
        check_in_memory(tiny_llama(), foreign())
    model = tiny_llama()
    model.__class__ = type("Evil", (type(model),), {"__module__": "transformers_modules.evil.code"})
    with pytest.raises(CheckpointError, match=r"^model: it runs its checkpoint's code"):
        check_in_memory(model, tiny_tokenizer())


SECRET = "-----BEGIN OPENSSH PRIVATE KEY-----"


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "id").write_text(SECRET)
    return tmp_path / "home" / "id"


def texts_in(directory: Path) -> str:
    return b"\n".join(file.read_bytes() for file in directory.rglob("*") if file.is_file()).decode("utf-8", "replace")


def test_links_out_of_the_source_are_left_behind_and_told_but_weights_may_be_links(secret, tmp_path):
    source = save_source(tmp_path / "source")
    (source / "LICENSE-extra").symlink_to(secret)
    (source / "NOTICE").symlink_to("../home/id")
    (source / "additional_chat_templates").symlink_to(secret.parent)
    (secret.parent / "tool.jinja").write_text(SECRET)
    (source / "terms").write_text("ours")
    (source / "LICENSE").symlink_to("terms")
    (source / "USE_POLICY.md").symlink_to("nowhere")
    left = save(source, tmp_path / "out")
    assert [sentence.split(":")[0] for sentence in left] == ["tool.jinja", "LICENSE-extra", "NOTICE"]
    assert all(sentence.endswith("so it was not carried over.") for sentence in left)
    assert SECRET not in texts_in(tmp_path / "out")
    assert (tmp_path / "out" / "LICENSE").read_text() == "ours"
    (source / "additional_chat_templates").unlink()
    shutil.move(source / "model.safetensors", tmp_path / "weights")
    (source / "model.safetensors").symlink_to(tmp_path / "weights")
    assert torch.equal(secateur.load(source).lm_head.weight, tiny_llama().lm_head.weight)


def test_a_result_of_equal_widths_names_no_code_and_says_what_it_left_behind(place, recipe, secret, tmp_path):
    source, out = Path(shutil.copytree(place / "hub", tmp_path / "source")), tmp_path / "out"
    (source / "LICENSE").symlink_to(secret)
    result = secateur.prune(source, grouped({**recipe, "remove": 0.1, "evaluate": False}), out=out)
    assert "LICENSE: is a link to a file outside the model's directory" in " ".join(result.summary.warnings)
    said = texts_in(out)
    assert SECRET not in said and "auto_map" not in said and "custom_pipelines" not in said and "evil" not in said
    assert list(out.glob("*.py")) == [] and not hasattr(result.model.config, "auto_map")


def test_blobs_of_the_same_cached_repository_are_carried_and_no_others(secret, tmp_path):
    repository = tmp_path / "cache" / "models--org--model"
    (repository / "blobs").mkdir(parents=True)
    source = save_source(repository / "snapshots" / COMMIT)
    for number, file in enumerate(sorted(source.iterdir())):
        file.rename(repository / "blobs" / str(number))
        file.symlink_to(f"../../blobs/{number}")
    (repository / "blobs" / "licence").write_text("free")
    (source / "LICENSE").symlink_to("../../blobs/licence")
    other = tmp_path / "cache" / "models--org--other" / "blobs"
    other.mkdir(parents=True)
    (other / "key").write_text(SECRET)
    (source / "NOTICE").symlink_to("../../../models--org--other/blobs/key")
    (tmp_path / "door").symlink_to(source)
    assert lies_in(tmp_path / "door", tmp_path / "door" / "LICENSE")
    assert len(load_tokenizer(open_checkpoint(tmp_path / "door"))) == 310
    assert len(save(source, tmp_path / "out")) == 1
    assert (tmp_path / "out" / "LICENSE").read_text() == "free"
    assert SECRET not in texts_in(tmp_path / "out")
    # The blobs themselves may not be a link elsewhere.
    (repository / "blobs").rename(tmp_path / "moved")
    (repository / "blobs").symlink_to(tmp_path / "moved")
    assert not lies_in(source, source / "LICENSE")


READ = "config.json generation_config.json tokenizer_config.json tokenizer.json vocab.txt vocab.json merges.txt "
READ += "tokenizer.model chat_template.jinja additional_chat_templates/tool.jinja special_tokens_map.json"


def test_what_is_read_into_a_result_may_not_be_a_link_out(secret, tmp_path):
    source = save_source(tmp_path / "source")
    (source / "additional_chat_templates").mkdir()
    for name in READ.split():
        own = (source / name).read_bytes() if (source / name).exists() else None
        (source / name).unlink(missing_ok=True)
        (source / name).symlink_to(secret)
        with pytest.raises(CheckpointError, match=rf"^{source / name}: is a link to a file outside .*copy the file"):
            open_checkpoint(source)
        (source / name).unlink()
        if own is not None:
            (source / name).write_bytes(own)


@pytest.mark.parametrize("key", ["vocab", "merges", "init_inputs"])
def test_a_tokenizer_may_not_name_a_file(key, secret, tmp_path):
    source = save_source(tmp_path / "source")
    (source / "tokenizer.json").unlink()
    (source / "vocab.txt").write_text("")
    edit_json(source / "tokenizer_config.json", **{key: [str(secret)] if key == "init_inputs" else str(secret)})
    edit_json(source / "tokenizer_config.json", tokenizer_class="BertTokenizer")
    with pytest.raises(CheckpointError, match=f"its key '{key}' can name a file outside the directory; remove the key"):
        load_tokenizer(open_checkpoint(source))


def test_the_card_says_how_to_load_without_trusting_the_tokenizer(results, tmp_path):
    out, logits = copy_of(results["local"], tmp_path)
    code = (out / "README.md").read_text(encoding="utf-8").split("```")[1].removeprefix("python\n")
    known: dict[str, Any] = {}
    exec(code.replace("path/to/this/directory", str(out)), known)
    with torch.inference_mode():
        assert torch.equal(known["model"](tiny_ids(), use_cache=False).logits, logits)
    assert "trust_remote_code" not in code.splitlines()[-1] and len(known["tokenizer"]) == 310
