"""What `python train.py` does without arguments: RealDPO on the toy world, by the same road as real videos.

Toy mp4s are drawn, data.py and sample.py make records and negatives of them, train.py trains on those, once by SFT and
once by RealDPO, and figures that no run has seen show the difference.
"""
import dataclasses, json
from pathlib import Path

import numpy as np
import torch.distributed as dist
from tqdm import tqdm

import data
import model
import sample
from data import Records, flag, whole_file
from toy.judge import judge, judge_all, mean_line
from toy.world import COUNTS, FPS, draw_figure, enlarge, toy_video, world_of, write_toy_video, write_toy_videos


def run_stage(module, rank, **options):
    """One stage, and the command line that does the same."""
    if rank == 0:
        print(f"\n$ python {module.__name__}.py " + " ".join(f"{flag(k)} {v}" for k, v in options.items()))
    module.main(module.Options(**options))


def score_negatives(cache, seed):
    """scores.json for toy records, as a reward model would write it: minus the distance to the nearest real video."""
    file, newest = cache / "scores.json", max(lose.stat().st_mtime for lose in (cache / "lose").iterdir())
    if file.exists() and file.stat().st_mtime >= newest:
        return
    records, vae = Records(cache), model.load_vae("tiny")
    scores = {name: [-judge(data.to_uint8(video), draw_figure(world_of(seed, "real"), i))["rvd"]
                     for video in vae.decode(records[i]["lose"].float())]
              for i, name in enumerate(tqdm(records.names, desc="scoring negatives"))}
    with whole_file(file) as part:
        part.write_text(json.dumps(scores))


def prepare(out, name, seed, counts, rank, scores=True):
    """Toy videos, records and negatives under `out`, made by the commands that a user would call. Returns the cache."""
    for kind, count in counts.items():
        if rank == 0:
            write_toy_videos(Path(out) / "videos" / kind, count, world_of(seed, kind))
        dist.barrier()
        run_stage(data, rank, videos=f"{out}/videos/{kind}", model=name, out=f"{out}/cache/{kind}")
        dist.barrier()
    run_stage(sample, rank, data=f"{out}/cache/real", model=name, **model.defaults_of("tiny", "sample"))
    if rank == 0 and scores:
        score_negatives(Path(out) / "cache" / "real", seed)
    dist.barrier()
    return f"{out}/cache/real"


def generate_held_out(denoiser, path, records, numbers):
    """Yield a denoiser's videos (F,H,W,3) uint8 of the records with these numbers, through the autoencoder of the
    model at `path`, from noise that depends on the number alone."""
    settings = sample.Options(**model.defaults_of("tiny", "sample"))
    vae, empty = model.load_vae(path), records.empty_text()
    for i in numbers:
        latents = sample.generate(denoiser, records[i], empty, settings, "cpu", "held-out", i, progress=False)
        yield data.to_uint8(vae.decode(latents)[0])


def runs_to_compare(options):
    """The runs to compare: RealDPO, and supervised training on the same records, steps and noise at the same rate."""
    sft = dataclasses.replace(options, method="sft", out=f"{options.out}/sft")
    return [sft, options] if options.method == "realdpo" else [options]


def compare_on_held_out(options, runs):
    """Held-out figures of the base and of `runs` (Options each), as a GIF and an mp4, and what the metrics say."""
    records, out = Records(f"{options.out}/cache/held-out", negatives=False), Path(options.out)
    world = world_of(options.seed, "held-out")
    columns = [("base", "tiny"), *((each.method, each.out) for each in runs)]
    videos = {name: list(generate_held_out(model.load_dit(path), path, records, range(len(records))))
              for name, path in tqdm(columns, desc="held-out figures")}
    print(f"{len(records)} held-out figures (mean):")
    for name, made in videos.items():
        print(f"  {name:7}  {mean_line(judge_all(enumerate(made), world))}")
        for i, video in enumerate(made):
            write_toy_video(out / "held-out" / name / f"{i:05d}.mp4", video)
    real = [toy_video(world, i)[0] for i in range(8)]
    rows = [np.concatenate([r[:1].repeat(len(r), axis=0), *made, r], axis=2)
            for r, *made in zip(real, *videos.values())]
    grid = enlarge(np.concatenate([np.concatenate(rows[:4], axis=1), np.concatenate(rows[4:], axis=1)], axis=2), 3)
    for file in (out / "held-out.gif", out / "held-out.mp4"):
        data.write_video(file, grid, FPS)
    print(f"first frame | {' | '.join(videos)} | real, two figures a row: {out}/held-out.gif and .mp4; "
          f"one by one: {out}/held-out/")


def run(options, process, train):
    """Make the records, train every run with `train(options) -> whether it is complete`, show what came out."""
    scored = options.method in ("dpo", "rwr")
    options.data = prepare(options.out, "tiny", options.seed, COUNTS, process.rank, scored)
    runs = runs_to_compare(options)
    for each in runs:
        if not train(each):                                # asked to stop: the same command goes on from here
            return
    if process.rank == 0:
        compare_on_held_out(options, runs)
