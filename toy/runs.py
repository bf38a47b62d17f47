"""Training runs by the hundred: trained and judged by several processes at once, and kept as the scores they reached.

A run is a folder, and what it scored is a file in there. So work that was interrupted goes on, and processes with the
same folder share it: one that finds a run locked takes the next.
"""
import json, shutil, time
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import NamedTuple

from support import UserError
from support.budget import Work
from support.files import InUse, sole_owner, write_json
import numpy as np
import torch.distributed as dist

import model
import train
from data import Records
from toy.judge import judge_all
from toy.laptop import generate_held_out
from toy.regimes import prepare_regime
from toy.world import world_of

TEN = tuple(range(1, 11))                                  # seed 0's figures were looked at while all this was made
BASES = TEN[:5]
FEW = TEN[:3]                                              # where a table would take too long

class Row(NamedTuple):
    """A way to train, from any base and at any learning rate; or, without options, the base as it is."""
    name: str                                              # also that of its folders
    options: dict = None                                   # of train.py
    start: float = 0.0                                     # the rate at which the search for the best one begins,
    fixed: bool = False                                    # or the rate itself
    count: int = 2                                         # runs on each base that go into the table
    budget: float = 1.0                                    # its compute, in that of UNIT steps of SFT
    regime: str = "usual"                                  # its base and its real clips, see regimes.py
    bases: tuple = BASES                                   # that go into the table
    adapted: tuple = model.ADAPTED                         # the layers that have adapters, with --rank

class Run(NamedTuple):
    """One training run of a row."""
    row: Row
    rate: float
    base: int                                              # the seed of the base and of all figures
    number: int                                            # the runs of a base differ in order, noise and t

UNIT = 533                                                 # steps of SFT, the compute of 200 steps of RealDPO
COMMON = dict(micro_batch=8, checkpointing="none", graphs="all", save_every=10 ** 9, beta=500.0, anchor=100.0,
              t_draw="uniform", compare_every=1, lose_per_step=1, decay=0.5)   # where a row says nothing else
RATES = (1e-6, 2e-6, 5e-6, 1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2)
CHOOSING = ((1, 0), (2, 0))                        # base and number of the runs that choose a row's rate

def cost_of_a_step(options):
    """FLOP of a training step, on average over those with and those without a comparison."""
    return Work(options, layers=5, width=96, tokens=96).mean_flops()           # the tiny model's

def training_options(row):
    """train.Options of a row, with as many steps as its budget buys."""
    options = train.Options(**COMMON | row.options)
    sft = train.Options(**COMMON, method="sft")
    options.steps = round(row.budget * UNIT * cost_of_a_step(sft) / cost_of_a_step(options))
    return options

class Runs:
    """The runs under a folder `out`, done or still to be done."""

    def __init__(self, out):
        self.out = Path(out)
        self.known = {}
        self.processes = None

    def folder(self, run):
        """Where a run is kept."""
        return self.out / f"seed-{run.base}" / "runs" / run.row.name / f"{run.rate:g}-{run.number}"

    def scores(self, run, split):
        """{measure: [a number a figure]} of a run on its base's figures, or None if it has not been judged yet."""
        file = self.folder(run) / f"scores-{split}.json"
        if file not in self.known and file.exists():
            self.known[file] = json.loads(file.read_text())
        return self.known.get(file)

    def missing(self, runs, split):
        """[(run, split)] for each of `runs` that has not been judged yet."""
        return [(run, split) for run in runs if self.scores(run, split) is None]

    def mean(self, run, split, measure="rvd"):
        """The mean over figures of what a run scored."""
        return np.mean(self.scores(run, split)[measure])

    def search(self, row):
        """The learning rate at which a row has the lowest rvd on validation figures, found downhill from a first guess.
        Returns (rate or None, [(run, split)] still needed to tell). Raises UserError at an end of RATES."""
        if row.fixed:
            return row.start, []
        best = RATES.index(row.start)
        while 0 < best < len(RATES) - 1:
            rvd = []
            for rate in RATES[best - 1:best + 2]:
                runs = [Run(row, rate, base, number) for base, number in CHOOSING]
                missing = self.missing(runs, "validation")
                if missing:
                    return None, missing
                rvd.append(np.mean([self.mean(run, "validation") for run in runs]))
            step = int(np.argmin(rvd)) - 1
            if step == 0:
                return RATES[best], []
            best += step
        raise UserError(f"{row.name}: the best rate lies at an end of RATES; extend them")

    def train(self, run, base, cache):
        """Train a run. Raises KeyboardInterrupt if it was asked to stop."""
        folder = self.folder(run)
        options = training_options(run.row)
        options.model, options.data, options.out = base, cache, str(folder)
        options.lr, options.seed = run.rate, 10 * run.base + run.number
        model.ADAPTED = run.row.adapted
        with open(folder / "log.txt", "a") as log, redirect_stdout(log):
            complete = train.train(options, *self.processes)
        if not complete:
            raise KeyboardInterrupt
        shutil.rmtree(folder / "checkpoints")              # four times the model's size, and nothing reads them again

    def prepare(self, run):
        """The folders of the base and of the records that a run starts with, made if they are missing. Raises InUse
        while another process makes them."""
        seed_folder = self.out / f"seed-{run.base}"
        with sole_owner(seed_folder / "preparing" / run.row.regime):
            return prepare_regime(run.row.regime, seed_folder, run.base, self.processes)

    def judge(self, run, split, trained):
        """Judge the model in the folder `trained` by a base's figures, and keep what it scores as the run's."""
        seed_folder = self.out / f"seed-{run.base}"
        records = Records(seed_folder / "cache" / split, negatives=False)
        videos = enumerate(generate_held_out(model.load_dit(trained), trained, records))
        scores = judge_all(videos, world_of(run.base, split), seed_folder / "continuations")
        write_json(self.folder(run) / f"scores-{split}.json", scores)
        print(f"{time.strftime('%H:%M:%S')}  seed {run.base}, {run.row.name}, rate {run.rate:g}, run {run.number}: "
              f"rvd {self.mean(run, split):.3f} on {split} figures", flush=True)

    def do(self, run, split):
        """Train and judge a run, as far as that has not been done. Raises InUse if another process is doing it, or
        making what it needs."""
        folder = self.folder(run)
        with sole_owner(folder):
            if self.scores(run, split) is not None:
                return
            base, cache = self.prepare(run)
            trained = base if run.row.options is None else folder
            if trained == folder and not (folder / "done").exists():
                self.train(run, base, cache)
            self.judge(run, split, trained)

    def work(self, plan):
        """Do what `plan()` says is missing, [(run, split)], until nothing is."""
        while todo := plan():
            if self.processes is None:
                self.processes = train.init_distributed()
            for run, split in todo:
                with suppress(InUse):
                    self.do(run, split)
                    break                                  # then other runs may be missing
            else:
                time.sleep(5)                              # other processes do all that is missing
        if self.processes:
            dist.destroy_process_group()
            self.processes = None
