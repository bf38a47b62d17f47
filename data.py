"""Videos in: a folder of clips with captions becomes a cache of records, encoded once and trained on many times.

    python data.py --videos DIR --model MODEL --out CACHE              (torchrun --nproc_per_node 8 data.py … as well)

DIR holds NAME.mp4 beside NAME.txt; or metadata.jsonl / metadata.csv with file_name, text and, where a clip is not the
beginning of its film, start in seconds; or the authors' video.txt and prompt.txt, one line per clip. A clip is read as
a player shows it. A record is a safetensors file that holds all that training needs, in bf16:

    CACHE/win/NAME.safetensors     win (C,F,H,W)  image (C,1,H,W)  text (L,D)  [noised (K,C,1,H,W)]
    CACHE/lose/NAME.safetensors    lose (N,C,F,H,W) of that very win           written by sample.py
    CACHE/empty.safetensors        text (L,D), the embedding of "", for guidance

Files are written whole or not at all, so every stage can be killed and started again, and does what is missing.
"""
import argparse, csv, errno, hashlib, json, math, os, platform, re, signal, subprocess, sys, time, unicodedata
from collections import deque, namedtuple
from contextlib import contextmanager, suppress
from dataclasses import MISSING, dataclass, field, fields
from functools import partial
from io import BytesIO
from itertools import islice
from multiprocessing.pool import ThreadPool
from pathlib import Path
from shlex import quote
from statistics import mode
from typing import NamedTuple, get_args
try:
    import fcntl
except ImportError:                                        # on Windows
    fcntl = None

from model import (UserError, defaults_of, last_checkpoint, load_text_encoder, load_vae, read_config, read_dit_config,
                   read_json, resolve)                     # before torch: see the top of model.py
import imageio.v2 as imageio
import numpy as np
import torch
from einops import rearrange
from imageio_ffmpeg import get_ffmpeg_exe
from PIL import Image, ImageCms, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

# ---- Pixels: reading and writing pictures and videos ----------------------------------------------------------------

def from_uint8(frames):
    """(F,H,W,3) uint8 -> (3,F,H,W) fp32 in [-1,1]."""
    return rearrange(torch.from_numpy(frames).float().div_(127.5).sub_(1), "f h w c -> c f h w")


def to_uint8(video):
    """(3,F,H,W) in [-1,1] -> (F,H,W,3) uint8."""
    return rearrange((video.float().clamp(-1, 1) + 1) * 127.5, "c f h w -> f h w c").round().byte().cpu().numpy()


def run_ffmpeg(path, *arguments, options=()):
    """Run ffmpeg on a video, opened with `options`. Returns (output, log). Raises UserError if the file is missing."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such video")
    # Damaged pictures are dropped, not patched up. One decoding thread keeps the log in order.
    done = subprocess.run([get_ffmpeg_exe(), "-nostdin", "-hide_banner", "-nostats", "-v", "level+info", "-debug_ts",
                           "-max_error_rate", "1", "-err_detect", "explode", "-threads", "1", *options,
                           "-i", f"file:{path}", *arguments], capture_output=True)
    return done.stdout, done.stderr.decode(errors="replace").replace(f"'file:{path}'", "it")


class Film(NamedTuple):
    """The moving pictures in a file, as ffmpeg describes them."""
    stream: str                                            # its number, for -map
    codec: str
    pixels: str                                            # their format and colours: yuv420p(tv, bt709, progressive)
    width: int                                             # as stored: neither square nor upright yet
    height: int
    alpha: bool                                            # transparent in places
    seconds: float                                         # that the file says it lasts, or infinity


def read_video_header(path):
    """The Film in a file. Raises UserError if it is missing, not a video, or in colours that ffmpeg cannot convert."""
    log = run_ffmpeg(path)[1]
    films = []
    if "Stream #" not in log:
        reason = re.findall(r"\[(?:error|fatal)\] (.*)", log)[0]
        raise UserError(f"{path}: is damaged or not a video ({reason})")
    # ffmpeg prints a line for each stream and indents the details below it. A file's own titles and comments are
    # indented as well, so nothing in them can pass for a stream.
    for about in re.findall(r"^\[info\]   Stream #0:.*(?:\n\[info\]     .*)*", log, re.MULTILINE):
        found = re.match(r".*?(0:\d+)[^:]*: Video: (\w+)(?: \(.*?\))*, (\w+(?:\(.*?\))?), (\d+)x(\d+)(.*)", about)
        if found and not re.search(r"\((attached pic|still image|timed thumbnails)\)", found[6]):
            films.append((about, found))
    if not films:
        raise UserError(f"{path}: holds no moving picture")
    moving = [film for film in films if film[1][2] not in ("png", "mjpeg", "bmp", "webp")]     # covers are not films
    about, found = (moving or films)[0]
    # Dolby Vision 5, and other profiles without a compatible base layer, use a colour matrix of their own.
    dolby = re.search(r"\n.info. +DOVI configuration record:.* profile: (5|\d+(?=.*compatibility id: 0))", about)
    if dolby:
        raise UserError(f"{path}: is Dolby Vision of profile {dolby[1]}, which ffmpeg shows in wrong colours; export "
                        "it as SDR or HDR10, or leave it out")
    alpha = re.match(r"yuva|gbrap|rgba|bgra|argb|abgr|pal8|ya\d|ayuv|vuya|uyva", found[3])
    alpha = alpha or re.search(r"^\[info\] +alpha_mode +: 1$", about, re.MULTILINE)              # of webm
    length = re.search(r"^\[info\]   Duration: (\d+):(\d+):([\d.]+)", log, re.MULTILINE)
    seconds = 3600 * int(length[1]) + 60 * int(length[2]) + float(length[3]) if length else math.inf
    return Film(found[1], found[2], found[3], int(found[4]), int(found[5]), bool(alpha), seconds)


def picture_filters(film, size, instants=()):
    """The ffmpeg filters that turn decoded, upright pictures into what a player shows: RGB with square pixels. `size`
    is the filter that scales them (it may use `dar` and `sar`); `instants` are filters that pick moments in time."""
    apart = re.search(r"([\w-]+)/([\w-]+)/([\w-]+)", film.pixels)       # three names, or one for all three
    alike = re.search(r"[( ]((bt|smpte|fcc|ycgco)[\w-]*)[,)]", film.pixels)
    if apart:
        matrix, primaries, transfer = apart.groups()
    else:
        matrix = primaries = transfer = alike[1] if alike else "unknown"
    hdr = transfer in ("arib-std-b67", "smpte2084")        # HLG or PQ
    if matrix == "unknown" and (hdr or film.height > 576 or film.width >= 1280):
        matrix = "bt2020nc" if hdr else "bt709"            # what players assume for HD if the file does not say
    filters = ["bwdif=mode=send_frame:deint=interlaced"]   # an interlaced picture shows two instants: separate them
    filters += instants
    if film.pixels.startswith("yuv") and matrix not in ("unknown", "reserved"):
        filters.append(f"setparams=colorspace={matrix}")   # the container may know what the stream does not say
    if film.alpha:                                         # blending goes over black: for white, blend the negative
        filters += ["format=gbrap", "negate", "premultiply=inplace=1"]
    filters += [size, "setsar=1"]
    if hdr:
        filters += [f"setparams=color_primaries={primaries.replace('unknown', 'bt2020')}:color_trc={transfer}",
                    "format=yuv444p10le", "zscale=t=linear:npl=100",               # code values to linear light,
                    "format=gbrpf32le", "zscale=p=bt709",                          # SDR's primaries,
                    "tonemap=hable:desat=0",                                       # highlights compressed,
                    "zscale=t=bt709:r=pc", "format=gbrp"]                          # back to code values
    filters.append("format=rgb24")
    if film.alpha:
        filters.append("negate")
    return ",".join(filters)


class Picture(NamedTuple):
    """A picture as it left the decoder."""
    time: float                                            # when it is shown, in seconds
    duration: float
    key: bool                                              # whether it can be decoded without others


def decode(path, film, filters, *output, start=0.0, seconds=math.inf):
    """Decode a film from `start` on, or from its first intact picture if that comes later. Returns what `filters` make
    of it and its Pictures, with times counted from there. Raises UserError for damage in the first `seconds` of it."""
    decoder = []
    margin = 2
    if film.codec == "vp9" or film.codec == "vp8" and film.alpha:
        # ffmpeg's own decoders drop the transparency, and the one for VP9 does not notice damage.
        decoder = ["-c:v", "libvpx-vp9" if film.codec == "vp9" else "libvpx"]
    while True:
        seek = max(0, min(start, film.seconds) - margin)
        place = ["-noaccurate_seek", "-ss", str(seek)] if seek else []
        zero = f"max(STARTPTS,{start - seek}/TB)" if start else "STARTPTS"
        made, log = run_ffmpeg(path, "-map", film.stream, "-vf", f"settb=AVTB,setpts='PTS-{zero}',{filters}",
                               "-fps_mode", "passthrough", "-map_metadata", "-1", *output, options=[*decoder, *place])
        packets, pictures, complaints = read_log(log)
        keys = [picture.time for picture in pictures if picture.key]
        if seek and not (keys and keys[0] == pictures[0].time <= start - seek):
            margin *= 4                                    # the picture shown at `start` began even earlier
        elif keys and not start and any("first frame" in line for line, *_ in complaints):
            start = max(keys[0], 1e-6)                     # before it, MPEG-4's decoder shows grey
        else:
            break
    if not pictures:
        raise UserError(f"{path}: is damaged ({complaints[0][0].split('] ')[-1] if complaints else 'no picture'})")
    begin = max(pictures[0].time, start - seek) if start else pictures[0].time
    cut = complaints and not begins_with_key(path, film, place)
    damage = find_damage(packets, pictures, complaints, begin, begin + seconds, cut)
    if damage and damage.startswith("Reconfiguring"):
        raise UserError(f"{path}: changes the size or format of its pictures halfway; encode it again")
    if damage:
        raise UserError(f"{path}: is damaged ({damage})")
    return made, [picture._replace(time=picture.time - begin) for picture in pictures]


def read_video(path, frames, height, width, fps, start=0.0, film=None):
    """A video as a player shows it, (3,F,height,width) fp32 in [-1,1]. Frame k is what is on screen k/fps s after
    `start`, or after the first picture: upright, with square pixels, de-interlaced, in SDR, on white, resized to cover
    and cropped at the centre. The last picture is held if the video ends less than a frame too early. `film` is its
    header, if already read. Raises UserError for a file that is missing, not a video, damaged or too short."""
    film = film or read_video_header(path)
    flags = "area" if film.width * film.height > width * height else "bicubic"
    if (film.width, film.height) != (width, height):       # at the same size, ffmpeg's default colours, bit for bit
        flags += "+accurate_rnd+full_chroma_int+full_chroma_inp"
    cover = f"scale=w='max({width},round({height}*dar))':h='max({height},round({width}/dar))':flags={flags}"
    # What is on screen at k/fps is the last picture that began by then, so times are rounded up; first 1 ms is taken
    # off, since some formats round to that. The last picture is held on a fine grid, before the coarse one is taken.
    instants = ("setpts=PTS-1000", f"fps={30 * fps}:start_time=0:round=up",
                "tpad=stop_mode=clone:stop_duration=2", f"fps={fps}:round=up")
    filters = f"{picture_filters(film, cover, instants)},crop={width}:{height}:exact=1"
    needed = (frames - 1) / fps
    pixels, pictures = decode(path, film, filters, "-frames:v", str(frames), "-f", "rawvideo", "-", start=start,
                              seconds=needed)
    video = np.frombuffer(bytearray(pixels), np.uint8).reshape(-1, height, width, 3)
    last = pictures[-1].duration
    end = pictures[-1].time + last
    if len(video) < frames or end + min(last, 1 / fps) < needed - 0.002:
        since = f" from {start:g} s on" if start else ""
        raise UserError(f"{path}: lasts {start + end:.2f} s, but {frames} frames at {fps} fps{since} need "
                        f"{start + needed:.2f} s; leave it out or choose fewer --frames")
    return from_uint8(video)


def open_image(path):
    """A picture as a viewer shows it, upright, in sRGB, on white, as Pillow's RGB image. Raises UserError for a file
    that is missing or not a picture."""
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
        if image.mode == "F":
            raise ValueError("floating-point numbers")
        if image.mode.startswith("I"):                     # 16 bits
            image = Image.fromarray((np.asarray(image) / 257).round().clip(0, 255).astype(np.uint8))
        profile = image.info.get("icc_profile")
        if image.mode != "CMYK" or not profile:
            image = image.convert("RGBA" if image.has_transparency_data else "RGB")
        if profile:
            with suppress(ImageCms.PyCMSError):            # a broken profile: viewers ignore it too
                image = ImageCms.profileToProfile(image, BytesIO(profile), ImageCms.createProfile("sRGB"),
                                                  outputMode="RGB" if image.mode == "CMYK" else None)
        image = image.convert("RGBA")
    except (OSError, ValueError, SyntaxError, EOFError, RuntimeError, Image.DecompressionBombError) as e:
        raise UserError(f"{path}: cannot be read as a picture ({e!s:.120})") from e
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def read_image(path, height, width):
    """A picture as a viewer shows it, (3,1,height,width) fp32 in [-1,1], resized to cover and cropped at the centre.
    Raises UserError for a file that is missing or not a picture."""
    image = open_image(path)
    smaller = height < image.height and width < image.width
    image = ImageOps.fit(image, (width, height), Image.Resampling.BOX if smaller else Image.Resampling.BICUBIC)
    return from_uint8(np.array(image)[None])


def write_video(path, frames, fps):
    """(F,H,W,3) uint8 -> .mp4 (H.264, plays anywhere; even sides) or .gif, by the file's suffix."""
    kind = Path(path).suffix[1:]
    coding = dict(fps=fps, quality=None, macro_block_size=2, output_params=["-crf", "12"])
    if kind == "gif":
        coding = dict(duration=1000 / fps, loop=0)
    with whole_file(path) as part:
        part.write_bytes(imageio.mimwrite(imageio.RETURN_BYTES, frames, format=kind, **coding))


# ---- A folder of videos or pictures with captions -------------------------------------------------------------------

# A file with another suffix counts only if it has a caption beside it and no file with one of these has its name.
SUFFIXES = {"video": ".mp4 .m4v .mov .mkv .webm .avi .mpg .mpeg .ts .mts .m2ts .wmv .flv .ogv .3gp .gif".split(),
            "picture": ".png .jpg .jpeg .webp .bmp .tif .tiff .gif .avif".split()}


class Clip(NamedTuple):
    """A video with its caption; in a bench, a picture."""
    name: str                                              # of its record
    file: Path
    caption: str
    where: str | Path                                      # the row or file that the caption comes from
    extra: dict                                            # the row's other fields, such as keep
    start: float = 0.0                                     # where in the video the clip begins, in seconds
    image: Path | None = None                              # a separate first frame, if the folder has one
    negatives: tuple[Path, ...] = ()                       # generated videos, with --given-negatives


def composed(name):
    """A name with é as one character. macOS stores it as two, and lists are written on either kind of system."""
    return unicodedata.normalize("NFC", name)


def record_name(file):
    """The name of a file's record: its path as one word, shortened to a hash at the end if it is too long."""
    name = "_".join(part for part in Path(composed(file)).with_suffix("").parts if part not in ("/", ".."))
    raw = os.fsencode(name)
    return name if len(raw) <= 200 else raw[:180].decode(errors="ignore") + hashlib.sha256(raw).hexdigest()[:20]


def read_lines(path):
    """The lines of a UTF-8 file, with or without a byte order mark. Only \\n and \\r\\n end a line, since captions may
    contain other separators. A byte that is not UTF-8 becomes a surrogate, which `make_clip` reports."""
    text = path.read_bytes().decode("utf-8-sig", "surrogateescape")
    return text.replace("\r\n", "\n").removesuffix("\n").split("\n")


def paired_rows(files, prompts):
    """(where, fields) of two text files with one line per sample: the layout of the authors' release."""
    names, captions = read_lines(files), read_lines(prompts)
    surplus = names[len(captions):] + captions[len(names):]
    if "".join(surplus).strip():                           # a blank line at the end does no harm
        raise UserError(f"{files.parent}: {files.name} has {len(names)} lines and {prompts.name} {len(captions)}; "
                        "expected a caption for each")
    for number, (name, caption) in enumerate(zip(names, captions), start=1):
        yield f"{files}, row {number}", {"file_name": name, "text": caption}


def metadata_rows(path, faults):
    """(where, fields) of metadata.jsonl or metadata.csv, the layout of Hugging Face's video folders. Faulty rows go to
    `faults`. Raises UserError if the file as a whole has another form."""
    lines = read_lines(path)
    head = []
    number = 0
    table = csv.reader([line + "\n" for line in lines], strict=True)
    if path.suffix == ".csv":
        with suppress(csv.Error):                          # of a head that cannot be read
            head = [cell.strip() for cell in next(filter(None, table), [])]
        if not {"file_name", "text"} <= {*head}:
            raise UserError(f"{path}: begins with {lines[0]!r:.60}; expected file_name and text, with commas between")
        number = table.line_num
    elif lines[0].startswith("[") and lines[-1].endswith("]"):
        raise UserError(f"{path}: is one JSON array; expected a line for each clip, {{\"file_name\": …, \"text\": …}}")
    while number < len(lines):
        where = f"{path}, row {number + 1}"
        try:
            if path.suffix == ".jsonl":
                fields = json.loads(lines[number].strip() or "{}")
            else:
                cells = next(table)
                if cells and len(cells) != len(head):
                    raise ValueError(f"not the {len(head)} cells of the head (put a caption with commas in quotes)")
                fields = dict(zip(head, cells))
            yield where, fields
        except (ValueError, csv.Error) as e:
            faults.append(f"{where}: {e}; expected file_name and text")
        number = max(number + 1, table.line_num)           # a CSV row may span several lines


def sidecar_rows(folder, what, faults):
    """(where, fields) of NAME.mp4 beside NAME.txt. An unknown suffix counts if no known one goes with that NAME."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    captions = {composed(path.stem): path for path in files if path.suffix.lower() == ".txt"}
    claimed = {composed(path.stem) for path in files if path.suffix.lower() in SUFFIXES[what]}
    for path in files:
        stem, suffix = composed(path.stem), path.suffix.lower()
        caption, named = captions.get(stem), suffix in SUFFIXES[what]
        if named and not caption:
            faults.append(f"{path}: has no caption; write one into {path.with_suffix('.txt')}")
        elif caption and (named or suffix != ".txt" and stem not in claimed):
            yield caption, {"file_name": path.name, "text": "\n".join(read_lines(caption))}


def read_start(where, fields):
    """The `start` of a row in seconds, 0 if it has none. Raises UserError for anything else."""
    found = fields.get("start")
    try:
        start = float(found or 0)
    except (TypeError, ValueError):
        start = math.nan
    if not 0 <= start < math.inf:
        raise UserError(f"{where}: start is {json.dumps(found):.60}, expected seconds, at least 0")
    return start


def make_clip(folder, where, fields):
    """The Clip of one row. Raises UserError where it has a fault."""
    if not isinstance(fields, dict) or not {"file_name", "text"} <= fields.keys():
        raise UserError(f"{where}: holds {json.dumps(fields):.90}; expected file_name and text")
    for key in ("text", "file_name"):
        if not isinstance(fields[key], str):
            raise UserError(f"{where}: {key} is {json.dumps(fields[key]):.60}, expected text")
        wrong = re.search("[\0\ud800-\udfff]", fields[key])
        if wrong:
            raise UserError(f"{where}: character {wrong.start() + 1} of its {key} is {wrong[0]!a}, expected UTF-8")
    file = fields["file_name"].strip()
    start = read_start(where, fields)
    if Path(file).name in ("", ".."):
        raise UserError(f"{where}: file_name is {file!r}, expected the name of a file")
    spellings = [folder / file, *(folder / unicodedata.normalize(form, file) for form in ("NFC", "NFD"))]
    there = [path for path in spellings if os.path.exists(path)]
    name = record_name(file) + (f"@{start:.10g}" if start else "")                 # two spans of a film: two records
    return Clip(name, (there or spellings)[0], fields["text"].strip(), where, fields, start)


def read_list(folder, files="video.txt", prompts="prompt.txt", what="video"):
    """The Clips of a folder of videos or pictures (`what`) with captions, in a fixed order, and what is wrong with its
    other rows. The folder has `files` and `prompts`, one line per sample; or metadata.jsonl or metadata.csv with
    file_name and text; or NAME.mp4 beside NAME.txt. Raises UserError if it has none of these, has two, or cannot be
    read."""
    folder = Path(folder)
    clips = []
    faults = []
    lists = [name for name in (files, "metadata.jsonl", "metadata.csv") if (folder / name).is_file()]
    if len(lists) > 1:
        raise UserError(f"{folder}: holds {lists[0]} and {lists[1]}; only one can be read: move the other away")
    if not lists:
        rows = sidecar_rows(folder, what, faults)
    elif lists == [files]:
        rows = paired_rows(folder / files, folder / prompts)
    else:
        rows = metadata_rows(folder / lists[0], faults)
    try:
        for where, fields in rows:
            if isinstance(fields, dict) and not "".join(map(str, fields.values())).strip():
                continue                                   # a blank row
            try:
                clips.append(make_clip(folder, where, fields))
            except UserError as e:
                faults.append(str(e))
        found = sorted(path.name for path in folder.iterdir())
    except OSError as e:
        raise UserError(f"{e.filename}: cannot be read ({e.strerror})") from e
    others = [name for name in found if re.search(r"\.(tsv|json|jsonl|csv|parquet|xlsx?)$", name, re.IGNORECASE)]
    if others and not lists and not clips:
        raise UserError(f"{folder}: holds {others[0]}, which is not read; expected metadata.csv or metadata.jsonl with "
                        "file_name and text: save it as one of them")
    if not clips and not faults:
        raise UserError(f"{folder}: holds no {what}s with captions; found {', '.join(found[:9]) or 'none'}, expected "
                        f"NAME.txt beside each {what}, {files} and {prompts}, metadata.jsonl or metadata.csv")
    return clips, faults


def list_clips(folder, given_negatives=False):
    """The clips of a folder, in a fixed order, without those whose row has a false `keep`, and what is wrong with the
    others. Prints what is not used. Raises UserError as `read_list` does, for two clips with one name, and if no clip
    is left."""
    folder = Path(folder)
    clips = {}
    images = {composed(path.stem): path for path in sorted(folder.glob("first_frames/*"))}
    generated = {composed(path.name): sorted(path.glob("[!.]*")) for path in folder.glob("negative_samples/*")}
    listed, faults = read_list(folder)
    used = {folder / name for name in ("video.txt", "prompt.txt", "metadata.jsonl", "metadata.csv", "inspect.html")}
    for clip in listed:
        used |= {clip.file, clip.where}
        if str(clip.extra.get("keep", True)).lower() != "true":
            continue
        if clip.name in clips:
            raise UserError(f"{folder}: two clips are named {clip.name}; rename one of them")
        if given_negatives:
            clip = clip._replace(negatives=tuple(generated.get(composed(clip.file.stem), ())))
        clip = clip._replace(image=images.get(record_name(clip.extra["file_name"].strip())))
        used |= {clip.image, *clip.negatives}
        clips[clip.name] = clip
    if len(clips) < len(listed):
        say(f"{folder}: {len(listed) - len(clips)} clips are not used, by their `keep`")
    unused = [path for path in sorted(folder.rglob("[!.]*")) if path.is_file() and path not in used]
    if unused:
        say(f"{folder}: {len(unused)} other files are not used, such as {unused[0].name}")
    if not clips and not faults:
        raise UserError(f"{folder}: no clip is left; none has a `keep` that is true")
    return list(clips.values()), faults


# ---- Records: what training reads -----------------------------------------------------------------------------------

def digest(folder, prefix=""):
    """A short hash of the weights in a folder, or of those whose names begin with `prefix`. Of each file it reads the
    name, the size and the first MiB."""
    sha = hashlib.sha256(prefix.encode())
    for file in sorted(p for p in folder.iterdir() if p.suffix in (".json", ".safetensors", ".model")):
        sha.update(f"{file.name} {file.stat().st_size}".encode())
        with open(file, "rb") as f:
            sha.update(f.read(2 ** 20))
    return sha.hexdigest()[:16]


def hash_of(record):
    """A short hash of a record's tensors, by which negatives are matched to the record they were made for."""
    sha = hashlib.sha256()
    for name in sorted(record):
        sha.update(record[name].cpu().contiguous().view(torch.uint8).numpy())
    return sha.hexdigest()[:16]


def check_metadata(path, found, expected, now="now"):
    """Raise UserError unless `found`, the metadata of the file at `path`, has every value that is `expected`."""
    different = []
    for name, value in expected.items():
        if found.get(name) != value:
            different.append(f"{name} {found.get(name)} ({now} {value})")
    if different:
        raise UserError(f"{path}: was made with other settings: {', '.join(different)}; "
                        "use another folder or delete this one")


def is_made(file, expected):
    """Whether a record exists. Raises UserError if its metadata differ from what is `expected`."""
    if not file.exists():
        return False
    check_metadata(file, read_header(file)[1], expected)
    return True


class Records:
    """The records of a cache as a sequence of dicts of tensors, checked to belong together.

    win (C,F,H,W), image (C,1,H,W), text (L,D); with `negatives`, also lose (N,C,F,H,W). Latents are scaled, bf16.
    With `scores`, also scores (N,) of the negatives, from CACHE/scores.json: {record: [one number per negative]}.
    Higher is better; any reward model can write that file.
    """

    def __init__(self, folder, negatives=True, scores=False):
        self.folder = Path(folder)
        self.scores = None
        self.names = sorted(p.stem for p in (self.folder / "win").glob("*.safetensors"))
        if not self.names:
            place = quote(str(folder))
            raise UserError(f"{folder}: holds no records; make them with: python data.py --videos DIR --out {place}"
                            f" and: python sample.py --data {place}")
        self.kinds = ["win", "lose"] if negatives else ["win"]
        self.hashes = {}                                   # {name: hashes of its contents}, in order
        for kind in self.kinds:
            common = None                                  # the metadata that all records of a kind share
            for name in self.names:
                file = self.folder / kind / f"{name}.safetensors"
                if not file.is_file():
                    raise UserError(f"{file}: missing; make the negatives with: python sample.py --data "
                                    f"{quote(str(folder))}")
                shapes, metadata = read_header(file)
                metadata["shapes"] = shapes
                own = ("caption", "source", "start", "hash", "win")
                common = common or {k: v for k, v in metadata.items() if k not in own}
                check_metadata(file, metadata, common, now="other records:")
                if kind == "win":
                    self.hashes[name] = metadata.get("hash")
                    win_shape = shapes["win"]
                    continue
                if metadata.get("win") != self.hashes[name] or shapes["lose"][1:] != win_shape:
                    raise UserError(f"{file}: was made for another encoding of its clip; delete it and run: "
                                    f"python sample.py --data {quote(str(folder))}")
                self.hashes[name] += f" {metadata.get('hash')}"
        if scores:
            self.scores = self.read_scores(self.folder / "scores.json", shapes["lose"][0])
            for name, row in zip(self.names, self.scores.tolist()):
                self.hashes[name] += f" {row}"

    def read_scores(self, file, count):
        """Scores (records, count). Raises UserError unless the file has `count` finite numbers for each record."""
        try:
            stored = json.loads(file.read_text())
            scores = torch.stack([torch.tensor(stored[name]).float().reshape(count) for name in self.names])
            if not scores.isfinite().all():
                raise ValueError("a number is not finite")
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as e:
            raise UserError(f"{file}: {type(e).__name__}: {e}; expected {{record: [{count} numbers]}}") from e
        return scores

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index):
        return self.read(index)

    def read(self, index, negatives=True):
        """The tensors of a record, without its negatives where a step does not look at them."""
        record = {}
        for kind in self.kinds:
            if kind == "lose" and not negatives:
                continue
            record |= read_tensors(self.folder / kind / f"{self.names[index]}.safetensors")
        if self.scores is not None:
            record["scores"] = self.scores[index]
        return record

    def empty_text(self):
        """The embedding (L,D) of the empty caption, for guidance."""
        return read_tensors(self.folder / "empty.safetensors")["text"]


# ---- Encoding: clips into records -----------------------------------------------------------------------------------

READERS = 4                                                # clips read ahead in threads; 200 MB each at 49×480×720


def clip_shape(options, folder):
    """(frames, height, width) of the clips: as asked, else as the model was trained. Raises UserError for a size that
    the model does not take."""
    c = read_dit_config(folder)
    space = 2 ** (len(read_config(folder, "vae", "AutoencoderKLCogVideoX")["block_out_channels"]) - 1)
    multiple = space * c["patch_size"]
    trained = c["sample_frames"], c["sample_height"] * space, c["sample_width"] * space
    frames, height, width = options.frames or trained[0], options.height or trained[1], options.width or trained[2]
    if frames < 1 or frames % 8 != 1 or options.fps < 1:
        raise UserError(f"--frames {frames} --fps {options.fps}: expected 8k + 1 frames (9, 17, … 49), at least 1 fps")
    if min(height, width) <= 0 or height % multiple or width % multiple:
        raise UserError(f"--height {height} --width {width}: expected multiples of {multiple}")
    if c["use_learned_positional_embeddings"] and (frames > trained[0] or (height, width) != trained[1:]):
        raise UserError(f"--frames {frames} --height {height} --width {width}: this model's learned positions "
                        f"are for at most {trained[0]} frames of {trained[1]}×{trained[2]}")
    return frames, height, width


def check_clip(clip, negatives, shape, fps, films):
    """Raise UserError if a clip is faulty, as far as its header tells, or has another number of negatives. The headers
    are kept in the dict `films`, {file: Film}."""
    if len(clip.negatives) != negatives:
        raise UserError(f"{clip.file}: has {len(clip.negatives)} negatives in negative_samples/{clip.file.stem}, "
                        f"expected {negatives} as for most clips")
    for video in (clip.file, *clip.negatives):
        films[video] = read_video_header(video)
        start = clip.start if video == clip.file else 0.0
        if films[video].seconds < start + (shape[0] - 1) / fps:        # the header may be wrong: count the pictures
            read_video(video, *shape, fps, start, films[video])


def read_clip(clip, shape, fps, films):
    """The pixels of a clip in [-1,1]: its video (3,F,H,W), first frame (3,1,H,W), and negatives, each (3,F,H,W)."""
    video = read_video(clip.file, *shape, fps, clip.start, films.get(clip.file))
    image = read_image(clip.image, *shape[1:]) if clip.image else video[:, :1]
    return video, image, [read_video(file, *shape, fps, film=films.get(file)) for file in clip.negatives]


def read_ahead(clips, read, faults):
    """Yield (clip, read(clip)) in order, while READERS threads read the clips that come next. A clip that raises
    UserError is left out, and its message goes to the list `faults`."""
    with ThreadPool(READERS) as pool:
        coming = iter(clips)
        queue = deque()
        while True:
            for clip in islice(coming, READERS - len(queue)):
                queue.append((clip, pool.apply_async(read, [clip])))
            if not queue:
                return
            clip, reading = queue.popleft()
            try:
                found = reading.get()
            except UserError as e:
                faults.append(str(e))
            else:
                yield clip, found


def check_faults(faults, options):
    """Raise UserError for the first faulty clip, unless --skip-bad leaves such clips out."""
    if faults and not options.skip_bad:
        raise UserError(f"{faults[0]} (clips with a fault: {len(faults)}; --skip-bad leaves them out)")


def report_left_out(file, faults):
    """Write down what is wrong with the clips that were left out, if any were."""
    file.unlink(missing_ok=True)                           # of an earlier run
    if faults:
        with whole_file(file) as part:
            part.write_text("\n".join(faults) + "\n", encoding="utf-8", errors="replace")
        print(f"{len(faults)} clips left out; {file} says why")


def encode_clip(clip, pixels, vae, options, device):
    """The tensors of one record, without the text, and those of its negatives, if the folder has them."""
    def encode(video, *key):
        return vae.encode(video[None].to(device), generator("posterior", options.seed, clip.name, *key))[0].bfloat16()

    video, image, negatives = pixels
    record = {"win": encode(video, "win"), "image": encode(image, "image")}
    if options.image_noise:
        rng = generator("image noise", options.seed, clip.name)
        sigma = (torch.randn(options.image_noise, generator=rng) * 0.5 - 3).exp()      # the authors', for [-1,1]
        noised = [image + s * torch.randn(image.shape, generator=rng) for s in sigma]
        record["noised"] = torch.stack([encode(x, "noised", k) for k, x in enumerate(noised)])
    return record, [encode(negative, "lose", k) for k, negative in enumerate(negatives)]


def encode_captions(clips, folder, out, device, dtype):
    """{caption: embedding (L,D), bf16} of the clips; the empty caption's is written beside the records."""
    encode_text = load_text_encoder(folder, device, dtype)
    captions = {"", *(clip.caption for clip in clips)}
    embeddings = {text: encode_text([text])[0].bfloat16().cpu() for text in tqdm(captions, desc="encoding captions")}
    write_tensors(out / "empty.safetensors", {"text": embeddings[""]}, model=folder)
    return embeddings


# ---- Damage: which of ffmpeg's complaints are about the clip itself -------------------------------------------------

def read_log(log):
    """What ffmpeg did, by its log: the times of the packets that it read, in seconds or nan; the Pictures that it
    decoded; and its complaints, each a line with the numbers of packets and Pictures before it."""
    packets, pictures, complaints = [], [], []
    looking, _, working = log.partition("\n[info] Stream mapping:")
    # While it probes the file, it reads the first packets and tries the decoder on them; only the reading matters.
    lines = [line for line in looking.splitlines() if re.match(r"\[in#0/.*\[error\]|\[in#.*CRC mismatch", line)]
    for line in lines + working.splitlines():
        line = line.replace("NOPTS", "nan")
        packet = re.search(r"demuxer\+ffmpeg -> .* pkt_pts_time:(\S+)", line)
        picture = re.search(r"decoder -> .* pts_time:(\S+) .*duration_time:(\S+)", line)
        if packet:
            packets.append(float(packet[1]))
        elif picture:
            key = re.search("keyframe:1|dec:libvpx", line)             # libvpx does not tell, but begins with a key
            pictures.append(Picture(float(picture[1]), float(picture[2]), bool(key)))
        elif re.search(r" @ .*(\[error\]|\[fatal\]|corrupt|concealing|first frame)", line):
            complaints.append((line, len(packets), len(pictures)))
        elif "Reconfiguring" in line:                      # the filters, in which up to 20 pictures may wait
            complaints.append((line, len(packets), max(0, len(pictures) - 20)))
    return packets, pictures, complaints


def begins_with_key(path, film, options):
    """Whether the first picture of a film can be decoded alone, by its own bytes or by what the container says."""
    for reading in ["-dump"], ["-dump", "-fflags", "+noparse+nofillin"]:
        log = run_ffmpeg(path, "-map", film.stream, "-c", "copy", "-copyinkf", "-frames:v", "1", "-f", "null", "-",
                         options=[*options, *reading])[1]
        if re.findall(r"^\[info\]   keyframe=(\d)", log, re.MULTILINE)[:1] == ["1"]:
            return True
    return False


def find_damage(packets, pictures, complaints, begin, end, cut):
    """The first complaint about what is shown from `begin` to `end`, or None. A recording may begin anywhere (`cut`:
    not with a key picture), and two may be joined: pictures before the first intact one that cannot be decoded are no
    damage."""
    times = [picture.time for picture in pictures]
    keys = [picture.time for picture in pictures if picture.key]
    before = [time for time in keys if time <= begin]
    whole = max(before, default=begin)                     # from here on, everything is needed
    steps = np.diff([time for time in times if whole <= time <= end])
    even = len(steps) == 0 or max(steps) < 1.8 * np.median(steps)                  # no picture is missing
    earlier_ones = before and (cut or packets[0] in times and packets[0] < whole)
    for line, read, decoded in complaints:
        if line.startswith("[in#"):                        # it is about one of the next two packets
            since = packets[read - 1] if read else -math.inf
            suspect, behind = packets[read:read + 2], packets[read + 2:read + 3]
            joined = even and behind and behind[0] in keys                         # packets are numbered anew there
            earlier = suspect and max(suspect) < whole
            passed = "corrupt" in line and (joined or earlier)
        else:                                              # it is about a picture that the decoder still holds
            since = times[decoded - 1] if decoded else -math.inf
            # An open group of H.264 refers to pictures before it, which it can do without.
            lacking = re.search("mmco|co located|referenc|submitting", line)
            passed = since < whole and even and (earlier_ones or lacking)
            passed = passed and not re.search("corrupt dec|Reconf", line)
        if since < end and not passed:
            return re.sub(r".*\[(error|fatal|warning|info)\] ", "", line)
    return None


# ---- What all commands share: options, devices, seeds, files written whole ------------------------------------------

HUB_MODEL = "zai-org/CogVideoX-5b-I2V"


def default_model():
    """The model if no --model is given, and why: CogVideoX-5B-I2V with a GPU, the tiny one without."""
    return (HUB_MODEL, "a GPU is here") if torch.cuda.is_available() else ("tiny", "no GPU is here")


def option(default=MISSING, help="", group=None, either=False):
    """A field of an Options class; without a default, a positional argument. `group` starts a new section of --help.
    Only one of those marked `either` may be given."""
    return field(default=default, metadata=dict(help=help, group=group, either=either))


def flag(name):
    """The name of a field of Options on the command line: ema_every -> --ema-every."""
    return "--" + name.replace("_", "-")


KINDS = {str: dict(metavar="STR"), int: dict(type=int, metavar="INT"), float: dict(type=float, metavar="FLOAT"),
         list: dict(nargs="+", metavar="FILE"), bool: dict(action=argparse.BooleanOptionalAction)}


def parse(options, name, argv=None):
    """Command line of NAME.py -> an instance of the dataclass `options`. A model may bring defaults of its own."""
    style = partial(argparse.RawDescriptionHelpFormatter, max_help_position=28, width=118)
    parser = argparse.ArgumentParser(description=options.__doc__, allow_abbrev=False, formatter_class=style)
    parser.error = lambda message: sys.exit(f"error: {message}; {' '.join(parser.format_usage().split())}")
    section = parser
    either = None
    for each in fields(options):
        if each.metadata["group"]:
            section = parser.add_argument_group(each.metadata["group"])
        help = each.metadata["help"].replace("%", "%%")
        if each.default is MISSING:
            section.add_argument(each.name, type=each.type, help=help)
            continue
        if each.default not in ("", 0, ()):
            help += f" [{each.default}]"
        kind = KINDS.get(each.type) or dict(choices=get_args(each.type))                       # else a Literal
        if each.metadata["either"] and not either:
            either = section.add_mutually_exclusive_group()
        place = either if each.metadata["either"] else section
        place.add_argument(flag(each.name), default=each.default, help=help, **kind)
    if hasattr(options, "model"):
        parser.set_defaults(model=default_model()[0])
        model = parser.parse_known_args(argv)[0].model
        defaults = defaults_of(model, name)
        unknown = {*defaults} - {each.name for each in fields(options)}
        if unknown:
            raise UserError(f"{model}: its defaults.json has {min(unknown)} for {name}, which is no option of it")
        parser.set_defaults(**defaults)
    return options(**vars(parser.parse_args(argv)))


# One of `world_size` equal processes, with its device and the dtype its networks compute in.
Process = namedtuple("Process", "rank world_size device dtype")


def this_process():
    """This Process, alone or under torchrun. Raises UserError if more GPUs are asked for than exist, or for one that
    is too old."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if not torch.cuda.is_available():
        return Process(rank, world_size, torch.device("cpu"), torch.float32)
    local = int(os.environ.get("LOCAL_RANK", 0))
    gpus = torch.cuda.device_count()
    if local >= gpus:
        raise UserError(f"--nproc_per_node needs {local + 1} GPUs or more, this machine has {gpus}")
    torch.cuda.set_device(local)
    if torch.cuda.get_device_capability() < (8, 0):        # older ones have no fast bf16, and fp16 overflows
        raise UserError(f"{torch.cuda.get_device_name()}: has no bf16 arithmetic, which the networks need; "
                        "use a GPU of 2020 or later (Ampere, compute capability 8.0), or the CPU: "
                        "CUDA_VISIBLE_DEVICES=")
    return Process(rank, world_size, torch.device("cuda", local), torch.bfloat16)


def free_host_memory():
    """Bytes of CPU memory that are still free; infinity if the system does not tell."""
    file = Path("/proc/meminfo")
    found = re.search(r"MemAvailable: +(\d+) kB", file.read_text()) if file.exists() else None
    return 1024 * int(found[1]) if found else math.inf


def say(message):
    """Print once, however many processes there are."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(message)


def command(main, options, name):
    """Run `main(options)` of NAME.py. A user's mistake ends in one line and status 1."""
    for stream in sys.stdout, sys.stderr:
        stream.reconfigure(errors="replace")               # a console that cannot print ω prints ?
    try:
        options = parse(options, name)
        default, why = default_model()
        if hasattr(options, "model"):
            say(f"model: {options.model} ({why if options.model == default else '--model'})")
            checkpoint = last_checkpoint(options.model)
            if checkpoint:
                say(f"{options.model}: training has not ended; taken as it was at its last checkpoint, {checkpoint}")
        main(options)
    except UserError as e:
        # Most mistakes are found by all ranks. Rank 0 reports them, and torchrun ends the others meanwhile.
        if int(os.environ.get("RANK", 0)) > 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(3)
        sys.exit(f"error: {e}")
    except RuntimeError as e:
        if "by peer" not in str(e) and "remote process" not in str(e):                  # gloo's and NCCL's words
            raise
        sys.exit("another rank has gone, so this one ends too; its own last line says why")
    except BrokenPipeError:                                # | head has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())             # for what Python still flushes
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit("interrupted; nothing finished is lost, and the same command goes on from here")


def generator(*key):
    """A CPU generator seeded by `key` alone: it gives the same numbers on any device and any number of ranks."""
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big"))


@contextmanager
def whole_file(path):
    """Yield a temporary name beside `path`. Once written and flushed, the file is renamed to `path`; otherwise it is
    removed. Raises UserError if it cannot be written."""
    path = Path(path)
    part = path.with_name(f".{path.name}.{platform.node()[:20]}.{os.getpid()}.part")       # unique to this process
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        with open(part, "rb+") as f:                       # Windows can only flush files open for writing
            os.fsync(f.fileno())
        part.replace(path)
    except (OSError, SafetensorError) as e:
        raise UserError(f"{path}: cannot be written ({e}); make room or choose another place, then start again") from e
    finally:
        with suppress(OSError):                            # it is gone, or `path` lies below a file
            part.unlink()


class InUse(UserError):
    """Another process is at work in a folder."""


@contextmanager
def sole_owner(folder):
    """Hold `folder` for this process alone. Raises InUse, saying who is at work there, if another process holds it.

    The lock is the operating system's and ends with the process, however that ends. On NFS the server keeps it: if a
    whole machine dies, NFSv4 releases it after its lease, about 90 s. Warns if the file system has no locks.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".owner", "ab+", buffering=0)
    except OSError as e:
        raise UserError(f"{folder}: cannot be written ({e}); choose another --out") from e
    with file:
        try:
            if fcntl:                                      # Windows has no such module
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.truncate(0)
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            file.write(f"process {os.getpid()} on {platform.node()}, since {since},".encode())
        except BlockingIOError:
            file.seek(0)
            who = file.read().decode() or "another process"
            raise InUse(f"{folder}: {who} is at work there; wait for it or choose another --out") from None
        except OSError as e:
            if e.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise UserError(f"{folder}: cannot be written ({e}); make room or choose another --out") from e
            say(f"{folder}: this file system has no locks ({e}); make sure that no other job writes there")
        yield


def claim(note, made_by):
    """Note in a file which settings the files beside it are made with. Raises UserError if it holds other settings: so
    a second job with the same settings shares the work, and one with others stops before it has loaded anything.
    Removes what killed processes left unfinished more than a day ago."""
    if note.is_file():
        check_metadata(note, read_json(note), made_by)
    else:
        write_json(note, made_by)
    for part in note.parent.glob(".*.part"):
        with suppress(OSError):                            # another job has removed it
            if time.time() - part.stat().st_mtime > 86_400:
                part.unlink()


def write_json(path, *values):
    """Write a JSON file: one line for each value."""
    with whole_file(path) as part:
        part.write_text("".join(json.dumps(value) + "\n" for value in values))


def write_tensors(path, tensors, model="the model", **metadata):
    """Write a safetensors file. `metadata` goes into its header as JSON, in one entry, because safetensors does not
    keep the order of several. Raises UserError, naming `path` and `model`, for numbers that are not finite."""
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise UserError(f"{path}: {name} would hold numbers that are not finite; check the weights of {model}")
    with whole_file(path) as part:
        save_file({k: v.contiguous().cpu() for k, v in tensors.items()}, part, {"made_by": json.dumps(metadata)})


def read_header(path):
    """({name: shape}, metadata) of a file that `write_tensors` wrote. Raises UserError for any other file."""
    try:
        with safe_open(path, "pt") as f:
            shapes = {k: tuple(f.get_slice(k).get_shape()) for k in f.keys()}
            return shapes, json.loads((f.metadata() or {}).get("made_by", "{}"))
    except (OSError, SafetensorError, ValueError) as e:
        raise UserError(f"{path}: not a whole record ({e}); delete it and run the command that made it again") from e


def read_tensors(path):
    """All tensors of a record. Raises UserError for a file that is no record."""
    read_header(path)
    return load_file(path)


# ---- The command ----------------------------------------------------------------------------------------------------

@dataclass
class Options:
    """Encode a folder of videos with captions into records."""
    videos: str = option("", "folder of clips with captions")
    model: str = option("", "model folder, hub id or tiny; default: CogVideoX-5B-I2V with a GPU, else tiny")
    out: str = option("cache", "folder for the records")
    frames: int = option(0, "frames per clip, 8k + 1; default: the model's")
    height: int = option(0, "pixels, divisible by 16; default: the model's")
    width: int = option(0, "pixels, divisible by 16; default: the model's")
    fps: int = option(8, "frames a second the model works at")
    image_noise: int = option(0, "noised first frames to keep per clip; training draws one (as the release); 0: none")
    given_negatives: bool = option(False, "take negative_samples/ID/*.mp4 (a last resort: Sec. 4.2 keeps latents)")
    skip_bad: bool = option(False, "leave out unusable clips, with a list, instead of stopping")
    seed: int = option(0, "of the posterior samples and the image noise")


def main(options):
    """Encode this rank's share of the clips. Ranks never wait for each other; any number of them makes the same
    records."""
    if not options.videos:
        raise UserError("--videos is missing: the folder of clips with captions")
    rank, world, device, dtype = this_process()
    clips, faults = list_clips(options.videos, options.given_negatives)
    check_faults(faults, options)
    counts = [len(clip.negatives) for clip in clips if clip.negatives]
    if options.given_negatives and not counts:
        raise UserError(f"{options.videos}: has no videos in negative_samples/NAME/, which --given-negatives asks for")
    negatives = mode(counts) if counts else 0
    listed = {clip.name for clip in clips}
    clips, faults = clips[rank::world], faults[rank::world]                 # every rank has read the whole list
    folder = resolve(options.model, "transformer/config.json", "vae", "text_encoder", "tokenizer")
    out = Path(options.out)
    shape = clip_shape(options, folder)
    made_by = dict(vae=digest(folder / "vae"), text_encoder=digest(folder / "text_encoder"),
                   frames=shape[0], height=shape[1], width=shape[2])
    made_by |= {name: getattr(options, name) for name in ("fps", "image_noise", "given_negatives", "seed")}
    clips = [clip for clip in clips
             if not is_made(out / "win" / f"{clip.name}.safetensors", dict(made_by, caption=clip.caption))]
    films = {}
    check = partial(check_clip, negatives=negatives, shape=shape, fps=options.fps, films=films)
    checked = tqdm(read_ahead(clips, check, faults), "checking clips", len(clips), disable=rank > 0)
    clips = [clip for clip, _ in checked]
    check_faults(faults, options)
    claim(out / "win" / "made_by.json", made_by)
    if clips or not (out / "empty.safetensors").is_file():
        embeddings = encode_captions(clips, folder, out, device, dtype)     # T5 is freed before the VAE is loaded
    if clips:
        vae = load_vae(folder, device, dtype)
    decoded = read_ahead(clips, partial(read_clip, shape=shape, fps=options.fps, films=films), faults)
    for clip, pixels in tqdm(decoded, "encoding clips", len(clips), disable=rank > 0):
        record, lose = encode_clip(clip, pixels, vae, options, device)
        record["text"] = embeddings[clip.caption]
        record_hash = hash_of(record)
        if lose:
            given = {"lose": torch.stack(lose)}
            write_tensors(out / "lose" / f"{clip.name}.safetensors", given, model=folder, win=record_hash,
                          hash=hash_of(given))
        write_tensors(out / "win" / f"{clip.name}.safetensors", record, model=folder, hash=record_hash,
                      caption=clip.caption, source=str(clip.file), start=clip.start, **made_by)
    check_faults(faults, options)
    report_left_out(out / f"left_out_{rank}.txt", faults)
    records = {path.stem for path in (out / "win").glob("*.safetensors")}
    if records - listed:
        say(f"{out}/win: {len(records - listed)} records are of clips that {options.videos} does not list, such as "
            f"{min(records - listed)}; training takes them too: delete them if that is not wanted")
    following = "train.py" if options.given_negatives else "sample.py"
    say(f"{len(records)} clips in {out}/win; next: python {following} --model {quote(options.model)} "
        f"--data {quote(str(out))}")


if __name__ == "__main__":
    command(main, Options, "data")
