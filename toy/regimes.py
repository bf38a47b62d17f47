"""Where training starts and what it is shown: the usual base and real clips, and situations in which SFT may go wrong.

Whatever the regime, the figures that judge are the usual ones of the base's seed, drawn as its corpus was.
"""
import shutil
from pathlib import Path
from typing import NamedTuple

from support.files import check_same, read_json, write_json
import numpy as np
from PIL import Image

import data
import train
from toy.laptop import prepare, run_stage
from toy.make_model import BASE_STEPS, make_base
from toy.world import GREY, draw_figure, toy_video, world_of, write_clip, write_toy_videos

SIZES = {"real": 48, "held-out": 256, "validation": 128}   # clips of each kind
CLEAN = 256                                                # and of those that make a base nearly right

class Regime(NamedTuple):
    """A base and real clips."""
    count: int = SIZES["real"]                             # of real clips
    action: str = ""                                       # that all of them show; "": any
    restyled: bool = False                                 # their figures are smaller and darker than the corpus's
    further: int = 0                                       # steps of SFT that its base has had, on CLEAN other clips
    negatives: int = 3                                     # a record,
    evaluations: int = 4                                   # each in so many

REGIMES = {
    "usual": Regime(),
    "3 x 8": Regime(evaluations=8),
    "1 x 4": Regime(negatives=1),
    "12 clips": Regime(count=12),
    "one action": Regime(action="marches in place"),
    "another style": Regime(restyled=True),
    "nearly right": Regime(further=400),
}

def restyle(video):
    """(F,H,W,3) uint8 with everything three quarters as large, about the middle, and 0.6 times as bright."""
    size = video.shape[1]
    small = round(0.75 * size)
    edge = (size - small) // 2
    styled = np.broadcast_to((255 * GREY).round().astype(np.uint8), video.shape).copy()
    for number, frame in enumerate(video):
        shrunk = Image.fromarray(frame).resize((small, small), Image.Resampling.BOX)
        styled[number, edge:edge + small, edge:edge + small] = shrunk
    return (0.6 * styled).round().astype(np.uint8)

def write_real_clips(regime, folder, seed):
    """A regime's real clips as mp4s in `folder`."""
    world = world_of(seed, "real")
    index = 0
    written = 0
    while written < regime.count:
        if regime.action in draw_figure(world, index).caption:
            video, caption = toy_video(world, index)
            path = folder / f"{written:05d}.mp4"
            if not path.exists():
                write_clip(path, restyle(video) if regime.restyled else video, caption)
            written += 1
        index += 1

def own_base(folder, seed, steps=BASE_STEPS):
    """A model folder with its own base and the shipped autoencoder and text encoder. The shipped base was made in the
    same way, with seed 0. Raises UserError if the folder holds one of another number of steps."""
    file = folder / "base.json"
    made_by = dict(model="tiny", steps=steps)
    if file.exists():
        check_same(folder, read_json(file), made_by)
    write_json(file, made_by)                              # resolve finds the other parts by it
    shipped = (seed, steps) == (0, BASE_STEPS)
    if not shipped and not list(folder.glob("transformer/*.safetensors")):
        make_base(folder, steps, seed)
    return str(folder)

def improve(base, folder, seed, steps, processes):
    """The base after SFT on clean clips that no run is trained on. Returns its folder."""
    better, clips = folder / "base", folder / "videos" / "clean"
    if not (better / "done").exists():
        write_toy_videos(clips, CLEAN, world_of(seed, "clean"))
        run_stage(data, videos=str(clips), model=base, out=f"{folder}/cache/clean")
        options = train.Options(method="sft", model=base, data=f"{folder}/cache/clean", out=str(better), steps=steps,
                                lr=2e-3, t_draw="release", decay=0.5, micro_batch=8, checkpointing="none",
                                save_every=10 ** 9, seed=seed)
        if not train.train(options, *processes):
            raise KeyboardInterrupt
        shutil.rmtree(better / "checkpoints")
    return str(better)

def prepare_regime(name, out, seed, processes):
    """Make what is missing of a regime's base and records under `out`, the folder of a seed. Returns the folders of the
    model and of the records."""
    regime = REGIMES[name]
    folder = Path(out)
    if name != "usual":
        folder = folder / name
    base = own_base(Path(out) / "base", seed)
    if regime.further:
        base = improve(base, folder, seed, regime.further, processes)
    if not (folder / "prepared").exists():
        write_real_clips(regime, folder / "videos" / "real", seed)
        sizes = SIZES if name == "usual" else {"real": regime.count}
        prepare(folder, base, seed, sizes, rank=0, scores=name == "usual", negatives=regime.negatives,
                steps=regime.evaluations)
        (folder / "prepared").touch()
    return base, f"{folder}/cache/real"
