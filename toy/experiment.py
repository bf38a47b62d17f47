"""The experiment: several bases, every method at several learning rates, one table.

    python -m toy.experiment --bases 5 --seed 1 --out DIR          hours; started again it goes on
"""
import json
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

import data
import model
import sample
import train
from data import Records, option, write_json
from model import UserError
from toy.judge import judge_all
from toy.laptop import generate_held_out, prepare, run_stage
from toy.make_model import BASE_STEPS, make_base
from toy.world import world_of


class Trial(NamedTuple):
    """One row of the table."""
    options: dict                                          # of train.py
    compared: tuple = ()                                   # rows to give the difference to
    cache: str = "real"                                    # records: "euler" has negatives made in twice the time


# A step of SFT costs 3 passes of a video; one of RealDPO with n negatives 3 (1 + n) of the policy and 1 + n of the
# reference. So 100 steps with three negatives, 200 with one, and 533 of SFT are the same work.
LOW = "low"                                               # the low-noise half of the noise levels, as in the release
ONE_LOW = dict(lose_per_step=1, steps=200, t_draw=LOW)
TRIALS = {
    "SFT": Trial(dict(method="sft")),
    "SFT, low t": Trial(dict(method="sft", t_draw=LOW)),
    "SFT 533": Trial(dict(method="sft", steps=533)),
    "SFT 533, low t": Trial(dict(method="sft", steps=533, t_draw=LOW)),
    "SFT 533, velocity": Trial(dict(method="sft", steps=533, weighting="velocity")),
    "RealDPO": Trial(dict(anchor=0.0), ("SFT", "SFT 533")),
    "RealDPO + anchor": Trial(dict(), ("SFT", "SFT 533")),
    "RealDPO + anchor, low t": Trial(dict(t_draw=LOW), ("SFT, low t", "SFT 533, low t", "SFT 533")),
    "RealDPO + anchor, 1 of 3": Trial(dict(lose_per_step=1, steps=200), ("RealDPO + anchor", "SFT 533")),
    "RealDPO + anchor, 1 of 3, low t": Trial(ONE_LOW, ("RealDPO + anchor, low t", "SFT 533, low t", "SFT 533")),
    "the same, Euler negatives": Trial(ONE_LOW, ("RealDPO + anchor, 1 of 3, low t",), "euler"),
    "DPO": Trial(dict(method="dpo"), ("SFT",)),
    "RWR": Trial(dict(method="rwr"), ("SFT",)),
}
COMMON = dict(steps=100, t_draw="uniform", lose_per_step=0)       # where a row says nothing else
RATES = (1e-5, 2e-5, 5e-5, 2e-4, 5e-4, 1e-3, 2e-3)         # among which the first base's validation figures choose
SIZES = {"real": 48, "held-out": 256, "validation": 128}
T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)          # Student's t at 97.5 %, by degrees of freedom


def scores_of(run, folder, seed, split):
    """{measure: [a number a figure]} of the model in `run` on a seed's figures, kept in `run`."""
    file = Path(run) / f"scores-{split}-{seed}.json"
    if not file.exists():
        records = Records(folder / "cache" / split, negatives=False)
        videos = enumerate(generate_held_out(model.load_dit(run), run, records))
        write_json(file, judge_all(videos, world_of(seed, split), folder / "continuations"))
    return json.loads(file.read_text())


def own_base(folder, seed, steps, imperfect=True):
    """A model folder with a base of its own, and the shipped autoencoder and text encoder. Seed 0's base is the shipped
    one too: made in the same way. Raises UserError where there is one of another number of steps."""
    file, made_by = folder / "base.json", dict(model="tiny", steps=steps)
    if file.exists():
        data.check_metadata(file, model.read_json(file), made_by)
    write_json(file, made_by)                              # for the parts it does not have, see model.resolve
    shipped = (seed, steps, imperfect) == (0, BASE_STEPS, True)
    if not shipped and not list(folder.glob("transformer/*.safetensors")):
        make_base(folder, steps, seed, imperfect)
    return str(folder)


class Seed:
    """One base, the records made with it, and the runs that start from it."""

    def __init__(self, number, options, process, mesh):
        self.number, self.process, self.mesh = number, process, mesh
        self.folder = Path(options.out) / f"seed-{number}"
        self.base = own_base(self.folder / "base", number, options.steps)
        prepare(self.folder, self.base, number, SIZES, process.rank)
        videos, euler = f"{self.folder}/videos/real", f"{self.folder}/cache/euler"
        run_stage(data, process.rank, videos=videos, model=self.base, out=euler)
        run_stage(sample, process.rank, data=euler, model=self.base, **model.defaults_of("tiny", "sample"))

    def run(self, row, rate):
        """The folder of a trained row. Raises KeyboardInterrupt where training was asked to stop."""
        out = self.folder / f"{row}-{rate:g}"
        trial, options = TRIALS[row], model.defaults_of("tiny", "train") | COMMON
        options |= dict(model=self.base, data=f"{self.folder}/cache/{trial.cache}", seed=self.number, lr=rate)
        options = train.Options(out=str(out), **options | trial.options)
        if not (out / "base.json").exists():
            out.mkdir(exist_ok=True)
            with open(out / "log.txt", "a") as log, redirect_stdout(log):
                complete = train.train(options, self.process, self.mesh)
            if not complete:
                raise KeyboardInterrupt
        return out

    def scores(self, row, rate, split):
        """`scores_of` a row."""
        return scores_of(self.run(row, rate), self.folder, self.number, split)


def best_rate(row, seed):
    """The learning rate of the lowest rvd on a base's validation figures, downhill from 5e-4."""
    rvd, best = {}, RATES.index(5e-4)
    while True:
        for rate in RATES[max(0, best - 1):best + 2]:
            if rate not in rvd:
                rvd[rate] = np.mean(seed.scores(row, rate, "validation")["rvd"])
                print(f"{row}, rate {rate:g}: rvd {rvd[rate]:.3f} on validation figures")
        lowest = RATES.index(min(rvd, key=rvd.get))
        if lowest == best:
            return RATES[best]
        best = lowest


def interval(values):
    """The mean over bases and its 95 % interval."""
    if len(values) < 2:
        return f"{np.mean(values):.2f}"
    half = T95[len(values) - 2] * np.std(values, ddof=1) / len(values) ** 0.5
    return f"{np.mean(values):.2f} ± {half:.2f}"


def table(scores, rates):
    """Markdown of `scores` {row: [what `scores_of` says, a base each]}: the measures, and the difference in rvd to the
    rows that it is compared with."""
    rvd = {}
    for row, bases in scores.items():
        rvd[row] = np.array([np.mean(base["rvd"]) for base in bases])
    lines = ["| | rate | rvd | limb_change | jerkiness | identity_loss | action_match | motion | difference in rvd to |",
             "|---" * 9 + "|"]
    for row, bases in scores.items():
        cells = [row, f"{rates[row]:g}" if row in rates else "–", interval(rvd[row])]
        for measure in ("limb_change", "jerkiness", "identity_loss", "action_match", "motion"):
            cells.append(f"{np.mean([np.mean(base[measure]) for base in bases]):.2f}")
        compared = TRIALS[row].compared if row in TRIALS else ()
        cells.append("; ".join(f"{other}: {interval(rvd[row] - rvd[other])}" for other in compared))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


@dataclass
class Options:
    """Compare the methods on several bases, each pre-trained from a seed of its own."""
    bases: int = option(5, "how many")
    out: str = option("experiment", "folder for everything that is made")
    seed: int = option(0, "of the first base")
    steps: int = option(BASE_STEPS, "of a base's pre-training")


def main(options):
    """For each seed a base of its own, and every trial on the same records and noise, at the learning rate that the
    validation figures choose; then the first seed's clean-trained model, which shows how much room there was, and the
    table. What is there already is kept."""
    if not 1 <= options.bases <= len(T95) + 1:
        raise UserError(f"--bases {options.bases}: expected 1 to {len(T95) + 1}")
    process, mesh = train.init_distributed()
    if process.world_size > 1:
        raise UserError("toy.experiment: run it as one process")
    seeds = [Seed(number, options, process, mesh) for number in range(options.seed, options.seed + options.bases)]
    scores, rates = {}, {}
    ceiling = own_base(seeds[0].folder / "clean-trained", options.seed, options.steps, imperfect=False)
    scores["clean-trained"] = [scores_of(ceiling, seed.folder, seed.number, "held-out") for seed in seeds]
    scores["base"] = [scores_of(seed.base, seed.folder, seed.number, "held-out") for seed in seeds]
    for row in TRIALS:
        rates[row] = best_rate(row, seeds[0])
        scores[row] = [seed.scores(row, rates[row], "held-out") for seed in seeds]
    print(table(scores, rates))
    print(f"\nheld-out figures, means over the bases; every run is in {options.out}/seed-*/")


if __name__ == "__main__":
    data.command(main, Options, "toy.experiment")
