"""The experiment: how far equal runs differ, what every method is worth at equal compute, and where which is better.

    python -m toy.experiment noise --out exp               runs that differ in nothing but their random numbers
    python -m toy.experiment negatives --out exp           how many negatives, in how many evaluations
    python -m toy.experiment comparison --out exp          every method, each at its own learning rate
    python -m toy.experiment budgets --out exp             a quarter to four times the compute, as exp/budget.svg
    python -m toy.experiment regimes --out exp             other real clips, another base
    python -m toy.experiment adapters --out exp            adapters of low rank beside the whole network

Each takes hours, goes on where it stopped, and prints its tables once no score is missing. Processes with the same
--out share the work: start it once for each core, with OMP_NUM_THREADS=1.
"""
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from support import UserError
from support.command import command, option
import numpy as np

from toy.budget import Point, draw_budgets
from toy.laptop import label_of
from toy.runs import FEW, RATES, TEN, Row, Run, Runs, training_options

# ---- The rows -------------------------------------------------------------------------------------------------------

REGIMES = ("12 clips", "one action", "another style", "nearly right")           # see regimes.py
TUNED = {"12 clips": 0, "one action": 3}                   # with own rates as well, whose search begins so much lower
BUDGETS = (0.25, 0.5, 1.0, 2.0, 4.0)
RELEASE = dict(t_draw="release")
HALF = dict(anchor=200.0)                                  # half the preference, for Adam hardly sees a loss's scale

BASE = Row("base", fixed=True, count=1, bases=TEN)
SFT = Row("sft release", dict(method="sft") | RELEASE, 2e-3, count=4, bases=TEN)
DEFAULT = Row("realdpo 4 release half", dict(compare_every=4) | RELEASE | HALF, 2e-3, count=4, bases=TEN)
PAPER = Row("paper", dict(anchor=0.0, lose_per_step=3, decay=0.0), 2e-5, count=1)
# What validation figures choose among, the cheapest first.
CANDIDATES = (
    DEFAULT,
    Row("realdpo 4 release", dict(compare_every=4) | RELEASE, 1e-3),
    Row("realdpo 2 release half", dict(compare_every=2) | RELEASE | HALF, 2e-3),
    Row("realdpo 2 release", dict(compare_every=2) | RELEASE, 1e-3),
    Row("realdpo 1 release half", RELEASE | HALF, 2e-3),
    Row("realdpo 1 release", RELEASE, 1e-3),
)
OTHERS = (
    Row("sft uniform", dict(method="sft"), 2e-3, count=1),
    PAPER,
    Row("dpo", dict(method="dpo"), 5e-5, count=1),
    Row("rwr", dict(method="rwr"), 5e-4, count=1),
)
NOISE = (
    Row("sft release decay 0", SFT.options | dict(decay=0.0), 1e-3, count=4),
    SFT._replace(bases=TEN[:5]),
    Row("realdpo 4 release half decay 0", DEFAULT.options | dict(decay=0.0), 1e-3, count=4),
    DEFAULT._replace(bases=TEN[:5]),
)
ADAPTED = {"attention": ("attn1",), "attention, feed-forward": ("attn1", "ff")}
RANKS = (4, 16)
NEGATIVES = ("3 x 8", "1 x 4")                             # beside the usual 3 × 4


# ---- Statistics -----------------------------------------------------------------------------------------------------

MEASURES = ("limb_change", "jerkiness", "identity_loss", "action_match", "motion")
T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 10: 2.26}      # Student's t at 97.5 %, by the number of bases
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
    """The runs of a row that go into the table, all at `rate`. Run 0 is not among them: it chooses rates."""
    runs = []
    for number in range(1, row.count + 1):
        for base in row.bases:
            runs.append(Run(row, rate, base, number))
    return runs

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

def judged(row):
    """A row whose validation figures take part in a choice between rows: of two runs on each of four bases."""
    return row._replace(count=2, bases=TEN[:4])

def budget_rows(runs, row):
    """A row with each budget, each at its own rate. To save time, the largest budget and the paper's loss, which is far
    from the others, have the rate of 1 × and fewer bases."""
    rate, _ = runs.search(row)
    rows = []
    for budget in BUDGETS:
        count = 2 if budget < 1 else 1
        other = row._replace(name=f"{row.name} x{budget:g}", budget=budget, start=rate, count=count, bases=TEN[:5])
        if budget == 4 or row is PAPER:
            other = other._replace(fixed=True, bases=FEW, count=1)
        rows.append(row if budget == 1 else other)
    return rows

def base_row(regime):
    """The base of a regime, as it is."""
    return BASE._replace(name=f"base, {regime}", regime=regime, bases=TEN[:5])

def regime_rows(runs, regime):
    """SFT, the default and the paper's loss in a regime, at their usual rates; in TUNED regimes SFT and the default at
    their own rates there as well."""
    rows = []
    for row in (SFT, DEFAULT, PAPER):
        rate, _ = runs.search(row)
        rows.append(row._replace(name=f"{row.name}, {regime}", regime=regime, start=rate, fixed=True, count=1,
                                 bases=TEN[:5]))
    if regime in TUNED:
        for row in rows[:2]:
            start = RATES[RATES.index(row.start) - TUNED[regime]]
            rows.append(row._replace(name=f"{row.name}, own rate", start=start, fixed=False))
    return rows

def negatives_rows(runs):
    """The default with other negatives, at the rate that it has with the usual ones."""
    rate, _ = runs.search(DEFAULT)
    usual = DEFAULT._replace(bases=TEN[:5])
    others = [usual._replace(name=f"{DEFAULT.name}, {regime}", regime=regime, start=rate, fixed=True)
              for regime in NEGATIVES]
    return [usual, *others]

def adapter_rows(row):
    """{(layers, rank): a row with adapters there}, each at its own rate."""
    rows = {}
    for layers, names in ADAPTED.items():
        for rank in RANKS:
            name = f"{row.name}, {layers}, rank {rank}"
            rows[layers, rank] = row._replace(name=name, options=row.options | dict(rank=rank), start=5e-3, count=2,
                                              bases=TEN[:5], adapted=names)
    return rows

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
    if options.compare_every > 1:
        words.append(f"compared every {options.compare_every} steps")
    if options.lose_per_step > 1:
        words.append("all three negatives")
    if options.anchor == HALF["anchor"]:
        words.append("half the preference")
    if options.t_draw == "uniform":
        words.append("all t")
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
    for other in compared:                                 # on the bases that both have
        cells.append("" if other is row else plus_minus(values, values_of(runs, other._replace(bases=row.bases))))
    for measure in MEASURES:
        cells.append(f"{values_of(runs, row, measure=measure).mean():.2f}")
    return "| " + " | ".join(cells) + " |"

def comparison_table(runs):
    """Every method at its own rate, beside SFT."""
    lines = ["| | rate | runs | rvd | difference to SFT | " + " | ".join(MEASURES) + " |", "|---" * 10 + "|"]
    for row in (BASE, SFT, *CANDIDATES, *OTHERS):
        lines.append(row_line(runs, row, [SFT]))
    return "\n".join(lines)

def choice_table(runs):
    """What the candidates score on validation figures, beside the first of them, which is the cheapest: another is
    chosen only where the interval of the difference does not contain 0."""
    lines = ["| on validation figures | rvd | difference to the first |", "|---" * 3 + "|"]
    first = values_of(runs, judged(CANDIDATES[0]), "validation")
    for row in CANDIDATES:
        values = values_of(runs, judged(row), "validation")
        difference = "" if row is CANDIDATES[0] else plus_minus(values, first)
        lines.append(f"| {label(row)} | {plus_minus(values)} | {difference} |")
    return "\n".join(lines)

def negatives_table(runs):
    """The default with more and with fewer negatives and evaluations."""
    usual, *others = negatives_rows(runs)
    lines = ["| negatives × evaluations | runs | rvd | difference to 3 × 4 |", "|---" * 4 + "|"]
    for row in (usual, *others):
        values = values_of(runs, row)
        name = "3 × 4" if row is usual else row.regime.replace("x", "×")
        difference = "" if row is usual else plus_minus(values, values_of(runs, usual))
        lines.append(f"| {name} | {values.size} | {plus_minus(values)} | {difference} |")
    return "\n".join(lines)

def adapters_table(runs):
    """SFT and the default with adapters, beside the whole network."""
    lines = ["| | layers | rank | rate | rvd | difference to the whole network |", "|---" * 6 + "|"]
    for row in (SFT, DEFAULT):
        whole = values_of(runs, row._replace(bases=TEN[:5]))
        lines.append(f"| {label(row)} | all | – | {runs.search(row)[0]:g} | {plus_minus(whole)} | |")
        for (layers, rank), adapted in adapter_rows(row).items():
            values = values_of(runs, adapted)
            lines.append(f"| | {layers} | {rank} | {runs.search(adapted)[0]:g} | {plus_minus(values)} | "
                         f"{plus_minus(values, whole)} |")
    return "\n".join(lines)

def budget_table(runs, file):
    """What SFT, the default and the paper's loss reach with every budget, as a table, and as a picture in `file`."""
    names = [label(row) for row in (SFT, DEFAULT, PAPER)]
    lines = ["| compute | " + " | ".join(names) + " | the second − the first |", "|---" * 5 + "|"]
    points = {name: [] for name in names}
    rows = [budget_rows(runs, row) for row in (SFT, DEFAULT, PAPER)]
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
    """What they reach with other real clips and from another base."""
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
    """Compare the methods on bases that are pre-trained from a seed each."""
    part: str = option(help="noise, negatives, comparison, budgets, regimes or adapters")
    out: str = option("experiment", "folder for everything that is made")

def plan(runs, part):
    """[(run, split)] still to be done for a part."""
    if part == "noise":
        return missing(runs, NOISE, ("held-out", "validation"))
    todo = missing(runs, (BASE, SFT, DEFAULT, PAPER))
    if part == "negatives":
        todo += missing(runs, [] if todo else negatives_rows(runs))
    elif part == "comparison":
        todo += missing(runs, CANDIDATES + OTHERS) + missing(runs, map(judged, CANDIDATES), ["validation"])
    elif part == "budgets" and not todo:
        for row in (SFT, DEFAULT, PAPER):
            todo += missing(runs, budget_rows(runs, row))
    elif part == "adapters" and not todo:
        for row in (SFT, DEFAULT):
            todo += missing(runs, adapter_rows(row).values())
    elif part == "regimes" and not todo:
        for regime in REGIMES:
            todo += missing(runs, [base_row(regime), *regime_rows(runs, regime)])
    return todo

def main(options):
    """Do what is missing of a part, then print its tables."""
    tables = dict(noise=[noise_table], negatives=[negatives_table], comparison=[comparison_table, choice_table],
                  budgets=[partial(budget_table, file=Path(options.out) / "budget.svg")], regimes=[regime_table],
                  adapters=[adapters_table])
    if options.part not in tables:
        raise UserError(f"{options.part}: expected {', '.join(tables)}")
    runs = Runs(options.out)
    runs.work(partial(plan, runs, options.part))
    for table in tables[options.part]:
        print(table(runs))

if __name__ == "__main__":
    command(main, Options, "toy.experiment")
