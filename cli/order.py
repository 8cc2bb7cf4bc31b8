"""The options of `eqxdiff generate` that are no settings of a model, each declared once."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

from typer import Argument, Option

from .output import DEFAULT_NAME


Dtype = Literal["float32", "bfloat16", "float16"]
LoraMode = Literal["merge", "runtime"]
Stage = Literal["text"]
Attention = Literal[
    "auto",
    "xla",
    "chunked",
    "pallas_tpu",
    "cudnn",
    "pallas_gpu",
    "dot_product",
    "flash",
    "cudnn_flash_te",
]


def _option(panel: str, *flags: str, default: str | None = None, **more: Any) -> Any:
    """Makes an option. `default` says in words what holds where the option is not given."""
    return Option(*flags, rich_help_panel=panel, show_default=default or True, **more)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Order:
    """What a command line asks for besides settings and parts. `None` leaves it to the model.

    The command line makes one option of each field but the last two, `settings` and `parts`, which
    it derives from the models.
    """

    model: Annotated[
        str, Argument(metavar="MODEL", help="The name of a model; `eqxdiff models` lists them.")
    ]
    prompt: Annotated[
        list[str] | None,
        _option(
            "Picture",
            "--prompt",
            "-p",
            help="Make a picture of this text. May be repeated.",
            default="none",
        ),
    ] = None
    prompt_file: Annotated[
        str | None,
        _option(
            "Picture",
            help="Read a prompt from each line of a file; - is standard input. A line of a .jsonl "
            "file is an object with a prompt, and perhaps a seed and settings of its own.",
            metavar="FILE",
            default="none",
        ),
    ] = None
    seed: Annotated[
        int | None,
        _option(
            "Picture",
            "--seed",
            "-s",
            help="Draw the noise of the first picture of a prompt from this seed; the seed of each "
            "further picture is one higher.",
            default="random",
        ),
    ] = None
    num_images: Annotated[
        int, _option("Picture", help="Make this many pictures of each prompt.")
    ] = 1
    image: Annotated[
        list[Path] | None,
        _option(
            "Picture",
            help="Begin with this picture; --strength says how much of it is made anew. Models "
            "that edit look at it instead, and take several: it may be repeated.",
            default="none",
        ),
    ] = None
    mask: Annotated[
        Path | None,
        _option(
            "Picture",
            help="Make --image anew where this picture is white, and keep it where it is black.",
            default="none",
        ),
    ] = None
    mask_blur: Annotated[
        float, _option("Picture", help="Blur the edge of --mask by this radius, in pixels.")
    ] = 0.0
    mask_crop: Annotated[
        int | None,
        _option(
            "Picture",
            help="Work on the masked part and this many pixels around it at full resolution, and "
            "paste the result into --image.",
            default="off",
        ),
    ] = None
    control: Annotated[
        list[str] | None,
        _option(
            "Picture",
            help="Steer by a ControlNet and its picture, as in canny=photo.png@0.5. NET is a name, "
            "repository or folder; after @ come a scale and perhaps a part of the steps, as in "
            "@0.5:0-0.8. May be repeated.",
            metavar="NET=FILE",
            default="none",
        ),
    ] = None
    control_guess: Annotated[
        bool,
        _option(
            "Picture",
            "--control-guess",
            help="Let the control pictures guide alone, for an empty prompt.",
        ),
    ] = False
    control_as_is: Annotated[
        bool,
        _option(
            "Picture",
            "--control-as-is",
            help="Give the canny ControlNet its picture as it is, without finding edges in it.",
        ),
    ] = False
    noise: Annotated[
        Path | None,
        _option(
            "Picture",
            help="Start from the noise in a .npy or .safetensors file of shape (n, c, h, w), "
            "instead of the seed's.",
            default="none",
        ),
    ] = None
    weights: Annotated[
        str | None,
        _option(
            "Weights",
            help="Read the weights from a folder in the diffusers layout, a Hub repository or a "
            "single file.",
            metavar="SPEC",
            default="the model's own",
        ),
    ] = None
    revision: Annotated[
        str | None,
        _option(
            "Weights",
            help="Use this branch, tag or commit of the repository.",
            metavar="NAME",
            default="main",
        ),
    ] = None
    dtype: Annotated[
        Dtype | None,
        _option("Weights", help="Keep the weights in this type.", default="the checkpoint's"),
    ] = None
    compute_dtype: Annotated[
        Dtype | None,
        _option(
            "Weights",
            help="Keep the activations in this type.",
            default="float32 on a CPU, bfloat16 elsewhere",
        ),
    ] = None
    lora: Annotated[
        list[str] | None,
        _option(
            "LoRA",
            help="Apply a LoRA: a file, repository or REPOSITORY:FILE. After @ come a scale, or "
            "scales of parts, as in a.safetensors@unet=0.8. May be repeated.",
            metavar="SPEC@SCALE",
            default="none",
        ),
    ] = None
    lora_partial: Annotated[
        bool,
        _option(
            "LoRA",
            "--lora-partial",
            help="Accept a LoRA of which some tensors do not fit the model.",
        ),
    ] = False
    lora_mode: Annotated[
        LoraMode,
        _option("LoRA", help="Add LoRAs to the weights, or compute them beside the weights."),
    ] = "merge"
    batch_size: Annotated[
        int | None,
        _option(
            "Memory",
            help="Make this many pictures at once.",
            default="1, or 1 for each part of a batch on --mesh",
        ),
    ] = None
    offload: Annotated[
        Stage | None,
        _option(
            "Memory",
            help="Keep the text encoders in host memory while they are not in use.",
            default="off",
        ),
    ] = None
    release: Annotated[
        Stage | None,
        _option(
            "Memory",
            help="Encode all prompts first, then drop the text encoders.",
            default="off",
        ),
    ] = None
    mesh: Annotated[
        str | None,
        _option(
            "Memory",
            help="Spread the work over devices along the axes cfg, data, fsdp, context and tensor, "
            "as in data=4,fsdp=2. -1 stands for the devices that remain, and auto for the fastest "
            "mesh that fits.",
            metavar="AXES",
            default="one device",
        ),
    ] = None
    attention: Annotated[
        Attention,
        _option(
            "Memory",
            help="Compute attention by this backend. The last three are MaxDiffusion's names.",
        ),
    ] = "auto"
    attention_blocks: Annotated[
        str | None,
        _option(
            "Memory",
            help="Let attention work on blocks of so many queries and keys.",
            metavar="QUERIES,KEYS",
            default="the backend's",
        ),
    ] = None
    coordinator: Annotated[
        str | None,
        _option(
            "Processes",
            help="Join other processes, which are called alike, at this address of process 0; auto "
            "asks the TPU pod, SLURM, Kubernetes or Open MPI for address and numbers.",
            metavar="HOST:PORT",
            default="one process",
        ),
    ] = None
    process_id: Annotated[
        int | None,
        _option("Processes", help="The number of this process, from 0 on.", default="detected"),
    ] = None
    num_processes: Annotated[
        int | None,
        _option("Processes", help="The number of processes that join.", default="detected"),
    ] = None
    start_timeout: Annotated[
        float,
        _option("Processes", help="Wait this many seconds for the other processes at the start."),
    ] = 300.0
    shard_of: Annotated[
        int | None,
        _option(
            "Processes",
            help="Share the lines of --prompt-file among this many jobs that know nothing of each "
            "other, and make those pictures of this job that are not in the folder --output yet.",
            default="off",
        ),
    ] = None
    shard: Annotated[
        int | None,
        _option(
            "Processes",
            help="The number of this job of --shard-of, from 0 on.",
            default="the scheduler's",
        ),
    ] = None
    compiled: Annotated[
        Path | None,
        _option(
            "Memory",
            help="Run the programs in a file of `eqxdiff compile`, without tracing any.",
            default="none",
        ),
    ] = None
    compile_cache: Annotated[
        Path | None,
        _option(
            "Memory",
            help="Keep compiled programs in this folder.",
            metavar="FOLDER",
            default="the user's cache",
        ),
    ] = None
    no_compile_cache: Annotated[
        bool, _option("Memory", "--no-compile-cache", help="Keep no compiled programs.")
    ] = False
    output: Annotated[
        str,
        _option(
            "Output",
            "--output",
            "-o",
            help="Write to a file, to a folder, or to names with {model}, {seed}, {index} and "
            "{prompt} in them.",
            metavar="FILE",
        ),
    ] = DEFAULT_NAME
    overwrite: Annotated[
        bool, _option("Output", "--overwrite", help="Replace files that exist.")
    ] = False
    no_metadata: Annotated[
        bool, _option("Output", "--no-metadata", help="Leave the settings out of the PNG files.")
    ] = False
    save_latents: Annotated[
        Path | None,
        _option(
            "Output",
            help="Write the final latents to a file, in a format that --noise reads.",
            default="none",
        ),
    ] = None
    as_json: Annotated[
        bool,
        _option("Output", "--json", help="Print one JSON object on stdout, and events on stderr."),
    ] = False
    quiet: Annotated[
        bool,
        _option("Output", "--quiet", "-q", help="Print only files, warnings and errors."),
    ] = False
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    parts: dict[str, str] = dataclasses.field(default_factory=dict)
