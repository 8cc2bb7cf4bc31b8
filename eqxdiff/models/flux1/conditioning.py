import equinox as eqx
from jaxtyping import Array, Float


class Conditioning(eqx.Module):
    """What FLUX.1 knows of a prompt.

    **Fields:**

    - `txt`: T5's last hidden states, padding included: the model was trained without a mask.
    - `pooled`: CLIP's state at the end of the text.
    """

    txt: Float[Array, "*batch tokens text_dim"]
    pooled: Float[Array, "*batch pooled_dim"]
