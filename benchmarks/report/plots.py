"""The two plots of the HTML page as SVG text: stacked bars of time, and a roofline. Needs no plotting library."""

import math
from collections.abc import Mapping, Sequence
from html import escape

COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#a463f2", "#97bbf5", "#9c6b4e", "#9498a0")
WIDTH, LEFT, RIGHT = 960, 250, 90
BAR, GAP = 26, 12


def text(x: float, y: float, content: str, anchor: str = "start", size: int = 12) -> str:
    """An SVG text element."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">{escape(content)}</text>'


def svg(width: int, height: int, parts: Sequence[str]) -> str:
    """An SVG document of these elements."""
    style = 'font-family="sans-serif" style="background:#fff;max-width:100%"'
    inner = "\n".join(parts)
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" {style}>\n{inner}\n</svg>'


def stacked_bars(bars: Mapping[str, Mapping[str, float]]) -> str:
    """Stacked bars as SVG. bars: bar name → part → seconds. All bars share one scale; each ends with its total."""
    names = sorted({part for parts in bars.values() for part in parts}, key=lambda part: _rank(part, bars))
    colour = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    longest = max((sum(parts.values()) for parts in bars.values()), default=1.0) or 1.0
    scale = (WIDTH - LEFT - RIGHT) / longest
    out, y = [], 10.0
    for bar, parts in bars.items():
        out.append(text(LEFT - 8, y + BAR * 0.7, bar, "end"))
        x = float(LEFT)
        for part in names:
            seconds = parts.get(part, 0.0)
            width = seconds * scale
            title = f"<title>{escape(part)}: {seconds:.4g} s</title>"
            out.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{BAR}" fill="{colour[part]}">{title}</rect>'
            )
            x += width
        out.append(text(x + 6, y + BAR * 0.7, f"{sum(parts.values()):.3g} s"))
        y += BAR + GAP
    for i, name in enumerate(names):
        x, row = 20 + (i % 5) * 185, y + 16 + (i // 5) * 20
        out.append(f'<rect x="{x}" y="{row - 10:.1f}" width="12" height="12" fill="{colour[name]}"/>')
        out.append(text(x + 18, row, name))
    return svg(WIDTH, int(y + 30 + 20 * (len(names) // 5)), out)


def _rank(part: str, bars: Mapping[str, Mapping[str, float]]) -> float:
    return -sum(parts.get(part, 0.0) for parts in bars.values())


def roofline(points: Mapping[str, tuple[float, float]], tops: Mapping[str, float], tbytes_s: float | None) -> str:
    """A roofline as SVG, both axes logarithmic. points: name → (FLOP per byte, TFLOP/s); tops: name → TFLOP/s of a
    matrix-product ceiling; tbytes_s: memory ceiling in TB/s. The model: Williams, Waterman, Patterson, "Roofline",
    CACM 52(4), 2009."""
    height, left, top, right, bottom = 520, 70, 20, 930, 470
    xs = [x for x, _ in points.values()] + ([value / tbytes_s for value in tops.values()] if tbytes_s else [])
    ys = [y for _, y in points.values()] + list(tops.values())
    low_x, high_x = _decades(xs)
    low_y, high_y = _decades(ys)

    def at(x: float, y: float) -> tuple[float, float]:
        across = (math.log10(x) - low_x) / (high_x - low_x)
        up = (math.log10(y) - low_y) / (high_y - low_y)
        return left + across * (right - left), bottom - up * (bottom - top)

    out = []
    for decade in range(low_x, high_x + 1):
        x, _ = at(10.0**decade, 10.0**low_y)
        out += [
            f'<path d="M{x:.1f} {top}V{bottom}" stroke="#ddd"/>',
            text(x, bottom + 18, f"{10.0**decade:g}", "middle"),
        ]
    for decade in range(low_y, high_y + 1):
        _, y = at(10.0**low_x, 10.0**decade)
        out += [f'<path d="M{left} {y:.1f}H{right}" stroke="#ddd"/>', text(left - 6, y + 4, f"{10.0**decade:g}", "end")]
    out += [text(500, bottom + 38, "FLOP per byte of memory traffic", "middle"), text(left, 12, "TFLOP/s")]
    for name, ceiling in tops.items():
        start = max(ceiling / tbytes_s, 10.0**low_x) if tbytes_s else 10.0**low_x
        (x0, y0), (x1, _) = at(start, ceiling), at(10.0**high_x, ceiling)
        out.append(f'<path d="M{x0:.1f} {y0:.1f}H{x1:.1f}" stroke="#333" stroke-width="1.5"/>')
        out.append(text(x1 - 4, y0 - 5, f"{name} {ceiling:.0f}", "end", 11))
        if tbytes_s:
            foot = max(10.0**low_x, 10.0**low_y / tbytes_s)
            xf, yf = at(foot, foot * tbytes_s)
            out.append(f'<path d="M{xf:.1f} {yf:.1f}L{x0:.1f} {y0:.1f}" stroke="#333" stroke-width="1.5"/>')
    for i, (name, (intensity, rate)) in enumerate(points.items()):
        x, y = at(intensity, rate)
        title = f"<title>{escape(name)}: {rate:.3g} TFLOP/s at {intensity:.3g} FLOP/byte</title>"
        out.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{COLOURS[i % len(COLOURS)]}">{title}</circle>')
        out.append(text(x - 8, y + 4, name, "end", 10))
    return svg(WIDTH, height, out)


def _decades(values: Sequence[float]) -> tuple[int, int]:
    """The exponents of the powers of ten below and above all positive values."""
    positive = [value for value in values if value > 0] or [1.0]
    low, high = math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive)))
    return low, max(high, low + 1)
