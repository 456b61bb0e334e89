"""What a trim of the vocabulary does to text, in numbers.

In: a `Trim` and held-out blocks of the trimmed tokenizer. Out: `VocabularyFacts`, and short samples of
languages that the domains may not have.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from secateur.data.blocks import Block, Text
from secateur.data.retokenised import retokenised
from secateur.methods.vocabulary import scripts_of
from secateur.model.checkpoint import Tokenizer
from secateur.model.kept_tokens import Trim
from secateur.report.records import VocabularyFacts
from secateur.stream.losses import predicted_tokens

MOST_WORDS = 20
# Everyday sentences in languages, and characters, that the domains may not have.
SAMPLES = {
    "Chinese": "今天早上下雨,所以我们坐公共汽车去学校。老师请大家打开书,读第一页。晚饭以后,他给父母打电话。",
    "Japanese": "今日は朝から雨が降っているので、バスで学校へ行きました。"
    "先生は本を開いて最初のページを読むように言いました。",
    "Russian": "Утром шёл дождь, поэтому мы поехали в школу на автобусе. "
    "Учитель попросил открыть книгу на первой странице.",
    "Arabic": "نزل المطر هذا الصباح، لذلك ذهبنا إلى المدرسة بالحافلة. "
    "طلب المعلم من الجميع فتح الكتاب وقراءة الصفحة الأولى.",
    "Hindi": "आज सुबह बारिश हो रही थी, इसलिए हम बस से स्कूल गए। शिक्षक ने सबसे किताब खोलकर पहला पन्ना पढ़ने को कहा।",
    "German": "Heute Morgen regnete es, deshalb fuhren wir mit dem Bus zur Schule. Die Lehrerin bat alle, das Buch "
    "aufzuschlagen und die erste Seite zu lesen.",
    "Spanish": "Esta mañana llovía, así que fuimos a la escuela en autobús. La maestra pidió a todos que abrieran el "
    "libro y leyeran la primera página.",
    "emoji": "Good morning! ☀️😀 The bus is late again 🚌⏰😅, so we walk 🚶‍♀️🚶. Dinner tonight 🍝🍷? See you at eight "
    "❤️👋🎉",
}


def sample_blocks(trim: Trim) -> tuple[dict[str, list[Tensor]], dict[str, list[Block]]]:
    """Return the samples in tokens of the dense and of the trimmed tokenizer, which predict the same bytes."""
    options = {"add_special_tokens": False, "return_tensors": "pt", "verbose": False}
    ids = {name: trim.dense_tokenizer(text, **options)["input_ids"][0] for name, text in SAMPLES.items()}
    dense = {name: [ids_T] for name, ids_T in ids.items() if len(ids_T) > 1}  # else nothing is predicted
    return dense, retokenised(dense, trim.dense_tokenizer, trim.tokenizer)


def vocabulary_facts(
    trim: Trim, held_out: Mapping[str, Text], sample_nats: Mapping[str, tuple[float, float]]
) -> VocabularyFacts:
    """Return what the trim did. `held_out`: the domains' blocks in the trimmed tokenizer."""
    dense = retokenised(held_out, trim.tokenizer, trim.dense_tokenizer)
    kept, texts = trim.kept, _texts(trim.dense_tokenizer, trim.kept.num_dense)
    lost = [text for index, text in texts.items() if kept.new_ids[index] is None]
    stay = {text.strip() for index, text in texts.items() if kept.new_ids[index] is not None}
    words = {word for word in map(str.strip, lost) if word.isalpha()} - stay
    before = Counter(script for text in texts.values() for script in scripts_of(text))
    before.subtract(gone := Counter(script for text in lost for script in scripts_of(text)))
    return VocabularyFacts(
        num_before=kept.num_dense,
        num_after=len(kept.dense_ids),
        by_domain={name: (_predicted(dense[name]), _predicted(text)) for name, text in held_out.items()},
        samples={
            name: (_count(trim.dense_tokenizer, text), _count(trim.tokenizer, text)) for name, text in SAMPLES.items()
        },
        scripts={script: (left + gone[script], left) for script, left in sorted(before.items())},
        longest_lost=tuple(sorted(words, key=lambda word: (-len(word), word))[:MOST_WORDS]),
        sample_nats=dict(sample_nats),
    )


def _texts(tokenizer: Tokenizer, num_rows: int) -> dict[int, str]:
    """Return each token's text; half characters are U+FFFD."""
    backend: Any = tokenizer.backend_tokenizer
    ids = sorted(index for index in backend.get_vocab().values() if index < num_rows)
    return dict(zip(ids, backend.decode_batch([[index] for index in ids], skip_special_tokens=False), strict=True))


def _predicted(text: Text) -> int:
    return sum(predicted_tokens(text).values())


def _count(tokenizer: Tokenizer, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
