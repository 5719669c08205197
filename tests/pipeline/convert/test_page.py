"""The page of a conversion: numbers of the songs, names as text, playable in a browser."""

from __future__ import annotations

import base64
import dataclasses
import io
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import soundfile as sf
from PIL import Image
from scipy.signal import resample_poly

from pipeline.convert.page import write_conversion_report
from pipeline.convert.result import Conversion
from pipeline.errors import UserError
from pipeline.tools.formant_singer import ALTO, sing
from stages.decode import DecodeConfig, Decoder
from stages.resample import ResampleConfig

RATE, HOP = 16000, 320
SCRIPT = "<script>document.title='hit'</script>\"><img src=x onerror=alert(1)>&amp;"
LINK = "javascript:document.title='hit'"
FILE = "song <b> \" onplay='alert(1)' &amp; \x07.wav"
DEFAULTS = {"decode.channels": "mean", "voice.seed": 0, "pitch.transpose": "0"}
SETTINGS = {"decode.channels": "mean", "voice.seed": 7, "pitch.transpose": "5"}
ABOUT = {"speaker": SCRIPT, "voice": LINK}


def a_conversion(folder: Path) -> Conversion:
    """Return a conversion whose output is the song played 4/3 faster, so 498 cents higher."""
    sung = sing(ALTO, 6, RATE, seed=1, hop_length=HOP)
    faster = resample_poly(sung.wav, 3, 4).astype(np.float32)
    wav = np.pad(sung.wav[: len(faster)], (0, HOP))
    higher = np.pad(faster, (0, HOP))
    sf.write(folder / FILE, wav, RATE)
    sf.write(folder / "out.flac", higher, RATE)
    frames = len(wav) // HOP
    at = np.minimum(np.arange(frames) * 4 // 3, len(sung.f0) - 1)
    return Conversion(
        song_id=FILE,
        source=folder / FILE,
        output=folder / "out.flac",
        sample_rate=RATE,
        hop_length=HOP,
        num_samples=len(wav),
        f0=sung.f0[:frames],
        target_f0=sung.f0[at] * np.float32(4 / 3),
        notices=(),
        pieces=1,
        gain_db=2.5,
        peak=float(np.abs(higher).max()),
        wall_s=2.0,
        cpu_s=4.0,
    )


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Decoder]:
    with Decoder(DecodeConfig(), tmp_path_factory.mktemp("scratch")) as decoder:
        yield decoder


@pytest.fixture(scope="module")
def made(decoder: Decoder, tmp_path_factory: pytest.TempPathFactory) -> tuple[Conversion, Path]:
    folder = tmp_path_factory.mktemp("made")
    conversion = dataclasses.replace(
        a_conversion(folder), song_id=SCRIPT, notices=(f"noticed {SCRIPT}",)
    )
    path = folder / "page.html"
    write([conversion], path, decoder)
    return conversion, path


def write(conversions: list[Conversion], path: Path, decoder: Decoder) -> None:
    write_conversion_report(
        path, conversions, SETTINGS, ABOUT,
        defaults=DEFAULTS, decoder=decoder, resample=ResampleConfig(),
    )  # fmt: skip


def parsed(path: Path) -> ElementTree.Element:
    """Parse the page; it must be well-formed XML."""
    return ElementTree.fromstring(path.read_text(encoding="utf-8"))


def text_of(element: ElementTree.Element | None) -> str:
    assert element is not None
    return "".join(element.itertext())


def numbers(page: ElementTree.Element) -> dict[str, tuple[str, str]]:
    cells = page.findall(".//dl[@class='numbers']/div")
    return {
        text_of(cell.find("dt")): (text_of(cell.find("dd/strong")), text_of(cell.find("dd/span")))
        for cell in cells
    }


def sounds(page: ElementTree.Element) -> list[np.ndarray]:
    found = []
    for audio in page.iter("audio"):
        kind, _, data = audio.attrib["src"].partition(",")
        assert kind == "data:audio/flac;base64"
        wav, rate = sf.read(io.BytesIO(base64.b64decode(data)), dtype="float32")
        assert rate == RATE
        found.append(wav)
    return found


def test_the_numbers_are_those_of_the_songs(made: tuple[Conversion, Path]) -> None:
    conversion, path = made
    shown = numbers(parsed(path))
    assert int(shown["pitch within 50 cents"][0].rstrip("%")) >= 95
    assert int(shown["cents off target"][0]) <= 5
    assert int(shown["voicing agrees"][0].rstrip("%")) >= 90
    assert float(shown["timbre change"][0].removesuffix(" dB")) > 2
    assert shown["samples at full scale"][0] == "0"
    seconds = conversion.num_samples / RATE
    assert shown["length"] == (f"{seconds:.1f} s", "1 piece, gain +2.5 dB")
    assert shown["real-time factor"] == (f"{2 / seconds:.2f}", "2.0 s, CPU 4.0 s")


def test_players_hold_the_songs_and_pictures_have_words(made: tuple[Conversion, Path]) -> None:
    conversion, path = made
    page = parsed(path)
    for wav, file in zip(sounds(page), (conversion.source, conversion.output), strict=True):
        np.testing.assert_allclose(wav, sf.read(file, dtype="float32")[0], atol=2**-15)
    (image,) = page.iter("img")
    assert "target f0" in image.attrib["alt"] and image.get("width") and image.get("height")
    for uri in (image.attrib["src"], next(page.iter("source")).attrib["srcset"]):
        picture = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
        assert picture.format == "PNG" and min(picture.size) > 800


def test_hostile_names_stay_text(made: tuple[Conversion, Path]) -> None:
    _, path = made
    page = parsed(path)
    require_harmless(page)
    assert text_of(page.find(".//h1")) == SCRIPT
    assert [text_of(fact) for fact in page.findall(".//dl[@class='about']//dd")] == [SCRIPT, LINK]
    assert f"noticed {SCRIPT}" in text_of(page.find(".//div[@class='notices']"))
    files = [text_of(name) for name in page.findall(".//section[@class='song']/p/bdi")]
    assert files[0].endswith(FILE.replace("\x07", "\ufffd"))
    labels = [audio.attrib["aria-label"] for audio in page.iter("audio")]
    assert labels == [f"Input of {SCRIPT}", f"Output of {SCRIPT}"]
    assert f"output of {SCRIPT} from" in next(page.iter("img")).attrib["alt"]
    assert "url(" not in text_of(page.find(".//style"))


def test_hostile_names_stay_text_in_a_table_of_songs(decoder: Decoder, tmp_path: Path) -> None:
    names = [LINK, SCRIPT, "undecodable \udcff \ufffe.wav"]
    nothing = np.zeros(10, np.float32)
    songs = [
        Conversion(
            name, tmp_path / name, tmp_path / "gone", RATE, HOP, 3200, nothing, nothing, (), 0,
            0.0, 0.0, 0.1, 0.1,
        )
        for name in names
    ]  # fmt: skip
    write(songs, tmp_path / "page.html", decoder)
    page = parsed(tmp_path / "page.html")
    require_harmless(page)
    shown = [LINK, SCRIPT, "undecodable \ufffd \ufffd.wav"]
    rows = page.findall(".//table[@class='overview']/tbody/tr")
    assert [text_of(row.find("th")) for row in rows] == shown
    assert [text_of(title) for title in page.findall(".//section[@class='song']/h2")] == shown


def require_harmless(page: ElementTree.Element) -> None:
    """Assert that no name became an element, an event handler or an address."""
    (script,) = page.iter("script")
    assert "hit" not in text_of(script), "the only script is the page's own"
    for element in page.iter():
        assert not any(name.startswith("on") for name in element.attrib)
        for name in ("src", "srcset"):
            assert element.get(name, "data:").startswith("data:")
        assert element.get("href", "#song-").startswith("#song-")


def test_changed_settings_stand_out_and_the_others_are_folded_away(
    made: tuple[Conversion, Path],
) -> None:
    page = parsed(made[1])
    changed, others = (
        [[text_of(cell) for cell in row] for row in table.findall("tbody/tr")]
        for table in page.findall(".//table[@class='settings']")
    )
    assert changed == [["voice.seed", "7", "0"], ["pitch.transpose", "5", "0"]]
    assert others == [["decode.channels", "mean"]]
    details = page.find(".//details")
    assert details is not None and details.get("open") is None
    assert len(details.findall(".//table")) == 1
    assert "3 settings, 2 of them not the default" in text_of(page)
    assert text_of(details.find("summary")) == "1 other setting"


@pytest.mark.slow
def test_of_a_long_song_three_minutes_are_played_and_all_is_measured(
    decoder: Decoder, tmp_path: Path
) -> None:
    rate, hop, seconds = 8000, 160, 200
    t = np.arange(rate * seconds) / rate
    hz = np.where(t < 190, 220.0, 330.0)
    wav = 0.3 * np.sin(2 * np.pi * np.cumsum(hz) / rate)
    wav[: 90 * rate] = 0
    wav[-40:] = 1.0
    sf.write(tmp_path / "a.wav", np.stack([wav, wav], axis=1), rate)
    f0 = np.where(t < 90, 0, 220.0)[::hop].astype(np.float32)
    conversion = Conversion(
        "a.wav", tmp_path / "a.wav", tmp_path / "a.wav", rate, hop, len(t), f0, f0, (), 20, 0.0,
        1.0, 1.0, 1.0,
    )  # fmt: skip
    write([conversion], tmp_path / "page.html", decoder)
    page = parsed(tmp_path / "page.html")
    audio = next(page.iter("audio")).attrib["src"].partition(",")[2]
    assert sf.info(io.BytesIO(base64.b64decode(audio))).duration == 180
    captions = [text_of(caption) for caption in page.iter("figcaption")]
    assert captions[0].startswith("first 3.0 min of 3.3 min")
    assert captions[2].startswith("90.0 to 150.0 s, the part with most singing")
    shown = numbers(page)
    assert shown["pitch within 50 cents"][0] == "91%", "the last 10 of 110 seconds are a fifth off"
    assert shown["timbre change"][0] == "–", "a rate of 8000 Hz is too low for it"
    assert shown["samples at full scale"] == ("80", "peak +0.0 dB")


def test_several_songs_have_a_table_and_one_that_is_gone_is_named(
    decoder: Decoder, tmp_path: Path
) -> None:
    sf.write(tmp_path / "a.wav", np.zeros(4000), RATE)
    nothing = np.zeros(4000 // HOP, np.float32)
    silent = Conversion(
        "a.wav", tmp_path / "a.wav", tmp_path / "a.wav", RATE, HOP, 4000, nothing, nothing, (), 0,
        0.0, 0.0, 0.1, 0.1,
    )  # fmt: skip
    gone = dataclasses.replace(silent, song_id="gone.wav", output=tmp_path / "gone.wav")
    write([silent, gone], tmp_path / "sub" / "page.html", decoder)
    page = parsed(tmp_path / "sub" / "page.html")
    assert text_of(page.find(".//h1")) == "2 converted songs"
    rows = page.findall(".//table[@class='overview']/tbody/tr")
    assert [text_of(row.find("th")) for row in rows] == ["a.wav", "gone.wav"]
    targets = [link.attrib["href"] for row in rows for link in row.iterfind("th/a")]
    sections = page.findall(".//section[@class='song']")
    assert targets == ["#" + section.attrib["id"] for section in sections]
    assert "missing: the file does not exist" in text_of(sections[1])
    assert len(list(page.iter("audio"))) == 2
    shown = numbers(page)
    assert shown["pitch within 50 cents"][0] == "–" and shown["LUFS"] == ("–", "input –")
    assert list((tmp_path / "sub").iterdir()) == [tmp_path / "sub" / "page.html"]


def test_a_folder_is_no_page(decoder: Decoder, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a folder"):
        write([], tmp_path, decoder)


# ---- in a browser -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> str:
    for name in ("chromium", "chromium-browser", "google-chrome", "/usr/bin/chromium"):
        if found := shutil.which(name):
            return found
    pytest.skip("chromium is not installed")


def look(browser: str, page: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --disable-dev-shm-usage "
        "--no-first-run --disable-background-networking --disable-component-update "
        "--disable-sync --hide-scrollbars --enable-logging=stderr --virtual-time-budget=5000"
    ).split()
    profile = f"--user-data-dir={folder / 'profile'}"
    command = [browser, *flags, profile, *words, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


def test_a_browser_runs_the_page_without_complaint_and_can_play_it(
    browser: str, made: tuple[Conversion, Path], tmp_path: Path
) -> None:
    conversion, path = made
    seen = look(browser, path, tmp_path, "--dump-dom")
    assert "CONSOLE" not in seen.stderr, seen.stderr
    seconds = [float(value) for value in re.findall(r'data-seconds="([^"]*)"', seen.stdout)]
    assert seconds == pytest.approx([conversion.num_samples / RATE] * 2, abs=0.001)
    assert seen.stdout.count('class="mute" hidden') == 2, "FLAC plays"
    assert "<title>hit" not in seen.stdout, "no name ran as a script"


@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (400, "dark")])
def test_a_browser_shows_the_picture(
    browser: str, made: tuple[Conversion, Path], tmp_path: Path, width: int, scheme: str
) -> None:
    words = [f"--window-size={width},1800", f"--screenshot={tmp_path / 'shot.png'}"]
    if scheme == "dark":
        words.append("--blink-settings=preferredColorScheme=0")
    look(browser, made[1], tmp_path, *words)
    with Image.open(tmp_path / "shot.png") as shot:
        assert shot.width == width, "nothing is wider than the window"
        pixels = np.asarray(shot.convert("RGB")).astype(int)
    paper = (0x14, 0x18, 0x1D) if scheme == "dark" else (0xFB, 0xFB, 0xFA)
    assert tuple(pixels[2, 2]) == paper
    red, green, blue = np.moveaxis(pixels, -1, 0)
    magma = (red > 150) & (green < 110) & (blue > 80) & (blue < 160)
    assert magma.sum() > 500, "the bright harmonics of the spectrograms"
