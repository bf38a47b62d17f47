"""Videos out: a picture and a sentence to an mp4, the offline negatives of a cache, a video of each picture of a bench.

    python sample.py --image first.png --prompt "a figure waves its left arm slowly" --out video.mp4
    python sample.py --data CACHE                                      (torchrun --nproc_per_node 8 sample.py … as well)
    python sample.py --bench BENCH --out videos/METHOD                 (torchrun as well)
"""
import hashlib, os, re
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Literal, NamedTuple

from data import (Clip, Records, claim, clip_shape, command, digest, generator, hash_of, is_made, option, read_image,
                  read_lines, read_list, say, this_process, to_uint8, write_tensors, write_video)
from model import UserError, find_transformer, load_dit, load_text_encoder, load_vae, resolve
from realdpo import Condition, sample
import torch
from tqdm import tqdm


# ---- One video after the other --------------------------------------------------------------------------------------

class Scenes:
    """Pictures and captions, encoded for the transformer, and the autoencoder that makes pixels of its latents.

    `prompts` are Clips whose file is a picture of any size. The text encoder, the largest network, is freed once the
    captions are encoded; the autoencoder stays. Raises UserError for a picture that cannot be read, before anything is
    loaded.
    """

    def __init__(self, prompts, options, device, dtype):
        self.prompts, self.options = prompts, options
        folder = resolve(options.model, "transformer/config.json", "vae/config.json")
        frames, height, width = clip_shape(options, folder)
        self.latent_frames = (frames - 1) // 4 + 1
        pictures = {prompt.file: read_image(prompt.file, height, width) for prompt in prompts}
        encode_text = load_text_encoder(options.model, device, dtype)
        captions = {prompt.caption for prompt in prompts}
        self.texts = {text: encode_text([text]) for text in {"", *captions}}             # (1,L,D)
        del encode_text
        self.vae = load_vae(options.model, device, dtype)
        self.images = {}
        for file, picture in pictures.items():             # each file once, (1,C,1,H,W), though prompts may share it
            self.images[file] = self.vae.encode(picture[None].to(device), generator("image", options.seed))

    def sample(self, denoiser, prompt, number=0):
        """Latents (1,C,F,H,W) of a prompt's video, from noise seeded by --seed, the prompt's name and `number`."""
        image = self.images[prompt.file]
        options = self.options
        shape = 1, image.shape[1], self.latent_frames, *image.shape[3:]
        noise = torch.randn(shape, generator=generator("video", options.seed, prompt.name, number, 0))
        return sample(denoiser, noise.to(image.device), Condition(self.texts[prompt.caption], image),
                      steps=options.steps, guidance=options.guidance, solver=options.solver, uncond=self.texts[""],
                      progress=bool(options.image))

    def write(self, latents, file):
        """Decode the latents of a video and write it as an mp4."""
        video = self.vae.to(latents.device).decode(latents)[0]
        write_video(file, to_uint8(video), self.options.fps)


DECODING = 7 * 2 ** 30                                     # bytes for decoding 49×480×720, computed


def make_videos(options):
    """Generate this rank's share of the videos that are not there yet."""
    rank, world, device, dtype = this_process()
    shots = [shot for shot in list_shots(options)[rank::world] if options.image or not shot.file.exists()]
    if not shots:
        return say("nothing is missing")
    scenes = Scenes([shot.prompt for shot in shots], options, device, dtype)
    denoiser = load_denoiser(options, device, dtype)
    for shot in tqdm(shots, desc="videos", disable=rank > 0 or bool(options.image)):
        latents = scenes.sample(denoiser.to(device), shot.prompt, shot.number)
        if free_memory(device) < DECODING:                 # such as on a card of 16 GB
            denoiser.cpu()
        scenes.write(latents, shot.file)
    say(f"videos made: {len(shots)}, the last in {shot.file}")


def load_denoiser(options, device, dtype):
    """The model's transformer, compiled with --compile."""
    denoiser = load_dit(options.model, device, dtype)
    if options.compile:
        denoiser.net.compile_blocks()
    return denoiser


def free_memory(device):
    """Bytes that are still free on a GPU; infinity on a CPU."""
    if device.type == "cpu":
        return float("inf")
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


# ---- The negatives of every record (Sec. 4.2) -----------------------------------------------------------------------

THREE_AT_ONCE = 12 * 2 ** 30                               # bytes; 10.7 for three 49×480×720 with guidance, computed


def negatives(options):
    """The offline stage: sample `lose` latents for those of this rank's records that have none yet, and store them as
    they leave the sampler, never decoded. Ranks never wait for each other."""
    rank, world, device, dtype = this_process()
    records = Records(options.data, negatives=False)
    lose_folder = Path(options.data) / "lose"
    made_by = {name: getattr(options, name) for name in ("negatives", "steps", "guidance", "solver", "seed")}
    made_by["transformer"] = digest(*find_transformer(options.model))
    claim(lose_folder / "made_by.json", made_by)
    todo = []
    for index, name in list(enumerate(records.names))[rank::world]:
        if not is_made(lose_folder / f"{name}.safetensors", dict(made_by, win=records.hashes[name])):
            todo.append((index, name))
    if todo:
        empty = records.empty_text()[None].to(device)
        denoiser = load_denoiser(options, device, dtype)
    at_once = options.negatives if free_memory(device) > THREE_AT_ONCE else 1
    for index, name in tqdm(todo, desc="sampling negatives", disable=rank > 0):
        record = records[index]
        noise = [torch.randn(record["win"].shape, generator=generator("negative", options.seed, name, k))
                 for k in range(options.negatives)]
        cond = Condition(record["text"][None].to(device), record["image"][None].to(device))
        lose = []
        for part in torch.stack(noise).to(device).split(at_once):
            lose.append(sample(denoiser, part, cond.repeat(len(part)), steps=options.steps, guidance=options.guidance,
                               solver=options.solver, uncond=empty, progress=False).bfloat16())
        lose = {"lose": torch.cat(lose)}                                                        # (N,C,F,H,W)
        write_tensors(lose_folder / f"{name}.safetensors", lose, model=options.model, win=records.hashes[name],
                      hash=hash_of(lose), **made_by)
    done = len(list(lose_folder.glob("*.safetensors")))    # other ranks may still be at work
    say(f"{done} of {len(records)} records have {options.negatives} negatives in {lose_folder}; "
        f"next: python train.py --model {quote(options.model)} --data {quote(options.data)}")


# ---- A bench: pictures with captions --------------------------------------------------------------------------------

class Shot(NamedTuple):
    """A video to be made."""
    file: Path                                             # where it is written
    prompt: Clip                                           # its picture and caption
    number: int                                            # among several of one picture


def hashed(value, *files):
    """A short hash of a value and of the contents of files."""
    contents = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    return hashlib.sha256(repr((value, contents)).encode()).hexdigest()[:16]


def read_bench(folder):
    """The Clips of a folder of pictures with captions, each with a unique name, and a hash of their names, captions and
    pictures. The folder has a text file that names its pictures and another with captions, or any other form that
    `data.read_list` knows. Raises UserError if it cannot be read."""
    if not folder:
        raise UserError("--bench is missing: the folder of pictures with captions that the videos are made of")
    pictures = "images.txt"
    captions = []
    for path in sorted(Path(folder).glob("*.txt")):
        if path.name in ("video.txt", "videos.txt"):       # the release has such a list as well
            continue
        if path.name == "images.txt" or any(os.path.isfile(Path(folder, line.strip())) for line in read_lines(path)):
            pictures = path.name
        else:
            captions.append(path.name)
    if len(captions) > 1:
        captions = [name for name in captions if name in ("prompt.txt", "prompts.txt")]
    clips, faults = read_list(folder, pictures, (captions or ["prompts.txt"])[0], what="picture")
    prompts = [clip._replace(name=str(clip.extra.get("name") or clip.file.stem)) for clip in clips]
    faults += [f"{prompt.where}: {prompt.file} is not there" for prompt in prompts if not prompt.file.is_file()]
    names = [prompt.name for prompt in prompts]
    for prompt in prompts:
        stem = re.sub(r"-\d+$", "", prompt.name)           # walk-12.mp4 might also be the 12th video of walk
        if names.count(prompt.name) > 1 or (stem != prompt.name and stem in names) or "/" in prompt.name:
            faults.append(f"{prompt.where}: is named {prompt.name}; expected a name of its own, without a slash")
    if faults:
        raise UserError(faults[0])
    texts = [(prompt.name, prompt.caption) for prompt in prompts]
    return prompts, hashed(texts, *[prompt.file for prompt in prompts])


def shots_of(prompts, folder, samples=0):
    """`samples` Shots of each prompt, as NAME-0.mp4 …, or one, as NAME.mp4."""
    shots = []
    for prompt in prompts:
        for number in range(samples or 1):
            # VBench removes a number at the end of a video's name to find its picture, so such a name gets another.
            ending = f"-{number}" if samples or re.search(r"-\d+$", prompt.name) else ""
            shots.append(Shot(folder / f"{prompt.name}{ending}.mp4", prompt, number))
    return shots


def list_shots(options):
    """The Shots of --image, or of --bench, whose settings are noted in bench.json. Raises UserError for an --out that
    is not an .mp4, or if bench.json holds other settings."""
    if options.image:
        out = Path(options.out or "video.mp4")
        if out.suffix != ".mp4":
            raise UserError(f"--out {out}: expected a name that ends in .mp4")
        return [Shot(out, Clip("", Path(options.image), options.prompt, "--image", {}), 0)]
    out = Path(options.out or "videos")
    prompts, bench = read_bench(options.bench)
    transformer = digest(*find_transformer(options.model))
    claim(out / "bench.json", bench_settings(options, bench) | dict(transformer=transformer))
    return shots_of(prompts, out, options.samples)


def bench_settings(options, bench):
    """The settings that decide how videos of a bench with this hash look, apart from the model."""
    names = "steps", "guidance", "solver", "frames", "height", "width", "fps", "seed"
    return {name: getattr(options, name) for name in names} | dict(bench=bench)


# ---- The command ----------------------------------------------------------------------------------------------------

@dataclass
class Options:
    """Generate videos: one, the negatives of a cache, or one of each picture of a bench."""
    model: str = option("", "model folder, hub id, run, checkpoint or tiny; default: 5B-I2V with a GPU, else tiny")
    out: str = option("", "the video, or the folder for those of a bench; default: video.mp4, videos")
    image: str = option("", "one video: its first frame, a picture of any size", "What to do")
    data: str = option("", "negatives: the cache of records to make them for")
    bench: str = option("", "a video of each picture in a folder of pictures with captions")
    prompt: str = option("", "what happens; may be empty", "Sampling")
    negatives: int = option(3, "generated videos per record (paper: 3)")
    samples: int = option(0, "videos per picture, as NAME-0.mp4 …; default: one, as NAME.mp4")
    steps: int = option(0, "evaluations of the transformer; default: 50 (release) with euler, 25 with multistep")
    guidance: float = option(6.0, "scale of classifier-free guidance; 1: none (release: 6)")
    solver: Literal["euler", "multistep"] = option("", "default: multistep for --data, else euler (on CogVideoX: DDIM)")
    frames: int = option(0, "of the video, 8k + 1; default: the model's")
    height: int = option(0, "of the video; default: the model's")
    width: int = option(0, "of the video; default: the model's")
    fps: int = option(8, "of the video")
    seed: int = option(0, "of the noise")
    compile: bool = option(False, "compile the transformer's blocks: slow to start, then faster")


def settle(options):
    """Fill in solver and steps where they are not given, and return the options. Raises UserError if one is out of
    range."""
    # Multistep is as close to the exact path in half the evaluations; single videos keep the published sampler.
    options.solver = options.solver or ("multistep" if options.data else "euler")
    options.steps = options.steps or {"euler": 50, "multistep": 25}[options.solver]
    if not 1 <= options.steps <= 1000 or options.negatives < 1 or options.samples < 0:
        raise UserError(f"--steps {options.steps} --negatives {options.negatives} --samples {options.samples}: "
                        "expected 1 to 1000 steps, at least 1 negative and 0 samples")
    return options


def main(options):
    """Do what --image, --data or --bench asks for."""
    given = [name for name in ("data", "image", "bench") if getattr(options, name)]
    if len(given) != 1:
        raise UserError("give one of --data, --image and --bench")
    settle(options)
    if options.data:
        negatives(options)
    else:
        make_videos(options)


if __name__ == "__main__":
    command(main, Options, "sample")
