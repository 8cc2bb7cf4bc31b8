"""A Ray Data job: warm pipelines over a table of prompts, with retries. Needs the extra `ray`."""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .._errors import EqxdiffError, PromptError, SettingError, SourceError
from .._files import exists, write_whole
from ..models import applied, find_model
from ..pipeline import Job, Stages, chunks, generate_each, open_model, png, run_record
from .lines import PromptLine, naming, parse_line, read_lines
from .names import picture_name


INDEX = "index.parquet"
COLUMNS = ("line", "file", "prompt", "seed", "settings", "error")


def run(
    model: str,
    prompts: str | Path,
    output: str | Path,
    *,
    workers: int = 1,
    batch_size: int = 1,
    block: int = 64,
    resources: Mapping[str, Any] | None = None,
    given: Mapping[str, Any] | None = None,
    **load: Any,
) -> Path:
    """Makes a picture of each row of a table, by Ray actors that keep the model loaded.

    A picture is a file whose name holds its row and a digest of its content, and appears when all
    of it is on disk. So an actor that is killed, by Ray started again, and a job that is run again
    go on where the pictures end. Runs in the Ray cluster of `ray.init`, or of this machine.

    **Arguments:**

    - `model`: its name.
    - `prompts`: a `.parquet` or `.jsonl` file: `prompt`, perhaps `seed`, by default the row's
        number, and any settings of the model.
    - `output`: a folder that all machines share.
    - `workers`: the number of actors.
    - `batch_size`: pictures in one compiled call.
    - `block`: the rows that an actor takes at a time.
    - `resources`: of each actor, such as `{"num_gpus": 1}`: options of `map_batches`.
    - `given`: settings where a row has none.
    - `load`: further arguments of `eqxdiff.open_model`, such as `weights` and `loras`.

    **Returns:** the index: a Parquet file of `line`, `file`, `prompt`, `seed` and `settings`.

    **Raises:** `SourceError` without Ray or where the table cannot be read; `PromptError` or
    `SettingError` that names a row; the pictures of the other rows are made.
    """
    try:
        import pyarrow  # pyright: ignore[reportMissingImports]
        import pyarrow.parquet  # pyright: ignore[reportMissingImports]
        import ray  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise SourceError("This needs Ray: pip install 'eqxdiff[ray]'.") from None
    find_model(model)
    output = Path(output).absolute()
    output.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "line": line.number,
            "where": line.where,
            "prompt": line.prompt,
            "seed": line.number if line.seed is None else line.seed,
            "settings": json.dumps(dict(line.settings)),
        }
        for line in read_table_of_prompts(Path(prompts))
    ]
    blocks = max(-(-len(rows) // block), min(workers, len(rows)))
    table = ray.data.from_items(rows, override_num_blocks=blocks).map_batches(
        Painter,
        fn_constructor_args=(model, str(output), batch_size, dict(given or {}), load),
        batch_size=block,
        compute=ray.data.ActorPoolStrategy(size=workers),
        **(resources or {}),
    )
    made = sorted(table.take_all(), key=lambda row: row["line"])
    wrong = [row["error"] for row in made if row["error"]]
    made = [{k: v for k, v in row.items() if k != "error"} for row in made if not row["error"]]
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(made), buffer)
    write_whole(output / INDEX, buffer.getvalue(), overwrite=True)
    if wrong:
        more = f" So are {len(wrong) - 1} more rows." if len(wrong) > 1 else ""
        raise SettingError(f"{wrong[0]}{more} The pictures of the other rows are made.")
    return output / INDEX


def read_table_of_prompts(path: Path) -> list[PromptLine]:
    """Reads a `.parquet` or `.jsonl` file. **Raises:** `SourceError`, `PromptError`."""
    import pyarrow.parquet  # pyright: ignore[reportMissingImports]

    try:
        if path.suffix.lower() == ".jsonl":
            lines = read_lines(path.read_text(encoding="utf-8-sig"), path.name)
        elif path.suffix.lower() == ".parquet":
            rows = pyarrow.parquet.read_table(path).to_pylist()
            lines = [
                parse_line(row, number, f"{path.name}, row {number}")
                for number, row in enumerate(rows, 1)
            ]
        else:
            raise SourceError(f"{path} ends neither in .parquet nor in .jsonl.")
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror or error}.") from None
    except (UnicodeDecodeError, pyarrow.ArrowException):
        raise SourceError(f"{path} is damaged: it is no {path.suffix[1:]} file.") from None
    if not lines:
        raise PromptError(f"There is no prompt in {path}.")
    return lines


class Painter:
    """Makes pictures of rows, in an actor of Ray. The weights are read when they are needed."""

    def __init__(
        self,
        model: str,
        output: str,
        batch_size: int,
        given: Mapping[str, Any],
        load: Mapping[str, Any],
    ):
        self._blueprint = open_model(model, **load)
        self._stages = Stages(self._blueprint)
        self._output, self._batch_size, self._given = Path(output), batch_size, given

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        """Makes the pictures of rows that are not there yet, and returns the rows of the index."""
        blueprint = self._blueprint
        columns = zip(*batch.values(), strict=True)
        rows = [dict(zip(batch, values, strict=True)) for values in columns]
        made: dict[str, list[Any]] = {name: [] for name in COLUMNS}
        jobs = []
        for index, row in enumerate(rows):
            line = PromptLine(
                int(row["line"]),
                str(row["where"]),
                str(row["prompt"]),
                int(row["seed"]),
                json.loads(row["settings"]),
            )
            request = line.request(0, self._given)
            name, settings, error = "", {}, ""
            try:
                with naming(line.where):
                    name = picture_name(blueprint, line.number, request)
                    settings = applied(blueprint.resolve(request.settings))
                    if not exists(self._output / name):
                        jobs.append(Job.make(blueprint, index, request))
            except EqxdiffError as found:  # Ray would lose its words
                error = str(found)
            text = json.dumps(settings)
            values = (line.number, name, line.prompt, request.seed, text, error)
            for column, value in zip(made.values(), values, strict=True):
                column.append(value)
        for picture in generate_each(self._stages, jobs, batch_size=self._batch_size):
            record = run_record(
                blueprint, self._stages.dtypes, self._stages.attention, None, {}, self._batch_size
            )
            data = png(picture, chunks(picture, blueprint, record))
            write_whole(self._output / made["file"][picture.index], data, overwrite=True)
        return made
