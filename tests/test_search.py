"""A plan made better by measuring: swaps are judged on chunks they have not seen, and the first plan stays where nothing is certain."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest

from loopgguf import search, workflow
from loopgguf.checkpoint import SEARCH, Job, job_folder
from loopgguf.container import read_gguf
from loopgguf.errors import Interrupted, UsageError
from loopgguf.errortable import Basis, ErrorTable, tilted
from loopgguf.evaluation import Measure, measure_quality
from loopgguf.feedback import Compensate
from loopgguf.formats import GgmlType
from loopgguf.importance import ImatrixRequest
from loopgguf.intent import GATE_BYTES, Search, resolve
from loopgguf.opening import cut_text
from loopgguf.planner import TypeRules, parse_overrides, plan_size
from loopgguf.presets import PRESETS
from loopgguf.protection import NOTHING_FOUND, Protection
from loopgguf.source import open_source
from loopgguf.super_weights import Mask, Spike, SuperWeight
from loopgguf.workflow import QuantizeRequest, Settings, quantize

pytestmark = pytest.mark.usefixtures("empty_cache")

SETTINGS = Settings(n_threads=1)
SIZE = 33_000


@pytest.fixture(scope="module")
def request_(texts: dict[str, Path]) -> QuantizeRequest:
    """A size between the types."""
    calibration = ImatrixRequest((texts["calibration"],), ctx_size=64, n_samples=40)
    return QuantizeRequest(size_bytes=SIZE, use_imatrix=False, calibration=calibration, search=Search(10, (texts["selection"],)))


def types_of(path: Path) -> dict[str, GgmlType]:
    return {tensor.name: tensor.type for tensor in read_gguf(path).tensors}


def judge(monkeypatch: pytest.MonkeyPatch, *differences: Measure) -> list[np.ndarray]:
    """Let the comparisons come to `differences`, the last one for all that follow; return the tokens that they are made on."""
    seen: list[np.ndarray] = []

    def difference(self: object, a: object, b: object, tokens: np.ndarray) -> Measure:
        seen.append(tokens)
        return differences[min(len(seen), len(differences)) - 1]

    monkeypatch.setattr(search._Search, "_difference", difference)
    return seen


BETTER, WORSE, UNSURE = Measure(-1.0, 0.1), Measure(1.0, 0.1), Measure(-1.0, 0.9)


def test_nothing_certain_leaves_the_plan(model: Path, request_: QuantizeRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches swaps that stay by chance, and trial files that stay for good."""
    first = quantize(model, tmp_path / "first.gguf", replace(request_, search=None, size_bytes=SIZE - GATE_BYTES), SETTINGS)
    seen = judge(monkeypatch, UNSURE)
    result = quantize(model, tmp_path / "out.gguf", request_, SETTINGS)
    assert len(seen) > 2
    assert types_of(tmp_path / "out.gguf") == types_of(tmp_path / "first.gguf")
    assert any("none is better than the plan" in note for note in result.notes)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{name}.gguf{end}" for name in ("first", "out") for end in ("", ".sha256")]
    assert result.total_bytes <= SIZE and first.total_bytes <= SIZE


def test_a_swap_that_is_certain_stays_and_is_confirmed(model: Path, request_: QuantizeRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a swap that is judged on the chunks that chose it, a confirmation on chunks that swaps have seen, and a larger file."""
    seen = judge(monkeypatch, BETTER, BETTER, WORSE)
    with monkeypatch.context() as patch:
        patch.setattr(search, "FACTORS", (64.0,))
        result = quantize(model, tmp_path / "out.gguf", request_, SETTINGS)
    few, rest = ({tuple(chunk) for chunk in tokens} for tokens in seen[:2])
    assert few.isdisjoint(rest)
    used = set().union(*({tuple(chunk) for chunk in tokens} for tokens in seen[:-1]))
    assert used.isdisjoint({tuple(chunk) for chunk in seen[-1]}), "the last chunks are new to all swaps"
    assert any("not confirmed" in note for note in result.notes)  # the last comparison says that it is worse

    monkeypatch.setattr(search._Search, "_preset", lambda self: None)
    monkeypatch.setattr(search._Search, "_tilts", lambda self: iter([("attn_q", 64.0)]))
    judge(monkeypatch, BETTER)
    better = quantize(model, tmp_path / "better.gguf", request_, SETTINGS)
    assert any("1 kept" in note and "not confirmed" not in note for note in better.notes)
    assert types_of(tmp_path / "better.gguf") != types_of(tmp_path / "out.gguf")
    assert better.total_bytes <= SIZE
    text = read_gguf(tmp_path / "better.gguf").metadata["loopgguf.selection.dataset"].data
    assert text == "selection.txt"


def test_the_best_preset_is_a_swap(model: Path, request_: QuantizeRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a file by size that is worse than the preset of that size, because the preset was only estimated."""
    preset = quantize(model, tmp_path / "preset.gguf", replace(request_, search=None, size_bytes=None, quant_type="Q4_0"), SETTINGS)
    monkeypatch.setattr(search._Search, "_tilts", lambda self: iter([]))
    judge(monkeypatch, BETTER)
    request = replace(request_, size_bytes=preset.total_bytes + GATE_BYTES)
    with monkeypatch.context() as patch:
        patch.setattr("loopgguf.planner.PRESETS", {"Q4_0": PRESETS["Q4_0"]})
        result = quantize(model, tmp_path / "out.gguf", request, SETTINGS)
    assert types_of(tmp_path / "out.gguf") == types_of(tmp_path / "preset.gguf")
    assert any(note.startswith("search: preset Q4_0: ") for note in result.notes)
    assert result.total_bytes <= preset.total_bytes + GATE_BYTES


def test_a_real_search_ends(model: Path, request_: QuantizeRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches measurements that are mixed up: of two files, of chunks, of the reference; and a prediction that is only an estimate."""
    monkeypatch.setattr(search, "FACTORS", (64.0,))
    result = quantize(model, tmp_path / "out.gguf", request_, SETTINGS)
    assert any(note.startswith("search: ") and "swaps tried" in note for note in result.notes)
    predicted = str(read_gguf(tmp_path / "out.gguf").metadata["loopgguf.selection.predicted_kld"].data)
    assert any(predicted in note for note in result.notes)
    chunks = cut_text(open_source(model), request_.search.files, "selection", search.SEARCH_CTX, None, SETTINGS)
    measured = measure_quality(tmp_path / "out.gguf", model, chunks.tokens, n_threads=1).mean_kld_nats.value
    assert 0.5 * measured < float(predicted.split(" ")[0]) < 2 * measured


def test_trials_lie_in_the_job_folder(model: Path, request_: QuantizeRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches trials above the current folder when no output is named, in a folder that is not there yet, and those of a killed run."""
    judge(monkeypatch, UNSURE)
    places: list[Path] = []
    write = search._Search._write

    def watched(self: search._Search, *arguments: object) -> object:
        file = write(self, *arguments)  # type: ignore[arg-type]
        places.append(file.path.absolute())
        return file

    monkeypatch.setattr(search._Search, "_write", watched)
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    quantize(model, None, request_, SETTINGS)
    output = tmp_path / "new" / "out.gguf"
    with monkeypatch.context() as patch:

        def killed(*_: object) -> NoReturn:
            patch.setattr(search.shutil, "rmtree", lambda *_arguments, **_more: None)
            raise KeyboardInterrupt

        patch.setattr(search._Search, "run", killed)
        with pytest.raises(KeyboardInterrupt):
            quantize(model, output, request_, SETTINGS)
    assert (job_folder(output) / SEARCH / "work" / "0.gguf").exists()
    quantize(model, output, request_, SETTINGS)
    assert {place.parents[3] for place in places} == {tmp_path / "cwd", tmp_path / "new"}
    assert sorted(path.name for path in output.parent.iterdir()) == ["out.gguf", "out.gguf.sha256"]


def stop_while_it_measures(self: search._Search, a: search._File, b: search._File, tokens: object) -> None:
    """As `_Search._difference`, with a signal that comes meanwhile."""
    self.job.should_stop = True
    self._measure([a, b], tokens)


def test_a_plan_that_was_found_is_not_searched_again(model: Path, request_: QuantizeRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a run stopped after its search that searches anew, finds another plan in other minutes, and refuses its own job; and a
    stop in the search that says that something is kept."""
    output, judged = tmp_path / "out.gguf", judge(monkeypatch, BETTER)
    monkeypatch.setattr(search._Search, "_preset", lambda self: None)
    monkeypatch.setattr(search._Search, "_tilts", lambda self: iter([("attn_q", 64.0)]))
    with monkeypatch.context() as patch:
        patch.setattr(search._Search, "_difference", stop_while_it_measures)
        with pytest.raises(Interrupted, match=r"at swap 1 .* searches anew"):
            quantize(model, output, request_, SETTINGS)
    assert not list(tmp_path.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(workflow, "publish", _raise(Interrupted("while it is written")))
        with pytest.raises(Interrupted, match="while it is written"):
            quantize(model, output, request_, SETTINGS)
    n_judged = len(judged)
    result = quantize(model, output, request_, SETTINGS)
    assert len(judged) == n_judged > 0
    assert any("1 kept" in note for note in result.notes)
    assert result.plan.intent.endswith("searched")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.gguf", "out.gguf.sha256"]


def _raise(error: BaseException) -> Callable[..., NoReturn]:
    def raising(*_arguments: object, **_more: object) -> NoReturn:
        raise error

    return raising


def test_no_swap_takes_the_type_of_a_super_weight(model: Path, request_: QuantizeRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a search whose plans forget what protection raised, or lower what keeps a super weight, beside a rule of the user's."""
    source = open_source(model)
    rules = TypeRules(parse_overrides(["ffn_up=Q5_0"]))
    request = replace(request_, rules=rules)
    resolved = resolve(source, request, SETTINGS)
    names = ("blk.0.ffn_down.weight", "blk.0.ffn_up.weight")
    weights = tuple(SuperWeight(name, None, 0, Spike(0, 0, 1.0, 9.0, 9.0, 9.0, 9.0, 1.0), 0, 1.0) for name in names)
    found = replace(NOTHING_FOUND, weights=weights)
    searched = replace(resolved, protection=Protection(found, Mask({}, 1e-4)))
    monkeypatch.setattr(search._Search, "_write", lambda *_: None)
    with Job(tmp_path / "job", {}) as job:
        tried = search._Search(source, searched, resolved.sized, request, model, np.zeros((12, 8), np.int32), SETTINGS, job)
    free = {request.tensor.name for request in tried.problem.requests}
    assert free.isdisjoint(names)
    assert "blk.0.ffn_gate.weight" in free
    planned = {row.name: row.type for row in resolved.plan.rows}
    plan = plan_size(tried.problem, tilted(tried.table, {"attn_q": 64.0}), SIZE, tried._file_bytes).plan
    assert {row.name: row.type for row in plan.rows if row.name in names} == {name: planned[name] for name in names}


def test_names_of_many_texts_do_not_exceed_the_size(model: Path, request_: QuantizeRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a size that the names of the selection texts exceed, though the plan has it."""
    assert request_.search is not None
    text = Path(request_.search.files[0]).read_text(encoding="utf-8")
    files = [tmp_path / f"{number}{'x' * 200}.txt" for number in range(6)]
    for number, file in enumerate(files):
        file.write_text(text[1000 * number : 1000 * (number + 1)], encoding="utf-8")
    judge(monkeypatch, UNSURE)
    result = quantize(model, tmp_path / "out.gguf", replace(request_, search=Search(1e-9, tuple(files))), SETTINGS)
    assert result.total_bytes == (tmp_path / "out.gguf").stat().st_size <= SIZE
    assert read_gguf(tmp_path / "out.gguf").metadata["loopgguf.selection.dataset"].data == f"{files[0].name}, {files[1].name}, and 4 more"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"size_bytes": None, "quant_type": "Q4_0"}, "give --size or --target-bpw"),
        ({"search": Search(0)}, "expected a number above 0"),
        ({"keep_split": True}, "--keep-split"),
    ],
)
def test_requests_that_contradict_themselves(model: Path, request_: QuantizeRequest, tmp_path: Path, change: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        quantize(model, tmp_path / "out.gguf", replace(request_, **change), SETTINGS)
    assert not list(tmp_path.iterdir())


def test_a_dry_run_says_that_it_searches_nothing(model: Path, request_: QuantizeRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a dry run whose types are taken for those that a search ends with, one that searches, and one that throws away a
    plan that was found for a file that is still to be written."""
    judge(monkeypatch, UNSURE)
    monkeypatch.setattr(search._Search, "_tilts", lambda self: iter([("attn_q", 64.0)]))
    with monkeypatch.context() as patch:
        patch.setattr(workflow, "publish", _raise(Interrupted("while it is written")))
        with pytest.raises(Interrupted, match="while it is written"):
            quantize(model, tmp_path / "out.gguf", request_, SETTINGS)
    found = job_folder(tmp_path / "out.gguf") / SEARCH / "shards" / "plan.json"
    assert found.exists()
    result = quantize(model, tmp_path / "out.gguf", replace(request_, dry_run=True), SETTINGS)
    assert [note for note in result.notes if note.startswith("search: ")] == ["search: a dry run measures nothing; types may be swapped within the same size"]
    assert found.exists()


def test_too_little_text(model: Path, request_: QuantizeRequest, tmp_path: Path) -> None:
    """Catches a search whose confirmation rests on a chunk or two."""
    assert request_.search is not None
    short = tmp_path / "short.txt"
    short.write_text(Path(request_.search.files[0]).read_text(encoding="utf-8")[:1500], encoding="utf-8")
    with pytest.raises(UsageError, match="expected at least 12"):
        quantize(model, tmp_path / "out.gguf", replace(request_, search=Search(1, (short,))), SETTINGS)


def test_predictions_are_the_estimate_times_what_files_have_more() -> None:
    """Catches a factor turned over, an arithmetic mean that one odd file moves, and an error of the mean taken for that of a file."""
    predicted = search.predict([(1.0, 2.0), (2.0, 4.0), (1.0, 1.0), (1.0, 4.0), (0.0, 1.0)], 3.0)
    assert predicted is not None and predicted.value == pytest.approx(6.0)
    assert predicted.standard_error == pytest.approx(6.0 * np.std([0, 0, -np.log(2), np.log(2)], ddof=1))
    assert search.predict([(1.0, 2.0)] * 2, 3.0) is None


@pytest.mark.parametrize(("compensate", "files"), [(Compensate.OFF, "files have"), (Compensate.FAST, "files with plain encoders have")])
def test_what_is_predicted_is_of_the_trials(
    compensate: Compensate, files: str, model: Path, request_: QuantizeRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a KLD of plain encoders that is foretold of a file with error feedback."""
    said: list[str] = []
    monkeypatch.setattr(search._Search, "_swaps", lambda self: iter([]))
    monkeypatch.setattr(search, "predict", lambda measured, estimate: Measure(0.25, 0.01))
    monkeypatch.setattr(workflow, "publish", lambda *arguments, **_: said.extend(arguments[4]))
    quantize(model, tmp_path / "out.gguf", replace(request_, compensate=compensate), SETTINGS)
    assert [note for note in said if "0.25 ± 0.01 nats are predicted" in note and note.startswith(f"search: {files} ")]


@pytest.mark.parametrize("factor", [0.5, 3.0])
def test_a_kld_that_was_asked_for_is_measured(factor: float, model: Path, request_: QuantizeRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a size that rests on the estimate alone, a file above the target where a later one is not, one file measured
    again and again, and files left in the job folder."""
    source = open_source(model)
    resolved = resolve(source, request_, SETTINGS)
    with Job(tmp_path / "job", {}) as job:
        aiming = search._Search(source, resolved, resolved.sized, request_, model, np.zeros((12, 8), np.int32), SETTINGS, job)
        aiming.table = ErrorTable({name: replace(row, basis=Basis.GRADIENTS) for name, row in aiming.table.rows.items()})
        start = aiming.estimate(resolved.plan)
        monkeypatch.setattr(search._Search, "_kld", lambda self, file: Measure(factor * start * (self.estimate(file.plan) / start) ** 0.8, 1e-6))
        target = 0.7 * start
        plan = aiming.aim(aiming.run(0), target)
        assert aiming.aimed is not None and "not reached" not in aiming.aimed[0]
        assert 0.9 * target < aiming.aimed[1].value <= target
        assert aiming.aimed[1] == Measure(factor * start * (aiming.estimate(plan) / start) ** 0.8, 1e-6)
        assert plan.intent == f"{resolved.plan.intent}, searched"  # not the size that it came to
        assert len(list(job.work.glob("*.gguf"))) == 1
        aiming.first = aiming.best = aiming._write(resolved.plan, None)
        aiming.aim(aiming.first.plan, 1000 * start)
        assert " by 2 files" in aiming.aimed[0], "the smallest file is measured once"
        with pytest.raises(UsageError, match=r"--target-kld 1e-12: files have .* times their estimated KLD"):
            aiming.aim(plan, 1e-12)
