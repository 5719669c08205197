"""Untrusted audio bytes -> mono float32 PCM, parsed in a child process and never in this one."""

from stages.decode.decoder import DecodeConfig, Decoded, Decoder, Header

__all__ = ["DecodeConfig", "Decoded", "Decoder", "Header"]
