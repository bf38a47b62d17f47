"""The experiment: how far equal runs differ, what every method is worth at equal compute, and where which is better.

    python -m toy.experiment noise --out exp               runs that differ in nothing but their random numbers
    python -m toy.experiment comparison --out exp          every method, each at its own learning rate
    python -m toy.experiment budgets --out exp             a quarter to four times the compute, as exp/budget.svg
    python -m toy.experiment regimes --out exp             other real clips, another base

Each takes hours, goes on where it stopped, and prints its table once no score is missing. Processes with the same --out
share the work: start it once for each core, with OMP_NUM_THREADS=1.
"""
from dataclasses import dataclass
from pathlib import Path

from support import UserError
from support.command import command, option
import numpy as np

from toy.budget import Point, draw_budgets
from toy.laptop import label_of
from toy.runs import CHOOSING, FEW, RATES, Row, Run, Runs, training_options

# ---- The rows -------------------------------------------------------------------------------------------------------

REGIMES = ("12 clips", "one action", "another style", "nearly right")           # see regimes.py
TUNED = {"12 clips": 0, "one action": 3}                   # with own rates as well; the search begins so many RATES lower
BUDGETS = (0.25, 0.5, 1.0, 2.0, 4.0)
LOW = dict(t_draw="low")
RELEASE = dict(t_draw="release")
ANCHOR_ALONE = dict(beta=0.0, compare_every=1000)         # SFT, but with so large a loss that every gradient is clipped
HALF = dict(anchor=200.0)                                  # half the preference, for Adam hardly sees a loss's scale
PAPER = dict(anchor=0.0, lose_per_step=3)

BASE = Row("base", fixed=True, count=1)
SFT = (
    Row("sft release", dict(method="sft") | RELEASE, 2e-3, count=4),
    Row("sft uniform", dict(method="sft"), 2e-3, count=1),
    Row("sft low", dict(method="sft") | LOW, 2e-3, count=1),
    Row("sft release clipped", ANCHOR_ALONE | RELEASE, 2e-3, count=1),
)
REALDPO = (
    Row("realdpo 1 low", LOW, 1e-3, count=4),
    Row("realdpo 4 release half", dict(compare_every=4) | RELEASE | HALF, 2e-3, count=2),
    Row("realdpo 1 release half", RELEASE | HALF, 1e-3, count=1),
    Row("realdpo 4 release", dict(compare_every=4) | RELEASE, 2e-3, count=2),
    Row("realdpo 1 release", RELEASE, 1e-3, count=2),
    Row("realdpo 2 release half", dict(compare_every=2) | RELEASE | HALF, 2e-3, count=1),
    Row("realdpo 2 release", dict(compare_every=2) | RELEASE, 2e-3, count=2),
    Row("realdpo 4 low", dict(compare_every=4) | LOW, 2e-3, count=1),
    Row("realdpo 2 low", dict(compare_every=2) | LOW, 2e-3, count=2),
    Row("realdpo 1 low half", LOW | HALF, 1e-3, count=1),
    Row("realdpo 4 low half", dict(compare_every=4) | LOW | HALF, 2e-3, count=1),
    Row("realdpo 2 low half", dict(compare_every=2) | LOW | HALF, 2e-3, count=2),
)
OTHERS = (
    Row("paper", PAPER | dict(decay=0.0), 2e-5, count=1),
    Row("dpo", dict(method="dpo"), 5e-5, count=1),
    Row("rwr", dict(method="rwr"), 5e-4, count=1),
)
ROWS = {row.name: row for row in SFT + REALDPO + OTHERS}
NOISE = (
    Row("sft release decay 0", ROWS["sft release"].options | dict(decay=0.0), 1e-3, count=4),
    ROWS["sft release"],
    Row("realdpo 1 low decay 0", LOW | dict(decay=0.0), 5e-4, count=4),
    ROWS["realdpo 1 low"],
)


# ---- Statistics -----------------------------------------------------------------------------------------------------

MEASURES = ("limb_change", "jerkiness", "identity_loss", "action_match", "motion")
T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}                # Student's t at 97.5 %, by the number of bases
RESAMPLES = 10_000


def resampled_means(values, bases, rng):
    """Bootstrap means (RESAMPLES,) of `values` (B,N): those of `bases` (RESAMPLES,B), and of each N runs drawn anew."""
    runs = rng.integers(values.shape[1], size=(*bases.shape, values.shape[1]))
    return values[bases[..., None], runs].mean((1, 2))


def half_width(values, others=None):
    """Half the 95 % interval of the mean of `values` (B,N), of N runs on each of B bases; or, with `others` (B,M), of
    its difference to their mean.

    Both levels are drawn with replacement, bases and then runs of each, 10,000 times; the two sides of a difference
    have their bases in common. The spread of those means is multiplied by Student's t for so few bases: their
    percentiles would be too narrow.
    """
    rng = np.random.default_rng(0)
    bases = rng.integers(len(values), size=(RESAMPLES, len(values)))
    means = resampled_means(values, bases, rng)
    if others is not None:
        means = means - resampled_means(others, bases, rng)
    return T95[len(values)] * means.std()


def spreads(values):
    """Standard deviations of `values` (B,N): of a run within its base, and of the bases' true means."""
    within = values.var(axis=1, ddof=1).mean()
    between = max(0.0, values.mean(axis=1).var(ddof=1) - within / values.shape[1])
    return within ** 0.5, between ** 0.5


# ---- What is still to be done, and what came out --------------------------------------------------------------------

def runs_of(row, rate):
    """The runs of a row that go into the table, all at `rate`. Run 0 is not among them: it chooses rates and rows."""
    runs = []
    for number in range(1, row.count + 1):
        for base in row.bases:
            runs.append(Run(row, rate, base, number))
    return runs


def choosing(row, rate):
    """The runs of a row by whose validation figures its rate was chosen, and by which rows are chosen."""
    return [Run(row, rate, base, number) for base, number in CHOOSING]


def missing(runs, rows, splits=("held-out",)):
    """[(run, split)] still to be done: those that tell the rates of `rows`, then those that go into the table."""
    todo = []
    for row in rows:
        rate, searching = runs.search(row)
        todo += searching
        if rate is None:
            continue
        for split in splits:
            todo += runs.missing(runs_of(row, rate), split)
    return todo


def missing_choice(runs, rows):
    """[(run, split)] still to be done before `best_of`."""
    todo = []
    for row in rows:
        rate, searching = runs.search(row)
        todo += searching
        if rate is not None:
            todo += runs.missing(choosing(row, rate), "validation")
    return todo


def best_of(runs, rows):
    """The row with the lowest rvd on validation figures."""
    def validated(row):
        return np.mean([runs.mean(run, "validation") for run in choosing(row, runs.search(row)[0])])

    return min(rows, key=validated)


def champions(runs):
    """The best SFT, the best RealDPO, and the paper's loss."""
    return best_of(runs, SFT), best_of(runs, REALDPO), ROWS["paper"]


def budget_rows(runs, champion):
    """A row for each budget, each at its own rate. To save time, the largest budget and the paper's loss, which is far
    from both others, have the rate of 1 × and fewer bases."""
    rate, _ = runs.search(champion)
    rows = []
    for budget in BUDGETS:
        row = champion._replace(budget=budget, start=rate)
        if budget != 1:
            row = row._replace(name=f"{champion.name} x{budget:g}", count=2 if budget < 1 else 1)
        if budget == 4 or champion.name == "paper":
            row = row._replace(fixed=True)
        if row.fixed and budget != 1:
            row = row._replace(bases=FEW, count=1)
        rows.append(row)
    return rows


def base_row(regime):
    """The base of a regime, as it is."""
    return BASE._replace(name=f"base, {regime}", regime=regime)


def regime_rows(runs, regime):
    """A row for each champion, at its usual rate; in TUNED regimes then one for each at its own rate there."""
    rows = []
    for champion in champions(runs):
        rate, _ = runs.search(champion)
        name = f"{champion.name}, {regime}"
        rows.append(champion._replace(name=name, regime=regime, start=rate, fixed=True, count=1))
    if regime not in TUNED:
        return rows
    tuned = []
    for row in rows:
        lower = 0 if row.options == ROWS["paper"].options else TUNED[regime]
        start = RATES[RATES.index(row.start) - lower]
        tuned.append(row._replace(name=f"{row.name}, own rate", start=start, fixed=False))
    return rows + tuned


def values_of(runs, row, split="held-out", measure="rvd"):
    """Means over figures of a row's runs at its rate: (B,N), of N runs on each of B bases."""
    rate, _ = runs.search(row)
    values = [runs.mean(run, split, measure) for run in runs_of(row, rate)]
    return np.array(values).reshape(row.count, len(row.bases)).T


def label(row):
    """What a row is called in a table."""
    if row.options is None:
        return row.name
    options = training_options(row)
    words = [label_of(options)]
    if options.beta == 0:
        words = ["SFT, every gradient clipped"]
    elif options.compare_every > 1:
        words.append(f"compared every {options.compare_every} steps")
    if options.lose_per_step > 1:
        words.append("all three negatives")
    if options.anchor == HALF["anchor"]:
        words.append("half the preference")
    if options.t_draw == "release":
        words.append("the release's t")
    else:
        words.append("t below 0.6387" if options.t_draw == "low" else "all t")
    if options.decay == 0:
        words.append("constant rate")
    return ", ".join(words)


def plus_minus(values, others=None):
    """A mean, or a difference of means, with its interval."""
    mean = values.mean() - (0 if others is None else others.mean())
    return f"{mean:.2f} ± {half_width(values, others):.2f}"


# ---- The tables -----------------------------------------------------------------------------------------------------

def noise_table(runs):
    """How far runs of a row differ, with and without the rate's fall."""
    lines = ["| | decay | rate | rvd, validation figures | rvd, held-out figures | σ of a run | σ of a base |",
             "|---" * 7 + "|"]
    for row in NOISE:
        chosen, judged = values_of(runs, row, "validation"), values_of(runs, row)
        within, between = spreads(judged)
        lines.append(f"| {label(row)} | {training_options(row).decay:g} | {runs.search(row)[0]:g} | "
                     f"{chosen.mean():.3f} | {judged.mean():.3f} ± {half_width(judged):.3f} | {within:.3f} | "
                     f"{between:.3f} |")
    return "\n".join(lines)


def row_line(runs, row, compared):
    """A line of a table: a row's rvd, its difference to other rows, and its other measures."""
    rate, _ = runs.search(row)
    values = values_of(runs, row)
    cells = [label(row), f"{rate:g}" if rate else "–", str(len(row.bases) * row.count), plus_minus(values)]
    for other in compared:
        cells.append("" if other is row else plus_minus(values, values_of(runs, other)))
    for measure in MEASURES:
        cells.append(f"{values_of(runs, row, measure=measure).mean():.2f}")
    return "| " + " | ".join(cells) + " |"


def comparison_table(runs):
    """Every method at its own rate, beside the best SFT."""
    best = best_of(runs, SFT)
    lines = [f"| | rate | runs | rvd | difference to {label(best)} | " + " | ".join(MEASURES) + " |", "|---" * 10 + "|"]
    for row in (BASE, *SFT, *REALDPO, *OTHERS):
        lines.append(row_line(runs, row, [best]))
    return "\n".join(lines)


def budget_table(runs, file):
    """What the champions reach with every budget, as a table, and as a picture in `file`."""
    sft, *others = champions(runs)
    names = [label(row) for row in (sft, *others)]
    lines = ["| compute | " + " | ".join(names) + f" | {names[1]} − {names[0]} |", "|---" * 5 + "|"]
    points = {name: [] for name in names}
    rows = [budget_rows(runs, champion) for champion in (sft, *others)]
    for i, budget in enumerate(BUDGETS):
        values = []
        cells = []
        for name, of_budgets in zip(names, rows):
            rate, _ = runs.search(of_budgets[i])
            reached = values_of(runs, of_budgets[i])
            points[name].append(Point(budget, reached.mean(), half_width(reached)))
            cells.append(f"{plus_minus(reached)} at {rate:g}")
            values.append(reached)
        lines.append("| " + " | ".join([f"{budget:g}", *cells, plus_minus(values[1], values[0])]) + " |")
    draw_budgets(file, points, values_of(runs, BASE).mean(), "rvd after training (lower is better)")
    return "\n".join(lines)


def regime_table(runs):
    """What the champions reach with other real clips and from another base."""
    lines = ["| regime | | rate | runs | rvd | difference to the base | to SFT | " + " | ".join(MEASURES) + " |",
             "|---" * 12 + "|"]
    for regime in REGIMES:
        base = base_row(regime)
        rows = regime_rows(runs, regime)
        lines.append(f"| {regime} " + row_line(runs, base, [base, base]))
        for i, row in enumerate(rows):
            sft = rows[3 * (i // 3)]                       # at the usual rate, or at its own
            lines.append("| " + row_line(runs, row, [base, sft]))
    return "\n".join(lines)


# ---- The command ----------------------------------------------------------------------------------------------------

@dataclass
class Options:
    """Compare the methods on five bases, each pre-trained from a seed of its own."""
    part: str = option(help="noise, comparison, budgets or regimes")
    out: str = option("experiment", "folder for everything that is made")


def main(options):
    """Do what is missing of a part, then print its table."""
    if options.part not in ("noise", "comparison", "budgets", "regimes"):
        raise UserError(f"{options.part}: expected noise, comparison, budgets or regimes")
    runs = Runs(options.out)
    if options.part == "noise":
        runs.work(lambda: missing(runs, NOISE, ("held-out", "validation")))
        print(noise_table(runs))
        return
    runs.work(lambda: missing_choice(runs, SFT + REALDPO) + missing(runs, [BASE, ROWS["paper"]]))
    if options.part == "comparison":
        runs.work(lambda: missing(runs, SFT + REALDPO + OTHERS))
        print(comparison_table(runs))
    elif options.part == "budgets":
        rows = []
        for champion in champions(runs):
            rows += budget_rows(runs, champion)
        runs.work(lambda: missing(runs, rows))
        print(budget_table(runs, Path(options.out) / "budget.svg"))
    else:
        rows = []
        for regime in REGIMES:
            rows += [base_row(regime), *regime_rows(runs, regime)]
        runs.work(lambda: missing(runs, rows))
        print(regime_table(runs))


if __name__ == "__main__":
    command(main, Options, "toy.experiment")
