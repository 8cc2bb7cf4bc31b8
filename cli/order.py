"""The options of `eqxdiff generate` that are no settings of a model, each declared once."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

from typer import Argument, Option

from .output import DEFAULT_NAME


Dtype = Literal["float32", "bfloat16", "float16"]
LoraMode = Literal["merge", "runtime"]
Stage = Literal["text"]


def _option(panel: str, *flags: str, **more: Any) -> Any:
    return Option(*flags, rich_help_panel=panel, **{"show_default": True, **more})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Order:
    """What a command line asks for besides settings and parts. `None` leaves it to the model.

    The command line makes one option of each field but the last two, `settings` and `parts`, which
    it derives from the models.
    """

    model: Annotated[str, Argument(help="The model: `eqxdiff models` lists them.")]
    prompt: Annotated[
        list[str] | None,
        _option(
            "Picture",
            "--prompt",
            "-p",
            help="What to show. May be repeated.",
            metavar="TEXT",
            show_default="none",
        ),
    ] = None
    prompt_file: Annotated[
        str | None,
        _option(
            "Picture",
            help="A file with a prompt on each line; - is standard input.",
            show_default="none",
        ),
    ] = None
    seed: Annotated[
        int | None,
        _option(
            "Picture",
            "--seed",
            "-s",
            help="The seed of the first image; image k has the seed plus k.",
            show_default="random",
        ),
    ] = None
    num_images: Annotated[int, _option("Picture", help="How many images of each prompt.")] = 1
    image: Annotated[
        Path | None, _option("Picture", help="The picture to begin with.", metavar="FILE")
    ] = None
    mask: Annotated[
        Path | None,
        _option(
            "Picture",
            help="Where --image is made anew: white, and black where it is kept.",
            metavar="FILE",
            show_default="none",
        ),
    ] = None
    mask_blur: Annotated[
        float, _option("Picture", help="The radius of the blur of the mask's edge, in pixels.")
    ] = 0.0
    mask_crop: Annotated[
        int | None,
        _option(
            "Picture",
            help="Work on the masked part and so many pixels around it at full resolution, and "
            "paste the result into --image.",
            metavar="PIXELS",
            show_default="the whole picture",
        ),
    ] = None
    control: Annotated[
        list[str] | None,
        _option(
            "Picture",
            help="A ControlNet and its picture, NET=IMAGE@SCALE:START-END, as in "
            "canny=photo.png@0.5. NET is a name, repository or folder; scale and steps may be left "
            "out. May be repeated.",
            metavar="NET=IMAGE",
            show_default="none",
        ),
    ] = None
    control_guess: Annotated[
        bool,
        _option("Picture", "--control-guess", help="Let the control picture guide alone."),
    ] = False
    control_as_is: Annotated[
        bool,
        _option(
            "Picture", "--control-as-is", help="Do not look for edges in the picture of canny."
        ),
    ] = False
    noise: Annotated[
        Path | None,
        _option(
            "Picture",
            help="Initial noise in place of the seeds': .npy or .safetensors of (n, c, h, w).",
            metavar="FILE",
        ),
    ] = None
    weights: Annotated[
        str | None,
        _option(
            "Weights",
            help="A folder in the diffusers layout, a Hub repository, or a single file.",
            show_default="the model's own",
        ),
    ] = None
    revision: Annotated[
        str | None,
        _option("Weights", help="A branch, tag or commit of the repository.", show_default="main"),
    ] = None
    dtype: Annotated[
        Dtype | None,
        _option("Weights", help="The dtype of the weights.", show_default="the checkpoint's"),
    ] = None
    compute_dtype: Annotated[
        Dtype | None,
        _option(
            "Weights",
            help="The dtype of the activations.",
            show_default="float32 on a CPU, bfloat16 elsewhere",
        ),
    ] = None
    lora: Annotated[
        list[str] | None,
        _option(
            "LoRA",
            help="A LoRA, as SPEC@SCALE: a file, repository or REPOSITORY:FILE, and perhaps a "
            "scale for all or for parts, as in a.safetensors@unet=0.8,text_encoder=0.4. "
            "May be repeated.",
            metavar="SPEC",
            show_default="none",
        ),
    ] = None
    lora_partial: Annotated[
        bool,
        _option("LoRA", "--lora-partial", help="Accept LoRAs of which not all fits the model."),
    ] = False
    lora_mode: Annotated[
        LoraMode, _option("LoRA", help="Add LoRAs to the weights, or compute them beside.")
    ] = "merge"
    batch_size: Annotated[
        int | None,
        _option(
            "Memory",
            help="How many images are made at once.",
            show_default="1, or 1 for each share of a mesh",
        ),
    ] = None
    offload: Annotated[
        Stage | None,
        _option(
            "Memory",
            help="Keep the text encoders in host memory while they are not in use.",
            show_default="off",
        ),
    ] = None
    release: Annotated[
        Stage | None,
        _option(
            "Memory",
            help="Encode all prompts first, then drop the text encoders.",
            show_default="off",
        ),
    ] = None
    mesh: Annotated[
        str | None,
        _option(
            "Memory",
            help="Spread over devices, as in data=4,fsdp=2 (and tensor=).",
            show_default="one device",
        ),
    ] = None
    compile_cache: Annotated[
        Path | None,
        _option("Memory", help="Where to keep compiled programs.", show_default="the user's cache"),
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
            help="A file, a folder, or a name with {model}, {seed}, {index}, {prompt}.",
        ),
    ] = DEFAULT_NAME
    overwrite: Annotated[
        bool, _option("Output", "--overwrite", help="Replace files that exist.")
    ] = False
    no_metadata: Annotated[
        bool, _option("Output", "--no-metadata", help="Leave the settings out of the PNG.")
    ] = False
    save_latents: Annotated[
        Path | None,
        _option(
            "Output",
            help="A file for the final latents, in the form that --noise takes.",
            show_default="none",
        ),
    ] = None
    as_json: Annotated[
        bool,
        _option("Output", "--json", help="One JSON object on stdout, and events on stderr."),
    ] = False
    quiet: Annotated[
        bool,
        _option("Output", "--quiet", "-q", help="Print nothing but files, warnings and errors."),
    ] = False
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    parts: dict[str, str] = dataclasses.field(default_factory=dict)
