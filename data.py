"""Videos in: a folder of clips with captions becomes a cache of records, encoded once and trained on many times.

    python data.py --videos DIR --model MODEL --out CACHE              (torchrun --nproc_per_node 8 data.py … as well)

DIR holds NAME.mp4 beside NAME.txt; or metadata.jsonl / metadata.csv with file_name and text; or the authors' video.txt
and prompt.txt, a line a clip. A record is a safetensors file that holds all training needs, in bf16:

    CACHE/win/NAME.safetensors     win (C,F,H,W)  image (C,1,H,W)  text (L,D)  [noised (K,C,1,H,W)]
    CACHE/lose/NAME.safetensors    lose (N,C,F,H,W)                            written by sample.py
    CACHE/empty.safetensors        text (L,D), the embedding of "", for guidance

Files are written whole or not at all, so every stage can be killed at any moment,
and started again does what is missing.
"""
import argparse, base64, csv, hashlib, json, os, re, subprocess, sys, time
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import MISSING, dataclass, field, fields
from functools import lru_cache, partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Literal, NamedTuple, get_args, get_origin

import imageio.v2 as imageio
import imageio_ffmpeg
import numpy as np
import torch
import torch.nn.functional as nnf
from einops import rearrange
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from model import UserError, defaults_of, load_text_encoder, load_vae, read_config, read_dit_config, resolve

# ---------------------------------------------------------------------------------------------------------------------
# What all commands share: options, devices, seeds, files written whole
# ---------------------------------------------------------------------------------------------------------------------

HUB_MODEL = "zai-org/CogVideoX-5b-I2V"


def default_model():
    """The model where no --model is given, and why: CogVideoX-5B-I2V with a GPU, the tiny one without."""
    return (HUB_MODEL, "a GPU is here") if torch.cuda.is_available() else ("tiny", "no GPU is here")


def option(default=MISSING, help="", group=None):
    """A field of an Options class. Without a default it is a positional argument. `group` is the heading of the
    section of --help that begins with this option."""
    return field(default=default, metadata=dict(help=help, group=group))


def flag(name):
    """What a field of Options is called on the command line: ema_every -> --ema-every."""
    return "--" + name.replace("_", "-")


def add_argument(parser, field):
    """Add the command-line argument of one field of an Options class."""
    help, kind = field.metadata["help"].replace("%", "%%"), {}
    if field.default is MISSING:
        return parser.add_argument(field.name, help=help, type=field.type)
    if field.default not in ("", 0, ()):
        help += f" [{field.default}]"
    if field.type is bool:
        kind["action"] = argparse.BooleanOptionalAction
    elif field.type is list:
        kind.update(nargs="+", metavar="FILE")
    elif get_origin(field.type) is Literal:
        kind.update(choices=get_args(field.type), metavar="NAME")
    else:
        kind.update(type=field.type, metavar=field.type.__name__.upper())
    return parser.add_argument(flag(field.name), help=help, default=field.default, **kind)


def parse(options, name, argv=None):
    """Command line of NAME.py -> an instance of the dataclass `options`. A model may bring defaults of its own."""
    names = [field.name for field in fields(options)]
    parser = argparse.ArgumentParser(
        description=options.__doc__, allow_abbrev=False,
        formatter_class=partial(argparse.RawDescriptionHelpFormatter, max_help_position=28, width=118))
    section = parser
    for field in fields(options):
        if field.metadata["group"]:
            section = parser.add_argument_group(field.metadata["group"])
        add_argument(section, field)
    valid = " ".join(flag(name) for name in names)
    parser.error = lambda message: sys.exit(f"error: {message}; the options are {valid}")
    if "model" in names:
        parser.set_defaults(model=default_model()[0])
        model = parser.parse_known_args(argv)[0].model
        parser.set_defaults(**defaults_of(model, name))
    return options(**vars(parser.parse_args(argv)))


class Process(NamedTuple):
    """One of `world_size` equal processes, with its device and the dtype its networks compute in."""
    rank: int
    world_size: int
    device: torch.device
    dtype: torch.dtype


def this_process():
    """This process, alone or under torchrun. Raises UserError where more GPUs are asked for than exist."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if not torch.cuda.is_available():
        return Process(rank, world_size, torch.device("cpu"), torch.float32)
    local, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if local >= gpus:
        raise UserError(f"--nproc_per_node asks for a GPU number {local}, this machine has {gpus}")
    torch.cuda.set_device(local)
    return Process(rank, world_size, torch.device("cuda", local), torch.bfloat16)


def command(main, options, name):
    """Run `main(options)` of NAME.py; a user's mistake ends in one line and status 1, an interruption in how to go on."""
    for stream in sys.stdout, sys.stderr:
        stream.reconfigure(errors="replace")               # a console that cannot print ω prints ?
    try:
        options, (default, why) = parse(options, name), default_model()
        uses_a_model = not any(getattr(options, name, None) for name in ("curate", "study", "tally", "verdict"))
        if hasattr(options, "model") and uses_a_model and this_process().rank == 0:
            print(f"model: {options.model} ({why if options.model == default else '--model'})")
        main(options)
    except UserError as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        sys.exit("interrupted; nothing finished is lost, and the same command goes on from here")


def generator(*key):
    """A CPU generator whose stream depends on `key` alone: the same numbers on any device and any number of ranks."""
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big"))


@contextmanager
def whole_file(path):
    """Yield a temporary name beside `path` that takes its place once written and flushed, and vanishes otherwise."""
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.environ.get('RANK', 0)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        with open(part, "rb") as f:
            os.fsync(f.fileno())
        part.replace(path)
    except (OSError, SafetensorError) as e:
        raise UserError(f"{path}: cannot be written ({e}); make room or choose another place, then start again") from e
    finally:
        with suppress(OSError):                            # there is none, or `path` lies under a file
            part.unlink()


def write_tensors(path, tensors, **metadata):
    """A safetensors file; `metadata` is JSON in its header, as one entry: safetensors writes several in any order."""
    with whole_file(path) as part:
        save_file({k: v.contiguous().cpu() for k, v in tensors.items()}, part, {"made_by": json.dumps(metadata)})


def read_header(path):
    """({name: shape}, metadata) of a file that `write_tensors` wrote. Raises UserError for anything else."""
    try:
        with safe_open(path, "pt") as f:
            return ({k: tuple(f.get_slice(k).get_shape()) for k in f.keys()},
                    json.loads((f.metadata() or {}).get("made_by", "{}")))
    except (OSError, SafetensorError, ValueError) as e:
        raise UserError(f"{path}: not a whole record ({e}); delete it and run the command that made it again") from e


def read_tensors(path):
    """All tensors of a record. Raises UserError for a file that is not one."""
    read_header(path)
    with safe_open(path, "pt") as f:
        return {k: f.get_tensor(k) for k in f.keys()}


# ---------------------------------------------------------------------------------------------------------------------
# Pixels: reading and writing pictures and videos
# ---------------------------------------------------------------------------------------------------------------------

def read_frames(path, frames, fps):
    """`frames` frames of a video, taken evenly at `fps` from its start: (F,H,W,3) uint8.

    Raises UserError for a file that is missing, not a video, or too short.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such video")
    try:
        # Else ffmpeg offers to be stopped by a key, now and then in the middle of a line that imageio waits for.
        with imageio.get_reader(path, "ffmpeg", input_params=["-nostdin"]) as reader:
            rate, taken = reader.get_meta_data()["fps"], []
            for i, frame in enumerate(reader):
                while len(taken) < frames and i >= int(len(taken) * rate / fps + 0.5):    # a slow video repeats frames
                    taken.append(frame)
                if len(taken) == frames:
                    return np.stack(taken)
    except (OSError, RuntimeError, KeyError, ValueError) as e:
        reason = [line for line in str(e).splitlines() if line.strip()][-1]
        raise UserError(f"{path}: cannot be read as a video ({reason.strip()})") from e
    raise UserError(f"{path}: is too short, {len(taken)} of the {frames} frames at {fps} fps; "
                    f"give a clip of {(frames - 1) / fps:.1f} s or fewer --frames")


def read_image(path):
    """A picture as (1,H,W,3) uint8. Raises UserError for a file that is missing or not a picture."""
    try:
        image = np.asarray(imageio.imread(path))
    except (OSError, ValueError, SyntaxError) as e:        # SyntaxError: what Pillow makes of a broken PNG
        raise UserError(f"{path}: cannot be read as a picture ({str(e).splitlines()[0]})") from e
    image = np.stack([image] * 3, axis=-1) if image.ndim == 2 else image[..., :3]
    if image.ndim != 3 or image.shape[-1] != 3 or image.dtype != np.uint8:
        raise UserError(f"{path}: is {image.dtype} of shape {image.shape}, expected a picture of 8 bits a channel")
    return image[None]


def fit(frames, height, width):
    """(F,H,W,3) uint8 of any size -> (3,F,height,width) in [-1,1]: resized to cover, then cut at the centre."""
    x = rearrange(torch.from_numpy(frames), "f h w c -> f c h w").float()
    h, w = x.shape[2:]
    scale = max(height / h, width / w)
    size = max(height, round(h * scale)), max(width, round(w * scale))
    if scale < 1:
        x = nnf.interpolate(x, size, mode="area")          # the mean of the pixels that fall together: no aliasing
    elif scale > 1:
        x = nnf.interpolate(x, size, mode="bicubic").clamp(0, 255)
    top, left = (x.shape[2] - height) // 2, (x.shape[3] - width) // 2
    return rearrange(x[:, :, top:top + height, left:left + width], "f c h w -> c f h w") / 127.5 - 1


def to_uint8(video):
    """(3,F,H,W) in [-1,1] -> (F,H,W,3) uint8."""
    return rearrange((video.float().clamp(-1, 1) + 1) * 127.5, "c f h w -> f h w c").round().byte().cpu().numpy()


def write_video(path, frames, fps):
    """(F,H,W,3) uint8 -> .mp4 (H.264, plays anywhere; even sides) or .gif, by the name's ending."""
    if Path(path).suffix == ".gif":
        coded = imageio.mimwrite(imageio.RETURN_BYTES, frames, format="gif", duration=1000 / fps, loop=0)
    else:
        coded = imageio.mimwrite(imageio.RETURN_BYTES, frames, format="mp4", fps=fps, codec="libx264",
                                 pixelformat="yuv420p", quality=None, macro_block_size=2, output_params=["-crf", "12"])
    with whole_file(path) as part:
        part.write_bytes(coded)


# ---------------------------------------------------------------------------------------------------------------------
# A folder of videos with captions
# ---------------------------------------------------------------------------------------------------------------------

# Files that are videos or pictures by their names. Another name counts where a caption stands beside it.
SUFFIXES = {
    "video": ".mp4 .m4v .mov .mkv .webm .avi .mpg .mpeg .ts .mts .m2ts .wmv .flv .ogv .3gp .gif".split(),
    "picture": ".png .jpg .jpeg .webp .bmp .tif .tiff .gif .avif".split(),
}


class Row(NamedTuple):
    """One row of a list of videos or pictures with captions."""
    where: str                                             # list and row, for messages
    file: str                                              # relative to the folder of the list
    caption: str
    extra: dict = {}                                       # other fields of the row, such as name and keep
    fault: str = ""                                        # why the row cannot be used, as one line for the user


def read_lines(path):
    """The lines of a UTF-8 file, with or without a byte order mark. Only \\n and \\r\\n end a line: Unicode has others,
    which are part of a caption. A byte that is not UTF-8 becomes a surrogate, which `check_row` reports by its row."""
    try:
        text = path.read_bytes().decode("utf-8-sig", "surrogateescape")
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror})") from e
    return text.replace("\r\n", "\n").removesuffix("\n").split("\n")


def check_row(where, file, caption, extra={}):
    """A Row, with its fault where it has one."""
    fault = ""
    for name, value in (("caption", caption), ("file name", file)):
        if not isinstance(value, str):
            fault = f"{where}: the {name} is {json.dumps(value):.60}, expected text"
        elif wrong := re.search("[\0\ud800-\udfff]", value):
            fault = f"{where}: the {name} is not UTF-8 text, character {wrong.start() + 1} is {wrong[0]!a}; save it as UTF-8"
    if not fault and not file.strip():
        fault = f"{where}: the file name is empty"
    return Row(where, "", "", extra, fault) if fault else Row(where, file.strip(), caption.strip(), extra)


def paired_rows(folder, files, prompts):
    """Two text files, a line a sample: the layout of the authors' release."""
    for name in (files, prompts):
        if not (folder / name).is_file():
            raise UserError(f"{folder / name}: missing; {files} and {prompts} go together")
    names, captions = read_lines(folder / files), read_lines(folder / prompts)
    while names and not names[-1].strip():
        names.pop()
    if len(captions) < len(names) or "".join(captions[len(names):]).strip():
        raise UserError(f"{folder}: {files} has {len(names)} lines and {prompts} {len(captions)}; "
                        "expected a caption a line for each")
    rows = []
    for number, (name, caption) in enumerate(zip(names, captions), start=1):
        if name.strip() or caption.strip():
            rows.append(check_row(f"{folder / files}, row {number}", name, caption))
    return rows


def jsonl_rows(path):
    """metadata.jsonl: (row number, its fields) or (row number, what is wrong with it)."""
    for number, line in enumerate(read_lines(path), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as e:
                yield number, f"is not JSON ({e})"


def csv_rows(path):
    """metadata.csv: (row number, its fields) or (row number, what is wrong with it)."""
    columns, reader = [], csv.reader([line + "\n" for line in read_lines(path)], strict=True)
    while True:
        number = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as e:
            yield f"{number} to {reader.line_num}", f"cannot be read ({e}); check the quotes"
            continue
        if not "".join(cells).strip():
            continue
        if not columns:
            columns = [cell.strip() for cell in cells]
            if not {"file_name", "text"} <= {*columns}:
                raise UserError(f"{path}: has the columns {', '.join(columns)}, expected file_name and text")
        elif len(cells) != len(columns):
            yield number, (f"has {len(cells)} cells, expected {len(columns)} ({', '.join(columns)}); "
                           "put a caption with commas in double quotes")
        else:
            yield number, dict(zip(columns, cells))


def metadata_rows(path):
    """metadata.jsonl or metadata.csv with file_name and text: the layout of Hugging Face's video folders."""
    rows = []
    for number, fields in jsonl_rows(path) if path.suffix == ".jsonl" else csv_rows(path):
        where = f"{path}, row {number}"
        if isinstance(fields, str):
            rows.append(Row(where, "", "", fault=f"{where}: {fields}"))
        elif not isinstance(fields, dict) or not {"file_name", "text"} <= {*fields}:
            found = f"has the fields {', '.join(fields)}" if isinstance(fields, dict) else f"is {json.dumps(fields):.60}"
            rows.append(Row(where, "", "", fault=f"{where}: {found}, expected file_name and text"))
        else:
            rows.append(check_row(where, fields.pop("file_name"), fields.pop("text"), fields))
    return rows


def sidecar_rows(folder, what):
    """A video or picture beside NAME.txt: those whose names end like one, and any other beside a caption."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    captions = {path.stem: path for path in files if path.suffix.lower() == ".txt"}
    known = {path.stem for path in files if path.suffix.lower() in SUFFIXES[what]}
    rows = []
    for path in files:
        if path.suffix.lower() in SUFFIXES[what] or (path not in captions.values() and path.stem in captions
                                                     and path.stem not in known):
            if path.stem in captions:
                rows.append(check_row(str(captions[path.stem]), path.name, "\n".join(read_lines(captions[path.stem]))))
            else:
                rows.append(Row(str(path), path.name, "", fault=f"{path}: has no caption; write one into "
                                f"{path.with_suffix('.txt')} or into a list"))
    return rows


def read_list(folder, files="video.txt", prompts="prompt.txt", what="video"):
    """The Rows of a folder of videos or pictures (`what`) with captions, in a fixed order, whatever its form: a line a
    sample in `files` and `prompts`; metadata.jsonl or metadata.csv with file_name and text; or NAME.mp4 beside NAME.txt.

    Raises UserError for a folder without rows. The fault of a single row is in its `fault`, for the caller to raise.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    lists = [folder / name for name in ("metadata.jsonl", "metadata.csv") if (folder / name).is_file()]
    if (folder / files).is_file():
        rows = paired_rows(folder, files, prompts)
    elif lists:
        rows = metadata_rows(lists[0])
    else:
        rows = sidecar_rows(folder, what)
    if not rows:
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise UserError(f"{folder}: holds no {what}s with captions, but {found}; expected a {what} beside NAME.txt, "
                        f"metadata.jsonl, metadata.csv, or {files} and {prompts}")
    return rows


class Clip(NamedTuple):
    """One sample before encoding."""
    name: str                                              # of its record
    video: Path
    caption: str
    image: Path | None = None                              # a first frame of its own, where the folder has one
    negatives: tuple[Path, ...] = ()                       # generated videos, where the folder has them
    fault: str = ""                                        # of its row in the list


def record_name(file):
    """A plain name for the record of a file: its path without the suffix; where too long for a file, ended by a hash."""
    path = Path(file)
    name = "_".join(part for part in path.with_suffix("").parts if part not in (path.anchor, ".."))
    raw = os.fsencode(name)
    if len(raw) <= 200:                                    # of 255, less suffixes
        return name
    return f"{raw[:180].decode(errors='ignore')}-{hashlib.sha256(raw).hexdigest()[:16]}"


def list_clips(folder):
    """The clips of a folder in any of its three forms, in a fixed order, without those that a row's `keep` drops.

    Raises UserError for a folder without clips, lists that do not fit, or two clips of one name.
    """
    folder, clips, dropped = Path(folder), [], 0
    images = {path.stem: path for path in sorted(folder.glob("first_frames/*"))}
    for row in read_list(folder):
        if str(row.extra.get("keep", True)).lower() != "true":
            dropped += 1
            continue
        name = record_name(row.file)
        negatives = sorted((folder / "negative_samples" / Path(row.file).stem).glob("*.mp4"))
        clips.append(Clip(name, folder / row.file, row.caption, images.get(name), tuple(negatives), row.fault))
    if dropped:
        print(f"{folder}: {dropped} clips are left out by their `keep`")
    if not clips:
        raise UserError(f"{folder}: no row of the list is kept")
    for name, count in Counter(clip.name for clip in clips if not clip.fault).items():
        if count > 1:
            raise UserError(f"{folder}: {count} clips are named {name}; rename all but one")
    return clips


# ---------------------------------------------------------------------------------------------------------------------
# Records: what training reads
# ---------------------------------------------------------------------------------------------------------------------

def digest(folder):
    """A short name for the weights in a folder: a hash of its small files and of the size and first MiB of others."""
    sha = hashlib.sha256()
    for file in sorted(p for p in folder.iterdir() if p.suffix in (".json", ".safetensors", ".model")):
        sha.update(f"{file.name} {file.stat().st_size}".encode())
        with open(file, "rb") as f:
            sha.update(f.read(2 ** 20))
    return sha.hexdigest()[:16]


def check_metadata(path, found, expected):
    """Raise UserError unless the record at `path` has the `expected` fingerprint (what made it) and caption."""
    found, now = ({**m.get("fingerprint", {}), "caption": m.get("caption")} for m in (found, expected))
    different = [f"{k} {found.get(k)} (now {now.get(k)})" for k in sorted({*found, *now}) if found.get(k) != now.get(k)]
    if different:
        raise UserError(f"{path}: was made with other settings: {', '.join(different)}; "
                        "use another folder or delete this one")


class Records:
    """The records of a cache as a sequence of dicts of tensors, checked to belong together.

    win (C,F,H,W), image (C,1,H,W), text (L,D); with `negatives`, also lose (N,C,F,H,W). Latents are scaled, bf16.
    With `scores`, also scores (N,) of the negatives, from CACHE/scores.json: {record: [a number a negative]}, bigger
    is better, which any reward model can write.
    """

    def __init__(self, folder, negatives=True, scores=False):
        self.folder, self.scores = Path(folder), None
        self.names = sorted(p.stem for p in (self.folder / "win").glob("*.safetensors"))
        if not self.names:
            raise UserError(f"{folder}: holds no records; make them with: python data.py --videos DIR --out {folder}"
                            f" and: python sample.py --data {folder}")
        self.kinds = ["win", "lose"] if negatives else ["win"]
        for kind in self.kinds:
            first = None
            for name in self.names:
                file = self.folder / kind / f"{name}.safetensors"
                if not file.is_file():
                    raise UserError(f"{file}: missing; make the negatives with: python sample.py --data {folder}")
                shapes, metadata = read_header(file)
                made_by = {"fingerprint": metadata.get("fingerprint", {})}
                first = first or (shapes, made_by)
                check_metadata(file, made_by, first[1])
                if shapes != first[0]:
                    raise UserError(f"{file}: holds {shapes}, the other records {first[0]}")
        if scores:
            self.scores = self.read_scores(self.folder / "scores.json", first[0]["lose"][0])

    def read_scores(self, file, count):
        """{record: scores (count,)}. Raises UserError where the file has not `count` finite numbers for each."""
        try:
            stored = json.loads(file.read_text())
            scores = {name: torch.tensor(stored[name], dtype=torch.float32) for name in self.names}
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise UserError(f"{file}: cannot be read ({type(e).__name__}: {e}); "
                            "expected {record: [a number a negative]}, bigger is better") from e
        for name, values in scores.items():
            if values.shape != (count,) or not values.isfinite().all():
                raise UserError(f"{file}: {name} has {values.tolist()}, expected {count} finite numbers")
        return scores

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index):
        files = (self.folder / kind / f"{self.names[index]}.safetensors" for kind in self.kinds)
        row = {k: v for file in files for k, v in read_tensors(file).items()}
        return row | {"scores": self.scores[self.names[index]]} if self.scores else row

    def empty_text(self):
        """The embedding (L,D) of the empty caption, for guidance."""
        return read_tensors(self.folder / "empty.safetensors")["text"]


# ---- Asking a vision-language model: here about raw clips (Sec. 4.1), in sample.py about generated ones (App. B.3) --

ASSETS = Path(__file__).parent / "assets"
KEY = "VLM_API_KEY"                                        # the environment variable that holds the server's key


@lru_cache(maxsize=64)                                     # a video is asked about four times
def frames_as_jpeg(video, count):
    """`count` frames of a whole clip, evenly spaced in time, or a picture: JPEG files of at most 768 pixels a side."""
    with suppress(RuntimeError, OSError):
        seconds = imageio_ffmpeg.count_frames_and_secs(str(video))[1]
        filters = f"fps={count / max(seconds, 0.04)},scale='min(768,iw*sar)':'min(768,ih)'" \
                  ":force_original_aspect_ratio=decrease"
        made = subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-v", "error", "-i", str(video), "-vf", filters,
                               "-frames:v", str(count), "-c:v", "mjpeg", "-q:v", "3", "-f", "image2pipe", "-"],
                              capture_output=True).stdout
        start = b"\xff\xd8\xff"                           # of a JPEG; never inside one
        if start in made:
            return [start + rest for rest in made.split(start)[1:]]
    raise UserError(f"{video}: cannot be read as a video or picture")


def connect(options):
    """A client of the server at --endpoint. A key is always given: else the client would send the user's hub token."""
    if not options.endpoint.startswith(("http://", "https://")) or not options.vlm:
        raise UserError(f"--endpoint {options.endpoint} --vlm {options.vlm}: expected the http:// address of an "
                        "OpenAI-compatible server, such as http://localhost:8000/v1, and the name of a model there")
    return InferenceClient(base_url=options.endpoint, api_key=os.environ.get(KEY) or "none", timeout=options.timeout)


def ask(client, options, text, images, read):
    """The model's answers to a text with JPEG images: one, or two where `read` makes None of the first.

    Raises UserError, with the address, where the server is absent, silent or answers with an error three times.
    """
    content, answers, tries = [{"type": "text", "text": text}], [], 0
    for image in images:
        url = "data:image/jpeg;base64," + base64.b64encode(image).decode()
        content.insert(-1, {"type": "image_url", "image_url": {"url": url}})
    while not answers or len(answers) < 2 and read(answers[-1]) is None:
        try:
            found = client.chat_completion([{"role": "user", "content": content}], model=options.vlm, max_tokens=1000,
                                           temperature=0.7 * len(answers))
            answers.append(found.choices[0].message.content or "")
        except (HTTPError, OSError, ValueError, LookupError, TypeError, AttributeError) as e:
            tries += 1
            status, reason = None, f"{type(e).__name__}: {e}"
            if isinstance(e, HfHubHTTPError):
                status, reason = e.response.status_code, f"{e.response.status_code} {e.response.text or e}"
            if tries == 3 or status in (400, 401, 403, 404, 413, 422):         # what another try would not change
                raise UserError(f"{options.endpoint}: {' '.join(reason.split()):.300}; "
                                "what was answered is kept, the same command goes on from here") from e
            time.sleep(5 ** tries)
    return answers


def in_parallel(work, items, options):
    """Yield work(item) for every item, in the order in which they come, --parallel at a time."""
    with ThreadPool(max(1, options.parallel)) as pool:
        yield from tqdm(pool.imap_unordered(work, items), desc=f"asking {options.vlm}", total=len(items))


def read_rows(file, key, **asked):
    """{row[key]: row} of the JSON lines that an earlier call wrote, if any. Raises UserError where it `asked` another."""
    rows = {}
    for number, row in jsonl_rows(file) if file.is_file() else ():
        if not isinstance(row, dict) or key not in row:
            raise UserError(f"{file}, row {number}: is not one that this command wrote; give another --out")
        check_metadata(file, {"fingerprint": {k: row.get(k) for k in asked}}, {"fingerprint": asked})
        rows[row[key]] = row
    return rows


def write_rows(file, rows):
    """JSON lines."""
    with whole_file(file) as part:
        part.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_page(template, path, content):
    """A page of assets/ with its content, which the page reads as JSON: no text in it can end the script or run."""
    page = (ASSETS / template).read_text(encoding="utf-8")
    with whole_file(path) as part:
        part.write_text(page.replace("{{content}}", json.dumps(content).replace("<", "\\u003c")), encoding="utf-8")


CHECKS = "theme", "action", "sharp", "uncut", "clean"       # of assets/curate.txt, in which all are to be true


def read_judgement(answer):
    """(keep, reason, caption) in an answer to assets/curate.txt, or None where it is not what that asks for."""
    try:
        found = json.loads(answer[answer.index("{"):answer.rindex("}") + 1])
        failed = [name for name in CHECKS if {"yes": False, "no": True}[found[name].lower()]]
        caption, reason = found["description"].strip(), found["reason"].strip()
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return (not failed, f"not {', '.join(failed)}: {reason}" if failed else "", caption) if failed or caption else None


def curate(options):
    """Sec. 4.1: a model judges and describes every clip in or below a folder. OUT/metadata.jsonl gets a row for each,
    with keep true, false, or null where the answer could not be read; OUT/inspect.html shows them to a person."""
    out, asked, client = Path(options.out).resolve(), {"theme": options.theme, "vlm": options.vlm}, connect(options)
    rows, clips = read_rows(out / "metadata.jsonl", "file_name", **asked), {}
    for path in sorted(Path(options.videos).resolve().rglob("[!.]*")):
        if path.suffix.lower() in SUFFIXES["video"]:
            clips[Path(os.path.relpath(path, out)).as_posix()] = path
    text = (ASSETS / "curate.txt").read_text(encoding="utf-8").format(theme=options.theme)

    def judge(name):
        try:
            images = frames_as_jpeg(clips[name], 8)
        except UserError as e:
            return dict(file_name=name, text="", keep=False, reason=str(e), **asked)
        answer = ask(client, options, text, images, read_judgement)[-1]
        keep, reason, caption = read_judgement(answer) or (None, f"cannot read the answer: {answer:.300}", "")
        return dict(file_name=name, text=caption, keep=keep, reason=reason, **asked)

    try:
        for row in in_parallel(judge, [name for name in clips if name not in rows], options):
            rows[row["file_name"]] = row
            write_rows(out / "metadata.jsonl", rows.values())
    finally:
        write_page("inspect.html", out / "inspect.html", list(rows.values()))
    kept = Counter(row.get("keep", True) for row in rows.values())
    print(f"{kept[True]} clips kept, {kept[False]} dropped, {kept[None]} undecided: look at them in {options.out}/inspect.html, "
          f"move what it saves to {options.out}/metadata.jsonl, then: python data.py --videos {options.out}")


# ---------------------------------------------------------------------------------------------------------------------
# The command: encode a folder of videos
# ---------------------------------------------------------------------------------------------------------------------

@dataclass
class Options:
    """Encode a folder of videos with captions into records; before that, --curate makes such a folder of raw videos."""
    videos: str = option("", "folder of clips with captions")
    model: str = option("", "model folder, hub id or tiny; default: by whether a GPU is here")
    out: str = option("cache", "folder for the records")
    frames: int = option(0, "frames a clip, 8k + 1; default: the model's")
    height: int = option(0, "pixels, divisible by 16; default: the model's")
    width: int = option(0, "pixels, divisible by 16; default: the model's")
    fps: int = option(8, "frames a second the model works at")
    image_noise: int = option(0, "K noised first frames; training draws one (the authors' augmentation)")
    given_negatives: bool = option(False, "take negative_samples/ID/*.mp4 (a last resort: Sec. 4.2 keeps latents)")
    skip_bad: bool = option(False, "leave out unusable clips, with a list, instead of stopping")
    seed: int = option(0, "of the posterior samples")
    curate: bool = option(False, "let a vision-language model select and describe raw clips", "Raw clips")
    theme: str = option("", "what the clips are to show, such as: people eating and drinking")
    endpoint: str = option("", f"address of an OpenAI-compatible server; its key: environment variable {KEY}")
    vlm: str = option("", "name of the model there")
    parallel: int = option(4, "requests under way at once")
    timeout: float = option(300.0, "seconds to wait for an answer")


def clip_shape(options, folder):
    """(frames, height, width) of the clips: as asked, else as the model was trained. Raises UserError for a bad one."""
    c = read_dit_config(folder)
    space = 2 ** (len(read_config(folder, "vae", "AutoencoderKLCogVideoX")["block_out_channels"]) - 1)
    trained = c["sample_frames"], c["sample_height"] * space, c["sample_width"] * space
    shape = tuple(asked or own for asked, own in zip((options.frames, options.height, options.width), trained))
    if shape[0] < 1 or shape[0] % 8 != 1:
        raise UserError(f"--frames {shape[0]}: expected 8k + 1 (9, 17, … 49)")
    multiple = space * c["patch_size"]
    for option, size in (("--height", shape[1]), ("--width", shape[2])):
        if size <= 0 or size % multiple:
            raise UserError(f"{option} {size}: expected a multiple of {multiple}")
    if c["use_learned_positional_embeddings"] and (shape[0] > trained[0] or shape[1:] != trained[1:]):
        raise UserError(f"--frames {shape[0]} --height {shape[1]} --width {shape[2]}: this model's learned positions "
                        f"are for at most {trained[0]} frames of {trained[1]}×{trained[2]}")
    if options.fps < 1:
        raise UserError(f"--fps {options.fps}: expected at least 1")
    return shape


def usable(clips, options, frames):
    """The clips that can be decoded; the first that cannot stops the job, or with --skip-bad is listed and left out."""
    good = []
    for clip in tqdm(clips, desc="checking clips"):
        try:
            if clip.fault:
                raise UserError(clip.fault)
            if options.given_negatives and not clip.negatives:
                raise UserError(f"{clip.video}: has no negatives; expected negative_samples/{clip.video.stem}/*.mp4")
            for video in (clip.video, *(clip.negatives if options.given_negatives else ())):
                read_frames(video, frames, options.fps)
            good.append(clip)
        except UserError as e:
            if not options.skip_bad:
                raise
            tqdm.write(f"left out: {e}")
    return good


def encode_clip(clip, vae, shape, options, device):
    """Tensors of one record, without the text; and the negatives', where the folder brings them."""
    frames, size = shape[0], shape[1:]
    encode = lambda video, *key: vae.encode(video[None].to(device),
                                            generator("posterior", options.seed, clip.name, *key))[0].bfloat16()
    video = fit(read_frames(clip.video, frames, options.fps), *size)                    # (3,F,H,W)
    image = fit(read_image(clip.image), *size) if clip.image else video[:, :1]          # (3,1,H,W)
    record = {"win": encode(video, "win"), "image": encode(image, "image")}
    if options.image_noise:
        rng = generator("image noise", options.seed, clip.name)
        sigma = (torch.randn(options.image_noise, generator=rng) * 0.5 - 3).exp()  # the authors' σ, in pixels of [-1,1]
        noised = [image + s * torch.randn(image.shape, generator=rng) for s in sigma]
        record["noised"] = torch.stack([encode(x, "noised", k) for k, x in enumerate(noised)])
    lose = [encode(fit(read_frames(v, frames, options.fps), *size), "lose", k)
            for k, v in enumerate(clip.negatives)] if options.given_negatives else []
    return record, lose


def encode_captions(clips, folder, out, device, dtype):
    """{caption: embedding (L,D), bf16} of the clips, and the empty caption's beside the records."""
    encode_text = load_text_encoder(folder, device, dtype)
    texts = [*dict.fromkeys(clip.caption for clip in clips), ""]
    embeddings = {text: encode_text([text])[0].bfloat16().cpu() for text in tqdm(texts, desc="encoding captions")}
    write_tensors(out / "empty.safetensors", {"text": embeddings[""]})
    return embeddings


def missing(expected, folder):
    """Those of the names in `expected` {name: its metadata} without a record in `folder` yet.

    Raises UserError where there is a record, but one made with other settings or of another caption.
    """
    files = {name: Path(folder) / f"{name}.safetensors" for name in expected}
    for name, file in files.items():
        if file.exists():
            check_metadata(file, read_header(file)[1], expected[name])
    return [name for name, file in files.items() if not file.exists()]


def main(options):
    """Encode this rank's share of the clips. Ranks never wait for each other: any number makes the same files."""
    rank, world, device, dtype = this_process()
    if not options.videos:
        raise UserError("--videos is missing: the folder of clips with captions")
    if options.curate:
        return curate(options)
    listed = list_clips(options.videos)
    usable([clip for clip in listed if clip.fault], options, 0)
    clips = {clip.name: clip for clip in listed if not clip.fault}
    folder = resolve(options.model, "transformer/config.json", "vae", "text_encoder", "tokenizer")
    out = Path(options.out)
    shape = clip_shape(options, folder)
    made_by = dict(vae=digest(folder / "vae"), text_encoder=digest(folder / "text_encoder"),
                   frames=shape[0], height=shape[1], width=shape[2],
                   fps=options.fps, image_noise=options.image_noise, given_negatives=options.given_negatives,
                   seed=options.seed)
    expected = {name: dict(fingerprint=made_by, caption=clip.caption, source=str(clip.video))
                for name, clip in list(clips.items())[rank::world]}
    todo = usable([clips[name] for name in missing(expected, out / "win")], options, shape[0])
    if todo or not (out / "empty.safetensors").is_file():
        embeddings = encode_captions(todo, folder, out, device, dtype)      # then that network is gone: one at a time
    if todo:
        vae = load_vae(folder, device, dtype)
    for clip in tqdm(todo, desc="encoding clips", disable=rank > 0):
        record, lose = encode_clip(clip, vae, shape, options, device)
        if lose:
            write_tensors(out / "lose" / f"{clip.name}.safetensors", {"lose": torch.stack(lose)},
                          fingerprint={"given": len(lose)})
        write_tensors(out / "win" / f"{clip.name}.safetensors", {**record, "text": embeddings[clip.caption]},
                      **expected[clip.name])
    if rank == 0:
        print(f"{len(list((out / 'win').glob('*.safetensors')))} clips in {out}/win; next: python "
              f"{'train' if options.given_negatives else 'sample'}.py --model {options.model} --data {out}")


if __name__ == "__main__":
    command(main, Options, "data")
