"""Data sets of the Hugging Face hub → their files, one after another, in huggingface_hub's own cache.

Finds the files of a configuration and a split by their names, as data sets are laid out on the hub, and downloads each
only when it is asked for. HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE, HF_HUB_CACHE and HF_HOME count as they do for
huggingface_hub. Does not read the files, runs no loading scripts, and does not read the `configs` of a data set's card.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from loopgguf.errors import InputError, UsageError
from loopgguf.progress import Progress

PREFIX = "hf:"
_KINDS = (".parquet", ".jsonl", ".jsonl.gz", ".json.gz", ".json", ".txt", ".txt.gz")  # where a split comes in several, the first is read
_SPLITS = ("train", "validation", "valid", "val", "dev", "test")
_NOT_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "requirements.txt", "LICENSE.txt", "README.txt"}
_SYNTAX = re.compile(r"hf:(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^:\s]+))?(?::(?P<first>[^:\s]+))?(?::(?P<second>[^:\s]+))?")


@dataclass(frozen=True)
class Reference:
    """A data set as it was asked for. `parts`: configuration and split, or one of them, or neither.

    `is_joined`: its rows are the paragraphs of one running text rather than documents.
    """

    name: str
    repo: str
    revision: str = "main"
    parts: tuple[str, ...] = ()
    is_joined: bool = False


SHORT_NAMES = {
    "wikitext2": Reference("wikitext2", "Salesforce/wikitext", parts=("wikitext-2-raw-v1", "train"), is_joined=True),
    "c4": Reference("c4", "allenai/c4", parts=("en", "train")),
}


@dataclass(frozen=True)
class Dataset:
    """The files of one split, by their path in the repository; `revision` is the commit they were listed at."""

    reference: Reference
    revision: str
    files: tuple[str, ...]
    notes: tuple[str, ...] = ()


def parse_reference(text: str) -> Reference | None:
    """Return what `hf:owner/name[@revision][:config][:split]` or a short name refers to, None for any other text.

    Raises UsageError for what begins with `hf:` and goes on otherwise.
    """
    if text in SHORT_NAMES:
        return SHORT_NAMES[text]
    if not text.startswith(PREFIX):
        return None
    match = _SYNTAX.fullmatch(text)
    if match is None:
        raise UsageError(f"data set: got {text[:200]}, expected hf:owner/name[@revision][:config][:split] or one of {', '.join(SHORT_NAMES)}")
    parts = tuple(part for part in (match["first"], match["second"]) if part)
    return Reference(text, match["repo"], match["revision"] or "main", parts)


def open_dataset(reference: Reference) -> Dataset:
    """Return the files of a data set's split; asks the hub for the list, or the cache where the hub is not to be asked.

    Raises InputError when the data set is not there, gated, cannot be reached, or has no such configuration or split.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.constants import HF_HUB_OFFLINE

    notes: tuple[str, ...] = ()
    with _explained(reference):
        if HF_HUB_OFFLINE:
            folder = Path(snapshot_download(reference.repo, repo_type="dataset", revision=reference.revision, local_files_only=True))
            names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
            revision, notes = folder.name, (f"{reference.name}: HF_HUB_OFFLINE is set, only files in the cache were looked at",)
        else:
            info = HfApi().dataset_info(reference.repo, revision=reference.revision)
            names = [sibling.rfilename for sibling in info.siblings or ()]
            revision = info.sha or reference.revision
    return Dataset(reference, revision, choose_files(names, reference), notes)


def fetch_file(dataset: Dataset, file: str, progress: Progress | None = None) -> Path:
    """Return the path of one file of a data set in the cache, downloaded if need be. Raises InputError as `open_dataset`."""
    from huggingface_hub import hf_hub_download

    with _explained(dataset.reference):
        reference = dataset.reference
        bar = _bar_class(f"download {PurePosixPath(file).name}", progress)
        return Path(hf_hub_download(reference.repo, file, repo_type="dataset", revision=reference.revision, tqdm_class=bar))


def _bar_class(phase: str, progress: Progress | None) -> type[Any]:
    """Return a tqdm that tells `progress` instead of writing to the terminal."""
    from tqdm import tqdm

    class Bar(tqdm):  # type: ignore[misc]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            options.pop("name", None)  # huggingface_hub's own option
            super().__init__(*arguments, **{**options, "file": io.StringIO(), "leave": False, "disable": False})

        def display(self, msg: str | None = None, pos: int | None = None) -> None:
            if progress is not None and self.total:
                progress(phase, int(self.n), int(self.total))

    return Bar


# --- which files ------------------------------------------------------------------------------------------------------


def choose_files(names: Iterable[str], reference: Reference) -> tuple[str, ...]:
    """Return the data files of a configuration and split among the paths of a repository, sorted.

    A configuration is a folder, a file's name without endings, or how it begins (`en/c4-train….json.gz`); a split is a
    word in the path. Without a split "train" is taken, or all where no path has the word of any split. Raises
    InputError when there are none, or where several configurations are to choose from.
    """
    files = sorted(name for name in names if _kind(name) is not None and PurePosixPath(name).name not in _NOT_DATA)
    if not files:
        raise InputError(f"no data in {reference.name}: expected .parquet, .jsonl, .json or .txt files. Download it and give a file with -f")
    if any(PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts for name in files):
        raise InputError(f"wrong file names in {reference.name}: got a path that leads out of the data set, expected names inside it. Do not use this data set")
    files, split = _apply_parts(files, reference)
    files = _of_split(files, split, reference)
    best = min((kind for kind in map(_kind, files) if kind is not None), key=_KINDS.index)
    return tuple(name for name in files if _kind(name) == best)


def _kind(name: str) -> str | None:
    return next((kind for kind in _KINDS if name.endswith(kind)), None)


def _words(name: str) -> list[str]:
    return re.split(r"[/._-]", name)


def _folders(name: str) -> list[str]:
    """Return the folders of a path that may name a configuration."""
    return [part for part in PurePosixPath(name).parts[:-1] if part not in ("data", "default", *_SPLITS)]


def _configurations(name: str) -> list[str]:
    """Return the names of configurations that a file may belong to, folders first."""
    return [*_folders(name), PurePosixPath(name).name.removesuffix(_kind(name) or "")]


def _apply_parts(files: list[str], reference: Reference) -> tuple[list[str], str | None]:
    """Return the files of the configuration asked for, and the split asked for."""
    if not reference.parts:
        _refuse_choice(files, reference)
        return files, None
    first, *rest = reference.parts
    chosen = [name for name in files if first in _configurations(name) or (first == "default" and "/" not in name)]
    if chosen:
        return chosen, rest[0] if rest else None
    if rest:
        raise InputError(f"configuration of {reference.name}: got {first}, expected one of {_listed(c for name in files for c in _configurations(name))}")
    _refuse_choice(files, reference)
    return files, first


def _refuse_choice(files: Sequence[str], reference: Reference) -> None:
    folders = {folder for name in files for folder in _folders(name)[-1:]}
    if len(folders) > 1:
        raise InputError(f"configuration of {reference.name}: got none, expected one of {_listed(folders)}. Write hf:{reference.repo}:NAME")


def _of_split(files: list[str], split: str | None, reference: Reference) -> list[str]:
    splits = {word for name in files for word in _words(name) if word in _SPLITS}
    wanted = split or ("train" if splits else None)
    chosen = [name for name in files if wanted is None or wanted in _words(name) or wanted in PurePosixPath(name).parts]
    if not chosen:
        raise InputError(f"split of {reference.name}: got {split or 'none'}, expected one of {_listed(splits) or 'none: its files name no split'}")
    return chosen


def _listed(names: Iterable[str], n_shown: int = 12) -> str:
    unique = sorted(set(names))
    return ", ".join(unique[:n_shown]) + (f" and {len(unique) - n_shown} more" if len(unique) > n_shown else "")


# --- errors -----------------------------------------------------------------------------------------------------------


@contextmanager
def _explained(reference: Reference) -> Iterator[None]:
    """Turn what huggingface_hub raises into one line."""
    from huggingface_hub import constants
    from huggingface_hub import errors as hub

    transport_error: type[BaseException] = hub.HfHubHTTPError.__bases__[0]  # HTTPError of the HTTP library that is used
    where = f"data set {reference.repo} at {constants.ENDPOINT}"
    try:
        yield
    except hub.GatedRepoError as error:
        raise InputError(f"{where} is gated: got no access. Accept its terms on its page and set HF_TOKEN to a token of that account") from error
    except hub.RepositoryNotFoundError as error:
        raise InputError(f"{where} was not found, or is private: check the name, or set HF_TOKEN to a token that may read it") from error
    except hub.RevisionNotFoundError as error:
        raise InputError(f"{where} has no revision {reference.revision}: check the name after the @") from error
    except (hub.OfflineModeIsEnabled, hub.LocalEntryNotFoundError) as error:
        offline = constants.HF_HUB_OFFLINE
        why = "is not in the cache, and HF_HUB_OFFLINE is set. Unset it" if offline else "cannot be reached and is not in the cache. Check the connection"
        raise InputError(f"{where} {why}, or give files with -f") from error
    except hub.EntryNotFoundError as error:
        raise InputError(f"{where} lists a file that it does not have: try again, or name a revision with @") from error
    except hub.HfHubHTTPError as error:
        raise InputError(f"{where} answered {error.response.status_code}: {_first_line(error)}. Try again later") from error
    except hub.HFValidationError as error:
        raise UsageError(f"{reference.name} is no name of a data set: {_first_line(error)}") from error
    except (transport_error, OSError) as error:
        raise InputError(f"{where} cannot be reached: {_first_line(error)}. Check the connection, HF_ENDPOINT and the space on the disk") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160].rstrip(".")
