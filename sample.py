"""Videos out: a picture and a sentence to an mp4, the offline negatives of a cache, a video of each picture of a bench.

    python sample.py --image first.png --prompt "a figure waves its left arm slowly" --out video.mp4
    python sample.py --data CACHE                                      (torchrun --nproc_per_node 8 sample.py … as well)
    python sample.py --bench BENCH --out videos/METHOD                 (torchrun as well)
"""
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Literal

from support import UserError, files, films, folders
from support.command import command, flag, generator, option, say, this_process
from support.lists import Clip, read_bench
from data import Records, clip_shape, is_made
from model import load_dit, load_text_encoder, load_vae
from realdpo import Condition, sample
import torch
from tqdm import tqdm

class Scenes:
    """Pictures and captions, encoded for the transformer, and the autoencoder that makes pixels of its latents.

    `prompts` are Clips whose file is a picture of any size. The text encoder, the largest network, is freed once the
    captions are encoded; the autoencoder stays. Raises UserError for a picture that cannot be read, before anything is
    loaded.
    """

    def __init__(self, prompts, options, device, dtype):
        self.prompts, self.options = prompts, options
        folder = folders.resolve(options.model, "transformer/config.json", "vae/config.json")
        frames, height, width = clip_shape(options, folder)
        self.latent_frames = (frames - 1) // 4 + 1
        pictures = {prompt.file: films.read_image(prompt.file, height, width) for prompt in prompts}
        encode_text = load_text_encoder(options.model, device, dtype)
        captions = {prompt.caption for prompt in prompts}
        self.texts = {text: encode_text([text]) for text in {"", *captions}}             # (1,L,D)
        del encode_text
        self.vae = load_vae(options.model, device, dtype)
        self.images = {}
        for file, picture in pictures.items():             # each file once, (1,C,1,H,W), though prompts may share it
            self.images[file] = self.vae.encode(picture[None].to(device), generator("image", options.seed))

    def sample(self, denoiser, prompt):
        """Latents (1,C,F,H,W) of a prompt's video, from noise that --seed and the prompt's name decide."""
        image = self.images[prompt.file]
        options = self.options
        shape = 1, image.shape[1], self.latent_frames, *image.shape[3:]
        noise = torch.randn(shape, generator=generator("video", options.seed, prompt.name))
        return sample(denoiser, noise.to(image.device), Condition(self.texts[prompt.caption], image),
                      steps=options.steps, guidance=options.guidance, solver=options.solver, uncond=self.texts[""],
                      progress=bool(options.image))

    def write(self, latents, file):
        """Decode the latents of a video and write it as an mp4. Raises UserError for numbers that are not finite."""
        options = self.options
        video = self.vae.to(latents.device).decode(latents)[0]
        if not video.isfinite().all():
            raise UserError(f"{file}: would hold numbers that are not finite; check the weights of {options.model}")
        films.write_video(file, films.to_uint8(video), options.fps)

def make_videos(options):
    """Make the video of --image, or those of --bench that are not there yet: this rank's share of them."""
    rank, world, device, dtype = this_process()
    if options.image:
        file = Path(options.out or "video.mp4")
        if file.suffix != ".mp4":
            raise UserError(f"--out {file}: expected a name that ends in .mp4")
        videos = {file: Clip("", Path(options.image), options.prompt, "--image")}
    else:
        folder = Path(options.out or "videos")
        prompts, bench = read_bench(options.bench)
        videos = {folder / f"{prompt.name}.mp4": prompt for prompt in prompts}
        files.claim(folder / "bench.json", videos, **bench_settings(options, bench),
                    transformer=folders.fingerprint_of(options.model, "transformer", "scheduler"))
        missing = [file for file in list(videos)[rank::world] if not file.exists()]
        videos = {file: videos[file] for file in missing}
    if not videos:
        return say("nothing is missing")
    scenes = Scenes(list(videos.values()), options, device, dtype)
    denoiser = load_dit(options.model, device, dtype, compile=options.compile)
    for file, prompt in tqdm(videos.items(), desc="videos", disable=rank > 0 or bool(options.image)):
        scenes.write(scenes.sample(denoiser, prompt), file)
    say(f"videos made: {len(videos)}, the last in {file}")

def bench_settings(options, bench):
    """All that decides how videos of a bench with this hash look, apart from the transformer."""
    settings = {name: getattr(options, name) for name in ("steps", "guidance", "solver", "frames", "fps", "seed")}
    others = folders.fingerprint_of(options.model, "vae", "text_encoder", "tokenizer")
    return settings | dict(bench=bench, others=others)

def negatives(options):
    """The offline stage: sample `lose` latents for those of this rank's records that have none yet, and store them as
    they leave the sampler, never decoded. Ranks never wait for each other."""
    rank, world, device, dtype = this_process()
    records = Records(options.data, negatives=False)
    folder = Path(options.data) / "lose"
    settings = {name: getattr(options, name) for name in ("negatives", "steps", "guidance", "solver", "seed")}
    made_by = files.claim(folder / "made_by.json", files.visible(folder, "*.safetensors"), **settings,
                          transformer=folders.fingerprint_of(options.model, "transformer", "scheduler"))
    todo = []
    for index, name in list(enumerate(records.names))[rank::world]:
        if not is_made(folder / f"{name}.safetensors", made_by=made_by, win=records.hashes[name]):
            todo.append((index, name))
    if todo:
        empty = records.empty_text()[None].to(device)
        denoiser = load_dit(options.model, device, dtype, compile=options.compile)
    for index, name in tqdm(todo, desc="sampling negatives", disable=rank > 0):
        record = records[index]
        cond = Condition(record["text"][None].to(device), record["image"][None].to(device))
        lose = []
        for k in range(options.negatives):
            noise = torch.randn(1, *record["win"].shape, generator=generator("negative", options.seed, name, k))
            lose.append(sample(denoiser, noise.to(device), cond, steps=options.steps, guidance=options.guidance,
                               solver=options.solver, uncond=empty, progress=False).bfloat16())
        lose = {"lose": torch.cat(lose)}                                                        # (N,C,F,H,W)
        files.write_tensors(folder / f"{name}.safetensors", lose, made_by=made_by, win=records.hashes[name],
                            hash=files.hash_of(lose))
    done = len(files.visible(folder, "*.safetensors"))           # other ranks may still be at work
    say(f"{done} of {len(records)} records have {options.negatives} negatives in {folder}; "
        f"next: python train.py --model {quote(options.model)} --data {quote(options.data)}")

@dataclass
class Options:
    """Generate videos: one, the negatives of a cache, or one of each picture of a bench."""
    model: str = option("", "model folder, hub id, run, checkpoint or tiny; default: 5B-I2V with a GPU, else tiny")
    out: str = option("", "the video, or the folder for those of a bench; default: video.mp4, videos")
    image: str = option("", "one video: its first frame, a picture of any size", "What to do")
    data: str = option("", "negatives: the cache of records to make them for")
    bench: str = option("", "a video of each picture in a folder of pictures with captions")
    prompt: str = option("", "what happens; may be empty", "Sampling")
    negatives: int = option(3, "generated videos per record (paper: 3)", least=1)
    steps: int = option(0, "evaluations of the transformer; default: 50 (release) with euler, 25 with multistep, "
                           "12 for --data", least=0)
    guidance: float = option(6.0, "scale of classifier-free guidance; 1: none (release: 6)")
    solver: Literal["euler", "multistep"] = option("", "default: multistep for --data, else euler (on CogVideoX: DDIM)")
    frames: int = option(0, "frames of the video, 8k + 1; default: the model's")
    fps: int = option(8, "frames a second of the video", least=1)
    seed: int = option(0, "seed of the noise")
    compile: bool = option(False, "compile the transformer's blocks: slow to start, then faster")

# The modes, and what each has no use for: an option that would be ignored is refused.
UNUSED = {"data": ("out", "prompt", "frames", "fps"), "image": ("negatives",), "bench": ("negatives", "prompt")}

def settle(options):
    """Fill in solver and steps where they are not given, and return the options."""
    # Multistep with 25 is as close to the exact path as Euler with 50, and negatives need not be close; single videos
    # keep the published sampler.
    options.solver = options.solver or ("multistep" if options.data else "euler")
    options.steps = options.steps or {"euler": 50, "multistep": 12 if options.data else 25}[options.solver]
    return options

def main(options):
    """Do what --image, --data or --bench asks for."""
    modes = [name for name in UNUSED if getattr(options, name)]
    if len(modes) != 1:
        raise UserError("give one of --data, --image and --bench")
    for name in UNUSED[modes[0]]:
        if getattr(options, name) != getattr(Options, name):
            raise UserError(f"{flag(name)} {getattr(options, name)}: has no effect with --{modes[0]}; leave it out")
    settle(options)
    if options.data:
        negatives(options)
    else:
        make_videos(options)

if __name__ == "__main__":
    command(main, Options, "sample")
