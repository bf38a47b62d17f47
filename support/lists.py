"""Folders of clips, or of pictures, with captions: a list in one of three forms."""
import csv, json, os, re
from pathlib import Path
from typing import NamedTuple

from support import UserError
from support.command import say
from support.files import fingerprint_of_file, hash_of, visible

SUFFIXES = {"video": ".mp4 .m4v .mov .mkv .webm .avi .mpg .mpeg .ts .mts .m2ts .wmv .flv .ogv .3gp .vob .mxf".split(),
            "picture": ".png .jpg .jpeg .webp .bmp .tif .tiff .gif .avif".split()}
LISTS = {"video": ("video.txt", "metadata.jsonl", "metadata.csv"),
         "picture": ("image.txt", "images.txt", "metadata.jsonl", "metadata.csv")}

class Clip(NamedTuple):
    """A video with its caption; in a bench, a picture."""
    name: str                                              # of its record
    file: Path
    caption: str
    where: str                                             # the row or file that the caption comes from
    start: float = 0.0                                     # where in the video the clip begins, in seconds
    keep: bool = True                                      # what curation says
    image: Path | None = None                              # a separate first frame, if the folder has one
    negatives: tuple[Path, ...] = ()                       # generated videos, with --given-negatives

def record_name(file):
    """The name of a file's record: its path as one word, shortened to a hash at the end if it is too long."""
    name = "_".join(part for part in Path(file).with_suffix("").parts if part not in ("/", "..")).lstrip(".")
    raw = os.fsencode(name)
    return name if len(raw) <= 200 else raw[:180].decode(errors="ignore") + hash_of(name)

# The three forms, as rows: (where it stands, {"file_name": …, "text": …}), or, in place of the latter, what is wrong.

def read_lines(path):
    """The lines of a UTF-8 file. Captions may contain other separators than \\n; a byte that is not UTF-8 becomes a
    surrogate, which `make_clip` reports."""
    text = path.read_bytes().decode("utf-8-sig", "surrogateescape")
    return text.replace("\r\n", "\n").removesuffix("\n").split("\n")

def paired_rows(files):
    """The rows of two text files with one line per sample: the layout of the authors' release."""
    prompts = files.with_name("prompts.txt" if files.with_name("prompts.txt").exists() else "prompt.txt")
    names, captions = read_lines(files), read_lines(prompts)
    surplus = names[len(captions):] + captions[len(names):]
    if "".join(surplus).strip():                           # a blank line at the end does no harm
        raise UserError(f"{files}: has {len(names)} lines and {prompts.name} {len(captions)}; expected as many")
    for number, (name, caption) in enumerate(zip(names, captions), start=1):
        yield f"{files}, row {number}", {"file_name": name, "text": caption}

def json_rows(path):
    """The rows of a metadata.jsonl."""
    for number, line in enumerate(read_lines(path), start=1):
        try:
            fields = json.loads(line.strip() or "{}")
        except ValueError:
            fields = None
        if not isinstance(fields, dict):
            fields = f"is {line:.90}; expected a JSON object with file_name and text, on one line"
        yield f"{path}, row {number}", fields

def csv_rows(path):
    """The rows of a metadata.csv."""
    table = csv.DictReader([line + "\n" for line in read_lines(path)], strict=True)
    try:
        table.fieldnames = [name.strip() for name in table.fieldnames or ()]
        for fields in table:
            if None in fields or None in fields.values():  # more cells than the head, or fewer
                fields = f"has not the {len(table.fieldnames)} cells of the head; put a caption with commas in quotes"
            yield f"{path}, row {table.line_num}", fields
    except csv.Error as e:
        raise UserError(f"{path}, row {table.reader.line_num}: {e}; expected a table with commas between cells") from e

def sidecar_rows(folder, what):
    """The rows of NAME.mp4 beside NAME.txt."""
    captions = {path.stem: path for path in visible(folder) if path.suffix.lower() == ".txt"}
    for path in visible(folder):
        caption = captions.get(path.stem)
        if path.suffix.lower() in SUFFIXES[what] and caption:
            yield str(caption), {"file_name": path.name, "text": "\n".join(read_lines(caption))}
        elif path.suffix.lower() in SUFFIXES[what]:
            yield str(path), f"has no caption; write one into {path.with_suffix('.txt')}"

def rows_of(folder, what):
    """The rows of a folder of videos or pictures (`what`)."""
    lists = [folder / name for name in LISTS[what] if (folder / name).is_file()]
    if len(lists) > 1:
        raise UserError(f"{folder}: holds {lists[0].name} and {lists[1].name}; only one can be read: move one away")
    if not lists:
        return sidecar_rows(folder, what)
    return {".txt": paired_rows, ".jsonl": json_rows, ".csv": csv_rows}[lists[0].suffix](lists[0])

def make_clip(folder, where, fields):
    """The Clip of one row. Raises UserError where it has a fault."""
    if isinstance(fields, str):
        raise UserError(f"{where}: {fields}")
    for key in ("text", "file_name"):
        value = fields.get(key)
        if not isinstance(value, str) or re.search("[\0\ud800-\udfff]", value):
            raise UserError(f"{where}: {key} is {json.dumps(value):.90}, expected text in UTF-8")
    file, start = fields["file_name"].strip(), str(fields.get("start") or 0)
    if Path(file).name in ("", ".."):
        raise UserError(f"{where}: file_name is {file!r}, expected the name of a file")
    if not re.fullmatch(r"\d+(\.\d*)?|\.\d+", start):
        raise UserError(f"{where}: start is {start:.60}, expected seconds, at least 0")
    start = float(start)
    name = record_name(file) + (f"@{start:.10g}" if start else "")                 # two spans of a film: two records
    keep = str(fields.get("keep", True)).lower() == "true"
    return Clip(name, folder / file, fields["text"].strip(), where, start, keep)

def read_list(folder, what="video"):
    """The Clips of a folder of videos or pictures (`what`) with captions, in a fixed order, and what is wrong with its
    other rows. Raises UserError if it has no list of the three forms, or two."""
    clips = {}
    faults = []
    try:
        for where, fields in rows_of(folder, what):
            if isinstance(fields, dict) and not "".join(map(str, fields.values())).strip():
                continue                                   # a blank row
            try:
                clip = make_clip(folder, where, fields)
                if clip.name in clips:
                    raise UserError(f"{where}: its record would have the name of that of {clips[clip.name].where}, "
                                    f"{clip.name}; give a clip one caption, and two files two names")
                clips[clip.name] = clip
            except UserError as e:
                faults.append(str(e))
        found = [path.name for path in visible(folder)]
    except OSError as e:
        raise UserError(f"{e.filename}: cannot be read ({e.strerror})") from e
    if not clips and not faults:
        raise UserError(f"{folder}: holds no {what}s with captions; found {', '.join(found[:9]) or 'none'}, expected "
                        f"NAME.txt beside each {what}, {what}.txt and prompt.txt, metadata.jsonl or metadata.csv")
    return list(clips.values()), faults

def list_clips(folder, given_negatives=False):
    """The Clips of a folder whose `keep` is not false, and what is wrong with its other rows. Says what is not used."""
    folder = Path(folder)
    listed, faults = read_list(folder)
    images = {path.stem: path for path in visible(folder, "first_frames/*")}
    clips = []
    for clip in listed:
        image = images.get(clip.name.removesuffix(f"@{clip.start:.10g}") if clip.start else clip.name)
        negatives = visible(folder / "negative_samples" / clip.file.stem) if given_negatives else ()
        if clip.keep:
            clips.append(clip._replace(image=image, negatives=tuple(negatives)))
    if len(clips) < len(listed):
        say(f"{folder}: {len(listed) - len(clips)} clips are not used, by their `keep`")
    files = {clip.file for clip in listed}
    unused = [path for path in visible(folder) if path.suffix.lower() in SUFFIXES["video"] and path not in files]
    if unused:
        say(f"{folder}: {len(unused)} other videos are not used, such as {unused[0].name}")
    if not clips and not faults:
        raise UserError(f"{folder}: no clip has a `keep` that is true")
    return clips, faults

def read_bench(folder):
    """The Clips of a folder of pictures with captions, and a hash of their names, captions and pictures."""
    if not folder:
        raise UserError("--bench is missing: a folder of pictures with captions")
    prompts, faults = read_list(Path(folder), "picture")
    faults += [f"{prompt.where}: {prompt.file} is not there" for prompt in prompts if not prompt.file.is_file()]
    if faults:
        raise UserError(faults[0])
    return prompts, hash_of([(prompt.name, prompt.caption, fingerprint_of_file(prompt.file)) for prompt in prompts])
