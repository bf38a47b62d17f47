"""The toy world: stick figures in motion, of which every right answer is known.

A figure of ten capsules faces the camera and moves as its caption says. The motion is exact (an action swings between
two key poses), so the first frame and the caption decide the whole clip up to a slight difference in pace, and a
generated clip can be judged without a learned judge (judge.py). Nothing in here is RealDPO.

Lengths are in canvas widths, x to the right and y down; time in seconds; angles in degrees.
Axes: F frames, H W pixels, K = 10 capsules, L = 4 limbs of two pieces.
"""
from pathlib import Path
from typing import NamedTuple

from support.files import whole_file
from support.films import read_video, to_uint8, write_video
import numpy as np
from tqdm import tqdm

# Figures that the base saw, that it is aligned with, that judge the result, that choose a learning rate, and that
# make a base better.
KINDS = ("corpus", "real", "held-out", "validation", "clean")
COUNTS = {"real": 48, "held-out": 16}

def world_of(seed, kind):
    """The seed of a toy world: no two kinds, and no two --seed, draw the same figures."""
    return 10 * seed + KINDS.index(kind)

FPS = 8
SPEEDS = {"slowly": 0.5, "quickly": 1.0}   # cycles a second: one or two cycles in 17 frames
JITTER = 0.05                              # a figure's own pace, within its speed class

# Limb order: left arm, right arm, left leg, right leg. The figure's left is the picture's right.
SIDE = np.array([1, -1, 1, -1])
ROOT = np.array([(0.60, 0.34), (0.40, 0.34), (0.555, 0.60), (0.445, 0.60)])   # shoulders, hips: they never move
PIECE = np.array([0.15, 0.15, 0.155, 0.155])                                  # length of upper = lower piece
BODY = np.array([((0.5, 0.16), (0.5, 0.19)), ((0.5, 0.35), (0.5, 0.58))])     # head, torso
RADIUS = np.array([0.075, 0.065] + [0.043] * 8, np.float32)

# (shoulder, elbow) or (hip, knee) of each limb at both ends of the swing. 0 hangs straight down, outward is
# positive, and the second angle bends on from the first.
ARM, LEG = (14, 8), (7, 0)                 # at rest
ACTIONS = {
    "waves its left arm": [((65, 20), ARM, LEG, LEG), ((115, 95), ARM, LEG, LEG)],
    "waves its right arm": [(ARM, (65, 20), LEG, LEG), (ARM, (115, 95), LEG, LEG)],
    "does jumping jacks": [(ARM, ARM, (4, 0), (4, 0)), ((140, 15), (140, 15), (30, 0), (30, 0))],
    "marches in place": [((16, 8), (40, 75), (55, -75), (4, 0)), ((40, 75), (16, 8), (4, 0), (55, -75))],
}

# One colour a capsule, on grey: a half-covered pixel lies between its colour and grey, and no other colour does.
# The halves of a limb differ in brightness too, for mp4 stores hue at half the resolution.
GREY = np.array([0.5, 0.5, 0.5], np.float32)
COLOURS = np.array([
    (1.0, 1.0, 1.0), (0.0, 0.0, 0.0),      # head white, torso black
    (0.8, 0.0, 0.0), (1.0, 0.9, 0.0),      # left arm red, yellow
    (0.0, 0.1, 0.9), (0.0, 1.0, 1.0),      # right arm blue, cyan
    (0.6, 0.0, 0.6), (1.0, 0.3, 0.8),      # left leg purple, pink
    (0.0, 0.6, 0.0), (0.4, 1.0, 0.2),      # right leg green, lime
], np.float32)

class Figure(NamedTuple):
    """Everything that decides a clip."""
    action: str
    speed: str
    hertz: float                           # its exact pace
    phase: float                           # where in the swing it starts, radians
    arm: float                             # length of its limbs, 1 = usual
    leg: float

    @property
    def caption(self):
        return f"a figure {self.action} {self.speed}"

def draw_figure(seed, index):
    """The figure `index` of the world `seed`. Phases of ±π/2 only, where the swing goes one way, so that the
    first frame tells the phase."""
    rng = np.random.default_rng([seed, index])
    action, speed = rng.choice(list(ACTIONS)).item(), rng.choice(list(SPEEDS)).item()
    pace, phase, arm, leg = rng.uniform((1 - JITTER, -np.pi / 2, 0.88, 0.88),
                                        (1 + JITTER, np.pi / 2, 1.12, 1.12)).tolist()
    return Figure(action, speed, SPEEDS[speed] * pace, phase, arm, leg)

def pose(figure, times):
    """The true motion at `times` (F,): joint angles (F,L,2) in degrees and limb lengths (F,L)."""
    low, high = np.array(ACTIONS[figure.action], float)
    swing = (1 + np.sin(figure.phase + 2 * np.pi * figure.hertz * times)) / 2
    angles = low + swing[:, None, None] * (high - low)                              # (F,L,2)
    lengths = PIECE * (figure.arm, figure.arm, figure.leg, figure.leg)
    return angles, np.broadcast_to(lengths, (len(times), 4))

def wrong_pose(figure, times, strength, rng):
    """What an imperfect world model does, more of it with `strength` 0–1: the pace is uneven, a joint
    drifts to a wrong angle, a limb grows or shrinks. Each comes on smoothly, and the first frame is right."""
    u = times / times[-1]
    onset = (1 - np.cos(np.pi * u)) / 2                                             # 0 → 1
    hurry = rng.choice([-0.14, 0.14]) * np.sin(2 * np.pi * u)                       # < 1 / 2π: time never runs back
    angles, lengths = pose(figure, times[-1] * (u + strength * hurry))
    limb, joint = rng.integers(4), rng.integers(2)
    angles[:, limb, joint] += strength * rng.choice([-80, 80]) * onset
    lengths = lengths.copy()
    lengths[:, rng.integers(4)] *= 1 + strength * rng.choice([-0.5, 0.35]) * onset
    return angles, lengths

def skeleton(angles, lengths):
    """Joint angles (F,L,2) and limb lengths (F,L) → both ends of every capsule, (F,K,2,2)."""
    turn = np.radians(np.cumsum(angles, axis=-1))                                   # each piece's own direction
    step = np.stack([SIDE[:, None] * np.sin(turn), np.cos(turn)], axis=-1)          # (F,L,2,2)
    reach = ROOT[:, None] + np.cumsum(step * lengths[..., None, None], axis=2)      # elbow, wrist
    reach = reach.clip(0.045, 0.955)                                                # only wrong poses reach the edge
    upper = np.stack([np.broadcast_to(ROOT, reach[:, :, 0].shape), reach[:, :, 0]], axis=2)
    limbs = np.stack([upper, reach], axis=2).reshape(-1, 8, 2, 2)                   # upper, lower of each limb
    return np.concatenate([np.broadcast_to(BODY, (len(limbs), 2, 2, 2)), limbs], axis=1)

def render(ends, size):
    """Capsules (F,K,2,2) → video (F,H,W,3) uint8, anti-aliased by each pixel's distance to the capsule."""
    start, end = ends.astype(np.float32).transpose(2, 3, 0, 1)[..., None, None]     # each (2,F,K,1,1)
    axis = end - start
    centre = (np.arange(size, dtype=np.float32) + 0.5) / size
    x, y = centre - start[0], centre[:, None] - start[1]                            # (F,K,1,W), (F,K,H,1)
    along = ((x * axis[0] + y * axis[1]) / (axis**2).sum(0)).clip(0, 1)             # (F,K,H,W)
    distance = np.hypot(x - along * axis[0], y - along * axis[1]) - RADIUS[:, None, None]
    cover = (0.5 - distance * size).clip(0, 1)[..., None]                           # (F,K,H,W,1)
    video = np.broadcast_to(GREY, (len(ends), size, size, 3))
    for k, colour in enumerate(COLOURS):                                            # lower pieces over upper ones
        video = video + cover[:, k] * (colour - video)
    return (video * 255).round().astype(np.uint8)

def toy_video(seed, index, frames=17, size=32, strength=0.0):
    """Clip `index` of the world `seed`, as (F,H,W,3) uint8, and its caption."""
    figure = draw_figure(seed, index)
    times = np.arange(frames) / FPS
    rng = np.random.default_rng([seed, index, 1])                                   # the same faults at every strength
    motion = wrong_pose(figure, times, strength, rng) if strength else pose(figure, times)
    return render(skeleton(*motion), size), figure.caption

def enlarge(video, times):
    """Every pixel of (F,H,W,3) `times` × `times`."""
    return video.repeat(times, axis=1).repeat(times, axis=2)

def write_toy_video(path, video):
    """A clip (F,H,W,3) uint8 as mp4, at twice its size: mp4 stores hue at half size, and so none is lost."""
    write_video(path, enlarge(video, 2), FPS)

def write_clip(path, video, caption):
    """NAME.mp4 beside NAME.txt. The mp4 takes its name last, so where there is one, both files are whole."""
    with whole_file(path.with_suffix(".txt")) as part:
        part.write_text(caption + "\n")
    write_toy_video(path, video)

def read_toy_video(path, frames=17, size=32):
    """A clip from an mp4 of any size: (F,H,W,3) uint8."""
    return to_uint8(read_video(path, frames, size, size, FPS))

def write_toy_videos(folder, count, seed, strength=0.0, frames=17, size=32):
    """`count` clips; each is corrupted by a strength between 0 and `strength`. What is there already is left alone."""
    for index in tqdm(range(count), desc="drawing clips", leave=False):
        path = Path(folder) / f"{index:05d}.mp4"
        if path.exists():
            continue
        own = strength * np.random.default_rng([seed, index, 2]).uniform()
        write_clip(path, *toy_video(seed, index, frames, size, own))
