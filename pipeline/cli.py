"""The command line. Faults are one sentence; heavy libraries load after parsing."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

# Each worker process sets its own threads; without this every library would start one per core.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import typer
import typer.core

from pipeline.cluster.stop_signals import interrupt_at_stop_signal
from pipeline.errors import Interrupted, SongBug, StorageFault, UserError, printable
from pipeline.reports.command_summary import Summary, show_summary
from pipeline.reports.standard_streams import keep_running_without_readers
from pipeline.reports.terminal import TerminalConsole
from pipeline.storage.uri import refuse_uri
from pipeline.tools.old_flags import translate_old_flags

T = TypeVar("T")


class _Commands(typer.core.TyperGroup):
    """All commands. Each takes the flags of earlier versions, which its help does not show."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name, command, words = super().resolve_command(ctx, args)
        # Help keeps line breaks, which would split paragraphs at odd places in narrow terminals.
        if command is not None and command.help is not None:
            command.help = re.sub(r"(?<!\n)\n(?!\n)", " ", command.help)
        _refuse_uris(words)
        return name, command, translate_old_flags(name or "", words)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:  # Typer would end without a message
            raise Interrupted from error


app = typer.Typer(
    name="cantor",
    cls=_Commands,
    help="Turn singing corpora into datasets, train voices on them, and convert songs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

# Arguments and options that several commands have.
Dataset = Annotated[
    str, typer.Argument(metavar="DATASET", help="Dataset folder.", show_default=False)
]
Checkpoint = Annotated[
    str,
    typer.Argument(
        metavar="CHECKPOINT",
        help="Voice: its folder, a training run, or a G_*.pth.",
        show_default=False,
    ),
]
OutFolder = Annotated[
    str, typer.Argument(metavar="OUT", help="Folder to write.", show_default=False)
]
OutFile = Annotated[
    str, typer.Argument(metavar="OUT", help="File to write, .safetensors.", show_default=False)
]
Settings = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Settings, as section.key=value."),
]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="YAML file of settings.")]
PrintConfig = Annotated[
    bool, typer.Option("--print-config", help="Print all settings with their values and stop.")
]
RayAddress = Annotated[
    str | None, typer.Option(help="Ray cluster: HOST:PORT or auto. Default: this machine.")
]
Local = Annotated[
    bool, typer.Option("--local", help="Run in this process without Ray, for debugging.")
]
RetryQuarantined = Annotated[
    bool, typer.Option("--retry-quarantined", help="Try quarantined songs again.")
]
JsonFile = Annotated[
    Path | None, typer.Option("--json", help="Also write the closing figures to this file.")
]

# Options whose value is an address, not a path.
_ADDRESSES = ("--url", "--ray-address")


def _refuse_uris(words: Sequence[str]) -> None:
    """Raises: UserError: when a word of a command line, or the value of a setting, is a URI."""
    for before, word in zip(["", *words], words, strict=False):
        key, equals, value = word.partition("=")
        if before not in _ADDRESSES and key not in _ADDRESSES:
            refuse_uri(word)
            refuse_uri(value.strip("'\"[ "), f"{key}{equals}")


_SETTING = re.compile(r"\w+\.[\w.-]+=")


def _split_words(
    places: Sequence[str], words: Sequence[str], needed: int | None = None
) -> tuple[list[str], list[str]]:
    """Return the words that name `places`, and those that are settings.

    needed: number of places that must be named; None: all of them.
    Raises: UserError: when a place is missing, or a word is neither a place nor a setting.
    """
    settings = [word for word in words if _SETTING.match(word)]
    paths = [word for word in words if word and word not in settings]
    missing = places[len(paths) : len(places) if needed is None else needed]
    if missing:
        note = ""
        if settings:
            note = f" ('{settings[0]}' is a setting; write ./{settings[0]} if it is a path)"
        raise UserError(f"{' and '.join(missing)} must be given{note}; see --help")
    extra = paths[len(places) :]
    if needed == 0:
        extra = [word for word in paths if "=" in word] + extra
    if extra:
        raise UserError(f"'{extra[0]}' is not a setting; write section.key=value")
    return paths, settings


def _read_words(
    schema: type[T],
    places: Sequence[str],
    words: Sequence[str],
    config: Path | None,
    print_config: bool,
) -> tuple[list[Path], T]:
    """Return the paths and the settings of a command line, or print the settings and exit.

    Raises: UserError: when a place is missing or a setting is wrong.
    """
    from pipeline.settings import load_settings

    paths, overrides = _split_words(places, words, 0 if print_config else None)
    settings = load_settings(schema, config, overrides)
    if print_config:
        _print_settings(settings)
    return [Path(path) for path in paths], settings


def _print_settings(settings: Any) -> None:
    """Print the settings as YAML, which --config reads, and exit."""
    from pipeline.settings import dump_yaml

    sys.stdout.write(dump_yaml(dataclasses.asdict(settings)))
    raise typer.Exit


def _console() -> TerminalConsole:
    """Return a console as wide as the terminal, or of 120 columns when output is not a terminal."""
    return TerminalConsole()


def _finish(summary: Summary, json_path: Path | None, problems: Sequence[str] = ()) -> None:
    """Print the summary and write its figures; exit with status 1 when there are problems."""
    show_summary(_console(), summary, json_path)
    if problems:
        raise typer.Exit(1)


def _use_all_threads() -> None:
    """Let torch use all cores, in commands that compute in this process alone."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))


@app.callback()
def _root() -> None:
    """Turn singing corpora into datasets, train voices on them, and convert songs."""


@app.command()
def extract(
    corpus: Annotated[
        str, typer.Argument(metavar="CORPUS", help="Folder or manifest.", show_default=False)
    ] = "",
    dataset: Annotated[
        str, typer.Argument(metavar="DATASET", help="Folder to write.", show_default=False)
    ] = "",
    settings: Settings = None,
    config: ConfigFile = None,
    print_config: PrintConfig = False,
    source: Annotated[
        Path | None, typer.Option("--from", help="Take the audio from this dataset, not a CORPUS.")
    ] = None,
    speaker: Annotated[
        str | None, typer.Option(help="One speaker for the whole corpus, instead of its folders.")
    ] = None,
    ray_address: RayAddress = None,
    local: Local = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Plan and print what would run; write nothing.")
    ] = False,
    force_new: Annotated[
        bool, typer.Option("--force-new", help="Delete the contents of DATASET and start over.")
    ] = False,
    retry_quarantined: RetryQuarantined = False,
    redo_changed: Annotated[
        bool, typer.Option("--redo-changed", help="Redo tasks with songs that have changed.")
    ] = False,
    json_path: JsonFile = None,
) -> None:
    """Turn the songs of CORPUS into Parquet shards in DATASET.

    CORPUS is a folder with one folder for each speaker, or a manifest (.csv or .jsonl with path,
    speaker and optionally split). Settings are section.key=value, such as f0.method=dio;
    --print-config prints them all. Run the same command again to resume after a stop, or to add
    songs that are new in CORPUS.

    `extract --from OLD NEW` makes the dataset NEW from the audio in the shards of OLD. It keeps the
    settings of OLD, and computes only the units, f0 and x-vectors whose settings you change.
    """
    from pipeline.extract.config import load_config, to_yaml

    places = ("DATASET",) if source else ("CORPUS", "DATASET")
    words = (corpus, dataset, *(settings or []))
    paths, overrides = _split_words(places, words, 0 if print_config else None)
    if print_config:
        sys.stdout.write(to_yaml(load_config(config, overrides)))
        return
    if source is not None:
        _refuse_with_from(speaker=speaker, retry=retry_quarantined, redo=redo_changed)
    target = Path(paths[-1])

    from pipeline.extract.command import ExtractOptions, reextract
    from pipeline.extract.command import extract as run
    from pipeline.extract.from_dataset import config_from, read_source
    from pipeline.extract.summary import extract_summary

    options = ExtractOptions(
        speaker=speaker,
        ray_address=ray_address,
        local=local,
        dry_run=dry_run,
        force_new=force_new,
        retry_quarantined=retry_quarantined,
        redo_changed=redo_changed,
    )
    if source is None:
        resolved = load_config(config, overrides)
        outcome = run(Path(paths[0]), target, resolved, options, _console())
    else:
        resolved = config_from(read_source(source), config, overrides)
        outcome = reextract(source, target, resolved, options, _console())
    if not dry_run:
        _finish(extract_summary(outcome, target), json_path, outcome.account.problems)


def _refuse_with_from(speaker: str | None, retry: bool, redo: bool) -> None:
    given = {"--speaker": speaker, "--retry-quarantined": retry, "--redo-changed": redo}
    for option, value in given.items():
        if value:
            raise UserError(f"{option} does not go with --from, which keeps the songs as they are")


@app.command()
def train(
    dataset: Dataset = "",
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="Folder of the run.", show_default=False)
    ] = "",
    settings: Settings = None,
    config: ConfigFile = None,
    print_config: PrintConfig = False,
    init_from: Annotated[
        Path | None,
        typer.Option(
            help="Weights to start from: a run, a voice, or a G_*.pth of so-vits-svc with "
            "config.json (and D_*.pth) in the same folder. Speakers may differ."
        ),
    ] = None,
    workers: Annotated[int, typer.Option(help="Processes that share each batch (Ray Train).")] = 1,
    ray_address: RayAddress = None,
    json_path: JsonFile = None,
) -> None:
    """Train a singing voice on the shards of DATASET, in the folder RUN.

    Settings are section.key=value, such as run.steps=20000; --print-config prints them all. The
    folder configs/ has presets for --config: sovits-44k-768.yaml and sovits-44k-256.yaml (the
    networks of so-vits-svc), and tiny.yaml (to try things out on a CPU). Run the same command
    again to resume after a stop; the result is the same as without a stop. More run.steps continue
    a finished run.

    The voice is RUN/checkpoints/step-NNNNNNNN. RUN/validation has pictures and audio, RUN/log.jsonl
    one line for each step; `tensorboard --logdir RUN` shows all of it.
    """
    from pipeline.train.config import TrainConfig

    words = (dataset, run, *(settings or []))
    paths, resolved = _read_words(TrainConfig, ("DATASET", "RUN"), words, config, print_config)
    if workers < 1:
        raise UserError(f"--workers is {workers}; it must be 1 or more")

    from pipeline.train.summary import train_summary

    if workers > 1 or ray_address is not None:
        from pipeline.train.ray_train import train_on_ray

        outcome = train_on_ray(
            dataset,
            paths[1],
            resolved,
            workers=workers,
            ray_address=ray_address,
            init_from=init_from,
            console=_console(),
        )
    else:
        from pipeline.train.trainer import fit

        outcome = fit(dataset, paths[1], resolved, init_from=init_from, console=_console())
    _finish(train_summary(outcome), json_path)


@app.command()
def convert(
    checkpoint: Checkpoint = "",
    source: Annotated[
        str, typer.Argument(metavar="INPUT", help="Song, folder or manifest.", show_default=False)
    ] = "",
    output: Annotated[
        str,
        typer.Argument(metavar="OUTPUT", help="File, or folder of files.", show_default=False),
    ] = "",
    settings: Settings = None,
    speaker: Annotated[
        str | None, typer.Option(help="Who sings. Not needed if the voice has one speaker.")
    ] = None,
    transpose: Annotated[
        str | None,
        typer.Option(help="Semitones; auto or octave: into the speaker's range."),
    ] = None,
    encoder_checkpoint: Annotated[
        Path | None, typer.Option(help="Weights of the encoder, if the voice does not name them.")
    ] = None,
    config: ConfigFile = None,
    print_config: PrintConfig = False,
    backend: Annotated[
        str | None, typer.Option(help="torch, or onnx to run the synthesizer in onnxruntime.")
    ] = None,
    report: Annotated[
        bool, typer.Option("--report", help="Write a page with players and pictures.")
    ] = False,
    ray_address: RayAddress = None,
    local: Local = False,
    retry_quarantined: RetryQuarantined = False,
    json_path: JsonFile = None,
) -> None:
    """Sing INPUT in the voice of CHECKPOINT, and write it to OUTPUT.

    CHECKPOINT is the folder of a voice or of a training run, or a G_*.pth of so-vits-svc with
    config.json in the same folder. INPUT is a song and OUTPUT a .wav, .flac, .ogg or .mp3 file; or
    INPUT is a folder or manifest of songs and OUTPUT a folder. For a folder, run the same command
    again to resume after a stop.

    Settings are section.key=value, such as voice.mix=ann=0.7,ben=0.3 pitch.predict=true
    f0.method=rmvpe; --print-config prints them all, with the values of CHECKPOINT. The song is
    sliced and analysed in the same way as the clips that the voice was trained on.
    """
    places = ("CHECKPOINT", "INPUT", "OUTPUT")
    words = (checkpoint, source, output, *(settings or []))
    paths, overrides = _split_words(places, words, 1 if print_config else None)
    given = {"voice.speaker": speaker, "pitch.transpose": transpose, "compute.backend": backend}
    overrides += [
        f"{key}={json.dumps(value, ensure_ascii=False)}"
        for key, value in given.items()
        if value is not None
    ]
    # Threads that wait for the next tile would otherwise spin and slow other programs down.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if print_config:  # works without the encoder's weights, and before a speaker is chosen
        from pipeline.convert.config import convert_config
        from pipeline.train.find_voice import read_any_voice

        _print_settings(convert_config(read_any_voice(Path(paths[0])), config, overrides))

    from pipeline.convert.command import convert_file, read_request, write_page
    from pipeline.convert.folder import BatchOptions, convert_folder
    from pipeline.convert.summary import folder_summary, song_summary
    from pipeline.songs.manifest import MANIFEST_SUFFIXES

    voice, song, out = map(Path, paths)
    if not song.exists():
        raise UserError(f"{song} does not exist; INPUT is a song, a folder or a manifest")
    several = song.is_dir() or song.suffix.lower() in MANIFEST_SUFFIXES
    _refuse_mismatch(several, out, ray_address, local, retry_quarantined)
    request = read_request(voice, overrides, config, encoder_checkpoint)
    if several:
        options = BatchOptions(
            ray_address=ray_address,
            local=local,
            retry_quarantined=retry_quarantined,
            report=report,
        )
        outcome = convert_folder(request, song, out, options, _console())
        _finish(folder_summary(outcome, out), json_path, outcome.account.problems)
    else:
        _use_all_threads()
        conversion = convert_file(request, song, out, _console())
        page = out.with_suffix(".html") if report else None
        if page is not None:
            write_page(request, [conversion], page)
        _finish(song_summary(conversion, page), json_path)


def _refuse_mismatch(
    several: bool, out: Path, ray_address: str | None, local: bool, retry: bool
) -> None:
    """Refuse options of folders with one song, and a file as the output of several songs."""
    from pipeline.convert.output_file import FORMATS

    given = {"--ray-address": ray_address, "--local": local, "--retry-quarantined": retry}
    for option, value in given.items():
        if value and not several:
            raise UserError(f"{option} needs a folder or manifest as INPUT, not one song")
    if several and out.suffix.lower() in FORMATS:
        raise UserError(f"OUTPUT {out} is a file, but INPUT has several songs; name a folder")


@app.command()
def verify(
    dataset: Dataset,
    source: Annotated[
        Path | None, typer.Option(help="Corpus; also compares the songs' content hashes.")
    ] = None,
    export: Annotated[
        Path | None, typer.Option(help="Write the ledger to this .csv or .parquet file.")
    ] = None,
    json_path: JsonFile = None,
) -> None:
    """Read all of DATASET back and check it: footers, rows, balance, checksums, audio."""
    from pipeline.dataset.verify import check_export, export_ledger
    from pipeline.dataset.verify import verify as run
    from pipeline.extract.summary import verify_summary

    if export is not None:
        check_export(export)
    result = run(Path(dataset), source)
    if export is not None:
        export_ledger(result.account, export)
    _finish(verify_summary(result, export), json_path, result.problems)


@app.command()
def report(
    dataset: Dataset,
) -> None:
    """Write DATASET/report.html, a page with figures, pictures and clips to listen to."""
    from pipeline.extract.config import ExtractConfig
    from pipeline.reports.dataset_page import write_report

    _print(f"report written to {write_report(Path(dataset), ExtractConfig())}")


def _print(line: str) -> None:
    _console().print(line, markup=False, highlight=False, soft_wrap=True)


@app.command()
def demo_corpus(
    folder: OutFolder,
    minutes: Annotated[float, typer.Option(help="Minutes of singing.")] = 3.0,
    seed: Annotated[int, typer.Option(help="The same seed gives the same songs.")] = 0,
) -> None:
    """Make a small corpus of synthetic singing with known f0, and a few damaged files."""
    from pipeline.tools.demo_corpus import make_demo_corpus

    make_demo_corpus(Path(folder), minutes=minutes, seed=seed)
    _print(f"demo corpus written to {folder}")


@app.command()
def codebook(
    dataset: Dataset = "",
    out: OutFile = "",
    settings: Settings = None,
    config: ConfigFile = None,
    print_config: PrintConfig = False,
    json_path: JsonFile = None,
) -> None:
    """Cluster the units of DATASET by k-means.

    The file is for `extract` (encoder.codebook: store ids of centres instead of units) and for
    `convert` (units.codebook: draw units towards the speaker's centres). Settings are
    section.key=value, such as codebook.clusters=1000; --print-config prints them all.
    """
    from pipeline.tools.codebook import CodebookSettings, codebook_summary, make_codebook

    words = (dataset, out, *(settings or []))
    paths, resolved = _read_words(CodebookSettings, ("DATASET", "OUT"), words, config, print_config)
    _use_all_threads()
    fits = make_codebook(paths[0], paths[1], resolved, _console())
    _finish(codebook_summary(fits, paths[1]), json_path)


@app.command()
def index(
    dataset: Dataset = "",
    out: OutFolder = "",
    settings: Settings = None,
    config: ConfigFile = None,
    print_config: PrintConfig = False,
    json_path: JsonFile = None,
) -> None:
    """Index the units of each speaker of DATASET for feature retrieval (faiss).

    The folder is for `convert` (units.index: draw units towards the speaker's frames). Settings are
    section.key=value, such as index.nprobe=1; --print-config prints them all.
    """
    from pipeline.tools.unit_index import IndexSettings, index_summary, make_indexes

    words = (dataset, out, *(settings or []))
    paths, resolved = _read_words(IndexSettings, ("DATASET", "OUT"), words, config, print_config)
    notes = make_indexes(paths[0], paths[1], resolved, _console())
    _finish(index_summary(notes, paths[1]), json_path)


@app.command()
def purity(
    dataset: Dataset = "",
    settings: Settings = None,
    config: ConfigFile = None,
    print_config: PrintConfig = False,
    json_path: JsonFile = None,
) -> None:
    """Write DATASET/purity.parquet: the similarity of each clip to its speaker's other clips.

    It compares the x-vectors in DATASET, or those of the speaker-verification network
    xvector.checkpoint=FOLDER.
    """
    from pipeline.tools.speaker_purity import PuritySettings, measure_purity, purity_summary

    words = (dataset, *(settings or []))
    paths, resolved = _read_words(PuritySettings, ("DATASET",), words, config, print_config)
    if resolved.xvector.checkpoint is not None:
        _use_all_threads()
    speakers = measure_purity(paths[0], resolved, _console())
    _finish(purity_summary(speakers, paths[0]), json_path)


@app.command()
def distill(
    dataset: Dataset = "",
    out: OutFile = "",
    settings: Settings = None,
    config: ConfigFile = None,
    print_config: PrintConfig = False,
    json_path: JsonFile = None,
) -> None:
    """Train a smaller encoder on the clips of DATASET that imitates a large one.

    teacher.name and teacher.checkpoint name the large one. Further settings are section.key=value,
    such as distill.sparsity=0.5; --print-config prints them all. Use the result as
    encoder.name=dphubert encoder.checkpoint=OUT. Run the same command again to resume after a
    stop; the folder OUT.run has the state and a log.
    """
    from pipeline.tools.distill import DistillSettings, student_summary
    from pipeline.tools.distill import distill as run

    words = (dataset, out, *(settings or []))
    paths, resolved = _read_words(DistillSettings, ("DATASET", "OUT"), words, config, print_config)
    _use_all_threads()
    outcome = run(paths[0], paths[1], resolved, _console())
    _finish(student_summary(outcome, paths[1]), json_path)


@app.command()
def export(
    checkpoint: Checkpoint,
    folder: OutFolder,
    file_format: Annotated[
        str, typer.Option("--format", help="onnx (for onnxruntime) or sovits (for so-vits-svc).")
    ] = "onnx",
    json_path: JsonFile = None,
) -> None:
    """Write the voice of CHECKPOINT in the format of another program.

    onnx: graphs that sing in onnxruntime, without torch. sovits: G_STEP.pth and config.json.
    """
    from pipeline.tools.export_voice import export as run
    from pipeline.tools.export_voice import export_summary

    files = run(Path(checkpoint), Path(folder), file_format)
    _finish(export_summary(files), json_path)


@app.command()
def fetch_encoder(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="A name from --list.", show_default=False)
    ] = "",
    to: Annotated[Path, typer.Option(help="Folder for the file.")] = Path("checkpoints"),
    sha256: Annotated[str | None, typer.Option(help="SHA-256 that the file must have.")] = None,
    accept_first: Annotated[
        bool,
        typer.Option(
            "--accept-first", help="Trust this download, and check later ones against it."
        ),
    ] = False,
    url: Annotated[str | None, typer.Option(help="Another http(s) address of the file.")] = None,
    list_known: Annotated[bool, typer.Option("--list", help="List what can be fetched.")] = False,
) -> None:
    """Download a checkpoint. No other command uses the network."""
    from pipeline.tools.fetch import FetchOptions, checkpoint_table, usage_line
    from pipeline.tools.fetch import fetch_encoder as fetch

    if list_known:
        _console().print(checkpoint_table(), highlight=False)
        return
    if not name:
        raise UserError("NAME must be given; fetch-encoder --list prints the names")
    options = FetchOptions(to=to, sha256=sha256, accept_first=accept_first, url=url)
    _print(usage_line(name, fetch(name, options, _console())))


@app.command()
def convert_encoder(
    source: Annotated[
        Path, typer.Argument(metavar="IN", help="Checkpoint file or folder.", show_default=False)
    ],
    out: Annotated[
        Path | None,
        typer.Argument(metavar="OUT", help="File to write, .safetensors.", show_default=False),
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, or float16 for half the size.")] = "float32",
    describe: Annotated[
        bool, typer.Option("--print", help="Describe IN; OUT is then optional.")
    ] = False,
    json_path: JsonFile = None,
) -> None:
    """Write the encoder in IN as safetensors with its configuration, which loads faster."""
    if out is None and not describe:
        raise UserError("OUT must be given, or --print to describe IN")
    from pipeline.tools.convert_checkpoint import checkpoint_summary, convert_checkpoint

    summary = checkpoint_summary(source, describe, out)
    if out is not None:
        convert_checkpoint(source, out, dtype)
    _finish(summary, json_path)


def main() -> None:
    """Run the command line; a fault is one sentence on stderr and an exit status.

    0 success, 1 the dataset does not balance, 2 the user can fix it, 3 storage, 4 a bug of Cantor,
    130 Ctrl-C, 143 SIGTERM, 129 SIGHUP, 141 output that nobody read.
    """

    def fail(message: str, status: int) -> None:
        TerminalConsole(stderr=True, soft_wrap=True).print(message, markup=False, highlight=False)
        sys.exit(status)

    again = "Run the same command again to resume."
    if "--force-new" in sys.argv:
        again = "To resume, run the command WITHOUT --force-new; with it, everything is deleted."

    def fail_storage(fault: StorageFault) -> None:
        fail(f"stopped: {fault}. Finished work is safe. {again}", 3)

    try:
        _run_until_signal()
    except UserError as error:
        fail(f"error: {printable(str(error))}", 2)
    except StorageFault as error:
        fail_storage(error)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            fail(f"error: {printable(str(error.filename))} is too long a name", 2)
        from pipeline.storage.atomic import storage_fault

        fail_storage(storage_fault(error))
    except SongBug as error:
        fail(
            f"{error}\nThis is a bug of Cantor, not of your audio. The run stopped; finished work "
            "is safe. Please report the lines above.",
            4,
        )
    except Interrupted as stop:
        fail(f"\nstopped; finished work is safe. {again}", 128 + stop.number)


def _run_until_signal() -> None:
    """Run the command.

    Raises: Interrupted: when a stop signal ended it, whatever error that caused on its way.
    """
    with interrupt_at_stop_signal() as request:
        try:
            with keep_running_without_readers():
                app()
        except BaseException as error:
            succeeded = isinstance(error, SystemExit) and not error.code
            if request.number is None or succeeded:
                raise
            raise Interrupted(request.number) from error
