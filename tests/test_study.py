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

import judging.study, judging.tally
from judging import vlm

pytest_plugins = "tests.helpers", "tests.judges"


# ---- What raters get ------------------------------------------------------------------------------------------------

def test_nothing_that_raters_get_names_a_method(methods, study):
    key, given = json.loads(Path(f"{study}-key.json").read_text()), contents(study)
    page = given["study.html"].decode()
    told = " ".join([*given, page])
    assert not [word for word in ("method", "alpha", "somersault", "walk-12", key["secret"]) if word in told]
    first, second = [sorted(beside) for beside in zip(*key["clips"].values())]         # an order that tells nothing
    assert re.findall('"([0-9a-f]{16})"', page.split('"pages"')[1]) == first + second
    assert {file.stat().st_mtime for file in study.rglob("*.*")} == {judging.study.ONE_TIME}
    clip = key["clips"]["beta-method"][0]
    assert same_pictures(study / "clips" / f"{clip}.mp4", methods / "beta-method" / "somersault.mp4")
    assert page.count("<script") == (vlm.HERE / "study.html").read_text().count("<script")       # no caption's

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

@pytest.mark.parametrize("made, size", [                   # of the telling clip, and how large it must be shown
    ("-i {} -c:v mpeg4 -q:v 2", "64x48"), ("-i {} -pix_fmt yuv420p10le", "64x48"), ("-i {} -vf setsar=2", "128x48"),
    ("-display_rotation 90 -i {} -c copy", "48x64")], ids=["OpenCV's", "10 bits", "pixels not square", "turned"])
def test_clips_that_not_every_browser_plays_are_encoded_once_as_a_record_shows_them(made, size, telling, tmp_path):
    given, clip = tmp_path / "given.mp4", tmp_path / "clip.mp4"
    ffmpeg(*made.format(telling).split(), given)
    judging.study.write_clip(given, clip)
    said, (width, height) = run_ffmpeg(clip)[1], map(int, size.split("x"))
    assert re.search(rf"Video: h264 \(High\).*yuv420p\(tv, bt709, progressive\), {size} \[SAR 1:1", said), said
    assert "encoder" not in said and "Matrix" not in said and "Secret" not in said and b"x264" not in clip.read_bytes()
    seen, meant = [read_video(file, 9, height, width, 8) for file in (clip, given)]
    assert (seen - meant).abs().mean() < 0.03 and (seen - meant).mean().abs() < 0.01   # of 2: not darker, either

def test_what_a_player_leaves_out_is_not_handed_out_nor_are_damaged_clips(telling, tmp_path):
    ffmpeg("-ss", "1", "-i", telling, "-c", "copy", tmp_path / "trimmed.mp4")          # the rest is still in the file
    judging.study.write_clip(tmp_path / "trimmed.mp4", tmp_path / "clip.mp4")
    assert "Duration: 00:00:01.50" in run_ffmpeg(tmp_path / "clip.mp4")[1]
    (tmp_path / "damaged.mp4").write_bytes(telling.read_bytes()[:-9000])
    with pytest.raises(UserError, match="damaged.mp4: is damaged"):
        judging.study.write_clip(tmp_path / "damaged.mp4", tmp_path / "none.mp4")
    assert not (tmp_path / "none.mp4").exists()

def test_a_study_stays_when_written_again_but_for_a_clip_that_changed(
        shots, methods, study, telling, tmp_path, monkeypatch, capsys):
    own, out = shutil.copytree(methods, tmp_path / "methods"), tmp_path / "study"
    before = write_study(own, shots, out)
    assert before["secret"] not in Path(f"{study}-key.json").read_text()
    with monkeypatch.context() as patch:
        patch.setattr(judging.study, "write_clip", None)   # what is there already is not made again
        assert write_study(own, shots, out) == before
    assert "tell methods apart" not in capsys.readouterr().out
    shutil.copy(telling, own / "alpha-method" / "somersault.mp4")
    (out / "clips" / "mine.mp4").touch()
    after = write_study(own, shots, out)
    assert ("somersault: raters can tell methods apart by length or size (2.0 s of 64×48: alpha-method; "
            "1.1 s of 32×32: beta-method, gamma-method)") in capsys.readouterr().out
    assert after["secret"] == before["secret"] and after["clips"]["beta-method"] == before["clips"]["beta-method"]
    clips = {path.stem for path in (out / "clips").glob("*.mp4")}
    assert clips == {"mine"}.union(*after["clips"].values()) and len(clips) == 7       # without the old one

def test_a_folder_is_a_method_only_with_all_videos_of_this_bench(shots, methods, tmp_path):
    own = shutil.copytree(methods, tmp_path / "methods")
    (own / "notes").mkdir()
    assert list(write_study(own, shots, tmp_path / "study")["clips"]) == ["alpha-method", "beta-method", "gamma-method"]
    (own / "beta-method" / "bench.json").write_text(json.dumps({"bench": "another"}))
    with pytest.raises(UserError, match="beta-method: was made from another bench"):
        write_study(own, shots, tmp_path / "study")
    (own / "beta-method" / "walk-12.mp4").unlink()
    with pytest.raises(UserError, match="beta-method: lacks walk-12.mp4"):
        write_study(own, shots, tmp_path / "study")

def test_frames_for_a_model_are_evenly_spaced_in_time_at_any_frame_rate(tmp_path):
    numbers = np.arange(60)
    write_video(tmp_path / "even.mp4", np.full((32, 48, 3, 60), 4 * numbers, np.uint8).transpose(3, 0, 1, 2), 30)
    slow = "setpts='if(lt(N,30),N,30+(N-30)*5)/30/TB'"                         # the second half five times as slow
    ffmpeg("-i", tmp_path / "even.mp4", "-vf", slow, "-fps_mode", "vfr", tmp_path / "uneven.mp4")
    instants = np.where(numbers < 30, numbers, 5 * numbers - 120) / 30
    shown = [imageio.imread(jpeg).mean() / 4 for jpeg in vlm.frames_as_jpeg(tmp_path / "uneven.mp4", 8)]
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
    of_ann, of_bob = answer_study(study, "Ann", by_table), answer_study(study, "Bob", lambda *_: [1, 2, 3, 4, 0])
    for words, answers in (("answers study other", [{**of_ann, "study": "other"}]),
                           ("Ann has answered in an earlier file", [of_ann, of_ann]),
                           ("lacks five ratings .* let Ann go on", [{**of_ann, "ratings": {}}]),
                           ("lacks five ratings .* let Bob go on", [of_ann, of_bob])):
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
    values = torch.from_numpy(0.5 + raters + prompts)
    values[0, 0] = torch.nan                               # a missing value is left out
    judging.tally.print_table("", ["row"], ["column"], values[:, None, :, None])
    row = capsys.readouterr().out.splitlines()[-2]
    mean, low, high = map(float, re.fullmatch(r"\| row \| (.+) \[(.+), (.+)\] \|", row).groups())
    assert mean == pytest.approx(100 * np.nanmean(values), abs=0.005) and low < mean < high
    assert (high - low) / 2 == pytest.approx(196 * (raters.var() / 30 + prompts.var() / 25) ** 0.5, rel=0.1)
