from __future__ import annotations

import json
import os
import unicodedata
from pathlib import Path

import pytest
import soundfile
from av.format import ContainerFormat, formats_available

from pipeline.errors import UserError
from pipeline.songs.audio_suffixes import AUDIO_SUFFIXES
from pipeline.songs.corpus import list_corpus, named_as_planned, not_listed


def touch(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def ids(root: Path, **options: str) -> list[str]:
    return [song.song_id for song in list_corpus(root, **options).songs]


def test_the_first_folder_is_the_speaker_at_any_depth(tmp_path: Path) -> None:
    touch(tmp_path, "ann/a.wav", "ann/album/disc 1/b.flac", "bob/c.MP3", "bob/cover.jpg")
    corpus = list_corpus(tmp_path)
    assert [(s.song_id, s.speaker) for s in corpus.songs] == [
        ("ann/a.wav", "ann"),
        ("ann/album/disc 1/b.flac", "ann"),
        ("bob/c.MP3", "bob"),
    ]
    assert corpus.ignored == {".jpg": 1}


# Suffixes of FFmpeg's containers that have no sound, do not state the rate of their samples, or
# mostly name other files.
NOT_SONGS = frozenset(
    """
    264 265 266 adf al ans apv aqt art asc avc avif avs avs2 avs3 bit bitpacked cdata cdg cdxl cgi
    cif dat derf diz dtk evc fits flm frm gif h261 h264 h265 h266 h26l heic heif hevc ice ico idf
    idx ifv imx ipu ivf j2k jxl lrc lxf mcc mjpeg mjpg mks mpl2 mpo mxg nfo obu pdv pjs qcif rco rcv
    rgb rt sami sb sbg scc sga sga sln smi son srt ss2 stl str sub sup sw tco txd txt ty+ ub ul uw
    v v210 vb vc1 viv vt vtt vvc webvtt xl y4m yuv yuv10 ser
    """.split()
)


def test_every_container_that_is_read_has_its_suffixes_listed() -> None:
    known = {suffix.removeprefix(".") for suffix in AUDIO_SUFFIXES}
    named = set()
    for name in formats_available:
        try:
            named |= {suffix.lower() for suffix in ContainerFormat(name, "r").extensions}
        except ValueError:
            continue  # a container that is only written
    assert sorted(named - known - NOT_SONGS) == []
    written = {name.lower() for name in soundfile.available_formats()} - {"raw", "htk", "wavex"}
    assert sorted(written - known - {"mat4", "mat5", "mpc2k", "nist"}) == []
    named_by_users = {
        ".mka",
        ".weba",
        ".3gp",
        ".m4r",
        ".flv",
        ".mpg",
        ".ts",
        ".mp2",
        ".ogv",
        ".spx",
    }
    assert named_by_users <= AUDIO_SUFFIXES


def test_kinds_of_files_that_are_no_songs_are_all_named_or_counted(tmp_path: Path) -> None:
    kinds = [".txt", ".lab", ".json", ".TextGrid", ".mid", ".xml", ".zip", ".7z"]
    touch(tmp_path, "ann/song1.wav", "ann/song2.mka", "ann/README")
    touch(tmp_path, *(f"ann/{name}{kind}" for kind in kinds[:6] for name in ("x", "y")))
    touch(tmp_path, *(f"ann/x{kind}" for kind in kinds[6:]))
    assert ids(tmp_path) == ["ann/song1.wav", "ann/song2.mka"]
    (notice,) = not_listed(list_corpus(tmp_path))
    for kind in kinds:
        assert f"{kind.lower()} " in notice
    assert "(no suffix) 1" in notice
    touch(tmp_path, *(f"ann/x.{number}" for number in range(1000, 1030)))
    (notice,) = not_listed(list_corpus(tmp_path))
    assert notice.endswith(" and 19 more kinds (19 files)")


def test_folders_of_the_operating_system_are_no_speakers(tmp_path: Path) -> None:
    folders = ["$RECYCLE.BIN", "System Volume Information", "lost+found", "__MACOSX", "@eaDir"]
    touch(tmp_path, "ann/a.wav", "ann/@eaDir/a.wav/b.mp3", ".Trash-1000/files/d.wav")
    touch(tmp_path, *(f"{folder}/c.wav" for folder in folders))
    assert ids(tmp_path) == ["ann/a.wav"]
    (notice,) = not_listed(list_corpus(tmp_path))
    assert "$RECYCLE.BIN, @eaDir, System Volume Information and 3 more" in notice


def test_hidden_folders_and_files_belong_to_nobody(tmp_path: Path) -> None:
    touch(tmp_path, "ann/a.wav", "ann/._a.wav", ".ipynb_checkpoints/b.wav", "ann/.trash/c.wav")
    assert ids(tmp_path) == ["ann/a.wav"]


def test_a_file_in_the_root_names_the_fix(tmp_path: Path) -> None:
    touch(tmp_path, "ann/a.wav", "stray.wav")
    with pytest.raises(UserError, match=r"stray\.wav .*--speaker"):
        list_corpus(tmp_path)
    assert {s.speaker for s in list_corpus(tmp_path, speaker="zoe").songs} == {"zoe"}


def test_odd_names_are_kept(tmp_path: Path) -> None:
    names = ["ann/q'\"#? %20.wav", "ann/ spaces .wav", "ann/" + "x" * 240 + ".wav", "ann/歌.wav"]
    touch(tmp_path, *names)
    assert sorted(ids(tmp_path)) == sorted(names)


def test_names_are_nfc_and_collisions_name_both(tmp_path: Path) -> None:
    nfd = unicodedata.normalize("NFD", "café.wav")
    touch(tmp_path, f"ann/{nfd}")
    (song,) = list_corpus(tmp_path).songs
    assert song.song_id == "ann/café.wav"
    assert song.path == os.fsencode(f"ann/{nfd}")
    touch(tmp_path, "ann/café.wav")
    with pytest.raises(UserError, match="NFC"):
        list_corpus(tmp_path)


def test_bytes_that_are_not_utf8_keep_the_raw_path(tmp_path: Path) -> None:
    (tmp_path / "ann").mkdir()
    raw = os.fsencode(tmp_path / "ann") + b"/caf\xe9.wav"
    with open(raw, "wb"):
        pass
    (song,) = list_corpus(tmp_path).songs
    assert (song.song_id, song.path) == ("ann/caf\\xe9.wav", b"ann/caf\xe9.wav")


def test_link_loops_are_left_and_reported(tmp_path: Path) -> None:
    touch(tmp_path, "ann/a.wav", "elsewhere/b.wav")
    (tmp_path / "ann" / "up").symlink_to(tmp_path)
    (tmp_path / "ann" / "self").symlink_to(tmp_path / "ann" / "self")
    (tmp_path / "ann" / "other").symlink_to(tmp_path / "elsewhere")
    corpus = list_corpus(tmp_path)
    found = [s.song_id for s in corpus.songs]
    assert found == ["ann/a.wav", "ann/other/b.wav", "elsewhere/b.wav"]
    assert set(corpus.loops) == {"ann/up", "ann/self"}


def test_a_dangling_link_is_planned_so_that_it_can_be_quarantined(tmp_path: Path) -> None:
    touch(tmp_path, "ann/a.wav")
    (tmp_path / "ann" / "b.wav").symlink_to(tmp_path / "nowhere.wav")
    assert ids(tmp_path) == ["ann/a.wav", "ann/b.wav"]


def test_an_empty_or_absent_corpus_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no audio files"):
        list_corpus(tmp_path)
    with pytest.raises(UserError, match="no corpus at"):
        list_corpus(tmp_path / "nowhere")


def test_manifests_in_csv_and_jsonl_agree(tmp_path: Path) -> None:
    touch(tmp_path, "x/a.wav", "b.wav")
    rows = [
        {"path": "x/a.wav", "speaker": "ann", "split": "validation"},
        {"path": "b.wav", "speaker": "bob"},
        {"path": "gone.wav", "speaker": "bob", "split": ""},
    ]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    (tmp_path / "m.csv").write_text(
        "\ufeffpath,speaker,split\nx/a.wav,ann,validation\nb.wav,bob,\ngone.wav,bob,\n"
    )
    one, other = list_corpus(tmp_path / "m.csv"), list_corpus(tmp_path / "m.jsonl")
    assert one.songs == other.songs
    assert [(s.song_id, s.speaker, s.split) for s in one.songs] == [
        ("b.wav", "bob", "train"),
        ("gone.wav", "bob", "train"),
        ("x/a.wav", "ann", "validation"),
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("file,who\na.wav,ann\n", "path, speaker"),
        ("path,speaker\n,ann\n", "line 2: 'path'"),
        ("path,speaker\na.wav,\n", "line 2: 'speaker'"),
        ("path,speaker,split\na.wav,ann,a/b\n", "line 2: split"),
        ("path,speaker\na.wav,ann\na.wav,bob\n", "line 3: a.wav was named in line 2"),
        ("path,speaker\na\0.wav,ann\n", "line 2: 'path' has a NUL"),
        ("path,speaker\na.wav,a\0nn\n", "line 2: 'speaker' has a NUL"),
        ('path,speaker\na.wav,ann\n\n"b.wav,bob\nc.wav,bob\n', "line 4: .*quote"),
        ("path,speaker\na.wav," + "x" * 200_000 + "\n", "line 2: field larger"),
        ('path,"speaker\na.wav,ann\n', "line 1: .*quote"),
        ("path,speaker\n\n\na.wav,\n", "line 4: 'speaker'"),
        ("", "path, speaker"),
        ("path,speaker\na.wav,Smith, John\n", "line 2, column 3: 3 cells, but the header has 2"),
        ("path;speaker\na.wav;ann;x\n", "line 2, column 3: 3 cells.* ';'"),
        ("path,speaker,speaker\na.wav,ann,bob\n", "line 1, column 3: 'speaker' is also column 2"),
        ("path,speaker, Speaker\na.wav,ann,bob\n", "line 1, column 3: 'speaker' is also"),
        ("path,,speaker\na.wav,x,ann\n", "line 1, column 2: it has no name"),
        ("path,speaker,\na.wav,ann,\n", "line 1, column 3: it has no name"),
        ("path,speaker\n./a.wav,ann\na.wav,ann\n", "line 3: a.wav was named in line 2"),
        ("path,speaker\na.wav,ann\nb/../a.wav,ann\n", "line 3: b/../a.wav was named in line 2"),
        ("path,speaker\na.wav,ann\n{root}/a.wav,ann\n", "line 3: .*/a.wav was named in line 2"),
        ("path,speaker\na//b.wav,ann\na/./b.wav,ann\n", "line 3: a/./b.wav was named in line 2"),
        ("path,speaker\n./,ann\n", "line 2: ./ is a folder"),
    ],
)
def test_a_faulty_manifest_names_the_line(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "m.csv").write_text(text.replace("{root}", str(tmp_path)))
    with pytest.raises(UserError, match=words):
        list_corpus(tmp_path / "m.csv")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (r'{"path": "a.wav", "speaker": 3}', "'speaker' must be text, not 3"),
        (r'{"path": ["a.wav"], "speaker": "ann"}', "'path' must be text"),
        (r'{"path": "a.wav", "speaker": "ann", "split": 0}', "'split' must be text"),
        (r'{"path": "a\u0000.wav", "speaker": "ann"}', "'path' has a NUL"),
        (r'{"path": "\ud800.wav", "speaker": "ann"}', "'path' has a lone surrogate"),
        (r'{"path": "a.wav", "speaker": "\udcff"}', "'speaker' has a lone surrogate"),
        ('{"path": ' + "1" * 5000 + "}", "digits"),
        ("[]", "not a JSON object"),
        ("[" * 100_000, "nested too deeply"),
        ('{"path": "a.wav", "speaker": "ann", " path": "b.wav"}', "column 3: 'path' is also"),
    ],
)
def test_a_faulty_jsonl_row_names_the_line(tmp_path: Path, row: str, words: str) -> None:
    good = json.dumps({"path": "good.wav", "speaker": "ann"})
    (tmp_path / "m.jsonl").write_text(f"{good}\n{row}\n")
    with pytest.raises(UserError, match=r"m\.jsonl, line 2[:,].*" + words):
        list_corpus(tmp_path / "m.jsonl")


@pytest.mark.parametrize(
    "text",
    [
        "path,speaker,split\na.wav,ann,validation\nb.wav,bob\n",
        " Path , SPEAKER ,split\na.wav, ann, validation\nb.wav,bob,\n",
        "\ufeffpath;speaker;split\r\na.wav;ann;validation\r\nb.wav;bob;\r\n",
        '"path"\t"speaker"\t"split"\na.wav\tann\tvalidation\nb.wav\tbob\t\n',
        "speaker,note,split,path\nann,x,validation,./a.wav\nbob,y,,c/../b.wav\n",
    ],
)
def test_manifests_of_spreadsheets_are_read(tmp_path: Path, text: str) -> None:
    (tmp_path / "m.csv").write_text(text)
    assert [(s.song_id, s.speaker, s.split) for s in list_corpus(tmp_path / "m.csv").songs] == [
        ("a.wav", "ann", "validation"),
        ("b.wav", "bob", "train"),
    ]


def test_songs_keep_the_ids_of_a_plan_that_spelled_them_otherwise(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("path,speaker\na.wav,ann\nb.wav,ann\n")
    corpus = named_as_planned(list_corpus(tmp_path / "m.csv"), ["./a.wav", "gone.wav"])
    assert [song.song_id for song in corpus.songs] == ["./a.wav", "b.wav"]


def test_quoted_fields_may_span_lines(tmp_path: Path) -> None:
    touch(tmp_path, "a, b.wav")
    (tmp_path / "m.csv").write_text('path,speaker\n"a, b.wav","an""n"\n"c\nd.wav",bob\n,x\n')
    with pytest.raises(UserError, match="line 5: 'path'"):
        list_corpus(tmp_path / "m.csv")


def test_a_folder_that_cannot_be_listed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path, "ann/a.wav", "bob/locked/b.wav")
    scandir = os.scandir

    def refuse(folder: bytes) -> os._ScandirIterator[bytes]:  # root may list everything
        if folder.endswith(b"locked"):
            raise PermissionError(13, "Permission denied", folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=f"{tmp_path}/bob/locked: Permission denied"):
        list_corpus(tmp_path)


def test_the_speaker_given_for_all_is_stripped_and_normalised(tmp_path: Path) -> None:
    touch(tmp_path, "a.wav")
    (tmp_path / "m.csv").write_text("path\na.wav\n")
    nfd = unicodedata.normalize("NFD", "Zoé")
    for path in (tmp_path, tmp_path / "m.csv"):
        assert [song.speaker for song in list_corpus(path, f" {nfd}\t").songs] == ["Zoé"]
        for empty in ("", "  "):
            with pytest.raises(UserError, match="--speaker is empty"):
                list_corpus(path, empty)
        with pytest.raises(UserError, match="--speaker has a lone surrogate"):
            list_corpus(path, "\udcff")
