"""The whole job on the demo model: imatrix, a balanced file, what it says, and how good it measurably is.

    python3 tools/demo.py [--output FOLDER]

Makes `.venv` by itself on a fresh machine; needs only the package registries. Takes about a minute once installed.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from environment import PYTHON, ROOT, enter_environment, run

DEMO_MODEL = ROOT / "tests" / "models" / "demo-llama"
PROMPT = "It was a cold evening, and the old man"


def say(path: Path) -> None:
    """Print what the finished file says after a prompt, run by llama-cpp-python."""
    from loopgguf.verify import speak

    print(f"\n{PROMPT} …{speak(path, PROMPT, 48)}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "demo-output", help="folder for the files made")
    output = parser.parse_args().output.resolve()
    enter_environment()
    start = time.monotonic()
    output.mkdir(parents=True, exist_ok=True)
    loopgguf = (PYTHON, "-m", "loopgguf.cli")
    imatrix, model = output / "demo-llama.imatrix.gguf", output / "demo-llama-balanced.gguf"
    run(*loopgguf, "imatrix", DEMO_MODEL, "-o", imatrix, "--overwrite")
    run(*loopgguf, "quantize", DEMO_MODEL, "--profile", "balanced", "--imatrix", imatrix, "-o", model, "--overwrite")
    say(model)
    run(*loopgguf, "evaluate", model, "--reference", DEMO_MODEL)
    print(f"demo done in {time.monotonic() - start:.0f} s; the files are in {output}")


if __name__ == "__main__":
    main()
