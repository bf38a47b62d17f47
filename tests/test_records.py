"""Clips into records."""
import json, shutil
from functools import partial

from tests.helpers import NAMES, add_negatives, contents, encode, run_training, same_tensors, spy_on_losses

import imageio.v2 as imageio
import numpy as np
import torch

import data
import model

pytest_plugins = "tests.helpers"


def test_uint8_and_back_is_the_same():
    frames = np.random.default_rng(0).integers(0, 256, (2, 4, 6, 3), np.uint8)
    video = data.from_uint8(frames)
    assert video.shape == (3, 2, 4, 6) and np.array_equal(data.to_uint8(video), frames)


def lay_out(folder, form, clips):
    """A folder of (video, caption)s in one of its forms; every record comes out as videos_NAME."""
    (folder / "videos").mkdir(parents=True), (folder / "first_frames").mkdir()
    write = lambda name, lines: (folder / name).write_text("".join(f"{line}\n" for line in lines))
    rows = [dict(file_name=f"videos/{video.name}", text=caption) for video, caption in clips]
    for video, caption in clips:
        shutil.copy(video, folder / (f"videos_{video.name}" if form == "sidecar" else f"videos/{video.name}"))
        if form == "sidecar":
            write(f"videos_{video.stem}.txt", [caption])
        if form == "authors":
            first = data.to_uint8(data.read_video(video, 1, 32, 32, 8))[0]
            imageio.imwrite(folder / "first_frames" / f"videos_{video.stem}.png", first)
    if form == "authors":
        write("video.txt", [row["file_name"] for row in rows]), write("prompt.txt", [row["text"] for row in rows])
    if form == "jsonl":
        write("metadata.jsonl", map(json.dumps, rows))
    if form == "csv":
        write("metadata.csv", ["text,file_name", *(f'"{row["text"]}",{row["file_name"]}' for row in rows)])
    return folder


def test_names_of_records_stay_in_the_cache(tmp_path):
    assert (data.record_name("/abs/v.mp4") == "abs_v"
            and data.record_name("../a/v.mp4") == "a_v")


def test_every_form_of_folder_gives_the_same_records(videos, tmp_path):
    captions, records = ["a figure waves, slowly", ""], {}
    for form in ("authors", "jsonl", "csv", "sidecar"):
        folder = lay_out(tmp_path / form, form,
                         [(videos / f"{name}.mp4", caption) for name, caption in zip(NAMES, captions)])
        clips, faults = data.list_clips(folder)
        assert [(clip.name, clip.caption) for clip in clips] == [*zip(["videos_00000", "videos_00001"], captions)]
        for clip, name in zip(clips, NAMES):
            assert clip.file.read_bytes() == (videos / f"{name}.mp4").read_bytes()
        if form in ("authors", "sidecar"):                 # one with first frames, one without
            records[form] = data.Records(encode(folder, tmp_path / f"{form}-cache"), negatives=False)
            assert [data.read_header(records[form].folder / "win" / f"{name}.safetensors")[1]["caption"]
                    for name in records[form].names] == captions
    assert all(same_tensors(ours, theirs) for ours, theirs in zip(*records.values()))


def test_a_record_holds_bf16_latents_text_and_what_made_it(videos, cache):
    shapes, metadata = data.read_header(cache / "win" / "00000.safetensors")
    assert shapes == {"win": (8, 5, 8, 8), "image": (8, 1, 8, 8), "text": (16, 32)}
    assert (metadata["caption"] == (videos / "00000.txt").read_text().strip()
            and metadata["source"] == str(videos / "00000.mp4"))
    assert ({"frames": 17, "height": 32, "width": 32, "fps": 8, "vae": data.digest(model.TINY / "vae")}.items()
            <= metadata.items())
    record, encode_text = data.Records(cache)[0], model.load_text_encoder("tiny")
    assert record["lose"].shape == (2, 8, 5, 8, 8) and {v.dtype for v in record.values()} == {torch.bfloat16}
    assert torch.equal(record["text"], encode_text([metadata["caption"]])[0].bfloat16())
    assert torch.equal(data.Records(cache).empty_text(), encode_text([""])[0].bfloat16())


def test_restarts_do_only_what_is_missing_and_make_it_byte_for_byte(videos, own_cache):
    modified = partial(contents, own_cache, lambda p: p.stat().st_mtime_ns)
    files, before = contents(own_cache), modified()
    gone = ["win/00000.safetensors", "win/00002.safetensors", "lose/00001.safetensors", "empty.safetensors"]
    for name in gone:
        (own_cache / name).unlink()
    (own_cache / "win" / ".00002.safetensors.99.part").write_bytes(b"left by a killed process")
    add_negatives(encode(videos, own_cache))
    assert contents(own_cache) == files and {k for k, v in modified().items() if before[k] != v} == {*gone}


def test_image_latents_come_from_the_first_frame_alone(videos, monkeypatch):
    vae, clip, records = model.load_vae("tiny"), data.Clip("a", videos / "00000.mp4", "", "", {}), []
    video = data.read_video(clip.file, 17, 32, 32, 8)
    for rest in (video[:, 1:], -video[:, 1:]):
        monkeypatch.setattr(data, "read_video", lambda *_: torch.cat([video[:, :1], rest], dim=1))
        pixels = data.read_clip(clip, (17, 32, 32), fps=8, films={})
        records.append(data.encode_clip(clip, pixels, vae, data.Options(), "cpu")[0])
    assert (torch.equal(records[0]["image"], records[1]["image"])
            and not torch.equal(records[0]["win"], records[1]["win"]))
    # GroupNorm spans time: no slice of the clip's
    assert not torch.equal(records[0]["image"][:, 0], records[0]["win"][:, 0])


def test_image_noise_keeps_several_encodings_and_training_draws_one(videos, tmp_path, monkeypatch):
    out = add_negatives(encode(videos, tmp_path / "cache", image_noise=2))
    records = [{k: v.float() for k, v in record.items()} for record in data.Records(out)]
    assert records[0]["noised"].shape == (2, 8, 1, 8, 8)
    losses, which = (spy_on_losses(monkeypatch),
                     lambda x, candidates: [torch.equal(x, y) for y in candidates].index(True))
    for micro_batch in (1, 4):                             # whatever else is in the batch
        run_training(tmp_path / f"run-{micro_batch}", out, micro_batch=micro_batch, steps=2)
    drawn = []
    for win, image in ((win, image) for batch in losses for win, image in zip(batch["win"], batch["cond"].image)):
        r = which(win, [record["win"] for record in records])
        drawn.append((r, which(image, records[r]["noised"])))
    assert len(drawn) == 16 and drawn[:8] == drawn[8:] and {k for _, k in drawn} == {0, 1}


def test_the_authors_first_frames_and_negatives_are_used(videos, cache, tmp_path):
    folder = lay_out(tmp_path / "authors", "authors", [(videos / "00000.mp4", "a figure")])
    first = data.to_uint8(data.read_video(videos / "00000.mp4", 1, 32, 32, 8))[0]
    imageio.imwrite(folder / "first_frames" / "videos_00000.png", 255 - first)
    (folder / "negative_samples" / "00000").mkdir(parents=True)
    for k in range(3):                                     # the first is the win itself
        shutil.copy(videos / f"0000{k}.mp4", folder / "negative_samples" / "00000" / f"{k}.mp4")
    record, usual = ({k: v.float() for k, v in data.Records(c)[0].items()}
                     for c in (encode(folder, tmp_path / "cache", given_negatives=True), cache))
    distance = lambda a, b: (a - b).square().mean().item()
    assert (record["lose"].shape == (3, 8, 5, 8, 8)
            and distance(record["win"], usual["win"]) < 0.1 < distance(record["image"], usual["image"]))
    assert (distance(record["lose"][0], record["win"])
            < 0.1 * min(distance(lose, record["win"]) for lose in record["lose"][1:]))
