"""The options of the commands in `main.py`, in the sections of their help. `masks` shares the options that name a case.

Only click is imported here, so that `--help` is fast. The lists of values repeat those of other modules, because
importing these would load PyTorch; a test compares them.
"""

from pathlib import Path

import click
from click.core import ParameterSource

from scail2_rt.runtime.cli.sections import PATH, in_section, option
from scail2_rt.runtime.cli.segmenter_options import MAKING
from scail2_rt.runtime.cli.types import GpuCount, MemorySize, RateType, SeedList, SizeType

LAYOUTS = ("stages", "monolithic")  # engines.build.onnx_folder.LAYOUTS
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
    "replace_mask.mp4 (replace). Its prompt.txt is used if no prompt is given.",
)
FILES = (
    option("--image", type=PATH, metavar="FILE", help="Reference image: the character."),
    option("--mask-image", type=PATH, metavar="FILE", help="Colour mask of the reference image."),
    option(
        "--driving",
        type=PATH,
        metavar="PATH",
        help="Driving clip: the motion, frame rate and audio. A video, or a folder of images.",
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
    help="animate keeps the reference's background; replace keeps the driving clip's scene; auto detects the mode from "
    "the case folder or the masks.",
)
SIZE = option(
    "--size",
    type=SizeType(),
    metavar="HxW",
    help="Height and width of the output, multiples of 32.  [default: 512x896 or 896x512, with the orientation of the "
    "reference image in animate mode and of the driving clip in replace mode]",
)
FIT = option(
    "--fit",
    type=click.Choice(FITS),
    default="auto",
    show_default=True,
    help="How inputs of another aspect ratio are fitted into the frame. official: scale to cover it and crop to the "
    "centre, as the official code does. crop: one window per clip, placed on the characters. pad: show everything, "
    "with hidden margins. auto: the first of these that keeps the characters. With official the default size follows "
    "the reference image.",
)
INPUT_OPTIONS = in_section(
    "Inputs (a case folder, a batch file, the four files, or image and driving clip)",
    CASE,
    option(
        "--batch",
        type=PATH,
        metavar="FILE",
        help="File with one case per line, as prompt@@case_dir or as a JSON object of these options. Engines load "
        "once, and an invalid line does not stop the others. -o names a folder.",
    ),
    *FILES,
    MODE,
    FIT,
    option(
        "--fit-reference",
        is_flag=True,
        help="In replace mode, scale and pad the reference image so that its character is as tall as the one in the "
        "driving clip.",
    ),
    option(
        "--allow-mask-problems",
        is_flag=True,
        help="Continue with masks that `scail2-rt masks check` refuses. The findings are printed and recorded in the "
        "report.",
    ),
    option(
        "--fps",
        type=RateType(),
        metavar="RATE",
        help="Sample the driving clip at this rate, which is also the rate of the output: 16, 23.976 or 30000/1001. "
        "For a folder of images, its frame rate.  [default: the rate of the clip; 16 for a folder]",
    ),
    option(
        "--start", type=int, default=0, show_default=True, metavar="FRAME", help="First driving frame to use, at --fps."
    ),
    option("--frames", type=int, metavar="N", help="Number of driving frames to use, at --fps.  [default: to the end]"),
)
MAKING_OPTIONS = in_section("Making masks (for an image and a driving clip without masks)", *MAKING)
PROMPT_OPTIONS = in_section(
    "Prompt",
    option("--prompt", metavar="TEXT", help="Description of the generated video (not an instruction)."),
    option("--prompt-file", type=PATH, metavar="FILE", help="Read the prompt from a text file (UTF-8 or UTF-16)."),
    option(
        "--negative-prompt",
        default="",
        metavar="TEXT",
        help="Description of what the video should not show; used if --guidance is above 1.",
    ),
)
OUTPUT_OPTIONS = in_section(
    "Output",
    option(
        "-o",
        "--output",
        type=PATH,
        required=True,
        metavar="PATH",
        help="The video to write: .mp4, .m4v, .mov, .mkv, .webm or .gif. A name without an extension is a folder of "
        "PNG files. With --batch, a folder for the videos.",
    ),
    option("--overwrite", is_flag=True, help="Replace an existing output."),
    SIZE,
    option("--codec", type=click.Choice(CODECS), help="Video codec.  [default: vp9 in .webm, else h264]"),
    option(
        "--crf",
        type=int,
        metavar="N",
        help="Constant rate factor, 0 (lossless) to 51 or 63 (smallest).  [default: 18]",
    ),
    option(
        "--metadata/--no-metadata",
        default=True,
        show_default=True,
        help="Store the settings of the run, and the names and hashes of its inputs, in the output.",
    ),
    option(
        "--from-video",
        type=PATH,
        metavar="FILE",
        help="Repeat the run that made this output, or wrote this run report, with its settings and inputs. Options "
        "on the command line override them.",
    ),
    option(
        "--dry-run",
        is_flag=True,
        help="Check everything and print segments, tokens, memory and time, without loading weights.",
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
    option(
        "--scheduler",
        "--solver",
        "scheduler",
        type=click.Choice(SCHEDULERS),
        help="Flow-matching scheduler.  [default: the preset's]",
    ),
    option("--steps", type=int, metavar="N", help="Denoising steps per segment.  [default: the preset's]"),
    option(
        "--shift",
        type=float,
        metavar="X",
        help="Shift of the noise schedule towards high noise.  [default: the preset's]",
    ),
    option(
        "--guidance",
        type=float,
        metavar="X",
        help="Guidance scale; 1 or less runs one pass per step instead of two.  [default: the preset's]",
    ),
    option("--seed", type=int, default=0, show_default=True, metavar="N", help="Seed of the noise."),
    option(
        "--seeds",
        type=SeedList(),
        default=(),
        metavar="N,N,...",
        help="Make one video per seed, NAME-seedN.mp4. Engines load once.",
    ),
    option(
        "--noise-device",
        type=click.Choice(["cpu", "cuda"]),
        default="cpu",
        show_default=True,
        help="Device that draws the noise. cpu: a seed gives the same noise on every machine. cuda: as in the "
        "official code.",
    ),
)
LONG_CLIP_OPTIONS = in_section(
    "Long clips",
    option("--segment-length", type=int, default=81, show_default=True, metavar="N", help="Frames per segment, 4n+1."),
    option(
        "--segment-overlap",
        type=int,
        default=5,
        show_default=True,
        metavar="N",
        help="Frames that a segment shares with the previous one, 4n+1.",
    ),
    option(
        "--overlap-blend",
        type=int,
        default=0,
        show_default=True,
        metavar="N",
        help="Fade from one segment to the next over the last N frames of the overlap; 0 shows the earlier segment.",
    ),
    option(
        "--anchor-color",
        type=click.Choice(ANCHORS),
        default="off",
        show_default=True,
        help="Match the background colours of a segment to the first or to the previous segment.",
    ),
    option(
        "--resume",
        is_flag=True,
        help="Resume an interrupted run after its last finished segment: repeat the command with this flag. A complete "
        "output is kept.",
    ),
)
GPUS = option(
    "--gpus",
    type=GpuCount(),
    default=1,
    show_default=True,
    metavar="N|all",
    help="GPUs of this machine that share one generation (on a CPU, processes). CUDA_VISIBLE_DEVICES selects them.",
)
BACKEND = option(
    "--backend",
    type=click.Choice(BACKENDS),
    default="auto",
    show_default=True,
    help="Executor to run. auto chooses the fastest; a named executor is never replaced by another.",
)
SELF_ATTENTION = option(
    "--attention",
    type=click.Choice(ATTENTION),
    default="auto",
    show_default=True,
    help="Self-attention of the torch executor. auto: 8 bit with fp8 engines, else the fastest 16-bit variant.",
)
VRAM_LIMIT = option(
    "--vram-limit",
    type=MemorySize(),
    metavar="SIZE",
    help="GPU memory that the torch executor may use, as in 12GiB. Weights that do not fit are streamed.  [default: no "
    "limit]",
)
NO_GRAPHS = option("--no-graphs", is_flag=True, help="Disable CUDA graphs.")
ENGINE_OPTIONS = in_section(
    "Engines",
    BACKEND,
    option(
        "--max-rows",
        type=int,
        default=16384,
        show_default=True,
        metavar="N",
        help="Maximum number of rows (tokens) per call of a stage. Fewer rows need less memory.",
    ),
    SELF_ATTENTION,
    VRAM_LIMIT,
    NO_GRAPHS,
    GPUS,
)


def engines_or_server(ctx: click.Context, parameter: click.Parameter, value: Path | None) -> Path | None:
    """Check that exactly one of ENGINES and --server is given. One in a configuration file is ignored if the other is
    on the command line. Raises UsageError if both or neither are given."""
    server = ctx.params.get("server")
    if value is not None and server is not None:
        if ctx.get_parameter_source("engines") is ParameterSource.DEFAULT_MAP:
            return None
        if ctx.get_parameter_source("server") is ParameterSource.DEFAULT_MAP:
            server = ctx.params["server"] = None
    if value is None and server is None:
        raise click.MissingParameter(ctx=ctx, param=parameter)
    if value is not None and server is not None:
        raise click.UsageError("The engine folder ENGINES and --server were both given. Use one of them.", ctx)
    return value


SERVER_OPTIONS = in_section(
    "On other machines",
    option(
        "--server",
        metavar="URL",
        is_eager=True,
        help="Send the job to the service at this address (`scail2-rt serve`), with the same options and files. The "
        "API key, if needed, is read from $SCAIL2_RT_API_KEY.",
    ),
    option(
        "--ray",
        "ray_address",
        metavar="ADDRESS",
        help="Distribute --batch or --seeds over the Ray cluster at this address: HOST:PORT, or auto on one of its "
        "nodes.",
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
    option("--lora-partial", is_flag=True, help="Accept a LoRA with modules that do not fit, and apply the others."),
)
BUILD_OPTIONS = in_section(
    "Build",
    option("-o", "--output", type=PATH, required=True, metavar="DIR", help="The engine folder to build or complete."),
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
        help="Precision of weights and arithmetic.  [default: fp8 on a GPU that has it, bf16 on another GPU, fp32 on a "
        "CPU]",
    ),
    *LORA_OPTIONS,
    option(
        "--stages",
        multiple=True,
        metavar="PATTERN",
        help="TensorRT: build only the plans of these stages, as in 'dit.blocks.*.ffn'; may be repeated.",
    ),
    option(
        "--max-picture",
        type=SizeType(),
        metavar="HxW",
        help="TensorRT: the largest frame that the VAE's plans accept, in either orientation.  [default: 704x1280]",
    ),
    option(
        "--workspace-gib",
        type=click.FloatRange(min=0.01),
        metavar="GIB",
        help="TensorRT: limit of the workspace memory of one layer.  [default: 8]",
    ),
    option(
        "--target",
        "targets",
        metavar="SM,...",
        help="TensorRT for RTX: architectures to build for, as in sm89,sm120 (RTX 40 and 50).  [default: that of this "
        "machine's GPU, else all that the precision allows]",
    ),
    option(
        "--rebuild",
        is_flag=True,
        help="Replace engines in the folder that were built from other weights or options.",
    ),
)
COMPONENT_OPTIONS = in_section(
    "Parts of the checkpoint in other files",
    option("--vae", type=PATH, metavar="FILE", help="The Wan 2.1 VAE."),
    option("--t5", "--umt5", "umt5", type=PATH, metavar="FILE", help="The umT5 encoder."),
    option("--clip", type=PATH, metavar="FILE", help="The CLIP visual tower."),
    option("--tokenizer", type=PATH, metavar="PATH", help="The file tokenizer.json, or its folder."),
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
        help="One file per engine stage, or the transformer as one graph.",
    ),
    option(
        "--precision",
        type=click.Choice(PRECISIONS),
        default="fp32",
        show_default=True,
        help="Precision of weights and arithmetic. ONNX Runtime on a CPU runs fp32 and fp16. bf16 and fp8 are for "
        "TensorRT.",
    ),
    option(
        "--check", is_flag=True, help="Check that the parser of TensorRT for RTX, or of TensorRT, accepts every node."
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
        help="Executor to test; may be repeated.  [default: all in the folder]",
    ),
    option("--repeats", type=int, default=3, show_default=True, metavar="N", help="Timed runs per stage, at least 3."),
    option(
        "--against",
        type=click.Choice(("onnxruntime",)),
        help="Also compare every stage with this executor of the folder. Needs Polygraphy.",
    ),
    option("--rows", type=int, default=64, show_default=True, metavar="N", help="Rows (tokens) of a token-wise stage."),
    option("--seed", type=int, default=0, show_default=True, metavar="N", help="Seed of the random inputs."),
)
