"""Every engine stage of a checkpoint, by name, in the order in which a build makes them."""

from scail2_rt.export import dit_stages, encoder_stages, vae_stages
from scail2_rt.export.config import ModelConfig
from scail2_rt.export.spec import StageDefinition


def stage_definitions(config: ModelConfig) -> dict[str, StageDefinition]:
    """Name → definition for the components that the checkpoint has."""
    stages: list[StageDefinition] = []
    if config.umt5 is not None:
        stages += encoder_stages.umt5_definitions(config.umt5)
    if config.clip is not None:
        stages += encoder_stages.clip_definitions(config.clip)
    if config.vae is not None:
        stages += vae_stages.definitions(config.vae)
    if config.dit is not None:
        stages += dit_stages.definitions(config.dit)
    return {stage.name: stage for stage in stages}
