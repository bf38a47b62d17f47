"""Judging by people: what raters are given, and the tables of what they answer."""
import json, os, re, shutil, subprocess
from itertools import combinations
from pathlib import Path

from tests.helpers import contents
from tests.judges import answer_study, print_tally, write_study

import imageio.v2 as imageio
import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image

import data
import judging.study, judging.tally
from judging import vlm
from model import UserError

pytest_plugins = "tests.helpers", "tests.judges"


# ---- What raters get ------------------------------------------------------------------------------------------------

def test_a_study_hides_the_methods_and_stays_when_written_again(shots, methods, study, tmp_path, copied_clips, capsys):
    key, before = json.loads(Path(f"{study}-key.json").read_text()), contents(study)
    assert write_study(methods, shots, study) == key and contents(study) == before
    names = [*before, before["study.html"].decode()]
    for word in ("method", "alpha", "somersault", "walk-12", key["secret"]):
        assert not any(word in name for name in names)
    for method, (clip, _) in key["clips"].items():
        first = "somersault-0.mp4" if method == "beta-method" else "somersault.mp4"
        assert same_pictures(study / "clips" / f"{clip}.mp4", methods / method / first)
    assert not copied_clips                                # what is there already is not made again
    assert {file.stat().st_mtime for file in study.rglob("*.*")} == {judging.study.ONE_TIME}
    capsys.readouterr()
    assert write_study(methods, shots, tmp_path / "an other")["study"] != key["study"]           # drawn anew
    assert f"--study '{tmp_path / 'an other'}'" in capsys.readouterr().out             # to be pasted


def test_a_study_that_is_written_of_other_videos_keeps_none_of_the_old(shots, methods, tmp_path, copied_clips):
    two = shutil.copytree(methods, tmp_path / "methods", ignore=shutil.ignore_patterns("gamma*"))
    out, mine = tmp_path / "study", tmp_path / "study" / "clips" / "mine.mp4"
    before = write_study(two, shots, out)
    shutil.copy(two / "beta-method" / "somersault-0.mp4", two / "alpha-method" / "somersault.mp4")
    mine.touch()
    after = write_study(two, shots, out)
    assert after["secret"] == before["secret"] and after["clips"]["beta-method"] == before["clips"]["beta-method"]
    clips = {path.stem for path in (out / "clips").glob("*.mp4")}
    assert clips == {"mine"}.union(*after["clips"].values()) and len(clips) == 5


def test_clips_are_made_and_shown_in_an_order_that_tells_nothing(shots, methods, tmp_path, copied_clips):
    key = write_study(methods, shots, tmp_path / "study")
    assert copied_clips == sorted(copied_clips) and len(copied_clips) == 6
    page = (tmp_path / "study" / "study.html").read_text()
    shown = re.findall('"([0-9a-f]{16})"', page.split('"pages"')[1])
    assert shown == [name for pair in zip(*key["clips"].values()) for name in sorted(pair)]
    assert page.count("<script") == (vlm.HERE / "study.html").read_text().count("<script")       # no caption's


def ffmpeg(*arguments):
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *map(str, arguments)], check=True)


def described(file):
    """What ffmpeg says of a file."""
    return subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-i", file], capture_output=True,
                          text=True).stderr.split(str(file))[-1]


def same_pictures(one, other):
    first, second = (judging.study.hash_pictures(file, data.read_video_header(file)) for file in (one, other))
    return first == second


@pytest.fixture(scope="module")
def telling(tmp_path_factory):
    """A clip that tells in many ways what made it: a title, a comment, a chapter, a date, an encoder's notes; sound."""
    folder = tmp_path_factory.mktemp("telling")
    (folder / "more.txt").write_text("\n".join([
        ";FFMETADATA1", "title=Secret-5B", "comment=Secret prompt", "[CHAPTER]", "TIMEBASE=1/1", "START=0", "END=1",
        "title=Secret chapter", ""]))
    pictures = "nullsrc=d=2:s=64x48:r=10,geq=r='4*X':g='255-5*Y':b='128+100*sin(X/9+N/5)'"
    sound = "sine=d=2"
    ffmpeg("-itsoffset", "0.5", "-f", "lavfi", "-i", pictures, "-f", "lavfi", "-i", sound, "-i", folder / "more.txt",
           "-map_metadata", "2", "-metadata", "creation_time=2026-01-01", "-metadata:s:v", "handler_name=Secret-name",
           "-c:v", "libx264", "-pix_fmt", "yuv420p", folder / "telling.mp4")
    return folder / "telling.mp4"


def test_a_clip_that_browsers_play_is_copied_without_all_that_tells_where_it_is_from(telling, tmp_path):
    assert b"Secret" in telling.read_bytes() and b"x264 - core" in telling.read_bytes()
    os.utime(telling, (1, 1))
    judging.study.write_clip(telling, tmp_path / "clip.mp4")
    content, said = (tmp_path / "clip.mp4").read_bytes(), described(tmp_path / "clip.mp4")
    for word in (b"Secret", b"x264", b"Lavf", b"Lavc", b"mp4a", b"udat"):
        assert word not in content, word
    assert same_pictures(tmp_path / "clip.mp4", telling)   # to the bit
    for word in ("Audio", "Chapter", "creation_time", "title", "comment", "encoder"):
        assert word not in said, word
    assert "Duration: 00:00:02.00, start: 0.000000" in said            # though its sound begins earlier


# What is no H.264 of 8 bits and 4:2:0, progressive, SDR, upright, with square pixels, is encoded: how it is made of the
# telling clip, and the size that it must have then.
OTHERS = {
    "MPEG-4 part 2, as OpenCV writes it": (["-c:v", "mpeg4", "-q:v", "2"], "mp4", "64x48"),
    "10 bits": (["-pix_fmt", "yuv420p10le"], "mp4", "64x48"),
    "lossless, of a profile that few browsers know": (["-qp", "0"], "mp4", "64x48"),
    "pixels that are not square": (["-vf", "setsar=2"], "mp4", "128x48"),
    "interlaced": (["-vf", "setfield=tff", "-x264opts", "tff=1"], "mp4", "64x48"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_clips_are_encoded_once_as_a_record_shows_them(kind, telling, tmp_path):
    made, suffix, size = OTHERS[kind]
    given, clip = tmp_path / f"given.{suffix}", tmp_path / "clip.mp4"
    ffmpeg("-i", telling, "-c:v", "libx264", *made, given)
    judging.study.write_clip(given, clip)
    said, shown = described(clip), tuple(map(int, reversed(size.split("x"))))
    assert re.search(rf"Video: h264 \(High\).*yuv420p\(tv, bt709, progressive\), {size} \[SAR 1:1", said), said
    assert "encoder" not in said and "Secret" not in said and b"x264" not in clip.read_bytes()
    seen, meant = (data.read_video(file, 9, *shown, 8) for file in (clip, given))
    assert (seen - meant).abs().mean() < 0.02 and (seen - meant).mean().abs() < 0.01   # of 2: not darker, either


def test_a_turned_clip_is_encoded_upright(telling, tmp_path):
    ffmpeg("-display_rotation", "90", "-i", telling, "-c", "copy", tmp_path / "turned.mp4")
    judging.study.write_clip(tmp_path / "turned.mp4", tmp_path / "clip.mp4")
    assert "48x64" in described(tmp_path / "clip.mp4") and "Matrix" not in described(tmp_path / "clip.mp4")


def test_what_a_player_leaves_out_is_not_handed_out(telling, tmp_path):
    ffmpeg("-ss", "1", "-i", telling, "-c", "copy", tmp_path / "trimmed.mp4")          # the rest is still in the file
    judging.study.write_clip(tmp_path / "trimmed.mp4", tmp_path / "clip.mp4")
    assert "Duration: 00:00:01.50" in described(tmp_path / "clip.mp4")
    (tmp_path / "damaged.mp4").write_bytes(telling.read_bytes()[:-9000])
    with pytest.raises(UserError, match="damaged.mp4"):
        judging.study.write_clip(tmp_path / "damaged.mp4", tmp_path / "none.mp4")
    assert not (tmp_path / "none.mp4").exists()


def test_lengths_and_sizes_that_tell_methods_apart_are_said(shots, methods, telling, tmp_path, copied_clips, capsys):
    two = shutil.copytree(methods, tmp_path / "methods", ignore=shutil.ignore_patterns("gamma*"))
    write_study(two, shots, tmp_path / "study")
    assert "tell methods apart" not in capsys.readouterr().out
    shutil.copy(telling, two / "alpha-method" / "somersault.mp4")
    write_study(two, shots, tmp_path / "study")
    assert ("somersault: raters can tell methods apart by length or size (2.5 s of 64×48: alpha-method; "
            "1.1 s of 32×32: beta-method)\n2 pages") in capsys.readouterr().out


def test_folders_of_previews_are_methods_and_others_are_named(shots, methods, tmp_path, copied_clips, capsys):
    folder = shutil.copytree(methods / "alpha-method", tmp_path / "videos" / "step-000200").parent
    shutil.copytree(methods / "alpha-method", folder / "step-000400")
    (folder / "notes").mkdir()
    assert list(write_study(folder, shots, tmp_path / "study")["clips"]) == ["step-000200", "step-000400"]
    assert "notes: holds no video of --bench" in capsys.readouterr().out
    note = json.loads((folder / "step-000400" / "bench.json").read_text())
    (folder / "step-000400" / "bench.json").write_text(json.dumps({**note, "bench": "another"}))
    with pytest.raises(UserError, match="step-000400: was made from another bench"):
        write_study(folder, shots, tmp_path / "study")
    (folder / "step-000400" / "walk-12-0.mp4").unlink()
    with pytest.raises(UserError, match="step-000400: lacks walk-12.mp4"):
        write_study(folder, shots, tmp_path / "study")
    with pytest.raises(UserError, match="holds no method"):
        write_study(shots, shots, tmp_path / "study")


def test_raters_and_judges_see_the_picture_that_the_model_got(tmp_path):
    picture = np.full((48, 64, 4), (250, 10, 10, 0), np.uint8)             # all transparent, so white
    Image.fromarray(picture).save(tmp_path / "a.png")
    (shown,) = vlm.frames_as_jpeg(tmp_path / "a.png", 1)
    assert imageio.imread(shown).shape == (48, 64, 3) and imageio.imread(shown).min() > 250


def test_a_clip_of_one_picture_is_shown_to_a_model(tmp_path):
    picture = np.zeros((1, 32, 48, 3), np.uint8)
    picture[:, :, 24:] = 250
    data.write_video(tmp_path / "one.mp4", picture, 8)
    for jpeg in vlm.frames_as_jpeg(tmp_path / "one.mp4", 8):
        shown = imageio.imread(jpeg)
        assert shown[:, :20].max() < 10 and shown[:, 28:].min() > 240


def test_of_a_bench_of_clips_raters_see_the_first_frames(videos, tmp_path, copied_clips):
    shutil.copytree(videos, tmp_path / "methods" / "real")
    write_study(tmp_path / "methods", videos, tmp_path / "study")
    shown = imageio.imread(tmp_path / "study" / "clips" / "0.jpg").astype(int)
    assert np.abs(shown - imageio.mimread(videos / "00000.mp4")[0]).mean() < 8


def test_frames_for_a_model_are_evenly_spaced_in_time_at_any_frame_rate(tmp_path):
    frames = np.arange(60, dtype=np.uint8)[:, None, None, None].repeat(32, 1).repeat(48, 2).repeat(3, 3) * 4
    data.write_video(tmp_path / "even.mp4", frames, 30)
    slow = "setpts='if(lt(N,30),N,30+(N-30)*5)/30/TB'"                         # the second half five times as slow
    ffmpeg("-i", tmp_path / "even.mp4", "-vf", slow, "-fps_mode", "vfr", tmp_path / "uneven.mp4")
    for name, instants in (("even", np.arange(60) / 30), ("uneven", np.r_[np.arange(30), 30 + 5 * np.arange(30)] / 30)):
        shown = [imageio.imread(jpeg).mean() / 4 for jpeg in vlm.frames_as_jpeg(tmp_path / f"{name}.mp4", 8)]
        times, step = np.interp(shown, np.arange(60), instants), instants[-1] / 8
        assert len(times) == 8 and np.abs(np.diff(times) - step).max() < 0.6 * step and np.ptp(times) > 6 * step


# ---- The tables -----------------------------------------------------------------------------------------------------

RATES = {"alpha-method": [[5, 1, 3, 3, 4], [5, 2, 3, 3, 4]], "beta-method": [[5, 3, 3, 3, 4], [5, 4, 3, 3, 2]],
         "gamma-method": [[1, 5, 3, 3, 1], [1, 5, 3, 3, 1]]}


def by_table(method, prompt):
    return RATES[method][prompt]


def test_the_tally_is_table_1(study, tmp_path, capsys):
    out = print_tally(study, [answer_study(study, rater, by_table) for rater in "ab"], tmp_path, capsys)
    rows, won, differences = ({name: cells for name, *cells in (line.strip("| ").split(" | ") for line in lines)}
                              for lines in map(str.splitlines, out.split("\n\n")[:3]))
    assert [cell.split()[0] for cell in rows["alpha-method"]] == ["100.00", "30.00", "60.00", "60.00", "80.00"]
    assert [cell.split()[0] for cell in rows["beta-method"]] == ["100.00", "70.00", "60.00", "60.00", "60.00"]
    assert rows["alpha-method"][0].endswith("[100.0, 100.0]") and rows["alpha-method"][1].endswith("[20.0, 40.0]")
    assert [cell.split()[0] for cell in won["alpha-method"]] == ["50.00", "75.00", "100.00"]     # a tie and a win: 3/4
    assert [cell.split()[0] for cell in won["gamma-method"]] == ["0.00", "0.00", "50.00"]
    assert "2 raters, 2 prompts" in out and "visual alignment 1.00" in out and "motion quality nan" in out
    # Pair by pair: beta's text is better by two points of five on either prompt, though prompts differ.
    assert "minus alpha-method, points" in differences and "alpha-method" not in differences
    assert differences["beta-method"][:2] == ["+0.00 [+0.0, +0.0]", "+40.00 [+40.0, +40.0]"]
    assert differences["beta-method"][4] == "-20.00 [-40.0, +0.0]"


def test_answers_that_are_not_of_this_study_or_not_whole_are_refused(study, tmp_path, capsys):
    of_ann = answer_study(study, "Ann", by_table)
    for words, answers in [("answers study other", [{**of_ann, "study": "other"}]),
                           ("Ann has answered in an earlier file", [of_ann, of_ann]),
                           ("lacks five ratings .* let Ann go on", [{**of_ann, "ratings": {}}]),
                           ("lacks five", [answer_study(study, "Ann", lambda method, i: [1, 2, 3, 4, 0])]),
                           ("rater is missing", [{"study": "s"}]), ("--answers is missing", [])]:
        with pytest.raises(UserError, match=words):
            print_tally(study, answers, tmp_path, capsys)


def test_agreement_is_krippendorffs_alpha(study, tmp_path, capsys):
    rng = np.random.default_rng(0)
    answers = [answer_study(study, rater, lambda method, i: rng.integers(1, 6, 5).tolist()) for rater in "abcd"]
    ratings = np.array([[*answer["ratings"].values()] for answer in answers])              # (raters, videos, 5)
    within = np.mean([(a - b) ** 2 for a, b in combinations(ratings, 2)], axis=(0, 1))
    among = np.mean([(a - b) ** 2 for a, b in combinations(ratings.reshape(-1, 5), 2)], axis=0)
    found = re.findall(r" quality (-?\d\.\d\d)| alignment (-?\d\.\d\d)", print_tally(study, answers, tmp_path, capsys))
    assert [float("".join(alpha)) for alpha in found] == pytest.approx(1 - within / among, abs=0.006)
    assert "visual alignment nan" in print_tally(study, answers[:1], tmp_path, capsys)           # of one rater


def test_intervals_come_from_both_raters_and_prompts(capsys):
    rng = np.random.default_rng(0)
    raters, prompts = rng.normal(size=(30, 1)) / 10, rng.normal(size=(1, 25)) / 10
    values = torch.from_numpy(np.stack([0.5 + raters + prompts, np.full((30, 25), np.nan)], axis=-1))
    values[0, 0] = torch.nan                               # a missing value is left out
    judging.tally.print_table("", ["row"], ["column", "nothing"], values[:, None])
    found = re.search(r"\| row \| (\S+) \[(\S+), (\S+)\] \| nan \[nan, nan\] \|", capsys.readouterr().out)
    mean, low, high = map(float, found.groups())
    assert mean == pytest.approx(100 * np.nanmean(values[..., 0]), abs=0.005) and low < mean < high
    assert (high - low) / 2 == pytest.approx(196 * (raters.var() / 30 + prompts.var() / 25) ** 0.5, rel=0.1)
