"""The program: its commands, and how it ends."""

import errno
import importlib.metadata
import io
import os
import re
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from eqxdiff import EqxdiffError

from .bulk import bulk
from .compile import HELP as COMPILE_HELP, command as compile_command, compile
from .convert import convert
from .generate import HELP, command as generate_command, generate
from .helptext import documented
from .inspect import inspect
from .lora import app as lora
from .plan import plan
from .signals import Terminated, tell
from .tables import models, samplers
from .tiny import random
from .train import train


app = typer.Typer(
    help="Text-to-image diffusion models in JAX.",
    rich_markup_mode="markdown",
    add_completion=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)
app.command(help=HELP)(generate)
app.command(help=COMPILE_HELP)(compile)
for command in (bulk, convert, inspect, models, samplers, plan, train, random):
    app.command()(documented(command))
app.add_typer(lora, name="lora")

DERIVED = (("generate", HELP, generate_command), ("compile", COMPILE_HELP, compile_command))
"""The commands whose options come from the settings of the models, with their help."""

UsageError: Any = typer.BadParameter.__base__
"""The class of the click that this version of Typer contains or depends on."""

OUT_OF_MEMORY = (
    "There is too little memory for this: try --offload text, --dtype bfloat16, a smaller "
    "--batch-size or a smaller picture."
)

NAMED = re.compile(r"`([a-z][a-z0-9_]*)`")
"""The name of an argument in an error of the library."""

OTHERWISE = {"controls": "control", "control_scale": "control", "loras": "lora"}
"""Arguments of the library whose options have other names."""


def _version(wanted: bool) -> bool:
    if wanted:
        print(f"eqxdiff {importlib.metadata.version('eqxdiff')}")
        raise typer.Exit
    return wanted


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", "-V", callback=_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    pass


def run(argv: Sequence[str]) -> int:
    """Runs a command line and returns its exit status.

    An error that the user can mend is one sentence on stderr, without a traceback: its status is 1,
    or 2 where the command line itself is wrong. 130 and 143 stand for Ctrl-C and SIGTERM.
    """
    argv = list(argv) or ["--help"]
    as_json = "--json" in argv
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # a file's name may be any bytes
    try:
        with _program(argv).make_context("eqxdiff", argv) as ctx:
            ctx.command.invoke(ctx)
        sys.stdout.flush()
    except typer.Exit as ending:
        return ending.exit_code
    except UsageError as error:
        see = "" if error.ctx is None else f" See {error.ctx.command_path} --help."
        return _fail(f"{error.format_message().rstrip('.')}.{see}", 2, as_json)
    except EqxdiffError as error:
        return _fail(flagged(str(error), argv), 1, as_json)
    except (KeyboardInterrupt, typer.Abort):
        return _fail("Interrupted.", 130, as_json)
    except Terminated:
        return _fail("Terminated.", 143, as_json)
    except OSError as error:
        if error.filename is not None:
            return _fail(f"{error.filename}: {error.strerror}.", 1, as_json)
        sys.stdout = open(os.devnull, "w")  # stdout could not be written
        if error.errno == errno.EPIPE:
            return 141  # the reader has gone: there is nobody to tell
        return _fail(f"{error.strerror or error}.", 1, as_json)
    except Exception as error:
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            return _fail(OUT_OF_MEMORY, 1, as_json)
        raise
    return 0


def _program(argv: Sequence[str]) -> Any:
    """Returns the program. A command that derives its options knows them where it is called."""
    program = typer.main.get_command(app)
    for name, text, command in DERIVED:
        if argv[:1] == [name]:
            single = typer.Typer(rich_markup_mode="markdown", add_completion=False)
            settings = {"help_option_names": ["--help", "-h"]}
            single.command(name, help=text, context_settings=settings)(command())
            program.commands[name] = typer.main.get_command(single)  # pyright: ignore
    return program


def flagged(message: str, argv: Sequence[str]) -> str:
    """Replaces names of arguments, in backquotes, by options of the command that is called.

    Other words in backquotes stay as they are.
    """
    try:
        command = _program(argv)
    except EqxdiffError:
        return message  # which says why there are no options
    for word in argv:
        command = getattr(command, "commands", {}).get(word, command)
    options = {option for parameter in command.params for option in parameter.opts}

    def flag(match: re.Match[str]) -> str:
        name = OTHERWISE.get(match[1], match[1])
        option = f"--{name.replace('_', '-')}"
        return option if option in options else match[0]

    return NAMED.sub(flag, message)


def _fail(message: str, status: int, as_json: bool) -> int:
    tell(message, as_json)
    if (jax := sys.modules.get("jax")) is not None and jax.distributed.is_initialized():
        sys.stderr.flush()
        os._exit(status)  # JAX would wait for the other processes, which stop
    return status
