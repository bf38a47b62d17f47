"""Judging by people: what raters are given, and the tables of what they answer."""
import json, re, shutil, subprocess
from itertools import combinations
from pathlib import Path

from tests.helpers import contents
from tests.judges import answer_study, print_tally, write_study

from support import UserError
from support.films import read_video, read_video_header, run_ffmpeg, write_video
import imageio.v2 as imageio
import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image

import judging.study, judging.tally
from judging import vlm

pytest_plugins = "tests.helpers", "tests.judges"


# ---- What raters get ------------------------------------------------------------------------------------------------

def test_a_study_hides_the_methods_and_stays_when_written_again(shots, methods, study, tmp_path, copied_clips, capsys):
    key, before = json.loads(Path(f"{study}-key.json").read_text()), contents(study)
    assert write_study(methods, shots, study) == key and contents(study) == before
    told = " ".join([*before, before["study.html"].decode()])
    assert not [word for word in ("method", "alpha", "somersault", "walk-12", key["secret"]) if word in told]
    clip = key["clips"]["beta-method"][0]
    assert same_pictures(study / "clips" / f"{clip}.mp4", methods / "beta-method" / "somersault.mp4")
    assert not copied_clips                                # what is there already is not made again
    assert {file.stat().st_mtime for file in study.rglob("*.*")} == {judging.study.ONE_TIME}
    assert write_study(methods, shots, tmp_path / "an other")["study"] != key["study"]           # drawn anew
    assert f"--study '{tmp_path / 'an other'}'" in capsys.readouterr().out             # to be pasted

def ffmpeg(*arguments):
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *map(str, arguments)], check=True)

def same_pictures(*files):
    first, second = [judging.study.hash_pictures(file, read_video_header(file)) for file in files]
    return first == second

@pytest.fixture(scope="module")
def telling(tmp_path_factory):
    """A clip that tells in many ways what made it: a title, a comment, a chapter, a date, an encoder's notes; sound."""
    folder = tmp_path_factory.mktemp("telling")
    (folder / "more.txt").write_text(";FFMETADATA1\ntitle=Secret-5B\ncomment=Secret prompt\n"
                                     "[CHAPTER]\nTIMEBASE=1/1\nSTART=0\nEND=1\ntitle=Secret chapter\n")
    pictures = "nullsrc=d=2:s=64x48:r=10,geq=r='4*X':g='255-5*Y':b='128+100*sin(X/9+N/5)'"
    ffmpeg("-itsoffset", "0.5", "-f", "lavfi", "-i", pictures, "-f", "lavfi", "-i", "sine=d=2",
           "-i", folder / "more.txt", "-map_metadata", "2", "-metadata", "creation_time=2026-01-01", "-metadata:s:v",
           "handler_name=Secret-name", "-c:v", "libx264", "-pix_fmt", "yuv420p", folder / "telling.mp4")
    return folder / "telling.mp4"

def test_a_clip_that_browsers_play_is_copied_without_all_that_tells_where_it_is_from(telling, tmp_path):
    assert b"Secret" in telling.read_bytes() and b"x264" in telling.read_bytes()
    judging.study.write_clip(telling, tmp_path / "clip.mp4")
    content, said = (tmp_path / "clip.mp4").read_bytes(), run_ffmpeg(tmp_path / "clip.mp4")[1]
    assert not [word for word in (b"Secret", b"x264", b"Lavf", b"Lavc", b"mp4a", b"udat") if word in content]
    assert not [word for word in ("Audio", "Chapter", "creation_time", "title", "comment", "encoder") if word in said]
    assert same_pictures(tmp_path / "clip.mp4", telling)   # to the bit
    assert "Duration: 00:00:02.00, start: 0.000000" in said            # though its sound begins earlier

# How clips that not every browser shows as they are can be made of the telling one, and the size they must be shown at.
OTHERS = {
    "MPEG-4 part 2, as OpenCV writes it": ("-i {} -c:v mpeg4 -q:v 2", "64x48"),
    "10 bits": ("-i {} -pix_fmt yuv420p10le", "64x48"),
    "lossless, of a profile that few browsers know": ("-i {} -qp 0", "64x48"),
    "pixels that are not square": ("-i {} -vf setsar=2", "128x48"),
    "interlaced": ("-i {} -vf setfield=tff -x264opts tff=1", "64x48"),
    "turned": ("-display_rotation 90 -i {} -c copy", "48x64"),
}

@pytest.mark.parametrize("kind", OTHERS)
def test_other_clips_are_encoded_once_as_a_record_shows_them(kind, telling, tmp_path):
    made, size = OTHERS[kind]
    given, clip = tmp_path / "given.mp4", tmp_path / "clip.mp4"
    ffmpeg(*made.format(telling).split(), given)
    judging.study.write_clip(given, clip)
    said, (width, height) = run_ffmpeg(clip)[1], map(int, size.split("x"))
    assert re.search(rf"Video: h264 \(High\).*yuv420p\(tv, bt709, progressive\), {size} \[SAR 1:1", said), said
    assert "encoder" not in said and "Matrix" not in said and "Secret" not in said and b"x264" not in clip.read_bytes()
    seen, meant = [read_video(file, 9, height, width, 8) for file in (clip, given)]
    assert (seen - meant).abs().mean() < 0.03 and (seen - meant).mean().abs() < 0.01   # of 2: not darker, either

def test_what_a_player_leaves_out_is_not_handed_out_and_what_it_cannot_show_is_refused(telling, tmp_path):
    ffmpeg("-ss", "1", "-i", telling, "-c", "copy", tmp_path / "trimmed.mp4")          # the rest is still in the file
    judging.study.write_clip(tmp_path / "trimmed.mp4", tmp_path / "clip.mp4")
    assert "Duration: 00:00:01.50" in run_ffmpeg(tmp_path / "clip.mp4")[1]
    (tmp_path / "damaged.mp4").write_bytes(telling.read_bytes()[:-9000])
    ffmpeg("-i", telling, "-c:v", "libvpx-vp9", "-pix_fmt", "yuva420p", tmp_path / "transparent.webm")
    for name, words in (("damaged.mp4", "is damaged"), ("transparent.webm", "has transparency")):
        with pytest.raises(UserError, match=f"{name}: {words}"):
            judging.study.write_clip(tmp_path / name, tmp_path / "none.mp4")
        with pytest.raises(UserError, match=f"{name}: {words}"):
            vlm.frames_as_jpeg(tmp_path / name, 8)
    assert not (tmp_path / "none.mp4").exists()

def test_clips_tell_nothing_by_order_but_by_length_or_size_and_old_ones_are_removed(
        shots, methods, telling, tmp_path, copied_clips, capsys):
    own, out = shutil.copytree(methods, tmp_path / "methods"), tmp_path / "study"
    before = write_study(own, shots, out)
    assert "tell methods apart" not in capsys.readouterr().out
    assert copied_clips == sorted(copied_clips) and len(copied_clips) == 6
    page = (out / "study.html").read_text()
    first, second = [sorted(beside) for beside in zip(*before["clips"].values())]
    assert re.findall('"([0-9a-f]{16})"', page.split('"pages"')[1]) == first + second
    assert page.count("<script") == (vlm.HERE / "study.html").read_text().count("<script")       # no caption's
    shutil.copy(telling, own / "alpha-method" / "somersault.mp4")
    (out / "clips" / "mine.mp4").touch()
    after = write_study(own, shots, out)
    assert ("somersault: raters can tell methods apart by length or size (2.5 s of 64×48: alpha-method; "
            "1.1 s of 32×32: beta-method, gamma-method)\n2 pages") in capsys.readouterr().out
    assert after["secret"] == before["secret"] and after["clips"]["beta-method"] == before["clips"]["beta-method"]
    clips = {path.stem for path in (out / "clips").glob("*.mp4")}
    assert clips == {"mine"}.union(*after["clips"].values()) and len(clips) == 7

def test_folders_of_previews_are_methods_and_others_are_named(shots, methods, tmp_path, copied_clips, capsys):
    folder = shutil.copytree(methods / "alpha-method", tmp_path / "videos" / "step-000200").parent
    later = shutil.copytree(methods / "alpha-method", folder / "step-000400")
    (folder / "notes").mkdir()
    assert list(write_study(folder, shots, tmp_path / "study")["clips"]) == ["step-000200", "step-000400"]
    assert "notes: holds no video of --bench" in capsys.readouterr().out
    (later / "bench.json").write_text(json.dumps({"bench": "another"}))
    with pytest.raises(UserError, match="step-000400: was made from another bench"):
        write_study(folder, shots, tmp_path / "study")
    (later / "walk-12.mp4").unlink()
    with pytest.raises(UserError, match="step-000400: lacks walk-12.mp4"):
        write_study(folder, shots, tmp_path / "study")
    with pytest.raises(UserError, match="holds no method"):
        write_study(shots, shots, tmp_path / "study")

def test_raters_and_judges_see_the_picture_that_the_model_got(tmp_path):
    Image.new("RGBA", (64, 48), (250, 10, 10, 0)).save(tmp_path / "a.png")             # all transparent, so white
    (shown,) = vlm.frames_as_jpeg(tmp_path / "a.png", 1)
    assert imageio.imread(shown).shape == (48, 64, 3) and imageio.imread(shown).min() > 250
    picture = np.zeros((1, 32, 48, 3), np.uint8)
    picture[:, :, 24:] = 250
    write_video(tmp_path / "one.mp4", picture, 8)          # a clip of one picture
    for jpeg in vlm.frames_as_jpeg(tmp_path / "one.mp4", 8):
        assert imageio.imread(jpeg)[:, :20].max() < 10 and imageio.imread(jpeg)[:, 28:].min() > 240

def test_frames_for_a_model_are_evenly_spaced_in_time_at_any_frame_rate(tmp_path):
    numbers = np.arange(60)
    write_video(tmp_path / "even.mp4", np.full((32, 48, 3, 60), 4 * numbers, np.uint8).transpose(3, 0, 1, 2), 30)
    slow = "setpts='if(lt(N,30),N,30+(N-30)*5)/30/TB'"                         # the second half five times as slow
    ffmpeg("-i", tmp_path / "even.mp4", "-vf", slow, "-fps_mode", "vfr", tmp_path / "uneven.mp4")
    for name, instants in (("even", numbers / 30), ("uneven", np.where(numbers < 30, numbers, 5 * numbers - 120) / 30)):
        shown = [imageio.imread(jpeg).mean() / 4 for jpeg in vlm.frames_as_jpeg(tmp_path / f"{name}.mp4", 8)]
        times, step = np.interp(shown, numbers, instants), instants[-1] / 8
        assert len(times) == 8 and np.abs(np.diff(times) - step).max() < 0.6 * step and np.ptp(times) > 6 * step


# ---- The tables -----------------------------------------------------------------------------------------------------

def by_table(method, prompt):
    return {"alpha-method": [[5, 1, 3, 3, 4], [5, 2, 3, 3, 4]], "beta-method": [[5, 3, 3, 3, 4], [5, 4, 3, 3, 2]],
            "gamma-method": [[1, 5, 3, 3, 1], [1, 5, 3, 3, 1]]}[method][prompt]

def test_the_tally_is_table_1(study, tmp_path, capsys):
    out = print_tally(study, [answer_study(study, rater, by_table) for rater in "ab"], tmp_path, capsys)
    rated, won, differences, said = out.split("\n\n")
    assert "| alpha-method | 100.00 [100.0, 100.0] | 30.00 [20.0, 40.0] | 60.00 [60.0, 60.0] | 60.00 [60.0," in rated
    assert "| beta-method | 100.00 [100.0, 100.0] | 70.00 [60.0, 80.0] | 60.00 [60.0, 60.0] | 60.00 [60.0," in rated
    # A tie and a win: 3/4.
    assert "| alpha-method | 50.00 [50.0, 50.0] | 75.00 [50.0, 100.0] | 100.00 [100.0, 100.0] |" in won
    assert "| gamma-method | 0.00 [0.0, 0.0] | 0.00 [0.0, 0.0] | 50.00 [50.0, 50.0] |" in won
    # Pair by pair: beta's text is better by two points of five on either prompt, though prompts differ.
    assert differences.startswith("| minus alpha-method, points |") and "| alpha-method |" not in differences
    assert "| beta-method | +0.00 [+0.0, +0.0] | +40.00 [+40.0, +40.0] | " in differences
    assert " | -20.00 [-40.0, +0.0] |" in differences
    assert "2 raters, 2 prompts" in said and "visual alignment 1.00" in said and "motion quality nan" in said

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
    answers = [answer_study(study, rater, lambda *_: rng.integers(1, 6, 5).tolist()) for rater in "abcd"]
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
    row = capsys.readouterr().out.splitlines()[-2]
    mean, low, high = map(float, re.fullmatch(r"\| row \| (.+) \[(.+), (.+)\] \| nan \[nan, nan\] \|", row).groups())
    assert mean == pytest.approx(100 * np.nanmean(values[..., 0]), abs=0.005) and low < mean < high
    assert (high - low) / 2 == pytest.approx(196 * (raters.var() / 30 + prompts.var() / 25) ** 0.5, rel=0.1)
