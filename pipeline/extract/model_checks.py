"""Checks of models and codebooks before anything is written."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pipeline.errors import UserError
from pipeline.settings import (
    suggest,
)
from pipeline.storage.weight_files import WeightFile
from stages.f0 import check_networks
from stages.units import EncoderConfig

if TYPE_CHECKING:  # torch is slow to import
    from models.encoders.codebook import Codebook
from pipeline.extract.config import ExtractConfig


def check_models(
    config: ExtractConfig, local: bool, taken_over: Collection[str] = frozenset()
) -> None:
    """Refuse models that cannot be built, before anything is written. Imports torch.

    local: they will run in this process, so a CUDA device must be here if one is set.
    taken_over: sections of those whose columns another dataset has.
    Raises: UserError.
    """
    if config.f0.networks and "f0" not in taken_over:
        with name_setting_in_errors("f0"):
            check_networks(config.f0)
        if local:
            _require_cuda("f0", config.f0.device)
    from models.encoders import ENCODERS, check_encoder  # torch takes seconds to import

    for section, encoder in config.all_encoders.items():
        if section in taken_over:
            continue
        if encoder.name not in ENCODERS:
            key = "encoder.name" if section == "encoder" else section
            raise UserError(
                f"{key}: encoder '{encoder.name}' is unknown{suggest(encoder.name, ENCODERS)}"
            )
        with name_setting_in_errors(section):
            check_encoder(encoder.name, encoder.checkpoint, **encoder.options())
        if local:
            _require_cuda(section, encoder.device)
    if config.xvector.checkpoint is not None and "xvector" not in taken_over:
        from models.encoders.xvector import load_xvector

        with name_setting_in_errors("xvector.checkpoint"):
            load_xvector(config.xvector.checkpoint)
        if local:
            _require_cuda("xvector", config.xvector.device)


def _require_cuda(section: str, device: str) -> None:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"{section}.device is cuda, but this machine has no CUDA device that torch can use; "
            f"set {section}.device to auto or cpu"
        )


def check_codebooks(
    config: ExtractConfig,
    weights: Mapping[str, WeightFile],
    taken_over: Collection[str] = frozenset(),
) -> None:
    """Refuse codebooks that were not made for their encoders. Raises: UserError."""
    for section, encoder in config.all_encoders.items():
        if section not in taken_over:
            checkpoint = weights.get(f"{section}.checkpoint")
            load_codebook_of(section, encoder, checkpoint.sha256 if checkpoint else None)


def load_codebook_of(
    section: str, encoder: EncoderConfig, checkpoint_sha256: str | None
) -> Codebook | None:
    """The codebook that turns this encoder's units into ids; None where none is set.

    Raises: UserError when it is none, or was made of the units of another encoder.
    """
    if encoder.codebook is None:
        return None
    from models.encoders.codebook import load_codebooks

    with name_setting_in_errors(f"{section}.codebook"):
        codebook, *others = load_codebooks(encoder.codebook)
    if others:
        raise UserError(
            f"{section}.codebook: {encoder.codebook} has one codebook for each of "
            f"{1 + len(others)} speakers, but ids must mean the same for all; make one with "
            "codebook.per_speaker=false"
        )
    if codebook.encoder != encoder.name:
        raise UserError(
            f"{section}.codebook: {encoder.codebook} is of {codebook.encoder}, not of "
            f"{encoder.name}; `codebook` makes one from a dataset with this encoder's units"
        )
    if codebook.checkpoint_sha256 != checkpoint_sha256:
        raise UserError(
            f"{section}.codebook: {encoder.codebook} is of {encoder.name} with another "
            f"checkpoint than {encoder.checkpoint}; their units do not share centres"
        )
    require_meaning(codebook, encoder, f"{section}.codebook: {encoder.codebook}")
    return codebook


def require_meaning(codebook: Codebook, encoder: EncoderConfig, where: str) -> None:
    """Raises: UserError where the encoder's settings give units of another meaning."""
    if codebook.settings != encoder.meaning():
        made, asked = (
            ", ".join(f"{key}={value}" for key, value in settings.items()) or "the defaults"
            for settings in (codebook.settings, encoder.meaning())
        )
        raise UserError(
            f"{where} is of units made with {made}, and these are made with {asked}; they do not "
            f"share centres"
        )


@contextmanager
def name_setting_in_errors(section: str) -> Iterator[None]:
    """A checkpoint that is refused in here is the user's to put right; the message says whose."""
    try:
        yield
    except ValueError as error:
        words = str(error)  # models know settings of the section `encoder` only
        inside = words.startswith("encoder.")
        words = section + words.removeprefix("encoder") if inside else f"{section}: {words}"
        raise UserError(words) from error
