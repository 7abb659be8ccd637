"""A report's JSON → Markdown and a single HTML page: the arithmetic of its charts, and the templates that draw them.

Reads the document and nothing else; the page loads nothing, and runs no script but its own (a Content-Security-Policy
says so to the browser). Names and generated text come from files that anyone may have made: everything is escaped by
jinja2, control characters are shown as �.
"""

from __future__ import annotations

import base64
import hashlib
import html
import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from loopgguf.report import PERCENT_LABELS

Document = dict[str, Any]

# Roles in the order in which data flows; others follow by name
_ROLE_ORDER = ("attn_q", "attn_k", "attn_v", "attn_qkv", "attn_output", "ffn_gate_inp", "ffn_gate", "ffn_up", "ffn_down")
# The steps of the colour scale: the largest bits per weight of each, and what lies there
BIT_STEPS = ((2.0, "≤ 2"), (2.7, "≤ 2.7"), (3.5, "≤ 3.5"), (4.5, "≤ 4.5"), (5.5, "≤ 5.5"), (7.0, "≤ 7"), (9.0, "≤ 9"), (math.inf, "16, 32"))
N_COLOURS = 8  # files after that are drawn grey
MAX_MAP_CELLS = 20_000
MAX_LABEL = 32  # characters
MAX_LINEAR_RATIO = 8  # of the numbers on a linear axis
WIDTH, HEIGHT = 600, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 20, 14, 52
_LABEL_HEIGHT, _LABEL_CHARACTER = 19, 9.5  # as large as a phone shows them
_LABEL_OFFSETS = sorted((i / 2 for i in range(-8, 9)), key=abs)  # of a label from its point, in label heights; the nearest first


# --- numbers as text --------------------------------------------------------------------------------------------------


def measure_text(measure: Document | None, n_digits: int = 4, unit: str = "") -> str:
    """Return a measure of the document as `value ± standard error`; why it is left out where it is."""
    if measure is None:
        return "–"
    if "omitted" in measure:
        return f"left out: {measure['omitted']}"
    error = "" if measure["standard_error"] is None else f" ± {measure['standard_error']:.{n_digits}f}"
    return f"{measure['value']:.{n_digits}f}{error}{unit}"


def megabytes(n_bytes: float) -> str:
    """Return bytes in the decimal unit that suits them."""
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if n_bytes >= limit:
            return f"{n_bytes / limit:.2f} {unit}"
    return f"{n_bytes:.0f} B"


def ratio_text(file: Document) -> str:
    """Return the ratio of a file's mean KLD to the baseline's with its interval."""
    if file["to_baseline"] is None:
        return "baseline"
    ratio, interval = file["to_baseline"]["mean_kld_ratio"], file["to_baseline"]["mean_kld_ratio_interval"]
    if ratio is None:
        return "–"
    return f"{ratio['value']:.3f}" + (f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "")


# --- charts -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tick:
    """A place on an axis, in the chart's own units, and what is written there."""

    at: float
    text: str


@dataclass(frozen=True)
class Mark:
    """A point to be pointed at: where, the text of its tooltip, and the label drawn beside it, if any."""

    x: float
    y: float
    tip: str
    label: str = ""
    label_x: float = 0.0
    label_y: float = 0.0
    anchor: str = "start"


@dataclass(frozen=True)
class Series:
    """Marks of one colour (`colour` counts the files), and the line through `path`, if there is one."""

    name: str
    colour: str
    path: str
    marks: tuple[Mark, ...]


@dataclass(frozen=True)
class Chart:
    """A chart ready to be drawn in WIDTH × HEIGHT units."""

    title: str
    x_label: str
    y_label: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    series: tuple[Series, ...]


class Axis:
    """Numbers → places between two ends, linear or logarithmic, with ticks at round numbers."""

    def __init__(self, values: Sequence[float], start: float, end: float, *, is_log: bool = False, from_zero: bool = False) -> None:
        self.start, self.end, self.is_log = start, end, is_log
        low, high = min(values), max(values)
        self.low: float
        self.high: float
        if is_log:
            steps = [math.log10(factor) + power for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1) for factor in (1, 2, 5)]
            self.low = max(step for step in steps if step <= math.log10(low) + 1e-9)
            self.high = min(step for step in steps if step > max(math.log10(high) - 1e-9, self.low))
        else:
            low = 0.0 if from_zero else low
            margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
            self.low, self.high = low if from_zero else low - margin, high + margin

    def __call__(self, value: float) -> float:
        share = ((math.log10(value) if self.is_log else value) - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)

    def _values(self) -> list[float]:
        if self.is_log:
            few = self.high - self.low <= 2
            return [factor * 10.0**power for power in range(math.floor(self.low), math.floor(self.high) + 1) for factor in ((1, 2, 5) if few else (1,))]
        raw = (self.high - self.low) / 5
        power = 10.0 ** math.floor(math.log10(raw))
        step = power * next(factor for factor in (1, 2, 5, 10) if factor * power >= raw)
        return [step * i for i in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]

    def ticks(self, unit: float = 1.0) -> tuple[Tick, ...]:
        """Return the ticks; numbers are written in multiples of `unit`."""
        inside = [value for value in self._values() if not self.is_log or self.low - 1e-9 <= math.log10(value) <= self.high + 1e-9]
        return tuple(Tick(self(value), f"{value / unit:.3g}") for value in inside)


def _x_axis(values: Sequence[float], *, is_log: bool = False) -> Axis:
    return Axis(values, _LEFT, WIDTH - _RIGHT, is_log=is_log)


def _y_axis(values: Sequence[float], **kind: bool) -> Axis:
    return Axis(values, HEIGHT - _BOTTOM, _TOP, **kind)


def _path(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x},{y}" for x, y in points)


def _colour(index: int) -> str:
    return f"c{index}" if index < N_COLOURS else "other"


def _place_labels(marks: Sequence[Mark]) -> list[Mark]:
    """Return the marks with places for their labels, beside the point and clear of one another; where there is no room, the
    label is dropped, and the tooltip has it."""
    taken: list[tuple[float, float, float]] = []
    placed = []
    for mark in marks:
        width = _LABEL_CHARACTER * len(mark.label)
        is_right = mark.x + 10 + width <= WIDTH - 4
        left = mark.x + 10 if is_right else mark.x - 10 - width
        heights = [mark.y + 4 + offset * _LABEL_HEIGHT for offset in _LABEL_OFFSETS]
        inside = [y for y in heights if _TOP <= y <= HEIGHT - _BOTTOM - 4]
        free = [y for y in inside if all(left + width < a or left > b or abs(y - other) >= _LABEL_HEIGHT for a, b, other in taken)]
        if not free:
            placed.append(replace(mark, label=""))
            continue
        taken.append((left, left + width, free[0]))
        at = left if is_right else left + width
        placed.append(replace(mark, label_x=round(at, 1), label_y=round(free[0], 1), anchor="start" if is_right else "end"))
    return placed


def short_labels(names: Sequence[str]) -> list[str]:
    """Return the names without folder, `.gguf` and the words (up to a hyphen) that all of several begin with, cut where long."""
    stems = [name.rsplit("/", 1)[-1].removesuffix(".gguf") for name in names]
    if len(set(stems)) < len(stems):
        stems = [name.removesuffix(".gguf") for name in names]
    n_same = min(shared_prefix(stem, stems[0]) for stem in stems) if len(stems) > 1 else 0
    n_common = stems[0].rfind("-", 0, n_same) + 1
    shown = [stem[n_common:] for stem in stems]
    return [label if len(label) <= MAX_LABEL else label[: MAX_LABEL - 1] + "…" for label in shown]


def size_chart(files: Sequence[Document]) -> Chart | None:
    """Return size against mean KLD with a line through the files that none other beats; None when all KLDs are 0."""
    shown = [(i, file) for i, file in enumerate(files) if file["measured"]["Mean KLD"]["value"] > 0]
    if not shown:
        return None
    klds = [file["measured"]["Mean KLD"]["value"] for _, file in shown]
    sizes = [file["bytes"] for _, file in shown]
    unit, unit_name = (1e9, "GB") if max(sizes) >= 1e9 else (1e6, "MB")
    x, y = _x_axis(sizes), _y_axis(klds, is_log=True)
    marks, labels = [], short_labels([file["name"] for file in files])
    for i, file in shown:
        kld = file["measured"]["Mean KLD"]
        tip = f"{file['name']}: {megabytes(file['bytes'])} ({file['bpw']:.3f} bits per weight), mean KLD {measure_text(kld, 5)} nats"
        marks.append(Mark(x(file["bytes"]), y(kld["value"]), tip, labels[i]))
    series = [Series(file["name"], _colour(i), "", (mark,)) for (i, file), mark in zip(shown, _place_labels(marks), strict=True)]
    best = [(mark.x, mark.y) for (_, file), mark in zip(shown, marks, strict=True) if file["is_pareto"]]
    line = Series("Pareto line", "pareto", _path(best), ())
    return Chart("Size against mean KLD", f"size ({unit_name})", "mean KLD (nats, logarithmic)", x.ticks(unit), y.ticks(), (line, *series))


def _line(file: Document, index: int, points: Sequence[tuple[float, float, str]]) -> Series:
    marks = tuple(Mark(x, y, f"{file['name']}: {tip}") for x, y, tip in points)
    return Series(file["name"], _colour(index), _path([(x, y) for x, y, _ in points]), marks)


def histogram_chart(files: Sequence[Document]) -> Chart | None:
    """Return the share of tokens by KLD (logarithmic bins), a line per file; None when no KLD is large enough for a bin."""
    used = [i for file in files for i, count in enumerate(file["kld_histogram"]["counts"]) if count]
    if not used:
        return None
    edges, bins = files[0]["kld_histogram"]["edges_nats"], range(min(used), max(used) + 1)
    shares = {id(file): [100 * file["kld_histogram"]["counts"][i] / sum_tokens(file) for i in bins] for file in files}
    x, y = _x_axis([edges[bins[0]], edges[bins[-1] + 1]], is_log=True), _y_axis([s for row in shares.values() for s in row], from_zero=True)
    series = []
    for index, file in enumerate(files):
        tips = [f"{share:.2f} % of tokens between {edges[i]:.3g} and {edges[i + 1]:.3g} nats" for i, share in zip(bins, shares[id(file)], strict=True)]
        places = [x(math.sqrt(edges[i] * edges[i + 1])) for i in bins]
        series.append(_line(file, index, list(zip(places, map(y, shares[id(file)]), tips, strict=True))))
    return Chart("Distribution of KLD over tokens", "KLD of a token (nats, logarithmic)", "% of tokens", x.ticks(), y.ticks(), tuple(series))


def sum_tokens(file: Document) -> int:
    """Return how many tokens a file's histogram counts."""
    histogram = file["kld_histogram"]
    return int(sum(histogram["counts"]) + histogram["n_below"] + histogram["n_above"])


def _kld_axis(klds: Sequence[float]) -> tuple[Axis, str]:
    """Return the axis of mean KLDs and its name: logarithmic where they differ so much that small ones would not be told apart."""
    if min(klds) > 0 and max(klds) > MAX_LINEAR_RATIO * min(klds):
        return _y_axis(klds, is_log=True), "mean KLD (nats, logarithmic)"
    return _y_axis(klds, from_zero=True), "mean KLD (nats)"


def position_chart(files: Sequence[Document]) -> Chart:
    """Return mean KLD by position in the context, a line per file."""
    rows = [file["kld_by_position"] for file in files]
    middles = [(part["first"] + part["last"]) / 2 for part in rows[0]]
    x, (y, y_label) = _x_axis(middles), _kld_axis([part["mean_kld_nats"] for row in rows for part in row])
    series = []
    for index, (file, row) in enumerate(zip(files, rows, strict=True)):
        error = [f" ± {part['standard_error']:.5f}" if part["standard_error"] is not None else "" for part in row]
        tips = [f"positions {p['first']} to {p['last']}: mean KLD {p['mean_kld_nats']:.5f}{e} nats" for p, e in zip(row, error, strict=True)]
        series.append(_line(file, index, [(x(at), y(part["mean_kld_nats"]), tip) for at, part, tip in zip(middles, row, tips, strict=True)]))
    return Chart("Mean KLD by position", "position in the context", y_label, x.ticks(), y.ticks(), tuple(series))


def chunk_chart(files: Sequence[Document]) -> Chart:
    """Return mean KLD by chunk of text, a line per file."""
    rows = [file["kld_by_chunk_nats"] for file in files]
    x, (y, y_label) = _x_axis([0, len(rows[0]) - 1]), _kld_axis([kld for row in rows for kld in row])
    series = [
        _line(file, index, [(x(i), y(kld), f"chunk {i}: mean KLD {kld:.5f} nats") for i, kld in enumerate(row)])
        for index, (file, row) in enumerate(zip(files, rows, strict=True))
    ]
    ticks = tuple(tick for tick in x.ticks() if tick.text.isdigit())
    return Chart("Mean KLD by chunk", "chunk of the text", y_label, ticks, y.ticks(), tuple(series))


def _layer_chart(files: Sequence[Document], title: str, y_label: str, rows: Sequence[Sequence[tuple[int, float, str]]]) -> Chart | None:
    """Return a number above 0 (layer, number, tooltip) by layer, logarithmic, a line per file; None when no file has any."""
    numbers = [number for row in rows for _, number, _ in row]
    if not numbers:
        return None
    x, y = _x_axis([layer for row in rows for layer, _, _ in row]), _y_axis(numbers, is_log=True)
    series = [
        _line(file, index, [(x(layer), y(number), f"block {layer}: {tip}") for layer, number, tip in row])
        for index, (file, row) in enumerate(zip(files, rows, strict=True))
        if row
    ]
    ticks = tuple(tick for tick in x.ticks() if tick.text.isdigit())
    return Chart(title, "block", f"{y_label} (logarithmic)", ticks, y.ticks(), tuple(series))


def weight_errors(file: Document) -> dict[int, float]:
    """Return the relative error of a file's weights by layer, the mean over those that were measured."""
    sums: dict[int, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for tensor in file["tensors"]:
        if tensor["error"] is not None and tensor["layer"] is not None:
            n = math.prod(tensor["shape"])
            sums[tensor["layer"]][0] += n * tensor["error"]["relative_error"]
            sums[tensor["layer"]][1] += n
    return {layer: lost / n for layer, (lost, n) in sorted(sums.items())}


def layer_charts(files: Sequence[Document]) -> list[Chart]:
    """Return what was measured by layer: error of weights, error and distance of the blocks' outputs; numbers of 0 are not drawn."""
    weights = [[(layer, error, f"relative error {error:.4g}") for layer, error in weight_errors(file).items() if error] for file in files]
    blocks = [
        [(block["layer"], block["relative_error"]["value"], f"relative error {measure_text(block['relative_error'], 6)}") for block in file["layers"]]
        for file in files
    ]
    distances = [
        [(block["layer"], 1 - block["cosine"]["value"], f"cosine similarity {measure_text(block['cosine'], 6)}") for block in file["layers"]] for file in files
    ]
    charts = [
        _layer_chart(files, "Error of the weights by block", "‖ŵ − w‖² ÷ ‖w‖²", weights),
        _layer_chart(files, "Error of the blocks' outputs", "‖ŷ − y‖² ÷ ‖y‖²", [[point for point in row if point[1] > 0] for row in blocks]),
        _layer_chart(files, "Cumulative similarity by depth", "1 − cosine similarity", [[point for point in row if point[1] > 0] for row in distances]),
    ]
    return [chart for chart in charts if chart is not None]


# --- the map of types -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """A place of the map: its step of the colour scale, the bits written in it, and the text of its tooltip."""

    step: int
    text: str
    tip: str


@dataclass(frozen=True)
class TypeMap:
    """Layers × roles of one file; `rest` are the matrices outside the layers, `left_out` says what is not shown."""

    layers: tuple[int, ...]
    rows: tuple[tuple[str, tuple[Cell | None, ...]], ...]
    rest: tuple[tuple[str, Cell], ...]
    left_out: str


def _step(bpw: float) -> int:
    return next(i for i, (most, _) in enumerate(BIT_STEPS) if bpw <= most)


def _error_text(tensor: Document) -> str:
    error = tensor["error"]
    return "" if error is None or error["snr_db"] is None else f", relative error {error['relative_error']:.3g} (SNR {error['snr_db']:.1f} dB)"


def _cell(tensors: Sequence[Document]) -> Cell:
    tip = "; ".join(
        f"{t['name']}: {t['type']}, {t['bpw']:.4g} bits per weight, {' × '.join(map(str, t['shape']))}, {t['n_bytes']:,} bytes{_error_text(t)}" for t in tensors
    )
    bpw = tensors[0]["bpw"]
    return Cell(_step(bpw), f"{bpw:.1f}" if bpw < 16 else f"{bpw:.0f}", tip)


def _by_role(role: str) -> tuple[int, str]:
    return _ROLE_ORDER.index(role) if role in _ROLE_ORDER else len(_ROLE_ORDER), role


def type_map(file: Document) -> TypeMap:
    """Return the map of a file's matrices; vectors (norms, biases) are counted, not drawn."""
    matrices = [tensor for tensor in file["tensors"] if len(tensor["shape"]) > 1]
    vectors = [tensor for tensor in file["tensors"] if len(tensor["shape"]) <= 1]
    places: dict[tuple[str, int], list[Document]] = defaultdict(list)
    for tensor in matrices:
        if tensor["layer"] is not None:
            places[tensor["role"], tensor["layer"]].append(tensor)
    roles, layers = sorted({role for role, _ in places}, key=_by_role), tuple(sorted({layer for _, layer in places}))
    left_out = f"{len(vectors)} vectors (norms, biases), {sum(tensor['n_bytes'] for tensor in vectors):,} bytes, are not in the map." if vectors else ""
    if len(roles) * len(layers) > MAX_MAP_CELLS:
        return TypeMap((), (), (), f"The map is left out: {len(roles)} roles in {len(layers)} layers are too many to draw. {left_out}")
    rows = tuple((role, tuple(_cell(places[role, layer]) if (role, layer) in places else None for layer in layers)) for role in roles)
    return TypeMap(layers, rows, tuple((t["role"], _cell([t])) for t in matrices if t["layer"] is None), left_out)


def role_rows(file: Document) -> list[Document]:
    """Return bytes by role, the largest first: {role, n_tensors, n_bytes, bpw, types, share and
    share_of_largest (percent), step (of the colours)}."""
    by_role: dict[str, list[Document]] = defaultdict(list)
    for tensor in file["tensors"]:
        by_role[tensor["role"] if len(tensor["shape"]) > 1 else "vectors"].append(tensor)
    total = sum(tensor["n_bytes"] for tensor in file["tensors"])
    rows = []
    for role, tensors in by_role.items():
        n_bytes, n_weights = sum(t["n_bytes"] for t in tensors), sum(math.prod(t["shape"]) for t in tensors)
        types = ", ".join(sorted({t["type"] for t in tensors}))
        share, bpw = 100 * n_bytes / total, 8 * n_bytes / n_weights
        rows.append({"role": role, "n_tensors": len(tensors), "n_bytes": n_bytes, "bpw": bpw, "types": types, "share": share, "step": _step(bpw)})
    largest = max(row["n_bytes"] for row in rows)
    return sorted(({**row, "share_of_largest": 100 * row["n_bytes"] / largest} for row in rows), key=lambda row: -row["n_bytes"])


def worst_tensors(file: Document, n: int = 10) -> list[Document]:
    """Return the tensors that have lost most of themselves, of those that were measured, the worst first."""
    measured = [tensor for tensor in file["tensors"] if tensor["error"] is not None]
    return sorted(measured, key=lambda tensor: -tensor["error"]["relative_error"])[:n]


# --- rendering --------------------------------------------------------------------------------------------------------


def _visible(value: object) -> object:
    """Show control characters of a text (they are not allowed in a page) as �; leave everything else."""
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", "\ufffd", value)


def _inline(value: object) -> Markup:
    """Return a text as it can stand in a line or a cell of Markdown, saying only itself."""
    text = html.escape(" ".join(str(_visible(str(value))).split()), quote=False)
    return Markup(re.sub(r"([\\`*_\[\]|~#])", r"\\\1", text))


def _block(value: str) -> Markup:
    """Return a text as an indented block of Markdown, which no content can end."""
    return Markup("\n".join(f"    {line}" for line in str(_visible(value)).splitlines() or [""]))


def shared_prefix(text: str | None, reference: str | None) -> int:
    """Return how many characters two texts share at their start."""
    pairs = zip(text or "", reference or "", strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(text or ""), len(reference or "")))


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("loopgguf", "templates"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_visible
    )
    environment.filters |= {"measure": measure_text, "megabytes": megabytes, "ratio": ratio_text, "inline": _inline, "block": _block}
    environment.globals |= {
        "type_map": type_map,
        "role_rows": role_rows,
        "shared_prefix": shared_prefix,
        "bit_steps": BIT_STEPS,
        "sum_tokens": sum_tokens,
        "worst_tensors": worst_tensors,
        "percent_labels": PERCENT_LABELS,
    }
    return environment


def _asset(environment: Environment, name: str) -> Markup:
    """Return a file of the package that goes into the page as it is."""
    assert environment.loader is not None
    return Markup(environment.loader.get_source(environment, name)[0])


def render_markdown(document: Document) -> str:
    """Return the report as Markdown."""
    return _environment().get_template("report.md.j2").render(document=document)


def render_html(document: Document) -> str:
    """Return the report as one HTML page that needs nothing else."""
    environment, files = _environment(), document["files"]
    style, script = _asset(environment, "report.css"), _asset(environment, "report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("report.html.j2").render(
        document=document,
        style=style,
        script=script,
        script_digest=digest,
        size_chart=size_chart(files),
        quality_charts=[chart for chart in (histogram_chart(files), position_chart(files), chunk_chart(files)) if chart is not None],
        layer_charts=layer_charts(files),
        chart_size=(WIDTH, HEIGHT),
        chart_box={"left": _LEFT, "right": WIDTH - _RIGHT, "top": _TOP, "bottom": HEIGHT - _BOTTOM},
        colours=[_colour(i) for i in range(len(files))],
        labels=short_labels([file["name"] for file in files]),
    )
