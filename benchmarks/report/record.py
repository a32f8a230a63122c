"""Benchmark results: rows, the document that contains them, and reading, writing and merging it.

Each row has a stable name (`forward/fp8/48832`), so that documents can be compared and merged row by row. The document
is rewritten atomically after every row, so a killed run keeps its rows. Each row refers to its run (command, date,
machine, versions).
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
    """Median, 10th and 90th percentile of `runs` repetitions, in seconds per call."""

    median_s: float
    low_s: float
    high_s: float
    runs: int

    @classmethod
    def of(cls, seconds: Iterable[float]) -> "Timing":
        """The timing from samples in seconds per call."""
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
    """One result.

    name        `section/what/size`
    kind        ours, baseline or ceiling
    values      further values, with units in their names (`tflops`, `error`, `allocator_peak_gib`)
    breakdown   kind of work → seconds
    note        a remark; for a row without time and values, why it was not measured
    failure     the error, if the measurement failed
    run         index of its run in `Results.runs`"""

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
        """The section of the row: the first part of its name."""
        return self.name.partition("/")[0]

    @property
    def measured(self) -> bool:
        """Whether the row has a time or values and did not fail."""
        return not self.failure and (self.timing is not None or bool(self.values))


@dataclass(frozen=True, slots=True)
class Results:
    """A result document. config: name of the measured model; runs: description of each run; rows: by name."""

    config: str
    runs: tuple[Mapping[str, Any], ...]
    rows: Mapping[str, Row]

    def with_row(self, row: Row) -> "Results":
        """The results with a row added or replaced."""
        return dataclasses.replace(self, rows={**self.rows, row.name: row})

    def value(self, name: str, key: str = "median_s") -> float | None:
        """A value of a row; `median_s` is its time in seconds. None if it was not measured."""
        row = self.rows.get(name)
        if row is None or not row.measured:
            return None
        if key == "median_s":
            return row.timing.median_s if row.timing else None
        return row.values.get(key)

    def document(self) -> dict[str, Any]:
        """The results as a JSON object."""
        rows = [dataclasses.asdict(row) for row in self.rows.values()]
        return {"format": FORMAT, "config": self.config, "runs": list(self.runs), "rows": rows}

    def save(self, path: Path) -> None:
        """Write the document, replacing the file atomically."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps(self.document(), indent=1) + "\n")
        os.replace(partial, path)


def load(path: Path) -> Results:
    """Read a result document. Raises InputError if the file is not a result of `scail2-rt bench`."""
    try:
        document = json.loads(path.read_text())
        if document["format"] != FORMAT:
            raise ValueError(f"format {document['format']}, this version reads {FORMAT}")
        rows = [_row(row) for row in document["rows"]]
        return Results(document["config"], tuple(document["runs"]), {row.name: row for row in rows})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} is not a result of scail2-rt bench ({error}). Give a file written by its --json."
        ) from error


def _row(fields: dict[str, Any]) -> Row:
    timing = fields.pop("timing")
    return Row(**fields, timing=Timing(**timing) if timing else None)


def merge(parts: Iterable[Results]) -> Results:
    """Merge results of one model. Of rows with the same name, the last measured one is kept. Raises InputError for
    results of different models."""
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
        found = ", ".join(sorted(set(configs))) or "none"
        raise InputError(f"The results are of different models ({found}). Merge results of one model.")
    return Results(configs[0], tuple(runs), rows)
