"""A trimmed vocabulary: what it did to text, in numbers, and that for people.

In: a `Trim` and held-out blocks of the trimmed tokenizer. Out: `VocabularyFacts`; rows of terminal and
card, the page's tables, who suffers.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from secateur.data.retokenised import retokenised
from secateur.methods.vocabulary import scripts_of
from secateur.model.checkpoint import Tokenizer
from secateur.model.kept_tokens import Trim
from secateur.report.page import Table
from secateur.report.records import Inspection, Summary, VocabularyFacts

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


def sample_blocks(trim: Trim) -> tuple[dict[str, list[Tensor]], dict[str, list[Tensor]]]:
    """Return the samples in tokens of the dense and of the trimmed tokenizer, which predict the same bytes."""
    options = {"add_special_tokens": False, "return_tensors": "pt", "verbose": False}
    ids = {name: trim.dense_tokenizer(text, **options)["input_ids"][0] for name, text in SAMPLES.items()}
    dense = {name: [ids_T] for name, ids_T in ids.items() if len(ids_T) > 1}  # else nothing is predicted
    return dense, retokenised(dense, trim.dense_tokenizer, trim.tokenizer)


def vocabulary_facts(
    trim: Trim, held_out: Mapping[str, Tensor], sample_nats: Mapping[str, tuple[float, float]]
) -> VocabularyFacts:
    """Return what the trim did. `held_out`: the domains' blocks in the trimmed tokenizer, blocks x tokens."""
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
        by_domain={name: (_predicted(dense[name]), _predicted(ids_NT)) for name, ids_NT in held_out.items()},
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


def _predicted(blocks: Iterable[Tensor]) -> int:
    return sum(len(ids_T) - 1 for ids_T in blocks)


def _count(tokenizer: Tokenizer, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


# Languages whose text grows by less are not named; nor are scripts of fewer tokens in the terminal.
LEAST_GROWTH, LEAST_TOKENS, MOST_SCRIPTS = 0.01, 16, 5

TokenCounts = Mapping[str, tuple[int, int]]


def growth(before: int, after: int) -> float:
    """Return the share of tokens that the same text takes more."""
    return after / before - 1 if before else 0.0


def of_dense(summary: Summary) -> str:
    """Return which tokens losses are counted per, if not simply the model's own."""
    return "" if summary.vocabulary is None else " of the dense tokenizer"


def who_suffers(facts: VocabularyFacts) -> str:
    """Say which languages and domains take more tokens, the worst language first."""
    grown = sorted(((growth(*counts), name) for name, counts in facts.samples.items()), reverse=True)
    named = [(name, share) for share, name in grown if share >= LEAST_GROWTH]
    own = growth(*(sum(column) for column in zip(*facts.by_domain.values(), strict=True)))
    said = f"The vocabulary was trimmed from {facts.num_before:,} to {facts.num_after:,} tokens."
    if not named:
        return (
            f"{said} Text of the run's own domains takes {own:.1%} more tokens, samples of other languages about none."
        )
    (worst, most), *others = named
    languages = "".join(f", {name} {share:.0%}" for name, share in others)
    return f"{said} {worst} text takes {most:.0%} more tokens{languages}; text of the run's own domains {own:.1%}."


def vocabulary_notes(facts: VocabularyFacts) -> Iterator[tuple[str, str]]:
    """Yield what a trim does to text: more tokens by domain and language, scripts that lose most."""
    yield "text growth", f"{_growths(facts.by_domain, 1)} more tokens for the same held-out text"
    yield "languages", f"{_growths(facts.samples, 0)} more tokens, by a short sample of each"
    if facts.sample_nats:
        more = ", ".join(f"{name} {after - before:+.2f}" for name, (before, after) in facts.sample_nats.items())
        yield "languages, loss", f"{more} nats per token of the dense tokenizer, by the trim alone"
    lost = sorted((-growth(*counts), script) for script, counts in facts.scripts.items() if counts[0] >= LEAST_TOKENS)
    worst = [(script, facts.scripts[script]) for share, script in reversed(lost) if share > 0][:MOST_SCRIPTS]
    if worst:
        yield "scripts", f"tokens that stay: {', '.join(f'{name} {b:,} of {a:,}' for name, (a, b) in worst)}"


def _growths(counts: TokenCounts, digits: int) -> str:
    return ", ".join(f"{name} {growth(*pair):+.{digits}%}" for name, pair in counts.items())


def vocabulary_cell(inspection: Inspection) -> str:
    """Say what share of the model its tokens are, how many the domains use, and what a trim can free."""
    found, total = inspection.vocabulary, inspection.size.num_params
    said = f"{found.num_tokens:,} tokens, {found.num_params / total:.1%} of all parameters"
    if found.smallest is None or found.params_freed is None:
        return f"{said}; what the domains use is not known: {found.problem}"
    used = ", ".join(f"{name} {count:,}" for name, count in found.used.items())
    num_counted = sum(found.num_counted.values())
    return (
        f"{said}; in {num_counted:,} tokens of the domains' text are so many different ones: {used}. A trim frees up "
        f"to {found.params_freed / total:.1%} before it takes one of these ({found.smallest:,} tokens stay); other "
        "text then takes more tokens"
    )


def vocabulary_tables(facts: VocabularyFacts) -> list[Table]:
    """Return tokens of the same text by domain and language, before and after a trim."""
    return [
        _counted("Tokens of the same held-out text", "domain", facts.by_domain),
        _counted("Tokens of a few everyday sentences", "language", facts.samples),
    ]


def _counted(caption: str, what: str, counts: TokenCounts) -> Table:
    rows = [
        (name, f"{before:,}", f"{after:,}", f"{growth(before, after):+.1%}") for name, (before, after) in counts.items()
    ]
    return Table(caption, (what, "dense", "pruned", "change"), rows)
