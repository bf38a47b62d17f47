"""Model folders in the published layout: the tiny model, the hub's, a training run, a checkpoint; and their configs."""
import json, re
from pathlib import Path

from support import UserError
from support.files import fingerprint_of_weights, hash_of, open_tensors, read_json
import huggingface_hub

ADAPTERS = "pytorch_lora_weights.safetensors"              # as diffusers calls them
TINY = Path(__file__).parent.parent / "assets" / "tiny"
HUB_MODEL = "zai-org/CogVideoX-5b-I2V"
# What diffusers assumes if a config does not say, where this code computes something else.
ASSUMED = dict(use_rotary_positional_embeddings=False, prediction_type="epsilon", rescale_betas_zero_snr=False)


# ---- Which folder a --model is --------------------------------------------------------------------------------------

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
    """(the model that a training run or checkpoint started from, the file that says so); others: (`path`, None)."""
    file = (last_checkpoint(path) or folder_of(path)) / "base.json"
    return (read_json(file)["model"], file) if file.is_file() else (str(path), None)


def defaults_of(path, command):
    """The option defaults that suit a model, from {command: {option: value}} in the defaults.json of its folder or of
    its base's. {} if there is none; the hub is never asked."""
    for folder in (folder_of(path), folder_of(base_of(path)[0])):
        if (folder / "defaults.json").is_file():
            return read_json(folder / "defaults.json").get(command, {})
    return {}


def resolve(path, *parts):
    """The local folder that holds the named parts of a model: its own, that of its base if it is a training run without
    them, or the hub's, downloaded once. Raises UserError, with the cause, if there is none or a part is missing."""
    base, named_by = base_of(path)
    own, folder = folder_of(path), folder_of(base)
    if all((own / part).exists() for part in parts):
        return own
    if not folder.is_dir():
        try:
            folder = Path(huggingface_hub.snapshot_download(base, allow_patterns=[part + "*" for part in parts]))
        except Exception as e:                             # the hub's client passes on what its own libraries raise
            cause = e
            while cause.__cause__ or cause.__context__:
                cause = cause.__cause__ or cause.__context__
            place = f"{named_by} names the base {base}" if named_by else base
            first, last = [str(each).strip().split("\n")[0] for each in (e, cause)]
            raise UserError(f"{place}: no such model folder, and the hub did not give such a model ({first}, caused by "
                            f"{type(cause).__name__}: {last}); once that is mended, the same command goes on") from e
    for part in parts:
        if not (folder / part).exists():
            raise UserError(f"{base}: {folder} has no {part}; a model folder holds transformer/ vae/ text_encoder/ "
                            "scheduler/ and tokenizer/spiece.model (not a tokenizer.json); a download that was cut off "
                            "can be continued online")
    return folder


def find_transformer(path):
    """(folder, prefix, base): what a model's transformer is stored as, in the folder's .safetensors files, under names
    that begin so. It may be that of a checkpoint, of its reference, or of a run that has not ended. If it is adapters,
    `base` is the fingerprint of the transformer that they belong to, else ""."""
    folder = last_checkpoint(path) or folder_of(path)
    if is_checkpoint(folder):
        prefix = "ref." if Path(path).name == "ref" else "model."
        return folder, prefix, read_json(folder / "checkpoint.json").get("base", "")
    if (folder / ADAPTERS).is_file():
        return folder, "transformer.", check_adapters(folder / ADAPTERS)
    return resolve(path, "transformer") / "transformer", "", ""


def check_adapters(file):
    """The fingerprint of the base that a file of adapters names, or "any". Raises UserError unless alpha is the rank."""
    with open_tensors(file) as f:
        noted = f.metadata() or {}
        config = json.loads(noted.get("lora_adapter_metadata", "{}"))
        if config.get("transformer.lora_alpha") != config.get("transformer.r") or any("alpha" in name for name in f.keys()):
            raise UserError(f"{file}: has an alpha that is not the rank; scale lora_B by alpha / rank and save it so")
    return noted.get("base", "any")


def fingerprint_of(path, *parts):
    """A short hash of the named parts of a model, which tells them from others."""
    prints = []
    for part in parts:
        if part == "transformer":
            folder, prefix, base = find_transformer(path)
            prints += [fingerprint_of_weights(folder, prefix), base]
        else:
            prints.append(fingerprint_of_weights(resolve(path, part) / part))
    return hash_of(*prints)


# ---- Configs --------------------------------------------------------------------------------------------------------

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
    """Raise UserError if a config asks for something that this code does not have, rather than compute something else.
    What it does not say is what diffusers assumes."""
    for key, value in supported.items():
        found = config.get(key, ASSUMED.get(key, value))
        if found != value:
            raise UserError(f"{config.file}: {key} is {found}, supported is {value}; this code knows CogVideoX-5B-I2V "
                            "(not 2b, text-to-video, or 1.5)")
