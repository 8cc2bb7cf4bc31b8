"""cuDNN's attention, through `jax.nn`."""

from jaxtyping import Array, Float, Int

from ._choice import BatchSegments, Blocks


DIFFERENTIABLE = False
"""Whether `attend` has a gradient of its own; else that of the chunked form is taken."""


def attend(
    q: Float[Array, "batch queries heads dim"],
    k: Float[Array, "batch keys key_heads dim"],
    v: Float[Array, "batch keys key_heads value_dim"],
    bias: Float[Array, "#batch #heads #queries keys"] | None,
    key_length: Int[Array, "#batch"] | None,
    segments: BatchSegments | None,
    *,
    scale: float,
    blocks: Blocks | None,
    bounded: bool,
    device: str,
    interpret: bool,
) -> Float[Array, "batch queries heads value_dim"]:
    """Computes attention. **Raises:** `NotImplementedError` for what it cannot do.

    **Arguments:**

    - `bias`: at least -1e30, which hides a key; each query sees at least one.
    - `key_length`: how many of the first keys are visible, at least one.
    - `segments`: a query sees the keys of its number.
    - `blocks`: the queries and keys of a block, by default the best for `device`.
    - `bounded`: whether `scale |q| max |k|` may be subtracted in place of the maximum.
    - `device`: the kind of the device, such as `"TPU v6 lite"`.
    - `interpret`: run the kernel without its device.
    """
    raise NotImplementedError("This kernel is not written yet.")
