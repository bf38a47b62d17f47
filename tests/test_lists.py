"""Folders of clips with captions, in all their forms, and what may be wrong with them."""
import io, json, math, re, shutil, sys
from functools import partial

from tests.helpers import NAMES, as_a_process, encode, jsonl, refusal, write_list

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import data
import model

pytest_plugins = "tests.helpers"


TWO = dict(file_name="b.mp4", text="two")
LISTS = {                                                  # a list that is read: its captions
    "saved by a spreadsheet": ({"metadata.csv": b"\xef\xbb\xbffile_name,text\r\na.mp4,one\r\n,\r\n\r\nb.mp4,two\r\n"},
                               ["one", "two"]),
    "quoted": ({"metadata.csv": 'text,file_name\n"one, ""1""\nand on",a.mp4\ntwo,b.mp4\n'},
               ['one, "1"\nand on', "two"]),
    "separators": (jsonl(dict(file_name="a.mp4", text="one\u2028\u0085 1"), TWO), ["one\u2028\u0085 1", "two"]),
    "blank in both": ({"video.txt": "a.mp4\r\n\r\nb.mp4\r\n", "prompt.txt": "\ufeffone\n\ntwo\n\n"}, ["one", "two"]),
    "blank at an end": ({"video.txt": "a.mp4\nb.mp4\n\n\n", "prompt.txt": "one\ntwo\n"}, ["one", "two"]),
    "beside": ({"a.txt": "\ufeffone\r\n", "b.TXT": "two"}, ["one", "two"]),
    "kept": (jsonl(dict(file_name="a.mp4", text="one", keep=True), dict(TWO, keep=False)), ["one"]),
}


@pytest.mark.parametrize("kind", LISTS)
def test_lists_are_read(kind, videos, tmp_path, capsys):
    content, captions = LISTS[kind]
    clips, _ = data.list_clips(write_list(tmp_path / "list", content, videos))
    assert [clip.caption for clip in clips] == captions
    assert ("1 clips are not used, by their `keep`" in capsys.readouterr().out) == (kind == "kept")


FAULTS = {                                                 # a list of which a row is refused: what the line says
    "another encoding": ({"a.txt": b"the figure\x92s arm", "b.txt": "two"}, ["a.txt", "character 11", "UTF-8"]),
    "half of a pair": ({"metadata.jsonl": r'{"file_name": "a.mp4", "text": "x\ud83d"}' + "\n" + json.dumps(TWO)},
                       ["metadata.jsonl, row 1", "character 2", "UTF-8"]),
    "a comma": ({"metadata.csv": "file_name,text\na.mp4,one, two, three\nb.mp4,two\n"},
                ["metadata.csv, row 2", "2 cells", "quotes"]),
    "a missing cell": ({"metadata.csv": "file_name,text\na.mp4\nb.mp4,two\n"}, ["metadata.csv, row 2", "2 cells"]),
    "a stray quote": ({"metadata.csv": 'file_name,text\na.mp4,"one" more\nb.mp4,two\n'},
                      ["metadata.csv, row 2", "expected after"]),
    "no text": (jsonl(dict(file_name="a.mp4", text=["one", 2]), TWO), ["jsonl, row 1", 'text is ["one", 2]', "expected text"]),
    "no name": (jsonl(dict(file_name=" ", text="one"), TWO), ["metadata.jsonl, row 1", "file_name is"]),
    "no JSON": ({"metadata.jsonl": '{"file_name": "a.mp4", "text": "one}\n' + json.dumps(TWO)},
                ["metadata.jsonl, row 1", "Unterminated"]),
    "no object": (jsonl(["file_name", "text"], TWO), ["metadata.jsonl, row 1", '["file_name", "text"]']),
    "null": (jsonl(None, TWO), ["metadata.jsonl, row 1", "null"]),
    "a number": (jsonl(3, TWO), ["metadata.jsonl, row 1", "3"]),
    "no caption": ({"b.txt": "two"}, ["a.mp4: has no caption", "a.txt"]),
    "no file": ({"metadata.csv": "file_name,text\nnowhere.mp4,one\nb.mp4,two\n"}, ["nowhere.mp4", "no such video"]),
    "a row too many": ({"video.txt": "a.mp4\nb.mp4\n", "prompt.txt": "\ntwo\nthree\n"}, None),
    "a row too few": ({"video.txt": "a.mp4\nb.mp4\n", "prompt.txt": "one\n"}, None),
    "a blank in one": ({"video.txt": "\nb.mp4\n", "prompt.txt": "one\ntwo\n"}, ["video.txt, row 1", "file_name is"]),
    "an open quote": ({"metadata.csv": 'file_name,text\nb.mp4,two\na.mp4,"one\nc.mp4,three\n'},
                      ["metadata.csv, row 3", "unexpected end of data"]),
    "other columns": ({"metadata.csv": "path;caption\na.mp4;one\n"}, ["path;caption", "expected file_name and text"]),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_faulty_row_is_named_and_with_skip_bad_left_out_alone(kind, videos, tmp_path, monkeypatch, capsys):
    content, words = FAULTS[kind]
    folder, out = write_list(tmp_path / "list", content, videos), tmp_path / "out"
    command = f"data --videos {folder} --out {out} --model tiny".split()
    message = refusal(monkeypatch, *command)
    assert all(word in message for word in words or ["video.txt has 2 lines"]), message
    if words and kind != "other columns":
        encode(folder, out, skip_bad=True)
        assert data.Records(out, negatives=False).names == ["b"]
        assert all(word in (out / "left_out_0.txt").read_text() for word in words)
        assert "1 clips left out" in capsys.readouterr().out


def test_skip_bad_leaves_clips_out_and_lists_them(videos, tmp_path, capsys):
    folder = shutil.copytree(videos, tmp_path / "videos")
    (folder / "00001.txt").unlink()
    (folder / "00002.mp4").write_bytes((folder / "00002.mp4").read_bytes()[:700])
    out = encode(folder, tmp_path / "cache", skip_bad=True)
    assert data.Records(out, negatives=False).names == ["00000", "00003"]
    printed = capsys.readouterr().out
    assert "\n2 clips left out; " in printed and "\n2 clips in" in printed
    assert re.findall(r"/(\w+\.mp4): .*\n", (out / "left_out_0.txt").read_text()) == ["00001.mp4", "00002.mp4"]


def test_a_clip_that_turns_out_bad_while_it_is_decoded(videos, tmp_path, monkeypatch):
    folder = shutil.copytree(videos, tmp_path / "videos")
    content = bytearray((folder / "00002.mp4").read_bytes())
    third = len(content) // 3
    content[third:2 * third] = bytes(third)
    (folder / "00002.mp4").write_bytes(content)            # its header is whole
    monkeypatch.setattr(data, "READERS", 2)
    with pytest.raises(model.UserError, match="00002.mp4: is damaged"):
        encode(folder, tmp_path / "cache")
    assert data.Records(tmp_path / "cache", negatives=False).names == ["00000", "00001", "00003"]
    out = encode(folder, tmp_path / "cache", skip_bad=True)
    assert data.Records(out, negatives=False).names == ["00000", "00001", "00003"]


def test_clips_are_read_ahead_in_order_and_only_a_few(monkeypatch):
    monkeypatch.setattr(data, "READERS", 3)
    begun = []
    for i, (clip, _) in enumerate(data.read_ahead(list(range(10)), begun.append, faults=[])):
        assert clip == i and len(begun) <= i + 3
    assert sorted(begun) == list(range(10))


def test_what_a_folder_holds_and_is_not_used_is_counted(videos, tmp_path, capsys):
    content = {"a.txt": "one", "b.txt": "two", "a.srt": "", "c.txt": "none"}
    folder = write_list(tmp_path / "list", content, videos, clips=("a.m4v", "b.XYZ"))
    (folder / "first_frames").mkdir()
    for name in ("a.JPG", "unknown.png"):
        Image.new("RGB", (32, 32)).save(folder / "first_frames" / name)
    clips, _ = data.list_clips(folder)
    assert [clip.file.name for clip in clips] == ["a.m4v", "b.XYZ"] and clips[0].image.name == "a.JPG"
    assert "3 other files are not used, such as " in capsys.readouterr().out
    assert len(data.Records(encode(folder, tmp_path / "cache"), negatives=False)) == 2


def test_a_list_of_pictures_is_read_like_one_of_videos(tmp_path):
    for name in ("a.png", "b.jpeg"):
        Image.new("RGB", (32, 32)).save(tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text(name)
    (tmp_path / "images.txt").write_text("b.jpeg\na.png\n"), (tmp_path / "prompts.txt").write_text("one\ntwo\n")
    read = partial(data.read_list, tmp_path, files="images.txt", prompts="prompts.txt", what="picture")
    assert [(clip.file.name, clip.caption) for clip in read()[0]] == [("b.jpeg", "one"), ("a.png", "two")]
    (tmp_path / "images.txt").unlink()
    assert [clip.file.name for clip in read()[0]] == ["a.png", "b.jpeg"]


def test_uneven_negatives_are_refused_before_anything_is_encoded(videos, tmp_path, monkeypatch):
    folder = shutil.copytree(videos, tmp_path / "videos")
    for name in NAMES:
        (folder / "negative_samples" / name).mkdir(parents=True)
        for k in range(1 if name == "00002" else 2):
            shutil.copy(folder / "00000.mp4", folder / "negative_samples" / name / f"{k}.mp4")
    command = f"data --videos {folder} --out {tmp_path / 'out'} --model tiny --given-negatives".split()
    assert "00002.mp4: has 1 negatives" in refusal(monkeypatch, *command) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("part", ["vae", "text_encoder", "transformer"])
def test_nothing_that_is_not_finite_is_stored(part, videos, tmp_path, own_cache, monkeypatch):
    broken = shutil.copytree(model.TINY, tmp_path / "broken")
    (file,) = (broken / part).glob("*.safetensors")
    with safe_open(file, "pt") as f:
        metadata = f.metadata()
    save_file({k: torch.full_like(v, math.nan) for k, v in load_file(file).items()}, file, metadata)
    command, place = f"data --videos {videos} --out {tmp_path / 'out'}", tmp_path / "out"
    if part == "transformer":
        shutil.rmtree(own_cache / "lose")
        command, place = f"sample --data {own_cache} --negatives 2 --steps 2", own_cache / "lose"
    message = refusal(monkeypatch, *command.split(), "--model", str(broken))
    assert ".safetensors" in message and "not finite" in message and str(broken) in message
    assert not list(place.glob("win/*.safetensors")) and not list(place.glob("*.safetensors")) or part == "vae"


def test_a_long_name_is_shortened_to_one_of_its_own(videos, tmp_path):
    names = ["é" * 120 + "1", "é" * 120 + "2"]             # 241 bytes
    captions = {f"{name}.txt": "one" for name in names}
    folder = write_list(tmp_path / "list", captions, videos, clips=[f"{name}.mp4" for name in names])
    records = data.Records(encode(folder, tmp_path / "cache"), negatives=False)
    assert len({*records.names}) == 2 and max(len(name.encode()) for name in records.names) <= 200


@pytest.mark.parametrize("name", ["data", "sample", "train"])
def test_a_console_that_cannot_print_a_sign_prints_another(name, monkeypatch):
    module = sys.modules[name]
    for arguments, status in ((["--help"], 0), (["--model", "ω×"], 1)):
        console = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
        monkeypatch.setattr(sys, "stdout", console), monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        with pytest.raises(SystemExit) as stopped, as_a_process():
            data.command(module.main, module.Options, name)
        console.flush()
        assert console.buffer.getvalue() and bool(stopped.value.code) == bool(status)
