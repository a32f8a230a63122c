"""Results as text, one line per row."""

from collections.abc import Iterable, Sequence

from scail2_rt.benchmarks.report.record import Row

_COLUMNS = (  # key in `Row.values`, heading, format
    ("tflops", "TFLOP/s", "{:.0f}"),
    ("tbytes_s", "TB/s", "{:.2f}"),
    ("percent_of_ceiling", "% ceiling", "{:.0f}"),
    ("error", "error", "{:.4f}"),
    ("worst_cosine", "cosine", "{:.3f}"),
    ("allocator_peak_gib", "alloc GiB", "{:.1f}"),
    ("driver_peak_gib", "driver GiB", "{:.1f}"),
)
_SHOWN = {name for name, _, _ in _COLUMNS}
_HIDDEN = {"flops", "bytes", "mean_cosine"}  # used only by the report's plots


def seconds(value: float) -> str:
    """A time as text, in s or ms."""
    return f"{value:.3f} s" if value >= 1 else f"{1000 * value:.3f} ms"


def line(row: Row) -> str:
    """One row as text, for the log of a running benchmark."""
    if row.failure:
        return f"{row.name:44s} FAILED: {row.failure}"
    parts = []
    if row.timing:
        parts.append(f"{seconds(row.timing.median_s)} ±{50 * row.timing.spread:.1f} %")
    headings = {name: (heading, form) for name, heading, form in _COLUMNS}
    for key, value in row.values.items():
        if key in _HIDDEN:
            continue
        heading, form = headings.get(key, (key, "{:.4g}"))
        parts.append(f"{heading} {form.format(value)}")
    if row.note:
        parts.append(row.note)
    return f"{row.name:44s} {', '.join(parts)}"


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Align cells in columns: the first left, the last not at all, all others right."""
    widths = [max(len(cells[i]) for cells in lines) for i in range(len(lines[0]) - 1)]
    text = []
    for first, *middle, last in lines:
        cells = [first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(middle, widths[1:], strict=True)), last]
        text.append("  ".join(cells).rstrip())
    return text


def table(rows: Iterable[Row]) -> str:
    """All rows as an aligned table. Values without a column follow as text."""
    rows = list(rows)
    used = [column for column in _COLUMNS if any(column[0] in row.values for row in rows)]
    lines = [["", "median", "spread", *(heading for _, heading, _ in used), ""]]
    for row in rows:
        cells = [row.name + (" *" if row.kind == "baseline" else "")]
        cells += [seconds(row.timing.median_s), f"{100 * row.timing.spread:.1f} %"] if row.timing else ["", ""]
        cells += [form.format(row.values[name]) if name in row.values else "" for name, _, form in used]
        rest = [f"{key} {value:.4g}" for key, value in row.values.items() if key not in _SHOWN | _HIDDEN]
        cells.append(f"FAILED: {row.failure}" if row.failure else ", ".join([*rest, *([row.note] if row.note else [])]))
        lines.append(cells)
    text = aligned(lines)
    if any(row.kind == "baseline" for row in rows):
        text.append("* baseline, in the same run")
    return "\n".join(text)
