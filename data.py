"""Videos in: a folder of clips with captions becomes a cache of records, encoded once and trained on many times.

    python data.py --videos DIR --model MODEL --out CACHE              (torchrun --nproc_per_node 8 data.py … as well)

DIR holds NAME.mp4 beside NAME.txt; or metadata.jsonl / metadata.csv with file_name, text and, where a clip is not the
beginning of its film, start in seconds; or the authors' video.txt and prompt.txt, one line per clip. A clip is read as
a player shows it. A record is a safetensors file that holds all that training needs, in bf16:

    CACHE/win/NAME.safetensors     win (C,F,H,W)  image (C,1,H,W)  text (L,D)
    CACHE/lose/NAME.safetensors    lose (N,C,F,H,W) of that very win           written by sample.py
    CACHE/empty.safetensors        text (L,D), the embedding of "", for guidance

Files are written whole or not at all, so every stage can be killed and started again, and does what is missing. A
record whose clip, caption or first frame has changed is made again, and so are its negatives.
"""
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from shlex import quote

from support import UserError, files, films, folders
from support.command import command, generator, option, say, this_process
from support.lists import list_clips
from model import load_text_encoder, load_vae
import torch
from tqdm import tqdm

class Records:
    """The records of a cache as a sequence of dicts of tensors, checked to belong together.

    win (C,F,H,W), image (C,1,H,W), text (L,D); with `negatives`, also lose (N,C,F,H,W). Latents are scaled, bf16.
    With `scores`, also scores (N,) of the negatives, from CACHE/scores.json: {record: [one number per negative]}.
    Higher is better; any reward model can write that file.
    """

    def __init__(self, folder, negatives=True, scores=False):
        self.folder = Path(folder)
        self.names = [path.stem for path in files.visible(self.folder / "win", "*.safetensors")]
        if not self.names:
            raise UserError(f"{folder}: holds no records; make them with: python data.py --videos DIR --out "
                            f"{quote(str(folder))} and: python sample.py --data {quote(str(folder))}")
        self.hashes = {name: "" for name in self.names}    # of all tensors of a record
        self.shapes = {}                                   # {tensor: shape}, the same for all records
        self.settings = self.read_headers("win", {"win", "image", "text"})
        self.kinds = ["win"]
        if negatives:
            self.read_headers("lose", {"lose"})
            self.kinds.append("lose")
        self.scores = self.read_scores(self.shapes["lose"][0]) if scores else None

    def read_headers(self, kind, tensors):
        """Note the shapes and hashes of all files of a kind. Returns the settings that they were made with. Raises
        UserError for a file that is missing, of other settings or shapes, or negatives of another record."""
        folder = self.folder / kind
        remedy = f"make it with: python sample.py --data {quote(str(self.folder))}"
        for name in self.names:
            file = folder / f"{name}.safetensors"
            if not file.is_file():
                raise UserError(f"{file}: missing; {remedy}")
            settings = files.read_json(folder / "made_by.json")
            files.check_same(folder, settings, dict(version=files.VERSION))
            shapes, metadata = files.read_header(file)
            same = shapes == {tensor: self.shapes.setdefault(tensor, shapes.get(tensor)) for tensor in tensors}
            if metadata.get("made_by") != settings["id"] or not same:
                raise UserError(f"{file}: was made with other settings or shapes than the other records; delete it and "
                                "run the command that made it again")
            if metadata.get("win", self.hashes[name]) != self.hashes[name]:
                raise UserError(f"{file}: was made for another encoding of its clip; {remedy}")
            self.hashes[name] += metadata["hash"]
        return settings

    def read_scores(self, count):
        """Scores (records, count). Raises UserError unless the file has `count` finite numbers for each record."""
        file = self.folder / "scores.json"
        try:
            stored = files.read_json(file)
            scores = torch.stack([torch.tensor(stored[name]).float().reshape(count) for name in self.names])
            if not scores.isfinite().all():
                raise ValueError("a number is not finite")
        except (ValueError, TypeError, RuntimeError) as e:
            raise UserError(f"{file}: {e}; expected {{record: [{count} numbers]}}") from e
        for name, row in zip(self.names, scores.tolist()):
            self.hashes[name] += f" {row}"
        return scores

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index):
        return self.read(index)

    def read(self, index, negatives=True):
        """The tensors of a record, without its negatives where a step does not look at them."""
        record = {}
        for kind in self.kinds if negatives else ["win"]:
            record |= files.read_tensors(self.folder / kind / f"{self.names[index]}.safetensors")
        if self.scores is not None:
            record["scores"] = self.scores[index]
        return record

    def empty_text(self):
        """The embedding (L,D) of the empty caption, for guidance."""
        return files.read_tensors(self.folder / "empty.safetensors")["text"]

def clip_shape(options, folder):
    """(frames, height, width) of the clips: as many frames as asked for, else as the model was trained with."""
    c = folders.read_dit_config(folder)
    vae = folders.read_config(folder, "vae", "AutoencoderKLCogVideoX")
    space = 2 ** (len(vae["block_out_channels"]) - 1)
    frames = options.frames or c["sample_frames"]
    if frames < 1 or frames % 8 != 1:
        raise UserError(f"--frames {frames}: expected 8k + 1 frames (9, 17, … 49)")
    if c["use_learned_positional_embeddings"] and frames > c["sample_frames"]:
        raise UserError(f"--frames {frames}: this model's learned positions are for at most {c['sample_frames']}")
    return frames, c["sample_height"] * space, c["sample_width"] * space

def check_clip(clip, negatives, shape, fps):
    """Raise UserError if a clip is faulty, as far as its header tells, or has another number of negatives."""
    if len(clip.negatives) != negatives:
        raise UserError(f"{clip.file}: has {len(clip.negatives)} negatives in negative_samples/{clip.file.stem}, "
                        f"expected {negatives} as for other clips")
    for video in (clip.file, *clip.negatives):
        start = clip.start if video == clip.file else 0.0
        if films.read_video_header(video).seconds < start + (shape[0] - 1) / fps:
            films.read_video(video, *shape, fps, start)    # the header may be wrong: count the pictures

def read_clip(clip, shape, fps):
    """The pixels of a clip in [-1,1]: its video (3,F,H,W), first frame (3,1,H,W), and negatives, each (3,F,H,W)."""
    video = films.read_video(clip.file, *shape, fps, clip.start)
    image = films.read_image(clip.image, *shape[1:]) if clip.image else video[:, :1]
    return video, image, [films.read_video(file, *shape, fps) for file in clip.negatives]

def encode_clip(clip, pixels, vae, seed, device):
    """The tensors of one record, without the text, and those of its negatives, if the folder has them."""
    def encode(video, *key):
        return vae.encode(video[None].to(device), generator("posterior", seed, clip.name, *key))[0].bfloat16()

    video, image, negatives = pixels
    record = {"win": encode(video, "win"), "image": encode(image, "image")}    # the image alone: GroupNorm spans time
    return record, [encode(negative, "lose", k) for k, negative in enumerate(negatives)]

def is_made(file, **expected):
    """Whether a file of tensors exists and its header says what is expected."""
    return file.exists() and expected.items() <= files.read_header(file)[1].items()

@dataclass
class Options:
    """Encode a folder of videos with captions into records."""
    videos: str = option("", "folder of clips with captions")
    model: str = option("", "model folder, hub id or tiny; default: CogVideoX-5B-I2V with a GPU, else tiny")
    out: str = option("cache", "folder for the records")
    frames: int = option(0, "frames per clip, 8k + 1; default: the model's")
    fps: int = option(8, "frames a second the model works at", least=1)
    given_negatives: bool = option(False, "take negative_samples/ID/*.mp4 (a last resort: Sec. 4.2 keeps latents)")
    skip_bad: bool = option(False, "leave out unusable clips, with a list, instead of stopping")
    seed: int = option(0, "seed of the posterior samples")

def check_faults(faults, options):
    """Raise UserError for the first faulty clip, unless --skip-bad leaves such clips out."""
    if faults and not options.skip_bad:
        raise UserError(f"{faults[0]} (clips with a fault: {len(faults)}; --skip-bad leaves them out)")

def main(options):
    """Encode this rank's share of the clips. Ranks never wait for each other, and any number makes the same records."""
    if not options.videos:
        raise UserError("--videos is missing: the folder of clips with captions")
    rank, world, device, dtype = this_process()
    clips, faults = list_clips(options.videos, options.given_negatives)
    check_faults(faults, options)
    negatives = max((len(clip.negatives) for clip in clips), default=0)
    if options.given_negatives and not negatives:
        raise UserError(f"{options.videos}: has no videos in negative_samples/NAME/, which --given-negatives asks for")
    folder = folders.resolve(options.model, "transformer/config.json", "vae", "text_encoder", "tokenizer/spiece.model")
    frames, height, width = shape = clip_shape(options, folder)
    settings = dict(vae=folders.fingerprint_of(folder, "vae"), frames=frames, height=height, width=width,
                    text_encoder=folders.fingerprint_of(folder, "text_encoder", "tokenizer"), fps=options.fps,
                    seed=options.seed, given_negatives=options.given_negatives)
    win, lose = Path(options.out, "win"), Path(options.out, "lose")
    made_by = files.claim(win / "made_by.json", files.visible(win, "*.safetensors"), **settings)
    if negatives:
        files.claim(lose / "made_by.json", files.visible(lose, "*.safetensors"), **settings)

    def look(clip):
        """A hash of all that the record of a clip is made of, or None if that record is there."""
        sources = [clip.file, *filter(None, [clip.image]), *clip.negatives]
        prints = [files.fingerprint_of_file(file) for file in sources]
        identity = files.hash_of(made_by, clip.caption, clip.start, prints)
        name = f"{clip.name}.safetensors"
        if is_made(win / name, identity=identity) and (not negatives or (lose / name).exists()):
            return None
        check_clip(clip, negatives, shape, options.fps)
        return identity

    mine, faults = clips[rank::world], faults[rank::world]                 # every rank has read the whole list
    looked_at = tqdm(films.read_ahead(mine, look, faults), "checking clips", len(mine), disable=rank > 0)
    todo = {clip: identity for clip, identity in looked_at if identity}
    check_faults(faults, options)
    if todo or not (win.parent / "empty.safetensors").is_file():
        encode_text = load_text_encoder(folder, device, dtype)
        embeddings = {}                                    # {caption: (L,D), bf16}
        for text in tqdm({"", *(clip.caption for clip in todo)}, desc="encoding captions"):
            embeddings[text] = encode_text([text])[0].bfloat16().cpu()
        del encode_text                                    # T5 makes room for the autoencoder
        files.write_tensors(win.parent / "empty.safetensors", {"text": embeddings[""]})
    if todo:
        vae = load_vae(folder, device, dtype)
    decoded = films.read_ahead(todo, partial(read_clip, shape=shape, fps=options.fps), faults)
    for clip, pixels in tqdm(decoded, "encoding clips", len(todo), disable=rank > 0):
        record, given = encode_clip(clip, pixels, vae, options.seed, device)
        record["text"] = embeddings[clip.caption]
        name, made = f"{clip.name}.safetensors", files.hash_of(record)
        if given:
            given = {"lose": torch.stack(given)}
            files.write_tensors(lose / name, given, made_by=made_by, win=made, hash=files.hash_of(given))
        files.write_tensors(win / name, record, made_by=made_by, hash=made, identity=todo[clip], caption=clip.caption,
                            source=str(clip.file), start=clip.start)
    check_faults(faults, options)
    report(options, clips, faults, rank)

def report(options, clips, faults, rank):
    """Say what came of it: clips that were left out, records of clips that are not listed, and what comes next."""
    win, left_out = Path(options.out, "win"), Path(options.out, f"left_out_{rank}.txt")
    records = {path.stem for path in files.visible(win, "*.safetensors")}
    if faults and not records and len(faults) >= len(clips):
        raise UserError(f"{options.videos}: no clip is left, all have a fault, such as: {faults[0]}")
    left_out.unlink(missing_ok=True)                       # of an earlier run
    if faults:
        with files.whole_file(left_out) as part:
            part.write_text("\n".join(faults) + "\n", encoding="utf-8", errors="replace")
        print(f"{len(faults)} clips left out; {left_out} says why")
    others = records - {clip.name for clip in clips}
    if others:
        say(f"{win}: {len(others)} records are of clips that {options.videos} does not list, such as {min(others)}; "
            "training takes them too: delete them if that is not wanted")
    following = "train.py" if options.given_negatives else "sample.py"
    say(f"{len(records)} clips in {win}; next: python {following} --model {quote(options.model)} "
        f"--data {quote(options.out)}")

if __name__ == "__main__":
    command(main, Options, "data")
