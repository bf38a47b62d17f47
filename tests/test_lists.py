"""Folders of clips with captions, in all their forms, and what may be wrong with them."""
import io, json, math, re, shlex, shutil, sys, unicodedata
from collections import Counter
from functools import partial

from tests.helpers import NAMES, add_negatives, as_a_process, encode, jsonl, refusal, write_list

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import data
import model
import sample
from toy import world

pytest_plugins = "tests.helpers"


TWO = dict(file_name="b.mp4", text="two")
LISTS = {                                                  # a list that is read: its captions
    "saved by a spreadsheet": ({"metadata.csv": b"\xef\xbb\xbffile_name,text\r\na.mp4,one\r\n,\r\n\r\nb.mp4,two\r\n"},
                               ["one", "two"]),
    "spaced": ({"metadata.csv": "\nfile_name , text\na.mp4,one\n"}, ["one"]),
    "quoted": ({"metadata.csv": 'text,file_name\n"one, ""1""\nand on",a.mp4\ntwo,b.mp4\n'},
               ['one, "1"\nand on', "two"]),
    "separators": (jsonl(dict(file_name="a.mp4", text="one\u2028\u0085 1"), TWO), ["one\u2028\u0085 1", "two"]),
    "blank in both": ({"video.txt": "a.mp4\r\n\r\nb.mp4\r\n", "prompt.txt": "\ufeffone\n\ntwo\n\n"}, ["one", "two"]),
    "blank at an end": ({"video.txt": "a.mp4\nb.mp4\n\n\n", "prompt.txt": "one\ntwo\n"}, ["one", "two"]),
    "beside": ({"a.txt": "\ufeffone\r\n", "b.TXT": "two"}, ["one", "two"]),
    "kept": (jsonl(dict(file_name="a.mp4", text="one", keep=True), dict(TWO, keep=False)), ["one"]),
    "kept, in a table": ({"metadata.csv": "file_name,text,keep\na.mp4,one,True\nb.mp4,two,False\n"}, ["one"]),
    "undecided is not kept": (jsonl(dict(file_name="a.mp4", text="one"), dict(TWO, keep=None)), ["one"]),
}


@pytest.mark.parametrize("kind", LISTS)
def test_lists_are_read(kind, videos, tmp_path, capsys):
    content, captions = LISTS[kind]
    clips, _ = data.list_clips(write_list(tmp_path / "list", content, videos))
    assert [clip.caption for clip in clips] == captions
    assert ("1 clips are not used, by their `keep`" in capsys.readouterr().out) == ("kept" in kind)


FAULTS = {                                                 # a list of which a row is refused: what the line says
    "another encoding": ({"a.txt": b"the figure\x92s arm", "b.txt": "two"}, ["a.txt", "character 11", "UTF-8"]),
    "half of a pair": ({"metadata.jsonl": r'{"file_name": "a.mp4", "text": "x\ud83d"}' + "\n" + json.dumps(TWO)},
                       ["metadata.jsonl, row 1", "character 2", "UTF-8"]),
    "a comma": ({"metadata.csv": "file_name,text\na.mp4,one, two, three\nb.mp4,two\n"},
                ["metadata.csv, row 2", "2 cells", "quotes"]),
    "a missing cell": ({"metadata.csv": "file_name,text\na.mp4\nb.mp4,two\n"}, ["metadata.csv, row 2", "2 cells"]),
    "a stray quote": ({"metadata.csv": 'file_name,text\na.mp4,"one" more\nb.mp4,two\n'},
                      ["metadata.csv, row 2", "expected after"]),
    "no text": (jsonl(dict(file_name="a.mp4", text=["one", 2]), TWO), ["row 1", 'text is ["one", 2]', "expected text"]),
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
    "a start before the start": (jsonl(dict(file_name="a.mp4", text="one", start=-0.5), TWO),
                                 ["metadata.jsonl, row 1", "start is -0.5", "at least 0"]),
    "no start": ({"metadata.csv": "file_name,text,start\na.mp4,one,soon\nb.mp4,two,\n"},
                 ["metadata.csv, row 2", 'start is "soon"', "expected seconds"]),
    "an endless start": (jsonl(dict(file_name="a.mp4", text="one", start=math.inf), TWO),
                         ["row 1", "start is Infinity"]),
    "several starts": (jsonl(dict(file_name="a.mp4", text="one", start=[1, 2]), TWO), ["row 1", "start is [1, 2]"]),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_faulty_row_is_named_and_the_others_are_read(kind, videos, tmp_path, monkeypatch):
    content, words = FAULTS[kind]
    folder = write_list(tmp_path / "list", content, videos)
    message = refusal(monkeypatch, *f"data --videos {folder} --out {tmp_path / 'out'} --model tiny".split())
    assert all(word in message for word in words or ["video.txt has 2 lines"]), message
    if words and kind != "no file":                        # which is found out later
        clips, (fault,) = data.list_clips(folder)
        assert [clip.name for clip in clips] == ["b"] and all(word in fault for word in words)


SPREADSHEET = "file_name{0}text\na.mp4{0}one\nb.mp4{0}two\n"
OTHER_LISTS = {                                            # what a folder holds: what the line says
    "two lists": (jsonl(dict(file_name="a.mp4", text="old")) | {"metadata.csv": SPREADSHEET.format(",")},
                  ["metadata.jsonl and metadata.csv"]),
    "three": ({"video.txt": "a.mp4\n", "prompt.txt": "one\n", "metadata.csv": SPREADSHEET.format(",")},
              ["video.txt and metadata.csv"]),
    "semicolons": ({"metadata.csv": SPREADSHEET.format(";")}, ["metadata.csv", "file_name;text", "commas"]),
    "tabs": ({"metadata.csv": SPREADSHEET.format("\t")}, ["metadata.csv", r"file_name\ttext", "commas"]),
    "other names": ({"metadata.csv": "path,caption\na.mp4,one\n"}, ["'path,caption'", "expected file_name and text"]),
    "no head": ({"metadata.csv": "a.mp4,one\nb.mp4,two\n"}, ["'a.mp4,one'", "expected file_name and text"]),
    "open": ({"metadata.csv": '"file_name,text\na.mp4,one\n'}, ["'\"file_name,text'", "expected file_name and text"]),
    "empty": ({"metadata.csv": ""}, ["metadata.csv", "expected file_name and text"]),
    "tsv": ({"metadata.tsv": SPREADSHEET.format("\t")}, ["metadata.tsv", "metadata.csv"]),
    "parquet": ({"train.parquet": b"PAR1\xff\x00PAR1"}, ["train.parquet", "metadata.csv"]),
    "json": ({"metadata.json": json.dumps([dict(TWO)])}, ["metadata.json", "metadata.jsonl"]),
    "an array": ({"metadata.jsonl": json.dumps([dict(TWO)])}, ["metadata.jsonl: is one JSON array", "a line for each"]),
    "a long array": ({"metadata.jsonl": json.dumps([dict(TWO)], indent=2) + "\n"}, ["is one JSON array"]),
}


@pytest.mark.parametrize("kind", OTHER_LISTS)
def test_of_a_list_that_cannot_be_read_the_line_says_what_was_found_and_what_to_do(kind, videos, tmp_path):
    content, words = OTHER_LISTS[kind]
    with pytest.raises(model.UserError) as refused:
        data.list_clips(write_list(tmp_path / "list", content, videos))
    assert all(word in str(refused.value) for word in words) and "no caption" not in str(refused.value), refused.value


def test_a_file_beside_captions_is_no_list(videos, tmp_path):
    content = {"a@home.txt": "one", "notes.json": "[]"}
    folder = write_list(tmp_path / "list", content, videos, clips=("a@home.mp4", "b.mp4"))
    (folder / "first_frames").mkdir()
    Image.new("RGB", (32, 32)).save(folder / "first_frames" / "a@home.png")
    (clip,), (fault,) = data.list_clips(folder)
    assert clip.image and "b.mp4: has no caption" in fault


@pytest.mark.parametrize("listed, stored", [("NFC", "NFD"), ("NFD", "NFC")])
def test_a_name_is_found_in_either_form_of_unicode(listed, stored, videos, tmp_path):
    name = unicodedata.normalize(stored, "café")
    clip, row = f"{name}.mp4", dict(file_name=unicodedata.normalize(listed, "café.mp4"), text="one")
    folder = write_list(tmp_path / "list", jsonl(row), videos, clips=[clip])
    for place in ("first_frames", f"negative_samples/{name}"):
        (folder / place).mkdir(parents=True)
    Image.new("RGB", (32, 32)).save(folder / "first_frames" / f"{name}.png")
    shutil.copy(folder / clip, folder / "negative_samples" / name / "0.mp4")
    ((found,), faults) = data.list_clips(folder, given_negatives=True)
    assert found.file.name == clip and found.image and len(found.negatives) == 1 and not faults
    caption = unicodedata.normalize(listed, "café.txt")
    ((found,), faults) = data.list_clips(write_list(tmp_path / "beside", {caption: "one"}, videos, clips=[clip]))
    assert (found.file.name, found.caption, faults) == (clip, "one", [])


def test_two_spans_of_a_film_are_two_records_and_know_where_they_begin(videos, tmp_path):
    rows = [dict(file_name="a.mp4", text="one"), dict(file_name="a.mp4", text="one", start="0.25"),
            dict(file_name="a.mp4", text="one", start=0)]
    folder = write_list(tmp_path / "list", jsonl(*rows[:2]), videos, clips=["a.mp4"])
    (folder / "first_frames").mkdir()
    Image.new("RGB", (32, 32)).save(folder / "first_frames" / "a.png")
    records = data.Records(encode(folder, tmp_path / "out", frames=9), negatives=False)
    assert records.names == ["a", "a@0.25"] and len({*records.hashes.values()}) == 2
    headers = [data.read_header(records.folder / "win" / f"{name}.safetensors")[1] for name in records.names]
    assert [header["start"] for header in headers] == [0, 0.25]
    assert not torch.equal(*(record["image"] for record in records))                           # noise of their own
    pixels = [data.read_clip(clip, (9, 32, 32), 8, {}) for clip in data.list_clips(folder)[0]]
    assert torch.equal(pixels[0][1], pixels[1][1])         # the first frame goes with the file
    assert torch.equal(pixels[1][0], data.read_video(folder / "a.mp4", 9, 32, 32, 8, start=0.25))
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(model.UserError, match="two clips are named a"):
        data.list_clips(folder)


def test_given_negatives_begin_where_their_files_do(videos, tmp_path):
    data.write_video(tmp_path / "short.mp4", world.toy_video(0, 9, frames=9)[0], 8)
    clip = data.Clip("a", videos / "00000.mp4", "", "", {}, start=1.0, negatives=(tmp_path / "short.mp4",))
    films = {}
    data.check_clip(clip, 1, (9, 32, 32), 8, films)
    video, _, (negative,) = data.read_clip(clip, (9, 32, 32), 8, films)
    assert torch.equal(video, data.read_video(clip.file, 9, 32, 32, 8, start=1.0))
    assert torch.equal(negative, data.read_video(tmp_path / "short.mp4", 9, 32, 32, 8))


def test_a_file_is_opened_once_to_check_it_and_once_to_read_it_and_what_is_printed_can_be_pasted(
        videos, tmp_path, monkeypatch, capsys):
    opened, run, place = [], data.run_ffmpeg, tmp_path / "it's a cache; $HOME"
    monkeypatch.setattr(data, "run_ffmpeg", lambda path, *rest, **how: opened.append(path) or run(path, *rest, **how))
    encode(videos, place)
    assert Counter(opened) == {path: 2 for path in videos.glob("*.mp4")}
    command = shlex.split(capsys.readouterr().out.rsplit("next: ", 1)[1])
    assert command == ["python", "sample.py", "--model", "tiny", "--data", str(place)]
    with pytest.raises(model.UserError) as refused:
        data.Records(place)
    assert shlex.split(str(refused.value).rsplit("with: ", 1)[1])[-1] == str(place)
    add_negatives(place)
    command = shlex.split(capsys.readouterr().out.rsplit("next: ", 1)[1])
    assert command == ["python", "train.py", "--model", "tiny", "--data", str(place)]


@pytest.mark.parametrize("lists", [
    ("images.txt", "prompts.txt"), ("image.txt", "prompt.txt"), ("images.txt", "i2v_test.txt"),
    ("z_frames.txt", "captions.txt"), ("image.txt", "prompt.txt", "notes.txt"),
])
def test_any_list_of_pictures_and_of_captions_is_a_bench(lists, tmp_path):
    for name in ("b.png", "a.png"):
        Image.new("RGB", (32, 32)).save(tmp_path / name)
    for name, text in zip(lists, ("b.png\na.png\n", "one\ntwo\n" + "long " * 99, "unused")):
        (tmp_path / name).write_text(text)
    (tmp_path / "videos.txt").write_text("b.png\n")
    (tmp_path / lists[1]).write_text("one\ntwo\n")
    assert [(clip.name, clip.caption) for clip in sample.read_bench(tmp_path)[0]] == [("b", "one"), ("a", "two")]
    (tmp_path / "b.png").unlink()
    with pytest.raises(model.UserError, match=f"{lists[0]}, row 1: .*b.png is not there"):
        sample.read_bench(tmp_path)


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


@pytest.mark.parametrize("count", [1, 3])
def test_uneven_negatives_are_refused_before_anything_is_encoded(count, videos, tmp_path, monkeypatch):
    folder = shutil.copytree(videos, tmp_path / "videos")
    for name in NAMES:
        (folder / "negative_samples" / name).mkdir(parents=True)
        for k in range(count if name == "00000" else 2):
            shutil.copy(folder / "00000.mp4", folder / "negative_samples" / name / f"{k}.mp4")
    command = f"data --videos {folder} --out {tmp_path / 'out'} --model tiny --given-negatives".split()
    assert f"00000.mp4: has {count} negatives" in refusal(monkeypatch, *command) and not (tmp_path / "out").exists()


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
