"""What a summary says of the text that a run saw. In: the calibration set. Out: `CalibrationFacts`."""

from secateur.calibration import CalibrationSet
from secateur.overlap import ngram_overlap
from secateur.summary import CalibrationFacts


def calibration_facts(calibration: CalibrationSet) -> CalibrationFacts:
    """Return hash and token counts by domain, and how much of the held-out text the calibration text has too."""
    measured_on = {domain.name: domain.calibration_NT for domain in calibration.domains}
    held_out = {domain.name: domain.held_out_NT for domain in calibration.domains}
    return CalibrationFacts(
        calibration.content_hash,
        calibration.sequence_length,
        {name: blocks.numel() for name, blocks in measured_on.items()},
        {name: blocks.numel() for name, blocks in held_out.items()},
        ngram_overlap(measured_on, held_out),
    )
