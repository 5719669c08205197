"""Decoding of untrusted audio bytes to mono float32 PCM, in a limited child process."""

from stages.decode.decoder import DecodeConfig, Decoded, Decoder, Header

__all__ = ["DecodeConfig", "Decoded", "Decoder", "Header"]
