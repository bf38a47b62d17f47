"""Files written whole or not at all, one owner a folder, tensors with what made them, and fingerprints of content."""
import fcntl, hashlib, json, os, platform, time
from contextlib import contextmanager, suppress
from pathlib import Path
from shlex import quote

from support import UserError
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

MARK = ".realdpo-part"         # the end of the name of whatever is unfinished; nobody else's files are called so
VERSION = 2                    # of caches and runs; those that another version of this program made are refused

def visible(folder, pattern="*"):
    """The files and folders that match, sorted, without hidden ones, such as the ._NAME that a Mac leaves."""
    return sorted(path for path in Path(folder).glob(pattern) if not path.name.startswith("."))

@contextmanager
def writing(path):
    """Raise UserError if writing fails meanwhile: a full disk, a missing permission or the like."""
    try:
        yield
    except (OSError, SafetensorError) as e:
        raise UserError(f"{path}: cannot be written ({e}); make room, then start again: what is finished stays") from e

@contextmanager
def whole_file(path):
    """Yield a temporary name beside `path`. What is written there gets the name `path` once it is on the disk."""
    path = Path(path)
    part = path.with_name(f".{path.name}.{platform.node()[:20]}.{os.getpid()}{MARK}")      # unique to this process
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield part
            with open(part, "rb") as f:
                os.fsync(f.fileno())
            part.replace(path)
    finally:
        with suppress(OSError):                            # it has been renamed, or `path` lies below a file
            part.unlink()

def write_json(path, *values):
    """Write a JSON file: one line for each value."""
    lines = [json.dumps(value) + "\n" for value in values]
    with whole_file(path) as part:
        part.write_text("".join(lines), encoding="utf-8")

class Config(dict):
    """The object in a JSON file. A missing key raises UserError, which names the file."""

    def __missing__(self, key):
        raise UserError(f"{self.file}: {key} is missing")

def read_json(file):
    """The object in a JSON file, as a Config. Raises UserError if there is none."""
    try:
        config = Config(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as e:
        raise UserError(f"{file}: cannot be read as a JSON object ({e})") from e
    config.file = file
    return config

class InUse(UserError):
    """Another process is at work in a folder."""

@contextmanager
def sole_owner(folder):
    """Hold `folder` for this process alone, until it ends in whatever way. Raises InUse if another one does."""
    note = folder / ".owner"
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = open(note, "a")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InUse(f"{folder}: {note.read_text()} is at work there; wait or choose another --out") from None
        except OSError as e:
            print(f"{folder}: this file system has no locks ({e}); make sure that no other job writes there")
        with writing(note):
            note.write_text(f"process {os.getpid()} on {platform.node()}, since {time.strftime('%F %T')},")
        yield

def check_same(place, found, expected):
    """Raise UserError, with the first difference, unless what was `found` in a place has all that is `expected`."""
    for name, value in expected.items():
        if found.get(name) != value:
            raise UserError(f"{place}: was made with {name} {found.get(name)} (now {value}); use the same, choose "
                            f"another place or, if nothing in it is needed: rm -r {quote(str(place))}")

def claim(note, files, **settings):
    """Note the settings that `files` are made with; returns the note's id. Raises UserError if it says otherwise, or if
    there are files and no note."""
    settings = {"version": VERSION, **settings}
    if not note.exists():
        for file in files:
            if file.exists():
                raise UserError(f"{file}: is there, but no {note.name} says what made it; choose another folder")
        write_json(note, {"id": hash_of(json.dumps(settings)), **settings})
    found = read_json(note)
    check_same(note.parent, found, settings)
    return found["id"]

@contextmanager
def open_tensors(path):
    """Yield an open safetensors file. Raises UserError if it is damaged."""
    try:
        with safe_open(path, "pt") as f:
            yield f
    except (OSError, SafetensorError, LookupError, TypeError, json.JSONDecodeError) as e:
        raise UserError(f"{path}: not a whole safetensors file ({e!r:.200}); make, download or copy it again") from e

def write_tensors(path, tensors, **metadata):
    """Write a safetensors file; `metadata` goes into its header. Raises UserError for numbers that are not finite."""
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise UserError(f"{path}: {name} would hold numbers that are not finite; check the weights of the model")
    contiguous = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    with whole_file(path) as part:                         # one entry, because safetensors keeps no order of several
        save_file(contiguous, part, {"made_by": json.dumps(metadata)})

def read_header(path):
    """({name: shape}, metadata) of a file that `write_tensors` wrote. Raises UserError for any other file."""
    with open_tensors(path) as f:
        shapes = {name: tuple(f.get_slice(name).get_shape()) for name in f.keys()}
        return shapes, json.loads((f.metadata() or {})["made_by"])

def read_tensors(path):
    """All tensors of a safetensors file."""
    with open_tensors(path) as f:
        return {name: f.get_tensor(name) for name in f.keys()}

def hash_of(*parts):
    """A short hash of texts, bytes, tensors and {name: tensor}."""
    sha = hashlib.sha256()
    for part in parts:
        if isinstance(part, torch.Tensor):
            part = part.cpu().contiguous().view(torch.uint8).numpy().tobytes()
        elif isinstance(part, dict):
            part = hash_of(*sorted(part), *[part[name] for name in sorted(part)])
        raw = part if isinstance(part, bytes) else str(part).encode(errors="surrogateescape")
        sha.update(len(raw).to_bytes(8, "big") + raw)      # with its length, so that ("ab", "c") is not ("a", "bc")
    return sha.hexdigest()[:16]

def fingerprint_of_file(path, block=2 ** 16):
    """A short hash of a file's size and of 16 blocks of its content, from its beginning to its end."""
    try:
        with open(path, "rb") as f:
            parts = [os.fstat(f.fileno()).st_size]
            for i in range(16):
                f.seek(max(0, parts[0] - block) * i // 15)
                parts.append(f.read(block))
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror})") from e
    return hash_of(*parts)

def fingerprint_of_weights(folder, prefix=""):
    """A short hash of a folder's configs, and of the name, type, shape and eight rows of each tensor whose name begins
    with `prefix`."""
    parts = [prefix]
    for file in visible(folder):
        if file.suffix in (".json", ".model"):
            parts += [file.name, file.read_bytes()]
        elif file.suffix == ".safetensors":
            with open_tensors(file) as f:
                for name in sorted(name for name in f.keys() if name.startswith(prefix)):
                    tensor = f.get_slice(name)
                    last = tensor.get_shape()[0] - 1
                    rows = [tensor[row:row + 1] for row in {last * i // 7 for i in range(8)}]
                    parts += [name, tensor.get_dtype(), tensor.get_shape(), *rows]
    return hash_of(*parts)
