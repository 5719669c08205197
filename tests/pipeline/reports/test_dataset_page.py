"""The report page: numbers of the dataset, names as text, one self-contained file."""

from __future__ import annotations

import base64
import dataclasses
import io
import math
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
import pytest
import soundfile as sf
from PIL import Image
from rich.console import Console

from pipeline.dataset.ledger import SongEntry
from pipeline.dataset.schema import QUALITY_COLUMNS, SCHEMA_VERSION, EncoderIdentity, shard_schema
from pipeline.dataset.shards import Footer, iter_shards, write_dataset_info, write_shard
from pipeline.errors import UserError
from pipeline.extract.command import ExtractOptions, extract
from pipeline.extract.config import ExtractConfig, fingerprinted, load_config
from pipeline.fingerprint import changes_output, fingerprint
from pipeline.reports.dataset_page import write_report
from pipeline.settings import flatten
from pipeline.songs.plan import PlannedSong, Task, append_plan
from pipeline.tools.demo_corpus import make_demo_corpus
from stages.errors import Dropped, Reason
from stages.flac import encode_flac
from stages.quality import MEASURES

RATE, HOP = 16000, 160
MFCC = EncoderIdentity("mfcc", 2, "float16", 50.0, None)
SETTINGS = fingerprinted(ExtractConfig())


@dataclasses.dataclass(frozen=True)
class Song:
    """A song of a dataset made by hand. clips: (seconds, Hz) each."""

    song_id: str
    speaker: str
    clips: tuple[tuple[float, float], ...] = ()
    status: str = "kept"
    reason: Reason | None = None
    detail: str | None = None
    dropped: tuple[Dropped, ...] = ()
    loudness_lufs: float = -23.0


def write_dataset(folder: Path, tasks: list[list[Song]], settings: dict = SETTINGS) -> Path:
    """Write a dataset with one shard per task, with the functions that runs use."""
    write_dataset_info(
        folder,
        {
            "schema_version": SCHEMA_VERSION,
            "fingerprint": fingerprint(settings),
            "settings": settings,
            "speakers": [],
            "encoders": ["mfcc"],
            "f0_method": "praat",
            "sample_rate": RATE,
            "hop_length": HOP,
        },
    )
    planned = []
    for index, songs in enumerate(tasks):
        named = [PlannedSong(s.song_id, s.speaker, b"x", 1, 1, 1.0) for s in songs]
        planned.append(Task(index, "train", tuple(named)))
    append_plan(folder, planned)
    for task, songs in zip(planned, tasks, strict=True):
        rows = [row for song in songs for row in rows_of(song)]
        footer = Footer(
            SCHEMA_VERSION, fingerprint(settings), task.index, task.task_id, RATE, HOP, "PCM_16",
            "praat", [MFCC], {"numpy": "1.2.3"}, [entry_of(song) for song in songs],
        )  # fmt: skip
        table = pa.Table.from_pylist(rows, schema=shard_schema([MFCC], RATE))
        write_shard(folder, task.shard_name, table, footer)
    return folder


def entry_of(song: Song) -> SongEntry:
    kept_s = sum(seconds for seconds, _ in song.clips)
    left_s = sum(drop.seconds for drop in song.dropped)
    return SongEntry(
        song.song_id, song.speaker, song.status, song.reason, song.detail, len(song.clips),
        kept_s + left_s, kept_s, list(song.dropped), 1, 1, song.song_id, "16000 Hz, 1 ch, WAV",
    )  # fmt: skip


def rows_of(song: Song) -> list[dict]:
    rows = []
    for i, (seconds, hz) in enumerate(song.clips):
        n = int(seconds * RATE)
        samples = (8000 * np.sin(2 * np.pi * hz * np.arange(n) / RATE)).astype(np.int16)
        rows.append(
            {
                "clip_id": f"{song.song_id}#{i:06d}",
                "song_id": song.song_id,
                "speaker": song.speaker,
                "clip_index": i,
                "clip_count": len(song.clips),
                "start": 0,
                "stop": n,
                "audio": {"bytes": encode_flac(samples, RATE, "PCM_16"), "path": None},
                "sample_rate": RATE,
                "num_samples": n,
                "f0": np.full(n // HOP, hz, np.float32),
                "units_mfcc": b"",
                "num_unit_frames_mfcc": 0,
                "loudness_lufs": song.loudness_lufs,
                "gain_db": 5.0,
                "peak_db": -3.0,
                **dict.fromkeys(QUALITY_COLUMNS, 0.0),
                "snr_db": 40.0,
                "bandwidth_hz": 4000.0,
                "voiced_ratio": float(hz > 0),
                "f0_low_hz": hz,
                "f0_high_hz": hz,
            }
        )
    return rows


def page_of(dataset: Path) -> ElementTree.Element:
    """Write the page and parse it; it must be well-formed XML."""
    text = write_report(dataset, ExtractConfig()).read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE html>\n<html lang=")
    return ElementTree.fromstring(text)


def text_of(element: ElementTree.Element | None) -> str:
    assert element is not None
    return "".join(element.itertext())


def headline(page: ElementTree.Element) -> dict[str, str]:
    cells = page.findall(".//dl[@class='numbers']/div")
    return {text_of(cell.find("dt")): text_of(cell.find("dd/strong")) for cell in cells}


def table(page: ElementTree.Element, kind: str) -> dict[str, list[str]]:
    """Return the cells of each row by its heading."""
    rows = page.findall(f".//table[@class='{kind}']/tbody/tr")
    return {text_of(row.find("th")): [text_of(cell) for cell in row.findall("td")] for row in rows}


SILENCE = Dropped(Reason.SILENCE, 2, 3.5)
SMALL = [
    [
        Song("anna/a.wav", "anna", ((6.0, 440.0), (2.0, 440.0)), dropped=(SILENCE,)),
        Song("anna/b.wav", "anna", ((4.0, 440.0),)),
        Song("ben/broken.mp3", "ben", (), "quarantined", Reason.UNREADABLE, "no MPEG frame"),
    ],
    [
        Song("ben/c.wav", "ben", ((5.0, 110.0),), loudness_lufs=math.nan),
        Song("cleo/d.wav", "cleo", ((3.0, 880.0),)),
        Song("cleo/quiet.wav", "cleo", (), "filtered", Reason.SILENT, "all 9 s are silent",
             (Dropped(Reason.SILENCE, 1, 9.0),)),
    ],
]  # fmt: skip


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("report") / "small", SMALL)


def test_the_measures_and_their_limits_follow_from_the_declarations(tmp_path: Path) -> None:
    settings = SETTINGS | {"quality.min_snr_db": 9.0, "quality.max_pitch_range_semitones": 20.0}
    rows = table(page_of(write_dataset(tmp_path / "set", SMALL, settings)), "measures")
    shown = [each for each in MEASURES if each.stored or each.name == "range_semitones"]
    assert list(rows) == [each.name + each.meaning for each in shown]
    cells = dict(zip([each.name for each in shown], rows.values(), strict=True))
    assert cells["snr_db"] == ["40 dB", "40 dB", "40 dB", "min_snr_db 9"]
    assert cells["range_semitones"] == ["–", "–", "–", "max_pitch_range_semitones 20"]
    assert cells["voiced_ratio"] == ["100%", "100%", "100%", ""]
    assert cells["f0_low_hz"] == ["176 Hz", "440 Hz", "792 Hz", ""]


def test_a_clip_without_pitch_has_no_measures_of_pitch(tmp_path: Path) -> None:
    silent = Song("a/b.wav", "a", ((1.0, 0.0), (1.0, 220.0)))
    rows = table(page_of(write_dataset(tmp_path / "set", [[silent]])), "measures")
    low = next(row for heading, row in rows.items() if heading.startswith("f0_low_hz"))
    voiced = next(row for heading, row in rows.items() if heading.startswith("voiced_ratio"))
    assert low[:3] == ["220 Hz", "220 Hz", "220 Hz"]
    assert voiced[:3] == ["5%", "50%", "95%"]


def test_a_reason_names_the_measures_that_give_it(tmp_path: Path) -> None:
    song = Song("a/b.wav", "a", ((1.0, 220.0),), dropped=(Dropped("pitch_range", 1, 2.0),))
    rows = table(page_of(write_dataset(tmp_path / "set", [[song]])), "counts")
    heading = "pitch rangelimits of f0_low_hz, f0_high_hz, range_semitones"
    assert rows == {heading: ["", "", "1", "2.0 s"]}


def test_the_numbers_are_those_of_the_dataset(small: Path) -> None:
    page = page_of(small)
    assert headline(page) == {
        "songs kept": "4",
        "filtered": "1",
        "quarantined": "1",
        "audio read": "32.5 s",
        "audio kept": "20.0 s",
        "clips": "5",
        "shards": "2",
    }
    speakers = table(page, "speakers")
    assert list(speakers) == ["anna", "ben", "cleo"], "longest first"
    assert speakers["anna"][:3] == ["2 of 2", "3", "12.0 s"]
    assert speakers["ben"][:3] == ["1 of 2", "1", "5.0 s"]
    assert [speakers[name][3].split("to")[0].strip() for name in speakers] == ["A4", "A2", "A5"]
    assert speakers["anna"][3] == "A4 to A4440 to 440 Hz, median 440"
    assert table(page, "counts") == {
        "silence": ["", "", "3", "12.5 s"],
        "silent": ["", "1", "", ""],
        "unreadable": ["1", "", "", ""],
    }
    assert table(page, "songs") == {
        "ben/broken.mp3": ["quarantined", "unreadable", "no MPEG frame"],
        "cleo/quiet.wav": ["filtered", "silent", "all 9 s are silent"],
    }
    assert page.find(".//section[@class='alert']") is None
    captions = " ".join(text_of(caption) for caption in page.iter("figcaption"))
    assert "2.0 to 6.0 s, median 4.0 s" in captions
    assert "not measured in 1 clip" in captions
    assert "+5.0 to +5.0 dB" in captions


def test_three_clips_of_three_speakers_play_what_the_shards_hold(small: Path) -> None:
    page = page_of(small)
    shown = page.findall(".//div[@class='figures clips']/figure")
    assert [text_of(figure.find("h3")) for figure in shown] == ["anna", "ben", "cleo"]
    lengths = []
    for figure in shown:
        audio = figure.find("audio")
        assert audio is not None and audio.get("controls") and audio.get("aria-label")
        kind, _, data = audio.attrib["src"].partition(",")
        assert kind == "data:audio/flac;base64"
        wav, rate = sf.read(io.BytesIO(base64.b64decode(data)))
        lengths.append(len(wav) / rate)
        images = [element.get("src") or element.get("srcset") for element in figure.iter("img")]
        images += [element.get("srcset") for element in figure.iter("source")]
        assert len(images) == 2, "one for light pages, one for dark ones"
        for uri in images:
            assert uri is not None
            image = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
            assert image.format == "PNG" and min(image.size) > 300
    assert lengths == [6.0, 5.0, 3.0], "of anna's, the one nearest to 6 s"


def test_f0_is_drawn_where_it_is(small: Path) -> None:
    """Find the cyan contour of a higher voice higher in the picture."""
    heights = {}
    for figure in page_of(small).findall(".//div[@class='figures clips']/figure"):
        uri = next(figure.iter("img")).attrib["src"]
        image = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB")
        rgb = np.asarray(image).astype(int)
        cyan = np.abs(rgb - np.array([0x5E, 0xE6, 0xFF])).sum(axis=2) < 30
        assert cyan.sum() > 200
        heights[text_of(figure.find("h3"))] = np.median(np.nonzero(cyan)[0])
    assert heights["ben"] > heights["anna"] + 30 > heights["cleo"] + 60


def test_the_page_stands_alone_and_is_the_same_each_time(small: Path) -> None:
    page = page_of(small)
    first = (small / "report.html").read_bytes()
    assert write_report(small, ExtractConfig()).read_bytes() == first
    tags = {element.tag for element in page.iter()}
    assert not tags & {"script", "link", "iframe", "object", "base", "form"}
    for element in page.iter():
        for name in ("src", "srcset", "href"):
            assert element.get(name, "data:").startswith("data:")
    style = text_of(page.find(".//style"))
    assert "url(" not in style and "@import" not in style
    assert "prefers-color-scheme: dark" in style
    assert not list((small / ".tmp").iterdir())


def test_every_picture_has_words(small: Path) -> None:
    images = list(page_of(small).iter("img"))
    assert len(images) == 6
    for image in images:
        assert len(image.get("alt", "")) > 20 and image.get("width") and image.get("height")


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    script = "<script>alert(1)</script>"
    song = '"><img src=x onerror=alert(1)>&amp;$\\frac{.wav'
    link = "javascript:alert('1')"
    bell = "bell\x07 and \ufffe.wav"
    page = page_of(
        write_dataset(
            tmp_path / f"set {script.replace('/', '')}",
            [
                [
                    Song(f"{script}/{song}", script, ((2.0, 200.0),)),
                    Song(link, link, ((1.0, 200.0),)),
                    Song(bell, script, (), "quarantined", Reason.CRASHED, f"'{script}'"),
                ]
            ],
        )
    )
    require_harmless(page)
    assert list(table(page, "speakers")) == [script, link]
    assert [*table(page, "songs").values()] == [["quarantined", "crashed", f"'{script}'"]]
    assert next(iter(table(page, "songs"))).startswith("bell\ufffd and \ufffd.wav")
    ids = [f"{script}/{song}#000000", f"{link}#000000"]
    assert [text_of(element) for element in page.findall(".//p[@class='clip-id']")] == ids
    labels = [audio.attrib["aria-label"] for audio in page.iter("audio")]
    assert labels == [f"Clip {clip_id}" for clip_id in ids]
    for image, clip_id in zip([*page.iter("img")][-2:], ids, strict=True):
        assert f"clip {clip_id}, " in image.attrib["alt"]


def require_harmless(page: ElementTree.Element) -> None:
    """Assert that no name became an element, an event handler or an address."""
    assert page.find(".//script") is None
    for element in page.iter():
        assert not any(name.startswith("on") for name in element.attrib)
        for name in ("src", "srcset", "href"):
            assert element.get(name, "data:").startswith("data:")


def test_a_dataset_without_clips(tmp_path: Path) -> None:
    silent = Song("a/b.wav", "a", (), "filtered", Reason.SILENT, "", (SILENCE,))
    page = page_of(write_dataset(tmp_path / "empty", [[silent]]))
    assert headline(page)["clips"] == "0" and headline(page)["filtered"] == "1"
    assert table(page, "speakers") == {"a": ["0 of 1", "0", "0.0 s", "", ""]}
    assert page.find(".//audio") is None and page.find(".//img") is None
    assert "No clip was kept" in text_of(page.find("body"))


def test_a_dataset_that_is_not_done_says_so(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "half", SMALL)
    iter_shards(dataset)[1].unlink()
    page = page_of(dataset)
    assert "3 planned songs have no ledger entry" in text_of(
        page.find(".//section[@class='alert']")
    )
    assert headline(page)["shards"] == "1"
    iter_shards(dataset)[0].unlink()
    assert headline(page_of(dataset))["songs kept"] == "0"


def test_a_damaged_shard_is_named_and_the_rest_reported(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "damaged", SMALL)
    shard = iter_shards(dataset)[0]
    shard.write_bytes(shard.read_bytes()[:-100])
    page = page_of(dataset)
    assert shard.name in text_of(page.find(".//section[@class='alert']"))
    assert headline(page)["clips"] == "2"


def test_audio_that_does_not_decode_is_named_and_not_shown(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "noise", SMALL)
    shard = iter_shards(dataset)[1]
    data = shard.read_bytes()
    for at in [match.start() for match in re.finditer(b"fLaC", data)]:
        data = data[:at] + b"XXXX" + data[at + 4 :]
    shard.write_bytes(data)
    page = page_of(dataset)
    assert "ben/c.wav#000000 cannot be read" in text_of(page.find(".//section[@class='alert']"))
    shown = page.findall(".//div[@class='figures clips']/figure/h3")
    assert [text_of(title) for title in shown] == ["anna"]


def test_one_speaker_gives_three_clips_and_many_are_summed_up(tmp_path: Path) -> None:
    clips = tuple((float(seconds), 300.0) for seconds in (1, 2, 3, 4))
    page = page_of(write_dataset(tmp_path / "one", [[Song("a/b.wav", "a", clips)]]))
    ids = [text_of(element) for element in page.findall(".//p[@class='clip-id']")]
    assert ids == ["a/b.wav#000003", "a/b.wav#000002", "a/b.wav#000001"]

    many = [Song(f"s{i:03d}/a.wav", f"s{i:03d}", ((0.5, 300.0),)) for i in range(60)]
    page = page_of(write_dataset(tmp_path / "many", [many[:30], many[30:]]))
    speakers = table(page, "speakers")
    assert len(speakers) == 51
    assert speakers["and 10 more"][1:3] == ["10", "5.0 s"]


def test_settings_that_differ_from_the_defaults_stand_out(tmp_path: Path) -> None:
    config = load_config(
        None, ["slice.threshold_db=-35", "quality.min_snr_db=9", "loudness.mode=none"]
    )
    page = page_of(write_dataset(tmp_path / "set", SMALL, fingerprinted(config)))
    changed, others = (
        {text_of(row.find("th")): [text_of(cell) for cell in row.findall("td")] for row in rows}
        for rows in (t.findall("tbody/tr") for t in page.findall(".//table[@class='settings']"))
    )
    assert changed == {
        "slice.threshold_db": ["-35.0", "-40.0"],
        "quality.min_snr_db": ["9.0", "none"],
        "loudness.mode": ["none", "lufs"],
    }
    assert others["loudness.target_lufs"] == ["-18.0"]
    assert others["quality.min_voiced_ratio"] == ["none"], "it is off, so it is not recorded"
    counting = {key for key in flatten(config) if changes_output(key)}
    assert changed.keys() | others.keys() == counting and not changed.keys() & others.keys()
    bold = {text_of(element) for element in page.findall(".//table[@class='settings']//b")}
    assert bold == {"-35.0", "9.0", "none"}


def test_a_folder_that_is_no_dataset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no dataset\.json"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_real_extraction(tmp_path: Path) -> None:
    corpus = make_demo_corpus(tmp_path / "corpus", minutes=0.3, seed=1)
    config = load_config(None, ["slice.min_length_ms=1000", "f0.method=dio"])
    quiet = Console(file=io.StringIO())
    outcome = extract(corpus, tmp_path / "set", config, ExtractOptions(local=True), quiet)
    page = page_of(tmp_path / "set")
    numbers = headline(page)
    assert numbers["clips"] == str(outcome.account.clips) and outcome.account.clips >= 9
    assert (numbers["filtered"], numbers["quarantined"]) == ("1", "1")
    assert set(table(page, "songs")) == {"bass/damaged.flac", "soprano/silent.wav"}
    assert table(page, "songs")["soprano/silent.wav"][:2] == ["filtered", "silent"]
    assert len(page.findall(".//audio")) == 3
