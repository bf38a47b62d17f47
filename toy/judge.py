"""What a toy video scores, without a learned judge: by the known motion of its figure and by joints read off colours.

    python -m toy.judge FOLDER             mp4s of any source, NUMBER.mp4 showing the held-out figure of that number
"""
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from support import UserError
from support.command import command, option
from support.files import read_tensors, write_tensors
from support.films import from_uint8, to_uint8
from support.folders import fingerprint_of
import numpy as np
import torch
from tqdm import tqdm

import model
from data import is_made
from toy.world import (ACTIONS, COLOURS, FPS, GREY, JITTER, ROOT, SPEEDS, draw_figure, pose, read_toy_video, render,
                       skeleton, world_of)

PACES = np.linspace(-1.4, 1.4, 15) * JITTER    # a fine grid over a speed class and slightly beyond
SOFTNESS = 0.03                                # of a colour match: squared RGB distance, small beside that of any two
HIDDEN = 0.05                                  # measured: how much the lower piece, painted over it, shortens the upper

def continuations(figure, frames, size):
    """What may really follow this figure's first frame: its action at every plausible pace, (N,F,H,W,3) uint8."""
    times = np.arange(frames) / FPS
    likely = [figure._replace(hertz=SPEEDS[figure.speed] * (1 + pace)) for pace in PACES]
    return np.stack([render(skeleton(*pose(real, times)), size) for real in likely])

def coded_continuations(world, number, frames, size, folder):
    """`continuations` of a world's figure after the tiny autoencoder, so that its blur is not counted against a model.
    They take much longer than the rest of judging, so they are kept in `folder`."""
    file = Path(folder) / f"{world}-{number:05d}.safetensors"
    made_by = dict(vae=fingerprint_of("tiny", "vae"), paces=len(PACES), frames=frames, size=size)
    if not is_made(file, **made_by):
        clips = [from_uint8(real) for real in continuations(draw_figure(world, number), frames, size)]
        vae = model.load_vae("tiny")
        coded = [torch.from_numpy(to_uint8(video)) for video in vae.decode(vae.encode(torch.stack(clips)))]
        write_tensors(file, {"videos": torch.stack(coded)}, **made_by)
    return read_tensors(file)["videos"].numpy()

def track(video):
    """Where the colour of each capsule is found: centre (F,K,2) and area (F,K) of its paint, in canvas units."""
    palette = np.concatenate([COLOURS, GREY[None]])
    distance = sum((video[..., c, None] / 255.0 - palette[:, c]) ** 2 for c in range(3))        # (F,H,W,K+1)
    match = np.exp(-distance / SOFTNESS)
    paint = (match / match.sum(axis=-1, keepdims=True))[..., :-1]                               # (F,H,W,K)
    area = paint.mean(axis=(1, 2))
    place = (np.arange(video.shape[1]) + 0.5) / video.shape[1] - 0.5
    moment = np.stack([place @ paint.mean(axis=1), place @ paint.mean(axis=2)], axis=-1) / len(place)
    return 0.5 + moment / (area[..., None] + 1e-6), area                # a colour that is nowhere: mid-canvas, not NaN

def limb_lengths(centre):
    """(F,L) from the centres of the paint: half way along the upper piece, which starts at a root that never moves,
    and half way along the lower piece, which starts where the upper one ends."""
    upper = 2 * (centre[:, 2::2] - ROOT)
    upper *= 1 + HIDDEN / (np.linalg.norm(upper, axis=-1, keepdims=True) + 1e-6)
    lower = 2 * (centre[:, 3::2] - ROOT - upper)
    return np.linalg.norm(upper, axis=-1) + np.linalg.norm(lower, axis=-1)

def change(centre, order):
    """Speed (order 1) or acceleration (2) of every limb piece, per frame: (F,K,2) → (F-order,8)."""
    return np.linalg.norm(np.diff(centre[:, 2:], order, axis=0), axis=-1)

def action_match(centre, figure):
    """1 if, of all actions and speeds, the caption's has the nearest motion, else 0."""
    times = np.arange(len(centre)) / FPS

    def error(rival):
        action, speed = rival
        truth = skeleton(*pose(figure._replace(action=action, hertz=SPEEDS[speed]), times)).mean(axis=2)
        return np.mean((centre - truth) ** 2)

    return float(min(product(ACTIONS, SPEEDS), key=error) == (figure.action, figure.speed))

def judge(video, figure, reals):
    """A video (F,H,W,3), 0–255, of a figure, beside its plausible continuations → the toy forms of the paper's
    measures. Bigger is worse, save for the last two. `motion` stands beside the others because a still picture fools
    all but `rvd`."""
    errors = [1000 * np.mean((video / 255.0 - real / 255.0) ** 2) for real in reals]
    rvd = min(errors)
    real = reals[np.argmin(errors)]
    (centre, area), (real_centre, real_area) = track(video), track(real)
    peak, real_peak = change(centre, 2).max(axis=0), change(real_centre, 2).max(axis=0)
    varies = lambda x: 100 * np.mean(limb_lengths(x).std(axis=0) / limb_lengths(x).mean(axis=0))
    return {
        "rvd": rvd,                                                                  # overall quality, MSE × 1000
        "limb_change": varies(centre) - varies(real_centre),                         # human quality, % beyond real
        "jerkiness": peak.mean() / real_peak.mean(),                                 # motion quality, 1 = real
        "identity_loss": 100 * np.abs(area - real_area).mean() / real_area.mean(),   # visual alignment, %
        "action_match": action_match(centre, figure),                                # text alignment, 0 or 1
        "motion": change(centre, 1).mean() / change(real_centre, 1).mean(),          # how much moves, 1 = real
    }

def judge_all(videos, world, folder):
    """{measure: [a number a video]} of (number of a world's figure, video of it) pairs. `folder` keeps what the videos
    are compared with."""
    scores = []
    for number, video in videos:
        reals = coded_continuations(world, number, *video.shape[:2], folder)
        scores.append(judge(video, draw_figure(world, number), reals))
    gathered = {}
    for measure in scores[0]:
        gathered[measure] = [score[measure] for score in scores]
    return gathered

def mean_line(scores):
    """The means of what `judge_all` found, in a line."""
    return "  ".join(f"{measure} {np.mean(values):.2f}" for measure, values in scores.items())

@dataclass
class Options:
    """Measure a folder of mp4s of the laptop run's held-out figures."""
    folder: str = option(help="holds 00000.mp4, 00001.mp4, …: each of the held-out figure of its number")
    seed: int = option(0, "of the run whose figures they are")

def main(options):
    """Print the mean of every measure."""
    files = sorted(Path(options.folder).glob("*.mp4"))
    if not files or not all(file.stem.isdecimal() for file in files):
        raise UserError(f"{options.folder}: expected a folder of 00000.mp4, 00001.mp4, …, "
                        "each of the held-out figure of its number")
    videos = ((int(file.stem), read_toy_video(file)) for file in tqdm(files, desc="judging"))
    scores = judge_all(videos, world_of(options.seed, "held-out"), Path(options.folder) / "continuations")
    print(f"{len(files)} videos (mean):  {mean_line(scores)}")

if __name__ == "__main__":
    command(main, Options, "toy.judge")
