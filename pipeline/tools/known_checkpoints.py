"""Addresses of the encoders' checkpoints, with their published sizes and hashes.

A SHA-256 is listed only if others have published it for the file at this address: the publisher
(RVC, OpenAI), or several independent projects that pin it. Otherwise `sha256` is None.

Tested by tests/pipeline/tools/test_fetch.py.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RemoteFile:
    """A file to download. url: None if there is no public address. size: bytes."""

    name: str
    url: str | None
    size: int | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class KnownCheckpoint:
    """A checkpoint of one file, or of several files in a folder.

    encoders: values of `encoder.name` that it is for; empty for a speaker model.
    """

    files: tuple[RemoteFile, ...]
    encoders: tuple[str, ...]


_HUB = "https://huggingface.co"
_MOESS = f"{_HUB}/NaruseMioShirakana/MoeSS-SUBModel/resolve/main"  # so-vits-svc's README
_WAVLM = f"{_HUB}/microsoft/wavlm-base-plus/resolve/4c66d4806a428f2e922ccfa1a962776e232d487b"
_SV = f"{_HUB}/microsoft/wavlm-base-plus-sv/resolve/1bfd64eca136543feb28c5ffaf05381c6af33121"
_WHISPER = "https://openaipublic.azureedge.net/main/whisper/models"  # the SHA-256 is in the path
_WHISPER_MEDIUM = "345ae4da62f9b3d59415adc60127b97c714f32e89e936602e85993674d08dcb1"
_WHISPER_LARGE = "81f7c96c852ee8fc832187b0132e569d6c3065a3252ed18e56effd0b6a73e524"
_WAVLM_AZURE = (
    "https://valle.blob.core.windows.net/share/wavlm/WavLM-Base+.pt?sv=2020-08-04"
    "&st=2023-03-01T07%3A51%3A05Z&se=2033-03-02T07%3A51%3A00Z&sr=c&sp=rl"
    "&sig=QJXmSJG9DbMKf48UDIU1MfzIro8HQOf3sqlNXiflY1I%3D"
)
_CONTENTVEC = ("contentvec256l9", "contentvec256l12", "contentvec768l9", "contentvec768l12")


def _one(file: RemoteFile, *encoders: str) -> KnownCheckpoint:
    return KnownCheckpoint((file,), encoders)


CHECKPOINTS: dict[str, KnownCheckpoint] = {
    "contentvec": _one(
        RemoteFile(
            "checkpoint_best_legacy_500.pt",
            "https://ibm.ent.box.com/shared/static/z1wgl1stco8ffooyatzdwsqn2psd9lrr",
        ),
        *_CONTENTVEC,
    ),
    "contentvec-rvc": _one(  # the same network without the optimizer; RVC publishes the SHA-256
        RemoteFile(
            "hubert_base.pt",
            f"{_HUB}/lj1995/VoiceConversionWebUI/resolve/main/hubert_base.pt",
            189_507_909,
            "f54b40fd2802423a5643779c4861af1e9ee9c1564dc9d32f54f20b5ffba7db96",
        ),
        *_CONTENTVEC,
    ),
    "contentvec-best": _one(  # the Hub's own LFS id, pinned by many projects
        RemoteFile(
            "content-vec-best.bin",
            f"{_HUB}/lengyue233/content-vec-best/resolve/"
            "ab04aa7067b99ee05cc82499bc64916b980a1967/pytorch_model.bin",
            378_342_945,
            "d8dd400e054ddf4e6be75dab5a2549db748cc99e756a097c496c099f65a4854e",
        ),
        *_CONTENTVEC,
    ),
    "hubertsoft": _one(
        RemoteFile(
            "hubert-soft-0d54a1f4.pt",
            "https://github.com/bshall/hubert/releases/download/v0.1/hubert-soft-0d54a1f4.pt",
        ),
        "hubertsoft",
    ),
    "cnhubertlarge": _one(
        RemoteFile(
            "chinese-hubert-large-fairseq-ckpt.pt",
            f"{_HUB}/TencentGameMate/chinese-hubert-large/resolve/main/"
            "chinese-hubert-large-fairseq-ckpt.pt",
        ),
        "cnhubertlarge",
    ),
    "wavlm-base-plus": KnownCheckpoint(  # pinned by several projects
        (
            RemoteFile(
                "config.json",
                f"{_WAVLM}/config.json",
                2_232,
                "fea6df1c2700a3954fc07e70588aecc9055eeb28db2ff57151a2db0d19180ed4",
            ),
            RemoteFile(
                "preprocessor_config.json",
                f"{_WAVLM}/preprocessor_config.json",
                215,
                "99272fe8ccfab114b68b478681ea47ee3a1ce62bb788cb92dd6e4f69fb1f1da2",
            ),
            RemoteFile(
                "pytorch_model.bin",
                f"{_WAVLM}/pytorch_model.bin",
                377_617_425,
                "3bb273a6ace99408b50cfc81afdbb7ef2de02da2eab0234e18db608ce692fe51",
            ),
        ),
        ("wavlm-base-plus",),
    ),
    "wavlm-base-plus-original": _one(RemoteFile("WavLM-Base+.pt", _WAVLM_AZURE), "wavlm-base-plus"),
    "wavlm-large": _one(  # kNN-VC's copy; the same bytes are pinned from Microsoft's and S3PRL's
        RemoteFile(
            "WavLM-Large.pt",
            "https://github.com/bshall/knn-vc/releases/download/v0.1/WavLM-Large.pt",
            1_261_965_425,
            "6fb4b3c3e6aa567f0a997b30855859cb81528ee8078802af439f7b2da0bf100f",
        ),
        "wavlm-large",
    ),
    "dphubert": _one(
        RemoteFile(
            "DPHuBERT-sp0.75.pth", f"{_HUB}/pyf98/DPHuBERT/resolve/main/DPHuBERT-sp0.75.pth"
        ),
        "dphubert",
    ),
    "dpwavlm": _one(
        RemoteFile("DPWavLM-sp0.75.pth", f"{_HUB}/pyf98/DPHuBERT/resolve/main/DPWavLM-sp0.75.pth"),
        "dphubert",
    ),
    "whisper-ppg": _one(
        RemoteFile(
            "medium.pt",
            f"{_WHISPER}/{_WHISPER_MEDIUM}/medium.pt",
            1_528_008_539,
            _WHISPER_MEDIUM,
        ),
        "whisper-ppg",
    ),
    "whisper-ppg-large": _one(
        RemoteFile(
            "large-v2.pt",
            f"{_WHISPER}/{_WHISPER_LARGE}/large-v2.pt",
            3_086_999_982,
            _WHISPER_LARGE,
        ),
        "whisper-ppg-large",
    ),
    "contentvec256l9-onnx": _one(  # a copy whose SHA-256 two projects pin
        RemoteFile(
            "vec-256-layer-9.onnx",
            f"{_HUB}/ozada/onnx_rvc/resolve/main/vec-256-layer-9.onnx",
            None,
            "61d0d0598803f74d5a4bcba65ca367571889accc0e86196f0982e8e455d56393",
        ),
        "contentvec256l9-onnx",
    ),
    "contentvec256l12-onnx": _one(
        RemoteFile("vec-256-layer-12.onnx", f"{_MOESS}/vec-256-layer-12.onnx"),
        "contentvec256l12-onnx",
    ),
    "contentvec768l9-onnx": _one(
        RemoteFile("vec-768-layer-9.onnx", f"{_MOESS}/vec-768-layer-9.onnx"),
        "contentvec768l9-onnx",
    ),
    "contentvec768l12-onnx": _one(  # pinned by four projects
        RemoteFile(
            "vec-768-layer-12.onnx",
            f"{_MOESS}/vec-768-layer-12.onnx",
            377_655_729,
            "b3886e7dff1495cda514f94f4680a7b1261e05d6929f5c764cdb17934b413c2a",
        ),
        "contentvec768l12-onnx",
    ),
    "hubertsoft-onnx": _one(RemoteFile("hubert-soft.onnx", None), "hubertsoft-onnx"),
    "wavlm-base-plus-sv": KnownCheckpoint(  # for `xvector.checkpoint`
        (
            RemoteFile(
                "config.json",
                f"{_SV}/config.json",
                58_639,
                "c6ac8c0ce55b18d4612677931036fe5ce78093e87361c552a173f00a0bb07514",
            ),
            RemoteFile(
                "preprocessor_config.json",
                f"{_SV}/preprocessor_config.json",
                215,
                "99272fe8ccfab114b68b478681ea47ee3a1ce62bb788cb92dd6e4f69fb1f1da2",
            ),
            RemoteFile(
                "model.safetensors",
                f"{_SV}/model.safetensors",
                404_479_908,
                "94c3defe08248d81c7b2bd0a058ea9985269cefed13076434669c47fade41182",
            ),
        ),
        (),
    ),
}
