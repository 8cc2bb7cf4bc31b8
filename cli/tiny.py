"""The command that makes a checkpoint to try the others on."""

import shlex
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from .signals import SIGNALS


def random(
    model: Annotated[str, Argument(help="The name of a model, such as flux-dev.")],
    folder: Annotated[Path, Argument(help="A folder that does not exist yet.")],
    seed: Annotated[int, Option(help="Draw the weights from this seed.")] = 0,
) -> None:
    """Writes a tiny model of random weights, whose pictures are noise."""
    from eqxdiff.convert.example import write_example
    from eqxdiff.models import check_range

    check_range("seed", seed, 0, 2**32 - 1)
    with SIGNALS.raised():
        write_example(model, folder, seed=seed)
    name = shlex.quote(str(folder))
    print(
        f"{folder} holds a tiny {model} of random weights: its pictures are noise. Try it:\n"
        f'eqxdiff generate {model} --weights {name} --prompt "a cat" --width 256 --height 256'
    )
