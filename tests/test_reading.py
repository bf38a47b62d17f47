"""Videos and pictures are read as a player and a viewer show them."""
import os, random, shutil, struct, subprocess
from io import BytesIO
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

import data
import model
from judging.vlm import frames_as_jpeg

pytest_plugins = "tests.helpers"


H, W = 64, 96                                              # of what is read; in the tests a clip is 4 s wide
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "yellow": (220, 220, 30)}


def ffmpeg(*arguments, frames=None):
    """Run ffmpeg, with `frames` (F,H,W,3) as its standard input where given."""
    done = subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *map(str, arguments)],
                          input=None if frames is None else np.ascontiguousarray(frames).tobytes(), capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def scene(times, height=H, width=W, aspect=W / H):
    """(F,height,width,3): a white bar that crosses what is seen of the picture in 4 s, from a tenth of it on, and a
    colour in each corner. Of a picture of another `aspect` than W : H the middle is seen."""
    y, x = (np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / width
    x = 0.5 + (x - 0.5) * max(1, aspect * H / W)
    y = 0.5 + (y - 0.5) * max(1, W / H / aspect)
    picture = np.full((height, width, 3), 90, np.uint8)
    for colour, rows, columns in zip(COLOURS.values(), (y < 0.3, y < 0.3, y > 0.7, y > 0.7),
                                     (x < 0.25, x > 0.75, x < 0.25, x > 0.75)):
        picture[np.ix_(rows, columns)] = colour
    band = ((y > 0.3) & (y < 0.7))[:, None]
    distance = np.abs(x - 0.1 - np.asarray(times)[:, None] / 4)                                    # (F,W)
    cover = (0.5 + (0.06 - distance) / (x[1] - x[0])).clip(0, 1)
    cover = (band * cover[:, None])[..., None]                                                     # (F,H,W,1)
    return (picture + cover * (255.0 - picture)).round().astype(np.uint8)


def write_scene(path, times, *arguments, rate=30, **shape):
    """A clip of the scene at `times`, encoded by ffmpeg's `arguments`."""
    frames = scene(times, **shape)
    ffmpeg("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{frames.shape[2]}x{frames.shape[1]}", "-r", rate, "-i", "-",
           *arguments, path, frames=frames)
    return path


def seen_times(video):
    """The time (F,) that the bar of each frame of (3,F,H,W) tells, after a check of the corners."""
    video = data.to_uint8(video).astype(int)
    corners = video[:, 2:9, 2:9], video[:, 2:9, -9:-2], video[:, -9:-2, 2:9], video[:, -9:-2, -9:-2]
    for found, colour in zip(corners, COLOURS.values()):
        assert np.abs(found.mean((1, 2)) - colour).max() < 40, (found[0, 3, 3], colour)
    white = (video[:, H // 2 - 4:H // 2 + 4].min(-1).mean(1) - 110).clip(0)                        # (F,W)
    return ((white * (np.arange(W) + 0.5)).sum(1) / white.sum(1) / W - 0.1) * 4


def video(path, frames=17, fps=8, **more):
    return data.read_video(path, frames, H, W, fps, **more)


PHONE = "-vf select='lt(mod(n*n*3,7),4)' -fps_mode passthrough -c:v libx264 -pix_fmt yuv420p"


@pytest.mark.parametrize("rate, arguments, frames, tolerance", [
    (30, PHONE, 17, 0.17),                                 # up to 4 frames are missing in a row
    (120, "-vf select='eq(n,1)+not(mod(n,4))' -fps_mode passthrough -c:v libx264", 17, 0.04),
    (8, "-c:v libx264", 17, 0.01), (24, "-c:v libx264 -g 12 -bf 3", 49, 0.01), (60, "-c:v libx264", 17, 0.02),
])
def test_frames_are_those_that_a_player_shows(rate, arguments, frames, tolerance, tmp_path):
    times = np.arange(round(frames / 8 * rate) + 1) / rate
    path = write_scene(tmp_path / "a.mp4", times, *arguments.split(), rate=rate)
    fps = 8 if frames == 17 else 24
    late = np.arange(frames) / fps - seen_times(video(path, frames, fps))
    assert late.min() > -0.015 and late.max() < tolerance


def test_a_clip_that_ends_at_the_last_instant_is_held_and_a_shorter_one_refused_with_its_length(tmp_path):
    for count in (60, 59):
        path = write_scene(tmp_path / f"{count}.mp4", np.arange(count) / 30, "-c:v", "libx264")
        assert abs(seen_times(video(path))[-1] - count / 30) < 0.05
    path = write_scene(tmp_path / "57.mkv", np.arange(57) / 30, "-c:v", "libx264")
    with pytest.raises(model.UserError, match=r"57.mkv: lasts 1.90 s, but 17 frames at 8 fps need 2.00 s"):
        video(path)
    path = write_scene(tmp_path / "slow.mp4", np.arange(78) / 1000, "-c:v", "libx264", rate=1000)
    with pytest.raises(model.UserError, match=r"lasts 0.08 s"):
        video(path)


def test_the_clip_starts_at_its_first_picture_whatever_comes_before(tmp_path):
    path = write_scene(tmp_path / "a.mov", np.arange(90) / 30, *"-f lavfi -i sine=d=4 -map 0:v -map 1:a -vf".split(),
                       "setpts=PTS+1/TB", "-c:v", "libx264")
    assert np.abs(seen_times(video(path)) - np.arange(17) / 8).max() < 0.04
    long = write_scene(tmp_path / "b.mp4", np.arange(120) / 30, "-c:v", "libx264", "-g", 15)
    ffmpeg("-ss", 1.2, "-i", long, "-c", "copy", tmp_path / "cut.mp4")     # an edit list hides what precedes 1.2 s
    assert np.abs(seen_times(video(tmp_path / "cut.mp4")) - 1.2 - np.arange(17) / 8).max() < 0.04


def test_interlaced_pictures_are_taken_apart(tmp_path):
    fields = np.arange(150) / 60
    arguments = "-vf interlace=lowpass=0 -flags +ildct+ilme -c:v libx264".split()
    path = write_scene(tmp_path / "a.mp4", fields, *arguments, rate=60, height=2 * H, width=2 * W)
    pictures = data.to_uint8(data.read_video(path, 17, 2 * H, 2 * W, 8)).astype(int)[:, H - 10:H + 10].sum(-1)
    combs = np.abs(pictures[:, 1:-1] * 2 - pictures[:, :-2] - pictures[:, 2:]).max((1, 2))
    assert np.median(combs) < 200 and np.abs(seen_times(video(path)) - np.arange(17) / 8).max() < 0.04


def test_pixels_that_are_not_square_and_rotation(tmp_path):
    times = np.arange(75) / 30
    seen_times(video(write_scene(tmp_path / "a.mp4", times, "-vf", "setsar=2", "-c:v", "libx264", width=W // 2)))
    turned = write_scene(tmp_path / "b.mp4", times, "-vf", "transpose=1", "-c:v", "libx264")
    ffmpeg("-display_rotation", 90, "-i", turned, "-c", "copy", tmp_path / "c.mp4")
    assert np.abs(seen_times(video(tmp_path / "c.mp4")) - np.arange(17) / 8).max() < 0.04


def write_hdr(path, times, transfer):
    to_hdr = ("scale=out_color_matrix=bt709,format=yuv444p,setparams=color_primaries=bt709:color_trc=bt709:"
              "colorspace=bt709,zscale=t=linear:npl=203,format=gbrpf32le,zscale=p=bt2020,"
              f"zscale=t={transfer}:m=bt2020nc:r=tv,format=yuv420p10le")
    tags = f"log-level=0:colorprim=bt2020:transfer={transfer}:colormatrix=bt2020nc"
    return write_scene(path, times, "-vf", to_hdr, "-c:v", "libx265", "-x265-params", tags)


@pytest.mark.parametrize("transfer", ["arib-std-b67", "smpte2084"])
def test_hdr_becomes_sdr(transfer, tmp_path):
    path = write_hdr(tmp_path / "a.mp4", np.arange(75) / 30, transfer)
    red, green, blue = data.to_uint8(video(path, 1))[0, 4, 4].astype(int)
    assert red > 120 and green < 60 and blue < 60, (red, green, blue)
    less = "hevc_metadata=colour_primaries=2:matrix_coefficients=2"
    for name, silent in (("file.mkv", less + ":transfer_characteristics=2"), ("transfer.ts", less)):
        ffmpeg("-i", path, "-c", "copy", "-bsf:v", silent, tmp_path / name)        # only the file tells, or half of it
        assert torch.equal(video(tmp_path / name, 1), video(path, 1)), name


SILENT = "h264_metadata=colour_primaries=2:transfer_characteristics=2:matrix_coefficients=2"    # takes the tags off


def test_colours_follow_what_the_file_says_and_hd_is_bt709_where_it_says_nothing(tmp_path):
    tagged = "scale=out_color_matrix=bt709,setparams=colorspace=bt709"
    for name, height, filters, bitstream in (("hd", 592, "scale=out_color_matrix=bt709", SILENT),
                                             ("wide", 480, "scale=out_color_matrix=bt709", SILENT),
                                             ("sd", 576, "scale=out_color_matrix=bt601", SILENT),
                                             ("full", 480, "scale=out_range=full:out_color_matrix=bt601", SILENT),
                                             ("tagged", 480, tagged, "null")):
        arguments = ["-vf", f"{filters},format=yuv420p", "-c:v", "libx264", "-preset", "ultrafast", "-bsf:v", bitstream]
        width = 1280 if name == "wide" else height * 3 // 2
        shape = dict(height=height, width=width, aspect=width / height)
        path = write_scene(tmp_path / f"{name}.mp4", [0, 0], *arguments, **shape)
        assert ("bt709" in data.read_video_header(path).pixels) == (name == "tagged")
        found = data.to_uint8(video(path, 1))[0, 4, 4].astype(int)
        assert np.abs(found - COLOURS["red"]).max() < 6, (name, found)
    ffmpeg("-i", path, "-c", "copy", "-bsf:v", SILENT, tmp_path / "file.mkv")      # whose pictures do not say it
    assert torch.equal(video(tmp_path / "file.mkv", 1), video(path, 1))


def write_transparent(path, *encoding, height=48, width=64):
    """One picture: its left half is red; its right half transparent, and what lies under that green."""
    frames = np.zeros((1, height, width, 4), np.uint8)
    frames[..., :width // 2, :] = 255, 0, 0, 255
    frames[..., width // 2:, :] = 0, 255, 0, 0
    ffmpeg("-f", "rawvideo", "-pix_fmt", "rgba", "-s", f"{width}x{height}", "-i", "-", *encoding, path, frames=frames)
    return path


@pytest.mark.parametrize("name, height, encoding", [
    ("a.webm", 48, "-pix_fmt yuva420p -c:v libvpx-vp9"), ("a.mov", 48, "-c:v png"),
    ("a.webm", 48, "-pix_fmt yuva420p -c:v libvpx -auto-alt-ref 0"), ("a.mkv", 48, "-pix_fmt yuva420p -c:v ffv1"),
    ("a.mkv", 592, "-vf scale=out_color_matrix=bt709 -pix_fmt yuva420p -c:v ffv1"),            # HD, untagged
])
def test_transparency_shows_white_and_not_what_lies_under_it(name, height, encoding, tmp_path):
    path = write_transparent(tmp_path / name, *encoding.split(), height=height)
    picture = data.to_uint8(data.read_video(path, 1, height, 64, 8))[0].astype(int)
    assert np.abs(picture[20, 50] - 255).max() < 6 and np.abs(picture[20, 10] - (255, 0, 0)).max() < 6


def mark_dolby_vision(path, profile, compatible):
    """Put Dolby Vision's box into an mp4 of HEVC with its index at the end; what it says changes no picture."""
    content = bytearray(path.read_bytes())
    index = content.rindex(b"moov")
    record = struct.pack(">BBHB19x", 1, 0, profile << 9 | 6 << 3 | 0b101, compatible << 4)
    box = struct.pack(">I4s", 8 + len(record), b"dvcC") + record
    place = content.index(b"hvcC", index) - 4
    place += int.from_bytes(content[place:place + 4])
    content[place:place] = box
    for name in (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd", b"hev1"):               # what it lies in
        start = content.index(name, index) - 4
        content[start:start + 4] = (int.from_bytes(content[start:start + 4]) + len(box)).to_bytes(4)
    path.write_bytes(content)


def test_dolby_vision_is_shown_by_its_base_or_refused_by_name(tmp_path):
    base = write_hdr(tmp_path / "a.mp4", [0, 0], "smpte2084")
    expected = video(base, 1)
    for profile, compatible in ((8, 1), (7, 6), (5, 0), (10, 0)):
        path = Path(shutil.copy(base, tmp_path / f"{profile}.mp4"))
        mark_dolby_vision(path, profile, compatible)
        if compatible:
            assert torch.equal(video(path, 1), expected)
        else:
            with pytest.raises(model.UserError, match=f"{profile}.mp4: is Dolby Vision of profile {profile}"):
                video(path, 1)


def test_a_language_model_is_shown_what_a_record_holds(tmp_path):
    vp9 = "-vf scale=out_color_matrix=bt709 -pix_fmt yuva420p -c:v libvpx-vp9 -deadline realtime -cpu-used 8".split()
    for path, height, width in ((write_scene(tmp_path / "wide.mp4", [0, 0], "-vf", "setsar=64/45"), 64, 137),
                                (write_hdr(tmp_path / "hdr.mp4", [0, 0], "smpte2084"), H, W),
                                (write_transparent(tmp_path / "hd.webm", *vp9, height=720, width=960), 576, 768)):
        shown = np.array(Image.open(BytesIO(frames_as_jpeg(path, 2)[0]))).astype(int)
        assert shown.shape == (height, width, 3), path
        record = data.to_uint8(data.read_video(path, 1, height, width, 8))[0]
        assert np.abs(shown - record).mean() < 4 and np.abs(shown - record).mean((0, 1)).max() < 5, path


def test_a_large_picture_is_averaged_without_aliasing(tmp_path):
    stripes = np.zeros((17, 256, 384, 3), np.uint8)
    stripes[:, ::2] = 255                                  # a picture of every second row would be black or white
    arguments = "-f rawvideo -pix_fmt rgb24 -s 384x256 -r 8 -i - -c:v ffv1".split()
    ffmpeg(*arguments, tmp_path / "a.mkv", frames=stripes)
    Image.fromarray(stripes[0]).save(tmp_path / "a.png")
    for pixels in (data.to_uint8(video(tmp_path / "a.mkv")), data.to_uint8(data.read_image(tmp_path / "a.png", H, W))):
        assert np.abs(pixels.astype(int) - 127).max() <= 2


X265 = "-c:v libx265 -x265-params log-level=0"
ANY = {                                                    # encoders whose decoders differ in what they say of flaws
    "h264.mp4": "-c:v libx264 -g 30", "h264.ts": "-c:v libx264 -g 30", "hevc.ts": X265,
    "mpeg2.ts": "-c:v mpeg2video -q:v 3 -bf 2", "vp9.webm": "-c:v libvpx-vp9 -deadline realtime -cpu-used 8",
    "av1.webm": "-c:v libaom-av1 -usage realtime -cpu-used 8", "mjpeg.mov": "-c:v mjpeg", "ffv1.mkv": "-c:v ffv1",
    "theora.ogv": "-c:v libtheora", "gif.gif": "",
}
SEEDS = int(os.environ.get("PROPERTY", 1))


def flipped(path, begin, end, flips=60, seed=0):
    """A copy of a file with some bits flipped in a part of it."""
    content, rng = bytearray(path.read_bytes()), random.Random(seed)
    for _ in range(flips):
        content[rng.randrange(int(len(content) * begin), int(len(content) * end))] ^= 1 << rng.randrange(8)
    copy = path.with_name(f"flipped{path.suffix}")
    copy.write_bytes(content)
    return copy


@pytest.mark.parametrize("kind", ANY)
def test_damage_inside_the_clip_is_refused_and_behind_it_does_not_matter(kind, tmp_path):
    path = tmp_path / f"a{Path(kind).suffix}"
    ffmpeg("-f", "lavfi", "-i", "testsrc2=s=96x64:r=15:d=5", *ANY[kind].split(), path)
    film, flips = data.read_video_header(path), 60
    if kind == "hevc.ts":                                  # whose decoder takes most for pictures
        flips = 600
    for seed in range(SEEDS):
        with pytest.raises(model.UserError, match="flipped.*: (is damaged|lasts)"):
            video(flipped(path, 0.05, 0.35, flips, seed), film=film)       # the clip ends at 2 s of 5
        if kind != "theora.ogv":                           # of which ffmpeg reads 5 s before it begins
            assert torch.equal(video(flipped(path, 0.6, 0.95, flips, seed), film=film), video(path, film=film))
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 5])
    with pytest.raises(model.UserError, match="a.*: (is damaged|lasts)"):
        video(path)


def test_a_damaged_beginning_is_not_taken_for_a_recording_that_begins_later(tmp_path):
    path = tmp_path / "a.mp4"
    ffmpeg("-f", "lavfi", "-i", "testsrc2=s=96x64:r=15:d=5,noise=alls=20", "-c:v", "libx264", "-g", 15, "-bsf:v",
           "filter_units=remove_types=6", path)            # without the words of the encoder
    film = data.read_video_header(path)
    for seed in range(2 * SEEDS):
        with pytest.raises(model.UserError, match="flipped.*: is damaged"):
            video(flipped(path, 0.005, 0.04, 20, seed), film=film)


def test_packets_that_never_arrived_are_damage_though_a_decoder_passes_over_them(tmp_path):
    path = tmp_path / "a.ts"
    ffmpeg("-f", "lavfi", "-i", "testsrc2=s=96x64:r=30:d=3,noise=alls=20", *X265.split(), path)
    content, film = path.read_bytes(), data.read_video_header(path)
    for place in range(10, 10 + 3 * SEEDS):
        gap = len(content) // 188 * place // (20 + 6 * SEEDS) * 188        # in the first half
        while content[gap + 1] & 31 != 1:                  # it is a packet of tables, not of pictures
            gap += 188
        (tmp_path / "b.ts").write_bytes(content[:gap] + content[gap + 3 * 188:])
        with pytest.raises(model.UserError, match="b.ts: is damaged"):
            video(tmp_path / "b.ts", film=film)


@pytest.mark.parametrize("begin, decoded, shown", [
    (1.5, 13, True), (1.5, 11, True),                      # behind the key at 1 s, from which 1.5 s is made
    (1.5, 10, False), (1.5, 5, False), (1.0, 10, False),   # before it
    (1.5, 25, True), (1.5, 26, False)])                    # the clip ends at 2.5 s
def test_what_lies_between_a_whole_picture_and_the_end_of_the_clip_is_needed(begin, decoded, shown):
    """Of ten pictures a second, a key every second. The complaint comes when so many have been decoded."""
    pictures = [data.Picture(i / 10, 0.1, key=i % 10 == 0) for i in range(40)]
    complaint = "[h264 @ 0x1] [error] error while decoding", decoded, decoded
    times = [picture.time for picture in pictures]
    found = data.find_damage(times, pictures, [complaint], begin, begin + 1, cut=False)
    assert found == ("error while decoding" if shown else None)


OPEN = "-c:v libx264 -bf 2 -x264-params open-gop=1:keyint=30:min-keyint=30:scenecut=0"
CUTS = {                                                   # an encoding, and how the beginning is cut off
    "mpeg2.ts": ("-c:v mpeg2video -q:v 2 -bf 2 -g 15", "bytes"), "hevc.ts": (X265 + ":keyint=15", "bytes"),
    "mpeg2.mpg": ("-c:v mpeg2video -q:v 2 -bf 2 -g 15", "bytes"), "h264.ts": ("-c:v libx264 -bf 2 -g 15", "bytes"),
    "mpeg4.ts": ("-c:v mpeg4 -q:v 2 -bf 2 -g 15", "bytes"), "open.mp4": (OPEN, "1.1"), "open.mkv": (OPEN, "1.3"),
}


@pytest.mark.parametrize("kind", CUTS)
def test_a_recording_begins_with_its_first_whole_picture(kind, tmp_path):
    encoding, place = CUTS[kind]
    path, cut = tmp_path / f"a.{kind.split('.')[1]}", tmp_path / f"cut.{kind.split('.')[1]}"
    write_scene(path, np.arange(120) / 30, *encoding.split())
    if place == "bytes":
        cut.write_bytes(path.read_bytes()[path.stat().st_size // 6:])
    else:
        ffmpeg("-ss", place, "-i", path, "-c", "copy", cut)
    film = data.read_video_header(cut)
    times = seen_times(video(cut, film=film))
    assert times[0] > 0.4 and np.abs(times - times[0] - np.arange(17) / 8).max() < 0.04
    if kind != "hevc.ts":                                  # whose decoder takes most flips for pictures
        for seed in range(SEEDS):
            with pytest.raises(model.UserError, match="flipped.*: (is damaged|lasts)"):
                video(flipped(cut, 0.3, 0.5, 20, seed), film=film)


@pytest.mark.parametrize("encoding", ["-c:v mpeg2video -q:v 2 -bf 2", X265])
def test_two_recordings_that_are_joined(encoding, tmp_path):
    for name, begin in (("first", 0), ("second", 1)):
        write_scene(tmp_path / f"{name}.ts", begin + np.arange(45) / 30, *encoding.split())
    first, second = ((tmp_path / f"{name}.ts").read_bytes() for name in ("first", "second"))
    (tmp_path / "joined.ts").write_bytes(first + second)
    assert np.abs(seen_times(video(tmp_path / "joined.ts"))[:17] - np.where(np.arange(17) < 12, 0, -0.5)
                  - np.arange(17) / 8).max() < 0.04
    (tmp_path / "cut.ts").write_bytes(first[:len(first) // 376 * 188] + second[len(second) // 564 * 188:])
    with pytest.raises(model.UserError, match="cut.ts: is damaged"):                           # both lack pictures
        video(tmp_path / "cut.ts")


@pytest.mark.parametrize("name, encoding", [
    ("a.mp4", OPEN), ("a.ts", X265 + ":keyint=20"), ("a.mpg", "-c:v mpeg2video -q:v 2 -bf 2 -g 300"),
    ("a.webm", "-c:v libvpx-vp9 -deadline realtime -cpu-used 8 -g 100"),
])
def test_a_clip_from_the_middle_of_a_film(name, encoding, tmp_path):
    path = write_scene(tmp_path / name, np.arange(240) / 30 - 4.5, *encoding.split())          # to 3.5 s
    film = data.read_video_header(path)
    for start in (4.5, 5.47, 5.77):
        found = seen_times(video(path, start=start, film=film))
        assert np.abs(found - (start - 4.5) - np.arange(17) / 8 + 0.017).max() < 0.035, start
    for start in (6.1, 5000):
        message = rf"lasts 8.0\d s, but 17 frames at 8 fps from {start} s on need {start + 2:.2f} s"
        with pytest.raises(model.UserError, match=message):
            video(path, start=start, film=film)


def test_a_clip_starts_with_the_picture_that_is_on_show_then(tmp_path):
    few = "-vf select='eq(n,0)+eq(n,45)+gt(n,60)' -fps_mode passthrough -c:v libx264"
    still = write_scene(tmp_path / "a.mp4", np.arange(75) / 30, *few.split())
    found = seen_times(video(still, 5, start=1.2))         # to 1.7 s
    assert np.abs(found - (0, 0, 0, 1.5, 1.5)).max() < 0.02
    later = "-f lavfi -i sine=d=4 -map 0:v -map 1:a -vf setpts=PTS+1/TB -c:v libx264"
    late = write_scene(tmp_path / "b.mov", np.arange(75) / 30, *later.split())
    assert torch.equal(video(late, 5, start=0.5), video(late, 5))      # there is no picture before 1 s
    assert abs(seen_times(video(late, 5, start=1.5))[0] - 0.5) < 0.04


def test_odd_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("-a.mp4", "a:b.mp4", "50%03d.mp4"):
        write_scene(tmp_path / name, np.arange(75) / 30, "-c:v", "libx264")
        seen_times(video(Path(name)))
    Image.fromarray(scene([0])[0]).save("cover.png")
    ffmpeg("-i", "cover.png", "-i", "file:a:b.mp4", "-map", 0, "-map", 1, "-c:v:1", "copy", "-c:v:0", "png",
           "-disposition:v:0", "attached_pic", "covered.mp4")
    assert seen_times(video(Path("covered.mp4")))[-1] > 1.9            # the film, not its cover
    ffmpeg("-f", "lavfi", "-i", "sine=d=3", "-i", "cover.png", "-map", 0, "-map", 1, "-c:v", "png", "-disposition:v",
           "attached_pic", "song.m4a")
    for name, found in (("song.m4a", "no moving picture"), ("nowhere.mp4", "no such video"),
                        ("cover.png", "lasts 0.0")):
        with pytest.raises(model.UserError, match=f"{name}: .*{found}"):
            video(Path(name))
    for name, height in (("small.ts", 48), ("large.ts", 96)):
        write_scene(tmp_path / name, np.arange(45) / 30, "-c:v", "libx264", height=height, width=96)
    Path("list").write_text("file small.ts\nfile large.ts\n")
    ffmpeg("-f", "concat", "-i", "list", "-c", "copy", "both.mkv")
    with pytest.raises(model.UserError, match="both.mkv: changes the size"):
        video(Path("both.mkv"))


WORDS = ["Vamos, ya es hora", "alpha_mode      : 1", "Duration: 00:00:00.10, start: 0.000000", "Stream mapping:",
         "[h264 @ 0x1] [error] corrupt decoded frame, Reconfiguring", "[in#0 @ 0x1] [error] concealing 9, first frame",
         "  Stream #0:0: Video: h264, yuva420p(tv, bt2020nc/bt2020/smpte2084), 96x64 (attached pic)",
         "      DOVI configuration record: version: 1.0, profile: 5, level: 6, compatibility id: 0, compression: 0",
         "decoder -> pts:9 pts_time:9 duration_time:9 keyframe:1", "demuxer+ffmpeg -> pkt_pts_time:-9"]


def test_nothing_that_a_file_says_of_itself_passes_for_what_ffmpeg_says(tmp_path):
    hd = ["-vf", "scale=out_color_matrix=bt709,format=yuv420p", "-c:v", "libx264", "-preset", "ultrafast"]
    plain = write_scene(tmp_path / "plain.mkv", [0, 0.1, 0.2], *hd, rate=8, height=592, width=888)
    Image.new("RGBA", (64, 64), (0, 255, 0, 0)).save(tmp_path / "cover.png")
    texts = [*WORDS, "\n".join(WORDS), "[info]" + "\n[info]".join(WORDS)]
    titles = [["-metadata", f"{key}={text}"] for key, text in zip(("title", "artist", "comment", *"abcdefghi"), texts)]
    titles += [["-metadata:s:v:0", f"{key}={text}"] for key, text in zip(("title", "comment", *"abcdefghij"), texts)]
    told, cover = tmp_path / (" ".join(WORDS)[:200].replace("/", "") + ".mkv"), tmp_path / "cover.png"
    ffmpeg("-i", plain, "-i", cover, "-i", cover, "-map", 1, "-map", 0, "-map", 2, "-c", "copy", *sum(titles, []),
           "-disposition:v:0", "0", "-disposition:v:2", "attached_pic", f"file:{told}")
    assert data.read_video_header(told)._replace(stream="0:0") == data.read_video_header(plain)
    assert torch.equal(video(told, 3), video(plain, 3))
    assert np.abs(data.to_uint8(video(plain, 1))[0, 4, 4].astype(int) - COLOURS["red"]).max() < 6


def test_pictures_are_read_as_a_viewer_shows_them(tmp_path):
    upright = Image.fromarray(scene([0])[0])
    exif = Image.Exif()
    for orientation, stored in ((3, upright.rotate(180)), (6, upright.transpose(Image.Transpose.ROTATE_90)),
                                (5, upright.transpose(Image.Transpose.TRANSPOSE))):
        exif[0x0112] = orientation
        stored.save(tmp_path / f"exif{orientation}.jpg", exif=exif, quality=95, subsampling=0)
    upright.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    upright.save(tmp_path / "plain.bmp")
    upright.quantize(16).save(tmp_path / "palette.png")
    upright.save(tmp_path / "first.gif", save_all=True, append_images=[Image.new("RGB", upright.size)])
    upright.resize((3 * W, 3 * H), Image.Resampling.NEAREST).save(tmp_path / "large.webp", lossless=True)
    for path in tmp_path.iterdir():
        assert abs(seen_times(data.read_image(path, H, W))[0]) < 0.05, path


def test_transparent_grey_and_tagged_pictures(tmp_path):
    hidden = np.zeros((H, W, 4), np.uint8)
    hidden[:, W // 2:] = 255, 0, 0, 255
    hidden[:, :W // 2] = 0, 255, 0, 0
    Image.fromarray(hidden).save(tmp_path / "alpha.png")
    grey = np.linspace(0, 65535, W).astype(np.uint16)[None].repeat(H, 0)
    Image.fromarray(grey).save(tmp_path / "grey16.png")
    Image.fromarray(np.eye(H, W, dtype=bool)).save(tmp_path / "one.png")
    first, second, third = [data.to_uint8(data.read_image(tmp_path / name, H, W))[0]
                            for name in ("alpha.png", "grey16.png", "one.png")]
    assert (first[:, :W // 2 - 1] == 255).all() and (first[:, W // 2 + 1:] == (255, 0, 0)).all()
    assert np.abs(second[5, :, 1] - grey[5] / 257).max() < 1
    assert np.array_equal(third[..., 0], 255 * np.eye(H, W))
    swapped = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()       # red is green and the reverse
    swapped = swapped.replace(b"rXYZ", b"????", 1).replace(b"gXYZ", b"rXYZ", 1).replace(b"????", b"gXYZ", 1)
    Image.new("RGB", (W, H), (220, 30, 30)).save(tmp_path / "profile.png", icc_profile=swapped)
    red, green, _ = data.to_uint8(data.read_image(tmp_path / "profile.png", H, W))[0, 5, 5].astype(int)
    assert green > 180 and red < 80


@pytest.mark.parametrize("size", [(32, 96), (96, 32), (64, 64), (128, 384), (384, 128), (16, 48), (20, 16), (32, 32)])
def test_pictures_and_videos_cover_the_target_and_are_cut_at_the_centre(size, tmp_path):
    (h, w), side = size, min(size)                         # the largest centred square is green, the rest red
    picture = np.zeros((1, h, w, 3), np.uint8)
    picture[..., 0] = 255
    picture[:, (h - side) // 2:(h + side) // 2, (w - side) // 2:(w + side) // 2] = (0, 255, 0)
    Image.fromarray(picture[0]).save(tmp_path / "a.png")
    outs = [data.read_image(tmp_path / "a.png", 32, 32)]
    if w > h or h > 64:                                    # a video is scaled by the same rule in ffmpeg's words
        ffmpeg("-i", tmp_path / "a.png", tmp_path / "a.apng")
        outs.append(data.read_video(tmp_path / "a.apng", 1, 32, 32, 8))
    for out in outs:
        assert out.shape == (3, 1, 32, 32) and out.min() >= -1 and out.max() <= 1
        green = torch.tensor([-1.0, 1.0, -1.0])[:, None, None, None]
        torch.testing.assert_close(out[..., 2:-2, 2:-2], green.expand(3, 1, 28, 28), atol=0.02, rtol=0)


ENCODERS = {
    "h264.mp4": "-c:v libx264 -pix_fmt yuv420p", "h264.mov": "-c:v libx264 -pix_fmt yuv444p", "h264.ts": "-c:v libx264",
    "h264.mkv": "-c:v libx264 -pix_fmt yuv420p -bf 3", "hevc.ts": "-c:v libx265 -x265-params log-level=0",
    "vp9.webm": "-c:v libvpx-vp9 -deadline realtime -cpu-used 8 -b:v 2M", "vp8.webm": "-c:v libvpx -b:v 2M",
    "mpeg4.mp4": "-c:v mpeg4 -q:v 2 -bf 2", "mpeg4.avi": "-c:v mpeg4 -q:v 2", "mjpeg.mov": "-c:v mjpeg -q:v 2",
    "ffv1.mkv": "-c:v ffv1", "prores.mov": "-c:v prores -pix_fmt yuv422p10le", "wmv.wmv": "-c:v wmv2 -q:v 2",
    "gif.gif": "",
}


def random_clip(folder, seed):
    """A clip of the scene and the times of its pictures: any rate or none, start, rotation, pixels, size, codec."""
    rng = np.random.default_rng(seed)
    name = rng.choice(list(ENCODERS)).item()
    codec, suffix = name.split(".")
    rate = rng.choice([10, 12.5, 24, 25, 29.97, 30, 50, 60]).item()
    if suffix == "gif":
        rate = rng.choice([10, 20, 25]).item()
    times = np.arange(int(3 * rate)) / rate
    # avi, gif and wmv have no variable rate here, gif and wmv no shape of pixels, and only mp4 and mov a rotation
    variable = rng.random() < 0.5 and suffix not in ("avi", "gif", "wmv")
    factor = rng.integers(1, 7).item()
    n = np.arange(len(times))
    kept = (n * n * factor % 7 < 4) | (not variable)
    ratio = 1 if suffix in ("gif", "wmv") else rng.choice([1, 1, 2, 0.5, 4 / 3]).item()
    turns = rng.integers(4).item() if suffix in ("mp4", "mov") else 0
    height, width = (2 * rng.integers(32, 100, 2)).tolist()
    aspect = width * ratio / height
    shape = (width, height, 1 / aspect) if turns % 2 else (height, width, aspect)
    frames = np.rot90(scene(times, *shape), -turns, axes=(1, 2))
    start = rng.choice([0, 0, 0.5, 1.1]).item() if suffix in ("mp4", "mov", "mkv", "ts") else 0
    path = folder / name
    sound = ["-f", "lavfi", "-i", "sine=d=4", "-map", "0:v", "-map", "1:a"] if start else []
    select = f"mod(n*n*{factor},7)-4" if variable else "-1"
    ffmpeg("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", rate, "-i", "-", *sound,
           "-vf", f"select='lt({select},0)',setpts=PTS+{round(start * rate) / rate}/TB,setsar={ratio}",
           "-fps_mode", "passthrough", *ENCODERS[name].split(), path, frames=frames)
    if turns:
        turned = folder / f"turned.{suffix}"
        ffmpeg("-display_rotation", 90 * turns, "-i", path, "-c", "copy", turned)
        path = turned
    return path, times[kept], f"{name} {rate} fps, variable {variable}, from {start} s, {turns} turns, SAR {ratio}"


@pytest.mark.parametrize("seed", range(int(os.environ.get("PROPERTY", 5))))
def test_property_of_any_clip_the_picture_of_each_instant_is_read_upright(seed, tmp_path):
    path, times, kind = random_clip(tmp_path, seed)
    found = seen_times(data.read_video(path, 17, H, W, 8))
    instants = np.arange(17) / 8
    error = np.inf
    for rounding in (0, 0.002):                            # some formats round times to 1 ms
        shown = times[np.searchsorted(times, instants + rounding + 1e-6, side="right") - 1]
        error = np.minimum(error, np.abs(found - shown))
    assert error.max() < 0.035, (kind, error.round(3))
