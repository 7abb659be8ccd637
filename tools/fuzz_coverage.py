"""One parser under atheris, which mutates the seeds led by what they cover; run by `fuzz.py --atheris`.

    python tools/fuzz_coverage.py PARSER SECONDS FOLDER

A program of its own, for the modules must be instrumented while they are imported. Ends with 0 when nothing was found;
else libFuzzer keeps the input in FOLDER and prints the cause. Needs `pip install 'loopgguf[fuzz]'`.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["loopgguf"]):
    from fuzz_targets import MAX_SEED_BYTES, PARSERS, check_one, lay_out


def main(name: str, seconds: str, findings: Path) -> None:
    """Fuzz until the time is over or something is found; libFuzzer ends the process."""
    warnings.simplefilter("error")
    warnings.simplefilter("ignore", ResourceWarning)  # llama_cpp leaves /dev/null open
    parser = PARSERS[name]
    seeds = parser.seeds()
    scratch, corpus = (Path(tempfile.mkdtemp(prefix=f"fuzz-{kind}-")) for kind in ("scratch", "corpus"))
    folders = lay_out(scratch, seeds)
    for i, seed in enumerate(seeds):
        (corpus / str(i)).write_bytes(bytes((i,)) + seed.valid)

    def check(data: bytes) -> None:
        which = data[0] % len(seeds) if data else 0  # the first byte says which file it stands for
        check_one(parser, folders[which], seeds[which], data[1:])

    limits = [f"-max_total_time={seconds}", "-timeout=5", "-rss_limit_mb=2048", f"-max_len={MAX_SEED_BYTES}"]
    atheris.Setup([sys.argv[0], *limits, f"-artifact_prefix={findings}/{name}-", str(corpus)], check)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
