"""All engine stages of a checkpoint by name, in build order."""

from scail2_rt.export.models.config import ModelConfig
from scail2_rt.export.stages import clip, dit, umt5, vae
from scail2_rt.export.stages.spec import StageDefinition


def stage_definitions(config: ModelConfig) -> dict[str, StageDefinition]:
    """Return name → definition for the components that the checkpoint has."""
    stages: list[StageDefinition] = []
    if config.umt5 is not None:
        stages += umt5.definitions(config.umt5)
    if config.clip is not None:
        stages += clip.definitions(config.clip)
    if config.vae is not None:
        stages += vae.definitions(config.vae)
    if config.dit is not None:
        stages += dit.definitions(config.dit)
    return {stage.name: stage for stage in stages}
