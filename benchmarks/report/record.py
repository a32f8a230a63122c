"""Results: rows, the document that holds them, and its life on disk.

A row is one measured thing under a name that does not change (`forward/fp8/48832`), so that two documents can be
compared and merged row by row. The document is written again, atomically, after every row: a run that is killed keeps
what it had. Each row names the run (command, date, machine, versions) that it comes from.
"""

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from scail2_rt.kernels.errors import InputError

FORMAT = 1
Kind = Literal["ours", "baseline", "ceiling"]


@dataclass(frozen=True, slots=True)
class Timing:
    """Median of `runs` repetitions with the 10th and 90th percentile; seconds of one call."""

    median_s: float
    low_s: float
    high_s: float
    runs: int

    @classmethod
    def of(cls, seconds: Iterable[float]) -> "Timing":
        ordered = sorted(seconds)
        last = len(ordered) - 1
        middle = (ordered[last // 2] + ordered[(last + 1) // 2]) / 2
        return cls(middle, ordered[round(0.1 * last)], ordered[round(0.9 * last)], len(ordered))

    @property
    def spread(self) -> float:
        """(p90 - p10) / median."""
        return (self.high_s - self.low_s) / self.median_s if self.median_s else 0.0


@dataclass(frozen=True, slots=True)
class Row:
    """One result. name: `section/what/size`. values: figures beside the time, units in their names (`tflops`,
    `error`, `allocator_peak_gib`); breakdown: seconds by kind of work. A row without time and values says in
    `note` why it was not measured, or in `failure` what went wrong."""

    name: str
    kind: Kind = "ours"
    timing: Timing | None = None
    values: Mapping[str, float] = field(default_factory=dict, hash=False)
    breakdown: Mapping[str, float] = field(default_factory=dict, hash=False)
    note: str = ""
    failure: str = ""
    run: int = 0

    @property
    def section(self) -> str:
        return self.name.partition("/")[0]

    @property
    def measured(self) -> bool:
        return not self.failure and (self.timing is not None or bool(self.values))


@dataclass(frozen=True, slots=True)
class Results:
    """`config`: the model that was measured; `runs`: what each run was; `rows` by name."""

    config: str
    runs: tuple[Mapping[str, Any], ...]
    rows: Mapping[str, Row]

    def with_row(self, row: Row) -> "Results":
        return dataclasses.replace(self, rows={**self.rows, row.name: row})

    def value(self, name: str, key: str = "median_s") -> float | None:
        """A figure of a row, or None when it was not measured. `median_s` is its time."""
        row = self.rows.get(name)
        if row is None or not row.measured:
            return None
        if key == "median_s":
            return row.timing.median_s if row.timing else None
        return row.values.get(key)

    def document(self) -> dict[str, Any]:
        rows = [dataclasses.asdict(row) for row in self.rows.values()]
        return {"format": FORMAT, "config": self.config, "runs": list(self.runs), "rows": rows}

    def save(self, path: Path) -> None:
        """Replace the file in one step."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps(self.document(), indent=1) + "\n")
        os.replace(partial, path)


def load(path: Path) -> Results:
    """InputError when the file is no result of `scail2-rt bench`."""
    try:
        document = json.loads(path.read_text())
        if document["format"] != FORMAT:
            raise ValueError(f"format {document['format']}, this version reads {FORMAT}")
        rows = [_row(row) for row in document["rows"]]
        return Results(document["config"], tuple(document["runs"]), {row.name: row for row in rows})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is no result file of scail2-rt bench ({error}).") from error


def _row(fields: dict[str, Any]) -> Row:
    timing = fields.pop("timing")
    return Row(**fields, timing=Timing(**timing) if timing else None)


def merge(parts: Iterable[Results]) -> Results:
    """All rows of the parts; where two have a row of the same name, the later part's, unless that one failed."""
    runs: list[Mapping[str, Any]] = []
    rows: dict[str, Row] = {}
    configs = []
    for part in parts:
        configs.append(part.config)
        for name, row in part.rows.items():
            if row.measured or name not in rows or not rows[name].measured:
                rows[name] = dataclasses.replace(row, run=row.run + len(runs))
        runs += part.runs
    if len(set(configs)) != 1:
        raise InputError(f"results of different models cannot be merged: {', '.join(sorted(set(configs))) or 'none'}.")
    return Results(configs[0], tuple(runs), rows)
