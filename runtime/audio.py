"""The driving video's audio in the result, and the final file.

Every audio track is kept. A track whose codec mp4 players read is copied, packet by packet, untouched; any other is
encoded to AAC. The cut at the start is exact to the sample either way: packets up to `_PREROLL_S` before it are kept with
negative times, which mp4 stores as an edit list (the decoder needs them to warm up, the player does not play them); for
encoded tracks samples are cut. The cut at the end is exact for encoded tracks and at the next packet's end (about 20 ms)
for copied ones.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from scail2_rt.export.errors import InputError

_COPIED = frozenset({"aac", "mp3", "ac3", "eac3", "alac", "opus", "flac"})
_PREROLL_S = Fraction(1, 10)  # Opus wants 80 ms, AAC one or two packets, MP3 a few
_AAC_RATES = (96000, 88200, 64000, 48000, 44100, 32000, 24000, 22050, 16000, 12000, 11025, 8000, 7350)
_AAC_BIT_RATE = 192_000
