"""The development text (benchmarks/text.py fetches it; or SECATEUR_DATA): six domains, calibration and judging."""

import os
from pathlib import Path

DATA = Path(os.environ.get("SECATEUR_DATA", Path(__file__).resolve().parents[2] / "shared" / "data")) / "text"
_FILES = {
    "web": ("web_c4_calib", "web_c4_eval"),
    "wiki": ("wiki_calib", "wikitext2_test_detok"),
    "code": ("code_calib", "code_eval"),
    "math": ("math_gsm8k_calib", "math_gsm8k_eval"),
    "chat": ("instruct_calib", "instruct_eval"),
    "science": ("science_qasper_calib", "science_qasper_eval"),
}
HYBRID = tuple(_FILES)


def text_file(domain: str, part: int) -> str:
    """Return a domain's file: part 0 to calibrate on, 1 to be judged by."""
    return str(DATA / f"{_FILES[domain][part]}.jsonl.gz")
