"""A mixture is the domains that its file says, and each is streamed from the hub at its one revision."""

import gzip
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hub import Served, hub

from secateur.plugins import mixtures
from secateur.recipe import INSTALLED_DOMAINS, Calibration

# Prints a document of each domain of a mixture.
READ = """
import json, sys
import datasets.config
from tiny_tokenizer import tiny_tokenizer
from secateur.data.sources import documents
from secateur.recipe import Calibration
datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0  # so long datasets waits behind each stream of parquet
domains = Calibration(domains=sys.argv[1]).domains
print(json.dumps({name: next(documents(name, each, tiny_tokenizer(), 0)) for name, each in domains.items()}))
"""
# Where a file of each data set lies at its revision.
FILES = {
    "allenai/c4": "en/c4-train.00000-of-01024.json.gz",
    "wikimedia/wikipedia": "20231101.en/train-00000-of-00041.parquet",
    "CohereLabs/aya_dataset": "data/train-00000-of-00001.parquet",
    "HuggingFaceH4/ultrachat_200k": "data/train_sft-00000-of-00003-a3ecf92756993583.parquet",
    "codeparrot/codeparrot-clean": "file-000000000001.json.gz",
    "open-web-math/open-web-math": "data/train-00000-of-00114-5a023365406cb9c4.parquet",
    "common-pile/peS2o_filtered": "peS2o-0000.json.gz",
}


def packed(path: str, row: dict[str, Any]) -> bytes:
    if path.endswith(".json.gz"):
        return gzip.compress(json.dumps(row).encode())
    data = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), data)
    return data.getvalue()


def served(domains: dict[str, Any]) -> Served:
    found: Served = {}
    for name, domain in domains.items():
        said = f"text of {name}"
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": said}]
        row = {domain.column: turns if domain.column == "messages" else said, "other": "not this"}
        path = FILES[domain.dataset]
        files = {path: packed(path, row)}
        if domain.config:
            files[f"other/{path}"] = packed(path, {domain.column: "not this"})
            readme = [
                {"config_name": config, "data_files": [{"split": domain.split, "path": file}]}
                for config, file in zip(("another", domain.config), (f"other/{path}", path), strict=True)
            ]
            files["README.md"] = f"---\n{json.dumps({'configs': readme})}\n---\n".encode()
        found[domain.dataset] = (domain.revision, files)
    return found


@pytest.mark.parametrize("mixture", mixtures())
def test_a_mixture_is_streamed_at_its_revisions(mixture: str, tmp_path: Path) -> None:
    domains = Calibration(domains=mixture).domains  # pyright: ignore[reportArgumentType]
    assert all(domain.source[0] == "dataset" and len(domain.revision or "") == 40 for domain in domains.values())
    with hub(served(dict(domains))) as address:
        online = {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path), "NO_PROXY": "127.0.0.1"}
        path = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
        command = [sys.executable, "-c", READ, mixture]
        done = subprocess.run(
            command, env=os.environ | online | {"PYTHONPATH": path}, capture_output=True, text=True, check=False
        )
    assert done.returncode == 0, done.stderr
    read = json.loads(done.stdout)
    assert read.keys() == domains.keys()
    assert all(f"text of {name}" in text and "not this" not in text for name, text in read.items())


def test_the_general_mixture_has_the_kinds_of_text_of_the_defaults() -> None:
    assert set(mixtures()["general"]) == set(INSTALLED_DOMAINS)
