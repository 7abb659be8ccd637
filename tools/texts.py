"""The texts that quality is measured with, fixed by file and byte range: none of a split is in another.

A folder of texts has `calibration_wiki.txt`, `calibration_c4.txt` and `calibration_code.txt`, from whose beginning the
calibration is cut and from whose middle the selection, and `wiki.test.raw` and `novel_emma.txt`, which give the verdict
and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from loopgguf.errors import InputError

CALIBRATION = {"calibration_wiki.txt": (0, 144_000), "calibration_c4.txt": (0, 144_000), "calibration_code.txt": (0, 112_000)}  # bytes
SELECTION = {"calibration_wiki.txt": (1_000_000, 1_048_000), "calibration_c4.txt": (600_000, 648_000)}
VERDICT = ("wiki.test.raw", "novel_emma.txt")


@dataclass(frozen=True)
class Splits:
    """Files of three disjoint texts: to calibrate on, to choose on, to report."""

    calibration: tuple[Path, ...]
    selection: tuple[Path, ...]
    verdict: tuple[Path, ...]


def cut_splits(texts: Path, folder: Path) -> Splits:
    """Cut the splits out of the folder `texts` into `folder`, which is made. Raises InputError for a text that is missing or too short."""
    folder.mkdir(parents=True, exist_ok=True)
    verdict = tuple(texts / name for name in VERDICT)
    for path in verdict:
        if not path.exists():
            raise InputError(f"texts {texts}: got no {path.name}, expected {', '.join([*CALIBRATION, *VERDICT])}")
    calibration = tuple(_cut(texts / name, *piece, folder / f"calibration-{name}") for name, piece in CALIBRATION.items())
    selection = tuple(_cut(texts / name, *piece, folder / f"selection-{name}") for name, piece in SELECTION.items())
    return Splits(calibration, selection, verdict)


def _cut(path: Path, start: int, stop: int, output: Path) -> Path:
    """Write the bytes start … stop of a text, to the next whole line at either end."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"text {path}: cannot be read ({error.strerror}), expected a folder with {', '.join([*CALIBRATION, *VERDICT])}") from error
    if len(data) < stop:
        raise InputError(f"text {path}: got {len(data):,} bytes, expected at least {stop:,}")
    first = data.index(b"\n", start) + 1 if start else 0
    output.write_bytes(data[first : data.index(b"\n", stop) + 1])
    return output
