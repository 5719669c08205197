"""Suffixes of files that are listed as songs.

A corpus is listed by name, so that no audio is read; the content of a file decides how it is
decoded. Every container from which libsndfile or FFmpeg reads sound has its suffixes here. Left
out are suffixes that mostly name other files (.mat, .htk, .dat, .bin, .str), raw samples
that do not state their rate (.raw, .pcm, .ul), and pictures, subtitles and video without sound.

Tested by tests/pipeline/songs/test_corpus.py.
"""

from __future__ import annotations

_AUDIO = """
    wav wave bwf bw64 rf64 w64 wavex amb aif aiff aifc aff flac alac caf au snd
    mp1 mp2 mp3 mpa m1a m2a mpga mpeg3 aac adts adt latm loas m4a m4b m4p m4r f4a f4b aax aaxc aa
    ogg oga ogx opus spx axa weba mka
    wma xwma asf ra ram ape apl mac wv wvc tta tak ofr shn rka osq bonk wa
    mpc mpp mp+ vqf vqe vql
    ac3 eac3 ec3 ac4 dts dtshd dtsma mlp thd truehd spdif
    amr awb 3ga qcp gsm g722 722 g723_1 g726 g728 g729 lc3 sbc msbc aptx aptxhd c2 codec2 ilbc lbc
    evc act dss iamf apc at3 at9 aa3 oma omg aea daud 302
    dsf dff wsd qoa dfpwm laf
    voc nist sph sf ircam avr pvf paf fap svx 8svx 16sv iff sd2 sds sdx wve xi hcom sox vox
    adx aax hca acm adp afc aix ads ss2 ast boa brstm bcstm bfstm binka fsb fwse genh kvag mca
    msf mtaf musx nsp redspark rsd rso scd sdns sdr2 svag svs vag vpk xvag xa xma xmd mmf way
"""
_VIDEO = """
    mp4 m4v mov qt mj2 3gp 3gpp 3g2 3gp2 f4v f4p ism isma ismv psp
    mkv mk3d webm ogv ogm axv avi divx wmv wtv dvr-ms flv kux swf
    mpg mpeg mpe m2p vob evo ts tsv tsa m2t m2ts mts trp
    mxf gxf nut nsv nuv rm rmvb ivr ty dv dif dav mods moflex bik bk2 smk roq usm xmv thp viv
    bmv yop lvf mvi
"""

AUDIO_SUFFIXES = frozenset(f".{name}" for name in f"{_AUDIO} {_VIDEO}".split())
