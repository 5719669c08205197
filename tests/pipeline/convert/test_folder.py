"""A folder of songs in another voice: each once, whatever happens meanwhile."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import soundfile as sf
from rich.console import Console

import pipeline.convert.folder
from models.synthesizer.onnx import export_voice
from models.synthesizer.voice import load_voice
from pipeline.cluster.environment import environment
from pipeline.cluster.ray_graph import plan_pools
from pipeline.cluster.task_rows import task_row
from pipeline.convert.command import read_request
from pipeline.convert.folder import BatchOptions, BatchOutcome, convert_folder
from pipeline.convert.ledger import output_names
from pipeline.convert.operators import (
    ConvertJob,
    ConvertTask,
    conversion,
    load_request,
    probe_conversion,
)
from pipeline.convert.summary import folder_summary
from pipeline.errors import StorageFault, UserError
from pipeline.reports.command_summary import show_summary
from pipeline.songs.plan import PlannedSong, Task, load_plan
from pipeline.storage.weight_files import WeightFile
from tests.helpers.songs import tune
from tests.helpers.voices import write_overflowing_voice, write_small_voice
from tests.pipeline.extract.test_kills import kill_everything, start_command

RATE = 16000
Convert = Callable[..., BatchOutcome]

# Shadows the real pyworld and never comes back from its fifth call, one a song.
STOPPING_PYWORLD = """
import os, sys, time

sys.path.remove(os.path.dirname(__file__))
del sys.modules["pyworld"]
import pyworld

stonemask = pyworld.stonemask
calls = 0

def stop(*args):
    global calls
    calls += 1
    if calls == 5:
        time.sleep(600)
    return stonemask(*args)

pyworld.stonemask = stop
"""


@pytest.fixture(scope="module")
def voice(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_voice(tmp_path_factory.mktemp("voice"))


@pytest.fixture(scope="module")
def convert(voice: Path) -> Convert:
    def run(songs: Path, out: Path, *settings: str, **options: Any) -> BatchOutcome:
        request = read_request(voice, ["voice.speaker=ann", *settings])
        options = {"local": True, **options}
        console = Console(file=io.StringIO())
        return convert_folder(request, songs, out, BatchOptions(**options), console)

    return run


def write_song(path: Path, number: int = 0, seconds: float = 1.0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    sf.write(path, tune(seconds, RATE, 200.0 + 20 * number, seed=number), RATE)
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, convert: Convert) -> Path:
    """`songs`, among them two of no use, and `out`, converted; not to be written to."""
    folder = tmp_path_factory.mktemp("made")
    for number, name in enumerate(("one.wav", "one.flac", "b/two.wav", "b/c/three.wav")):
        write_song(folder / "songs" / name, number, 1.0 + 0.1 * number)
    (folder / "songs" / "empty.wav").write_bytes(b"")
    (folder / "songs" / "b" / "corrupt.flac").write_bytes(b"no song at all " * 99)
    (folder / "songs" / "words.txt").write_text("la la la")
    outcome = convert(folder / "songs", folder / "out")
    assert outcome.account.problems == []
    return folder


@pytest.fixture
def own(made: Path, tmp_path: Path) -> Path:
    """A copy of `made` to be written to."""
    return Path(shutil.copytree(made, tmp_path / "own"))


def hashes(out: Path) -> dict[str, str]:
    """SHA-256 of every converted song."""
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.rglob("*.wav"))
    }


def test_every_song_is_converted_or_has_a_reason(made: Path, convert: Convert) -> None:
    outcome = convert(made / "songs", made / "out")
    entries = outcome.account.entries
    assert {song: (entry.status, entry.reason) for song, entry in entries.items()} == {
        "one.wav": ("converted", None),
        "one.flac": ("converted", None),
        "b/two.wav": ("converted", None),
        "b/c/three.wav": ("converted", None),
        "empty.wav": ("quarantined", "empty_file"),
        "b/corrupt.flac": ("quarantined", "unreadable"),
    }
    for song, entry in entries.items():
        if entry.status == "converted":
            assert (
                sf.info(made / "out" / entry.output).frames == sf.info(made / "songs" / song).frames
            )
            assert entry.output_bytes == (made / "out" / entry.output).stat().st_size
    assert outcome.work.tasks_run == 0
    numbers = folder_summary(outcome, made / "out").figures
    assert (numbers["songs"], numbers["converted"]) == (6, 4)
    assert numbers["quarantined"] == {"empty_file": 1, "unreadable": 1}
    assert any(".txt" in notice for notice in numbers["notices"])
    written = io.StringIO()
    show_summary(Console(file=written, width=200), folder_summary(outcome, made / "out"))
    assert "1 quarantined: empty_file" in written.getvalue()
    assert "b/corrupt.flac: unreadable" in written.getvalue()


def test_a_voice_whose_output_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    """It is no fault of the song, which is left to a better voice."""
    voice = write_overflowing_voice(tmp_path / "voice")
    write_song(tmp_path / "songs" / "one.wav")
    request = read_request(voice, ["voice.speaker=ann", "output.subtype=FLOAT"])
    console, options = Console(file=io.StringIO()), BatchOptions(local=True)
    with pytest.raises(UserError, match=r"one\.wav: the voice's output is not finite"):
        convert_folder(request, tmp_path / "songs", tmp_path / "out", options, console)
    assert not [*(tmp_path / "out").rglob("*.wav"), *(tmp_path / "out").rglob("ledger/*")]


def test_what_was_converted_can_be_told(made: Path) -> None:
    info = json.loads((made / "out" / "convert.json").read_text())
    sha256 = hashlib.sha256(Path(info["voice"]).read_bytes()).hexdigest()
    assert info["voice_sha256"] == info["settings"]["voice.checkpoint_sha256"] == sha256
    assert info["settings"]["voice.speaker"] == "ann"
    assert not any(key.startswith("workers.") for key in info["settings"])


def test_songs_have_names_of_their_own_that_stay() -> None:
    def task(index: int, song: str) -> Task:
        return Task(index, "train", (PlannedSong(song, "ann", b"", 1, 1, 1.0),))

    def names(*songs: str) -> list[str]:
        return list(output_names(dict(enumerate(map(task, range(99), songs))), ".wav").values())

    songs = ["a/x.wav", "a/x.flac", "a/x.flac.mp3", "../x.ogg", "x.ogg", "x.ogg.wav", ".tmp/y.wav"]
    given = names(*songs)
    assert given == [
        "a/x.wav",
        "a/x.flac.wav",
        "a/x.flac.mp3.wav",
        "x.wav",
        "x.ogg.wav",
        "x.ogg.wav.wav",
        "tmp/y.wav",
    ]
    assert names(*songs, "a/x.mp3")[:-1] == given
    assert names("a.wav", "a.wav/b.wav", "c.wav/d.mp3", "c.mp3") == [
        "a.wav",
        "a.wav_b.wav",
        "c.wav/d.wav",
        "c.mp3.wav",
    ]
    (long,) = names("n" * 250 + ".wav")
    assert len(long) < 240


def test_the_same_command_makes_what_is_lost_or_new_or_changed(own: Path, convert: Convert) -> None:
    songs, out = own / "songs", own / "out"
    before = hashes(out)
    (out / "one.wav").unlink()
    with (out / "b" / "two.wav").open("r+b") as file:
        file.truncate(1000)
    (out / "ledger" / "00000.json").write_text("{")
    for half in (".0a1b2c3d0a1b2c3d.wav", ".one.html.0a1b2c3d"):
        (out / half).write_bytes(b"half a song")
    write_song(songs / "new.wav", 7)
    write_song(songs / "empty.wav", 8)
    outcome = convert(songs, out)
    assert outcome.account.problems == []
    assert outcome.work.tasks_run == 5
    assert {path.name for path in out.glob(".*")} == {".lock", ".tmp"}
    after = hashes(out)
    assert {name: after[name] for name in before} == before
    assert after.keys() - before.keys() == {"new.wav", "empty.wav"}
    assert outcome.account.entries["empty.wav"].status == "converted"
    assert any("one.wav" in notice and "two.wav" in notice for notice in outcome.notices)


def test_a_song_that_has_become_unreadable_leaves_no_output_of_before(
    own: Path, convert: Convert
) -> None:
    (own / "songs" / "b" / "two.wav").write_bytes(b"")
    (own / "out" / "b" / "two.html").write_text("its page")
    outcome = convert(own / "songs", own / "out")
    assert outcome.account.entries["b/two.wav"].reason == "empty_file"
    assert outcome.account.problems == []
    assert not list((own / "out" / "b").glob("two.*"))


def test_what_is_gone_stays_converted_and_the_quarantined_are_tried_when_asked(
    own: Path, convert: Convert
) -> None:
    (own / "songs" / "one.wav").unlink()
    outcome = convert(own / "songs", own / "out", retry_quarantined=True)
    assert outcome.work.tasks_run == 2
    assert outcome.account.entries["one.wav"].status == "converted"
    assert outcome.account.problems == []
    assert any("one.wav" in notice for notice in outcome.notices)


def test_other_settings_and_another_voice_are_refused_by_name(
    own: Path, tmp_path: Path, convert: Convert
) -> None:
    before = hashes(own / "out")
    with pytest.raises(UserError, match=r"voice\.seed was 0 and is 1"):
        convert(own / "songs", own / "out", "voice.seed=1")
    with pytest.raises(UserError, match=r"encoder\.dtype was float32 and is float16"):
        convert(own / "songs", own / "out", "encoder.dtype=float16")
    of_no_effect = ("workers.max_workers=1", "pitch.transpose=0.0", "units.protect=0.1")
    assert convert(own / "songs", own / "out", *of_no_effect).work.tasks_run == 0
    other = read_request(write_small_voice(tmp_path / "other", seed=1), ["voice.speaker=ann"])
    with pytest.raises(UserError, match=r"voice\.checkpoint_sha256 was"):
        convert_folder(other, own / "songs", own / "out", BatchOptions(local=True), Console())
    assert hashes(own / "out") == before


def test_a_resume_on_another_machine_is_remarked_on(
    own: Path, convert: Convert, monkeypatch: pytest.MonkeyPatch
) -> None:
    (own / "out" / "one.wav").unlink()
    monkeypatch.setattr("platform.machine", lambda: "abacus")
    environment.cache_clear()
    outcome = convert(own / "songs", own / "out")
    environment.cache_clear()
    assert any("machine abacus and" in notice for notice in outcome.notices)


def test_files_count_by_their_content_wherever_they_lie(
    voice: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(mix: str) -> BatchOutcome:
        request = read_request(voice, [f"voice.mix={mix}"])
        options = BatchOptions(local=True)
        return convert_folder(
            request, tmp_path / "songs", tmp_path / "out", options, Console(file=io.StringIO())
        )

    write_song(tmp_path / "songs" / "a.wav")
    (tmp_path / "mix.csv").write_text("time_s,ann,ben\n0,1,0\n1,0,1\n")
    monkeypatch.chdir(tmp_path)
    assert run("mix.csv").account.count("converted") == 1
    shutil.copy("mix.csv", "again.csv")
    assert run("again.csv").work.tasks_run == 0
    Path("mix.csv").write_text("time_s,ann,ben\n0,0,1\n")
    with pytest.raises(UserError, match=r"voice\.mix_sha256 was"):
        run("mix.csv")


@pytest.mark.slow
def test_the_licence_of_an_exported_voice_may_be_edited(voice: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")

    def run() -> BatchOutcome:
        request = read_request(tmp_path / "graph", ["voice.speaker=ann"])
        options = BatchOptions(local=True)
        return convert_folder(
            request, tmp_path / "songs", tmp_path / "out", options, Console(file=io.StringIO())
        )

    write_song(tmp_path / "songs" / "a.wav")
    export_voice(tmp_path / "graph", load_voice(voice))
    assert run().account.count("converted") == 1
    description = tmp_path / "graph" / "voice.json"
    said = json.loads(description.read_text())
    description.write_text(json.dumps(said | {"licence": "CC0"}))
    assert run().work.tasks_run == 0
    (record,) = (tmp_path / "out" / "ledger").glob("*.json")
    assert "onnxruntime" in json.loads(record.read_text())["environment"]


def test_folders_that_would_eat_each_other_are_refused(
    made: Path, tmp_path: Path, convert: Convert
) -> None:
    songs = tmp_path / "songs"
    write_song(songs / "a.wav")
    with pytest.raises(UserError, match="is inside the input folder"):
        convert(songs, songs / "out")
    with pytest.raises(UserError, match="is an input song"):
        convert(_manifest(tmp_path / "list.csv", ["songs/a.wav"]), tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.wav").write_bytes(b"my own")
    with pytest.raises(UserError, match=r"has a file a\.wav, which would be overwritten"):
        convert(songs, tmp_path / "mine")
    (tmp_path / "odd" / "plan").mkdir(parents=True)
    with pytest.raises(UserError, match="name another folder"):
        convert(songs, tmp_path / "odd")
    with pytest.raises(UserError, match=r"no audio files in .*put them at .*odd/song\.wav"):
        convert(tmp_path / "odd", tmp_path / "out")
    with pytest.raises(UserError, match="FLAC has no floats"):
        convert(songs, tmp_path / "out", "output.format=flac", "output.subtype=FLOAT")
    assert (tmp_path / "mine" / "a.wav").read_bytes() == b"my own"


def _manifest(path: Path, songs: list[str]) -> Path:
    path.write_text("\n".join(["path", *songs]) + "\n")
    return path


def test_a_manifest_names_songs_anywhere(tmp_path: Path, convert: Convert) -> None:
    here = write_song(tmp_path / "far away" / "a.wav")
    write_song(tmp_path / "elsewhere" / "a.wav")
    songs = [str(here), "elsewhere/a.wav", "elsewhere/gone.wav"]
    manifest = _manifest(tmp_path / "list.csv", songs)
    outcome = convert(manifest, tmp_path / "out")
    assert outcome.account.problems == []
    assert outcome.account.count("converted") == 2
    assert outcome.account.entries["elsewhere/gone.wav"].reason == "missing"
    names = {entry.output for entry in outcome.account.entries.values()}
    assert names >= {"elsewhere/a.wav", str(here).lstrip("/")}


@pytest.mark.slow
def test_a_report_lies_beside_each_song(tmp_path: Path, convert: Convert) -> None:
    write_song(tmp_path / "songs" / "a.wav")
    outcome = convert(tmp_path / "songs", tmp_path / "out", report=True)
    assert outcome.account.problems == []
    assert "<audio" in (tmp_path / "out" / "a.html").read_text()


def test_a_mount_that_vanishes_during_the_run_quarantines_nobody(
    tmp_path: Path, convert: Convert, monkeypatch: pytest.MonkeyPatch
) -> None:
    songs = tmp_path / "songs"
    write_song(songs / "a.wav")
    monkeypatch.setattr("pipeline.cluster.run_tasks._STORAGE_WAITS_S", (0.0, 0.0, 0.0))
    run_tasks = pipeline.convert.folder.run_tasks

    def without_the_folder(*arguments: Any) -> None:
        songs.rename(tmp_path / "away")
        songs.mkdir()
        run_tasks(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.convert.folder.run_tasks", without_the_folder)
        with pytest.raises(StorageFault, match="still mounted"):
            convert(songs, tmp_path / "out")
    songs.rmdir()
    (tmp_path / "away").rename(songs)
    assert convert(songs, tmp_path / "out").account.count("converted") == 1


def job_of(out: Path, songs: Path, voice: Path, *settings: str) -> ConvertJob:
    request = read_request(voice, ["voice.speaker=ann", *settings])
    encoder = request.voice.encoder
    return ConvertJob(
        out, songs, request.config, "x", {}, checkpoint=request.checkpoint, encoder=encoder
    )


def test_a_song_that_kills_its_worker_is_quarantined_and_probing_writes_nothing(
    own: Path, voice: Path
) -> None:
    job = job_of(own / "out", own / "songs", voice)
    tasks = load_plan(job.folder)
    index = next(i for i, task in tasks.items() if task.songs[0].song_id == "one.wav")
    before = hashes(job.folder)
    probe_conversion(job, index, "one.wav")
    assert hashes(job.folder) == before
    worker = ConvertTask(job, lambda *_: None)
    try:
        entry = worker.convert(tasks[index], job.folder, crashed=True)
    finally:
        worker.close()
    assert (entry.status, entry.reason) == ("quarantined", "crashed")


def test_workers_know_of_the_encoder_what_the_driver_found_out(own: Path, voice: Path) -> None:
    job = job_of(own / "out", own / "songs", voice)
    known = replace(job.encoder, checkpoint_sha256="0" * 64)
    assert load_request(replace(job, encoder=known)).voice.encoder == known


def test_pieces_are_told_of_while_a_song_is_converted(own: Path, voice: Path) -> None:
    import pyarrow as pa

    told: list[tuple[str, float, str | None]] = []
    worker = ConvertTask(
        job_of(own / "out", own / "songs", voice), lambda *words: told.append(words)
    )
    worker(pa.Table.from_pylist([task_row(0)]))
    worker.close()
    (song,) = worker.tasks[0].songs
    assert told[-1] == (song.song_id, song.duration_s, "converted")
    assert told[0][2] is None and 0 < told[0][1] <= song.duration_s


def test_workers_share_gpus_where_there_are_any(made: Path, voice: Path) -> None:
    tasks = load_plan(made / "out")
    job = job_of(made / "out", made / "songs", voice)
    weights = {"voice.checkpoint": WeightFile("v", "", 2**30, 0)}
    job = replace(job, weights=weights)
    node = {"CPU": 8.0, "memory": 64.0 * 2**30, "GPU": 2.0}
    pools = plan_pools([node], tasks, conversion(job))
    assert (pools.cpu, pools.gpu) == (0, 2)
    pools = plan_pools([node | {"GPU": 0.0}], tasks, conversion(job))
    assert (pools.cpu, pools.gpu) == (6, 0)
    on_cpu = job_of(made / "out", made / "songs", voice, "compute.device=cpu")
    assert plan_pools([node], tasks, conversion(on_cpu)).gpu == 0


def test_a_worker_has_memory_for_all_files_that_it_reads(made: Path, voice: Path) -> None:
    job = job_of(made / "out", made / "songs", voice)
    index = {"units.index": WeightFile("i", "", 2**30, 0)}
    with_index = conversion(replace(job, weights=index)).needs.models_gb
    assert with_index - conversion(job).needs.models_gb >= 1


@pytest.mark.ray
def test_a_killed_run_goes_on_to_the_same_bytes(
    tmp_path: Path, voice: Path, convert: Convert
) -> None:
    """Killed within a song, in one process, which stays in its fifth until then; the same command
    goes on, on Ray.
    """
    songs, out = tmp_path / "songs", tmp_path / "out"
    for number in range(10):
        write_song(songs / f"{number}.wav", number, 1.0)
    (songs / "empty.wav").write_bytes(b"")
    convert(songs, tmp_path / "whole")
    (tmp_path / "slow").mkdir()
    (tmp_path / "slow" / "pyworld.py").write_text(STOPPING_PYWORLD)
    command = ["convert", voice, songs, out, "--speaker", "ann", "--json", tmp_path / "done.json"]
    command.append("workers.max_workers=1")
    run = start_command(*command, "--local", PYTHONPATH=str(tmp_path / "slow"))
    while len(list(out.glob("ledger/*.json"))) < 4:
        assert run.poll() is None, run.communicate()[0]
        time.sleep(0.01)
    kill_everything(run)
    run.communicate(timeout=60)
    assert len(list(out.glob("ledger/*.json"))) == 4
    run = start_command(*command)
    output, _ = run.communicate(timeout=120)
    assert run.returncode == 0, output
    assert hashes(out) == hashes(tmp_path / "whole")
    numbers = json.loads((tmp_path / "done.json").read_text())
    assert (numbers["converted"], numbers["quarantined"]) == (10, {"empty_file": 1})
    assert {path.name for path in out.glob(".*")} == {".lock", ".tmp"}
