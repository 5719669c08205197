"""One song in another voice: what it is made of, how its pieces meet, and what is refused."""

from __future__ import annotations

import dataclasses
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile as sf
from rich.console import Console
from torch import Tensor
from typer.testing import CliRunner

from models.synthesizer.blocks.noise import Noise
from models.synthesizer.sovits.files import write_voice
from models.synthesizer.sovits.networks import Synthesizer
from models.synthesizer.vocoder import Vocoder
from models.synthesizer.voice import VoiceEncoder, load_voice, save_voice
from pipeline.cli import app
from pipeline.convert.command import Request, convert_file, load_models, read_request
from pipeline.convert.result import Conversion
from pipeline.convert.song import Converter
from pipeline.dataset.clip_index import extraction_of
from pipeline.dataset.folder import open_folder
from pipeline.dataset.shard_dataset import ShardDataset
from pipeline.errors import UserError
from pipeline.tools.export_voice import export
from pipeline.tools.formant_singer import VOICES, sing
from stages.decode import DecodeConfig, Decoder
from stages.types import Array
from tests.helpers.checkpoints import GOLDEN, write_hubert_base
from tests.helpers.songs import tune
from tests.helpers.voices import (
    SETTINGS,
    small_voice,
    write_overflowing_voice,
    write_small_voice,
)
from tests.models.synthesizer.test_vocoder import write_vocoder
from tests.pipeline.conftest import Extract

RATE = 16000
FLOAT = "output.subtype=FLOAT"
WHOLE = ("slice.max_length_ms=null", "slice.min_length_ms=60000")


@pytest.fixture(scope="module")
def voice(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_voice(tmp_path_factory.mktemp("voice"))


@pytest.fixture(scope="module")
def song(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight seconds, with pauses."""
    path = tmp_path_factory.mktemp("song") / "song.wav"
    sf.write(path, tune(8.0, RATE), RATE)
    return path


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second."""
    path = tmp_path_factory.mktemp("short") / "song.wav"
    sf.write(path, tune(1.0, RATE), RATE)
    return path


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A note of three seconds: every cut is within it."""
    path = tmp_path_factory.mktemp("held") / "held.wav"
    t = np.arange(3 * RATE) / RATE
    phase = 2 * np.pi * 220 * (t + 0.002 * np.sin(2 * np.pi * 5 * t))
    wav = sum(np.sin(k * phase) / k for k in range(1, 9)) * 0.1
    noise = np.random.default_rng(0).standard_normal(len(t))
    sf.write(path, (wav + 1e-3 * noise).astype(np.float32), RATE, "FLOAT")
    return path


def convert(
    voice: Path, song: Path, output: Path, *settings: str, speaker: str | None = "ann"
) -> tuple[Array, Conversion]:
    who = () if speaker is None else (f"voice.speaker={speaker}",)
    request = read_request(voice, [*who, *settings])
    conversion = convert_file(request, song, output, Console(file=io.StringIO()))
    wav, _ = sf.read(output, dtype="float32")
    return wav, conversion


def level_db(wav: Array) -> float:
    return float(10 * np.log10(np.square(wav, dtype=np.float64).mean() + 1e-20))


class Heard:
    """Stands for the network and keeps what it is given; what it sings is silence."""

    def __init__(self, network: Any) -> None:
        self.config = network.config
        self.calls: list[dict[str, Tensor]] = []

    def infer(
        self, units: Tensor, f0: Tensor, voiced: Tensor, speaker: Tensor, **others: Any
    ) -> tuple[Tensor, Tensor]:
        self.calls.append(
            {"units": units, "f0": f0, "voiced": voiced, "speaker": speaker, **others}
        )
        return f0.new_zeros(1, f0.shape[1] * self.config.hop_length), f0


def heard_by_the_network(
    request: Request, song: Path, output: Path, scratch: Path
) -> Sequence[dict[str, Tensor]]:
    models = load_models(request)
    network = Heard(models.network)
    converter = Converter(dataclasses.replace(models, network=network), request.config)
    with Decoder(DecodeConfig(), scratch) as decoder:
        converter.convert("song", song, output, decoder)
    return network.calls


@pytest.mark.slow
def test_the_network_is_given_what_training_gave_it(tmp_path: Path, run_extract: Extract) -> None:
    """A song that is one clip, from its first frame to its last."""
    corpus = tmp_path / "corpus" / "ann"
    corpus.mkdir(parents=True)
    wav = sing(VOICES[1], 3.0, RATE, seed=1).wav[: 160 * 280]
    sf.write(corpus / "song.wav", wav + 0.05 * np.sin(np.arange(len(wav)) / 5), RATE)
    settings = [*SETTINGS, "slice.min_length_ms=5000", "loudness.target_lufs=-23"]
    run_extract(corpus.parent, tmp_path / "dataset", settings)
    data = ShardDataset(tmp_path / "dataset")
    assert len(data) == 1 and len(data[0]) == 280

    extraction = extraction_of(open_folder(tmp_path / "dataset"), "mfcc")
    named = small_voice(volume_embedding=True)
    save_voice(tmp_path / "voice", dataclasses.replace(named, extraction=extraction))
    settings = ["voice.speaker=ann", "join.pad_ms=0", "join.crossfade_ms=0"]
    request = read_request(tmp_path / "voice", settings)
    (call,) = heard_by_the_network(
        request, corpus / "song.wav", tmp_path / "out.wav", tmp_path / "scratch"
    )
    example = data[0]
    np.testing.assert_array_equal(call["units"][0], example.units)
    np.testing.assert_array_equal(call["f0"][0], example.f0)
    np.testing.assert_array_equal(call["voiced"][0], example.voiced)
    np.testing.assert_array_equal(call["volume"][0], example.volume)
    assert call["speaker"].tolist() == [[1.0, 0.0]]


@pytest.mark.slow
def test_the_same_seed_gives_the_same_samples(voice: Path, song: Path, tmp_path: Path) -> None:
    first, conversion = convert(voice, song, tmp_path / "a.wav")
    again, _ = convert(voice, song, tmp_path / "b.wav")
    other, _ = convert(voice, song, tmp_path / "c.wav", "voice.seed=1")
    assert len(first) == 8 * RATE and conversion.pieces > 1
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3


def test_pauses_stay_silent_and_the_level_is_the_songs(
    voice: Path, song: Path, tmp_path: Path
) -> None:
    wav, conversion = convert(voice, song, tmp_path / "a.wav", FLOAT, "slice.min_length_ms=1000")
    quiet = tmp_path / "quiet.wav"
    source, _ = sf.read(song, dtype="float32")
    sf.write(quiet, source / 10, RATE, "FLOAT")
    softer, _ = convert(
        voice,
        quiet,
        tmp_path / "b.wav",
        FLOAT,
        "slice.min_length_ms=1000",
        "slice.threshold_db=-60",
    )
    sounding = conversion.target_f0.repeat(160)[: len(wav)] > 0
    assert level_db(wav[sounding]) - level_db(softer[sounding]) == pytest.approx(20, abs=1)
    silence = tmp_path / "silence.wav"
    sf.write(silence, np.zeros(2 * RATE, np.float32), RATE)
    nothing, conversion = convert(voice, silence, tmp_path / "c.wav")
    assert len(nothing) == 2 * RATE and not nothing.any()
    assert conversion.notices == ("the song is silent throughout: it is digital silence",)


def test_pieces_of_a_held_note_meet_without_a_seam(voice: Path, held: Path, tmp_path: Path) -> None:
    """Cut in the middle of a note, against the same song in one piece."""
    whole, one = convert(voice, held, tmp_path / "a.wav", FLOAT, *WHOLE)
    cut, several = convert(voice, held, tmp_path / "b.wav", FLOAT, "slice.max_length_ms=1000")
    assert (one.pieces, several.pieces) == (1, 5)
    error = level_db(cut - whole) - level_db(whole)
    assert error < -30
    # Where the pieces begin anew, without context, phases and noise do not help.
    bare, _ = convert(
        voice,
        held,
        tmp_path / "c.wav",
        FLOAT,
        "slice.max_length_ms=1000",
        "join.pad_ms=0",
        "join.crossfade_ms=0",
    )
    assert level_db(bare - whole) - level_db(whole) > error + 10


@pytest.mark.slow
def test_transposition(voice: Path, song: Path, tmp_path: Path) -> None:
    _, plain = convert(voice, song, tmp_path / "a.wav")
    _, higher = convert(voice, song, tmp_path / "b.wav", "pitch.transpose=12")
    _, fitted = convert(voice, song, tmp_path / "c.wav", "pitch.transpose=auto", speaker="ben")
    np.testing.assert_allclose(higher.target_f0, 2 * plain.target_f0, rtol=1e-6)
    np.testing.assert_allclose(fitted.target_f0, plain.target_f0 / 2, rtol=1e-6)
    assert fitted.notices[0] == "transposed by -12 semitones"
    _, high = convert(voice, song, tmp_path / "d.wav", "pitch.transpose=36")
    assert "lie above 1100 Hz" in high.notices[0]
    assert plain.notices[0] == (
        "the song's median pitch, 220 Hz, lies 12 semitones below that of ann, 440 Hz; "
        "--transpose auto or octave moves it by +12, which keeps the key"
    )
    assert not any("median pitch" in notice for notice in higher.notices)
    low = dataclasses.replace(load_voice(voice), pitch_hz={"ann": 147.0})
    save_voice(tmp_path / "low", low)
    _, far = convert(tmp_path / "low", song, tmp_path / "e.wav")
    assert far.notices[0].endswith("auto moves it by -7, octave by -12, which keeps the key")
    _, octave = convert(tmp_path / "low", song, tmp_path / "f.wav", "pitch.transpose=octave")
    np.testing.assert_allclose(octave.target_f0, plain.target_f0 / 2, rtol=1e-6)


@pytest.mark.slow
def test_a_mix_of_one_is_that_one_and_a_mix_goes_over_time(
    voice: Path, song: Path, tmp_path: Path
) -> None:
    ann, _ = convert(voice, song, tmp_path / "a.wav", FLOAT)
    ben, _ = convert(voice, song, tmp_path / "b.wav", FLOAT, speaker="ben")
    one, _ = convert(voice, song, tmp_path / "c.wav", FLOAT, "voice.mix=ann=2", speaker=None)
    np.testing.assert_allclose(one, ann, atol=1e-6)
    curve = tmp_path / "curve.csv"
    curve.write_text("time_s,ann,ben\n3.9,1,0\n4.1,0,1\n")
    both, _ = convert(voice, song, tmp_path / "d.wav", FLOAT, f"voice.mix={curve}", speaker=None)
    assert np.abs(ann - ben).max() > 1e-3
    np.testing.assert_allclose(both[: 3 * RATE], ann[: 3 * RATE], atol=1e-5)
    np.testing.assert_allclose(both[5 * RATE :], ben[5 * RATE :], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "setting",
    [
        "pitch.predict=true",
        "units.second_pass=true",
        "output.envelope=1",
        "voice.noise_scale=0",
        "loudness.per=clip",
        "encoder.normalize=song",
        "f0.median_ms=50",
    ],
)
def test_each_control_changes_the_song_and_not_its_length(
    voice: Path, song: Path, tmp_path: Path, setting: str
) -> None:
    plain, _ = convert(voice, song, tmp_path / "a.wav", FLOAT)
    changed, _ = convert(voice, song, tmp_path / "b.wav", FLOAT, setting)
    assert len(changed) == len(plain) and np.isfinite(changed).all()
    assert np.abs(changed - plain).max() > 1e-4


@pytest.mark.slow
def test_so_vits_svc_voices_sing(tmp_path: Path) -> None:
    """From a G_*.pth, and from a folder NAME/{model.pth, config.json}; neither has an encoder."""
    theirs = dataclasses.replace(
        small_voice(units_dim=768, source_rate=44100),
        encoder=VoiceEncoder(name="contentvec768l12", dim=768),
        extraction=None,
    )
    write_voice(theirs, tmp_path / "G_10.pth")
    song = tmp_path / "song.wav"
    sf.write(song, tune(2.0, RATE), RATE)
    for path in (tmp_path / "G_10.pth", tmp_path):
        with pytest.raises(UserError, match=r"encoder contentvec768l12.*--encoder-checkpoint"):
            read_request(path, ["voice.speaker=ann"])
    (tmp_path / "ann").mkdir()
    (tmp_path / "G_10.pth").rename(tmp_path / "ann" / "model.pth")
    (tmp_path / "config.json").rename(tmp_path / "ann" / "config.json")
    encoder = f"encoder.checkpoint={write_hubert_base(tmp_path / 'hubert_base.pt')}"
    wav, _ = convert(tmp_path / "ann", song, tmp_path / "out.wav", "f0.method=dio", encoder)
    assert len(wav) == 2 * RATE and np.abs(wav).max() > 1e-3
    wrong = f"encoder.checkpoint={GOLDEN / 'tiny_hubert_base.pt'}"
    with pytest.raises(UserError, match=r"units of width 48, but the voice takes width 768"):
        convert(tmp_path / "ann", song, tmp_path / "no.wav", wrong)


@pytest.mark.slow
def test_a_voice_exported_to_so_vits_svc_gives_the_same_samples(song: Path, tmp_path: Path) -> None:
    """The files lack the settings of the clips, so both conversions name them."""
    ours = dataclasses.replace(
        small_voice(units_dim=768, source_rate=44100),
        encoder=VoiceEncoder(name="contentvec768l12", dim=768),
        extraction=None,
    )
    save_voice(tmp_path / "ours", ours)
    export(tmp_path / "ours", tmp_path / "theirs", "sovits")
    encoder = f"encoder.checkpoint={write_hubert_base(tmp_path / 'hubert_base.pt')}"
    settings = (FLOAT, "f0.method=dio", encoder)
    wavs = [
        convert(tmp_path / name, song, tmp_path / f"{name}.wav", *settings)[0]
        for name in ("ours", "theirs")
    ]
    assert np.abs(wavs[0]).max() > 1e-3
    assert np.array_equal(*wavs)


def refused(voice: Path, song: Path, output: Path, *settings: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        convert(voice, song, output, *settings, speaker=None)
    assert not output.exists()


def test_what_a_person_can_put_right_is_said(voice: Path, song: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.wav"
    refused(voice, song, out, words=r"no speaker is named; name one of .* with --speaker: ann, ben")
    refused(voice, song, out, "voice.speaker=eve", words=r"no speaker 'eve'; name .*: ann")
    refused(voice, song, out, "pitch.transpose=99", words=r"it must lie in -36 to 36 semitones")
    refused(voice, song, out, "pitch.transpose=up", words=r"semitones, auto or octave")
    refused(voice, song, out, "encoder.name=log-mel", words=r"this voice was trained with mfcc")
    refused(voice, song, out, "voice.speaker=ann", "voice.mix=ann=1", words="give one of them")
    refused(voice, song, out, "voice.mix=eve=1", words="eve")
    empty = tmp_path / "empty.wav"
    empty.touch()
    refused(voice, empty, out, "voice.speaker=ann", words=r"empty\.wav cannot be converted: empty")
    refused(voice, tmp_path / "none.wav", out, "voice.speaker=ann", words="the file does not exist")
    refused(voice, song, tmp_path / "out.txt", "voice.speaker=ann", words=r"must end in \.wav")
    with pytest.raises(UserError, match="is the input song"):
        convert(voice, song, song)
    with pytest.raises(UserError, match="holds no voice"):
        read_request(tmp_path)


def test_a_mix_of_voices_is_pointed_out(voice: Path, tmp_path: Path) -> None:
    first, second = (sing(VOICES[i], 4.0, RATE, seed=i).wav for i in (1, 2))
    notices = []
    for number, wav in enumerate((first, first + second)):
        sf.write(tmp_path / f"{number}.wav", 0.5 * wav, RATE)
        _, conversion = convert(voice, tmp_path / f"{number}.wav", tmp_path / "out.wav")
        notices.append([each for each in conversion.notices if "more than one voice" in each])
    assert notices[0] == []
    (notice,) = notices[1]
    assert re.search(r"in \d+% of its voiced frames; .*: separate the vocals first", notice)


def test_output_that_is_not_finite_is_one_sentence_and_no_file(short: Path, tmp_path: Path) -> None:
    voice = write_overflowing_voice(tmp_path / "voice")
    (tmp_path / "out").mkdir()
    words = r"song\.wav: the voice's output is not finite .*at \d\.\d\d s"
    for name, *settings in (
        ("a.wav",),
        ("a.wav", FLOAT, "units.second_pass=true"),
        ("a.flac", "output.subtype=PCM_24"),
        ("a.ogg", "output.envelope=1"),
    ):
        who = "voice.speaker=ann"
        refused(voice, short, tmp_path / "out" / name, who, *settings, words=words)
        assert list((tmp_path / "out").iterdir()) == []
    guess = ("voice.speaker=ann", "pitch.predict=true")
    refused(voice, short, tmp_path / "a.wav", *guess, words="the pitch that the voice predicts is")


@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_output_that_overflows_on_its_way_to_the_file_is_refused(
    voice: Path, short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sing(*args: Any) -> Array:
        return np.full(args[1].frames * 160, 3e38, np.float32)

    monkeypatch.setattr("pipeline.convert.song._SongConversion._sing", sing)
    quiet = "loudness.target_lufs=-60"  # undone by a gain
    out = tmp_path / "out.wav"
    refused(voice, short, out, "voice.speaker=ann", FLOAT, quiet, words="output is not finite")
    assert list(tmp_path.iterdir()) == []


def test_a_graph_whose_output_is_not_finite_is_refused(short: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    voice = write_overflowing_voice(tmp_path / "voice")
    out, onnx = tmp_path / "out.wav", "compute.backend=onnx"
    refused(voice, short, out, "voice.speaker=ann", onnx, words="voice's output is not finite")


@pytest.mark.slow
def test_a_page_a_summary_and_the_settings(voice: Path, song: Path, tmp_path: Path) -> None:
    words = ["convert", str(voice), str(song), str(tmp_path / "out.flac"), "--speaker", "ben"]
    done = CliRunner().invoke(
        app, [*words, "--transpose", "-5", "--report", "--json", str(tmp_path / "out.json")]
    )
    assert done.exit_code == 0, done.output
    assert "written" in done.output
    assert "<audio" in (tmp_path / "out.html").read_text()
    summary = json.loads((tmp_path / "out.json").read_text())
    assert summary["num_samples"] == 8 * RATE
    printed = CliRunner().invoke(app, ["convert", str(voice), "--print-config", "--speaker", "ben"])
    assert "speaker: ben" in printed.output and "method: dio" in printed.output


@pytest.mark.slow
def test_onnxruntime_sings_the_same(voice: Path, song: Path, tmp_path: Path) -> None:
    """Made a graph for the time, and from a folder that `export` wrote."""
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from pipeline.tools.export_voice import export

    ours, _ = convert(voice, song, tmp_path / "a.wav", FLOAT)
    theirs, _ = convert(voice, song, tmp_path / "b.wav", FLOAT, "compute.backend=onnx")
    np.testing.assert_allclose(theirs, ours, atol=1e-5)
    export(voice, tmp_path / "graphs")
    graphs, _ = convert(tmp_path / "graphs", song, tmp_path / "c.wav", FLOAT)
    np.testing.assert_array_equal(graphs, theirs)
    own, _ = convert(tmp_path / "graphs", song, tmp_path / "d.wav", FLOAT, "pitch.predict=true")
    melody, _ = convert(voice, song, tmp_path / "e.wav", FLOAT, "pitch.predict=true")
    np.testing.assert_allclose(own, melody, atol=1e-3)


@pytest.fixture
def vocoder(tmp_path: Path) -> Path:
    (tmp_path / "vocoder").mkdir()
    return write_vocoder(tmp_path / "vocoder", "tiny")


@pytest.mark.slow
def test_a_vocoder_sings_it_again(
    voice: Path, held: Path, vocoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one phase over all pieces: what its source alone sings meets without a seam."""
    enhanced = (FLOAT, f"enhancer.checkpoint={vocoder}")
    plain, _ = convert(voice, held, tmp_path / "a.wav", FLOAT)
    sung, _ = convert(voice, held, tmp_path / "b.wav", *enhanced)
    assert len(sung) == len(plain) and np.abs(sung - plain).max() > 1e-3

    def first_harmonic(
        self: Vocoder, mel: Tensor, f0: Tensor, noise: Noise, phase: Tensor
    ) -> Tensor:
        return self.m_source.waves(f0, noise, phase)[:, :1]

    monkeypatch.setattr(Vocoder, "infer", first_harmonic)
    settings = (*enhanced, "enhancer.adaptive_key=7")
    whole, one = convert(voice, held, tmp_path / "c.wav", *settings, *WHOLE)
    cut, several = convert(voice, held, tmp_path / "d.wav", *settings, "slice.max_length_ms=1000")
    assert (one.pieces, several.pieces) == (1, 5)
    assert level_db(cut - whole) - level_db(whole) < -15


@pytest.mark.slow
def test_where_the_vocoder_begins_and_how_high_it_goes(
    voice: Path, held: Path, vocoder: Path, tmp_path: Path
) -> None:
    enhanced = (f"enhancer.checkpoint={vocoder}", "slice.max_length_ms=1000")
    late, _ = convert(voice, held, tmp_path / "a.wav", *enhanced, "enhancer.silence_front=1.5")
    assert not late[: int(1.4 * RATE)].any()
    assert np.abs(late[int(1.6 * RATE) :]).reshape(-1, 400).max(axis=1).min() > 0
    high = ("enhancer.adaptive_key=null", "pitch.transpose=36")
    convert(voice, held, tmp_path / "b.wav", *enhanced, *high)
    with pytest.raises(UserError, match=r"enhancer\.checkpoint"):
        convert(voice, held, tmp_path / "c.wav", f"enhancer.checkpoint={tmp_path / 'none'}")


def test_the_melody_that_the_voice_guesses_is_what_is_asked(
    voice: Path, held: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each piece from the song's own melody, never from what was guessed before."""

    def twice(self: Synthesizer, units: Tensor, f0: Tensor, *others: Tensor) -> Tensor:
        return 2 * f0

    monkeypatch.setattr(Synthesizer, "predict_f0", twice)
    settings = ("pitch.predict=true", "slice.max_length_ms=1000")
    _, conversion = convert(voice, held, tmp_path / "a.wav", *settings)
    assert conversion.pieces == 5
    np.testing.assert_allclose(conversion.target_f0, 2 * conversion.f0, rtol=1e-4)
    write_small_voice(tmp_path / "plain", predict_f0=False)
    with pytest.raises(UserError, match="has no pitch predictor"):
        read_request(tmp_path / "plain", ["voice.speaker=ann", "pitch.predict=true"])


def test_real_singing(voice: Path, real_audio: Path, tmp_path: Path) -> None:
    """A soprano's phrase, brought to ann's middle; the voice follows wherever she sings."""
    song = real_audio / "singing-female.flac"
    info = sf.info(song)
    wav, conversion = convert(voice, song, tmp_path / "a.wav", "pitch.transpose=auto")
    assert len(wav) == -(-info.frames * RATE // info.samplerate)
    asked = conversion.target_f0[conversion.target_f0 > 0]
    assert np.median(asked) == pytest.approx(440, rel=0.06) and len(asked) > 300
    again, _ = convert(voice, song, tmp_path / "b.flac", f"output.sample_rate={info.samplerate}")
    assert len(again) == info.frames
