from __future__ import annotations

import json
import os
import unicodedata
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.songs.corpus import list_corpus


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
    ],
)
def test_a_faulty_manifest_names_the_line(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "m.csv").write_text(text)
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
    ],
)
def test_a_faulty_jsonl_row_names_the_line(tmp_path: Path, row: str, words: str) -> None:
    good = json.dumps({"path": "good.wav", "speaker": "ann"})
    (tmp_path / "m.jsonl").write_text(f"{good}\n{row}\n")
    with pytest.raises(UserError, match=r"m\.jsonl, line 2: .*" + words):
        list_corpus(tmp_path / "m.jsonl")


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
