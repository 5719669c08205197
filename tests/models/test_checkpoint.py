"""Foreign checkpoints: their data are loaded, and their code never runs."""

from __future__ import annotations

import collections
import io
import json
import os
import pickle
import resource
import struct
import tarfile
import zipfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from models import checkpoint
from models.checkpoint import (
    CheckpointError,
    Opaque,
    load_foreign,
    read_safetensors,
    save_safetensors,
    sha256_of,
)


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


# --- what real files hold


@pytest.mark.parametrize("name", ["tiny_wavlm.pt", "tiny_whisper.pt", "tiny_dpwavlm.pth"])
def test_plain_files_come_out_as_torch_reads_them(golden: Path, name: str) -> None:
    path = golden / "encoders" / name
    assert equal(load_foreign(path), torch.load(path, weights_only=True))


def test_every_golden_container_is_read_and_its_globals_are_data(golden: Path) -> None:
    folder = golden / "encoders"
    for name in json.loads((folder / "pickle_globals.json").read_text()):
        content = load_foreign(folder / name)
        tensors = content.get("model") or content.get("state_dict") or content["model_state_dict"]
        assert type(tensors) is dict and all(isinstance(t, Tensor) for t in tensors.values()), name


def test_dictconfig_zip_and_legacy_container_and_namespace_agree(golden: Path) -> None:
    folder = golden / "encoders"
    plain = load_foreign(folder / "tiny_hubert_base.pt")
    assert plain["task_state"] == {"dictionaries": [Opaque("fairseq.data.dictionary.Dictionary")]}
    for name in ("tiny_hubert_base_dictconfig.pt", "tiny_hubert_base_dictconfig_nozip.pt"):
        content = load_foreign(folder / name)
        assert content["cfg"] == plain["cfg"]
        assert equal(content["model"], plain["model"])
    old = load_foreign(folder / "tiny_hubert_base_args.pt")
    assert old["cfg"] is None and type(old["args"]) is dict
    assert old["args"]["encoder_layers"] == plain["cfg"]["model"]["encoder_layers"]
    assert isinstance(old["extra_state"]["best"], float)  # a numpy scalar in the file
    assert equal(old["model"], plain["model"])


def every_kind_of_content() -> dict[str, Any]:
    base = torch.arange(24, dtype=torch.float32)
    return {
        "shared": [base.view(4, 6), base[3:7], base.view(4, 6).T],
        "dtypes": [
            torch.arange(5).to(t)
            for t in (torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.uint8)
        ],
        "bool": torch.tensor([True, False]),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "parameter": torch.nn.Parameter(torch.ones(2), requires_grad=False),
        "containers": ({1: "x"}, [1.5, None, True], {"s"}, b"bytes", 1 << 80, 1 + 2j),
        "ordered": collections.OrderedDict(a=1),
        "default": collections.defaultdict(list, b=[2]),
        "size": torch.Size([2, 3]),
    }


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_all_kinds_of_content_survive_both_containers(tmp_path: Path, zipped: bool) -> None:
    content = every_kind_of_content()
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    loaded = load_foreign(tmp_path / "a.pt")
    expected = content | {
        "parameter": content["parameter"].data,
        "ordered": {"a": 1},
        "default": {"b": [2]},
        "size": (2, 3),
    }
    assert equal(loaded, expected)
    first, second, _ = loaded["shared"]
    assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()


def test_configurations_and_numpy_become_plain(tmp_path: Path) -> None:
    config = OmegaConf.create({"a": [1, {"b": None}], "c": "${a}", "d": "???"})
    array = np.asfortranarray(np.arange(6, dtype=">f4").reshape(2, 3))
    content = {
        "cfg": config,
        "args": Namespace(x=1, y=Namespace(z=[2])),
        "number": np.float32(0.5),
        "array": array,
        "path": Path("x"),
    }
    torch.save(content, tmp_path / "a.pt")
    loaded = load_foreign(tmp_path / "a.pt")
    assert loaded["cfg"] == {"a": [1, {"b": None}], "c": "${a}", "d": "???"}
    assert loaded["args"] == {"x": 1, "y": {"z": [2]}}
    assert loaded["number"] == 0.5 and type(loaded["number"]) is float
    assert torch.equal(loaded["array"], torch.arange(6.0).view(2, 3))
    assert isinstance(loaded["path"], Opaque)


def test_writing_to_a_loaded_tensor_leaves_the_file_alone(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(3)}, tmp_path / "a.pt")
    load_foreign(tmp_path / "a.pt")["w"].add_(1)
    assert load_foreign(tmp_path / "a.pt")["w"].sum() == 0


# --- what would run code


class Calls:
    """An object that pickles as a call of `function` with `args`."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call

    def __call__(self) -> None:
        """Make the object callable, as the pickler requires."""


ATTACKS: dict[str, tuple[Callable[[str], Any], str]] = {
    "os.system": (lambda mark: Calls(os.system, f"touch {mark}"), "system"),
    "eval": (lambda mark: Calls(eval, f"open({mark!r}, 'w')"), "builtins.eval"),
    "exec": (lambda mark: Calls(exec, f"open({mark!r}, 'w')"), "builtins.exec"),
    "open": (lambda mark: Calls(open, mark, "w"), "open"),
    "nested reduce": (
        lambda mark: {"w": [Calls(Calls(getattr, Calls(__import__, "os"), "system"), mark)]},
        "builtins.getattr",
    ),
    "pickle in a pickle": (
        lambda mark: Calls(pickle.loads, pickle.dumps(Calls(os.system, f"touch {mark}"))),
        "pickle.loads",
    ),
    "torch.load": (lambda mark: Calls(torch.load, mark), "torch.serialization.load"),
    "as a state": (lambda mark: Namespace(a=Calls(os.mkdir, mark)), "mkdir"),
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("attack", ATTACKS)
def test_a_malicious_pickle_is_refused_in_one_sentence(
    tmp_path: Path, attack: str, zipped: bool
) -> None:
    make, asked = ATTACKS[attack]
    mark = tmp_path / "ran"
    path = tmp_path / "evil.pt"
    torch.save({"model": make(str(mark))}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError) as caught:
        load_foreign(path)
    message = str(caught.value)
    assert str(path) in message and asked in message and "\n" not in message
    assert not mark.exists()


def test_a_bare_malicious_pickle_is_refused(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Calls(os.system, f"touch {mark}")))
    with pytest.raises(CheckpointError, match="system"):
        load_foreign(tmp_path / "evil.pt")
    assert not mark.exists()


def zip_with(path: Path, data_pkl: bytes, **storages: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("a/data.pkl", data_pkl)
        for key, raw in storages.items():
            archive.writestr(f"a/data/{key.removeprefix('s')}", raw)
    return path


def test_unknown_names_are_stubs_whatever_is_done_to_them(tmp_path: Path) -> None:
    # a call of a stub's result, a state, items, elements: none of it reaches anything real
    calls = b"\x80\x02cfairseq.x\nF\n(X\x01\x00\x00\x00aK\x01tR(K\x02tR}X\x01\x00\x00\x00kK\x01sb."
    assert load_foreign(zip_with(tmp_path / "a.pt", calls)) == Opaque("fairseq.x.F")
    fills = b"\x80\x02cfairseq.x\nF\n)\x81K\x01aK\x02K\x03s."
    assert load_foreign(zip_with(tmp_path / "b.pt", fills)) == Opaque("fairseq.x.F")


def test_a_state_given_to_a_global_changes_nothing_of_ours(tmp_path: Path) -> None:
    for name in (b"torch._utils\n_rebuild_tensor_v2", b"builtins\ndict", b"_codecs\nencode"):
        state = b"\x80\x02c" + name + b"\nN}X\x0a\x00\x00\x00__new__evlK\x01s\x86b."
        with pytest.raises(CheckpointError, match="damaged"):
            load_foreign(zip_with(tmp_path / "a.pt", state))
    assert equal(load_foreign(save(tmp_path / "b.pt", {"w": torch.ones(2)})), {"w": torch.ones(2)})


def save(path: Path, content: Any, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


# --- what claims more than it has


def tensor_pickle(
    numel: int = 4, offset: int = 0, size: str = "(I4\nt", stride: str = "(I1\nt", key: str = "0"
) -> bytes:
    """A pickle of one float tensor, with every number under the test's control."""
    return (
        "ctorch._utils\n_rebuild_tensor_v2\n"
        f"((S'storage'\nctorch\nFloatStorage\nS'{key}'\nS'cpu'\nI{numel}\ntQ"
        f"I{offset}\n{size}{stride}I00\nNtR."
    ).encode()


def test_a_handwritten_tensor_is_read(tmp_path: Path) -> None:
    path = zip_with(tmp_path / "a.pt", tensor_pickle(), s0=struct.pack("<4f", 1, 2, 3, 4))
    assert load_foreign(path).tolist() == [1, 2, 3, 4]


LIES = {
    "offset beyond": (tensor_pickle(offset=1), "exceeds its storage"),
    "offset negative": (tensor_pickle(offset=-1), "not a natural number"),
    "size beyond": (tensor_pickle(size="(I5\nt"), "exceeds its storage"),
    "stride beyond": (tensor_pickle(stride="(I2\nt"), "exceeds its storage"),
    "stride negative": (tensor_pickle(offset=3, stride="(I-1\nt"), "not a natural number"),
    "stride missing": (tensor_pickle(stride="(t"), "disagree"),
    "expanded": (tensor_pickle(size="(I1000000000000\nt", stride="(I0\nt"), "exceeds its storage"),
    "storage longer than its entry": (tensor_pickle(numel=5), "claims 20 bytes and has 16"),
    "absurd storage": (tensor_pickle(numel=1 << 60, size=f"(I{1 << 60}\nt"), "claims"),
    "negative storage": (tensor_pickle(numel=-4), "negative size"),
    "no such storage": (tensor_pickle(key="7"), "lacks its storage '7'"),
    "path as a storage": (tensor_pickle(key="../../etc/passwd"), "lacks its storage"),
    "malformed reference": (b"S'module'\nQ.", "refers to something other"),
    "no unpickling at all": (b"\x80\x02\xff\xff.", "damaged pickle"),
    "memo bomb": (b"\x80\x02Nr\xff\xff\xff\x7f.", "damaged pickle"),
    "claimed length": (b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b"x.", "damaged pickle"),
    "bytes of a mere length": (b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.", "bytes"),
    "quantised view": (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v3\n"
        b"((S'storage'\nctorch.storage\nUntypedStorage\nS'0'\nS'cpu'\nI16\ntQ"
        b"I0\n(I4\nt(I1\ntI00\nNctorch\nqint8\ntR.",
        "of an unsupported kind",
    ),
    "tensor never made": (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)\x81.",
        "damaged pickle",
    ),
    "size beyond any": (
        tensor_pickle(size=f"(I0\nI{1 << 80}\nt", stride="(I1\nI1\nt"),
        "beyond 2",
    ),
    "text of a container": (
        # ten times the last list, seven times over: 30 MB of text from 200 bytes
        b"\x80\x02cbuiltins\nstr\n("
        + b"X\x03\x00\x00\x00lol" * 10
        + b"lq\x000"
        + b"".join(b"(" + bytes([104, i]) * 10 + bytes([108, 113, i + 1, 48]) for i in range(6))
        + b"h\x06\x85R.",
        "converts something other than text",
    ),
    "a name that hides": (
        b"\x80\x04X\x09\x00\x00\x00os\n\x1b[31m.X\x01\x00\x00\x00y\x93.",
        "an invalid name",
    ),
    "deep": (b"\x80\x02" + b"]" * 5000 + b"a" * 4999 + b".", "nested deeper"),
    "unhashable": (b"\x80\x02}]K\x01s.", "a list as a key"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_claim_beyond_the_file_is_refused(tmp_path: Path, lie: str) -> None:
    data, words = LIES[lie]
    path = zip_with(tmp_path / "a.pt", data, s0=struct.pack("<4f", 1, 2, 3, 4))
    with pytest.raises(CheckpointError, match=words) as caught:
        load_foreign(path)
    assert str(path) in str(caught.value) and str(caught.value).isprintable()


def doubling(levels: int) -> bytes:
    """Opcodes of 2 ** levels references to one list: each level is a list of two of the last."""
    return b"]q\x00" + b"".join(b"]q%c(h%ch%ce" % (n, n - 1, n - 1) for n in range(1, levels + 1))


def test_what_is_shared_a_thousand_times_is_walked_once(tmp_path: Path) -> None:
    loaded = load_foreign(zip_with(tmp_path / "a.pt", b"\x80\x02" + doubling(10) + b"."))
    assert loaded[0] is loaded[1]


# a tuple of two references to a tuple of two references and so on
TUPLES = b")q\x000" + b"".join(b"h%ch%c\x86q%c0" % (n, n, n + 1) for n in range(45)) + b"h\x2d"
LARGE = b"X" + struct.pack("<I", 200_000) + b"a" * 200_000 + b"q\x000"  # text, number 0
HUGE_INT = b"\x8b" + struct.pack("<I", 100_000) + b"\x7f" * 100_000
BY_CALL = b"cbuiltins\n%b\nq\x01h\x00\x85R"  # name 1 of `%b`, called with object 0
AGAIN = b"h\x01h\x00\x85R"
ENCODE = b"c_codecs\nencode\nq\x01X\x06\x00\x00\x00latin1q\x020"
LIST = b"(" + b"N" * 100_000 + b"lq\x000"
NUMBERS = b"c_codecs\nencode\nh\x00X\x06\x00\x00\x00latin1\x86Rq\x010"
ARRAY = b"cnumpy.core.multiarray\n_reconstruct\n)R(K\x01J\x40\x0d\x03\x00\x85h\x02\x89h\x01tb"
DTYPE = b"cnumpy\ndtype\nX\x02\x00\x00\x00u1\x85Rq\x020"
MEMORY = "far more memory"
KEY = "as a key"

BOMBS = {
    # a hash of 2^45 steps
    "tuples as a key": (b"}" + TUPLES + b"Ns", KEY),
    "tuples as keys": (b"}(" + TUPLES + b"Nu", KEY),
    "tuples in a closed dict": (b"(" + TUPLES + b"Nd", KEY),
    "tuples as a member": (b"\x8f(" + TUPLES + b"\x90", KEY),
    "tuples in a frozenset": (b"(" + TUPLES + b"\x91", KEY),
    "tuples in a called set": (b"cbuiltins\nset\n(" + TUPLES + b"l\x85R", KEY),
    "tuples in a called frozenset": (b"cbuiltins\nfrozenset\n(" + TUPLES + b"l\x85R", KEY),
    "tuples in pairs": (
        b"ccollections\nOrderedDict\n(" + TUPLES + b"N\x86l\x85R",
        KEY,
    ),
    "tuples behind a stub": (
        b"}comegaconf.nodes\nAnyNode\n)\x81}X\x04\x00\x00\x00_val" + TUPLES + b"sbNs",
        KEY + "|" + MEMORY,
    ),
    "frozenset as a key": (b"}(\x91Ns", KEY),
    "complex key": (b"}cbuiltins\ncomplex\nK\x01K\x01\x86RNs", KEY),
    # numbers of one hash: a dictionary of them is quadratic
    "key beyond its own hash": (b"}\x8a\x08" + b"\xff" * 7 + b"\x1fNs", "as a key"),
    "huge number": (HUGE_INT, "bits"),
    "huge number by a call": (
        b"cbuiltins\nint\nX\xa0\x0f\x00\x00" + b"9" * 4000 + b"\x85R",
        "digits",
    ),
    # copies
    "lists copied": (LIST + b"(" + BY_CALL % b"list" + AGAIN * 500 + b"t", MEMORY),
    "tuples copied": (LIST + b"(" + BY_CALL % b"tuple" + AGAIN * 500 + b"t", MEMORY),
    "texts encoded": (
        LARGE + ENCODE + b"(" + b"h\x01h\x00h\x02\x86R" * 500 + b"t",
        MEMORY,
    ),
    "lists appended": (LIST + b"]" + b"h\x00a" * 10 + b"(" + b"h\x00" * 900_000 + b"e", MEMORY),
    "arrays of one buffer": (
        LARGE + NUMBERS + DTYPE + b"(" + ARRAY * 500 + b"t",
        MEMORY,
    ),
    # references that a reader, a copy or a printed message would expand
    "doubled list": (doubling(60), MEMORY),
    "doubled tuple": (TUPLES, MEMORY),
    "doubled text": (LARGE + b"(" + b"h\x00" * 1000 + b"l", MEMORY),
    # small opcodes of large objects
    "sets": (b"(" + b"\x8f" * 400_000 + b"l", MEMORY),
    "marks": (b"(" * 1_000_000, MEMORY),
    "names": (
        b"(" + b"".join(b"ca\nb%d\n" % n for n in range(170_000)) + b"l",
        MEMORY,
    ),
    # names that might take a length for content, and opcodes of other protocols
    "extension": (b"\x82\x01", "EXT1"),
    "buffer": (b"\x97", "NEXT_BUFFER"),
    "persistent text": (b"Pstorage\n", "refers to something other"),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_pickle_costs_no_more_than_its_file_explains(tmp_path: Path, bomb: str) -> None:
    opcodes, words = BOMBS[bomb]
    path = zip_with(tmp_path / "a.pt", b"\x80\x04" + opcodes + b".")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match=words) as caught:
        load_foreign(path)
    assert len(str(caught.value)) < 500 and str(caught.value).isprintable()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 80 << 10  # KiB


def test_views_of_a_storage_share_its_numbers_and_their_sum_is_bounded(tmp_path: Path) -> None:
    """A flag needs a byte of 0 or 1, so flags are copied: once for a storage, not for each view."""
    views = b"(" + b"".join(
        tensor_pickle(n, size="(I1\nt").removesuffix(b".").replace(b"Float", b"Bool")
        for n in range(1, 2001)
    )
    path = zip_with(tmp_path / "a.pt", views + b"t.", s0=bytes(1_000_000))
    loaded = load_foreign(path)
    assert len({tensor.untyped_storage().data_ptr() for tensor in loaded}) == 1
    # whoever copies these needs 4 MB for each
    whole = tensor_pickle(1_000_000, size="(I1000000\nt").removesuffix(b".")
    for many in (whole * 100, whole + b"q\x01" + b"h\x01" * 100):
        path = zip_with(tmp_path / "b.pt", b"(" + many + b"t.", s0=bytes(4_000_000))
        with pytest.raises(CheckpointError, match="far more memory"):
            load_foreign(path)
    tied = whole + b"q\x01" + b"h\x01" * 3
    assert len(load_foreign(zip_with(tmp_path / "c.pt", b"(" + tied + b"t.", s0=bytes(4_000_000))))


def test_a_zip_of_too_many_or_equal_entries_is_refused(tmp_path: Path) -> None:
    entry = struct.pack("<4s6H3I5H2I", b"PK\x01\x02", *[0] * 9, 1, *[0] * 6) + b"a"
    end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 9, 9, 200_000 * len(entry), 4, 0)
    (tmp_path / "many.pt").write_bytes(b"PK\x03\x04" + entry * 200_000 + end)
    with pytest.raises(CheckpointError, match="more tensors than any network"):
        load_foreign(tmp_path / "many.pt")
    end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 2, 2, 2 * len(entry), 4, 0)
    (tmp_path / "two.pt").write_bytes(b"PK\x03\x04" + entry * 2 + end)
    with pytest.raises(CheckpointError, match="several entries of one name"):
        load_foreign(tmp_path / "two.pt")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_file_cut_anywhere_is_an_error_in_words(tmp_path: Path, zipped: bool) -> None:
    content = {"w": torch.arange(500.0), "n": [1, 2], "v": torch.ones(3, 3)}
    whole = save(tmp_path / "a.pt", content, _use_new_zipfile_serialization=zipped).read_bytes()
    cut = tmp_path / "cut.pt"
    for length in [*range(1, 300), *range(300, len(whole) - 1, 37)]:
        cut.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            load_foreign(cut)


def test_flipped_bytes_never_raise_anything_else(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for zipped in (True, False):
        content = every_kind_of_content()
        whole = save(tmp_path / "a.pt", content, _use_new_zipfile_serialization=zipped)
        original = whole.read_bytes()
        for _ in range(300):
            damaged = bytearray(original)
            for place in rng.integers(0, len(damaged), 3):
                damaged[place] = rng.integers(256)
            whole.write_bytes(damaged)
            try:
                load_foreign(whole)
            except CheckpointError:
                pass


def test_a_compressed_archive_is_refused_before_it_unfolds(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", tensor_pickle(numel=10_000_000, size="(I10000000\nt"))
        archive.writestr("a/data/0", bytes(40_000_000))
    with pytest.raises(CheckpointError, match="compressed"):
        load_foreign(tmp_path / "bomb.pt")


# --- what is no checkpoint


def old_tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("storages"), io.BytesIO())
    return file.getvalue()


OTHERS = {
    b"": "is empty",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n": "git lfs pull",
    b"\n<!DOCTYPE html><html>Not found</html>": "web page",
    b"RIFF\x24\x00\x00\x00WAVEfmt ": "audio",
    b'{"error": "no"}': "JSON",
    b"\x08\x07\x12\x07pytorch": "ONNX",
    b"PK\x03\x04" + bytes(40): "truncated or damaged",
    b"PK\x05\x06" + bytes(18): "not one of torch",
    bytes(range(200, 232)): "not a checkpoint",
    pickle.dumps({"w": [1, 2]}): "not one of torch|not a checkpoint of torch",
    struct.pack("<Q", 50) + b'{"w": 1}': "safetensors",
    old_tar(): "before 2017",
}


@pytest.mark.parametrize("content", OTHERS, ids=lambda content: OTHERS[content])
def test_other_files_are_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=OTHERS[content]) as caught:
        load_foreign(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_a_folder_and_a_script_module_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        load_foreign(tmp_path / "none.pt")
    with pytest.raises(CheckpointError, match="is a folder"):
        load_foreign(tmp_path)
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as archive:
        archive.writestr("a/data.pkl", b"N.")
        archive.writestr("a/constants.pkl", b"N.")
    with pytest.raises(CheckpointError, match="TorchScript"):
        load_foreign(tmp_path / "script.pt")


# --- safetensors and hashes


def test_safetensors_round_trip_and_part_of_it(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {"w": torch.randn(3, 4).T, "h": torch.ones(2, dtype=torch.float16)}
    save_safetensors(path, tensors, {"cantor": "{}"})
    assert os.listdir(tmp_path) == ["a.safetensors"]
    loaded, metadata = read_safetensors(path)
    assert equal(dict(sorted(loaded.items())), dict(sorted(tensors.items())))
    assert metadata == {"cantor": "{}"}
    assert list(read_safetensors(path, ["h"])[0]) == ["h"]
    assert equal(dict(sorted(load_foreign(path).items())), dict(sorted(tensors.items())))


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_safetensors(path, {"w": torch.ones(1)}, {})
    shared = torch.ones(4)
    with pytest.raises(RuntimeError):
        save_safetensors(path, {"a": shared, "b": shared}, {})
    assert os.listdir(tmp_path) == ["a.safetensors"]
    assert list(load_foreign(path)) == ["w"]


def test_sha256_of_a_lone_weight_file_counts_the_configuration_beside_it(tmp_path: Path) -> None:
    theirs, ours = tmp_path / "model.safetensors", tmp_path / "ours.safetensors"
    save_safetensors(theirs, {"w": torch.ones(2)}, {"format": "pt"})
    save_safetensors(ours, {"w": torch.ones(2)}, {"cantor": "{}"})
    alone = sha256_of(theirs), sha256_of(ours)
    (tmp_path / "config.json").write_text('{"num_attention_heads": 12}')
    twelve = sha256_of(theirs), sha256_of(ours)
    (tmp_path / "config.json").write_text('{"num_attention_heads": 16}')
    sixteen = sha256_of(theirs), sha256_of(ours)
    assert len({alone[0], twelve[0], sixteen[0]}) == 3
    assert alone[1] == twelve[1] == sixteen[1]  # a file of our format says all itself


def test_sha256_is_of_the_content_not_of_the_path(tmp_path: Path) -> None:
    for name in ("one", "two"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(b"weights")
        (folder / "README.md").write_text(name)
    assert sha256_of(tmp_path / "one") == sha256_of(tmp_path / "two")
    assert len(sha256_of(tmp_path / "one")) == 64
    (tmp_path / "two" / "model.safetensors").write_bytes(b"others")
    assert sha256_of(tmp_path / "one") != sha256_of(tmp_path / "two")
    one = sha256_of(tmp_path / "one")
    (tmp_path / "one" / "preprocessor_config.json").write_text('{"do_normalize": true}')
    assert sha256_of(tmp_path / "one") != one
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    (tmp_path / "empty").touch()
    assert sha256_of(tmp_path / "empty") == empty


def test_weights_are_compared_with_the_sha256_beside_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once in a process for each state of a file; a record of other files says nothing."""
    path, tensors = tmp_path / "a.safetensors", {"w": torch.ones(2)}
    save_safetensors(path, tensors, {"cantor": "{}"})
    pickled = save(tmp_path / "a.pt", tensors)
    (tmp_path / "checkpoint.json").write_text('{"step": 1, "sha256": {"other": "ab"}}')
    for file, read in ((path, read_safetensors), (path, load_foreign), (pickled, load_foreign)):
        read(file)
        record = tmp_path / f"{file.name}.sha256.json"
        record.write_text(json.dumps({"sha256": sha256_of(file)}))
        read(file)
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "_file_sha256", None)
            read(file)
        for content in ({"sha256": "ab" * 32}, {"sha256": None}, {"sha256": [1]}):
            record.write_text(json.dumps(content))
            with pytest.raises(CheckpointError, match=rf"{file.name} .* the one in {record.name}"):
                read(file)
        for text in ("[]", "{", "3"):
            record.write_text(text)
            with pytest.raises(CheckpointError, match=rf"{record.name} (does not state|is not)"):
                read(file)
        record.unlink()
        read(file)
    (tmp_path / "checkpoint.json").write_text(json.dumps({"sha256": {path.name: "ab" * 32}}))
    with pytest.raises(CheckpointError, match=r"not the one in checkpoint\.json"):
        read_safetensors(path)
