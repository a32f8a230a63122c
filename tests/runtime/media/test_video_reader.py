"""Reading videos and images: counts, rates, times, rotation, colours, and one error sentence per unusable file."""

import struct
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scail2_rt.kernels.errors import InputError
from scail2_rt.runtime.media.images import load_image, load_mask_image
from scail2_rt.runtime.media.video_reader import VideoReader, probe_video
from tests.support.clips import flat, number_of, ramp, set_display_matrix, write_clip

NTSC_FILM, NTSC = Fraction(24000, 1001), Fraction(30000, 1001)


def read_all(path: Path, start: int = 0) -> np.ndarray:
    with VideoReader(path, start) as reader:
        return reader.read(1000)


@pytest.fixture
def dance(golden: Path) -> Path:
    folder = golden.parent / "cases" / "dance_001"
    if not folder.is_dir():
        pytest.skip(f"the real driving clip is not beside the golden data ({folder})")
    return folder


class TestProbe:
    @pytest.mark.parametrize("ending", ["mp4", "mkv", "avi", "mov"])
    @pytest.mark.parametrize("rate", [NTSC_FILM, NTSC, Fraction(25), Fraction(16), Fraction(60)])
    def test_constant_rate_is_exact(self, tmp_path: Path, rate: Fraction, ending: str) -> None:
        info = probe_video(write_clip(tmp_path / f"a.{ending}", ramp(23), rate))
        assert (info.frames, info.frame_rate, info.timestamps) == (23, rate, None)
        assert (info.width, info.height, info.audio, info.warnings) == (64, 48, False, ())

    def test_one_frame(self, tmp_path: Path) -> None:
        info = probe_video(write_clip(tmp_path / "a.mp4", ramp(1), 30))
        assert (info.frames, info.frame_rate, info.variable_frame_rate) == (1, 30, False)

    def test_two_frames_of_rounded_times_keep_the_rate(self, tmp_path: Path) -> None:
        assert probe_video(write_clip(tmp_path / "a.mkv", ramp(2), NTSC_FILM)).frame_rate == NTSC_FILM

    @pytest.mark.parametrize("ending", ["mp4", "mkv"])
    def test_variable_rate_keeps_times(self, tmp_path: Path, ending: str) -> None:
        milliseconds = [0, 40, 80, 200, 240, 400, 440, 441, 480, 900]
        path = write_clip(
            tmp_path / f"a.{ending}", ramp(10), 25, pts=milliseconds, time_base=Fraction(1, 1000), options={"bf": "0"}
        )
        info = probe_video(path)
        assert info.variable_frame_rate
        assert info.timestamps == tuple(Fraction(ms, 1000) for ms in milliseconds)
        with VideoReader(path) as reader:
            reader.read(4)
            reader.read(100)
            assert tuple(reader.timestamps) == info.timestamps

    def test_animated_webp_keeps_times_and_alpha(self, tmp_path: Path) -> None:
        pictures = np.full((3, 32, 48, 4), (200, 100, 50, 255), np.uint8)
        pictures[1:, :16, :, 3] = 0
        pictures[2, 30:] = (0, 0, 250, 255)  # the encoder merges equal frames
        first, *others = [Image.fromarray(picture) for picture in pictures]
        path = tmp_path / "a.webp"
        first.save(path, save_all=True, append_images=others, duration=[40, 300, 90], lossless=True, exact=True)
        assert probe_video(path).timestamps == (0, Fraction(40, 1000), Fraction(340, 1000))
        frames = read_all(path)
        assert frames[:, 0, 0].tolist() == [[200, 100, 50], [0, 0, 0], [0, 0, 0]]
        assert frames[:, 31, 0].tolist() == [[200, 100, 50], [200, 100, 50], [0, 0, 250]]

    def test_audio_is_detected(self, tmp_path: Path) -> None:
        assert probe_video(write_clip(tmp_path / "a.mp4", ramp(5), audio=[("aac", 44100, "mono")])).audio

    def test_file_cut_short(self, tmp_path: Path) -> None:
        noise = np.random.default_rng(0).integers(0, 255, (30, 48, 64, 3), dtype=np.uint8)
        path = write_clip(tmp_path / "a.mp4", noise, 25, container_options={"movflags": "faststart"})
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2])
        info = probe_video(path)
        assert 5 < info.frames < 20
        assert info.declared_frames == 30
        assert f"30 frames, but {info.frames} can be decoded" in info.warnings[0]
        assert len(read_all(path)) == info.frames

    def test_hdr_causes_a_warning(self, tmp_path: Path) -> None:
        path = write_clip(tmp_path / "a.mp4", ramp(3), pixel_format="yuv420p10le", transfer=16)
        assert "HDR" in probe_video(path).warnings[0]

    def test_real_clip(self, dance: Path) -> None:
        info = probe_video(dance / "driving.mp4")
        assert (info.frames, info.frame_rate, info.width, info.height) == (65, 16, 2048, 1080)
        with VideoReader(dance / "rendered.mp4", 60) as reader:
            assert reader.read(10).shape == (5, 512, 896, 3)
            assert reader.timestamps == [Fraction(i, 16) for i in range(60, 65)]


class TestReader:
    def test_reads_in_pieces_from_any_start(self, tmp_path: Path) -> None:
        path = write_clip(tmp_path / "a.mp4", ramp(20), NTSC)
        with VideoReader(path, 3) as reader:
            pieces = [reader.read(5), reader.read(7), reader.read(100), reader.read(4)]
        assert [len(piece) for piece in pieces] == [5, 7, 5, 0]
        assert [number_of(frame) for piece in pieces for frame in piece] == list(range(3, 20))
        assert reader.timestamps[:2] == [3 / NTSC, 4 / NTSC]
        assert pieces[3].shape == (0, 48, 64, 3)

    def test_start_beyond_the_end(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="has 4 frames, so it cannot start at frame 9"):
            VideoReader(write_clip(tmp_path / "a.mp4", ramp(4)), 9)

    @pytest.mark.parametrize("pixel_format", ["yuv420p", "yuv444p", "yuv420p10le", "yuvj420p"])
    def test_colours(self, tmp_path: Path, pixel_format: str) -> None:
        colours = flat([(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (200, 100, 50)])
        frames = read_all(write_clip(tmp_path / "a.mp4", colours, pixel_format=pixel_format))
        assert np.abs(frames.astype(int) - colours).max() <= 4

    @pytest.mark.parametrize("pixel_format", ["gray", "bgra", "rgb48le", "gray16le"])
    def test_grey_alpha_and_sixteen_bits(self, tmp_path: Path, pixel_format: str) -> None:
        grey = ramp(4)
        path = write_clip(tmp_path / "a.mkv", grey, codec="ffv1", pixel_format=pixel_format, options={})
        assert np.abs(read_all(path).astype(int) - grey).max() <= 1

    @pytest.mark.parametrize("codec", ["libvpx", "libvpx-vp9"])
    @pytest.mark.parametrize("start", [0, 3])
    def test_transparency_of_webm(self, tmp_path: Path, codec: str, start: int) -> None:
        """The transparent half, which stores green, is read as black; the rest equals an opaque file."""
        frames = np.concatenate([ramp(6), np.full((6, 48, 64, 1), 255, np.uint8)], axis=-1)
        frames[:, :, 32:] = (0, 255, 0, 0)
        options = {"auto-alt-ref": "0", "crf": "4", "b": "2M"}
        path = write_clip(tmp_path / "a.webm", frames, codec=codec, pixel_format="yuva420p", options=options)
        assert (probe_video(path).frames, probe_video(path).frame_rate) == (6, 25)
        with VideoReader(path, start) as reader:
            shown = reader.read(10)
            assert reader.timestamps == [Fraction(i, 25) for i in range(start, 6)]
        assert [number_of(frame[:, :28]) for frame in shown] == list(range(start, 6))
        assert shown[:, :, 36:].max() <= 2

    def test_transparency_of_webm_that_is_cut_short(self, tmp_path: Path) -> None:
        noise = np.random.default_rng(0).integers(0, 255, (20, 48, 64, 4), dtype=np.uint8)
        options = {"auto-alt-ref": "0", "crf": "4", "b": "2M"}
        path = write_clip(tmp_path / "a.webm", noise, codec="libvpx-vp9", pixel_format="yuva420p", options=options)
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        info = probe_video(path)
        assert 2 < info.frames < 18
        assert "cut short" in info.warnings[0]
        assert len(read_all(path)) == info.frames

    def test_odd_size(self, tmp_path: Path) -> None:
        path = write_clip(tmp_path / "a.mp4", ramp(3, 47, 65), pixel_format="yuv444p")
        assert read_all(path).shape == (3, 47, 65, 3)

    def test_square_pixels(self, tmp_path: Path) -> None:
        path = write_clip(tmp_path / "a.mp4", ramp(3, 48, 64), aspect=Fraction(3, 2))
        assert probe_video(path).width == 96
        assert read_all(path).shape == (3, 48, 96, 3)

    @pytest.mark.parametrize(
        ("matrix", "expected"),
        [
            ((1, 0, 0, 1), lambda p: p),
            ((0, 1, -1, 0), lambda p: np.rot90(p, -1)),  # a quarter clockwise, as phones write
            ((-1, 0, 0, -1), lambda p: np.rot90(p, 2)),
            ((0, -1, 1, 0), lambda p: np.rot90(p, 1)),
            ((-1, 0, 0, 1), lambda p: p[:, ::-1]),
            ((1, 0, 0, -1), lambda p: p[::-1]),
            ((0, 1, 1, 0), lambda p: p.transpose(1, 0, 2)),
        ],
    )
    def test_display_matrix(self, tmp_path: Path, matrix: tuple[int, int, int, int], expected: object) -> None:
        picture = np.zeros((48, 64, 3), np.uint8)
        picture[:24, :32], picture[:24, 32:], picture[24:, :32] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
        path = write_clip(tmp_path / "a.mp4", picture[None], pixel_format="yuv444p")
        set_display_matrix(path, *matrix)
        upright = expected(picture)  # type: ignore[operator]
        info = probe_video(path)
        assert (info.height, info.width) == upright.shape[:2]
        corners = (slice(8, None, upright.shape[0] - 17), slice(8, None, upright.shape[1] - 17))
        assert np.abs(read_all(path)[0][corners].astype(int) - upright[corners]).max() < 12


class TestUnusableVideo:
    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="does not exist"):
            probe_video(tmp_path / "none.mp4")

    def test_folder(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="is a folder"):
            VideoReader(tmp_path)

    def test_empty(self, tmp_path: Path) -> None:
        (tmp_path / "a.mp4").touch()
        with pytest.raises(InputError, match="is empty"):
            probe_video(tmp_path / "a.mp4")

    def test_text(self, tmp_path: Path) -> None:
        (tmp_path / "a.mp4").write_text("not a video\n" * 50)
        with pytest.raises(InputError, match=r"a\.mp4 cannot be opened as a video"):
            probe_video(tmp_path / "a.mp4")

    def test_index_lost(self, tmp_path: Path) -> None:
        path = write_clip(tmp_path / "a.mp4", ramp(5))
        path.write_bytes(path.read_bytes()[:-400])
        with pytest.raises(InputError, match="cut short"):
            probe_video(path)

    def test_audio_only(self, tmp_path: Path) -> None:
        source = write_clip(tmp_path / "a.mkv", ramp(5), audio=[("pcm_s16le", 8000, "mono")])
        import av

        with av.open(str(source)) as container, av.open(str(tmp_path / "b.wav"), "w") as out:
            track = out.add_stream("pcm_s16le", rate=8000, layout="mono")
            for frame in container.decode(audio=0):
                out.mux(track.encode(frame))
        with pytest.raises(InputError, match="no video stream"):
            probe_video(tmp_path / "b.wav")

    def test_no_decodable_frame(self, tmp_path: Path) -> None:
        path = write_clip(tmp_path / "a.mp4", ramp(3), container_options={"movflags": "faststart"})
        data = path.read_bytes()
        path.write_bytes(data[: data.index(b"mdat") + 8])
        with pytest.raises(InputError, match=r"none of its frames can be decoded|cannot be decoded at frame 0"):
            probe_video(path)

    def test_damage_names_the_frame(self, tmp_path: Path) -> None:
        path = write_clip(tmp_path / "a.mov", ramp(8), codec="png", pixel_format="rgb24", options={})
        data = bytearray(path.read_bytes())
        sixth = [i for i in range(len(data)) if data[i : i + 4] == b"IHDR"][5]
        data[sixth - 12 : sixth + 20] = bytes(32)
        path.write_bytes(data)
        with pytest.raises(InputError, match="cannot be decoded at frame 5"):
            probe_video(path)
        with VideoReader(path) as reader:
            assert len(reader.read(4)) == 4
            with pytest.raises(InputError, match="cannot be decoded at frame 5"):
                reader.read(10)


class TestImages:
    def test_formats(self, tmp_path: Path) -> None:
        pixels = flat([(200, 100, 50)])[0]
        for ending in ("png", "jpg", "webp", "bmp"):
            Image.fromarray(pixels).save(tmp_path / f"a.{ending}")
            loaded = load_image(tmp_path / f"a.{ending}")
            assert (loaded.shape, loaded.dtype) == ((48, 64, 3), np.uint8)
            assert np.abs(loaded.astype(int) - pixels).max() <= 3, ending

    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_exif_orientation(self, tmp_path: Path, orientation: int) -> None:
        upright = np.zeros((32, 48, 3), np.uint8)
        upright[:16, :24], upright[:16, 24:] = (255, 0, 0), (0, 255, 0)
        stored = {
            1: upright,
            2: upright[:, ::-1],
            3: upright[::-1, ::-1],
            4: upright[::-1],
            5: upright.transpose(1, 0, 2),
            6: np.rot90(upright, 1),
            7: upright[::-1, ::-1].transpose(1, 0, 2),
            8: np.rot90(upright, -1),
        }[orientation]
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "a.jpg", exif=exif, quality=95, subsampling=0)
        loaded = load_image(tmp_path / "a.jpg")
        assert loaded.shape == upright.shape
        assert np.abs(loaded.astype(int) - upright).mean() < 3

    def test_alpha(self, tmp_path: Path) -> None:
        pixels = np.zeros((4, 4, 4), np.uint8)
        pixels[:2] = (255, 0, 0, 255)
        pixels[2:] = (9, 9, 9, 0)
        Image.fromarray(pixels).save(tmp_path / "a.png")
        assert load_image(tmp_path / "a.png")[[0, 3], 0].tolist() == [[255, 0, 0], [255, 255, 255]]
        assert load_mask_image(tmp_path / "a.png")[[0, 3], 0].tolist() == [[255, 0, 0], [0, 0, 0]]

    def test_palette_with_transparency(self, tmp_path: Path) -> None:
        image = Image.new("P", (4, 4), 1)
        image.putpalette([0, 0, 0, 0, 255, 0])
        image.putpixel((0, 0), 0)
        image.save(tmp_path / "a.png", transparency=0)
        assert load_mask_image(tmp_path / "a.png")[0, :2].tolist() == [[0, 0, 0], [0, 255, 0]]
        assert load_image(tmp_path / "a.png")[0, 0].tolist() == [255, 255, 255]

    def test_grey(self, tmp_path: Path) -> None:
        Image.fromarray(np.full((4, 6), 77, np.uint8)).save(tmp_path / "a.png")
        assert load_image(tmp_path / "a.png").tolist() == np.full((4, 6, 3), 77).tolist()

    def test_sixteen_bits(self, tmp_path: Path) -> None:
        Image.fromarray(np.full((4, 6), 200 * 257, np.uint16)).save(tmp_path / "a.png")
        assert load_image(tmp_path / "a.png").tolist() == np.full((4, 6, 3), 200).tolist()
        Image.fromarray(np.full((4, 6), 60.0, np.float32)).save(tmp_path / "a.tiff")
        assert load_image(tmp_path / "a.tiff")[0, 0].tolist() == [60, 60, 60]

    def test_cmyk(self, tmp_path: Path) -> None:
        Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "a.jpg")
        assert load_image(tmp_path / "a.jpg")[4, 4].tolist() == pytest.approx([255, 0, 0], abs=6)

    def test_unusable(self, tmp_path: Path) -> None:
        (tmp_path / "a.png").write_text("hello")
        with pytest.raises(InputError, match="not an image"):
            load_image(tmp_path / "a.png")
        noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "b.png")
        (tmp_path / "b.png").write_bytes((tmp_path / "b.png").read_bytes()[:3000])
        with pytest.raises(InputError, match="damaged"):
            load_image(tmp_path / "b.png")
        with pytest.raises(InputError, match="does not exist"):
            load_image(tmp_path / "c.png")

    def test_size_bomb(self, tmp_path: Path) -> None:
        Image.new("1", (8, 8)).save(tmp_path / "a.png")
        data = bytearray((tmp_path / "a.png").read_bytes())
        struct.pack_into(">II", data, 16, 60000, 60000)
        import zlib

        struct.pack_into(">I", data, 29, zlib.crc32(data[12:29]))
        (tmp_path / "a.png").write_bytes(data)
        with pytest.raises(InputError, match="unusable image"):
            load_image(tmp_path / "a.png")
