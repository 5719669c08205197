"""`voice.mix`: weights in words, and files of weights over time as spreadsheets write them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.convert.speaker_mix import SpeakerMix, read_mix
from pipeline.errors import UserError

VOICE = ("ann", "ben", "Zoë B.")
PLAIN = b"time_s,ann,ben\n1,1,0\n2,0,1\n4,1,1\n"


def written(tmp_path: Path, content: bytes) -> SpeakerMix:
    path = tmp_path / "mix.csv"
    path.write_bytes(content)
    return read_mix(str(path), VOICE)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ann=0.7,ben=0.3", [0.7, 0.3, 0]),
        (" ben = 3 , ann=1", [0.25, 0.75, 0]),
        ("Zoë B.=2", [0, 0, 1]),
        ("ann=1e308,ben=1e308", [0.5, 0.5, 0]),
        ("ann=1,ben=0", [1, 0, 0]),
    ],
)
def test_constant_weights_sum_to_1(text: str, expected: list[float]) -> None:
    weights = read_mix(text, VOICE).weights(100, 7, 86.1)
    assert weights.dtype == np.float32
    assert np.allclose(weights, expected)


def test_rows_of_the_embedding_that_nobody_has_get_nothing() -> None:
    assert read_mix("ben=1", VOICE, rows=5).weights(0, 1, 50).tolist() == [0, 1, 0, 0, 0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ann=1,eve=1", "'eve' is not a speaker of this voice; it has ann, ben, Zoë B."),
        ("ann=1,ann=2", "names 'ann' more than once"),
        ("ann=1,ben=-0.5", "a weight is -0.5; it must be 0 or more"),
        ("ann=0,ben=0", "all weights are 0"),
        ("ann=much", "ann is 'much'; it must be a number"),
        ("ann=nan", "ann is 'nan'; it must be a number"),
        ("ann=inf", "ann is 'inf'; it must be a number"),
        ("ann=", "ann is ''; it must be a number"),
        ("ann=1,ben", "'ben' in 'ann=1,ben' has no weight"),
        ("ann=1,", "'' in 'ann=1,' has no weight"),
        ("=1", "'' is not a speaker"),
        ("ann", "the file 'ann' does not exist; write ann=0.7,ben=0.3, or the path of a CSV"),
        ("a=b/none.csv", "the file 'a=b/none.csv' does not exist"),
    ],
)
def test_words_that_are_no_mix_are_refused(text: str, words: str) -> None:
    with pytest.raises(UserError) as refused:
        read_mix(text, VOICE)
    assert words in str(refused.value) and "voice.mix" in str(refused.value)


def test_weights_are_linear_between_rows_and_held_beyond_them(tmp_path: Path) -> None:
    weights = written(tmp_path, PLAIN).weights(0, 11, 2)
    assert weights.dtype == np.float32
    ann = [1, 1, 1, 0.5, 0, 0.125, 0.25, 0.375, 0.5, 0.5, 0.5]
    assert np.allclose(weights[:, 0], ann)
    assert np.allclose(weights.sum(axis=1), 1) and not weights[:, 2].any()


def test_pieces_have_the_weights_of_the_whole(tmp_path: Path) -> None:
    mix = written(tmp_path, PLAIN)
    whole = mix.weights(0, 500, 44100 / 512)
    parts = [mix.weights(start, 100, 44100 / 512) for start in range(0, 500, 100)]
    assert np.array_equal(np.concatenate(parts), whole)
    assert mix.weights(20, 0, 50).shape == (0, 3)


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf" + PLAIN,
        PLAIN.replace(b"\n", b"\r\n"),
        PLAIN.replace(b",", b";"),
        PLAIN.replace(b",", b"\t"),
        PLAIN.replace(b"\n", b"\n\n") + b",,\n  \n",
        PLAIN.rstrip(),
        b'"time_s","ben","ann"\r\n1.0, 0 ,9\r\n2,5e-1,0\r\n"4",0.3,0.3\r\n',
        b"time_s;ann;ben\r\n1,0;0,5;0\r\n2,0;0;0,5\r\n4,0;0,1;0,1\r\n",
    ],
    ids=["bom", "crlf", "semicolons", "tabs", "empty lines", "no end", "quotes", "decimal commas"],
)
def test_what_spreadsheets_write_means_the_same(tmp_path: Path, content: bytes) -> None:
    expected = written(tmp_path, PLAIN).weights(0, 50, 10)
    assert np.allclose(written(tmp_path, content).weights(0, 50, 10), expected)


def test_names_with_separators_are_quoted(tmp_path: Path) -> None:
    path = tmp_path / "mix.CSV"
    path.write_text('time_s,"a, b;c"\n0,1\n')
    assert read_mix(str(path), ["x", "a, b;c"]).weights(0, 1, 50).tolist() == [[0, 1]]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            b"time_s,ann,eve\n0,1,1\n",
            "line 1: 'eve' is not a speaker of this voice; it has ann, ben",
        ),
        (b"time_s,ann,ann\n0,1,1\n", "line 1 names 'ann' more than once"),
        (b"time_s,ann,\n0,1,1\n", "line 1: '' is not a speaker"),
        (b"time_s,\n0,1\n", "line 1: '' is not a speaker"),
        (b"time,ann\n0,1\n", "line 1: the header must begin with time_s"),
        (b"0,1,0\n1,1,0\n", "line 1: the header must begin with time_s"),
        (b"", "line 1: the header must begin with time_s"),
        (b"time_s\n0\n", "line 1 names no speaker; this voice has ann"),
        (b"time_s,ann\n\n", "has no rows below its header"),
        (b"time_s,ann,ben\n0,1,0\n\n1,1\n", "line 4 has 2 cells, but the header has 3"),
        (b"time_s,ann,ben\n0,1,0\n1,1,0,\n", "line 3 has 4 cells"),
        (b"time_s,ann,ben\n0,1,0\n1,0.5,0,5\n", "line 3 has 4 cells"),
        (
            b"time_s,ann,ben\n1,1,0\n1.0,0,1\n",
            "line 3: time_s is 1.0 after 1; times must be ascending",
        ),
        (b"time_s,ann,ben\n2,1,0\n1,0,1\n", "line 3: time_s is 1 after 2"),
        (b"time_s,ann,ben\n0:30,1,0\n", "line 2: time_s is '0:30'; it must be a number"),
        (b"time_s,ann,ben\n0,nan,0\n", "line 2: ann is 'nan'"),
        (b"time_s,ann,ben\n0,1,\n", "line 2: ben is ''"),
        (b"time_s,ann,ben\n0,1,-1\n", "line 2: a weight is -1"),
        (b"time_s,ann,ben\n0,1,0\n1,0,0\n", "line 3: all weights are 0"),
        (b'time_s,ann\n0,"1\n', "is not valid CSV"),
        (PLAIN.decode().encode("utf-16"), "is not UTF-8; save it as 'CSV UTF-8'"),
    ],
)
def test_files_that_are_no_mix_are_refused(tmp_path: Path, content: bytes, words: str) -> None:
    with pytest.raises(UserError) as refused:
        written(tmp_path, content)
    assert words in str(refused.value) and "mix.csv" in str(refused.value)


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a folder"):
        read_mix(str(tmp_path), VOICE)
