"""Every damaged file that `models` and `stages` read is refused in one line, or still readable."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from models.checkpoint import (
    OWN_HEADER,
    CheckpointError,
    load_foreign,
    load_weights,
    read_safetensors,
    save_safetensors,
)
from models.encoders.codebook import Codebook, load_codebooks, load_sovits_codebooks, save_codebooks
from models.encoders.heads import load_head
from models.encoders.layouts import parse_encoder_file, read_encoder_file
from models.encoders.layouts.encoder_file import save_encoder_file
from models.encoders.whisper import WhisperConfig, WhisperNetwork, header, read_whisper
from models.f0.rmvpe_checkpoint import read_rmvpe
from models.synthesizer import vocoder, voice
from models.synthesizer.sovits.config import read_config
from models.synthesizer.sovits.files import read_training, read_voice, write_voice
from models.synthesizer.voice import DESCRIPTION, WEIGHTS, load_voice
from models.torchaudio_compat import import_torchaudio
from tests.helpers.checkpoints import write_rmvpe
from tests.helpers.mutations import check_reader, mutated_bytes, mutated_json, mutated_values
from tests.helpers.voices import small_voice, write_small_voice
from tests.models.synthesizer.test_vocoder import write_vocoder

TINY = dict(upsample_initial_channel=8, hidden_channels=4, filter_channels=4, inter_channels=4)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return write_small_voice(tmp_path, **TINY)


def test_a_voice(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, description = small / WEIGHTS, small / DESCRIPTION

    def read() -> None:
        load_voice(small)

    count = check_reader(weights, mutated_bytes(weights.read_bytes()), read, CheckpointError)
    assert count > 100
    # as if the hash in the weights were always that of the description
    monkeypatch.setattr(voice, "_sha256", lambda _: "x")
    tensors, _ = read_safetensors(weights)
    own = {name: tensor.clone() for name, tensor in tensors.items()}
    save_safetensors(weights, own, {OWN_HEADER: '{"kind": "voice", "description_sha256": "x"}'})
    versions = mutated_json(description.read_text())
    assert check_reader(description, versions, read, CheckpointError) > 100


def test_headers_of_safetensors(golden: Path, tmp_path: Path) -> None:
    """The JSON that Cantor keeps in the metadata of its files."""
    encoder = tmp_path / "encoder.safetensors"
    save_encoder_file(read_encoder_file(golden / "encoders" / "tiny_wavlm.pt"), encoder)
    whisper = tmp_path / "whisper.safetensors"
    shape = WhisperConfig(n_mels=80, width=8, heads=2, layers=1, feed_forward=8)
    with torch.device("meta"):
        layout = WhisperNetwork(shape).state_dict()
    zeros = {name: torch.zeros(tensor.shape) for name, tensor in layout.items()}
    save_safetensors(whisper, zeros, header(shape))
    codebooks = tmp_path / "codebook.safetensors"
    centres = torch.randn(4, 39)
    save_codebooks(
        codebooks, [Codebook("mfcc", None, centres.clone(), who, {}) for who in ("a", "b")]
    )
    for path, read in (
        (encoder, read_encoder_file),
        (whisper, read_whisper),
        (codebooks, load_codebooks),
    ):
        tensors, metadata = read_safetensors(path)
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        (key, text), *_ = metadata.items()

        def versions(key: str = key, text: str = text, tensors: Any = tensors) -> Iterator[bytes]:
            for damaged in mutated_json(text):
                yield safetensors.torch.save(tensors, {key: damaged.decode("utf-8", "replace")})

        assert check_reader(path, versions(), partial(read, path), CheckpointError) > 50, path.name
        raw = mutated_bytes(path.read_bytes())
        assert check_reader(path, raw, partial(read, path), CheckpointError) > 50, path.name


def test_a_so_vits_svc_voice(tmp_path: Path) -> None:
    encoder = voice.VoiceEncoder(name="contentvec256l9", dim=256)
    path, config = tmp_path / "G_1.pth", tmp_path / "config.json"
    write_voice(dataclasses.replace(small_voice(units_dim=256, **TINY), encoder=encoder), path)

    def read() -> None:
        read_voice(path, config, any_speakers=True)

    text = json.dumps(
        {key: json.loads(config.read_text())[key] for key in ("data", "model", "spk")}
    )
    config.write_text(text)
    read()
    every = mutated_json(text)
    assert check_reader(config, every, partial(read_config, config), CheckpointError) > 50
    check_reader(config, mutated_json(text, 30, seed=1), read, CheckpointError)
    network = voice.load_network(read_voice(path, config))
    content = torch.load(path, weights_only=True)

    def contents() -> Iterator[bytes]:
        for damaged in mutated_values(content, 40):
            torch.save(damaged, tmp_path / "damaged")
            yield (tmp_path / "damaged").read_bytes()

    def read_all() -> None:
        read_config(config)
        read_training(path, network)
        read_voice(path, config)

    assert check_reader(path, contents(), read_all, CheckpointError) > 10


def test_a_vocoder(tmp_path: Path) -> None:
    path = write_vocoder(tmp_path, "tiny")
    config = tmp_path / "config.json"
    every, some = (mutated_json(config.read_text(), *how) for how in ((200,), (40, 1)))
    described = partial(vocoder._read_config, path)
    assert check_reader(config, every, described, CheckpointError) > 50
    check_reader(config, some, partial(vocoder.load_vocoder, path), CheckpointError)


@pytest.mark.parametrize("name", ["tiny_hubert_base.pt", "tiny_wavlm.pt", "tiny_dpwavlm.pth"])
def test_the_content_of_an_encoder(name: str, golden: Path) -> None:
    content = load_foreign(golden / "encoders" / name)
    refused = 0
    for number, damaged in enumerate(mutated_values(content)):
        try:
            if isinstance(damaged, dict):
                parse_encoder_file(Path(name), damaged)
        except CheckpointError as error:
            refused += 1
            assert "\n" not in str(error)
        except Exception as error:
            error.add_note(f"mutation {number}")
            raise
    assert refused > 20
    for settings in ("cfg", "config"):
        if isinstance(content.get(settings), dict):
            for number, damaged in enumerate(mutated_values(content[settings])):
                try:
                    parse_encoder_file(Path(name), {**content, settings: damaged})
                except CheckpointError:
                    pass
                except Exception as error:
                    error.add_note(f"mutation {number} of {settings}")
                    raise


def test_a_hugging_face_folder(golden: Path, tmp_path: Path) -> None:
    """An x-vector network: configuration, preprocessing, weights and their index."""
    import_torchaudio()  # which transformers imports
    transformers = pytest.importorskip("transformers")
    shape = transformers.WavLMConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8,
        conv_dim=[4] * 7, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
        tdnn_dim=[8, 8], tdnn_kernel=[3, 1], tdnn_dilation=[1, 1], xvector_output_dim=8,
        num_buckets=8, use_weighted_layer_sum=True,
    )  # fmt: skip
    transformers.WavLMForXVector(shape).save_pretrained(tmp_path)
    preprocessor = tmp_path / "preprocessor_config.json"
    preprocessor.write_text('{"do_normalize": true, "sampling_rate": 16000}')

    def read() -> None:
        load_head(tmp_path)

    read()
    config = json.loads((tmp_path / "config.json").read_text())
    kept = (
        "num_",
        "hidden",
        "conv",
        "tdnn",
        "use_",
        "do_",
        "layer",
        "mask",
        "max_",
        "arch",
        "apply",
    )
    config = {key: value for key, value in config.items() if key.startswith(kept)}
    (tmp_path / "config.json").write_text(json.dumps(config))
    read()
    for path in (tmp_path / "config.json", preprocessor):
        check_reader(path, mutated_json(path.read_text()), read, CheckpointError)
    index = tmp_path / "model.safetensors.index.json"
    (tmp_path / "model.safetensors").rename(tmp_path / "part.safetensors")
    index.write_text('{"metadata": {}, "weight_map": {"a": "part.safetensors"}}')
    versions = mutated_json(index.read_text())
    assert check_reader(index, versions, lambda: load_weights(tmp_path), CheckpointError) > 50


def test_an_rmvpe_and_a_kmeans(tmp_path: Path) -> None:
    rmvpe, kmeans = write_rmvpe(tmp_path / "rmvpe.pt"), tmp_path / "kmeans.pt"
    clusters = {"n_features_in_": 4, "_n_threads": 4, "cluster_centers_": torch.randn(3, 4)}
    torch.save({"ann": clusters, "ben": clusters}, kmeans)
    for path, read in ((rmvpe, read_rmvpe), (kmeans, load_sovits_codebooks)):
        content = torch.load(path, weights_only=True)

        def versions(content: Any = content) -> Iterator[bytes]:
            for damaged in mutated_values(content, 25):
                torch.save(damaged, tmp_path / "damaged")
                yield (tmp_path / "damaged").read_bytes()

        assert check_reader(path, versions(), partial(read, path), CheckpointError) > 5, path.name


def test_an_index(tmp_path: Path) -> None:
    faiss = pytest.importorskip("faiss")
    from stages.retrieval import IndexFault, index_files, load_index, note_to_json
    from tests.stages.test_retrieval import NOTE

    index = faiss.index_factory(6, "Flat")
    index.add(torch.randn(400, 6).numpy())
    data, text = index_files(tmp_path, "ann")
    faiss.write_index(index, str(data))
    sha256 = hashlib.sha256(data.read_bytes()).hexdigest()
    text.write_text(note_to_json(dataclasses.replace(NOTE, sha256=sha256)))

    def read() -> None:
        load_index(tmp_path, "ann")

    read()
    assert check_reader(text, mutated_json(text.read_text()), read, IndexFault) > 100
    assert check_reader(data, mutated_bytes(data.read_bytes()), read, IndexFault) > 100
