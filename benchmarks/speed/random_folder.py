"""A complete engine folder with random weights on disk, for sections `load` and `generate` without a checkpoint.

Weights are drawn on the GPU, if there is one, and written by several threads, so that the disk limits the speed (32 GiB
for the 14B model in fp8). The folder opens like a built one, with checksums. `verify` does not work on it, because it
has no checkpoint and its files are not hashed.
"""

import dataclasses
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from scail2_rt.benchmarks.speed.models import model
from scail2_rt.benchmarks.speed.random_weights import RandomStore, RandomWeights, random_manifest
from scail2_rt.engines.folder.manifest import (
    MANIFEST,
    STAGES,
    TABLES,
    TOKENIZER,
    Artefact,
    check_folder,
    read_manifest,
    write_manifest,
)
from scail2_rt.engines.folder.store import STORE_NAME, StoreWriter, SummingWriter
from scail2_rt.engines.folder.sums import Sums, sum_of, sum_of_file
from scail2_rt.export.checkpoint.random_checkpoint import write_tokenizer
from scail2_rt.export.models.config import ModelConfig
from scail2_rt.export.models.precision import Precision
from scail2_rt.export.stages.definitions import stage_definitions
from scail2_rt.kernels.errors import InputError

WRITERS = 8
IN_FLIGHT = 32  # maximum number of tensors that wait for a writer
UNHASHED = "random weights, not hashed"


def write_random_folder(directory: Path, config_name: str, precision: Precision, layers: int | None = None) -> Path:
    """Make the folder, unless one of this model and precision exists. Returns `directory`. layers: at most this number
    of transformer blocks. Raises InputError for a folder with other files."""
    config = model(config_name, layers)
    if fits(directory, config, precision):
        return directory
    if directory.exists() and not (directory / STAGES).is_dir() and any(directory.iterdir()):
        raise InputError(f"{directory} contains other files. Give another folder with --work.")
    shutil.rmtree(directory, ignore_errors=True)
    (directory / STAGES).mkdir(parents=True)
    (directory / TOKENIZER).parent.mkdir()
    weights = RandomWeights(config, "cuda" if torch.cuda.is_available() else "cpu")
    store = RandomStore(config, precision, weights)
    tensors = _write_store(directory / STAGES / STORE_NAME, store)
    save_file({name: table.cpu().contiguous() for name, table in weights.tables(config).items()}, directory / TABLES)
    assert config.umt5 is not None
    write_tokenizer(directory / TOKENIZER, config.umt5.vocab)
    files = (f"{STAGES}/{STORE_NAME}", TABLES, TOKENIZER)
    artefacts = tuple(Artefact(file, (directory / file).stat().st_size, UNHASHED) for file in files)
    manifest = random_manifest(config, precision, store.layout, f"random weights of {config_name}")
    others = {file: sum_of_file(directory / file) for file in (TABLES, TOKENIZER)}
    sums = Sums(sum_of(store.layout.header), tensors, others)
    write_manifest(directory, dataclasses.replace(manifest, artefacts=artefacts, sums=sums))
    return directory


def fits(directory: Path, config: ModelConfig, precision: Precision) -> bool:
    """Whether `directory` is a complete folder of this model and precision."""
    if not (directory / MANIFEST).is_file():
        return False
    try:
        manifest = read_manifest(directory)
        check_folder(directory, manifest, stage_definitions(manifest.config))
    except InputError:
        return False
    return (manifest.config, manifest.precision) == (config, precision) and manifest.sums is not None


def _write_store(path: Path, store: RandomStore) -> dict[str, str]:
    """Draw the tensors in this thread and write them in others. Returns tensor name → checksum. Does not sync, because
    measurements read from the page cache."""
    writer = StoreWriter(path, store.layout)
    summing = SummingWriter(writer)
    room = threading.Semaphore(IN_FLIGHT)

    def write(name: str, tensor: Tensor) -> None:
        try:
            summing.write(name, tensor)
        finally:
            room.release()

    try:
        with ThreadPoolExecutor(WRITERS) as pool:
            jobs = []
            for stage, tensors in store.shapes.items():
                for parameter, tensor in store.stage(stage, tensors).items():
                    room.acquire()
                    jobs.append(pool.submit(write, f"{stage}.{parameter}", tensor.cpu()))
            for job in jobs:
                job.result()
    finally:
        writer.close()
    os.replace(writer.partial, path)
    return summing.sums
