"""Model folders in the published layout (the tiny model, the hub's, a run, a checkpoint), their configs, and runs."""
import json, re, shutil
from dataclasses import asdict
from pathlib import Path
from shlex import quote
from typing import NamedTuple

from support import UserError
from support.files import (VERSION, check_same, fingerprint_of_weights, hash_of, open_tensors, read_json, visible,
                           write_json)
import huggingface_hub

ADAPTERS = "pytorch_lora_weights.safetensors"              # as diffusers calls them
TINY = Path(__file__).parent.parent / "assets" / "tiny"
HUB_MODEL = "zai-org/CogVideoX-5b-I2V"
# What diffusers assumes if a config does not say, where this code computes something else.
ASSUMED = dict(use_rotary_positional_embeddings=False, prediction_type="epsilon", rescale_betas_zero_snr=False)

def is_checkpoint(folder):
    """Whether a folder is a checkpoint of a training run."""
    return (folder / "checkpoint.json").is_file()

def folder_of(path):
    """The local folder of a model; for a checkpoint's `ref`, that of the checkpoint."""
    folder = TINY if str(path) == "tiny" else Path(path)
    return folder.parent if folder.name == "ref" and is_checkpoint(folder.parent) else folder

def checkpoints_of(run):
    """The whole checkpoints of a training run, oldest first. Whatever else lies there is passed over."""
    return sorted(folder for folder in Path(run).glob("checkpoints/step-*")
                  if re.fullmatch(r"step-\d{6}", folder.name) and is_checkpoint(folder))

def last_checkpoint(path):
    """The newest checkpoint of a training run that has not ended; None for any other model."""
    folder = folder_of(path)
    return None if (folder / "done").exists() else max(checkpoints_of(folder), default=None)

def base_of(path):
    """The model that a training run or checkpoint started from, by its base.json; `path` itself for any other."""
    note = (last_checkpoint(path) or folder_of(path)) / "base.json"
    return read_json(note)["model"] if note.is_file() else str(path)

def note_base(folder, path, adapters):
    """Write base.json into a folder of what was trained from the model `path`: which model has what it lacks, such as
    the autoencoder or, for adapters, their transformer."""
    whole = adapters and not find_transformer(path).base
    base = Path(path if whole else base_of(path))
    write_json(folder / "base.json", {"model": str(base.resolve() if base.is_dir() else base)})

def defaults_of(path, command):
    """The defaults that suit a model: {option: value} for a command, by its defaults.json or its base's, or {}."""
    file, base = folder_of(path) / "defaults.json", base_of(path)
    if file.is_file():
        return read_json(file).get(command, {})
    return {} if base == str(path) else defaults_of(base, command)

def resolve(path, *parts, named=""):
    """The local folder that holds the named parts of a model: its own, its base's, or the hub's, downloaded once."""
    folder, base = folder_of(path), base_of(path)
    if all((folder / part).exists() for part in parts):
        return folder
    if base != str(path):
        return resolve(base, *parts, named=f", which {folder}/base.json names")
    if not folder.is_dir():
        try:
            folder = Path(huggingface_hub.snapshot_download(base, allow_patterns=[part + "*" for part in parts]))
        except Exception as e:                             # the hub's client passes on what its own libraries raise
            cause = e
            while cause.__cause__ or cause.__context__:
                cause = cause.__cause__ or cause.__context__
            reason = " ".join(f"{type(cause).__name__}: {cause}".split())                # one line of it
            raise UserError(f"{base}{named}: no such model folder, and the hub did not give it ({reason:.200}); once "
                            "that is mended, the same command goes on") from e
    for part in parts:
        if not (folder / part).exists():
            raise UserError(f"{base}: {folder} has no {part}; copy it from the published model (no tokenizer.json)")
    return folder

class Stored(NamedTuple):
    """Where a network lies: in the .safetensors files of a folder, under names that begin so."""
    folder: Path
    prefix: str = ""
    base: str = ""                                         # of adapters: the fingerprint of what they belong to, or any

def find_transformer(path):
    """The Stored transformer of a model: that of a folder, of a checkpoint or its reference, or a run's adapters."""
    folder = last_checkpoint(path) or folder_of(path)
    if is_checkpoint(folder):
        prefix = "ref." if Path(path).name == "ref" else "model."
        return Stored(folder, prefix, read_json(folder / "checkpoint.json")["base"])
    if not (folder / ADAPTERS).is_file():
        return Stored(resolve(path, "transformer") / "transformer")
    with open_tensors(folder / ADAPTERS) as f:
        noted, names = f.metadata() or {}, " ".join(f.keys())
    config = json.loads(noted.get("lora_adapter_metadata", "{}"))
    if config.get("transformer.lora_alpha") != config.get("transformer.r") or "alpha" in names:
        raise UserError(f"{folder / ADAPTERS}: has an alpha that is not the rank; save it with lora_B · alpha / rank")
    return Stored(folder, "transformer.", noted.get("base", "any"))

def fingerprint_of(path, *parts):
    """A short hash of the named parts of a model."""
    prints = []
    for part in parts:
        stored = find_transformer(path) if part == "transformer" else Stored(resolve(path, part) / part)
        prints += [fingerprint_of_weights(stored.folder, stored.prefix), stored.base]
    return hash_of(*prints)

def read_config(folder, part, *class_names):
    """config.json of a part. Raises UserError for another class of network."""
    config = read_json(folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json"))
    name = config.get("_class_name") or (config.get("architectures") or ["no class"])[0]
    if name not in class_names:
        raise UserError(f"{config.file}: is of class {name}, expected {' or '.join(class_names)}")
    return config

def read_dit_config(path):
    """config.json of the transformer of a model folder or hub id."""
    return read_config(resolve(path, "transformer/config.json"), "transformer", "CogVideoXTransformer3DModel")

def refuse(config, **supported):
    """Raise UserError if a config, or what diffusers assumes for it, has anything but what is `supported`."""
    for key, value in supported.items():
        found = config.get(key, ASSUMED.get(key, value))
        if found != value:
            raise UserError(f"{config.file}: {key} is {found}, expected {value} as in CogVideoX-5B-I2V (not 2b or 1.5)")

# Options that may change when a run goes on: they decide where and how it runs, not what a step does.
MAY_CHANGE = {"data", "out", "save_every", "checkpointing", "graphs", "micro_batch", "compile", "eval_data", "bench",
              "dry_run"}
# What a run writes into --out. Where one of these is there without run.json, it is not a run's.
EXPORT = ("done", "transformer", "scheduler", ADAPTERS)
WRITTEN = (*EXPORT, "metrics.jsonl", "checkpoints", "videos/step-*", "base.json", "index.html")

def choose_checkpoint(out, resume):
    """(checkpoint, its step) to continue from: the last in --out, else --resume, else (None, 0)."""
    path = Path(resume)
    if resume and not is_checkpoint(path):
        there = [*checkpoints_of(path), *checkpoints_of(path.parent), *checkpoints_of(path.parent.parent)]
        names = ", ".join(map(str, there)) or "RUN/checkpoints/step-000200"
        raise UserError(f"--resume {resume}: is no checkpoint; expected a folder such as {names}")
    chosen = max(checkpoints_of(out), default=path if resume else None)
    return chosen, read_json(chosen / "checkpoint.json")["step"] if chosen else 0

def begin_run(options, records, steps, done, learning_rate, rank, about=None):
    """Note in RUN/run.json what a run is. One that is there must be the same; an option that it does not have counts as
    its default, and the number of steps may change while none of those `done` would have had another `learning_rate`.
    `about` is noted as well, and may differ. Returns whether nothing is left to do."""
    note, file = Path(options.out) / "run.json", Path(options.out) / "done"
    settings = {name: value for name, value in asdict(options).items() if name not in MAY_CHANGE}
    settings |= dict(version=VERSION, steps=steps, records=hash_of(records))
    if options.resume:
        settings["resume"] = str(Path(options.resume).resolve())
    if note.exists():
        saved = asdict(type(options)()) | read_json(note)
        if learning_rate(options, done - 1, saved["steps"]) == learning_rate(options, done - 1, steps):
            saved["steps"] = steps
        check_same(options.out, saved, settings)
    else:
        for pattern in WRITTEN:
            for path in visible(options.out, pattern):
                raise UserError(f"{path}: is there, and not of a run that could go on; choose another --out")
    ended = read_json(file)["steps"] if file.exists() else 0
    if done < ended < steps:
        raise UserError(f"{options.out}: has ended after {ended} steps, without a checkpoint; to train its model "
                        f"further: --model {quote(options.out)} and another --out")
    if rank == 0 and steps > ended:
        write_json(note, settings | (about or {}))
    return steps <= ended

def withdraw_export(out):
    """Take away what says that a run has ended, since it goes on."""
    for name in EXPORT:
        path = Path(out) / name
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)

def read_log(file):
    """The lines of a metrics.jsonl, as dicts. Of a run that is at work, or was killed, the last may be half written."""
    lines = file.read_text().splitlines() if file.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("}")]

def open_log(file, first):
    """Open metrics.jsonl for appending, without the lines of steps that will be done again."""
    write_json(file, *[row for row in read_log(file) if row["step"] < first])
    return open(file, "a")
