"""Jobs and files in SQLite, with a folder per job and one file per upload beside it.

    DATA/service.sqlite   write-ahead log, synced at every commit: what was answered to a client survives a power cut
    DATA/jobs/ID/         inputs (links), video.mp4, report, pictures; it is there before its row is
    DATA/files/ID         an upload
    DATA/incoming/        what is being received; emptied at the start

A job is queued, running, completed, failed or deleted (its folder not yet removed). Taking a job counts its `attempt`
up, and only who names the present attempt can end it: what a lost worker still says changes nothing. One server has the
folder, by a lock. Writers share one connection and a lock; readers another, so that asking waits for no disk.
"""

import json
import secrets
import sqlite3
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, owner TEXT NOT NULL, state TEXT NOT NULL,
    created_at REAL NOT NULL, started_at REAL, completed_at REAL,
    attempt INTEGER NOT NULL DEFAULT 0, kills INTEGER NOT NULL DEFAULT 0, segments INTEGER NOT NULL DEFAULT 0,
    request TEXT NOT NULL, result TEXT, idempotency TEXT, digest TEXT);
CREATE UNIQUE INDEX IF NOT EXISTS job_idempotency ON jobs (owner, idempotency) WHERE idempotency IS NOT NULL;
CREATE INDEX IF NOT EXISTS job_state ON jobs (state, seq);
CREATE INDEX IF NOT EXISTS job_owner ON jobs (owner, seq);
CREATE TABLE IF NOT EXISTS files (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, owner TEXT NOT NULL, name TEXT NOT NULL,
    bytes INTEGER NOT NULL, sha256 TEXT NOT NULL, purpose TEXT NOT NULL, created_at REAL NOT NULL);
CREATE INDEX IF NOT EXISTS file_owner ON files (owner, seq);
CREATE INDEX IF NOT EXISTS file_hash ON files (owner, sha256);
"""
VISIBLE = "state != 'deleted'"
VIDEOS = f"{VISIBLE} AND id LIKE 'video~_%' ESCAPE '~'"
Order = Literal["asc", "desc"]


@dataclass(frozen=True, slots=True)
class JobRow:
    """A job as it is stored. request: what was asked for and found by the check; result: what came of it."""

    seq: int
    id: str
    owner: str
    state: str
    created_at: float
    started_at: float | None
    completed_at: float | None
    attempt: int
    kills: int
    segments: int
    request: Mapping[str, Any]
    result: Mapping[str, Any] | None
    idempotency: str | None
    digest: str | None

    @classmethod
    def of(cls, row: sqlite3.Row) -> "JobRow":
        fields = dict(row)
        fields["request"] = json.loads(fields["request"])
        fields["result"] = None if fields["result"] is None else json.loads(fields["result"])
        return cls(**fields)


@dataclass(frozen=True, slots=True)
class FileRow:
    """An upload that is kept."""

    seq: int
    id: str
    owner: str
    name: str
    bytes: int
    sha256: str
    purpose: str
    created_at: float


def new_id(kind: str) -> str:
    """`video_` or `file-` and 128 random bits."""
    return f"{kind}{secrets.token_hex(16)}"


class Store:
    """The database of one data folder."""

    def __init__(self, data: Path) -> None:
        self.data, self.jobs, self.files, self.incoming = data, data / "jobs", data / "files", data / "incoming"
        for folder in (data, self.jobs, self.files, self.incoming):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._writer, self._reader = self._connect(), self._connect()
        self._writing, self._reading = threading.Lock(), threading.Lock()
        with self._writing:
            self._writer.executescript(SCHEMA)

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.data / "service.sqlite", check_same_thread=False, isolation_level=None)
        connection.row_factory = sqlite3.Row
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("PRAGMA busy_timeout=10000")
        return connection

    def close(self) -> None:
        for connection in (self._reader, self._writer):
            connection.close()

    def folder(self, job_id: str) -> Path:
        return self.jobs / job_id

    def _write(self, sql: str, *values: Any) -> list[sqlite3.Row]:
        with self._writing:
            return self._writer.execute(sql, values).fetchall()

    def _read(self, sql: str, *values: Any) -> list[sqlite3.Row]:
        with self._reading:
            return self._reader.execute(sql, values).fetchall()

    # jobs

    def add_job(
        self, job_id: str, owner: str, request: Mapping[str, Any], idempotency: str | None, digest: str
    ) -> JobRow:
        """A queued job; its folder is there already."""
        sql = "INSERT INTO jobs (id, owner, state, created_at, request, idempotency, digest) VALUES (?,?,?,?,?,?,?)"
        values = (job_id, owner, "queued", time.time(), json.dumps(request), idempotency, digest)
        return JobRow.of(self._write(f"{sql} RETURNING *", *values)[0])

    def take(self) -> JobRow | None:
        """The oldest queued job, running from now on; None when none waits."""
        rows = self._write(
            "UPDATE jobs SET state='running', attempt=attempt+1 WHERE seq="
            "(SELECT seq FROM jobs WHERE state='queued' ORDER BY seq LIMIT 1) RETURNING *"
        )
        return JobRow.of(rows[0]) if rows else None

    def take_one(self, job_id: str) -> JobRow | None:
        """This job, if it is queued: running from now on."""
        rows = self._write(
            "UPDATE jobs SET state='running', attempt=attempt+1 WHERE id=? AND state='queued' RETURNING *", job_id
        )
        return JobRow.of(rows[0]) if rows else None

    def planned(self, row: JobRow, facts: Mapping[str, Any]) -> None:
        """What the worker's plan says of a job."""
        request = json.dumps({**row.request, "facts": facts})
        self._write(
            "UPDATE jobs SET request=? WHERE id=? AND attempt=? AND state='running'", request, row.id, row.attempt
        )

    def started(self, job_id: str, attempt: int) -> None:
        """Its first denoising step has begun."""
        self._write(
            "UPDATE jobs SET started_at=? WHERE id=? AND attempt=? AND state='running' AND started_at IS NULL",
            *(time.time(), job_id, attempt),
        )

    def finish(self, job_id: str, attempt: int, state: str, result: Mapping[str, Any]) -> bool:
        """End the job as `completed` or `failed`; False when this attempt is not the one that runs."""
        rows = self._write(
            "UPDATE jobs SET state=?, completed_at=?, result=? WHERE id=? AND attempt=? AND state='running' "
            "RETURNING seq",
            *(state, time.time(), json.dumps(result), job_id, attempt),
        )
        return bool(rows)

    def give_back(self, job_id: str, attempt: int, killed: bool, segments: int) -> JobRow | None:
        """Queue a running job again, where it was. killed: its worker was; that is counted until another segment is
        finished. None when this attempt is not the one that runs."""
        rows = self._write(
            "UPDATE jobs SET state='queued', started_at=NULL, "
            "kills=CASE WHEN ?>segments THEN ? ELSE kills+? END, segments=MAX(segments, ?) "
            "WHERE id=? AND attempt=? AND state='running' RETURNING *",
            *(segments, int(killed), int(killed), segments, job_id, attempt),
        )
        return JobRow.of(rows[0]) if rows else None

    def recover(self) -> int:
        """After a server that was killed: what ran is queued again. How many these were."""
        return len(self._write("UPDATE jobs SET state='queued', started_at=NULL WHERE state='running' RETURNING seq"))

    def job(self, job_id: str, owner: str | None = None) -> JobRow | None:
        """A job that was not deleted; with `owner`, only one of that client's."""
        rows = self._read(
            f"SELECT * FROM jobs WHERE id=? AND (? IS NULL OR owner=?) AND {VISIBLE}", job_id, owner, owner
        )
        return JobRow.of(rows[0]) if rows else None

    def job_of_key(self, owner: str, idempotency: str) -> JobRow | None:
        """The job that was made with this Idempotency-Key."""
        rows = self._read(f"SELECT * FROM jobs WHERE owner=? AND idempotency=? AND {VISIBLE}", owner, idempotency)
        return JobRow.of(rows[0]) if rows else None

    def place(self, row: JobRow) -> int:
        """How many jobs go before this queued one."""
        return self._read("SELECT COUNT(*) FROM jobs WHERE state='queued' AND seq<?", row.seq)[0][0]

    def places(self) -> dict[str, int]:
        """Of every queued job."""
        rows = self._read("SELECT id FROM jobs WHERE state='queued' ORDER BY seq")
        return {row["id"]: place for place, row in enumerate(rows)}

    def list_jobs(self, owner: str, after: str | None, limit: int, order: Order) -> list[JobRow]:
        """A page of a client's videos by age, from the one after `after` on."""
        return [JobRow.of(row) for row in self._page("jobs", owner, after, limit, order, f"AND {VIDEOS}")]

    def _page(
        self, table: str, owner: str, after: str | None, limit: int, order: Order, also: str = ""
    ) -> Sequence[sqlite3.Row]:
        compare, direction = ("<", "DESC") if order == "desc" else (">", "ASC")
        beyond = f"AND seq {compare} (SELECT seq FROM {table} WHERE id=? AND owner=?)" if after else ""
        values = (owner, after, owner, limit) if after else (owner, limit)
        return self._read(
            f"SELECT * FROM {table} WHERE owner=? {also} {beyond} ORDER BY seq {direction} LIMIT ?", *values
        )

    def counts(self) -> dict[str, int]:
        """Jobs by state."""
        return {row["state"]: row["n"] for row in self._read("SELECT state, COUNT(*) n FROM jobs GROUP BY state")}

    def unfinished(self, owner: str | None = None) -> int:
        """Jobs that wait or run, of all clients or of one."""
        return self._read(
            "SELECT COUNT(*) FROM jobs WHERE state IN ('queued', 'running') AND (? IS NULL OR owner=?)", owner, owner
        )[0][0]

    def delete_job(self, job_id: str) -> str | None:
        """Nobody sees it from now on; the state that it had."""
        with self._writing:
            row = self._writer.execute(f"SELECT state FROM jobs WHERE id=? AND {VISIBLE}", (job_id,)).fetchone()
            self._writer.execute("UPDATE jobs SET state='deleted', idempotency=NULL WHERE id=?", (job_id,))
        return row and row["state"]

    def forget_job(self, job_id: str) -> None:
        """Its folder is gone."""
        self._write("DELETE FROM jobs WHERE id=? AND state='deleted'", job_id)

    def deleted(self) -> list[str]:
        return [row["id"] for row in self._read("SELECT id FROM jobs WHERE state='deleted'")]

    def finished_before(self, moment: float) -> list[str]:
        """Jobs that ended before this time, oldest first."""
        rows = self._read(
            "SELECT id FROM jobs WHERE state IN ('completed', 'failed') AND completed_at<? ORDER BY completed_at",
            moment,
        )
        return [row["id"] for row in rows]

    def job_ids(self) -> set[str]:
        return {row["id"] for row in self._read("SELECT id FROM jobs")}

    # files

    def add_file(self, file_id: str, owner: str, name: str, size: int, sha256: str, purpose: str) -> FileRow:
        """An upload that lies in its place already."""
        sql = "INSERT INTO files (id, owner, name, bytes, sha256, purpose, created_at) VALUES (?,?,?,?,?,?,?)"
        return FileRow(**self._write(f"{sql} RETURNING *", file_id, owner, name, size, sha256, purpose, time.time())[0])

    def file(self, file_id: str, owner: str) -> FileRow | None:
        rows = self._read("SELECT * FROM files WHERE id=? AND owner=?", file_id, owner)
        return FileRow(**rows[0]) if rows else None

    def list_files(
        self, owner: str, after: str | None, limit: int, order: Order, sha256: str | None = None
    ) -> list[FileRow]:
        if sha256 is not None:
            rows: Sequence[sqlite3.Row] = self._read(
                "SELECT * FROM files WHERE owner=? AND sha256=? LIMIT ?", owner, sha256, limit
            )
        else:
            rows = self._page("files", owner, after, limit, order)
        return [FileRow(**row) for row in rows]

    def delete_file(self, file_id: str, owner: str) -> bool:
        return bool(self._write("DELETE FROM files WHERE id=? AND owner=? RETURNING seq", file_id, owner))

    def file_bytes(self, owner: str) -> int:
        return self._read("SELECT COALESCE(SUM(bytes), 0) FROM files WHERE owner=?", owner)[0][0]

    def file_ids(self) -> set[str]:
        return {row["id"] for row in self._read("SELECT id FROM files")}
