"""Sharding rules of the text encoders: regular expressions of parameter paths -> logical axes."""

from ..sharding import Rule


CLIP: tuple[Rule, ...] = (
    (r"embeddings\.token_embedding\.weight", ("vocab", "embed")),
    (r"embeddings\.position_embedding\.weight", (None, "embed")),
    (r"encoder\.layers\..*\.([qkv]_proj|fc1)\.weight", ("hidden", "embed")),
    (r"encoder\.layers\..*\.(out_proj|fc2)\.weight", ("embed", "hidden")),
    (r"encoder\.layers\..*(\.bias|layer_norm\d\.weight)", (None,)),
    (r"text_projection\.weight", (None, "embed")),
)

T5: tuple[Rule, ...] = (
    (r"shared\.weight", ("vocab", "embed")),
    (r"relative_attention_bias\.weight", (None, None)),
    (r"block\..*\.([qkv]|wi_\d)\.weight", ("hidden", "embed")),
    (r"block\..*\.(o|wo)\.weight", ("embed", "hidden")),
    (r"block\..*_norm\.weight", (None,)),
)

QWEN3: tuple[Rule, ...] = (
    (r"embed_tokens\.weight", ("vocab", "embed")),
    (r"layers\..*\.([qkv]|gate|up)_proj\.weight", ("hidden", "embed")),
    (r"layers\..*\.(o|down)_proj\.weight", ("embed", "hidden")),
    (r"layers\..*norm\.weight", (None,)),
)
