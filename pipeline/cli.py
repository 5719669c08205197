"""The command line. Says what was wrong in one sentence; heavy libraries load after the parsing."""

from __future__ import annotations

import dataclasses
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
from rich.console import Console
from rich.markup import escape

from pipeline.errors import Interrupted, SongBug, StorageFault, UserError
from pipeline.tools.old_flags import translate_old_flags

T = TypeVar("T")

app = typer.Typer(
    name="cantor",
    help="Turns singing corpora into training data, on Ray, exactly once.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_EXTRACT_HELP = """Turn the songs of CORPUS into Parquet shards in DATASET.

CORPUS is a folder with one folder per speaker, or a manifest (.csv or .jsonl with path, speaker
and optionally split). Settings are section.key=value, e.g. f0.method=dio; --print-config lists
them all. Run the same command again to resume, or to add songs that are new in CORPUS.

extract --from DATASET NEW makes NEW from the shards of DATASET, whose audio and settings it takes
over: units, f0 and x-vectors are computed where settings ask for others than DATASET has."""

_TRAIN_HELP = """Train a singing voice on the shards of DATASET, in the folder RUN.

Settings are section.key=value, e.g. run.steps=20000; --print-config lists them all, and configs/
has presets for --config: sovits-44k-768.yaml and sovits-44k-256.yaml (so-vits-svc's networks),
tiny.yaml (for trying things out on a CPU). Run the same command again to go on after a stop; the
numbers are those of a run that was never stopped. More run.steps make a finished run longer.

The voice is RUN/checkpoints/step-NNNNNNNN. RUN/validation has pictures and sound, RUN/log.jsonl a
line a step, and `tensorboard --logdir RUN` shows everything."""

_CONVERT_HELP = """Sing INPUT in the voice of CHECKPOINT, and write it to OUTPUT.

CHECKPOINT is the folder of a voice or of a training run, or a G_*.pth of so-vits-svc with its
config.json beside it. INPUT is a song, and OUTPUT a .wav, .flac, .ogg or .mp3; or INPUT is a
folder or manifest of songs, and OUTPUT a folder: run the same command again to go on after a stop.

Settings are section.key=value, e.g. voice.mix=ann=0.7,ben=0.3 pitch.predict=true f0.method=rmvpe;
--print-config lists them all, as CHECKPOINT has them. Clips are made of INPUT as those were made
that the voice was trained on."""


# Arguments and options that several commands have.
Dataset = Annotated[str, typer.Argument(help="Dataset folder.", show_default=False)]
Settings = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Settings, as section.key=value."),
]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="YAML file of settings.")]
PrintConfig = Annotated[
    bool, typer.Option("--print-config", help="Print all settings with their values and stop.")
]

_SETTING = re.compile(r"\w+\.[\w.-]+=")


class _ToolCommand(typer.core.TyperCommand):
    """A command that also takes the flags of earlier versions, which are hidden from its help."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, translate_old_flags(self.name or "", args))


def _split_words(
    words: Sequence[str], places: Sequence[str], needed: int | None = None
) -> tuple[list[str], list[str]]:
    """Return the words that name `places`, and those that are settings.

    needed: number of places that must be given; None: all of them.
    Raises: UserError: when a place is missing, or a word is neither a place nor a setting.
    """
    settings = [word for word in words if _SETTING.match(word)]
    paths = [word for word in words if word and word not in settings]
    missing = places[len(paths) : len(places) if needed is None else needed]
    if missing:
        hint = (
            f" ('{settings[0]}' is a setting; write ./ before a folder's name)" if settings else ""
        )
        raise UserError(f"{' and '.join(missing)} must be given{hint}; see --help")
    for word in paths[len(places) :]:
        raise UserError(f"'{word}' is not a setting; write section.key=value")
    return paths, settings


def _load(
    schema: type[T],
    words: Sequence[str],
    places: Sequence[str],
    config: Path | None,
    print_config: bool,
) -> tuple[list[Path], T] | None:
    """Return the paths and the settings of a command line; None when it only prints settings.

    Raises: UserError.
    """
    from pipeline.settings import dump_yaml, load_settings

    paths, overrides = _split_words(words, places, 0 if print_config else None)
    settings = load_settings(schema, config, overrides)
    if print_config:
        sys.stdout.write(dump_yaml(dataclasses.asdict(settings)))  # type: ignore[call-overload]
        return None
    return [Path(path) for path in paths], settings


def _console() -> Console:
    """Of the terminal's width; wide enough for the tables where there is none."""
    return Console(width=None if sys.stdout.isatty() else 120)


def _use_all_threads() -> None:
    """For torch, where a command is one process that computes alone."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))


@app.callback()
def _root() -> None:
    """Turns singing corpora into training data, on Ray, exactly once."""


@app.command(help=_EXTRACT_HELP)
def extract(
    corpus: Annotated[str, typer.Argument(help="Folder or manifest.", show_default=False)] = "",
    dataset: Annotated[str, typer.Argument(help="Folder to fill.", show_default=False)] = "",
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of settings.")] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the resolved settings and stop.")
    ] = False,
    source: Annotated[
        Path | None,
        typer.Option("--from", help="Dataset whose audio is taken over; then no CORPUS is named."),
    ] = None,
    speaker: Annotated[
        str | None, typer.Option(help="One speaker for the whole corpus, whatever the folders.")
    ] = None,
    ray_address: Annotated[
        str | None, typer.Option(help="Ray cluster (HOST:PORT or 'auto'); default: this machine.")
    ] = None,
    local: Annotated[
        bool, typer.Option("--local", help="Run in this process without Ray, for debugging.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List and plan, say what would run, write nothing.")
    ] = False,
    force_new: Annotated[
        bool, typer.Option("--force-new", help="Delete what DATASET holds and start over.")
    ] = False,
    retry_quarantined: Annotated[
        bool, typer.Option("--retry-quarantined", help="Try quarantined songs again.")
    ] = False,
    redo_changed: Annotated[
        bool, typer.Option("--redo-changed", help="Redo tasks whose songs changed since.")
    ] = False,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Write the closing table to this file too.")
    ] = None,
) -> None:
    from pipeline.extract.config import load_config, to_yaml

    words = [word for word in (corpus, dataset, *(overrides or [])) if word]
    if print_config:
        settings = [word for word in words if "=" in word]
        sys.stdout.write(to_yaml(load_config(config, settings)))
        return
    if source is not None:
        _refuse_with_from(speaker=speaker, retry=retry_quarantined, redo=redo_changed)
        words = ["", *words]
    if len(words) < 2:
        named = "the folder of the new dataset" if source else "a CORPUS and a DATASET folder"
        raise UserError(f"name {named}; see extract --help")
    corpus, dataset, *settings = words
    _refuse_setting(dataset, "DATASET", "DATASET" if source else "CORPUS, DATASET")
    if source is None:
        resolved = load_config(config, settings)
    else:
        from pipeline.extract.from_dataset import config_from, read_source

        resolved = config_from(read_source(source), config, settings)

    from pipeline.extract.command import ExtractOptions, reextract
    from pipeline.extract.command import extract as run

    options = ExtractOptions(
        speaker=speaker,
        ray_address=ray_address,
        local=local,
        dry_run=dry_run,
        force_new=force_new,
        retry_quarantined=retry_quarantined,
        redo_changed=redo_changed,
    )
    console = _console()
    try:
        if source is None:
            outcome = run(Path(corpus), Path(dataset), resolved, options, console)
        else:
            outcome = reextract(source, Path(dataset), resolved, options, console)
    except KeyboardInterrupt as error:  # the parser would end without a word
        raise Interrupted from error
    if dry_run:
        return

    from pipeline.extract.summary import show_summary, write_summary

    show_summary(console, outcome, Path(dataset))
    if json_path is not None:
        write_summary(json_path, outcome)
    if outcome.account.problems:
        raise typer.Exit(1)


def _refuse_setting(word: str, place: str, order: str) -> None:
    """Where a folder should be. order: of the words, for the message."""
    if re.match(r"\w+\.[\w.-]+=", word):
        raise UserError(
            f"'{word}' is a setting where the {place} folder should be; write {order}, "
            f"then settings (a folder of that name is ./{word})"
        )


def _refuse_with_from(speaker: str | None, retry: bool, redo: bool) -> None:
    given = {"--speaker": speaker, "--retry-quarantined": retry, "--redo-changed": redo}
    for option, value in given.items():
        if value:
            raise UserError(f"{option} is about songs; --from takes them as its dataset has them")


@app.command(help=_TRAIN_HELP)
def train(
    dataset: Annotated[str, typer.Argument(help="Dataset folder.", show_default=False)] = "",
    run: Annotated[str, typer.Argument(help="Folder of the run.", show_default=False)] = "",
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of settings.")] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the resolved settings and stop.")
    ] = False,
    init_from: Annotated[
        Path | None,
        typer.Option(
            help="Weights to begin with: a run, a voice, or so-vits-svc's G_*.pth with its "
            "config.json (and D_*.pth) beside it. Speakers may be others."
        ),
    ] = None,
    workers: Annotated[
        int, typer.Option(help="Processes that share each batch, by Ray Train.")
    ] = 1,
    ray_address: Annotated[
        str | None, typer.Option(help="Ray cluster (HOST:PORT or 'auto'); default: this machine.")
    ] = None,
) -> None:
    from pipeline.settings import dump_yaml, load_settings
    from pipeline.train.config import TrainConfig

    words = [word for word in (dataset, run, *(overrides or [])) if word]
    if print_config:
        settings = [word for word in words if "=" in word]
        resolved = load_settings(TrainConfig, config, settings)
        sys.stdout.write(dump_yaml(dataclasses.asdict(resolved)))
        return
    if len(words) < 2:
        raise UserError("name a DATASET and a RUN folder; see train --help")
    dataset, run, *settings = words
    for word, place in ((dataset, "DATASET"), (run, "RUN")):
        _refuse_setting(word, place, "DATASET, RUN")
    if workers < 1:
        raise UserError(f"--workers is {workers}; it must be 1 or more")
    resolved = load_settings(TrainConfig, config, settings)
    console = _console()
    try:
        if workers > 1 or ray_address is not None:
            from pipeline.train.ray_train import train_on_ray

            outcome = train_on_ray(
                dataset,
                Path(run),
                resolved,
                workers=workers,
                ray_address=ray_address,
                init_from=init_from,
                console=console,
            )
        else:
            from pipeline.train.trainer import fit

            outcome = fit(dataset, Path(run), resolved, init_from=init_from, console=console)
    except KeyboardInterrupt as error:
        raise Interrupted from error

    from pipeline.train.summary import show_training

    show_training(console, outcome)


def _refuse_beside(
    several: bool, out: Path, ray_address: str | None, local: bool, retry: bool
) -> None:
    """What does not go with a song, or with several."""
    given = {"--ray-address": ray_address, "--local": local, "--retry-quarantined": retry}
    for option, value in given.items():
        if value and not several:
            raise UserError(
                f"{option} is about a folder or a manifest of songs, not about one song"
            )
    from pipeline.convert.output_file import FORMATS

    if several and out.suffix.lower() in FORMATS:
        raise UserError(f"INPUT has several songs, and {out} is named like one; name a folder")


@app.command(help=_CONVERT_HELP)
def convert(
    checkpoint: Annotated[
        str, typer.Argument(help="Voice: its folder, a run, or a G_*.pth.", show_default=False)
    ] = "",
    source: Annotated[
        str, typer.Argument(metavar="INPUT", help="Song, folder or manifest.", show_default=False)
    ] = "",
    output: Annotated[
        str, typer.Argument(help="File, or folder of files.", show_default=False)
    ] = "",
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings.")
    ] = None,
    speaker: Annotated[
        str | None, typer.Option(help="Who sings; can be left out when the voice has one.")
    ] = None,
    transpose: Annotated[
        str | None, typer.Option(help="Semitones, or auto: to where the speaker sings.")
    ] = None,
    encoder_checkpoint: Annotated[
        Path | None, typer.Option(help="The encoder's weights, where the voice does not know.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of settings.")] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the resolved settings and stop.")
    ] = False,
    backend: Annotated[
        str | None, typer.Option(help="torch, or onnx for the synthesizer in onnxruntime.")
    ] = None,
    report: Annotated[
        bool, typer.Option("--report", help="Write a page with players and pictures beside it.")
    ] = False,
    ray_address: Annotated[
        str | None, typer.Option(help="Ray cluster (HOST:PORT or 'auto'); default: this machine.")
    ] = None,
    local: Annotated[
        bool, typer.Option("--local", help="A folder in this process without Ray.")
    ] = False,
    retry_quarantined: Annotated[
        bool, typer.Option("--retry-quarantined", help="Try quarantined songs of a folder again.")
    ] = False,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Write what was done to this file too.")
    ] = None,
) -> None:
    words = [word for word in (checkpoint, source, output, *(overrides or [])) if word]
    places = [word for word in words if not re.match(r"\w+\.[\w.-]+=", word)]
    if len(places) < (1 if print_config else 3):
        needed = "a CHECKPOINT" if print_config else "a CHECKPOINT, an INPUT and an OUTPUT"
        raise UserError(f"name {needed}; see convert --help")
    settings = [word for word in words if word not in places]
    given = {"voice.speaker": speaker, "pitch.transpose": transpose, "compute.backend": backend}
    settings += [
        f"{key}={json.dumps(value, ensure_ascii=False)}"
        for key, value in given.items()
        if value is not None
    ]
    # Threads that wait for the next tile by spinning would take other programs' time.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

    if print_config:  # also without the encoder's weights, and before it is known who sings
        from pipeline.convert.config import convert_config
        from pipeline.settings import dump_yaml
        from pipeline.train.find_voice import read_any_voice

        resolved = convert_config(read_any_voice(Path(places[0])), config, settings)
        sys.stdout.write(dump_yaml(dataclasses.asdict(resolved)))
        return
    if len(places) > 3:
        raise UserError(f"'{places[3]}' is neither a setting (section.key=value) nor asked for")

    from pipeline.convert.command import convert_file, read_request, write_page
    from pipeline.songs.corpus import MANIFEST_SUFFIXES

    song, out = Path(places[1]), Path(places[2])
    several = song.is_dir() or song.suffix.lower() in MANIFEST_SUFFIXES
    if not song.exists():
        raise UserError(f"there is no song, folder or manifest {song}")
    _refuse_beside(several, out, ray_address, local, retry_quarantined)
    request = read_request(Path(places[0]), settings, config, encoder_checkpoint)
    console = _console()
    try:
        if several:
            from pipeline.convert.folder import BatchOptions, convert_folder
            from pipeline.convert.summary import show_batch, write_batch

            options = BatchOptions(
                ray_address=ray_address,
                local=local,
                retry_quarantined=retry_quarantined,
                report=report,
            )
            outcome = convert_folder(request, song, out, options, console)
            show_batch(console, outcome, out)
            if json_path is not None:
                write_batch(json_path, outcome)
            if outcome.account.problems:
                raise typer.Exit(1)
        else:
            from pipeline.convert.summary import show_conversion, write_conversion

            _use_all_threads()
            conversion = convert_file(request, song, out, console)
            page = out.with_suffix(".html") if report else None
            if page is not None:
                write_page(request, [conversion], page)
            show_conversion(console, conversion, page)
            if json_path is not None:
                write_conversion(json_path, conversion)
    except KeyboardInterrupt as error:
        raise Interrupted from error


@app.command()
def verify(
    dataset: Annotated[Path, typer.Argument(help="Dataset folder.", show_default=False)],
    source: Annotated[
        Path | None, typer.Option(help="Corpus: compare the songs' content hashes too.")
    ] = None,
    export: Annotated[
        Path | None, typer.Option(help="Write the ledger to this .csv or .parquet file.")
    ] = None,
) -> None:
    """Read everything in DATASET back: footers, rows, balance, checksums, audio."""
    from pipeline.dataset.verify import check_export, export_ledger
    from pipeline.dataset.verify import verify as run
    from pipeline.extract.summary import show_verification

    if export is not None:
        check_export(export)
    console = _console()
    result = run(dataset, source)
    show_verification(console, result)
    if export is not None:
        export_ledger(result.account, export)
        console.print(f"ledger written to {escape(str(export))}")
    if result.problems:
        raise typer.Exit(1)


@app.command()
def report(
    dataset: Annotated[Path, typer.Argument(help="Dataset folder.", show_default=False)],
) -> None:
    """Write DATASET/report.html: one page with figures, pictures and clips to hear."""
    from pipeline.extract.config import ExtractConfig
    from pipeline.reports.dataset_page import write_report

    page = write_report(dataset, ExtractConfig())
    _console().print(f"report written to {escape(str(page))}")


@app.command()
def demo_corpus(
    folder: Annotated[Path, typer.Argument(help="Folder to make.", show_default=False)],
    minutes: Annotated[float, typer.Option(help="Minutes of singing.")] = 3.0,
    seed: Annotated[int, typer.Option(help="Same seed, same songs.")] = 0,
) -> None:
    """Make a small corpus of synthetic singing with known f0, and a few faults."""
    from pipeline.tools.demo_corpus import make_demo_corpus

    make_demo_corpus(folder, minutes=minutes, seed=seed)
    _console().print(f"demo corpus written to {escape(str(folder))}")


@app.command(cls=_ToolCommand)
def codebook(
    dataset: Dataset = "",
    out: Annotated[str, typer.Argument(help="File to write, .safetensors.")] = "",
    settings: Settings = None,
    config: ConfigFile = None,
    print_config: PrintConfig = False,
) -> None:
    """Cluster the units of DATASET by k-means, for `encoder.codebook` and `units.codebook`."""
    from pipeline.tools.codebook import CodebookSettings, make_codebook, show_fits

    words = (dataset, out, *(settings or []))
    given = _load(CodebookSettings, words, ("DATASET", "OUT"), config, print_config)
    if given is None:
        return
    (folder, file), resolved = given
    _use_all_threads()
    console = _console()
    show_fits(console, make_codebook(folder, file, resolved, console), file)


@app.command(cls=_ToolCommand)
def index(
    dataset: Dataset = "",
    out: Annotated[str, typer.Argument(help="Folder to write into.")] = "",
    settings: Settings = None,
    config: ConfigFile = None,
    print_config: PrintConfig = False,
) -> None:
    """Index the units of each speaker of DATASET for feature retrieval (faiss)."""
    from pipeline.tools.unit_index import IndexSettings, make_indexes, show_indexes

    words = (dataset, out, *(settings or []))
    given = _load(IndexSettings, words, ("DATASET", "OUT"), config, print_config)
    if given is None:
        return
    (folder, target), resolved = given
    console = _console()
    show_indexes(console, make_indexes(folder, target, resolved, console), target)


@app.command(cls=_ToolCommand)
def purity(
    dataset: Dataset = "",
    settings: Settings = None,
    config: ConfigFile = None,
    print_config: PrintConfig = False,
) -> None:
    """Write DATASET/purity.parquet: the similarity of each clip to its speaker's other clips.

    xvector.checkpoint names a speaker-verification network; the default reads
    the x-vectors of DATASET.
    """
    from pipeline.tools.speaker_purity import PuritySettings, measure_purity, show_purity

    words = (dataset, *(settings or []))
    given = _load(PuritySettings, words, ("DATASET",), config, print_config)
    if given is None:
        return
    (folder,), resolved = given
    if resolved.xvector.checkpoint is not None:
        _use_all_threads()
    console = _console()
    show_purity(console, measure_purity(folder, resolved, console), folder)


@app.command()
def convert_encoder(
    source: Annotated[
        Path, typer.Argument(metavar="IN", help="Checkpoint file or folder.", show_default=False)
    ],
    out: Annotated[
        Path | None, typer.Argument(help="File to write, .safetensors.", show_default=False)
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, or float16 for half the size.")] = "float32",
    describe: Annotated[
        bool, typer.Option("--print", help="Say what IN is; OUT can be left out.")
    ] = False,
) -> None:
    """Write the encoder in IN as safetensors with its configuration, which load faster."""
    if out is None and not describe:
        raise UserError("name a file OUT to write, or --print to see what IN is")
    from pipeline.tools import convert_checkpoint as module

    console = _console()
    if describe:
        module.show_description(console, module.describe_checkpoint(source))
    if out is not None:
        module.convert_checkpoint(source, out, dtype)
        console.print(f"written to {escape(str(out))}", highlight=False, soft_wrap=True)


@app.command()
def export(
    checkpoint: Annotated[
        Path,
        typer.Argument(help="Voice: its folder, a run, or a G_*.pth.", show_default=False),
    ],
    folder: Annotated[Path, typer.Argument(help="Folder to write into.", show_default=False)],
) -> None:
    """Write the voice of CHECKPOINT as ONNX graphs, for onnxruntime."""
    from pipeline.tools.export_voice import export as run
    from pipeline.tools.export_voice import show_export

    run(checkpoint, folder)
    show_export(_console(), folder)


@app.command(cls=_ToolCommand)
def distill(
    dataset: Dataset = "",
    out: Annotated[str, typer.Argument(help="File to write, .safetensors.")] = "",
    settings: Settings = None,
    config: ConfigFile = None,
    print_config: PrintConfig = False,
) -> None:
    """Train a smaller encoder on the clips of DATASET that gives the units of a large one.

    teacher.name and teacher.checkpoint name the large one. Use the student as
    encoder.name=dphubert encoder.checkpoint=OUT. Run the same command again to resume after a
    stop; the folder OUT.run has the state and a log.
    """
    from pipeline.tools.distill import DistillSettings, show_student
    from pipeline.tools.distill import distill as run

    words = (dataset, out, *(settings or []))
    given = _load(DistillSettings, words, ("DATASET", "OUT"), config, print_config)
    if given is None:
        return
    (folder, file), resolved = given
    _use_all_threads()
    console = _console()
    try:
        outcome = run(folder, file, resolved, console)
    except KeyboardInterrupt as error:
        raise Interrupted from error
    show_student(console, outcome, file)


@app.command()
def fetch_encoder(
    name: Annotated[str, typer.Argument(help="A name of --list.", show_default=False)] = "",
    to: Annotated[Path, typer.Option(help="Folder to put it into.")] = Path("checkpoints"),
    sha256: Annotated[str | None, typer.Option(help="The SHA-256 that the file must have.")] = None,
    accept_first: Annotated[
        bool,
        typer.Option(
            "--accept-first", help="Where no SHA-256 is known: record that of what comes."
        ),
    ] = False,
    url: Annotated[str | None, typer.Option(help="Another address, http(s), of the file.")] = None,
    list_known: Annotated[bool, typer.Option("--list", help="Say what can be fetched.")] = False,
) -> None:
    """Download a checkpoint. No other command uses the network."""
    from pipeline.tools.fetch import FetchOptions, show_checkpoints, show_use
    from pipeline.tools.fetch import fetch_encoder as fetch

    console = _console()
    if list_known:
        show_checkpoints(console)
        return
    if not name:
        raise UserError("name a checkpoint; fetch-encoder --list says which there are")
    options = FetchOptions(to=to, sha256=sha256, accept_first=accept_first, url=url)
    try:
        path = fetch(name, options, console)
    except KeyboardInterrupt as error:
        raise Interrupted from error
    show_use(console, name, path)


def main() -> None:
    """Run the command line; faults become one sentence on stderr and an exit status.

    0 done, 1 the dataset does not balance, 2 the user can put it right, 3 storage, 4 a bug of ours,
    130 interrupted.
    """
    error_console = Console(stderr=True, soft_wrap=True)

    def fail(message: str, status: int) -> None:
        error_console.print(message, markup=False, highlight=False)
        sys.exit(status)

    again = "Run the same command to go on."
    if "--force-new" in sys.argv:
        again = "Run the command again WITHOUT --force-new to go on; with it, all is deleted."

    def fail_storage(fault: StorageFault) -> None:
        fail(f"stopped: {fault}. What was committed is whole. {again}", 3)

    try:
        app()
    except UserError as error:
        fail(f"error: {error}", 2)
    except StorageFault as error:
        fail_storage(error)
    except OSError as error:
        from pipeline.storage.atomic import storage_fault

        fail_storage(storage_fault(error))
    except SongBug as error:
        fail(
            f"{error}\nThis is a bug of Cantor, not of your audio. The run stopped; what was "
            "committed is whole. Please report the lines above.",
            4,
        )
    except Interrupted:
        fail(f"\nstopped; what was committed is whole. {again}", 130)
