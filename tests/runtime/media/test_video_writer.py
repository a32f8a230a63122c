"""The written video: rate, times, colours, audio, and the files that remain after success, abort and errors."""

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections import namedtuple
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from scail2_rt.kernels.errors import InputError, Scail2Error
from scail2_rt.runtime.core.containers import MP4_ENDINGS
from scail2_rt.runtime.core.warnings import collecting
from scail2_rt.runtime.media.fragment_encoder import FragmentEncoder
from scail2_rt.runtime.media.output_path import check_writable
from scail2_rt.runtime.media.unfinished import part_ends
from scail2_rt.runtime.media.video_format import VideoFormat, check_codec
from scail2_rt.runtime.media.video_reader import VideoReader, probe_video
from scail2_rt.runtime.media.video_writer import VideoWriter
from scail2_rt.runtime.session.report import file_hash
from tests.support.clips import clicks_s, flat, number_of, ramp, write_clip
from tests.support.command import unmeasured

NTSC_FILM, NTSC = Fraction(24000, 1001), Fraction(30000, 1001)
SMALL = VideoFormat(64, 48, NTSC)


def write(path: Path, frames: np.ndarray, segment: int = 8, **options: object) -> Path:
    video = {name: options.pop(name) for name in ("codec", "crf") if name in options}
    if path.suffix in ("", ".gif"):
        video = {"codec": None, "crf": None}
    form = VideoFormat(64, 48, options.pop("rate", Fraction(25)), **video)  # type: ignore[arg-type]
    with VideoWriter(path, form, **options) as writer:  # type: ignore[arg-type]
        for begin in range(0, len(frames), segment):
            writer.write(frames[begin : begin + segment])
            writer.segment_done()
        return writer.finish()


def numbers(path: Path) -> list[int]:
    with VideoReader(path) as reader:
        return [number_of(frame) for frame in reader.read(1000)]


def only(folder: Path, *names: str) -> bool:
    return sorted(path.name for path in folder.iterdir()) == sorted(names)


class TestPicture:
    @pytest.mark.parametrize("rate", [NTSC_FILM, NTSC, Fraction(16), Fraction(25), Fraction(60), Fraction(359, 12)])
    def test_constant_rate_is_exact(self, tmp_path: Path, rate: Fraction) -> None:
        info = probe_video(write(tmp_path / "out.mp4", ramp(21), rate=rate))
        assert (info.frames, info.declared_frames, info.frame_rate, info.timestamps) == (21, 21, rate, None)
        assert only(tmp_path, "out.mp4")
        with av.open(str(tmp_path / "out.mp4")) as container:
            stream = container.streams.video[0]
            assert stream.duration * stream.time_base == 21 / rate
            assert stream.start_time == 0

    @pytest.mark.parametrize("codec", ["h264", "hevc", "av1", "vp9"])
    def test_every_codec_keeps_order_times_and_colours(self, tmp_path: Path, codec: str) -> None:
        times = [Fraction(sum(range(i)) * 1001, 90000) for i in range(2, 26)]  # frames of 1, 2, 3, ... ticks of 1001
        path = write(tmp_path / "out.mp4", ramp(24), codec=codec, timestamps=times)
        assert numbers(path) == list(range(24))
        assert probe_video(path).timestamps == tuple(t - times[0] for t in times)
        colours = flat(
            [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (200, 100, 50), (255, 255, 0)]
        )
        with VideoReader(write(tmp_path / "out.mp4", colours, codec=codec)) as reader:
            assert np.abs(reader.read(9).astype(int) - colours).max() <= 3

    def test_equal_frames_give_an_equal_file(self, tmp_path: Path) -> None:
        """The encoder is deterministic, which resuming requires. With x264's defaults this test fails within a dozen
        files."""
        files = {write(tmp_path / "out.mp4", ramp(24), 6).read_bytes() for _ in range(60)}
        assert len(files) == 1

    def test_tags(self, tmp_path: Path) -> None:
        with av.open(str(write(tmp_path / "out.mp4", ramp(3)))) as container:
            context = container.streams.video[0].codec_context
            assert (context.name, context.pix_fmt) == ("h264", "yuv420p")
            tags = (context.colorspace, context.color_primaries, context.color_trc, context.color_range)
            assert tags == (1, 1, 1, 1)

    def test_index_is_in_front(self, tmp_path: Path) -> None:
        data = write(tmp_path / "out.mp4", ramp(3)).read_bytes()
        assert 0 < data.index(b"moov") < data.index(b"mdat")

    def test_times_of_a_reader(self, tmp_path: Path) -> None:
        pts = [0, 33, 67, 100, 300, 333, 367, 400]
        source = write_clip(tmp_path / "in.mkv", ramp(8), 30, pts=pts, time_base=Fraction(1, 1000), options={"bf": "0"})
        info = probe_video(source)
        path = write(tmp_path / "out.mp4", ramp(6), 3, rate=info.frame_rate, timestamps=info.timestamps[2:])
        assert probe_video(path).timestamps == tuple(Fraction(ms - 67, 1000) for ms in pts[2:])

    def test_too_few_timestamps(self, tmp_path: Path) -> None:
        with (
            VideoWriter(
                tmp_path / "out.mp4", VideoFormat(64, 48, Fraction(25)), timestamps=[Fraction(0), Fraction(1)]
            ) as writer,
            pytest.raises(ValueError, match="only 2 timestamps"),
        ):
            writer.write(ramp(3))

    def test_wrong_frames(self, tmp_path: Path) -> None:
        with (
            VideoWriter(tmp_path / "out.mp4", VideoFormat(64, 48, Fraction(25))) as writer,
            pytest.raises(ValueError, match="uint8"),
        ):
            writer.write(ramp(3, 48, 66))

    def test_without_segment_marks(self, tmp_path: Path) -> None:
        with VideoWriter(tmp_path / "new" / "out.mp4", SMALL) as writer:
            writer.write(ramp(5))
            path = writer.finish()
        assert numbers(path) == [0, 1, 2, 3, 4]
        assert writer.abort() is None  # no partial file beside the result


class TestAudio:
    @pytest.mark.parametrize(
        ("codec", "rate", "ending", "expected", "within_s"),
        [
            ("aac", 44100, "mp4", "aac", 1e-4),
            ("aac", 22050, "mov", "aac", 1e-4),
            ("libmp3lame", 44100, "mkv", "mp3", 2e-3),  # Matroska counts in milliseconds
            ("flac", 48000, "mkv", "flac", 2e-3),
            ("pcm_s16le", 44100, "mov", "aac", 1e-3),
            ("pcm_s16le", 96000, "mkv", "aac", 1e-3),
            ("mp2", 44100, "ts", "aac", 1e-3),
        ],
    )
    @pytest.mark.parametrize(("start", "count"), [(0, 40), (0, 17), (9, 20)])
    def test_heard_at_the_same_time(
        self,
        tmp_path: Path,
        codec: str,
        rate: int,
        ending: str,
        expected: str,
        within_s: float,
        start: int,
        count: int,
    ) -> None:
        source = write_clip(
            tmp_path / f"in.{ending}", ramp(30).repeat(2, 0)[:40], NTSC_FILM, audio=[(codec, rate, "mono")]
        )
        begin = start / NTSC_FILM
        path = write(
            tmp_path / "out.mp4", ramp(20).repeat(2, 0)[:count], rate=NTSC_FILM, audio_from=source, start_s=begin
        )
        duration = count / NTSC_FILM
        heard = [second - float(begin) for second in clicks_s(source)]
        heard = [second for second in heard if 0 <= second + 1e-3 < duration]
        result = [second for second in clicks_s(path) if second < float(duration) - 0.001]
        assert len(result) == len(heard) > 1
        assert np.abs(np.array(result) - heard).max() < within_s
        with av.open(str(path)) as container:
            track = container.streams.audio[0]
            assert track.codec_context.codec.canonical_name == expected
            assert track.rate == rate
            missing_s = float(duration - track.duration * track.time_base)  # a source may end some packets early
            assert -1e-3 < missing_s < 0.03

    def test_packets_are_copied(self, tmp_path: Path) -> None:
        source = write_clip(tmp_path / "in.mp4", ramp(30), 25, audio=[("aac", 44100, "mono")])
        path = write(tmp_path / "out.mp4", ramp(30), audio_from=source)

        def packets(file: Path) -> list[tuple[int, bytes]]:
            with av.open(str(file)) as container:
                return [(packet.pts, bytes(packet)) for packet in container.demux(audio=0) if packet.size]

        assert packets(path) == packets(source)
        assert len(packets(path)) > 40

    def test_all_tracks(self, tmp_path: Path) -> None:
        tracks = [("aac", 48000, "stereo"), ("pcm_s16le", 11025, "mono")]
        source = write_clip(tmp_path / "in.mov", ramp(25), 25, audio=tracks)
        path = write(tmp_path / "out.mp4", ramp(25), audio_from=source)
        with av.open(str(path)) as container:
            kinds = [(track.codec_context.name, track.rate, track.channels) for track in container.streams.audio]
        assert kinds == [("aac", 48000, 2), ("aac", 11025, 1)]
        assert clicks_s(path, 0) == pytest.approx(clicks_s(path, 1), abs=1e-3)

    def test_sample_rates_that_aac_lacks(self, tmp_path: Path) -> None:
        source = write_clip(tmp_path / "in.mkv", ramp(20), 25, audio=[("pcm_s16le", 37800, "mono")])
        path = write(tmp_path / "out.mp4", ramp(20), audio_from=source)
        with av.open(str(path)) as container:
            assert container.streams.audio[0].rate == 44100
        assert clicks_s(path)[:3] == pytest.approx([0, 0.25, 0.5], abs=2e-3)

    def test_audio_longer_or_shorter_than_the_video(self, tmp_path: Path) -> None:
        for seconds in (8.0, 0.5):
            source = write_clip(tmp_path / "in.mp4", ramp(25), 25, audio=[("aac", 11025, "mono")], audio_s=seconds)
            with av.open(str(write(tmp_path / "out.mp4", ramp(25), audio_from=source))) as container:
                track = container.streams.audio[0]
                assert float(track.duration * track.time_base) == pytest.approx(min(seconds, 1.0), abs=0.1)
                assert container.duration == pytest.approx(1_000_000, abs=1000)

    def test_silent_source_and_unreadable_source(self, tmp_path: Path) -> None:
        source = write_clip(tmp_path / "in.mp4", ramp(5))
        with av.open(str(write(tmp_path / "out.mp4", ramp(5), audio_from=source))) as container:
            assert not container.streams.audio
        source.write_text("nothing")
        with pytest.raises(InputError, match=r"audio of .*in\.mp4 cannot be read"):
            VideoWriter(tmp_path / "other.mp4", VideoFormat(64, 48, Fraction(25)), audio_from=source)


class TestOtherKinds:
    """.mkv, .webm, .gif and folders of PNG files."""

    @pytest.mark.parametrize(
        ("name", "codec"), [("out.mkv", "h264"), ("out.mkv", "hevc"), ("out.webm", "vp9"), ("out.webm", "av1")]
    )
    def test_matroska_keeps_frames_times_and_comment(self, tmp_path: Path, name: str, codec: str) -> None:
        path = tmp_path / name
        made = {write(path, ramp(21), rate=NTSC_FILM, codec=codec, comment='{"a": 1}').read_bytes() for _ in range(2)}
        assert len(made) == 1  # no random identifiers in Matroska
        assert numbers(path) == list(range(21))
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            assert stream.codec_context.codec.canonical_name == codec
            assert (stream.average_rate, stream.start_time) == (NTSC_FILM, 0)
            assert container.duration == pytest.approx(1e6 * float(21 / NTSC_FILM), abs=1000)
            assert container.metadata["COMMENT"] == '{"a": 1}'
        times = [Fraction(sum(range(i)), 100) for i in range(2, 12)]
        written = write(path, ramp(10), codec=codec, timestamps=times)
        assert probe_video(written).timestamps == tuple(t - times[0] for t in times)
        assert only(tmp_path, name)

    @pytest.mark.parametrize("name", ["out.mkv", "out.webm"])
    @pytest.mark.parametrize(("codec", "rate"), [("aac", 44100), ("pcm_s16le", 22050)])
    @pytest.mark.parametrize(("start", "count"), [(0, 40), (9, 20)])
    def test_matroska_audio_is_opus_heard_at_the_same_time(
        self, tmp_path: Path, name: str, codec: str, rate: int, start: int, count: int
    ) -> None:
        source = write_clip(tmp_path / "in.mov", ramp(20).repeat(2, 0), NTSC_FILM, audio=[(codec, rate, "mono")])
        begin, duration = start / NTSC_FILM, count / NTSC_FILM
        frames = ramp(20).repeat(2, 0)[:count]
        path = write(tmp_path / name, frames, rate=NTSC_FILM, codec="vp9", audio_from=source, start_s=begin)
        heard = [second - float(begin) for second in clicks_s(source)]
        heard = [second for second in heard if 0 <= second + 1e-3 < duration]
        assert len(heard) > 1
        result = [second for second in clicks_s(path) if second < float(duration) - 0.001]
        assert np.abs(np.array(result) - heard).max() < 2e-3
        with av.open(str(path)) as container:
            track = container.streams.audio[0]
            assert (track.codec_context.name, track.rate, track.channels) == ("opus", 48000, 1)
            assert container.streams.video[0].start_time == 0

    def test_a_gif_has_one_palette_exact_times_and_a_comment(self, tmp_path: Path) -> None:
        colours = [(200, 30, 30), (30, 200, 30), (30, 30, 200), (250, 250, 250), (0, 0, 0), (90, 120, 60)]
        path = write(tmp_path / "out.gif", flat(colours), 3, rate=Fraction(16), comment="c" * 600)
        with VideoReader(path) as reader:
            assert np.abs(reader.read(9).astype(int) - flat(colours)).max() <= 6
        with Image.open(path) as image:
            assert (image.n_frames, image.info["loop"], image.info["comment"]) == (6, 0, b"c" * 600)
            shown_ms = []
            for number in range(6):
                image.seek(number)
                shown_ms.append(image.info["duration"])
        assert shown_ms == [60, 60, 70, 60, 60, 70]  # 1/16 s, rounded to 10 ms; the last frame lasts to the end
        again = write(tmp_path / "again.gif", flat(colours), 3, rate=Fraction(16), comment="c" * 600)
        assert again.read_bytes() == path.read_bytes()

    def test_a_gif_leaves_out_frames_that_players_would_slow_down(self, tmp_path: Path) -> None:
        said: list[str] = []
        with collecting(said):
            path = write(tmp_path / "out.gif", ramp(24), rate=Fraction(100))
        assert numbers(path) == list(range(0, 24, 2))
        assert said == [
            "GIF players show at most 50 frames per second, so 12 of 24 frames will be missing: use .webm to keep them."
        ]

    def test_png_files_are_lossless(self, tmp_path: Path) -> None:
        frames = np.random.default_rng(0).integers(0, 256, (9, 48, 64, 3), dtype=np.uint8)
        folder = write(tmp_path / "frames", frames, 4, comment="ü")
        assert only(folder, *(f"{number:06d}.png" for number in range(9)))
        for number, frame in enumerate(frames):
            with Image.open(folder / f"{number:06d}.png") as image:
                assert np.array_equal(np.asarray(image), frame)
                assert image.info["comment"] == "ü"
        assert only(tmp_path, "frames")

    def test_an_existing_folder_remains_until_it_is_replaced(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = write(tmp_path / "frames", ramp(5))
        old = {path.name: path.read_bytes() for path in folder.iterdir()}
        move, moves = os.replace, list[Path]()

        def fails_at_the_second(source: Path, target: Path) -> None:
            moves.append(Path(source))
            if len(moves) == 2:
                raise OSError(errno.ENOSPC, "No space left on device")
            move(source, target)

        monkeypatch.setattr(os, "replace", fails_at_the_second)
        with pytest.raises(Scail2Error, match="No space left"):
            write(folder, ramp(3))
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == old
        assert only(tmp_path, "frames", "frames.partial.mp4")
        monkeypatch.undo()
        write(folder, ramp(3))
        assert len(list(folder.iterdir())) == 3
        assert only(tmp_path, "frames")

    @pytest.mark.parametrize("name", ["out.mkv", "out.webm", "out.gif", "frames"])
    def test_a_partial_file_is_continued(self, tmp_path: Path, name: str) -> None:
        codec = {".mkv": "h264", ".webm": "vp9"}.get(Path(name).suffix)
        form, path = VideoFormat(64, 48, Fraction(25), codec), tmp_path / name

        def made(parts: tuple[int, ...], after: int = 0) -> VideoWriter:
            with VideoWriter(path, form, after=after) as writer:
                for begin in parts:
                    writer.write(ramp(24)[begin : begin + 6])
                    writer.segment_done(wait=True)
                if parts[-1] == 18:
                    writer.finish()
            return writer

        made((0, 6, 12, 18))
        whole = file_hash(path)
        (shutil.rmtree if path.is_dir() else os.unlink)(path)
        made((0, 6))
        assert only(tmp_path, f"{path.stem}.partial.mp4")
        made((12, 18), after=12)
        assert file_hash(path) == whole


class TestEndings:
    def test_abort_keeps_finished_segments_only(self, tmp_path: Path) -> None:
        writer = VideoWriter(tmp_path / "out.mp4", SMALL)
        for begin in (0, 7):
            writer.write(ramp(14)[begin : begin + 7])
            writer.segment_done()
        writer.write(ramp(20)[14:])
        assert writer.abort() == tmp_path / "out.partial.mp4"
        assert only(tmp_path, "out.partial.mp4")
        assert numbers(tmp_path / "out.partial.mp4") == list(range(14))
        assert probe_video(tmp_path / "out.partial.mp4").frame_rate == NTSC
        with pytest.raises(Scail2Error, match="closed"):
            writer.write(ramp(1))

    def test_exception_before_the_first_segment_leaves_nothing(self, tmp_path: Path) -> None:
        with contextlib.suppress(KeyboardInterrupt), VideoWriter(tmp_path / "out.mp4", SMALL) as writer:
            writer.write(ramp(9))
            raise KeyboardInterrupt
        assert writer.abort() is None
        assert only(tmp_path)

    def test_no_frames(self, tmp_path: Path) -> None:
        with (
            VideoWriter(tmp_path / "out.mp4", SMALL) as writer,
            pytest.raises(Scail2Error, match="no frame was generated"),
        ):
            writer.finish()
        assert only(tmp_path)

    def test_an_existing_output_remains_until_it_is_replaced(self, tmp_path: Path) -> None:
        old = write(tmp_path / "out.mp4", ramp(3)).read_bytes()
        (tmp_path / "out.partial.mp4").write_bytes(b"left by a crash")
        writer = VideoWriter(tmp_path / "out.mp4", SMALL)
        writer.write(ramp(4))
        writer.segment_done(wait=True)
        assert (tmp_path / "out.mp4").read_bytes() == old
        assert numbers(tmp_path / "out.partial.mp4") == [0, 1, 2, 3]
        writer.finish()
        assert numbers(tmp_path / "out.mp4") == [0, 1, 2, 3]
        assert only(tmp_path, "out.mp4")

    def test_a_stale_partial_file_is_not_reported(self, tmp_path: Path) -> None:
        (tmp_path / "out.partial.mp4").write_bytes(b"left by a crash")
        assert VideoWriter(tmp_path / "out.mp4", SMALL).abort() is None

    def test_disk_full_while_appending(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        writer = VideoWriter(tmp_path / "out.mp4", SMALL)
        writer.write(ramp(6))
        writer.segment_done(wait=True)

        def full(_: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        writer.write(ramp(6))
        writer.segment_done()
        with pytest.raises(Scail2Error, match=r"No space left.*finished segments are in .*out\.partial\.mp4"):
            writer.finish()
        assert writer.abort() == tmp_path / "out.partial.mp4"
        assert numbers(tmp_path / "out.partial.mp4") == list(range(6))
        assert only(tmp_path, "out.partial.mp4")

    def test_encoder_errors_are_raised_in_write(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def broken(*_: object) -> None:
            raise av.error.ExternalError(-542398533, "Generic error in an external library")

        monkeypatch.setattr(FragmentEncoder, "_encode", broken)
        writer = VideoWriter(tmp_path / "out.mp4", SMALL)
        with pytest.raises(Scail2Error, match=r"Encoding .* failed .*external library"):
            writer.write(ramp(30).repeat(10, 0))  # more frames than the queue holds
        assert writer.abort() is None
        assert only(tmp_path)

    def test_a_failed_finish_keeps_the_partial_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "replace", full)
        writer = VideoWriter(tmp_path / "out.mp4", SMALL)
        writer.write(ramp(6))
        with pytest.raises(Scail2Error, match=r"No space left.*audio in .*out\.partial\.mp4"):
            writer.finish()
        assert only(tmp_path, "out.partial.mp4")
        assert writer.abort() == tmp_path / "out.partial.mp4"

    def test_a_killed_process_leaves_finished_segments(self, tmp_path: Path) -> None:
        script = """
import sys, numpy as np
from fractions import Fraction
from pathlib import Path
from scail2_rt.runtime.media.video_format import VideoFormat
from scail2_rt.runtime.media.video_writer import VideoWriter
writer = VideoWriter(Path(sys.argv[1]), VideoFormat(64, 48, Fraction(30000, 1001)))
for k in range(3):
    writer.write(np.stack([np.full((48, 64, 3), 8 * (i + 1), np.uint8) for i in range(6 * k, 6 * k + 6)]))
    writer.segment_done(wait=True)
writer.write(np.zeros((20, 48, 64, 3), np.uint8))
print("ready", flush=True)
sys.stdin.read()
"""
        child = subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path / "out.mp4")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=unmeasured(),
        )
        assert child.stdout is not None
        assert child.stdout.readline().strip() == b"ready"
        child.send_signal(signal.SIGKILL)
        child.wait()
        partial = tmp_path / "out.partial.mp4"
        assert only(tmp_path, partial.name)
        assert numbers(partial) == list(range(18))
        info = probe_video(partial)
        assert (info.frame_rate, info.timestamps) == (NTSC, None)
        data = partial.read_bytes()
        partial.write_bytes(data[: data.rindex(b"mdat") + 100])  # killed in the middle of a write
        assert numbers(partial)[:12] == list(range(12))

    @pytest.mark.parametrize("codec", ["h264", "hevc", "av1", "vp9"])
    def test_a_partial_file_is_continued(self, tmp_path: Path, codec: str) -> None:
        """An incomplete part follows the complete ones, as after a power failure; the result equals that of one
        writer."""
        seen: list[int] = []
        whole = write(tmp_path / "whole.mp4", ramp(24), 6, codec=codec).read_bytes()
        with VideoWriter(tmp_path / "out.mp4", VideoFormat(64, 48, Fraction(25), codec)) as first:
            for begin in (0, 6, 12):
                first.write(ramp(24)[begin : begin + 6])
                first.segment_done(wait=True, save=seen.append)
        data = first.partial.read_bytes()
        ends = part_ends(first.partial)
        assert (len(ends), ends[-1]) == (3, len(data))
        for cut in (len(data) - 1, (ends[1] + ends[2]) // 2, ends[1] + 5):
            first.partial.write_bytes(data[:cut])
            assert part_ends(first.partial) == ends[:2]
            with VideoWriter(tmp_path / "out.mp4", VideoFormat(64, 48, Fraction(25), codec), after=12) as second:
                assert first.partial.stat().st_size == ends[1]
                second.write(ramp(24)[12:18])
                second.segment_done(save=seen.append)
                second.write(ramp(24)[18:])
                second.finish()
            assert (tmp_path / "out.mp4").read_bytes() == whole
        assert seen == [1, 2, 3, 3, 3, 3]

    def test_the_caller_does_not_wait_for_the_encoder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        encode, returned, encoded = FragmentEncoder._encode, threading.Event(), list[int]()

        def held_up(self: FragmentEncoder, number: int, frame: np.ndarray) -> None:
            assert returned.wait(60), "the caller waits for the encoder"
            encode(self, number, frame)
            encoded.append(number)

        monkeypatch.setattr(FragmentEncoder, "_encode", held_up)
        with VideoWriter(tmp_path / "out.mp4", SMALL) as writer:
            writer.write(ramp(20))
            writer.segment_done()
            assert encoded == []
            returned.set()
            writer.finish()
            assert encoded == list(range(20))
        assert numbers(tmp_path / "out.mp4") == list(range(20))


class TestChecks:
    def test_codec(self) -> None:
        with pytest.raises(InputError, match="'gif' is not supported: use one of h264, hevc, av1, vp9"):
            check_codec("gif", 18)
        with pytest.raises(InputError, match="must be 0 to 51"):
            check_codec("h264", 52)

    def test_codec_not_installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(av, "codecs_available", {"libx264"})
        with pytest.raises(InputError, match="no libx265 encoder"):
            check_codec("hevc", 18)

    def test_odd_size(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="must be even"):
            VideoFormat(65, 48, NTSC)

    def test_writable(self, tmp_path: Path) -> None:
        check_writable(tmp_path / "new" / "deeper" / "out.mp4", 1000)
        assert only(tmp_path)
        (tmp_path / "file").write_text("x")
        (tmp_path / "folder.mp4").mkdir()
        with pytest.raises(InputError, match="is a file, not a folder"):
            check_writable(tmp_path / "file" / "out.mp4")
        with pytest.raises(InputError, match="is a folder"):
            check_writable(tmp_path / "folder.mp4")
        with pytest.raises(InputError, match=r"must end in \.mp4, \.m4v or \.mov"):
            check_writable(tmp_path / "out.gif", endings=MP4_ENDINGS)
        with pytest.raises(InputError, match="is a file, and a folder of PNG files would replace it"):
            check_writable(tmp_path / "file")
        (tmp_path / "mine").mkdir()
        check_writable(tmp_path / "mine")
        (tmp_path / "mine" / "000000.png").write_text("")
        check_writable(tmp_path / "mine")
        (tmp_path / "mine" / "notes.txt").write_text("")
        with pytest.raises(InputError, match="holds files that are not frames"):
            check_writable(tmp_path / "mine")
        with pytest.raises(InputError, match="is not writable"):
            check_writable(Path("/proc/out.mp4"))

    def test_space(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(2**30, 2**29, 5 * 2**20))
        check_writable(tmp_path / "out.mp4", 5 * 2**20)
        with pytest.raises(InputError, match="5 MiB free and the output may need 6 MiB"):
            check_writable(tmp_path / "out.mp4", 6 * 2**20)
