"""Files of the wav2vec 2.0 family: HuBERT, ContentVec, WavLM, HuBERT-Soft, DPHuBERT."""

from models.encoders.layouts.encoder_file import (
    EncoderFile,
    check_fit,
    is_whisper,
    parse_encoder_file,
    read_encoder,
    read_encoder_file,
    save_encoder_file,
)

__all__ = [
    "EncoderFile",
    "check_fit",
    "is_whisper",
    "parse_encoder_file",
    "read_encoder",
    "read_encoder_file",
    "save_encoder_file",
]
