"""Repair of a finished engine folder: add checksums to a folder without, and make damaged stages again.

A damaged stage is converted again and written over its place in the store; every other byte stays unchanged. Its
checksums in the manifest stay too, so that the next check detects a repair that was killed halfway. Conversions are
bit-identical; only results with a fused LoRA may depend on the machine, and then the manifest gets new checksums at the
end. Other files are made as in a build: tables and tokenizer here, graphs and plans by their backend.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from scail2_rt.engines.build.assemble import Plan
from scail2_rt.engines.folder.damage import Damage, find_damage, listed, sums_now
from scail2_rt.engines.folder.journal import JOURNAL, Journal
from scail2_rt.engines.folder.manifest import STAGES, TABLES, TOKENIZER, Artefact, Manifest, describe_command
from scail2_rt.engines.folder.sources import hash_file
from scail2_rt.engines.folder.store import STORE_NAME, StoreRepairer, SummingWriter
from scail2_rt.engines.folder.sums import Sums, sum_of, sum_of_file
from scail2_rt.engines.observer import BuildObserver, Phase
from scail2_rt.engines.registry import backend
from scail2_rt.kernels.errors import InputError

STORE = f"{STAGES}/{STORE_NAME}"


@dataclass(frozen=True, slots=True)
class RepairResult:
    """The new manifest (not written yet), and the names of the stages and files that were made again."""

    manifest: Manifest
    repaired: tuple[str, ...] = ()
    sums_added: bool = False


def repair_folder(plan: Plan, manifest: Manifest, observer: BuildObserver) -> RepairResult:
    """Check a finished folder of the same request, and repair damage. A folder without checksums gets them.

    Raises InputError for a damaged folder without checksums, because the damage cannot be located."""
    if manifest.sums is None:
        return RepairResult(_with_sums(plan, manifest, observer), sums_added=True)
    sums, repaired = manifest.sums, dict[str, None]()
    for _ in range(2):  # a damaged header may hide further damage
        damages = find_damage(plan.directory, manifest, sums, observer)
        if damages:
            observer.note(f"damaged: {listed(damages)}; only this is made again")
            sums = _repair(plan, manifest, sums, damages, observer)
            repaired |= dict.fromkeys(damage.stage or damage.part for damage in damages)
        if not any(damage.kind == "header" for damage in damages):
            break
    if not repaired:
        return RepairResult(manifest)
    changed = {STORE} if sums.tensors != manifest.sums.tensors else set[str]()
    changed |= {path for path, value in sums.files.items() if value != manifest.sums.files.get(path)}
    artefacts = tuple(_sealed(plan, a, observer) if a.path in changed else a for a in manifest.artefacts)
    return RepairResult(dataclasses.replace(manifest, sums=sums, artefacts=artefacts), tuple(repaired))


def _with_sums(plan: Plan, manifest: Manifest, observer: BuildObserver) -> Manifest:
    wrong = [a.path for a in manifest.artefacts if _sealed(plan, a, observer) != a]
    if wrong:
        raise InputError(
            f"{plan.directory} is damaged: the manifest has another hash for {', '.join(wrong)}, and the folder has no "
            "checksums that would locate the stage. Rebuild it with: "
            f"{describe_command(manifest, plan.directory)}"
        )
    files = [artefact.path for artefact in manifest.artefacts if artefact.path != STORE]
    sums = sums_now(plan.directory, files, observer)
    observer.note(f"{plan.directory} had no checksums; it has them now")
    return dataclasses.replace(manifest, sums=sums)


def _sealed(plan: Plan, artefact: Artefact, observer: BuildObserver) -> Artefact:
    path = plan.directory / artefact.path
    size = path.stat().st_size
    phase = Phase(observer, "seal", {artefact.path: size})
    step = phase.start(artefact.path)
    digest = hash_file(path, partial(observer.advanced, step))
    phase.finish(step)
    return Artefact(artefact.path, size, digest)


def _repair(plan: Plan, manifest: Manifest, sums: Sums, damages: tuple[Damage, ...], observer: BuildObserver) -> Sums:
    """Make damaged parts again → the folder's checksums, which are unchanged if the results are bit-identical."""
    if sum_of(plan.layout.header) != sums.header:
        raise InputError(
            f"{plan.directory} is damaged: {listed(damages)}, and this version of scail2-rt uses another layout of the "
            f"weight store. Rebuild it with: {describe_command(manifest, plan.directory)}"
        )
    stages = [stage for stage in plan.tensors if any(d.stage == stage and d.kind == "tensor" for d in damages)]
    header = any(damage.kind == "header" for damage in damages)
    tensors = {**sums.tensors, **_write_stages(plan, stages, header, observer)}
    files = {damage.name for damage in damages if damage.kind == "file"}
    if TABLES in files:
        plan.write_tables()
    if TOKENIZER in files:
        plan.copy_tokenizer()
    for name in manifest.backends:
        _build_files(plan, name, files, observer)
    again = {path: sum_of_file(plan.directory / path) for path in files}
    return Sums(sums.header, tensors, {**sums.files, **again})


def _write_stages(plan: Plan, stages: list[str], header: bool, observer: BuildObserver) -> Mapping[str, str]:
    """Write stages over their places in the store → the checksums of their tensors."""
    phase = Phase(observer, "repair", {stage: plan.stage_bytes(stage) for stage in stages})
    writer = StoreRepairer(plan.store, plan.layout)
    summing = SummingWriter(writer)
    try:
        if header:
            writer.write_header()
        for stage in stages:
            step = phase.start(stage)
            plan.write_stage(summing, stage)
            phase.finish(step)
        writer.finish()
    finally:
        writer.close()
    return summing.sums


def _build_files(plan: Plan, name: str, files: set[str], observer: BuildObserver) -> None:
    """Make a backend build those of its files again that are in `files`."""
    maker = backend(name)
    damaged = tuple(stage for stage in plan.definitions if files & set(maker.files([stage])))
    if not damaged:
        return
    maker.forget(plan.directory, damaged)
    done = [f"{name}/{stage}" for stage in plan.definitions if stage not in damaged]
    journal = Journal(plan.directory / JOURNAL, done=done)
    try:
        maker.build(dataclasses.replace(plan.artefacts, patterns=damaged), observer, journal)
    finally:
        journal.remove()
