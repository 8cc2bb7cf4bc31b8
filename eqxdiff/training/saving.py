"""Training states on disk: one safetensors file of all arrays, written whole or not at all."""

import collections
import json
import os
import re
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from .._errors import CheckpointError
from ..checkpoint.load import dotted, is_leaf, leaf_paths
from ..checkpoint.save import write_tensors
from ..distributed import is_first, to_host
from ..tensors import SafetensorsFile, TensorInfo


State = TypeVar("State")

NAME = re.compile(r"step-(\d{8})")
ARRAYS, FACTS = "state.safetensors", "state.json"


def save_state(
    folder: str | os.PathLike[str], step: int, state: Any, facts: Mapping[str, Any], keep: int = 2
) -> Path:
    """Writes all arrays of a PyTree to `folder/step-NNNNNNNN`, and removes old states.

    Of several processes all call this, and the first one writes.

    **Arguments:**

    - `facts`: JSON that is written beside the arrays.
    - `keep`: the number of states that stay.

    **Raises:** `CheckpointError` where the state cannot be written; earlier states stay.
    """
    folder = Path(folder)
    target = folder / f"step-{step:08d}"
    draft = folder / f".{target.name}.{secrets.token_hex(4)}"
    leaves = leaf_paths(state)
    infos = {name: TensorInfo(leaf.shape, np.dtype(leaf.dtype)) for name, leaf in leaves.items()}
    arrays = ((name, to_host(leaf)) for name, leaf in leaves.items())
    if not is_first():
        collections.deque(arrays, maxlen=0)
        return target
    try:
        draft.mkdir(parents=True)
        write_tensors(draft / ARRAYS, infos, arrays, {})
        (draft / FACTS).write_text(json.dumps(dict(facts), indent=2) + "\n", encoding="utf-8")
        if target.exists():
            shutil.rmtree(target)
        draft.rename(target)
    except OSError as error:
        where = error.filename or target
        raise CheckpointError(f"{where} cannot be written: {error.strerror}.") from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    for old in saved_states(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def saved_states(folder: str | os.PathLike[str]) -> list[Path]:
    """Lists the states in a folder, the latest last."""
    if not Path(folder).is_dir():
        return []
    return sorted(path for path in Path(folder).iterdir() if NAME.fullmatch(path.name))


def read_facts(path: Path) -> dict[str, Any]:
    """Reads the facts of a state. **Raises:** `CheckpointError` where the file is damaged."""
    try:
        return json.loads((path / FACTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise CheckpointError(f"{path / FACTS} is missing or damaged.") from None


def load_state(path: Path, like: State) -> State:
    """Reads the state in a folder that `save_state` wrote.

    **Arguments:**

    - `like`: a state of the same structure, shapes and dtypes.

    **Raises:** `CheckpointError` where the file is damaged or has other names, shapes or dtypes.
    """
    source = SafetensorsFile(path / ARRAYS)
    wanted = leaf_paths(like)
    found = source.tensors
    problems = [f"{name}: missing" for name in wanted if name not in found]
    problems += [f"{name}: unknown" for name in found if name not in wanted]
    for name in wanted.keys() & found.keys():
        shape, dtype = tuple(wanted[name].shape), np.dtype(wanted[name].dtype)
        if (shape, dtype) != (found[name].shape, found[name].dtype):
            has = f"{list(found[name].shape)} of {found[name].dtype}"
            problems.append(f"{name}: {has}, not {list(shape)} of {dtype}")
    if problems:
        more = [f"and {len(problems) - 10} more"] if len(problems) > 10 else []
        header = f"{path} is the state of another model or optimizer:"
        raise CheckpointError("\n  ".join([header, *sorted(problems)[:10], *more]))

    def read(entries: Any, leaf: Any) -> Any:
        if not is_leaf(leaf):
            return leaf
        name = dotted(entries)

        def part(index: Any) -> np.ndarray:
            box = tuple(s.indices(n)[:2] for s, n in zip(index, found[name].shape, strict=True))
            out = np.empty([high - low for low, high in box], found[name].dtype)
            source.read(name, box, out)
            return out

        if not isinstance(leaf, jax.Array) or not leaf.committed:
            return jnp.array(part((slice(None),) * len(leaf.shape)))
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, part)

    return jax.tree_util.tree_map_with_path(read, like)
