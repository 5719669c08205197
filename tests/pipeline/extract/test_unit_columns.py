"""Several encoders in one pass, their checkpoints, codebooks, x-vectors: as columns of shards."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile as sf
import torch

from models.checkpoint import sha256_of
from models.encoders.codebook import Codebook, save_codebooks
from pipeline.cluster.task_rows import REFUSED, read_result, task_row
from pipeline.dataset.schema import XvectorIdentity
from pipeline.dataset.shards import Footer, iter_shards, read_footer, shard_writer
from pipeline.dataset.verify import verify
from pipeline.errors import UserError
from pipeline.extract.config import load_config
from pipeline.extract.job import ExtractJob
from pipeline.extract.task import ExtractTask
from pipeline.reports.dataset_page import write_report
from pipeline.storage.weight_files import read_weights
from stages.resample import ResampleConfig, resample
from stages.units import unpack_ids, unpack_units
from tests.pipeline.conftest import Extract, shard_hashes

HUBERT = "encoders.contentvec768l12.checkpoint"


@pytest.fixture
def hubert(golden: Path, tmp_path: Path) -> Path:
    """A network of 3 layers, 48 wide; a copy, to be written to."""
    return Path(shutil.copy(golden / "encoders" / "tiny_hubert_base.pt", tmp_path / "hubert.pt"))


@pytest.fixture
def small_corpus(corpus: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(corpus / "spk0", tmp_path / "corpus" / "spk0")).parent


def rows_of(dataset: Path) -> list[dict[str, object]]:
    return pq.read_table(dataset / "data", partitioning=None).to_pylist()


def test_every_encoder_fills_its_own_columns_as_it_would_alone(
    small_corpus: Path, tmp_path: Path, hubert: Path, run_extract: Extract
) -> None:
    together = [f"{HUBERT}={hubert}", "encoders.log-mel.normalize=song"]
    outcome = run_extract(small_corpus, tmp_path / "d", together)
    assert outcome.account.problems == [] and verify(tmp_path / "d").problems == []
    (footer, *_) = map(read_footer, iter_shards(tmp_path / "d"))
    assert [(e.name, e.dim, e.dtype, e.checkpoint_sha256) for e in footer.encoders] == [
        ("mfcc", 39, "float16", None),
        ("contentvec768l12", 48, "float16", sha256_of(hubert)),
        ("log-mel", 80, "float16", None),
    ]
    run_extract(small_corpus, tmp_path / "one", ["encoder.name=log-mel", "encoder.normalize=song"])
    run_extract(
        small_corpus,
        tmp_path / "two",
        ["encoder.name=contentvec768l12", f"encoder.checkpoint={hubert}"],
    )
    for row, one, two in zip(
        *map(rows_of, (tmp_path / n for n in ("d", "one", "two"))), strict=True
    ):
        assert row["units_log_mel"] == one["units_log_mel"]
        assert row["units_contentvec768l12"] == two["units_contentvec768l12"]
        assert row["num_unit_frames_contentvec768l12"] == two["num_unit_frames_contentvec768l12"]


def test_a_checkpoint_is_known_by_its_content(
    small_corpus: Path, tmp_path: Path, hubert: Path, run_extract: Extract
) -> None:
    run_extract(small_corpus, tmp_path / "d", [f"{HUBERT}={hubert}"])
    before = shard_hashes(tmp_path / "d")
    iter_shards(tmp_path / "d")[0].unlink()
    moved = hubert.rename(tmp_path / "elsewhere.pt")
    outcome = run_extract(small_corpus, tmp_path / "d", [f"{HUBERT}={moved}"])
    assert outcome.work.tasks_run == 1 and shard_hashes(tmp_path / "d") == before
    with pytest.raises(UserError, match=rf"{HUBERT}_sha256 was \w+ and is \w+"):
        other = hubert.parent / "other.pt"
        fp16 = Path(__file__).parents[2] / "golden" / "encoders" / "tiny_hubert_base_fp16.pt"
        shutil.copy(fp16, other)
        run_extract(small_corpus, tmp_path / "d", [f"{HUBERT}={other}"])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["encoder.name=contentvec768l12"], r"^encoder.checkpoint is empty: contentvec768l12"),
        ([f"{HUBERT}=HERE/none.pt"], r"^encoders.contentvec768l12.*none\.pt"),
        ([f"{HUBERT}=HERE/text.pt"], r"^encoders.contentvec768l12: .*text\.pt"),
        (["encoders.wavlm-large.checkpoint=HERE/hubert.pt"], r"hubert\.pt is a HuBERT"),
        (["encoder.int8=true"], r"^encoder.int8 is set, but mfcc does not have this option"),
        (["encoders.log-mel.dtype=float16"], r"^encoders.log-mel.dtype is set, but log-mel does"),
        (["encoder.codebook=HERE/hubert.pt"], r"^encoder\.codebook: .*hubert\.pt"),
        (["encoder.codebook=HERE/none"], r"^encoder.codebook: there is no file or folder .*none"),
        (["encoders.mel={}"], r"^encoders.mel: encoder 'mel' is unknown .did you mean 'log-mel'"),
    ],
)
def test_what_cannot_be_loaded_is_refused_before_anything_is_written(
    small_corpus: Path,
    tmp_path: Path,
    hubert: Path,
    run_extract: Extract,
    settings: list[str],
    words: str,
) -> None:
    (tmp_path / "text.pt").write_text("not a checkpoint")
    settings = [word.replace("HERE", str(hubert.parent)) for word in settings]
    with pytest.raises(UserError, match=words):
        run_extract(small_corpus, tmp_path / "d", settings)
    assert not (tmp_path / "d").exists()


def test_a_worker_says_in_words_that_its_checkpoint_is_gone(
    corpus: Path, dataset: Path, hubert: Path
) -> None:
    config = load_config(
        None, ["encoder.name=contentvec768l12", f"encoder.checkpoint={hubert}", "f0.method=dio"]
    )
    weights = read_weights(config.weight_paths)
    hubert.unlink()
    worker = ExtractTask(ExtractJob(dataset, corpus, config, "x", weights), lambda *_: None)
    result = read_result(worker(pa.Table.from_pylist([task_row(0)])))
    assert result.status == REFUSED
    assert result.detail.startswith("encoder.checkpoint: ") and "Traceback" not in result.detail


# Codebooks


@pytest.fixture
def codebook(tmp_path: Path) -> Path:
    """Twelve centres for mfcc."""
    centres = torch.randn(12, 39, generator=torch.Generator().manual_seed(0)) * 5
    save_codebooks(tmp_path / "mfcc.safetensors", [Codebook("mfcc", None, centres)])
    return tmp_path / "mfcc.safetensors"


def test_a_codebook_stores_the_ids_of_the_units(
    small_corpus: Path, tmp_path: Path, codebook: Path, run_extract: Extract
) -> None:
    run_extract(small_corpus, tmp_path / "units")
    run_extract(small_corpus, tmp_path / "ids", [f"encoder.codebook={codebook}"])
    assert verify(tmp_path / "ids").problems == []
    (identity,) = read_footer(iter_shards(tmp_path / "ids")[0]).encoders
    assert (identity.dim, identity.dtype, identity.codebook_size) == (1, "int16", 12)
    assert "mfcc (ids)." in (tmp_path / "ids" / "README.md").read_text()
    assert "units by mfcc (ids)." in write_report(tmp_path / "ids").read_text()
    assert identity.codebook_sha256 == sha256_of(codebook)
    centres = load_centres(codebook)
    agree = total = 0
    for row, units in zip(rows_of(tmp_path / "ids"), rows_of(tmp_path / "units"), strict=True):
        ids = unpack_ids(row["units_mfcc"])
        frames = unpack_units(units["units_mfcc"], 39)
        assert len(ids) == len(frames) == row["num_unit_frames_mfcc"]
        nearest = ((frames[:, None] - centres) ** 2).sum(-1).argmin(1)
        agree += int((ids == nearest).sum())
        total += len(ids)
    assert agree > 0.99 * total  # what was stored as float16 may be nearer to another centre


def load_centres(path: Path) -> np.ndarray:
    from models.encoders.codebook import load_codebook

    return load_codebook(path).centroids.numpy()


@pytest.mark.parametrize(
    ("of", "sha256", "words"),
    [("log-mel", None, "is of log-mel, not of mfcc"), ("mfcc", "ab" * 32, "another checkpoint")],
)
def test_a_codebook_of_other_units_is_refused(
    small_corpus: Path,
    tmp_path: Path,
    run_extract: Extract,
    of: str,
    sha256: str | None,
    words: str,
) -> None:
    save_codebooks(tmp_path / "other.safetensors", [Codebook(of, sha256, torch.zeros(3, 39))])
    with pytest.raises(UserError, match=words):
        run_extract(
            small_corpus, tmp_path / "d", [f"encoder.codebook={tmp_path / 'other.safetensors'}"]
        )
    assert not (tmp_path / "d").exists()


def test_codebooks_of_single_speakers_are_refused(
    small_corpus: Path, tmp_path: Path, run_extract: Extract
) -> None:
    each = [Codebook("mfcc", None, torch.zeros(3, 39), speaker) for speaker in ("ann", "bob")]
    save_codebooks(tmp_path / "each", each)
    with pytest.raises(UserError, match=r"^encoder\.codebook: .*codebook\.per_speaker=false"):
        run_extract(small_corpus, tmp_path / "d", [f"encoder.codebook={tmp_path / 'each'}"])


def test_verify_finds_ids_beyond_the_codebook(
    small_corpus: Path, tmp_path: Path, codebook: Path, run_extract: Extract
) -> None:
    run_extract(small_corpus, tmp_path / "d", [f"encoder.codebook={codebook}"])

    def with_id_12(table: pa.Table, footer: Footer) -> pa.Table:
        column = footer.encoders[0].column
        data = table[column].to_pylist()
        data[0] = np.int16(12).tobytes() + data[0][2:]
        return table.set_column(table.schema.get_field_index(column), column, pa.array(data))

    rewrite(iter_shards(tmp_path / "d")[0], with_id_12)
    (problem,) = verify(tmp_path / "d").problems
    assert "units_mfcc holds ids beyond its 12 centres" in problem


def rewrite(path: Path, change: object) -> None:
    footer, table = read_footer(path), pq.read_table(path, partitioning=None)
    with path.open("wb") as file, shard_writer(file, footer) as writer:
        writer.write_table(change(table, footer).cast(writer.schema))  # type: ignore[operator]


# Speakers


@pytest.fixture(scope="module")
def xvector_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network of one layer with an x-vector head, as Hugging Face saves it."""
    import transformers

    from models.torchaudio_compat import import_torchaudio

    import_torchaudio()
    config = transformers.WavLMConfig(
        hidden_size=24,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=24,
        conv_dim=[8] * 7,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        tdnn_dim=[16, 16, 16, 16, 16],
        xvector_output_dim=12,
    )
    folder = tmp_path_factory.mktemp("xvector")
    transformers.WavLMForXVector(config).eval().save_pretrained(folder)
    transformers.Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(folder)
    return folder


def test_each_clip_gets_an_xvector_where_a_checkpoint_is_set(
    small_corpus: Path, tmp_path: Path, run_extract: Extract, xvector_folder: Path
) -> None:
    from models.encoders.xvector import load_xvector

    outcome = run_extract(small_corpus, tmp_path / "d", [f"xvector.checkpoint={xvector_folder}"])
    assert outcome.account.problems == [] and verify(tmp_path / "d").problems == []
    assert "mfcc. Each clip has an x-vector." in (tmp_path / "d" / "README.md").read_text()
    assert "mfcc; an x-vector per clip." in write_report(tmp_path / "d").read_text()
    footer = read_footer(iter_shards(tmp_path / "d")[0])
    assert footer.xvector == XvectorIdentity(12, sha256_of(xvector_folder))
    assert Footer.from_json(footer.to_json()) == footer
    model = load_xvector(xvector_folder)
    for row in rows_of(tmp_path / "d"):
        wav, rate = sf.read(io.BytesIO(row["audio"]["bytes"]), dtype="float32")
        wav = resample(wav, rate, model.sample_rate, ResampleConfig())
        (expected,) = model.embed([torch.from_numpy(wav)])
        np.testing.assert_array_equal(np.float32(row["xvector"]), expected.numpy())

    def without(table: pa.Table, _: Footer) -> pa.Table:
        vectors = [vector[:11] for vector in table["xvector"].to_pylist()]
        column = table.schema.get_field_index("xvector")
        return table.set_column(column, "xvector", pa.array(vectors))

    rewrite(iter_shards(tmp_path / "d")[0], without)
    assert any("its xvector is not 12 finite numbers" in p for p in verify(tmp_path / "d").problems)
    with pytest.raises(UserError, match=r"^xvector\.checkpoint: "):
        run_extract(small_corpus, tmp_path / "e", [f"xvector.checkpoint={tmp_path}"])


# Numerics


def test_another_dtype_resumes_with_a_word_of_warning(
    small_corpus: Path, tmp_path: Path, hubert: Path, run_extract: Extract
) -> None:
    settings = [f"{HUBERT}={hubert}"]
    run_extract(small_corpus, tmp_path / "d", settings)
    iter_shards(tmp_path / "d")[0].unlink()
    half = [*settings, "encoders.contentvec768l12.dtype=bfloat16"]
    outcome = run_extract(small_corpus, tmp_path / "d", half)
    assert outcome.work.tasks_run == 1 and outcome.account.problems == []
    (notice,) = outcome.notices
    assert "dtype contentvec768l12 bfloat16 and float32" in notice
