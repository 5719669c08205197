"""The speaker embedding of the reference encoder: Bert-VITS2's results."""

from __future__ import annotations

import numpy as np
import torch

from models.synthesizer.text.reference_encoder import ReferenceEncoder
from tests.models.synthesizer.conftest import Filled, Reference

FLOOR = 3.4e-8  # what the peer's float32 is from the same network in float64


def test_the_references_reference_encoder(reference: Reference, filled: Filled) -> None:
    arrays = reference("bv2_pieces")
    network = filled(ReferenceEncoder(129, 6), "piece.refenc.")
    spec = torch.from_numpy(arrays["refenc/in"]).transpose(1, 2)
    np.testing.assert_allclose(
        network(spec).detach().numpy(), arrays["refenc/out"], rtol=0, atol=10 * FLOOR
    )


def test_any_number_of_frames_and_bands() -> None:
    for bands, frames in ((129, 1), (130, 65), (1025, 64)):
        assert ReferenceEncoder(bands, 6)(torch.zeros(2, bands, frames)).shape == (2, 6)
