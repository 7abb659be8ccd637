"""Everything that must hold before a change lands: style, types, layers, tests, and the wheel used as a user would.

    python3 tools/check.py          # all of it
    python3 tools/check.py --fast   # without the slow tests, the real model and the wheel

Makes `.venv` by itself on a fresh machine; needs only the package registries. The real model comes from there too; where
it cannot be had, its tests are skipped, and pytest's last lines say why.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from environment import PYTHON, ROOT, ensure_environment, run

DEMO_MODEL = ROOT / "tests" / "models" / "demo-llama"


def check_wheel() -> None:
    """Build the wheel, install it into an empty folder, and run the main commands from there, outside the clone."""
    with tempfile.TemporaryDirectory(prefix="loopgguf-wheel-") as name:
        folder = Path(name)
        run(PYTHON, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder / "dist", ROOT)
        (wheel,) = (folder / "dist").glob("*.whl")
        site, work = folder / "site", folder / "work"
        run(PYTHON, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps", "--target", site, wheel)
        work.mkdir()
        options = {"cwd": work, "env": os.environ | {"PYTHONPATH": str(site), "XDG_CACHE_HOME": str(folder / "cache")}}
        inside = f"import loopgguf, pathlib; assert pathlib.Path(loopgguf.__file__).is_relative_to({str(site)!r}), loopgguf.__file__"
        run(PYTHON, "-c", inside, **options)
        command = (PYTHON, "-m", "loopgguf.cli")
        run(*command, "imatrix", DEMO_MODEL, "-o", "demo.imatrix.gguf", **options)
        run(*command, "quantize", DEMO_MODEL, "-o", "demo.gguf", "--imatrix", "demo.imatrix.gguf", **options)
        run(*command, "evaluate", "demo.gguf", "--reference", DEMO_MODEL, "--report", "demo", **options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="leave out the slow tests, the real model and the wheel")
    fast = parser.parse_args().fast
    ensure_environment()
    os.chdir(ROOT)
    start = time.monotonic()
    run(PYTHON, "-m", "ruff", "check", ".")
    run(PYTHON, "-m", "ruff", "format", "--check", ".")
    run(PYTHON, "-m", "mypy")
    run(PYTHON.with_name("lint-imports"))
    run(PYTHON, "tools/readme.py", "--check")
    run(PYTHON, "-m", "pytest", "-m", "not real", *([] if fast else ["--slow"]))
    if not fast:
        # the quick half: byte equality of all presets on the real model takes most of an hour (pytest -m real)
        run(PYTHON, "-m", "pytest", "-rs", "--real", "-m", "real and not slow")
        check_wheel()
    print(f"all checks passed in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
