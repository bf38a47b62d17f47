"""What `python train.py` does without arguments: RealDPO on the toy world, by the same road as real videos.

Toy mp4s are drawn, data.py and sample.py make records and negatives of them, train.py trains on those, once by SFT and
once by RealDPO, and figures that no run has seen show the difference.
"""
import dataclasses
from pathlib import Path

from support import UserError
from support.command import flag, flags, generator, say
from support.files import claim, whole_file, write_json
from support.films import to_uint8, write_video
from support.folders import defaults_of
import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import data
import model
import realdpo
import sample
from data import Records
from realdpo import Condition
from toy.judge import continuations, judge, judge_all, mean_line
from toy.world import (COUNTS, FPS, draw_figure, enlarge, read_toy_video, toy_video, world_of, write_toy_video,
                       write_toy_videos)

SHOWN = 4                                                             # figures in the picture
NEGATIVES = dict(solver="multistep", steps=4, guidance=1.0)           # a quarter of the tiny model's usual evaluations

def run_stage(module, **options):
    """One stage, and the command line that does the same."""
    say(f"\n$ python {module.__name__}.py {flags(options)}")
    module.main(module.Options(**options))

def score_negatives(cache, seed):
    """scores.json for toy records, as a reward model would write it: minus the distance to the nearest real video."""
    file = cache / "scores.json"
    newest = max(lose.stat().st_mtime for lose in (cache / "lose").iterdir())
    if file.exists() and file.stat().st_mtime >= newest:
        return
    records = Records(cache)
    vae = model.load_vae("tiny")
    scores = {}
    for i, name in enumerate(tqdm(records.names, desc="scoring negatives")):
        figure = draw_figure(world_of(seed, "real"), i)
        videos = [to_uint8(video) for video in vae.decode(records[i]["lose"].float())]
        reals = continuations(figure, *videos[0].shape[:2])
        scores[name] = [-judge(video, figure, reals)["rvd"] for video in videos]
    write_json(file, scores)

def prepare(out, name, seed, counts, rank, scores=True, **options):
    """Toy videos, records and negatives under `out`, made by the commands that a user calls; `options` are those of the
    negatives, where others than the usual. Returns the cache."""
    for kind, count in counts.items():
        if rank == 0:
            write_toy_videos(Path(out) / "videos" / kind, count, world_of(seed, kind))
        dist.barrier()
        run_stage(data, videos=f"{out}/videos/{kind}", model=name, out=f"{out}/cache/{kind}")
        dist.barrier()
    run_stage(sample, data=f"{out}/cache/real", model=name, **NEGATIVES | options)
    dist.barrier()
    if rank == 0 and scores:
        score_negatives(Path(out) / "cache" / "real", seed)
    dist.barrier()
    return f"{out}/cache/real"

def label_of(options):
    """The name of a run in pictures and tables; the paper's loss has no anchor."""
    name = {"realdpo": "RealDPO", "sft": "SFT", "dpo": "DPO", "rwr": "RWR"}[options.method]
    return f"{name} + anchor" if options.anchor and options.method == "realdpo" else name

def write_bench(folder, world):
    """First frames of the figures in the picture, with captions: what train.py --bench makes videos of."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(SHOWN):
        video, caption = toy_video(world, i)
        Image.fromarray(video[0]).save(folder / f"{i:05d}.png")
        (folder / f"{i:05d}.txt").write_text(caption + "\n")

def runs_to_compare(options):
    """The runs to compare: RealDPO, and supervised training on the same records, steps and noise at the same rate."""
    if options.method != "realdpo":
        return [options]
    sft = dataclasses.replace(options, method="sft", out=f"{options.out}/sft", save_every=options.steps)
    return [sft, options]

def generate_held_out(denoiser, path, records, batch=16):
    """Yield a denoiser's video (F,H,W,3) uint8 of each record, through the autoencoder of the model at `path`, from
    noise that depends on the record's number alone."""
    settings = defaults_of("tiny", "sample")
    vae = model.load_vae(path)
    uncond = records.empty_text()[None]
    for first in range(0, len(records), batch):
        numbers = range(first, min(first + batch, len(records)))
        rows = [records[i] for i in numbers]
        noise = torch.stack([torch.randn(rows[0]["win"].shape, generator=generator("held-out", i, 0)) for i in numbers])
        cond = Condition(torch.stack([row["text"] for row in rows]), torch.stack([row["image"] for row in rows]))
        for video in vae.decode(realdpo.sample(denoiser, noise, cond, uncond=uncond, progress=False, **settings)):
            yield to_uint8(video)

def title(labels, width, height=14):
    """A strip (height,width·len(labels),3) uint8 with each label centred over its column."""
    strip = Image.new("RGB", (width * len(labels), height), "white")
    draw, font = ImageDraw.Draw(strip), ImageFont.load_default(10)
    for i, label in enumerate(labels):
        draw.text((width * (i + 0.5), height / 2), label, fill="black", font=font, anchor="mm")
    return np.asarray(strip)

def side_by_side(columns, times=3):
    """A video with a row a figure: first frame, then each of `columns` {label: [video (F,H,W,3) a figure]}, the last of
    which is the real one. Every pixel `times` as wide and high, labels on top."""
    frames, size = columns["real"][0].shape[0], columns["real"][0].shape[2]
    rows = []                                              # a figure's videos beside each other
    for videos in zip(*columns.values()):
        first = videos[-1][:1].repeat(frames, axis=0)
        rows.append(np.concatenate([first, *videos], axis=2))
    grid = enlarge(np.concatenate(rows, axis=1), times)
    labels = title(["first frame", *columns], size * times)
    return np.concatenate([labels[None].repeat(frames, axis=0), grid], axis=1)

def compare_on_held_out(options, runs):
    """Held-out figures of the base and of `runs` (Options each): what they score."""
    records = Records(f"{options.out}/cache/held-out", negatives=False)
    out = Path(options.out)
    world = world_of(options.seed, "held-out")
    models = [("base", "base", "tiny"), *((label_of(each), each.method, each.out) for each in runs)]
    print(f"{len(records)} held-out figures (mean):")
    for name, folder, path in models:
        videos = list(generate_held_out(model.load_dit(path), path, records))
        print(f"  {name:16}  {mean_line(judge_all(enumerate(videos), world, out / 'continuations'))}")
        for i, video in enumerate(videos):
            write_toy_video(out / "held-out" / folder / f"{i:05d}.mp4", video)
    Image.fromarray(enlarge(toy_video(world, 0)[0][:1], 8)[0]).save(out / "first.png")
    print(f"side by side: {out}/held-out.gif and .mp4; one by one: {out}/held-out/; the run: {out}/index.html\n"
          f"try: python sample.py --model {out} --image {out}/first.png --prompt \"{draw_figure(world, 0).caption}\"")

def draw_progress(options, runs):
    """held-out.gif and .mp4: figures as the last run's model made them at its start, on the way and at its end, beside
    the other run's and the real ones. The videos are those that --bench asked for."""
    out = Path(options.out)
    columns = {}
    start, *on_the_way, end = sorted(out.glob("videos/step-??????"))
    columns["base"] = read_shown(start)
    for folder in on_the_way:
        step = int(folder.name.removeprefix("step-"))
        columns[f"step {step}"] = read_shown(folder)
    columns[label_of(runs[-1])] = read_shown(end)
    for other in runs[:-1]:
        columns[label_of(other)] = read_shown(max(Path(other.out).glob("videos/step-??????")))
    columns["real"] = [toy_video(world_of(options.seed, "held-out"), i)[0] for i in range(SHOWN)]
    video = side_by_side(columns)
    write_video(out / "held-out.mp4", video, FPS)
    first, *others = [Image.fromarray(frame) for frame in video]
    with whole_file(out / "held-out.gif") as part:
        first.save(part, "GIF", save_all=True, append_images=others, duration=1000 / FPS, loop=0)

def read_shown(folder):
    """The videos (F,H,W,3) of the bench in a folder."""
    return [read_toy_video(file) for file in sorted(folder.glob("*.mp4"))]

def run(options, process, train):
    """Make the records, train each run with `train(options) -> whether it is complete`, and show the results. Raises
    UserError for options that have no meaning here."""
    for name in ("bench", "resume", "eval_data"):
        if getattr(options, name):
            raise UserError(f"{flag(name)} {getattr(options, name)}: is for runs on records of your own; give --data")
    out = Path(options.out)
    if process.rank == 0:
        made = [out / name for name in ("videos", "cache", "bench", "sft", "held-out")]
        claim(out / "toy.json", made, seed=options.seed)
    scored = options.method in ("dpo", "rwr")
    options.data = prepare(options.out, "tiny", options.seed, COUNTS, process.rank, scored)
    options.bench = f"{options.out}/bench"
    if process.rank == 0:
        write_bench(Path(options.bench), world_of(options.seed, "held-out"))
    dist.barrier()
    runs = runs_to_compare(options)
    for each in runs:
        if not train(each):                                # asked to stop: the same command goes on from here
            return
    if process.rank == 0:
        compare_on_held_out(options, runs)
        draw_progress(options, runs)
