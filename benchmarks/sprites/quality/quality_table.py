"""Tables of quality rows, and the comparison of two results.

A row is one output of one case, `variant/task/who/seed`. Means over the cases are computed here.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean

from scail2_rt.benchmarks.report.record import Results, Row
from scail2_rt.benchmarks.report.table import aligned
from scail2_rt.benchmarks.sprites.quality.trials import BASELINES, OURS

USUAL = "default"
COLUMNS = {  # value: heading, format
    "psnr": ("PSNR", "{:.2f}"),
    "ssim": ("SSIM", "{:.4f}"),
    "character_psnr": ("character PSNR", "{:.2f}"),
    "hidden_psnr": ("hidden PSNR", "{:.2f}"),
    "area": ("area", "{:.2f}"),
    "colour_error": ("colour ΔE", "{:.2f}"),
    "shape_error": ("shape 1-IoU", "{:.3f}"),
    "motion_px": ("motion px", "{:.2f}"),
    "mask_iou": ("mask IoU", "{:.3f}"),
    "exchanged": ("exchanged", "{:.3f}"),
    "drift_db": ("drift dB", "{:+.2f}"),
    "colour_drift": ("drift ΔE", "{:+.2f}"),
    "seam": ("seam", "{:.2f}"),
    "steady": ("elsewhere", "{:.2f}"),
}
LONG_NOTE = (
    "character PSNR in dB per segment; drift: last segment minus first; seam: error of the change at joins, in levels"
)
LONG_COLUMNS = ("drift_db", "colour_drift", "seam", "steady")
COMPARED = ("psnr", "character_psnr")
Means = dict[tuple[str, str, str], dict[str, float]]  # (variant, task, who) → value → mean; "cases": number of cases


@dataclass(frozen=True, slots=True)
class Difference:
    """The means of one value over the cases that both results have. name: variant/task; figure: the value."""

    name: str
    figure: str
    before: float
    after: float
    cases: int

    @property
    def change(self) -> float:
        return self.after - self.before


def key_of(row: Row) -> tuple[str, str, str, int]:
    """(variant, task, who, seed) of a row."""
    variant, task, who, seed = row.name.split("/")
    return variant, task, who, int(seed)


def means(rows: Iterable[Row]) -> Means:
    """The means of all values over the cases."""
    gathered: dict[tuple[str, str, str], dict[str, list[float]]] = {}
    for row in rows:
        if row.measured:
            figures = gathered.setdefault(key_of(row)[:3], {})
            for name, value in row.values.items():
                figures.setdefault(name, []).append(value)
    return {
        key: {"cases": len(figures["psnr"]), **{name: fmean(values) for name, values in figures.items()}}
        for key, figures in gathered.items()
    }


def shown(figures: Mapping[str, float]) -> dict[str, float]:
    """The values without those of single frames."""
    return {name: value for name, value in figures.items() if not name[-3:].isdigit()}


def above_baseline(found: Means, variant: str, task: str) -> float | None:
    """Character PSNR minus that of the better trivial baseline, in dB; None if one is missing. The baselines are rows
    of the default variant."""
    ours = found.get((variant, task, OURS))
    trivial = [found[key]["character_psnr"] for who in BASELINES if (key := (USUAL, task, who)) in found]
    return ours["character_psnr"] - max(trivial) if ours and trivial else None


def quality_table(results: Results) -> str:
    """All tables of a result: tasks, then long clips by segment, then variants with their difference to the default."""
    found = means(results.rows.values())
    usual = {key: figures for key, figures in found.items() if key[0] == USUAL}
    parts = [_task_table(usual, found)] if usual else []
    if long := {key: figures for key, figures in found.items() if "segment_1" in figures}:
        parts.append(_long_table(long))
    if others := {key: figures for key, figures in found.items() if key[0] != USUAL and "segment_1" not in figures}:
        parts.append(_variant_table(others, found))
    notes = [f"{row.name}: {row.failure or row.note}" for row in results.rows.values() if not row.measured]
    return "\n\n".join([*parts, *(["\n".join(notes)] if notes else [])])


def brief(row: Row) -> str:
    """One row as text, for the log of a running benchmark."""
    if not row.measured:
        return f"{row.name}: {row.failure or row.note}"
    cells = _cells(row.values, [name for name in COLUMNS if name in row.values])
    headings = [COLUMNS[name][0] for name in COLUMNS if name in row.values]
    return f"{row.name:36s} " + ", ".join(f"{h} {c}" for h, c in zip(headings, cells, strict=True))


def differences(before: Results, after: Results) -> list[Difference]:
    """The differences of the model's rows per variant and task, over the cases that both results have."""
    olds, news = ({key_of(row): row for row in r.rows.values() if row.measured} for r in (before, after))
    groups: dict[tuple[str, str], list[tuple[Row, Row]]] = {}
    for key, old in olds.items():
        variant, task, who, _ = key
        if who == OURS and key in news:
            groups.setdefault((variant, task), []).append((old, news[key]))
    found = []
    for (variant, task), pairs in groups.items():
        for figure in COMPARED:
            values = [
                (a.values[figure], b.values[figure]) for a, b in pairs if figure in a.values and figure in b.values
            ]
            if values:
                old_mean, new_mean = (fmean(side) for side in zip(*values, strict=True))
                found.append(Difference(f"{variant}/{task}", figure, old_mean, new_mean, len(values)))
    return found


def difference_table(found: Iterable[Difference], tolerance: float) -> str:
    """Differences as a text table. tolerance: largest accepted change, dB."""
    lines = [["", "figure", "before", "after", "change", "cases", ""]]
    for d in found:
        verdict = "same" if abs(d.change) <= tolerance else "DIFFERENT"
        cells = [d.name, d.figure, f"{d.before:.2f}", f"{d.after:.2f}", f"{d.change:+.2f} dB", str(d.cases), verdict]
        lines.append(cells)
    return "\n".join(aligned(lines))


def _cells(figures: Mapping[str, float], columns: Iterable[str]) -> list[str]:
    return [COLUMNS[name][1].format(figures[name]) if name in figures else "" for name in columns]


def _task_table(usual: Means, found: Means) -> str:
    used = [name for name in COLUMNS if any(name in figures for figures in usual.values())]
    used = [name for name in used if name not in LONG_COLUMNS]
    lines = [["task", "video", *(COLUMNS[name][0] for name in used), "above baseline", "cases"]]
    for (variant, task, who), figures in usual.items():
        above = above_baseline(found, variant, task) if who == OURS else None
        margin = "" if above is None else f"{above:+.2f} dB"
        lines.append([task, who, *_cells(figures, used), margin, f"{figures['cases']:.0f}"])
    return "\n".join(aligned(lines))


def _long_table(long: Means) -> str:
    most = max(sum(name.startswith("segment_") for name in figures) for figures in long.values())
    segments = [f"segment_{number}" for number in range(1, most + 1)]
    lines = [
        ["long clips", "video", *(f"segment {i}" for i in range(1, most + 1)), *(COLUMNS[n][0] for n in LONG_COLUMNS)]
    ]
    for (variant, task, who), figures in long.items():
        by_segment = [f"{figures[name]:.2f}" if name in figures else "" for name in segments]
        lines.append([f"{variant}/{task}", who, *by_segment, *_cells(figures, LONG_COLUMNS)])
    return "\n".join([*aligned(lines), LONG_NOTE])


def _variant_table(others: Means, found: Means) -> str:
    """One line per variant with means over its tasks, and the difference to the default variant on these tasks."""
    columns = ("psnr", "ssim", "character_psnr", "colour_error", "shape_error", "motion_px")
    lines = [["variant", *(COLUMNS[name][0] for name in columns), "to default", "tasks"]]
    for variant in dict.fromkeys(key[0] for key in others if key[2] == OURS):
        tasks = [key[1] for key in others if key[0] == variant and key[2] == OURS]
        figures = {name: fmean(others[variant, task, OURS][name] for task in tasks) for name in columns}
        usual = [found[USUAL, task, OURS]["character_psnr"] for task in tasks if (USUAL, task, OURS) in found]
        change = f"{figures['character_psnr'] - fmean(usual):+.2f} dB" if len(usual) == len(tasks) else ""
        lines.append([variant, *_cells(figures, columns), change, ", ".join(tasks)])
    return "\n".join(aligned(lines))
