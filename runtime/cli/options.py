"""The options of the commands in `cli.py`, in the sections of their help; `masks` shares those that name a case.

Only click is imported here and in `cli.py`, so that `--help` answers at once. The value lists repeat what the modules
behind them define (a test compares them), because importing those would load PyTorch.
"""

from pathlib import Path

import click

from scail2_rt.runtime.cli.sections import PATH, in_section, option
from scail2_rt.runtime.cli.segmenter_options import MAKING
from scail2_rt.runtime.cli.types import GpuCount, MemorySize, RateType, SeedList, SizeType

LAYOUTS = ("stages", "monolithic")  # engines.onnx_folder.LAYOUTS
PRECISIONS = ("fp32", "bf16", "fp16", "fp8")
BACKENDS = ("auto", "torch", "onnxruntime", "tensorrt", "tensorrt-rtx")
# "auto" and kernels.attention.variants.VARIANTS
ATTENTION = ("auto", "8bit", "8bit-triton", "8bit-bf16pv", "bf16", "cudnn", "flash", "sage", "sdpa")
SCHEDULERS = ("unipc", "dpm++", "euler")
ANCHORS = ("off", "first", "previous")
FITS = ("auto", "official", "crop", "pad")
CODECS = ("h264", "hevc", "av1", "vp9")
PRESETS = ("quality", "fast")  # runtime.jobs.options


CASE = option(
    "--case",
    type=PATH,
    metavar="DIR",
    help="Folder in the official layout: ref.*, ref_mask.*, rendered_v2.mp4, and rendered_mask_v2.mp4 (animate) or "
    "replace_mask.mp4 (replace). Its prompt.txt is the prompt if none is given.",
)
FILES = (
    option("--image", type=PATH, metavar="FILE", help="Reference image: the character."),
    option("--mask-image", type=PATH, metavar="FILE", help="Colour mask of the reference image."),
    option(
        "--driving",
        type=PATH,
        metavar="PATH",
        help="Driving clip: the motion, its frame rate and its audio. A video, or a folder of images.",
    ),
    option("--mask-video", type=PATH, metavar="PATH", help="Colour mask of the driving clip, frame by frame."),
    option(
        "--extra-ref",
        "extra_refs",
        type=(PATH, PATH),
        multiple=True,
        metavar="IMAGE MASK",
        help="Another view of the character and its mask; may be repeated.",
    ),
)
MODE = option(
    "--mode",
    type=click.Choice(["auto", "animate", "replace"]),
    default="auto",
    show_default=True,
    help="animate keeps the reference's background, replace keeps the driving video's scene; auto reads it from "
    "the case folder or the masks.",
)
SIZE = option(
    "--size",
    type=SizeType(),
    metavar="HxW",
    help="Height and width of the output, multiples of 32, taken as given.  [default: 512x896, turned to the "
    "orientation of the scene that is shown: the reference image's in animate, the driving video's in replace mode]",
)
FIT = option(
    "--fit",
    type=click.Choice(FITS),
    default="auto",
    show_default=True,
    help="How pictures of another shape lie in the frame. official: scaled to cover it, the middle shown, as the "
    "public code does. crop: one window per clip, on the characters. pad: all of the picture, with hidden margins. "
    "auto: the first of these that keeps the characters. With official the default size follows the reference image.",
)
INPUT_OPTIONS = in_section(
    "Inputs (a case folder, a batch file, the four files, or image and driving video)",
    CASE,
    option(
        "--batch",
        type=PATH,
        metavar="FILE",
        help="Cases, one per line, as prompt@@case_dir or as a JSON object of these options. Engines load once, and a "
        "bad line does not stop the others. -o names a folder.",
    ),
    *FILES,
    MODE,
    FIT,
    option(
        "--fit-reference",
        is_flag=True,
        help="Replace mode: inside that frame, scale and pad the reference so that its character is as tall as the "
        "driving one.",
    ),
    option(
        "--allow-mask-problems",
        is_flag=True,
        help="Go on with masks that `masks check` calls unusable; what is wrong is printed and recorded in the report.",
    ),
    option(
        "--fps",
        type=RateType(),
        metavar="RATE",
        help="Sample the driving clip at this rate, which the output has too: 16, 23.976 or 30000/1001. Of a folder of "
        "images it is the rate.  [default: the clip's own; 16 for a folder]",
    ),
    option(
        "--start", type=int, default=0, show_default=True, metavar="FRAME", help="First driving frame to use, at --fps."
    ),
    option("--frames", type=int, metavar="N", help="Number of driving frames to use, at --fps.  [default: to the end]"),
)
MAKING_OPTIONS = in_section("Masks made inside (an image and a driving video without masks)", *MAKING)
PROMPT_OPTIONS = in_section(
    "Prompt",
    option("--prompt", metavar="TEXT", help="What the generated video shows (a description, not an instruction)."),
    option("--prompt-file", type=PATH, metavar="FILE", help="Read the prompt from a text file (UTF-8 or UTF-16)."),
    option("--negative-prompt", default="", metavar="TEXT", help="What it should not show (used when guidance > 1)."),
)
OUTPUT_OPTIONS = in_section(
    "Output",
    option(
        "-o",
        "--output",
        type=PATH,
        required=True,
        metavar="PATH",
        help="The video to write (.mp4); a folder with --batch.",
    ),
    option("--overwrite", is_flag=True, help="Replace an output that exists."),
    SIZE,
    option("--codec", type=click.Choice(CODECS), default="h264", show_default=True, help="Video codec."),
    option(
        "--crf",
        type=int,
        default=18,
        show_default=True,
        metavar="N",
        help="Constant rate factor, 0 (lossless) to 51 or 63 (smallest).",
    ),
    option(
        "--dry-run", is_flag=True, help="Check everything and print segments, tokens, memory and time; load nothing."
    ),
)
SAMPLING_OPTIONS = in_section(
    "Sampling",
    option(
        "--preset",
        type=click.Choice(PRESETS),
        default="quality",
        show_default=True,
        help="quality: 40 UniPC steps, shift 3, guidance 5. fast (needs a step-distilled LoRA): 6 Euler steps, "
        "shift 5, guidance 1. The options below override it.",
    ),
    option("--scheduler", "--solver", "scheduler", type=click.Choice(SCHEDULERS), help="Flow-matching scheduler."),
    option("--steps", type=int, metavar="N", help="Denoising steps of each segment."),
    option("--shift", type=float, metavar="X", help="Shift of the noise schedule towards high noise."),
    option(
        "--guidance", type=float, metavar="X", help="Guidance scale; 1 or less runs one pass per step instead of two."
    ),
    option("--seed", type=int, default=0, show_default=True, metavar="N", help="Seed of the noise."),
    option(
        "--seeds",
        type=SeedList(),
        default=(),
        metavar="N,N,...",
        help="Make one video per seed, NAME-seedN.mp4 each, with engines that load once.",
    ),
    option(
        "--noise-device",
        type=click.Choice(["cpu", "cuda"]),
        default="cpu",
        show_default=True,
        help="Where noise is drawn. cpu: equal seeds give equal noise on any machine; cuda: as the official pipeline.",
    ),
)
LONG_CLIP_OPTIONS = in_section(
    "Long clips",
    option(
        "--segment-length", type=int, default=81, show_default=True, metavar="N", help="Frames denoised together, 4n+1."
    ),
    option(
        "--segment-overlap",
        type=int,
        default=5,
        show_default=True,
        metavar="N",
        help="Frames that a segment takes over from the one before, 4n+1.",
    ),
    option(
        "--overlap-blend",
        type=int,
        default=0,
        show_default=True,
        metavar="N",
        help="Fade the last N frames of the overlap from one segment into the next; 0 shows them as the earlier one.",
    ),
    option(
        "--anchor-color",
        type=click.Choice(ANCHORS),
        default="off",
        show_default=True,
        help="Hold the colours of later segments to those of the first or of the previous one, measured on the "
        "background.",
    ),
    option(
        "--resume",
        is_flag=True,
        help="Continue an interrupted run after its last finished segment: the same command and this flag. What is "
        "complete stays; what was not begun begins.",
    ),
)
GPUS = option(
    "--gpus",
    type=GpuCount(),
    default=1,
    show_default=True,
    metavar="N|all",
    help="GPUs of this machine that share a generation (on a CPU, processes); CUDA_VISIBLE_DEVICES says which.",
)
BACKEND = option(
    "--backend",
    type=click.Choice(BACKENDS),
    default="auto",
    show_default=True,
    help="Executor to run; one that is named is used or refused, never replaced.",
)
SELF_ATTENTION = option(
    "--attention",
    type=click.Choice(ATTENTION),
    default="auto",
    show_default=True,
    help="Self-attention of the torch executor. auto: 8 bit with fp8 engines, else the fastest 16-bit one; a named "
    "one is used or refused.",
)
VRAM_LIMIT = option(
    "--vram-limit",
    type=MemorySize(),
    metavar="SIZE",
    help="GPU memory that the torch executor may use, as in 12GiB; weights that do not fit are streamed.",
)
NO_GRAPHS = option("--no-graphs", is_flag=True, help="Disable CUDA graphs: launch every kernel of every step.")
ENGINE_OPTIONS = in_section(
    "Engines",
    BACKEND,
    option(
        "--max-rows",
        type=int,
        default=16384,
        show_default=True,
        metavar="N",
        help="Most tokens a stage sees at once: fewer need less memory.",
    ),
    SELF_ATTENTION,
    VRAM_LIMIT,
    NO_GRAPHS,
    GPUS,
)


def engines_or_server(ctx: click.Context, parameter: click.Parameter, value: Path | None) -> Path | None:
    """One of the two does the work of `generate`."""
    server = ctx.params.get("server")
    if value is None and server is None:
        raise click.MissingParameter(ctx=ctx, param=parameter)
    if value is not None and server is not None:
        raise click.UsageError("the engine folder ENGINES and --server were both given: use one of them", ctx)
    return value


SERVER_OPTIONS = in_section(
    "Elsewhere",
    option(
        "--server",
        metavar="URL",
        is_eager=True,
        help="Let the service at this address (`scail2-rt serve`) do the work: same options, same files, no start. Its "
        "key, if it wants one, is read from $SCAIL2_RT_API_KEY.",
    ),
    option(
        "--ray",
        "ray_address",
        metavar="ADDRESS",
        help="Spread --batch or --seeds over the Ray cluster at this address: HOST:PORT, or auto on one of its nodes.",
    ),
)
LORA_OPTIONS = (
    option(
        "--lora",
        "loras",
        multiple=True,
        metavar="PATH[:STRENGTH]",
        help="LoRA, LoKr, LoHa or DoRA to fuse: a file or a PEFT folder; may be repeated.",
    ),
    option("--lora-partial", is_flag=True, help="Apply the modules that fit of a LoRA that does not fit wholly."),
)
BUILD_OPTIONS = in_section(
    "Build",
    option("-o", "--output", type=PATH, required=True, metavar="DIR", help="The engine folder to make or complete."),
    option(
        "--backend",
        "backends",
        type=click.Choice(BACKENDS),
        multiple=True,
        default=("auto",),
        show_default=True,
        help="Executor to build for; may be repeated.",
    ),
    option(
        "--precision",
        type=click.Choice(PRECISIONS),
        help="Precision of weights and arithmetic.  [default: fp8 on a "
        "GPU that has it, bf16 on another GPU, fp32 on a CPU]",
    ),
    *LORA_OPTIONS,
    option(
        "--stages",
        multiple=True,
        metavar="PATTERN",
        help="TensorRT: make only the plans of these stages, e.g. 'dit.blocks.*.ffn'; may be repeated.",
    ),
    option(
        "--max-picture",
        type=SizeType(),
        metavar="HxW",
        help="TensorRT: the largest picture that the VAE's plans take, either way round.  [default: 704x1280]",
    ),
    option(
        "--workspace-gib",
        type=click.FloatRange(min=0.01),
        metavar="GIB",
        help="TensorRT: limit for the scratch memory of one layer.  [default: 8]",
    ),
    option(
        "--target",
        "targets",
        metavar="SM,...",
        help="TensorRT for RTX: cards to build for, e.g. sm89,sm120 (RTX 40 and 50).  [default: this machine's card, "
        "else all that the precision allows]",
    ),
    option("--rebuild", is_flag=True, help="Build again if the folder holds engines of other weights or options."),
)
COMPONENT_OPTIONS = in_section(
    "Parts of the checkpoint that lie elsewhere",
    option("--vae", type=PATH, metavar="FILE", help="Wan 2.1 VAE."),
    option("--t5", "--umt5", "umt5", type=PATH, metavar="FILE", help="umT5 encoder."),
    option("--clip", type=PATH, metavar="FILE", help="CLIP visual tower."),
    option("--tokenizer", type=PATH, metavar="PATH", help="tokenizer.json, or its folder."),
)
CHECKPOINT_OPTIONS = in_section(
    "Options",
    option("--preset", default="tiny", show_default=True, metavar="NAME", help="Sizes of the networks."),
    option("--seed", type=int, default=0, show_default=True, metavar="N", help="Seed of the weights."),
)
EXPORT_OPTIONS = in_section(
    "Export",
    option("-o", "--output", type=PATH, required=True, metavar="DIR", help="The new folder to write."),
    option(
        "--layout",
        type=click.Choice(LAYOUTS),
        default="stages",
        show_default=True,
        help="One file for each engine stage, or the transformer as one graph.",
    ),
    option(
        "--precision",
        type=click.Choice(PRECISIONS),
        default="fp32",
        show_default=True,
        help="Types of weights and arithmetic. ONNX Runtime on a CPU runs fp32 and fp16; bf16, fp8 are for TensorRT.",
    ),
    option(
        "--check", is_flag=True, help="Ask the parser of TensorRT for RTX, or of TensorRT, whether it takes every node."
    ),
    *LORA_OPTIONS,
)
VERIFY_OPTIONS = in_section(
    "Verify",
    option(
        "--checkpoint", type=PATH, required=True, metavar="PATH", help="The checkpoint that the folder was built from."
    ),
    option(
        "--backend",
        "backends",
        type=click.Choice(BACKENDS[1:]),
        multiple=True,
        help="Executor to test; may be repeated.  [default: all that the folder holds]",
    ),
    option("--repeats", type=int, default=3, show_default=True, metavar="N", help="Timed runs of a stage, at least 3."),
    option(
        "--against",
        type=click.Choice(("onnxruntime",)),
        help="Compare every stage with this executor of the folder too, by Polygraphy.",
    ),
    option("--rows", type=int, default=64, show_default=True, metavar="N", help="Tokens of a token-wise stage."),
    option("--seed", type=int, default=0, show_default=True, metavar="N", help="Seed of the random inputs."),
)
