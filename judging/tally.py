"""What raters answered, as Table 1 of the paper.

    python -m judging.tally --answers answers/*.json --study STUDY
"""
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

from support import UserError
from support.command import command, generator, option
from support.files import read_json
import torch

DIMENSIONS = "visual alignment", "text alignment", "motion quality", "human quality", "overall quality"    # Table 1's

def draw_again(count, rng, draws=2000):
    """(draws, count): how often each of `count` is drawn where as many are drawn with replacement."""
    drawn = torch.randint(count, (draws, count), generator=rng)
    return torch.zeros(draws, count).double().scatter_add_(1, drawn, torch.ones(draws, count).double())

def print_table(title, rows, columns, values, sign=""):
    """Print a Markdown table of values (raters, rows, prompts, columns) from 0 to 1, nan if missing: means in per cent
    and, in brackets, their 95 % intervals by a bootstrap over raters and prompts."""
    rng = generator("bootstrap")
    raters, prompts = draw_again(values.shape[0], rng), draw_again(values.shape[2], rng)
    add_up = partial(torch.einsum, "dr,rmpc,dp->dmc")
    means = add_up(raters, values.nan_to_num(), prompts) / add_up(raters, values.isfinite().double(), prompts)
    low, high = 100 * means.nanquantile(torch.tensor([0.025, 0.975], dtype=values.dtype), dim=0)
    mean = 100 * values.nanmean(dim=(0, 2))                # (rows, columns)
    print(f"| {' | '.join([title, *columns])} |\n|{' --- |' * (len(columns) + 1)}")
    for r, row in enumerate(rows):
        cells = [f"{m:{sign}.2f} [{l:{sign}.1f}, {h:{sign}.1f}]" for m, l, h in zip(mean[r], low[r], high[r])]
        print(f"| {' | '.join([row, *cells])} |")
    print()

def print_differences(rows, columns, values):
    """Print how far each row lies above the first, as the mean of paired differences for the same rater and prompt."""
    if len(rows) > 1:
        print_table(f"minus {rows[0]}, points", rows[1:], columns, values[:, 1:] - values[:, :1], sign="+")

@dataclass
class Options:
    """Print the table of what raters answered."""
    answers: list = option((), "the files that the raters saved")
    study: str = option("study", "the folder that they were given")

def main(options):
    """Table 1 of the paper from raters' answers: ratings in per cent of the highest, and comparisons won."""
    key = read_json(Path(f"{Path(options.study)}-key.json"))
    raters = {}
    for file in options.answers:
        answers = read_json(Path(file))
        study, rater = answers["study"], str(answers["rater"])
        if study != key["study"]:
            raise UserError(f"{file}: answers study {study}, not {key['study']}; --study names the folder")
        if rater in raters:
            raise UserError(f"{file}: {rater} has answered in an earlier file, too; give one of the two")
        raters[rater] = [answers["ratings"].get(clip, []) for clip in chain(*key["clips"].values())]
        if not all(len(five) == len(DIMENSIONS) and {*five} <= {1, 2, 3, 4, 5} for five in raters[rater]):
            raise UserError(f"{file}: lacks five ratings from 1 to 5 of a video; let {rater} go on and save again")
    if not raters:
        raise UserError("--answers is missing: the files that the raters saved")
    methods = list(key["clips"])
    ratings = torch.tensor(list(raters.values())).double().view(len(raters), len(methods), -1, len(DIMENSIONS))
    within = ratings.var(dim=0, correction=0).mean(dim=(0, 1)) / (1 - 1 / len(raters))     # unbiased; nan of one rater
    agreement = 1 - within / ratings.var(dim=(0, 1, 2))                        # Krippendorff's alpha
    overall = ratings[..., -1:]                                                # (raters, methods, prompts, 1)
    won = ((overall - overall.transpose(1, 3)).sign() + 1) / 2                 # (raters, methods, prompts, methods)
    print_table("rating, % of the highest", methods, DIMENSIONS, ratings / 5)
    print_table("overall quality, % won against (ties half)", methods, methods, won)
    print_differences(methods, DIMENSIONS, ratings / 5)
    alphas = ", ".join(f"{name} {alpha:.2f}" for name, alpha in zip(DIMENSIONS, agreement))
    print(f"{len(raters)} raters, {ratings.shape[2]} prompts, 95 % intervals over both; Krippendorff's alpha: {alphas}")

if __name__ == "__main__":
    command(main, Options, "judging.tally")
