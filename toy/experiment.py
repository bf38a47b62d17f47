"""The experiment: several bases, every method at several learning rates, one table.

    python -m toy.experiment --bases 5 --out DIR       hours; started again it goes on; processes may share the seeds
"""
import json
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import data
import model
import train
from data import Records, option, write_json
from model import UserError
from toy.judge import judge_all
from toy.laptop import generate_held_out, prepare
from toy.make_model import BASE_STEPS, make_base
from toy.world import COUNTS, world_of

# Row of the table: its options, and the learning rates among which the validation figures choose, as many for each.
# RATE is among all of them. An SFT step costs 3 passes of a video; a RealDPO step 4 · 3 of the policy and 4 of the
# reference, 16 in all.
RATE, LOW, HIGH = 3e-4, (1e-5, 5e-5, 3e-4), (1e-4, 3e-4, 1e-3)
TRIALS = {
    "SFT": (dict(method="sft"), HIGH),
    "RealDPO + anchor": (dict(), HIGH),
    "SFT, equal compute": (dict(method="sft", steps=533), HIGH),
    "RealDPO": (dict(anchor=0.0), LOW),
    "DPO": (dict(method="dpo", anchor=0.0), LOW),
    "RWR": (dict(method="rwr"), LOW),
}
SIZES = COUNTS | {"held-out": 64, "validation": 32}
T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)          # Student's t at 97.5 %, by degrees of freedom


def scores_of(run, folder, seed):
    """{split: {measure: [a number a figure]}} of the model in `run` on a seed's figures, kept in scores-SEED.json."""
    file = Path(run) / f"scores-{seed}.json"
    if not file.exists():
        denoiser, scores = model.load_dit(run), {}
        for split in ("validation", "held-out"):
            records = Records(folder / "cache" / split, negatives=False)
            scores[split] = judge_all(enumerate(generate_held_out(denoiser, run, records)), world_of(seed, split))
        write_json(file, scores)
    return json.loads(file.read_text())


class Table:
    """The Markdown table of `scores` {(row, learning rate, seed): `scores_of`}."""

    def __init__(self, scores):
        self.scores = scores
        self.seeds = sorted({seed for _, _, seed in scores})

    def means(self, row, lr, split, measure):
        """The mean over figures, a number a base."""
        return np.array([np.mean(self.scores[row, lr, seed][split][measure]) for seed in self.seeds])

    def best_rate(self, row):
        """The learning rate of the lowest rvd on the validation figures."""
        return min(TRIALS[row][1], key=lambda lr: self.means(row, lr, "validation", "rvd").mean())

    def interval(self, values):
        """The mean over bases and its 95 % interval."""
        if len(values) < 2:
            return f"{values.mean():.2f}"
        half = T95[len(values) - 2] * values.std(ddof=1) / len(values) ** 0.5
        return f"{values.mean():.2f} ± {half:.2f}"

    def line(self, row, lr, sft_rate):
        """One row: held-out measures, and the difference in rvd to the base and to SFT."""
        rvd = self.means(row, lr, "held-out", "rvd")
        cells = [row, f"{lr:g}" if lr else "–", self.interval(rvd)]
        for measure in ("limb_change", "jerkiness", "identity_loss", "action_match", "motion"):
            cells.append(f"{self.means(row, lr, 'held-out', measure).mean():.2f}")
        for other_row, other_lr in (("base", 0.0), ("SFT", sft_rate)):
            other = self.means(other_row, other_lr, "held-out", "rvd")
            cells.append(f"{(rvd < other).sum()}/{len(rvd)} ({self.interval(rvd - other)})")
        return "| " + " | ".join(cells) + " |"

    def markdown(self):
        """Every trial at the one rate that all share, then each at its own best."""
        lines = ["| | rate | rvd | limb_change | jerkiness | identity_loss | action_match | motion "
                 "| below base | below SFT |", "|---" * 10 + "|"]
        lines += [self.line(row, 0.0, RATE) for row in ("clean-trained", "base")]
        lines += [self.line(row, RATE, RATE) for row in TRIALS]
        lines += [self.line(row, self.best_rate(row), self.best_rate("SFT")) for row in TRIALS]
        return "\n".join(lines)


def own_base(folder, seed, steps, imperfect=True):
    """A model folder with a base of its own, and the shipped autoencoder and text encoder. Seed 0's base is the shipped
    one too: made in the same way. Raises UserError where there is one of another number of steps."""
    file, made_by = folder / "base.json", dict(model="tiny", fingerprint=dict(steps=steps))
    if file.exists():
        data.check_metadata(file, model.read_json(file), made_by)
    write_json(file, made_by)                              # for the parts it does not have, see model.resolve
    shipped = (seed, steps, imperfect) == (0, BASE_STEPS, True)
    if not shipped and not list(folder.glob("transformer/*.safetensors")):
        make_base(folder, steps, seed, imperfect)
    return str(folder)


@dataclass
class Options:
    """Compare the methods on several bases, each pre-trained from a seed of its own."""
    bases: int = option(5, "how many")
    out: str = option("experiment", "folder for everything that is made")
    seed: int = option(0, "of the first base")
    steps: int = option(BASE_STEPS, "of a base's pre-training")


def main(options):
    """For each seed a base of its own, and every trial on the same records, steps and noise; then the first seed's
    clean-trained model, which shows how much room there was, and the table. What is there already is kept; processes
    may share the work, each with its own seeds (`--seed`)."""
    if not 1 <= options.bases <= len(T95) + 1:
        raise UserError(f"--bases {options.bases}: expected 1 to {len(T95) + 1}")
    process, mesh = train.init_distributed()
    if process.world_size > 1:
        raise UserError("toy.experiment: run it as one process; share seeds out by --seed instead")
    scores, tiny = {}, model.defaults_of("tiny", "train")
    folders = {seed: Path(options.out) / f"seed-{seed}" for seed in range(options.seed, options.seed + options.bases)}
    for seed, folder in folders.items():
        base = own_base(folder / "base", seed, options.steps)
        records = prepare(folder, base, seed, SIZES, process.rank)
        scores["base", 0.0, seed] = scores_of(base, folder, seed)
        for row, (changes, rates) in TRIALS.items():
            for lr in rates:
                out = folder / f"{row}-{lr:g}"
                each = train.Options(**tiny | changes | dict(model=base, data=records, out=str(out), seed=seed, lr=lr))
                if not (out / "base.json").exists():
                    out.mkdir(exist_ok=True)
                    with open(out / "log.txt", "a") as log, redirect_stdout(log):
                        if not train.train(each, process, mesh):
                            return
                scores[row, lr, seed] = scores_of(out, folder, seed)
    ceiling = own_base(folders[options.seed] / "clean-trained", options.seed, options.steps, imperfect=False)
    for seed, folder in folders.items():
        scores["clean-trained", 0.0, seed] = scores_of(ceiling, folder, seed)
    print(Table(scores).markdown())
    print(f"\nheld-out figures, means over the bases; every run is in {options.out}/seed-*/")


if __name__ == "__main__":
    data.command(main, Options, "toy.experiment")
