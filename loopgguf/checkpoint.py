"""What can be reused between runs: the user cache folder, by content key, published atomically.

Holds imatrix files, BF16 references and vocabulary proofs, each named by the fingerprint of everything it depends on,
so that an entry is either exactly right or absent. Not yet here: resumable jobs.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import platformdirs


def cache_folder() -> Path:
    """Return the folder for reusable results (`~/.cache/loopgguf` on Linux, honouring XDG_CACHE_HOME); it may not exist yet."""
    return Path(platformdirs.user_cache_dir("loopgguf", appauthor=False))


def content_key(*parts: object) -> str:
    """Return a short hash over JSON-able parts: the name of the cache entry that depends on exactly these."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def cache_path(kind: str, key: str, suffix: str) -> Path:
    """Return where the entry of this kind and key lies, or would lie; makes its folder."""
    folder = cache_folder() / kind
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{key}{suffix}"
