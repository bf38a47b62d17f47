"""Clips into records."""
import os, shutil

from tests.helpers import NAMES, add_negatives, contents, encode, same_tensors

import imageio.v2 as imageio
import numpy as np
import pytest
import torch

import data
import model
from support import UserError, films
from support.files import MARK, read_header
from support.lists import Clip

pytest_plugins = "tests.helpers"

def lay_out(folder, videos, names):
    """Some of the clips as the authors lay out theirs, with a first frame each."""
    (folder / "first_frames").mkdir(parents=True)
    for name in names:
        first = films.read_video(shutil.copy(videos / f"{name}.mp4", folder), 1, 32, 32, 8)
        imageio.imwrite(folder / "first_frames" / f"{name}.png", films.to_uint8(first)[0])
    (folder / "video.txt").write_text("".join(f"{name}.mp4\n" for name in names))
    (folder / "prompt.txt").write_text("".join((videos / f"{name}.txt").read_text().strip() + "\n" for name in names))
    return folder

def test_the_authors_layout_gives_the_same_records(videos, cache, tmp_path):
    out = encode(lay_out(tmp_path / "authors", videos, NAMES[:2]), tmp_path / "cache")
    for ours, theirs in zip(data.Records(out, negatives=False), data.Records(cache, negatives=False)):
        assert same_tensors(ours, theirs)

def test_a_record_holds_latents_and_text_in_bf16(videos, cache):
    shapes, _ = read_header(cache / "win" / "00000.safetensors")
    assert shapes == {"win": (8, 5, 8, 8), "image": (8, 1, 8, 8), "text": (16, 32)}
    records, encode_text = data.Records(cache), model.load_text_encoder("tiny")
    assert records[0]["lose"].shape == (2, 8, 5, 8, 8) and {v.dtype for v in records[0].values()} == {torch.bfloat16}
    assert torch.equal(records[0]["text"], encode_text([(videos / "00000.txt").read_text().strip()])[0].bfloat16())
    assert torch.equal(records.empty_text(), encode_text([""])[0].bfloat16())

def test_image_latents_come_from_the_first_frame_alone(videos):
    vae, clip = model.load_vae("tiny"), Clip("a", videos / "00000.mp4", "", "")
    video, image, _ = data.read_clip(clip, (17, 32, 32), fps=8)
    other = torch.cat([image, -video[:, 1:]], dim=1)
    record, changed = [data.encode_clip(clip, (pixels, image, []), vae, 0, "cpu")[0] for pixels in (video, other)]
    assert torch.equal(record["image"], changed["image"]) and not torch.equal(record["win"], changed["win"])

def test_first_frames_and_given_negatives_are_used_and_taken_anew_when_they_change(videos, cache, tmp_path):
    folder = lay_out(tmp_path / "authors", videos, NAMES[:1])
    imageio.imwrite(folder / "first_frames" / "00000.png", np.zeros((32, 32, 3), np.uint8))
    given, usual = folder / "negative_samples" / "00000", data.Records(cache)[0]
    given.mkdir(parents=True)
    for others in (0, 1), (1, 0):                          # one of them is the win itself
        for k, other in enumerate(others):
            shutil.copy(videos / f"0000{other}.mp4", given / f"{k}.mp4")
        record = data.Records(encode(folder, tmp_path / "cache", given_negatives=True))[0]
        assert not torch.equal(record["image"], usual["image"])
        for latents, same in zip((record["win"], *record["lose"]), (True, others == (0, 1), others == (1, 0))):
            assert ((latents.float() - usual["win"].float()).square().mean() < 0.01) == same

def touched(folder, act):
    """Which files of a folder are written when `act` is called."""
    before = contents(folder, os.path.getmtime)
    act()
    return {name for name, time in contents(folder, os.path.getmtime).items() if time != before.get(name)}

def test_restarts_do_only_what_is_missing_and_make_it_byte_for_byte(videos, own_cache):
    files = contents(own_cache)
    gone = {"win/00000.safetensors", "win/00002.safetensors", "lose/00001.safetensors", "empty.safetensors"}
    for name in gone:
        (own_cache / name).unlink()
    (own_cache / "win" / f".00002.safetensors.99{MARK}").write_bytes(b"left by a killed process")
    assert touched(own_cache, lambda: add_negatives(encode(videos, own_cache))) == gone
    assert contents(own_cache) == files

def test_what_has_changed_is_made_again_and_then_its_negatives(videos, own_cache, tmp_path):
    folder = shutil.copytree(videos, tmp_path / "videos")
    (folder / "00000.txt").write_text("another caption")
    shutil.copy(folder / "00003.mp4", folder / "00001.mp4")
    (folder / "first_frames").mkdir()
    imageio.imwrite(folder / "first_frames" / "00002.png", np.zeros((32, 32, 3), np.uint8))
    made = touched(own_cache, lambda: encode(folder, own_cache))
    assert made == {"empty.safetensors", *(f"win/{name}.safetensors" for name in NAMES[:3])}
    with pytest.raises(UserError, match="lose/00000.safetensors: was made for another encoding of its clip"):
        data.Records(own_cache)
    assert touched(own_cache, lambda: add_negatives(own_cache)) == {f"lose/{name}.safetensors" for name in NAMES[:3]}
