"""Jobs and files in SQLite, with one folder per job and one file per upload beside the database.

    DATA/service.sqlite   write-ahead log, synced at every commit: an acknowledged job survives a power cut
    DATA/jobs/ID/         inputs (hard links), video.mp4, run report, preview images; created before the job's row
    DATA/files/ID         a stored upload
    DATA/incoming/        uploads being received; emptied at the start
    DATA/reserve          1 MiB that is released when the disk is full, so that jobs can still end and be deleted

The state of a job is queued, running, completed, failed or deleted (its folder is not yet removed). Taking a job
increments its `attempt`. Updates name the attempt, so late messages of a lost worker have no effect. A lock file
ensures that one server uses the folder. Writers share one connection and readers another, so reads do not wait for
writes.
"""

import json
import secrets
import sqlite3
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from scail2_rt.runtime.serve.errors import DiskFull

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
RESERVE_BYTES = 1 << 20
REMEMBERED = 10_000  # deleted entries whose list position is remembered
KILLS = 20  # kills of a job's worker, without another finished segment in between, after which the job fails


@dataclass(frozen=True, slots=True)
class JobRow:
    """A stored job.

    seq            number in the order of submission
    created_at, started_at, completed_at   seconds since the epoch
    attempt        how often a worker has taken it
    kills          kills of its worker since the last finished segment
    segments       finished segments
    request        options, extra_refs, masking and the facts found by the check
    result         of a completed or failed job
    idempotency, digest   the client's Idempotency-Key and a hash of the request
    """

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
        """The job of a database row."""
        fields = dict(row)
        fields["request"] = json.loads(fields["request"])
        fields["result"] = None if fields["result"] is None else json.loads(fields["result"])
        return cls(**fields)


@dataclass(frozen=True, slots=True)
class FileRow:
    """A stored upload. seq: number in the order of upload; created_at: seconds since the epoch."""

    seq: int
    id: str
    owner: str
    name: str
    bytes: int
    sha256: str
    purpose: str
    created_at: float


def new_id(kind: str) -> str:
    """`kind` (such as `video_` or `file-`) followed by 128 random bits in hexadecimal."""
    return f"{kind}{secrets.token_hex(16)}"


class Store:
    """The database of one data folder."""

    def __init__(self, data: Path) -> None:
        self.data, self.jobs, self.files, self.incoming = data, data / "jobs", data / "files", data / "incoming"
        for folder in (data, self.jobs, self.files, self.incoming):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.reserve = data / "reserve"
        self._writer, self._reader = self._connect(), self._connect()
        self._writing, self._reading = threading.Lock(), threading.Lock()
        self._gone: OrderedDict[str, tuple[str, int]] = OrderedDict()  # id of a deleted entry → owner, seq
        with self._writing:
            self._writer.executescript(SCHEMA)
        self.keep_reserve()

    def keep_reserve(self) -> None:
        """Create the reserve file, unless it exists or the disk is full."""
        if not self.reserve.exists():
            part = self.reserve.with_suffix(".part")
            try:
                part.write_bytes(bytes(RESERVE_BYTES))
                part.replace(self.reserve)
            except OSError:
                part.unlink(missing_ok=True)

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
        """The folder of a job."""
        return self.jobs / job_id

    def result(self, row: JobRow, name: str) -> Path:
        """The path of a job's file, which may not exist."""
        return self.folder(row.id) / name

    def upload(self, row: FileRow) -> Path:
        """The path of a stored upload."""
        return self.files / row.id

    def _write(self, sql: str, *values: Any) -> list[sqlite3.Row]:
        """Execute a statement and return its rows. On a full disk the reserve is released and the statement repeated.
        Raises DiskFull if that fails too."""
        with self._writing:
            try:
                return self._writer.execute(sql, values).fetchall()
            except sqlite3.OperationalError as error:
                if not _no_room(error):
                    raise
            self.reserve.unlink(missing_ok=True)
            try:
                return self._writer.execute(sql, values).fetchall()
            except sqlite3.OperationalError as error:
                raise DiskFull(str(error)) if _no_room(error) else error from error

    def _read(self, sql: str, *values: Any) -> list[sqlite3.Row]:
        with self._reading:
            return self._reader.execute(sql, values).fetchall()

    # jobs

    def add_job(
        self, job_id: str, owner: str, request: Mapping[str, Any], idempotency: str | None, digest: str
    ) -> JobRow:
        """Insert a queued job, whose folder exists already."""
        sql = "INSERT INTO jobs (id, owner, state, created_at, request, idempotency, digest) VALUES (?,?,?,?,?,?,?)"
        values = (job_id, owner, "queued", time.time(), json.dumps(request), idempotency, digest)
        return JobRow.of(self._write(f"{sql} RETURNING *", *values)[0])

    def take(self) -> JobRow | None:
        """Mark the oldest queued job as running and return it; None if no job is queued."""
        rows = self._write(
            "UPDATE jobs SET state='running', attempt=attempt+1 WHERE seq="
            "(SELECT seq FROM jobs WHERE state='queued' ORDER BY seq LIMIT 1) RETURNING *"
        )
        return JobRow.of(rows[0]) if rows else None

    def take_one(self, job_id: str) -> JobRow | None:
        """Mark this job as running and return it; None if it is not queued."""
        rows = self._write(
            "UPDATE jobs SET state='running', attempt=attempt+1 WHERE id=? AND state='queued' RETURNING *", job_id
        )
        return JobRow.of(rows[0]) if rows else None

    def planned(self, row: JobRow, facts: Mapping[str, Any]) -> None:
        """Replace the facts of a running job by those of the worker's plan."""
        request = json.dumps({**row.request, "facts": facts})
        self._write(
            "UPDATE jobs SET request=? WHERE id=? AND attempt=? AND state='running'", request, row.id, row.attempt
        )

    def started(self, job_id: str, attempt: int) -> None:
        """Record that the first denoising step of a job has begun."""
        self._write(
            "UPDATE jobs SET started_at=? WHERE id=? AND attempt=? AND state='running' AND started_at IS NULL",
            *(time.time(), job_id, attempt),
        )

    def finish(self, job_id: str, attempt: int, state: str, result: Mapping[str, Any]) -> bool:
        """End the job as `completed` or `failed`. False if this attempt is not the running one."""
        rows = self._write(
            "UPDATE jobs SET state=?, completed_at=?, result=? WHERE id=? AND attempt=? AND state='running' "
            "RETURNING seq",
            *(state, time.time(), json.dumps(result), job_id, attempt),
        )
        return bool(rows)

    def give_back(self, job_id: str, attempt: int, killed: bool, segments: int) -> JobRow | None:
        """Queue a running job again, at its old position. killed: its worker was killed; the count of kills restarts
        when another segment has been finished. None if this attempt is not the running one."""
        rows = self._write(
            "UPDATE jobs SET state='queued', started_at=NULL, "
            "kills=CASE WHEN ?>segments THEN ? ELSE kills+? END, segments=MAX(segments, ?) "
            "WHERE id=? AND attempt=? AND state='running' RETURNING *",
            *(segments, int(killed), int(killed), segments, job_id, attempt),
        )
        return JobRow.of(rows[0]) if rows else None

    def recover(self) -> int:
        """Queue all running jobs again, after the server was killed. Returns their number."""
        return len(self._write("UPDATE jobs SET state='queued', started_at=NULL WHERE state='running' RETURNING seq"))

    def job(self, job_id: str, owner: str | None = None) -> JobRow | None:
        """The job with this id, unless it was deleted or, with `owner`, belongs to another client."""
        rows = self._read(
            f"SELECT * FROM jobs WHERE id=? AND (? IS NULL OR owner=?) AND {VISIBLE}", job_id, owner, owner
        )
        return JobRow.of(rows[0]) if rows else None

    def job_of_key(self, owner: str, idempotency: str) -> JobRow | None:
        """The job that a client created with this Idempotency-Key."""
        rows = self._read(f"SELECT * FROM jobs WHERE owner=? AND idempotency=? AND {VISIBLE}", owner, idempotency)
        return JobRow.of(rows[0]) if rows else None

    def place(self, row: JobRow) -> int:
        """The number of queued jobs before this one."""
        return self._read("SELECT COUNT(*) FROM jobs WHERE state='queued' AND seq<?", row.seq)[0][0]

    def places(self) -> dict[int, int]:
        """seq of every queued job → number of queued jobs before it."""
        rows = self._read("SELECT seq FROM jobs WHERE state='queued' ORDER BY seq")
        return {row[0]: place for place, row in enumerate(rows)}

    def list_jobs(self, owner: str, after: str | None, limit: int, order: Order) -> list[JobRow]:
        """At most `limit` of a client's videos in order of submission, starting after the entry `after`. Raises
        LookupError for an unknown `after`."""
        return [JobRow.of(row) for row in self._page("jobs", owner, after, limit, order, f"AND {VIDEOS}")]

    def _page(
        self, table: str, owner: str, after: str | None, limit: int, order: Order, also: str = ""
    ) -> Sequence[sqlite3.Row]:
        compare, direction = ("<", "DESC") if order == "desc" else (">", "ASC")
        seq = self._seq(table, owner, after) if after else None
        beyond, values = (f"AND seq {compare} ?", (owner, seq, limit)) if after else ("", (owner, limit))
        return self._read(
            f"SELECT * FROM {table} WHERE owner=? {also} {beyond} ORDER BY seq {direction} LIMIT ?", *values
        )

    def _seq(self, table: str, owner: str, entry: str) -> int:
        """The seq of an entry of a client's list. Deleted entries are remembered, so that a client can delete entries
        while it pages through the list. Raises LookupError for an unknown entry."""
        if found := self._read(f"SELECT seq FROM {table} WHERE id=? AND owner=?", entry, owner):
            return found[0][0]
        whose, seq = self._gone.get(entry, ("", 0))
        if whose != owner:
            raise LookupError(entry)
        return seq

    def _remember(self, rows: Sequence[sqlite3.Row]) -> None:
        """Remember the list positions of removed entries."""
        for row in rows:
            self._gone[row["id"]] = row["owner"], row["seq"]
            if len(self._gone) > REMEMBERED:
                self._gone.popitem(last=False)

    def counts(self) -> dict[str, int]:
        """State → number of jobs."""
        return {row["state"]: row["n"] for row in self._read("SELECT state, COUNT(*) n FROM jobs GROUP BY state")}

    def unfinished(self, owner: str | None = None) -> int:
        """The number of queued and running jobs, of all clients or of one."""
        return self._read(
            "SELECT COUNT(*) FROM jobs WHERE state IN ('queued', 'running') AND (? IS NULL OR owner=?)", owner, owner
        )[0][0]

    def delete_job(self, job_id: str) -> str | None:
        """Mark a job as deleted, which hides it. Returns its former state; None if it did not exist."""
        row = self.job(job_id)
        self._write("UPDATE jobs SET state='deleted', idempotency=NULL WHERE id=?", job_id)
        return None if row is None else row.state

    def forget_job(self, job_id: str) -> None:
        """Remove the row of a deleted job, after its folder was removed."""
        self._remember(self._write("DELETE FROM jobs WHERE id=? AND state='deleted' RETURNING id, owner, seq", job_id))

    def deleted(self) -> list[str]:
        """Ids of deleted jobs whose folder is not yet removed."""
        return [row["id"] for row in self._read("SELECT id FROM jobs WHERE state='deleted'")]

    def finished_before(self, moment: float) -> list[str]:
        """Ids of the jobs that ended before `moment` (seconds since the epoch), oldest first."""
        rows = self._read(
            "SELECT id FROM jobs WHERE state IN ('completed', 'failed') AND completed_at<? ORDER BY completed_at",
            moment,
        )
        return [row["id"] for row in rows]

    def job_ids(self) -> set[str]:
        """Ids of all jobs, including deleted ones."""
        return {row["id"] for row in self._read("SELECT id FROM jobs")}

    # files

    def add_file(self, file_id: str, owner: str, name: str, size: int, sha256: str, purpose: str) -> FileRow:
        """Insert an upload whose file is in place already. size: bytes."""
        sql = "INSERT INTO files (id, owner, name, bytes, sha256, purpose, created_at) VALUES (?,?,?,?,?,?,?)"
        return FileRow(**self._write(f"{sql} RETURNING *", file_id, owner, name, size, sha256, purpose, time.time())[0])

    def file(self, file_id: str, owner: str) -> FileRow | None:
        """A client's upload; None if it does not exist."""
        rows = self._read("SELECT * FROM files WHERE id=? AND owner=?", file_id, owner)
        return FileRow(**rows[0]) if rows else None

    def list_files(
        self, owner: str, after: str | None, limit: int, order: Order, sha256: str | None = None
    ) -> list[FileRow]:
        """At most `limit` of a client's uploads, like `list_jobs`; with `sha256`, only uploads with this hash."""
        if sha256 is not None:
            rows: Sequence[sqlite3.Row] = self._read(
                "SELECT * FROM files WHERE owner=? AND sha256=? LIMIT ?", owner, sha256, limit
            )
        else:
            rows = self._page("files", owner, after, limit, order)
        return [FileRow(**row) for row in rows]

    def delete_file(self, file_id: str, owner: str) -> bool:
        """Delete the row of an upload. False if it does not exist."""
        rows = self._write("DELETE FROM files WHERE id=? AND owner=? RETURNING id, owner, seq", file_id, owner)
        self._remember(rows)
        return bool(rows)

    def file_bytes(self, owner: str) -> int:
        """The total bytes of a client's uploads."""
        return self._read("SELECT COALESCE(SUM(bytes), 0) FROM files WHERE owner=?", owner)[0][0]

    def file_ids(self) -> set[str]:
        """Ids of all uploads."""
        return {row["id"] for row in self._read("SELECT id FROM files")}


def _no_room(error: sqlite3.OperationalError) -> bool:
    return "disk is full" in str(error) or "disk I/O error" in str(error)
