"""Folders of clips with captions, in all their forms, and what may be wrong with them."""
import json, math, re, shutil
from pathlib import Path

from tests.helpers import NAMES, add_negatives, encode, jsonl, make_video, refusal, write_list

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import data
from support import UserError, films, folders
from support.files import read_header, write_tensors
from support.lists import list_clips, record_name

pytest_plugins = "tests.helpers"

TWO = dict(file_name="b.mp4", text="two")
TABLE = "file_name{0}text\na.mp4{0}one\nb.mp4{0}two\n"
LISTS = {                                                  # a list that is read: its captions
    "exported": ({"metadata.csv": "\ufefffile_name, text\r\na.mp4,one\r\n,\r\n\r\nb.mp4,two\r\n"}, ["one", "two"]),
    "quoted": ({"metadata.csv": 'text,file_name\n"one, ""1""\nor 2",a.mp4\ntwo,b.mp4\n'}, ['one, "1"\nor 2', "two"]),
    "separators": (jsonl(dict(file_name="a.mp4", text="one\u2028\u0085 1"), TWO), ["one\u2028\u0085 1", "two"]),
    "blank in both": ({"video.txt": "a.mp4\r\n\r\nb.mp4\r\n", "prompt.txt": "\ufeffone\n\ntwo\n\n"}, ["one", "two"]),
    "beside": ({"a.txt": "\ufeffone\r\n", "b.TXT": "two"}, ["one", "two"]),
    "kept": (jsonl(dict(file_name="a.mp4", text="one", keep=True), dict(TWO, keep=False)), ["one"]),
    "undecided is not kept": (jsonl(dict(file_name="a.mp4", text="one"), dict(TWO, keep=None)), ["one"]),
}

@pytest.mark.parametrize("kind", LISTS)
def test_lists_are_read(kind, videos, tmp_path, capsys):
    content, captions = LISTS[kind]
    clips, faults = list_clips(write_list(tmp_path / "list", content, videos))
    assert [clip.caption for clip in clips] == captions and not faults
    assert ("1 clips are not used, by their `keep`" in capsys.readouterr().out) == ("kept" in kind)

FAULTS = {                                                 # a list of which a row is refused: what the line says
    "another encoding": ({"a.txt": b"the figure\x92s arm", "b.txt": "two"}, ["a.txt: text is", "UTF-8"]),
    "a comma": ({"metadata.csv": "file_name,text\na.mp4,one, two\nb.mp4,two\n"}, ["row 2", "2 cells", "quotes"]),
    "no text": (jsonl(dict(file_name="a.mp4", text=["one", 2]), TWO), ["row 1", 'text is ["one", 2]', "expected text"]),
    "no JSON": ({"metadata.jsonl": '{"file_name": "a.mp4", "text": "one}\n' + json.dumps(TWO)},
                ["metadata.jsonl, row 1", "expected a JSON object"]),
    "a blank in one": ({"video.txt": "\nb.mp4\n", "prompt.txt": "one\ntwo\n"}, ["video.txt, row 1", "file_name is"]),
    "a start before 0": (jsonl(dict(file_name="a.mp4", text="one", start=-0.5), TWO), ["row 1", "start is -0.5"]),
    "no start": ({"metadata.csv": "file_name,text,start\na.mp4,one,soon\nb.mp4,two,\n"}, ["row 2", "start is soon"]),
    "twice": (jsonl(TWO, dict(file_name="./b.mov", text="a")), ["row 2: its record would have", "row 1, b;"]),
}

@pytest.mark.parametrize("kind", FAULTS)
def test_a_faulty_row_is_named_and_the_others_are_read(kind, videos, tmp_path, monkeypatch):
    content, words = FAULTS[kind]
    folder = write_list(tmp_path / "list", content, videos)
    (clip,), (fault,) = list_clips(folder)
    assert (clip.name, clip.caption) == ("b", "two") and all(word in fault for word in words), fault
    assert fault in refusal(monkeypatch, *f"data --videos {folder} --out {tmp_path / 'out'} --model tiny".split())

REFUSED = {                                                # what a folder holds that is refused: what the line says
    "two lists": (jsonl(TWO) | {"metadata.csv": TABLE.format(",")}, ["metadata.jsonl and metadata.csv"]),
    "no captions": ({"video.txt": "a.mp4\n"}, ["prompt.txt: cannot be read"]),
    "a row too many": ({"video.txt": "a.mp4\nb.mp4\n", "prompt.txt": "\ntwo\nthree\n"}, ["2 lines and prompt.txt 3"]),
    "an open quote": ({"metadata.csv": TABLE.format(",").replace("one", '"one')}, ["unexpected end of data"]),
    "nothing": ({"a.md": ""}, ["holds no videos with captions; found a.md, expected NAME.txt beside each video"]),
}

@pytest.mark.parametrize("kind", REFUSED)
def test_of_a_list_that_cannot_be_read_the_line_says_what_was_found(kind, videos, tmp_path):
    content, words = REFUSED[kind]
    clips = ["a.mp4", "b.mp4"] if kind != "nothing" else []
    with pytest.raises(UserError) as refused:
        list_clips(write_list(tmp_path / "list", content, videos, clips))
    assert all(word in str(refused.value) for word in words)

def test_what_a_folder_holds_and_is_not_used_is_counted_without_hidden_files(videos, tmp_path, capsys):
    rows = dict(file_name="a.m4v", text="one"), dict(file_name="b@0.MP4", text="two")
    folder = write_list(tmp_path / "list", jsonl(*rows) | {"._a.mp4": ""}, videos, clips=("a.m4v", "b@0.MP4", "c.mov"))
    for name in ("first_frames/a.JPG", "first_frames/b@0.png", "first_frames/c.png", "first_frames/._a.png",
                 "negative_samples/a/0.mp4", "negative_samples/a/._0.mp4"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    (first, second), faults = list_clips(folder, given_negatives=True)
    assert (first.file.name, second.file.name, faults) == ("a.m4v", "b@0.MP4", [])
    assert (first.image.name, [path.name for path in first.negatives]) == ("a.JPG", ["0.mp4"])
    assert "1 other videos are not used, such as c.mov" in capsys.readouterr().out
    assert second.image.name == "b@0.png"

def test_two_spans_of_a_film_are_two_records_and_know_where_they_begin(videos, tmp_path):
    rows = [dict(file_name="a.mp4", text="one"), dict(file_name="a.mp4", text="one", start="0.25")]
    folder = write_list(tmp_path / "list", jsonl(*rows), videos, clips=["a.mp4"])
    (folder / "first_frames").mkdir()
    Image.new("RGB", (32, 32)).save(folder / "first_frames" / "a.png")
    records = data.Records(encode(folder, tmp_path / "out", frames=9), negatives=False)
    assert records.names == ["a", "a@0.25"] and len({*records.hashes.values()}) == 2
    assert read_header(records.folder / "win" / "a@0.25.safetensors")[1]["start"] == 0.25
    assert not torch.equal(*(record["image"] for record in records))                           # noise of their own
    spans = [clip._replace(negatives=(videos / "00001.mp4",)) for clip in list_clips(folder)[0]]
    (_, image, _), (video, same, (negative,)) = [data.read_clip(span, (9, 32, 32), 8) for span in spans]
    assert torch.equal(image, same)                        # the first frame goes with the file
    assert torch.equal(video, films.read_video(folder / "a.mp4", 9, 32, 32, 8, start=0.25))
    assert torch.equal(negative, films.read_video(videos / "00001.mp4", 9, 32, 32, 8))         # from its beginning

def test_names_of_records_stay_in_the_cache_and_are_seen_and_short_enough():
    assert record_name("/abs/v.mp4") == "abs_v" and record_name("../a/v.mp4") == "a_v"
    assert not record_name(".hidden/v.mp4").startswith(".")
    names = [record_name("é" * 120 + end + ".mp4") for end in "12"]                # 241 bytes
    assert len({*names}) == 2 and max(len(name.encode()) for name in names) <= 200

def damage(file):
    """Overwrite a third of a video; its header stays whole."""
    content = file.read_bytes()
    third = len(content) // 3
    file.write_bytes(content[:third] + bytes(third) + content[2 * third:])

def test_skip_bad_leaves_clips_out_and_lists_them_and_without_it_the_others_are_encoded(videos, tmp_path, capsys):
    folder = shutil.copytree(videos, tmp_path / "videos")
    damage(folder / "00003.mp4")
    with pytest.raises(UserError, match=r"00003.mp4: is damaged.*\(clips with a fault: 1; --skip-bad"):
        encode(folder, tmp_path / "cache")
    assert data.Records(tmp_path / "cache", negatives=False).names == NAMES[:3]
    for name in NAMES[1:3]:
        (folder / f"{name}.txt").unlink()
    out = encode(folder, tmp_path / "other", skip_bad=True)
    assert data.Records(out, negatives=False).names == ["00000"]
    assert "\n3 clips left out; " in capsys.readouterr().out
    named = re.findall(r"/(\w+\.mp4): .*\n", (out / "left_out_0.txt").read_text())
    assert named == ["00001.mp4", "00002.mp4", "00003.mp4"]
    encode(videos, out, skip_bad=True)                     # once nothing is left out, the list goes
    assert not (out / "left_out_0.txt").exists() and len(data.Records(out, negatives=False)) == 4

@pytest.mark.parametrize("spoil", [damage, Path.unlink])   # found when it is read, and before
def test_skip_bad_with_no_clip_left_is_an_error(spoil, videos, tmp_path):
    folder = write_list(tmp_path / "list", {"metadata.csv": "file_name,text\na.mp4,one\n"}, videos, ["a.mp4"])
    spoil(folder / "a.mp4")
    with pytest.raises(UserError, match="no clip is left.*a.mp4"):
        encode(folder, tmp_path / "out", skip_bad=True)

def test_clips_are_read_ahead_in_order_and_only_a_few(monkeypatch):
    monkeypatch.setattr(films, "READERS", 3)
    begun = []
    for i, (clip, _) in enumerate(films.read_ahead(range(10), begun.append, faults=[])):
        assert clip == i and len(begun) <= i + 3
    assert sorted(begun) == list(range(10))

def test_nothing_that_is_not_finite_is_stored(own_cache, picture, tmp_path):
    with pytest.raises(UserError, match="a.safetensors: win would hold numbers that are not finite"):
        write_tensors(tmp_path / "a.safetensors", dict(image=torch.zeros(2), win=torch.tensor([1, math.nan])))
    broken = shutil.copytree(folders.TINY, tmp_path / "broken")
    (file,) = (broken / "transformer").glob("*.safetensors")
    save_file({name: torch.full_like(tensor, math.nan) for name, tensor in load_file(file).items()}, file)
    shutil.rmtree(own_cache / "lose")
    with pytest.raises(UserError, match="00000.safetensors: lose would hold numbers that are not finite"):
        add_negatives(own_cache, model=str(broken))
    with pytest.raises(UserError, match="a.mp4: would hold numbers that are not finite; .* of .*broken"):
        make_video(tmp_path / "a.mp4", picture, model=str(broken), frames=9)
    assert not list(own_cache.glob("lose/*.safetensors")) and not list(tmp_path.glob("a.*"))
