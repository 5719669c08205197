from __future__ import annotations

import pytest
import torch

from pipeline.cluster.device import choose_device
from pipeline.errors import UserError


def test_auto_is_cuda_where_torch_has_one() -> None:
    assert choose_device("cpu") == "cpu"
    assert choose_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")


def test_other_words_are_refused() -> None:
    with pytest.raises(UserError, match=r"^--device is 'tpu'; set it to auto, cpu or cuda"):
        choose_device("tpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_absent_is_refused_by_the_key_that_sets_it() -> None:
    with pytest.raises(UserError, match=r"^run\.device is cuda, but torch finds no CUDA device"):
        choose_device("cuda", "run.device")
