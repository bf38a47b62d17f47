"""Videos and pictures are read as a player and a viewer show them, or refused in one line."""
import random, struct, subprocess
from contextlib import nullcontext
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from support import UserError, films
from support.films import read_image, read_video, to_uint8

pytest_plugins = "tests.helpers"

H, W = 64, 96                                              # of what is read; in the tests a clip is 4 s wide
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "yellow": (220, 220, 30)}
EIGHTHS = np.arange(17) / 8                                # the instants that are read

def ffmpeg(*arguments, pixels=b""):
    """Run ffmpeg, with `pixels` as its standard input."""
    program = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y"]
    subprocess.run([*program, *map(str, arguments)], input=pixels, check=True)

def scene(times, height=H, width=W):
    """(F,height,width,3): a colour in each corner, and a white bar that crosses the picture in 4 s, from a tenth on."""
    y, x = (np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / width
    picture = np.full((height, width, 3), 90, np.uint8)
    for colour, rows, columns in zip(COLOURS.values(), (y < 0.3, y < 0.3, y > 0.7, y > 0.7),
                                     (x < 0.25, x > 0.75, x < 0.25, x > 0.75)):
        picture[np.ix_(rows, columns)] = colour
    band = ((y > 0.3) & (y < 0.7))[:, None, None]                                                  # (H,1,1)
    distance = np.abs(x - 0.1 - np.asarray(times)[:, None] / 4)                                    # (F,W)
    cover = band * (0.5 + (0.06 - distance) / (x[1] - x[0])).clip(0, 1)[:, None, :, None]          # (F,H,W,1)
    return (picture + cover * (255.0 - picture)).round().astype(np.uint8)

def write_scene(path, times, arguments, rate=30, height=H, width=W):
    """A clip of the scene at `times`, encoded by ffmpeg's `arguments`."""
    raw = f"-f rawvideo -pix_fmt rgb24 -s {width}x{height} -r {rate} -i - {arguments}"
    ffmpeg(*raw.split(), path, pixels=scene(times, height, width).tobytes())
    return path

def seen_times(video):
    """The time (F,) that the bar of each frame of (3,F,H,W) tells, after a check of the corners."""
    video = to_uint8(video).astype(int)
    corners = video[:, 2:9, 2:9], video[:, 2:9, -9:-2], video[:, -9:-2, 2:9], video[:, -9:-2, -9:-2]
    for found, colour in zip(corners, COLOURS.values()):
        assert np.abs(found.mean((1, 2)) - colour).max() < 40, (found[0, 3, 3], colour)
    white = (video[:, H // 2 - 4:H // 2 + 4].min(-1).mean(1) - 110).clip(0)                        # (F,W)
    return ((white * (np.arange(W) + 0.5)).sum(1) / white.sum(1) / W - 0.1) * 4

def video(path, frames=17, fps=8, **more):
    return read_video(path, frames, H, W, fps, **more)

def red_corner(pixels):
    return to_uint8(pixels)[0, 4, 4].astype(int)

H264 = "-c:v libx264"
OPEN = "-c:v libx264 -bf 2 -x264-params open-gop=1:keyint=30:min-keyint=30:scenecut=0"
X265 = "-c:v libx265 -x265-params log-level=0"
MPEG2 = "-c:v mpeg2video -q:v 2 -bf 2 -g 15"
VP9 = "-c:v libvpx-vp9 -deadline realtime -cpu-used 8 -g 100"
PART = "-fps_mode passthrough -c:v libx264 -vf select="     # with a variable frame rate

@pytest.mark.parametrize("name, rate, arguments, fps, tolerance", [
    ("phone.mp4", 30, PART + "'lt(mod(n*n*3,7),4)'", 8, 0.17),             # up to 4 frames are missing in a row
    ("phone.mov", 120, PART + "'eq(n,1)+not(mod(n,4))'", 8, 0.04),
    ("film.mkv", 24, "-c:v libx264 -g 12 -bf 3", 24, 0.01), ("film.ts", 29.97, X265, 8, 0.05),
    ("film.webm", 60, VP9, 8, 0.03), ("camera.mov", 50, "-c:v prores -pix_fmt yuv422p10le", 8, 0.03),
    ("old.avi", 12.5, "-c:v mpeg4 -q:v 2", 8, 0.085), ("oblong.mp4", 25, "-vf scale=48:64,setsar=2 " + H264, 8, 0.05)])
def test_frames_are_those_that_a_player_shows(name, rate, arguments, fps, tolerance, tmp_path):
    path = write_scene(tmp_path / name, np.arange(round(2.1 * rate)) / rate, arguments, rate=rate)
    late = np.arange(2 * fps + 1) / fps - seen_times(video(path, 2 * fps + 1, fps))
    assert late.min() > -0.015 and late.max() < tolerance

def test_a_clip_that_ends_at_the_last_instant_is_held_and_a_shorter_one_refused_with_its_length(tmp_path):
    for count in (60, 59):
        path = write_scene(tmp_path / f"{count}.mp4", np.arange(count) / 30, H264)
        assert abs(seen_times(video(path))[-1] - count / 30) < 0.05
    for count, rate, length in ((57, 30, "1.90"), (78, 1000, "0.08")):
        path = write_scene(tmp_path / f"{count}.mkv", np.arange(count) / rate, H264, rate=rate)
        with pytest.raises(UserError, match=rf"{count}.mkv: lasts {length} s, but 17 frames .* need 2.00 s"):
            video(path)

def test_a_clip_starts_at_its_first_picture_or_with_the_one_that_is_on_show_at_its_start(tmp_path):
    late = write_scene(tmp_path / "late.mov", np.arange(90) / 30,
                       "-f lavfi -i sine=d=4 -map 0:v -map 1:a -vf setpts=PTS+1/TB -c:v libx264")
    assert np.abs(seen_times(video(late)) - EIGHTHS).max() < 0.04
    assert torch.equal(video(late, 5, start=0.5), video(late, 5))      # there is no picture before 1 s
    long = write_scene(tmp_path / "long.mp4", np.arange(120) / 30, "-c:v libx264 -g 15")
    ffmpeg("-ss", 1.2, "-i", long, "-c", "copy", tmp_path / "cut.mp4")     # an edit list hides what precedes 1.2 s
    assert np.abs(seen_times(video(tmp_path / "cut.mp4")) - 1.2 - EIGHTHS).max() < 0.04
    still = write_scene(tmp_path / "still.mp4", np.arange(75) / 30, PART + "'eq(n,0)+eq(n,45)+gt(n,60)'")
    assert np.abs(seen_times(video(still, 5, start=1.2)) - (0, 0, 0, 1.5, 1.5)).max() < 0.02           # to 1.7 s

@pytest.mark.parametrize("name, encoding", [
    ("a.mp4", OPEN), ("a.ts", X265 + ":keyint=20"), ("a.mpg", MPEG2.replace("15", "300")), ("a.webm", VP9)])
def test_a_clip_from_the_middle_of_a_film(name, encoding, tmp_path):
    path = write_scene(tmp_path / name, np.arange(240) / 30 - 4.5, encoding)                   # to 3.5 s
    for start in (4.5, 5.47, 5.77):
        found = seen_times(video(path, start=start))
        assert np.abs(found - (start - 4.5) - EIGHTHS + 0.017).max() < 0.035, start
    for start in (6.1, 5000):
        with pytest.raises(UserError, match=rf"lasts 8.0\d s, but .* from {start} s on need {start + 2:.2f} s"):
            video(path, start=start)

def test_interlaced_pictures_are_taken_apart(tmp_path):
    arguments = "-vf interlace=lowpass=0 -flags +ildct+ilme -c:v libx264"
    path = write_scene(tmp_path / "a.mp4", np.arange(150) / 60, arguments, rate=60, height=2 * H, width=2 * W)
    pictures = to_uint8(read_video(path, 17, 2 * H, 2 * W, 8)).astype(int)[:, H - 10:H + 10].sum(-1)
    combs = np.abs(pictures[:, 1:-1] * 2 - pictures[:, :-2] - pictures[:, 2:]).max((1, 2))
    assert np.median(combs) < 200 and np.abs(seen_times(video(path)) - EIGHTHS).max() < 0.04

def write_hdr(path, transfer):
    to_hdr = ("scale=out_color_matrix=bt709,format=yuv444p,setparams=color_primaries=bt709:color_trc=bt709:"
              "colorspace=bt709,zscale=t=linear:npl=203,format=gbrpf32le,zscale=p=bt2020,"
              f"zscale=t={transfer}:m=bt2020nc:r=tv,format=yuv420p10le")
    return write_scene(path, [0, 0], f"-vf {to_hdr} {X265}:colorprim=bt2020:transfer={transfer}:colormatrix=bt2020nc")

@pytest.mark.parametrize("transfer", ["arib-std-b67", "smpte2084"])
def test_hdr_becomes_sdr(transfer, tmp_path):
    path = write_hdr(tmp_path / "a.mp4", transfer)
    red, green, blue = red_corner(video(path, 1))
    assert red > 120 and green < 60 and blue < 60, (red, green, blue)
    less = "hevc_metadata=colour_primaries=2:matrix_coefficients=2"
    for name, silent in (("file.mkv", less + ":transfer_characteristics=2"), ("transfer.ts", less)):
        ffmpeg("-i", path, "-c", "copy", "-bsf:v", silent, tmp_path / name)        # only the file tells, or half of it
        assert torch.equal(video(tmp_path / name, 1), video(path, 1)), name

def test_colours_follow_what_the_file_says_and_hd_is_bt709_where_it_says_nothing(tmp_path):
    silent = "h264_metadata=colour_primaries=2:transfer_characteristics=2:matrix_coefficients=2"       # no tags
    hd, sd = "scale=out_color_matrix=bt709", "scale=out_color_matrix=bt601"
    for name, height, width, scale, bitstream in (("hd", 592, 888, hd, silent), ("sd", 576, 864, sd, silent),
                                                  ("wide", 576, 1280, hd, silent),
                                                  ("full", 480, 720, sd + ":out_range=full", silent),
                                                  ("tagged", 480, 720, hd + ",setparams=colorspace=bt709", "null")):
        arguments = f"-vf {scale},format=yuv420p -c:v libx264 -preset ultrafast -bsf:v {bitstream}"
        path = write_scene(tmp_path / f"{name}.mp4", [0, 0], arguments, height=height, width=width)
        assert np.abs(red_corner(video(path, 1)) - COLOURS["red"]).max() < 6, name
    ffmpeg("-i", path, "-c", "copy", "-bsf:v", silent, tmp_path / "file.mkv")      # whose pictures do not say it
    assert torch.equal(video(tmp_path / "file.mkv", 1), video(path, 1))

def test_dolby_vision_is_refused_unless_it_has_a_base_that_others_show(tmp_path):
    content = write_hdr(tmp_path / "a.mp4", "smpte2084").read_bytes()
    place = content.rindex(b"fiel") - 4                    # three boxes of 46 bytes, which give way to Dolby Vision's
    for profile, compatible in ((8, 1), (5, 0), (10, 0)):
        box = struct.pack(">I4sBBHB19x", 32, b"dvcC", 1, 0, profile << 9 | 0b110101, compatible << 4)
        path = tmp_path / f"{profile}.mp4"
        path.write_bytes(content[:place] + box + struct.pack(">I4s6x", 14, b"free") + content[place + 46:])
        with nullcontext() if compatible else pytest.raises(UserError, match=f"is Dolby Vision {profile}"):
            video(path, 1)

@pytest.mark.parametrize("name, encoding", [
    ("a.webm", "-pix_fmt yuva420p -c:v libvpx-vp9"), ("a.mov", "-c:v png"), ("a.mkv", "-pix_fmt yuva420p -c:v ffv1"),
    ("b.webm", "-pix_fmt yuva420p -c:v libvpx -auto-alt-ref 0"), ("a.gif", "-c:v gif")])
def test_a_film_with_transparency_is_refused(name, encoding, tmp_path):
    ffmpeg(*"-f lavfi -i color=red@0.5:s=64x48:d=0.2,format=rgba".split(), *encoding.split(), tmp_path / name)
    with pytest.raises(UserError, match=f"{name}: has transparency"):
        video(tmp_path / name, 1)


# ---- Damage, cuts and odd files -------------------------------------------------------------------------------------

def flipped(path, begin, end, flips):
    """A copy of a file with some bits flipped in a part of it."""
    content, rng = bytearray(path.read_bytes()), random.Random(0)
    for _ in range(flips):
        content[rng.randrange(int(len(content) * begin), int(len(content) * end))] ^= 1 << rng.randrange(8)
    copy = path.with_name(f"flipped{path.suffix}")
    copy.write_bytes(content)
    return copy

@pytest.mark.parametrize("kind, encoding", [               # whose decoders differ in what they say of flaws
    ("h264.mp4", H264), ("h264.ts", H264), ("hevc.ts", X265), ("mpeg2.ts", MPEG2), ("vp9.webm", VP9),
    ("av1.webm", "-c:v libaom-av1 -usage realtime -cpu-used 8"), ("mjpeg.mov", "-c:v mjpeg"),
    ("ffv1.mkv", "-c:v ffv1"), ("theora.ogv", "-c:v libtheora")])
def test_damage_inside_the_clip_is_refused_and_far_behind_it_does_not_matter(kind, encoding, tmp_path):
    path = tmp_path / kind
    ffmpeg("-f", "lavfi", "-i", "testsrc2=s=96x64:r=15:d=12,noise=alls=20", *encoding.split(), path)
    damaged = flipped(path, 0.02, 0.15, flips=600 if kind == "hevc.ts" else 60)    # whose decoder takes most
    with pytest.raises(UserError, match="flipped.*: (is damaged|lasts)"):
        video(damaged)                          # the clip ends at 2 s of 12
    if kind != "theora.ogv":                               # of which ffmpeg reads the end first
        assert torch.equal(video(flipped(path, 0.75, 0.9, flips=60)), video(path))
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 12])
    with pytest.raises(UserError, match=f"{kind}: (is damaged|lasts)"):
        video(path)

@pytest.mark.parametrize("kind, encoding, second", [       # and the second at which its beginning is cut off
    ("mpeg2.ts", MPEG2, 0), ("mpeg2.mpg", MPEG2, 0), ("hevc.ts", X265 + ":keyint=15", 0), ("open.mp4", OPEN, 1.1),
    ("mpeg4.ts", "-c:v mpeg4 -q:v 2 -g 15", 0), ("h264.ts", "-c:v libx264 -g 15", 0), ("open.mkv", OPEN, 1.3)])
def test_a_recording_that_begins_inside_a_group_is_read_right_or_refused(kind, encoding, second, tmp_path):
    path = write_scene(tmp_path / kind, np.arange(120) / 30, encoding)
    cut = tmp_path / f"cut{path.suffix}"
    ffmpeg("-ss", second, "-i", path, "-c", "copy", cut)
    if not second:
        cut.write_bytes(path.read_bytes()[path.stat().st_size // 6:])
    try:
        times = seen_times(video(cut))
    except UserError as e:
        assert f"{cut.name}: is damaged, or begins inside a group of pictures" in str(e)
    else:
        assert np.abs(times - times[0] - EIGHTHS).max() < 0.04 and times[0] > 0.4

def test_a_turned_film_is_upright_whatever_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lying = write_scene(tmp_path / "lying.mp4", np.arange(75) / 30, "-vf transpose=1 -c:v libx264")
    for name in ("-a.mp4", "a:b.mp4", "50%03d.mp4"):
        ffmpeg("-display_rotation", 90, "-i", lying, "-c", "copy", f"file:{name}")
        assert np.abs(seen_times(video(Path(name))) - EIGHTHS).max() < 0.04

def test_a_cover_is_not_the_film_and_a_title_is_no_word_of_ffmpegs(tmp_path):
    plain = write_scene(tmp_path / "plain.mkv", [0, 0.1, 0.2], H264, rate=8)
    Image.new("RGBA", (64, 64)).save(tmp_path / "cover.png")
    title = "[h264 @ 0x1] [error] corrupt\nDuration: 00:00:00.10\n  Stream #0:0: Video: h264, yuva420p, 96x64"
    ffmpeg("-i", plain, "-i", tmp_path / "cover.png", "-map", 1, "-map", 0, "-c", "copy", "-metadata", f"title={title}",
           tmp_path / "told.mkv")
    assert torch.equal(video(tmp_path / "told.mkv", 3), video(plain, 3))

def test_an_ffmpeg_that_does_not_tell_what_is_needed_is_refused(monkeypatch):
    monkeypatch.setattr(films, "get_ffmpeg_exe", lambda: "true")
    with pytest.raises(UserError, match="true: is too old"):
        films.find_ffmpeg.__wrapped__()


# ---- Pictures, and how both fit the model ---------------------------------------------------------------------------

def test_pictures_are_read_as_a_viewer_shows_them(tmp_path):
    upright = Image.fromarray(scene([0])[0])
    exif = Image.Exif()
    exif[0x0112] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "exif.jpg", exif=exif, quality=95, subsampling=0)
    upright.quantize(16).save(tmp_path / "palette.png")
    upright.save(tmp_path / "first.gif", save_all=True, append_images=[Image.new("RGB", upright.size)])
    upright.resize((3 * W, 3 * H)).save(tmp_path / "large.webp", lossless=True)
    for path in tmp_path.iterdir():
        assert abs(seen_times(read_image(path, H, W))[0]) < 0.05, path
    # What is transparent is white; other primaries become sRGB's.
    Image.fromarray(np.uint8([[(0, 255, 0, 0), (255, 0, 0, 255)]])).save(tmp_path / "alpha.png")
    assert to_uint8(read_image(tmp_path / "alpha.png", 1, 2)).tolist() == [[[[255, 255, 255], [255, 0, 0]]]]
    swapped = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()       # red is green and the reverse
    swapped = swapped.replace(b"rXYZ", b"????", 1).replace(b"gXYZ", b"rXYZ", 1).replace(b"????", b"gXYZ", 1)
    Image.new("RGB", (W, H), (220, 30, 30)).save(tmp_path / "profile.png", icc_profile=swapped)
    red, green, _ = red_corner(read_image(tmp_path / "profile.png", H, W))
    assert green > 180 and red < 80

def test_pictures_of_more_than_8_bits_or_for_print_are_refused(tmp_path):
    for mode, name in (("I;16", "grey16.png"), ("F", "float.tif"), ("CMYK", "cmyk.jpg")):
        Image.new(mode, (8, 8)).save(tmp_path / name)
    for path in tmp_path.iterdir():
        with pytest.raises(UserError, match=f"{path.name}: cannot be read as a picture .*8 bits a colour"):
            read_image(path, 8, 8)

def test_what_is_large_is_averaged_without_aliasing(tmp_path):
    stripes = np.zeros((256, 384, 3), np.uint8)
    stripes[::2] = 255                                     # a picture of every second row would be black or white
    Image.fromarray(stripes).save(tmp_path / "a.png")
    ffmpeg("-i", tmp_path / "a.png", "-c:v", "ffv1", tmp_path / "a.mkv")
    for pixels in (video(tmp_path / "a.mkv", 1), read_image(tmp_path / "a.png", H, W)):
        assert np.abs(to_uint8(pixels).astype(int) - 127).max() <= 2

@pytest.mark.parametrize("size", [(96, 32), (64, 64), (128, 384), (16, 48), (20, 16)])
def test_pictures_and_videos_cover_the_target_and_are_cut_at_the_centre(size, tmp_path):
    (h, w), side = size, min(size)                         # the largest centred square is green, the rest red
    picture = np.full((h, w, 3), (255, 0, 0), np.uint8)
    picture[(h - side) // 2:(h + side) // 2, (w - side) // 2:(w + side) // 2] = (0, 255, 0)
    Image.fromarray(picture).save(tmp_path / "a.png")
    ffmpeg("-i", tmp_path / "a.png", tmp_path / "a.apng")  # a video is scaled by the same rule in ffmpeg's words
    green = torch.tensor([-1.0, 1.0, -1.0])[:, None, None, None].expand(3, 1, 28, 28)
    for out in (read_image(tmp_path / "a.png", 32, 32), read_video(tmp_path / "a.apng", 1, 32, 32, 8)):
        torch.testing.assert_close(out[..., 2:-2, 2:-2], green, atol=0.02, rtol=0)
