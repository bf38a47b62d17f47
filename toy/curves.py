"""A training run as a picture: what its metrics.jsonl says, drawn as RUN/curves.svg.

    python -m toy.curves RUN
"""
import json
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from support import UserError
from support.command import command, option
from support.files import whole_file
from train import EVAL_T

COLOURS = ("#c33", "#36c", "#2a2", "#c80", "#90c")
LEFT, TOP, WIDTH, HEIGHT, STRIDE = 60, 40, 240, 150, 320   # of a panel, pixels

def read_metrics(run):
    """The lines of a run's metrics.jsonl, as dicts. Raises UserError if there are none."""
    file = Path(run) / "metrics.jsonl"
    if not file.is_file():
        raise UserError(f"{file}: no such file; give the --out folder of a training run")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    if not lines:
        raise UserError(f"{file}: is empty; the run has not made a step yet")
    return lines

def curve(lines, key, minus=None):
    """[(step, value)] of the lines that have this metric, minus another one if it is named."""
    points = []
    for line in lines:
        if minus is None and key in line:
            points.append((line["step"], line[key]))
        elif minus in line:
            points.append((line["step"], line[key] - line[minus]))
    return points

def running_mean(points, width=10):
    """Each value replaced by the mean of the last `width` up to it."""
    smooth = []
    for i, (step, _) in enumerate(points):
        values = [value for _, value in points[max(0, i - width + 1):i + 1]]
        smooth.append((step, sum(values) / len(values)))
    return smooth

def panels_of(lines):
    """{title: {label: points}} of everything that the run measured.

    The errors are drawn against the reference's, at the same t and noise: by themselves they mostly show which t was
    drawn.
    """
    if "ref_win" in lines[0]:
        win, lose = curve(lines, "win", "ref_win"), curve(lines, "lose", "ref_lose")
        panels = {
            "preference loss (log 2 = 0.69)": {"train": curve(lines, "preference"),
                                               "held out": curve(lines, "eval_preference")},
            "win − ref_win": {"step": win, "mean of 10": running_mean(win)},
            "lose − ref_lose": {"step": lose, "mean of 10": running_mean(lose)},
            "held-out win error, by t": {f"t = {t}": curve(lines, f"eval_win_t{t}") for t in EVAL_T},
            "held-out lose error, by t": {f"t = {t}": curve(lines, f"eval_lose_t{t}") for t in EVAL_T}}
    else:
        win = curve(lines, "win")
        panels = {"error": {"step": win, "mean of 10": running_mean(win)}}
    return {title: curves for title, curves in panels.items() if any(curves.values())}

def draw_panel(title, curves, left, last_step):
    """The SVG elements of one panel whose frame begins at x = `left`."""
    values = [value for _, value in chain(*curves.values())]
    low, high = min(values), max(values)
    elements = [f'<text x="{left}" y="20" font-weight="bold">{title}</text>',
                f'<rect x="{left}" y="{TOP}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#999"/>',
                f'<text x="{left - 5}" y="{TOP + 10}" text-anchor="end">{high:.3g}</text>',
                f'<text x="{left - 5}" y="{TOP + HEIGHT}" text-anchor="end">{low:.3g}</text>',
                f'<text x="{left + WIDTH}" y="{TOP + HEIGHT + 15}" text-anchor="end">step {last_step}</text>']

    def place(step, value):
        return (left + WIDTH * step / max(1, last_step),
                TOP + HEIGHT * (1 - (value - low) / ((high - low) or 1)))

    if low < 0 < high:
        y = place(0, 0)[1]
        elements.append(f'<line x1="{left}" x2="{left + WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="#999"/>')
    labelled = [(label, points) for label, points in curves.items() if points]
    for number, (label, points) in enumerate(labelled):
        faint = 'stroke-opacity="0.3" ' if label == "step" else ""
        path = " ".join("{:.1f},{:.1f}".format(*place(*point)) for point in points)
        elements.append(f'<polyline points="{path}" fill="none" {faint}stroke="{COLOURS[number]}"/>')
        elements.append(f'<text x="{left + 50 * number}" y="{TOP + HEIGHT + 32}" fill="{COLOURS[number]}">'
                        f'{label}</text>')
    return elements

def draw_curves(run):
    """Write RUN/curves.svg. Raises UserError for a folder without metrics."""
    lines = read_metrics(run)
    panels = panels_of(lines)
    elements = []
    for number, (title, curves) in enumerate(panels.items()):
        elements += draw_panel(title, curves, LEFT + STRIDE * number, lines[-1]["step"])
    with whole_file(Path(run) / "curves.svg") as part:
        part.write_text(f'<svg xmlns="http://www.w3.org/2000/svg" width="{STRIDE * len(panels)}" height="230" '
                        'font-family="sans-serif" font-size="11"><rect width="100%" height="100%" fill="white"/>\n'
                        + "\n".join(elements) + "\n</svg>\n", encoding="utf-8")

@dataclass
class Options:
    """Draw what the metrics of a training run say."""
    run: str = option(help="the --out folder of the run")

def main(options):
    """Draw RUN/curves.svg."""
    draw_curves(options.run)
    print(f"{options.run}/curves.svg")

if __name__ == "__main__":
    command(main, Options, "toy.curves")
