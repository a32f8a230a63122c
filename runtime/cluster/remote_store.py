"""The store of a front end: rows come from the ledger; files are in the object store and fetched to this node on
demand."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scail2_rt.runtime.cluster.ledger import READS, WRITES
from scail2_rt.runtime.cluster.objects import Objects
from scail2_rt.runtime.serve.errors import Refusal
from scail2_rt.runtime.serve.store import FileRow, JobRow, Store

ASK_S = 30.0


class RemoteStore(Store):
    """A `Store` that forwards row operations to the ledger. data: a folder on this node that caches files."""

    def __init__(self, ledger: Any, objects: Objects, data: Path) -> None:
        self._ledger, self.objects = ledger, objects
        self.data, self.jobs, self.files, self.incoming = data, data / "jobs", data / "files", data / "incoming"
        for folder in (data, self.jobs, self.files, self.incoming):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def close(self) -> None:
        pass

    def ask(self, name: str, *arguments: Any) -> Any:
        """Call a method of the ledger's index. Raises Refusal (503) if there is no answer within `ASK_S` seconds."""
        import ray

        try:
            return ray.get(self._ledger.ask.remote(name, *arguments), timeout=ASK_S)
        except (ray.exceptions.GetTimeoutError, ray.exceptions.RayActorError) as error:
            said = "The actor that stores the jobs does not answer. Try again."
            raise Refusal(503, said, "ledger_lost", retry_s=5) from error

    def add_job(
        self, job_id: str, owner: str, request: Mapping[str, Any], idempotency: str | None, digest: str
    ) -> JobRow:
        """Store the inputs of a job and queue it. Raises Refusal (409) for a reused Idempotency-Key."""
        for file in self.folder(job_id).iterdir():
            self.objects.put_file(file, f"jobs/{job_id}/inputs/{file.name}")
        row: JobRow = self.ask("add_job", job_id, owner, dict(request), idempotency, digest)
        if row.id != job_id:
            self.objects.remove(f"jobs/{job_id}")
            if row.digest != digest:
                said = "This Idempotency-Key was used for another request. Send a new key."
                raise Refusal(409, said, "idempotency_key_reused")
        return row

    def result(self, row: JobRow, name: str) -> Path:
        """The local path of a job's file, fetched if necessary. It does not exist if the job has no such file."""
        file = self.folder(row.id) / name
        if not file.is_file():
            own = f"jobs/{row.id}"
            if not self.objects.fetch(f"{own}/{row.attempt}/{name}", file):
                self.objects.fetch(f"{own}/inputs/{name}", file)
        return file

    def add_file(self, file_id: str, owner: str, name: str, size: int, sha256: str, purpose: str) -> FileRow:
        self.objects.put_file(self.files / file_id, f"uploads/{file_id}")
        row: FileRow = self.ask("add_file", file_id, owner, name, size, sha256, purpose)
        return row

    def upload(self, row: FileRow) -> Path:
        """The local path of an upload, fetched if necessary."""
        file = self.files / row.id
        if not file.is_file():
            self.objects.fetch(f"uploads/{row.id}", file)
        return file

    def delete_file(self, file_id: str, owner: str) -> bool:
        gone: bool = self.ask("delete_file", file_id, owner)
        if gone:
            self.objects.remove(f"uploads/{file_id}")
        return gone

    def drop(self, job_id: str) -> None:
        """Remove this node's files of a job."""
        shutil.rmtree(self.folder(job_id), ignore_errors=True)


def _forwarding(name: str) -> Any:
    def forward(self: RemoteStore, *arguments: Any) -> Any:
        return self.ask(name, *arguments)

    return forward


for _name in (READS | WRITES) - {"add_job"}:
    setattr(RemoteStore, _name, _forwarding(_name))
