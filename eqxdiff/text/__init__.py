"""Text encoders and tokenizers."""

from .chat import QWEN3 as QWEN3, QWEN3_DIRECT as QWEN3_DIRECT, Chat as Chat
from .clip import (
    CLIPOutput as CLIPOutput,
    CLIPTextConfig as CLIPTextConfig,
    CLIPTextModel as CLIPTextModel,
)
from .examples import example_tokenizer as example_tokenizer
from .qwen3 import Qwen3Config as Qwen3Config, Qwen3Encoder as Qwen3Encoder
from .t5 import T5Config as T5Config, T5Encoder as T5Encoder
from .tokenizer import Tokenized as Tokenized, Tokenizer as Tokenizer
