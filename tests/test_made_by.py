"""What a file says it was made with, what its hash covers, and what the noise in it depends on."""
import os, shutil

from tests.helpers import NAMES, add_negatives, assert_unrelated, encode, generate_bench

import pytest
import torch
from safetensors.torch import load_file, save_file

import data
import model
import sample
from model import UserError

pytest_plugins = "tests.helpers"


def model_with_other(part, folder):
    """The tiny model with one number of one part changed."""
    shutil.copytree(model.TINY, folder)
    (file,) = (folder / part).glob("*.safetensors")
    tensors = load_file(file)
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, file)
    return str(folder)


# ---- Settings: whoever makes more files with others is refused, before anything is loaded ---------------------------

def refuses_to_load(monkeypatch, *modules):
    for module in modules:
        for name in ("load_vae", "load_text_encoder", "load_dit"):
            monkeypatch.setattr(module, name, None, raising=False)


@pytest.mark.parametrize("change", [dict(frames=9), dict(fps=4), dict(image_noise=1), dict(seed=1), dict(vae=None),
                                    dict(given_negatives=True), dict(text_encoder=None)], ids=str)
def test_records_of_other_settings_are_refused(change, videos, own_cache, tmp_path, monkeypatch):
    (name,) = change
    folder = shutil.copytree(videos, tmp_path / "videos")
    for clip in NAMES:
        (folder / "negative_samples" / clip).mkdir(parents=True)
        shutil.copy(folder / "00000.mp4", folder / "negative_samples" / clip)
    options = dict(model="tiny") | change
    if name in ("vae", "text_encoder"):
        options = dict(model=model_with_other(name, tmp_path / "other"))
    refuses_to_load(monkeypatch, data)
    with pytest.raises(UserError, match=f"made with other settings: {name} "):
        data.main(data.Options(videos=str(folder), out=str(own_cache), **options))


def test_records_of_another_size_are_refused(videos, own_cache, monkeypatch):
    refuses_to_load(monkeypatch, data)
    for name, shape in dict(height=(17, 64, 32), width=(17, 32, 64)).items():
        monkeypatch.setattr(data, "clip_shape", lambda *_: shape)                      # this model knows one size alone
        with pytest.raises(UserError, match=f"made with other settings: {name} "):
            encode(videos, own_cache)


@pytest.mark.parametrize("change", [dict(negatives=3), dict(steps=3), dict(guidance=2.0), dict(solver="euler"),
                                    dict(seed=1), dict(transformer=None)], ids=str)
def test_negatives_of_other_settings_are_refused(change, own_cache, tmp_path, monkeypatch):
    (name,) = change
    if name == "transformer":
        change = dict(model=model_with_other(name, tmp_path / "other"))
    refuses_to_load(monkeypatch, sample)
    with pytest.raises(UserError, match=f"lose/made_by.json: was made with other settings: {name} "):
        add_negatives(own_cache, **change)
    (own_cache / "lose" / "made_by.json").unlink()         # each file says so, too
    with pytest.raises(UserError, match=f"lose/00000.safetensors: was made with other settings: {name} "):
        add_negatives(own_cache, **change)


@pytest.mark.parametrize("change", [dict(steps=2), dict(guidance=2.0), dict(solver="multistep"), dict(frames=17),
                                    dict(fps=4), dict(seed=9), dict(transformer=None)], ids=str)
def test_videos_of_other_settings_are_refused(change, shots, methods, tmp_path, monkeypatch):
    (name,) = change
    if name == "transformer":
        change = dict(model=model_with_other(name, tmp_path / "other"))
    refuses_to_load(monkeypatch, sample)
    with pytest.raises(UserError, match=f"bench.json: was made with other settings: {name} "):
        generate_bench(shots, methods / "alpha-method", **change)


def test_videos_of_another_size_are_refused(shots, methods, monkeypatch):
    refuses_to_load(monkeypatch, sample)
    for name in ("height", "width"):
        with pytest.raises(UserError, match=f"bench.json: was made with other settings: {name} "):
            generate_bench(shots, methods / "alpha-method", **{name: 64})


# ---- Hashes ---------------------------------------------------------------------------------------------------------

def test_a_records_hash_is_of_all_that_it_holds(cache):
    hashes = data.Records(cache).hashes
    for name in NAMES:
        found = []
        for kind in ("win", "lose"):
            file = cache / kind / f"{name}.safetensors"
            tensors, metadata = data.read_tensors(file), data.read_header(file)[1]
            assert metadata["hash"] == data.hash_of(tensors)
            for tensor in tensors:
                changed = tensors[tensor].clone()
                changed.view(-1)[-1] += 1
                assert data.hash_of(tensors | {tensor: changed}) != metadata["hash"]
            found.append(metadata["hash"])
        assert hashes[name] == " ".join(found)
    assert len({*hashes.values()}) == 4


def test_the_scores_that_a_run_learns_from_are_part_of_its_records(own_cache):
    found = []
    for better in (1.0, 2.0):
        data.write_json(own_cache / "scores.json", {name: [0.0, better] for name in NAMES})
        found.append(data.Records(own_cache, scores=True).hashes)
    for name in NAMES:
        assert len({found[0][name], found[1][name], data.Records(own_cache).hashes[name]}) == 3


def test_a_digest_tells_weights_of_one_size_apart(tmp_path):
    def digest(content, more=b"", config="{}", prefix="", name="a.safetensors"):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        (folder / name).write_bytes(content + more)
        (folder / "config.json").write_text(config)
        (folder / "README.md").write_text(folder.name)     # is passed over
        return data.digest(folder, prefix)

    large = bytes(2 ** 20)
    assert digest(b"weights") == digest(b"weights")
    different = [digest(b"weights"), digest(b"weightz"), digest(b"weights", config="[]"),
                 digest(b"weights", prefix="ref."), digest(b"weights", name="b.safetensors"),
                 digest(large), digest(large, b"1"), digest(large[:-1] + b"1")]
    assert len({*different}) == len(different)


# ---- Noise ----------------------------------------------------------------------------------------------------------

class Plain:
    """An autoencoder whose posterior has the pixels' mean and a standard deviation of 1."""

    def encode(self, video, generator):
        return video + torch.randn(video.shape, generator=generator)


def encoded(name="a", seed=0, negatives=0, **options):
    """A grey clip's record and negatives."""
    clip, video = data.Clip(name, None, "", "", {}), torch.zeros(3, 9, 8, 8)
    pixels = video, video[:, :1], [video] * negatives
    return data.encode_clip(clip, pixels, Plain(), data.Options(seed=seed, **options), "cpu")


def test_the_posteriors_noise_is_each_clips_each_parts_and_each_seeds_own():
    again = encoded(negatives=1)
    parts, everything = encoded(negatives=1), []
    assert torch.equal(parts[0]["win"], again[0]["win"]) and torch.equal(parts[1][0], again[1][0])
    for record, negatives in (encoded(negatives=2), encoded(name="b", negatives=1), encoded(seed=1, negatives=1)):
        everything += [record["win"], *negatives]
    assert_unrelated(torch.stack(everything).float())
    images = [encoded(name=name, seed=seed)[0]["image"] for name in "ab" for seed in (0, 1)]
    assert len(torch.stack(images).flatten(1).unique(dim=0)) == 4
    assert not torch.equal(images[0], encoded()[0]["win"][:, :1])


def test_image_noise_has_the_authors_strengths_and_is_each_clips_and_seeds_own(monkeypatch):
    monkeypatch.setattr(Plain, "encode", lambda self, video, generator: video)
    noised = encoded(image_noise=400)[0]["noised"].float()
    assert noised.shape == (400, 3, 1, 8, 8)
    strengths = noised.flatten(1).std(1).log()             # a log-normal one for each, as Stable Video Diffusion's
    assert strengths.mean() == pytest.approx(-3, abs=0.1) and strengths.std() == pytest.approx(0.5, abs=0.05)
    ours = [encoded(name=name, seed=seed, image_noise=1)[0]["noised"] for name in "ab" for seed in (0, 1)]
    assert len(torch.cat(ours).flatten(1).unique(dim=0)) == 4
    assert len(noised.flatten(1).unique(dim=0)) == 400


def test_a_generator_depends_on_every_part_of_its_key():
    keys = [("a", 1, 2), ("a", 1, 3), ("a", 2, 2), ("b", 1, 2), ("a", 1), ("a", "1", 2), ("a1", 2)]
    draws = torch.stack([torch.randn(1000, generator=data.generator(*key)) for key in keys])
    assert_unrelated(draws)
    assert torch.equal(draws[0], torch.randn(1000, generator=data.generator("a", 1, 2)))


# ---- What is left of earlier runs -----------------------------------------------------------------------------------

def test_the_list_of_what_was_left_out_goes_once_nothing_is(videos, tmp_path):
    folder, out = shutil.copytree(videos, tmp_path / "videos"), tmp_path / "cache"
    (folder / "00001.txt").rename(folder / "00001.away")
    encode(folder, out, skip_bad=True)
    assert (out / "left_out_0.txt").is_file()
    (folder / "00001.away").rename(folder / "00001.txt")
    encode(folder, out, skip_bad=True)
    assert not (out / "left_out_0.txt").exists()


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    flushed, fsync = [], os.fsync

    def spy(number):
        (part,) = tmp_path.iterdir()                       # and not a.json yet
        flushed.append(part.name)
        assert os.fstat(number).st_ino == part.stat().st_ino
        os.write(number, b"")                              # Windows flushes only what may be written to
        fsync(number)

    monkeypatch.setattr(data.os, "fsync", spy)
    data.write_json(tmp_path / "a.json", {})
    assert len(flushed) == 1 and flushed[0].endswith(".part")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_what_could_not_be_written_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="a.json: cannot be written"):
        data.write_json(tmp_path / "file" / "a.json", {})
    with pytest.raises(ZeroDivisionError), data.whole_file(tmp_path / "a.json") as part:
        part.write_text("half of i")
        1 / 0
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
