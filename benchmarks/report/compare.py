"""Compare two results row by row: find rows that became slower or less exact by more than the noise.

The noise of a time is 3 % or twice the larger spread of the two, whichever is larger. Baselines and ceilings are listed
too, but only rows of kind "ours" can be regressions, because a slower baseline means a slower machine. A row that was
measured before and fails now is a regression.
"""

from dataclasses import asdict, dataclass
from typing import Any

from scail2_rt.benchmarks.report.record import Results, Row
from scail2_rt.kernels.errors import InputError
from scail2_rt.kernels.wording import counted

LEAST_NOISE = 0.03
ERROR_NOISE = 0.10


@dataclass(frozen=True, slots=True)
class Change:
    """One value of one row before and after.

    figure    `time_s` or `error`
    noise     tolerated relative change
    counted   the row is of kind "ours", so it can be a regression"""

    name: str
    figure: str
    before: float
    after: float
    noise: float
    counted: bool

    @property
    def ratio(self) -> float:
        """After divided by before."""
        return self.after / self.before if self.before else float("inf") if self.after else 1.0

    @property
    def verdict(self) -> str:
        """REGRESSION, slower baseline, better or same."""
        if self.ratio > 1 + self.noise:
            return "REGRESSION" if self.counted else "slower baseline"
        return "better" if self.ratio < 1 / (1 + self.noise) else "same"


@dataclass(frozen=True, slots=True)
class Comparison:
    """changes: rows measured in both; broken: names of rows that fail now; absent: names of rows only in the first."""

    changes: tuple[Change, ...]
    broken: tuple[str, ...]
    absent: tuple[str, ...]

    @property
    def regressions(self) -> tuple[str, ...]:
        """Names of the rows that became worse or fail now."""
        return (*(c.name for c in self.changes if c.verdict == "REGRESSION"), *self.broken)

    @property
    def text(self) -> str:
        """The comparison as text, one line per value."""
        width = max((len(change.name) for change in self.changes), default=10)
        lines = [
            f"{c.name:{width}s}  {c.figure:7s} {c.before:12.6g} → {c.after:12.6g}  {100 * (c.ratio - 1):+7.1f} % "
            f"(noise {100 * c.noise:.1f} %)  {c.verdict}"
            for c in self.changes
        ]
        lines += [f"{name}: measured before, failed now: REGRESSION" for name in self.broken]
        lines += [f"{name}: only in the first" for name in self.absent]
        count = len(self.regressions)
        return "\n".join([*lines, counted(count, "regression") if count else "no regression"])

    def document(self) -> dict[str, Any]:
        """The comparison as a JSON object."""
        changes = [{**asdict(change), "ratio": change.ratio, "verdict": change.verdict} for change in self.changes]
        return {"regressions": list(self.regressions), "absent": list(self.absent), "changes": changes}


def compare_results(before: Results, after: Results) -> Comparison:
    """Compare two results. Raises InputError for results of different models."""
    if before.config != after.config:
        raise InputError(
            f"The results are of different models, {before.config} and {after.config}. Compare results of one model."
        )
    changes: list[Change] = []
    broken, absent = [], []
    for name, old in before.rows.items():
        new = after.rows.get(name)
        if not old.measured:
            continue
        if new is None or (not new.measured and not new.failure):
            absent.append(name)
        elif new.failure:
            broken.append(name)
        else:
            changes += _changes(old, new)
    return Comparison(tuple(changes), tuple(broken), tuple(absent))


def _changes(old: Row, new: Row) -> list[Change]:
    counted = old.kind == "ours"
    found = []
    if old.timing and new.timing:
        noise = max(LEAST_NOISE, 2 * max(old.timing.spread, new.timing.spread))
        found.append(Change(old.name, "time_s", old.timing.median_s, new.timing.median_s, noise, counted))
    if "error" in old.values and "error" in new.values:
        found.append(Change(old.name, "error", old.values["error"], new.values["error"], ERROR_NOISE, counted))
    return found
