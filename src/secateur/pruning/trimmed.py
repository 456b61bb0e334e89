"""What a trim of the vocabulary does to text, in numbers.

In: a `Trim`, held-out blocks of the trimmed tokenizer and losses. Out: `VocabularyFacts`.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from secateur.data.blocks import Text
from secateur.data.retokenised import retokenised
from secateur.facts import Loss
from secateur.model.checkpoint import Tokenizer
from secateur.model.kept_tokens import Trim
from secateur.model.vocabulary import scripts_of
from secateur.report.records import VocabularyFacts
from secateur.stream.losses import predicted_tokens


def vocabulary_facts(
    trim: Trim, held_out: Mapping[str, Text], trimmed: Mapping[str, tuple[Loss, Loss]]
) -> VocabularyFacts:
    """Return what the trim did.

    `held_out`: the domains' blocks in the trimmed tokenizer. `trimmed`: each domain's losses before and
    behind the trim, before anything else goes.
    """
    dense = retokenised(held_out, trim.tokenizer, trim.dense_tokenizer)
    kept, texts = trim.kept, _texts(trim.dense_tokenizer, trim.kept.num_dense)
    lost = [text for index, text in texts.items() if kept.new_ids[index] is None]
    before = Counter(script for text in texts.values() for script in scripts_of(text))
    before.subtract(gone := Counter(script for text in lost for script in scripts_of(text)))
    return VocabularyFacts(
        num_before=kept.num_dense,
        num_after=len(kept.dense_ids),
        by_domain={name: (_predicted(dense[name]), _predicted(text)) for name, text in held_out.items()},
        scripts={script: (left + gone[script], left) for script, left in sorted(before.items())},
        nats={name: (dense.nats_per_token, cut.nats_per_token) for name, (dense, cut) in trimmed.items()},
        foretold=trim.foretold,
    )


def _texts(tokenizer: Tokenizer, num_rows: int) -> dict[int, str]:
    """Return each token's text; half characters are U+FFFD."""
    backend: Any = tokenizer.backend_tokenizer
    ids = sorted(index for index in backend.get_vocab().values() if index < num_rows)
    return dict(zip(ids, backend.decode_batch([[index] for index in ids], skip_special_tokens=False), strict=True))


def _predicted(text: Text) -> int:
    return sum(predicted_tokens(text).values())
