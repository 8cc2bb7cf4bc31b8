"""A reader of `spiece.model` files: what of a unigram model its tokenizer needs, and no more.

Source: the message `ModelProto` of
https://github.com/google/sentencepiece/blob/v0.2.0/src/sentencepiece_model.proto in the wire format
of https://protobuf.dev/programming-guides/encoding.
"""

import struct
from collections.abc import Iterator
from typing import NamedTuple


PIECES, TRAINER_SPEC, NORMALIZER_SPEC = 1, 2, 3  # fields of ModelProto
PIECE, SCORE, TYPE = 1, 2, 3  # of SentencePiece
MODEL_TYPE, UNK_ID = 3, 40  # of TrainerSpec
PRECOMPILED_CHARSMAP = 2  # of NormalizerSpec
UNIGRAM = 1
USER_DEFINED = 4

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5


class UnigramModel(NamedTuple):
    """Pieces with their log probabilities, in the order of their ids."""

    pieces: list[tuple[str, float]]
    user_defined: list[str]
    unk_id: int
    charsmap: bytes | None


def read_unigram(data: bytes) -> UnigramModel:
    """**Raises:** `ValueError` where `data` is not a SentencePiece unigram model."""
    pieces, user_defined = [], []
    unk_id, charsmap, model_type = 0, None, UNIGRAM
    for field, value in _fields(data):
        if field == PIECES:
            values = dict(_fields(_bytes(value)))
            piece = _bytes(values.get(PIECE, b"")).decode("utf-8")
            (score,) = struct.unpack("<f", _bytes(values.get(SCORE, b"\0\0\0\0")))
            pieces.append((piece, score))
            if values.get(TYPE) == USER_DEFINED:
                user_defined.append(piece)
        elif field == TRAINER_SPEC:
            values = dict(_fields(_bytes(value)))
            model_type = values.get(MODEL_TYPE, UNIGRAM)
            unk_id = values.get(UNK_ID, 0)
        elif field == NORMALIZER_SPEC:
            charsmap = _bytes(dict(_fields(_bytes(value))).get(PRECOMPILED_CHARSMAP, b"")) or None
    if model_type != UNIGRAM:
        raise ValueError("the SentencePiece model is not of the unigram kind")
    if not isinstance(unk_id, int) or not 0 <= unk_id < len(pieces):
        raise ValueError("the SentencePiece model has no unknown piece")
    return UnigramModel(pieces, user_defined, unk_id, charsmap)


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a message by number: integers as they are, all else as bytes."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        kind = key & 7
        if kind == VARINT:
            value, position = _varint(data, position)
        else:
            if kind == BYTES:
                length, position = _varint(data, position)
            elif kind in (FIXED32, FIXED64):
                length = 4 if kind == FIXED32 else 8
            else:
                raise ValueError("it is not a SentencePiece model")
            value = data[position : position + length]
            position += length
            if position > len(data):
                raise ValueError("it is cut short")
        yield key >> 3, value


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """An integer in groups of seven bits, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(data):
            raise ValueError("it is cut short")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError("it is not a SentencePiece model")


def _bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError("it is not a SentencePiece model")
    return value
