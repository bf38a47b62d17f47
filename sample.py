"""Videos out: one picture and one sentence become an mp4; and every record of a cache gets its offline negatives.

    python sample.py --image first.png --prompt "a figure waves its left arm slowly" --out video.mp4
    python sample.py --data CACHE                                      (torchrun --nproc_per_node 8 sample.py … as well)

MODEL is a model folder, a hub id, or the --out folder of a training run. Text encoder, transformer and autoencoder are
never on the device together: 5B needs 11 GB for the largest of them and what its activations take.
"""
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from data import (Records, clip_shape, command, digest, generator, missing, option, read_image, this_process,
                  to_uint8, write_tensors, write_video)
from model import UserError, load_dit, load_text_encoder, load_vae, resolve
from realdpo import Condition, sample


@dataclass
class Options:
    """Generate one video (--image, --prompt) or the negatives of every record (--data)."""
    model: str = option("", "model folder, hub id, training run or tiny; default: by whether a GPU is here")
    image: str = option("", "the first frame, a picture of any size")
    prompt: str = option("", "what happens; may be empty")
    out: str = option("video.mp4", "where the video goes, .mp4")
    gif: bool = option(False, "also write a GIF beside the mp4")
    data: str = option("", "cache of records whose negatives to make")
    negatives: int = option(3, "generated videos a record")
    steps: int = option(50, "evaluations of the transformer")
    guidance: float = option(6.0, "1 = none")
    solver: Literal["euler", "multistep"] = option("euler", "euler (on CogVideoX: DDIM) or multistep")
    frames: int = option(0, "of the video, 8k + 1; default: the model's")
    height: int = option(0, "of the video; default: the model's")
    width: int = option(0, "of the video; default: the model's")
    fps: int = option(8, "of the video")
    seed: int = option(0, "of the noise")


def generate(denoiser, record, empty, options, device, *key, count=1, progress=True):
    """`count` latents (count,C,F,H,W) of a record's caption and first frame; noise k depends on (*key, k) alone."""
    shape = record["win"].shape
    noise = torch.stack([torch.randn(shape, generator=generator(*key, k)) for k in range(count)]).to(device)
    cond = Condition(record["text"][None].to(device), record["image"][None].to(device)).repeat(count)
    return sample(denoiser, noise, cond, steps=options.steps, guidance=options.guidance, uncond=empty[None].to(device),
                  solver=options.solver, progress=progress)


def negatives(options):
    """The offline stage of Sec. 4.2: `lose` latents for this rank's share of the records that have none yet.

    They are stored as they leave the sampler, never decoded. Ranks never wait for each other.
    """
    process = this_process()
    records = Records(options.data, negatives=False)
    folder = resolve(options.model, "transformer", "scheduler")
    made_by = dict(fingerprint=dict(
        transformer=digest(folder / "transformer"), negatives=options.negatives, steps=options.steps,
        guidance=options.guidance, solver=options.solver, seed=options.seed))
    todo = missing(dict.fromkeys(records.names[process.rank::process.world_size], made_by), Path(options.data) / "lose")
    if todo:
        denoiser, empty = load_dit(folder, process.device, process.dtype), records.empty_text()
    for name in tqdm(todo, desc="sampling negatives", disable=process.rank > 0):
        lose = generate(denoiser, records[records.names.index(name)], empty, options, process.device,
                        "negative", options.seed, name, count=options.negatives, progress=False)
        write_tensors(f"{options.data}/lose/{name}.safetensors", {"lose": lose.bfloat16()}, model=folder, **made_by)
    if process.rank == 0:
        print(f"{len(records)} × {options.negatives} negatives in {options.data}/lose; "
              f"next: python train.py --model {options.model} --data {options.data}")


def video_from(options):
    """One picture and one sentence to an mp4."""
    model, (_, _, device, dtype) = options.model, this_process()
    frames, height, width = clip_shape(options, resolve(model, "transformer/config.json", "vae/config.json"))
    image = read_image(options.image, height, width)                        # (3,1,H,W); fails before any network loads
    text, empty = load_text_encoder(model, device, dtype)([options.prompt, ""])
    image = load_vae(model, device, dtype).encode(image[None].to(device), generator("image", options.seed))[0]
    torch.cuda.empty_cache()
    denoiser = load_dit(model, device, dtype)
    win = torch.empty(image.shape[0], (frames - 1) // 4 + 1, *image.shape[2:], device="meta")   # only its shape is read
    latents = generate(denoiser, dict(text=text, image=image, win=win), empty, options, device, "video", options.seed)
    del denoiser
    torch.cuda.empty_cache()
    video = to_uint8(load_vae(model, device, dtype).decode(latents)[0])
    write_video(options.out, video, options.fps)
    if options.gif:
        write_video(Path(options.out).with_suffix(".gif"), video, options.fps)
    print(f"{frames} frames of {height}×{width} in {options.out}" + (" and .gif" if options.gif else ""))


def main(options):
    """Negatives with --data, else one video."""
    if bool(options.data) == bool(options.image):
        raise UserError("give either --data CACHE (negatives) or --image PICTURE and --prompt (one video)")
    if not 1 <= options.steps <= 1000 or options.negatives < 1:
        raise UserError(f"--steps {options.steps} --negatives {options.negatives}: expected 1 to 1000 steps "
                        "and at least 1 negative")
    if Path(options.out).suffix != ".mp4":
        raise UserError(f"--out {options.out}: expected a name that ends in .mp4")
    negatives(options) if options.data else video_from(options)


if __name__ == "__main__":
    command(main, Options, "sample")
