"""Text encoders and tokenizers."""

from .clip import (
    CLIPOutput as CLIPOutput,
    CLIPTextConfig as CLIPTextConfig,
    CLIPTextModel as CLIPTextModel,
)
from .examples import example_tokenizer as example_tokenizer
from .t5 import T5Config as T5Config, T5Encoder as T5Encoder
from .tokenizer import Tokenized as Tokenized, Tokenizer as Tokenizer
