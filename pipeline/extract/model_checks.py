"""Checks of models and codebooks, made before anything is written.

Tested by tests/pipeline/extract/test_config.py.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pipeline.cluster.device import choose_device
from pipeline.errors import UserError
from pipeline.extract.config import ExtractConfig
from pipeline.settings import suggest
from pipeline.storage.weight_files import WeightFile
from stages.f0 import check_networks
from stages.units import EncoderConfig

if TYPE_CHECKING:  # torch is slow to import
    from models.encoders.codebook import Codebook


def check_models(
    config: ExtractConfig, local: bool, taken_over: Collection[str] = frozenset()
) -> None:
    """Refuse models that cannot be built, before anything is written. Imports torch.

    local: the models will run in this process, so a CUDA device that is set must be here.
    taken_over: sections whose columns come from another dataset.

    Raises: UserError: when a model cannot be built.
    """
    if config.f0.networks and "f0" not in taken_over:
        with name_setting_in_errors("f0"):
            check_networks(config.f0)
        if local:
            choose_device(config.f0.device, "f0.device")
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
            choose_device(encoder.device, f"{section}.device")
    if config.xvector.checkpoint is not None and "xvector" not in taken_over:
        from models.encoders.xvector import load_xvector

        with name_setting_in_errors("xvector.checkpoint"):
            load_xvector(config.xvector.checkpoint)
        if local:
            choose_device(config.xvector.device, "xvector.device")


def check_codebooks(
    config: ExtractConfig,
    weights: Mapping[str, WeightFile],
    taken_over: Collection[str] = frozenset(),
) -> None:
    """Refuse codebooks that do not belong to their encoders.

    Raises: UserError: when one does not.
    """
    for section, encoder in config.all_encoders.items():
        if section not in taken_over:
            checkpoint = weights.get(f"{section}.checkpoint")
            load_codebook_of(section, encoder, checkpoint.sha256 if checkpoint else None)


def load_codebook_of(
    section: str, encoder: EncoderConfig, checkpoint_sha256: str | None
) -> Codebook | None:
    """Return the codebook that turns this encoder's units into ids; None where none is set.

    Raises: UserError: when the file is no codebook, or was fitted to units of another encoder.
    """
    if encoder.codebook is None:
        return None
    from models.encoders.codebook import load_codebooks

    with name_setting_in_errors(f"{section}.codebook"):
        codebook, *others = load_codebooks(encoder.codebook)
    where = f"{section}.codebook: {encoder.codebook}"
    if others:
        raise UserError(
            f"{where} has one codebook for each of {1 + len(others)} speakers, but ids must mean "
            "the same for all; make one with codebook.per_speaker=false"
        )
    if codebook.encoder != encoder.name:
        raise UserError(
            f"{where} is of {codebook.encoder}, not of {encoder.name}; `cantor codebook` makes one "
            "from a dataset with this encoder's units"
        )
    if codebook.checkpoint_sha256 != checkpoint_sha256:
        raise UserError(
            f"{where} was fitted to {encoder.name} with another checkpoint than "
            f"{encoder.checkpoint}; make one from units of this checkpoint"
        )
    require_same_units(codebook, encoder, where)
    return codebook


def require_same_units(codebook: Codebook, encoder: EncoderConfig, where: str) -> None:
    """Compare the settings that change unit values with those that the codebook was fitted under.

    where: the codebook, for messages.

    Raises: UserError: when they differ.
    """
    if codebook.settings != encoder.meaning():
        fitted, wanted = (
            ", ".join(f"{key}={value}" for key, value in settings.items()) or "the defaults"
            for settings in (codebook.settings, encoder.meaning())
        )
        raise UserError(
            f"{where} was fitted to units made with {fitted}, but these are made with {wanted}; "
            "make one from units with these settings"
        )


@contextmanager
def name_setting_in_errors(section: str) -> Iterator[None]:
    """Turn a ValueError of a model into a UserError that names the section of the settings."""
    try:
        yield
    except ValueError as error:
        message = str(error)  # models know settings of the section `encoder` only
        inside = message.startswith("encoder.")
        message = section + message.removeprefix("encoder") if inside else f"{section}: {message}"
        raise UserError(message) from error


@contextmanager
def name_setting_while_loading(section: str) -> Iterator[None]:
    """Do as `name_setting_in_errors`, and say what to do when memory runs out."""
    import torch

    try:
        with name_setting_in_errors(section):
            yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise UserError(
            f"{section}: too little memory to load it ({error}); lower workers.max_workers, or "
            "raise workers.gpus_per_worker when it is a GPU's memory"
        ) from error
