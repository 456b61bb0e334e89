"""A trimmed model against its dense one: both asked the same bytes, in nats per dense token, and KL of kept tokens."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from reference import kl_per_token
from torch.nn.functional import cross_entropy

from secateur.evaluation import evaluate as module
from secateur.evaluation.evaluate import evaluate
from secateur.evaluation.tasks import LoadedTasks
from secateur.evaluation.text import named_blocks
from secateur.log import silent
from secateur.recipe import Domain
from tests.trims import TrimmedPair, prose_file, trimmed_pair

LENGTH, NUM_BLOCKS = 40, 6


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> TrimmedPair:
    return trimmed_pair(tmp_path_factory.mktemp("trimmed"), noise=0.03)


@pytest.fixture(scope="module")
def domains(tmp_path_factory) -> dict[str, Domain]:
    return {"prose": Domain(files=(str(prose_file(tmp_path_factory.mktemp("text"))),))}


def nats_of(model: Any, ids_T: torch.Tensor) -> float:
    """Return the block's nats, all predicted tokens together."""
    with torch.no_grad():
        return float(cross_entropy(model(ids_T[None]).logits[0, :-1].double(), ids_T[1:], reduction="sum"))


def check_quality(found: Any, nats: list[float], counts: list[int], num_bytes: int) -> None:
    ratio = sum(nats) / sum(counts)
    assert found.nats_per_token == pytest.approx(ratio, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(ratio), rel=1e-4)
    assert (found.num_tokens, found.num_bytes) == (sum(counts), num_bytes)
    assert found.bits_per_byte == pytest.approx(sum(nats) / math.log(2) / num_bytes, rel=1e-5)
    assert sum(found.document_tokens) == sum(counts) and sum(found.document_nats) == pytest.approx(sum(nats), rel=1e-5)


def test_losses_are_nats_per_dense_token_of_the_same_bytes(pair, domains, tmp_path):
    found = evaluate(
        pair.pruned, pair.dense, domains=domains, num_blocks=NUM_BLOCKS, sequence_length=LENGTH, out=tmp_path
    )
    dense, pruned = pair.models()
    blocks = named_blocks(domains, NUM_BLOCKS, LENGTH, pair.tokenizer, silent)[0]["prose"].ids_NT
    dense_blocks = [pair.in_dense_tokens(ids_T) for ids_T in blocks]
    counts = [len(ids_T) - 1 for ids_T in dense_blocks]
    assert len(set(counts)) > 1 and max(counts) < LENGTH - 1
    num_bytes = sum(len(pair.tokenizer.decode(ids_T[1:], skip_special_tokens=True).encode()) for ids_T in blocks)
    before, after = (
        [nats_of(model, each) for each in text] for model, text in ((dense, dense_blocks), (pruned, blocks))
    )
    assert found.dense is not None and found.differences is not None and found.kl is not None
    check_quality(found.dense.domains["prose"], before, counts, num_bytes)
    check_quality(found.pruned.domains["prose"], after, counts, num_bytes)
    change = found.differences.domains["prose"]
    assert change.nats_per_token == pytest.approx((sum(after) - sum(before)) / sum(counts), rel=1e-4)
    log_p = torch.cat([pair.dense_log_p(dense, ids_T) for ids_T in blocks])
    with torch.no_grad():
        log_q = torch.cat([pruned(ids_T[None]).logits[0, :-1].double().log_softmax(-1) for ids_T in blocks])
    assert found.kl["prose"].num_tokens == NUM_BLOCKS * (LENGTH - 1)
    assert found.kl["prose"].kl == pytest.approx(float(kl_per_token(log_p, log_q).mean()), rel=1e-4)
    assert found.kl["prose"].top1_agreement == pytest.approx(
        float((log_p.argmax(-1) == log_q.argmax(-1)).double().mean())
    )
    sizes = f"{pair.kept.num_dense} and {len(pair.kept.dense_ids)} tokens"
    assert found.notes == (
        f"the tokenizers differ ({sizes}): losses are nats per token of the dense tokenizer; "
        "KL is over the kept tokens on the trimmed text.",
    )


def test_what_is_measured_is_kept_and_the_trim_is_part_of_what_it_depends_on(pair, domains, tmp_path):
    options: dict[str, Any] = {"domains": domains, "num_blocks": 2, "sequence_length": LENGTH, "out": tmp_path}
    first, stages = evaluate(pair.pruned, pair.dense, **options), set[str]()
    (file,) = (tmp_path / "evaluation").glob("kl-*.json")
    file.unlink()
    assert evaluate(pair.pruned, pair.dense, **options).to_json() == first.to_json(), "over the kept tokens again"
    again = evaluate(pair.pruned, pair.dense, **options, progress=lambda stage, *_: stages.add(stage))
    assert again.to_json() == first.to_json() and "dense: states for KL" not in stages
    alone = evaluate(pair.pruned, **options)
    assert alone.pruned.domains["prose"].num_tokens == 2 * (LENGTH - 1)
    assert alone.pruned.domains["prose"].nats_per_token < first.pruned.domains["prose"].nats_per_token
    assert alone.pruned.domains["prose"].bits_per_byte == pytest.approx(first.pruned.domains["prose"].bits_per_byte)
    assert alone.notes == (
        f"the vocabulary was trimmed ({pair.kept.num_dense} to {len(pair.kept.dense_ids)} tokens): losses are nats per "
        "token of the model's own tokenizer.",
    )
    itself = evaluate(pair.pruned, pair.pruned, **options)
    assert itself.kl is not None and itself.kl["prose"].kl == 0 and itself.notes == alone.notes


def test_another_trim_of_the_same_files_is_measured_anew(domains, tmp_path):
    pair = trimmed_pair(tmp_path / "models", noise=0.03, padding=1)
    options: dict[str, Any] = {"domains": domains, "num_blocks": 2, "sequence_length": LENGTH, "out": tmp_path}
    first = evaluate(pair.pruned, pair.dense, **options)
    replace(pair.kept, dense_ids=(*pair.kept.dense_ids[:-1], pair.kept.num_dense - 1)).write(pair.pruned)
    again = evaluate(pair.pruned, pair.dense, **options)
    assert first.kl is not None and again.kl is not None and first.kl["prose"].kl != again.kl["prose"].kl


def test_each_model_s_tasks_are_asked_in_its_own_tokens(pair, tmp_path, monkeypatch):
    asked = {}

    def task_parts(store: Any, subject: Any, tokenizer: Any, *_: Any) -> dict[str, Any]:
        asked[subject.which] = tokenizer.get_vocab()
        return {"results": {}, "sources": {}, "lm_eval_version": "0", "item_scores": {}}

    monkeypatch.setattr(module, "load_tasks", lambda _, options, directory: LoadedTasks(options, {}, {}, {}))
    monkeypatch.setattr(module.parts, "task_parts", task_parts)
    evaluate(pair.pruned, pair.dense, tasks=("mine",), out=tmp_path)
    assert asked == {"dense": pair.dense_tokenizer.get_vocab(), "pruned": pair.tokenizer.get_vocab()}
