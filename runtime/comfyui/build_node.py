"""The node that builds engines from ComfyUI's model files."""

from pathlib import Path
from typing import Any

import torch
from comfy_api.latest import io

from scail2_rt.engines.observer import BuildStep
from scail2_rt.export.checkpoint.lora import LoRASpec
from scail2_rt.runtime.comfyui import host
from scail2_rt.runtime.comfyui.animate_node import told
from scail2_rt.runtime.comfyui.building import Wanted, built
from scail2_rt.runtime.comfyui.engines_node import execution_inputs, execution_of
from scail2_rt.runtime.comfyui.sessions import Engines
from scail2_rt.runtime.comfyui.types import CATEGORY
from scail2_rt.runtime.comfyui.types import Engines as EnginesType

AUTO, NONE = "auto", "none"
PRECISIONS = [AUTO, "fp8", "bf16", "fp16", "fp32"]
LORAS = 3
_KINDS = {"vae": "vae", "umt5": "text_encoders", "clip": "clip_vision"}  # part → ComfyUI's kind of model


class BuildEngines(io.ComfyNode):
    """Builds engines once. The folder is found by the content of the source files."""

    @classmethod
    def define_schema(cls) -> Any:
        parts = [
            io.Combo.Input(part, options=[AUTO, *host.model_files(kind)], tooltip="auto: beside the checkpoint.")
            for part, kind in _KINDS.items()
        ]
        loras = [NONE, *host.model_files("loras")]
        return io.Schema(
            node_id="Scail2BuildEngines",
            display_name="SCAIL-2 Build engines",
            category=CATEGORY,
            description="Builds engines from a SCAIL-2 checkpoint and LoRAs, once, in models/scail2_rt.",
            inputs=[
                io.Combo.Input("checkpoint", options=host.model_files("diffusion_models")),
                *parts,
                io.String.Input("tokenizer", default="", tooltip="Path of tokenizer.json, if not beside umT5."),
                io.Combo.Input("precision", options=PRECISIONS, tooltip="auto: fp8 if the GPU supports it, else bf16."),
                *execution_inputs(),
                *(
                    lora
                    for number in range(1, LORAS + 1)
                    for lora in (
                        io.Combo.Input(f"lora_{number}", options=loras, default=NONE, optional=True),
                        io.Float.Input(f"strength_{number}", default=1.0, min=-4.0, max=4.0, step=0.05, optional=True),
                    )
                ),
            ],
            outputs=[
                EnginesType.Output("engines", display_name="engines"),
                io.String.Output("folder", display_name="folder"),
            ],
        )

    @classmethod
    def execute(cls, **inputs: Any) -> Any:
        with torch.inference_mode(False), told():
            folder = built(wanted_of(inputs), host.engine_root(), BuildShown())
            host.show_text(str(folder))
            return io.NodeOutput(Engines.of(folder, inputs["backend"], execution_of(inputs)), str(folder))

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> str:
        """Size and modification time (ns) of the source files, so that changed files are built again."""
        wanted = wanted_of(inputs)
        files = [wanted.checkpoint, *wanted.parts.values(), *(spec.path for spec in wanted.loras)]
        states = [(str(file), file.stat()) for file in files]
        return repr([(name, state.st_size, state.st_mtime_ns) for name, state in states])


def wanted_of(inputs: dict[str, Any]) -> Wanted:
    """The build options. Raises ComfyUI's FileNotFoundError for a model file that no longer exists."""
    parts = {part: host.model_file(kind, inputs[part]) for part, kind in _KINDS.items() if inputs[part] != AUTO}
    if inputs["tokenizer"].strip():
        parts["tokenizer"] = Path(inputs["tokenizer"].strip()).expanduser()
    named = [(inputs.get(f"lora_{n}", NONE), inputs.get(f"strength_{n}", 1.0)) for n in range(1, LORAS + 1)]
    loras = tuple(LoRASpec(host.model_file("loras", name), strength) for name, strength in named if name != NONE)
    precision = None if inputs["precision"] == AUTO else inputs["precision"]
    return Wanted(host.model_file("diffusion_models", inputs["checkpoint"]), parts, loras, precision, inputs["backend"])


class BuildShown:
    """Shows a build's progress in its node, one bar per phase. ComfyUI's cancel button ends the build between two steps
    or while a file is hashed."""

    def note(self, text: str) -> None:
        host.show_text(text)

    def started(self, step: BuildStep) -> None:
        host.stop_if_interrupted()
        host.show_text(f"{step.phase} {step.index}/{step.total} {step.name}")

    def advanced(self, step: BuildStep, done_bytes: int) -> None:
        host.stop_if_interrupted()
        host.show_progress((step.index - 1 + done_bytes / max(step.size_bytes, 1)) / step.total)

    def done(self, step: BuildStep) -> None:
        host.show_progress(step.index / step.total)
