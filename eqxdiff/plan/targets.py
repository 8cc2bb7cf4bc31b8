"""The machines that a plan may be for, and the peaks of them that it assumes."""

import dataclasses
import difflib
import math
import os
import re

from .._errors import SettingError


GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device. The figures are those of its maker's data sheet, without sparsity.

    **Fields:**

    - `summary`: what it is.
    - `memory`: the bytes that a program may use.
    - `narrow`, `wide`: operations a second on bfloat16 and on float32, whose products are whole.
    - `bandwidth`: bytes a second from and to its memory.
    - `link`: bytes a second to its neighbours, in one direction.
    - `topology`: how the TPU compiler calls it, if it does.
    - `overhead`: bytes that the runtime itself holds.
    """

    summary: str
    memory: float
    narrow: float
    wide: float
    bandwidth: float
    link: float
    topology: str | None = None
    overhead: float = 0.0


CHIPS = {
    "v5e": Chip("TPU v5e", 15.75 * GIB, 197e12, 197e12 / 6, 0.819e12, 0.2e12, "v5e"),
    "v6e": Chip("TPU v6e", 31.25 * GIB, 918e12, 918e12 / 6, 1.64e12, 0.448e12, "v6e"),
    "v5p": Chip("TPU v5p", 95.0 * GIB, 459e12, 459e12 / 6, 2.765e12, 0.6e12, "v5p"),
    "h100": Chip("NVIDIA H100 SXM", 79.6e9, 989e12, 67e12, 3.35e12, 0.45e12, overhead=1.0e9),
    "h200": Chip("NVIDIA H200", 141e9, 989e12, 67e12, 4.8e12, 0.45e12, overhead=1.0e9),
    "a100": Chip("NVIDIA A100 80 GB", 79.6e9, 312e12, 19.5e12, 2.04e12, 0.3e12, overhead=1.0e9),
    "rtx4090": Chip("NVIDIA RTX 4090", 24e9, 165e12, 82.6e12, 1.008e12, 0.016e12, overhead=0.8e9),
}
"""By name. On TPUs a float32 product is six passes of bfloat16."""

TARGETS = ("v5e-1", "v5e-4", "v5e-8", "v6e-1", "v6e-4", "v6e-8", "v5p-8", "h100", "h200", "a100")
TARGETS += ("rtx4090", "cpu")
"""The names that errors list; another number of devices may stand after each."""

CORE = 100e9
"""Operations a second of one core of a CPU, in float32 as in bfloat16."""

CPU_BANDWIDTH = 20e9
"""Bytes a second from a CPU's memory."""

CPU_LIBRARIES = 0.25 * GIB
"""What the interpreter and the libraries take of a CPU's memory."""

CPU_OVERHEAD = CPU_LIBRARIES + 0.2 * GIB
"""The same with the compiler and its programs."""


@dataclasses.dataclass(frozen=True)
class Target:
    """So many devices of a kind."""

    name: str
    chip: Chip
    devices: int

    @property
    def topology(self) -> str | None:
        """How the TPU compiler calls them; `None` where it does not."""
        if self.chip.topology is None:
            return None
        if self.chip.topology == "v5p":
            return {4: "v5p:2x2x1"}.get(self.devices)
        sides = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4"}
        return f"{self.chip.topology}:{sides[self.devices]}" if self.devices in sides else None


def find_target(name: str | None, used: int | None = None) -> Target:
    """Finds a target such as `"v6e-8"` or `"h100-4"`; `None` stands for the devices here.

    **Arguments:**

    - `used`: the number of devices that are used; those that JAX makes of a CPU share its memory.

    The number of a v5p counts its cores, two on a chip, as Google's names do.

    **Raises:** `SettingError`, with the targets that there are.
    """
    if name is None:
        return this_machine(used)
    match = re.fullmatch(r"([a-z0-9]+?)(?:-([1-9]\d{0,4}))?", name.strip().lower())
    kind = match[1] if match else ""
    if match is None or (kind not in CHIPS and kind != "cpu"):
        near = difflib.get_close_matches(name.lower(), TARGETS, 1, cutoff=0.4)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise SettingError(
            f"`target` {name!r} is not known.{hint} There are {', '.join(TARGETS)}; the number of "
            "devices may be another."
        )
    count = int(match[2] or 1)
    if kind == "cpu":
        return Target("cpu", _cpu(used or count), count)
    if kind == "v5p":
        if count % 2:
            raise SettingError(f"`target` {name!r} has half a chip: a v5p chip has two cores.")
        count //= 2
    return Target(name.lower(), CHIPS[kind], count)


def enlarged(target: Target, devices: int) -> Target:
    """Returns a target of the same kind with so many devices."""
    kind = target.name.split("-")[0]
    return Target(f"{kind}-{2 * devices if kind == 'v5p' else devices}", target.chip, devices)


def this_machine(used: int | None = None) -> Target:
    """Returns the devices that JAX has; those that are not known count as a CPU's."""
    import jax

    devices = jax.devices()
    kind = devices[0].device_kind.lower()
    names = {"v5 lite": "v5e", "v5litepod": "v5e", "v6 lite": "v6e", "v5p": "v5p", "v5": "v5p"}
    names |= {"h100": "h100", "h200": "h200", "a100": "a100", "4090": "rtx4090"}
    found = next((chip for mark, chip in names.items() if mark in kind), None)
    if devices[0].platform == "cpu" or found is None:
        return Target("cpu", _cpu(used or 1), len(devices))
    chip, stats = CHIPS[found], devices[0].memory_stats() or {}
    memory = float(stats.get("bytes_limit", chip.memory))
    return Target(found, dataclasses.replace(chip, memory=memory), len(devices))


def _cpu(parts: int) -> Chip:
    """Returns this machine's processor, or one of the equal parts that JAX makes of it."""
    cores = (os.cpu_count() or 1) / parts
    speed = CORE * cores
    return Chip("this CPU", _free() / parts, speed, speed, CPU_BANDWIDTH, CPU_BANDWIDTH,
                overhead=CPU_OVERHEAD / parts)  # fmt: skip


def _free() -> float:
    """Returns the bytes that this process may use: of the machine, or of its control group."""
    try:
        whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return math.inf
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            with open(file) as limit:
                text = limit.read().strip()
        except OSError:
            continue
        if text.isdigit():
            return min(whole, int(text))
    return whole
