"""Recovery of a model whose vocabulary was trimmed: the teacher's predictions are the dense ones of the kept tokens."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from reference import kl_per_token
from texts import documents_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from secateur import recover
from secateur.facts import mean_kl
from secateur.model.bind import bind
from secateur.recipe import as_recipe
from secateur.recovery.judge import Judge
from secateur.recovery.loss import states_of
from secateur.recovery.open import inputs_of, open_job
from secateur.report.records import RecoveryRecord
from secateur.vocabulary.kept import kept_tokens_of
from tests.trims import TrimmedPair, prose_file, trimmed_pair

TRAINING = {"num_tokens": 512, "batch_tokens": 128, "learning_rate": 1e-3, "kl_share": 1.0}


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def pair(request, tmp_path_factory) -> TrimmedPair:
    return trimmed_pair(tmp_path_factory.mktemp("trimmed"), tied=request.param, noise=0.1)


@pytest.fixture(scope="module")
def changes(tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("text")
    (folder / "prompts.jsonl").write_text("".join(f'{{"text": "{letter}"}}\n' for letter in "abcdefghijklmnop"))
    domains = {
        "prose": {"files": [str(prose_file(folder))]},
        "own": {"files": [str(folder / "prompts.jsonl")], "answers": True},
    }
    return {"calibration": {"domains": domains, "sequence_length": 32}, "recover": TRAINING}


def log_q(model: Any, ids_T: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids_T[None]).logits[0, :-1].double().log_softmax(-1)


def test_the_teacher_s_predictions_are_the_dense_ones_of_the_kept_tokens(pair, changes):
    job = open_job(pair.pruned, pair.dense, as_recipe(changes))
    assert job.trim is not None and job.trim.kept == pair.kept
    dense, pruned = pair.models()
    teacher = job.load_teacher()
    ids_BT = torch.randint(len(pair.kept.dense_ids), (2, 20), generator=torch.Generator().manual_seed(1))
    expected = torch.cat([pair.dense_log_p(dense, ids_T) for ids_T in ids_BT])
    arch = bind(teacher)
    judge = Judge(teacher, arch, {"mine": documents_of(ids_BT)})
    with torch.no_grad():
        logits_PV = judge.head(states_of(teacher, arch, ids_BT))
    torch.testing.assert_close(logits_PV.double().log_softmax(-1), expected, rtol=1e-5, atol=1e-5)
    verdict = judge.verdicts(lambda ids_BT: pruned(ids_BT).logits)["mine"]
    others = torch.cat([log_q(pruned, ids_T) for ids_T in ids_BT])
    assert verdict.kl == pytest.approx(float(kl_per_token(expected, others).mean()), rel=1e-4)
    nats = -expected.gather(1, ids_BT[:, 1:].reshape(-1, 1)).mean()
    assert judge.dense()["mine"].nats_per_token == pytest.approx(float(nats), rel=1e-5)
    assert teacher.get_input_embeddings().num_embeddings == len(pair.kept.dense_ids)


@pytest.mark.parametrize("pair", [True], indirect=True, ids=["tied"])
def test_a_recovery_runs_end_to_end(pair, changes, tmp_path):
    out = tmp_path / "recovered"
    record = recover(pair.pruned, pair.dense, changes, out=out)
    assert record is not None and mean_kl(record.before) > mean_kl(record.after) > 0 and record.training.held
    assert set(record.before) == {"prose", "own"}
    assert kept_tokens_of(out) == pair.kept == kept_tokens_of(pair.pruned)
    assert AutoTokenizer.from_pretrained(out).get_vocab() == pair.tokenizer.get_vocab()
    config, before = AutoModelForCausalLM.from_pretrained(out).config, pair.models()[1].config
    for key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", "use_cache"):
        assert getattr(config, key) == getattr(before, key)
    assert config.vocab_size == len(pair.kept.dense_ids) and config.use_cache
    kept = f"{len(pair.kept.dense_ids)} of its {pair.kept.num_dense} tokens"
    assert record.notes[0] == f"recover: the teacher predicts {kept}, those that the model has."
    assert all("has so few" in note for note in record.notes[1:])
    assert RecoveryRecord.from_json((out / "recovery.json").read_text(encoding="utf-8"), "there") == record


def test_a_run_on_other_tokens_does_not_go_on(changes, tmp_path):
    # Padding rows: the tokenizer, and so the text, say nothing of them.
    pair = trimmed_pair(tmp_path, padding=2)
    first, second, third = (len(pair.dense_tokenizer) + number for number in range(3))
    assert pair.kept.dense_ids[-2:] == (first, second)

    def inputs() -> dict[str, Any]:
        return inputs_of(open_job(pair.pruned, pair.dense, as_recipe(changes)))

    before = inputs()
    assert inputs() == before
    replace(pair.kept, dense_ids=(*pair.kept.dense_ids[:-1], third)).write(pair.pruned)
    assert inputs() != before
