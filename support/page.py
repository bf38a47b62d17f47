"""A training run as a page: RUN/index.html, with its curves, and the videos of its checkpoints side by side.

    python -m support.page RUN         writes it anew, and the curves alone as RUN/curves.svg
"""
import math
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template

from support import UserError
from support.command import command, option
from support.files import read_json, visible, whole_file
from support.folders import read_log

WIDTH, HEIGHT = 300, 190                                   # of a panel, pixels; three stand beside each other
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 40, 24                  # around its frame
POINTS = 150                                               # of a curve; longer ones are drawn as means
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b58900")      # Okabe and Ito's, which all can tell apart
STYLE = ("svg { font: 11px system-ui, sans-serif; fill: currentColor } .frame, .grid, .line { fill: none } "
         ".frame { stroke: #8889 } .grid { stroke: #8883 } .line { stroke-width: 1.5 }")
COLUMNS = 8                                                # of videos: the first, the last and six between
CLIP = 1.0                                                 # where train.py clips the gradient's norm


# ---- Curves ---------------------------------------------------------------------------------------------------------

def read_metrics(run):
    """The lines of a run's metrics.jsonl, as dicts. Raises UserError if there are none."""
    file = run / "metrics.jsonl"
    lines = read_log(file)
    if not lines:
        raise UserError(f"{file}: has no step yet; give the --out of a training run that has made some")
    return lines

def curve(lines, key, minus=None):
    """[(step, value)] of the lines that have this metric, minus another one if it is named, as at most POINTS means."""
    points = []
    for line in lines:
        if key in line and (minus is None or minus in line):
            points.append((line["step"], line[key] - line.get(minus, 0)))
    size = math.ceil(len(points) / POINTS) or 1
    means = []
    for first in range(0, len(points), size):
        steps, values = zip(*points[first:first + size])
        means.append((sum(steps) / len(steps), sum(values) / len(values)))
    return means

def panels_of(lines):
    """{title: {label: points}} of everything that a run has measured. Errors are drawn against the reference's at the
    same t and noise: by themselves they mostly show which t was drawn."""
    times = sorted({key.rpartition("_t")[2] for line in lines for key in line if key.startswith("eval_win_t")})
    norm = curve(lines, "grad_norm")
    panels = {
        "preference loss (log 2 = 0.69)": {"training": curve(lines, "preference"),
                                           "held out": curve(lines, "eval_preference")},
        "error − reference's": {"win": curve(lines, "win", "ref_win"), "lose": curve(lines, "lose", "ref_lose")},
        "margin z": {"training": curve(lines, "margin"), "held out": curve(lines, "eval_margin")},
        "accuracy (z > 0)": {"training": curve(lines, "accuracy"), "held out": curve(lines, "eval_accuracy")},
        "error on real videos": {"training": curve(lines, "win")},
        "held-out win error, by t": {f"t {t}": curve(lines, f"eval_win_t{t}") for t in times},
        "held-out lose error, by t": {f"t {t}": curve(lines, f"eval_lose_t{t}") for t in times},
        "gradient norm": {"norm": norm, f"clipped at {CLIP:g}": [(step, CLIP) for step, _ in norm]},
        "learning rate": {"rate": curve(lines, "lr")},
        "seconds a step": {"seconds": curve(lines, "seconds")}}
    return {title: curves for title, curves in panels.items() if any(curves.values())}

def ticks(low, high, most=5):
    """Round numbers from low to high, at most so many."""
    unit = 10 ** math.floor(math.log10((high - low) / most))
    step = next(unit * factor for factor in (1, 2, 5, 10) if (high - low) / (unit * factor) <= most)
    return [step * i for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]

def draw_panel(title, curves, last):
    """The SVG elements of a panel; `last` is the step at its right edge."""
    values = [value for points in curves.values() for _, value in points]
    low, high = min(values), max(values)
    room = 0.05 * (high - low) or abs(high) or 1
    low, high = low - room, high + room
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM

    def x(step):
        return LEFT + (right - LEFT) * step / last

    def y(value):
        return bottom - (bottom - TOP) * (value - low) / (high - low)

    parts = [f'<text x="{LEFT}" y="14" font-weight="bold">{title}</text>']
    for value in ticks(low, high):
        parts.append(f'<path class="grid" d="M{LEFT} {y(value):.1f}H{right}"/>'
                     f'<text x="{LEFT - 5}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.4g}</text>')
    for step in ticks(0, last, most=4):
        parts.append(f'<text x="{x(step):.1f}" y="{bottom + 15}" text-anchor="middle">{step:g}</text>')
    place = LEFT
    for number, (label, points) in enumerate(curves.items()):
        places = [f"{x(step):.1f} {y(value):.1f}" for step, value in points]
        if points:
            parts.append(f'<path class="line" stroke="{COLOURS[number]}" d="M{"L".join(places)}"/>'
                         f'<text x="{place}" y="30" fill="{COLOURS[number]}">{label}</text>')
        if len(points) == 1:                               # a line of one point would not be seen
            cx, cy = places[0].split()
            parts.append(f'<circle cx="{cx}" cy="{cy}" r="2" fill="{COLOURS[number]}"/>')
        place += 7 * len(label) + 8
    parts.append(f'<rect class="frame" x="{LEFT}" y="{TOP}" width="{right - LEFT}" height="{bottom - TOP}"/>')
    return "\n".join(parts)

def draw_curves(lines, columns=0):
    """The panels of a run, each an SVG; or, in so many columns, all of them in one."""
    last = lines[-1]["step"] + 1
    panels = [draw_panel(title, curves, last) for title, curves in panels_of(lines).items()]
    if not columns:
        return "\n".join(f'<svg viewBox="0 0 {WIDTH} {HEIGHT}">{panel}</svg>' for panel in panels)
    places = [f'<g transform="translate({i % columns * WIDTH} {i // columns * HEIGHT})">{panel}</g>'
              for i, panel in enumerate(panels)]
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="{columns * WIDTH}" '
            f'height="{math.ceil(len(panels) / columns) * HEIGHT}"><style>{STYLE} svg {{ color: #222 }}</style>'
            f'<rect width="100%" height="100%" fill="white"/>{"".join(places)}</svg>\n')


# ---- The page -------------------------------------------------------------------------------------------------------

def draw_previews(run):
    """A row of videos for each picture of the bench, a column for each of at most COLUMNS checkpoints."""
    folders = visible(run, "videos/step-*")
    if len(folders) > COLUMNS:
        folders = [folders[round(i * (len(folders) - 1) / (COLUMNS - 1))] for i in range(COLUMNS)]
    captions = read_json(run / "videos" / "bench.json")["captions"] if folders else {}
    rows = []
    for name, caption in captions.items():
        figures = []
        for folder in folders:
            if (folder / f"{name}.mp4").exists():
                source = escape(f"videos/{folder.name}/{name}.mp4")
                step = int(folder.name.removeprefix("step-"))
                figures.append(f'<figure><video muted playsinline src="{source}"></video>step {step}</figure>')
        rows.append(f'<p>{escape(caption)}</p><div class="videos">{"".join(figures)}</div>')
    return "\n".join(rows)

def write_page(run):
    """Write RUN/index.html. Raises UserError if the folder is no run that has made steps, or it cannot be written."""
    run = Path(run)
    saved, lines = read_json(run / "run.json"), read_metrics(run)
    done, steps = lines[-1]["step"] + 1, saved["steps"]
    recent = lines[-50:]
    hours = sum(line["seconds"] for line in recent) / len(recent) * (steps - done) / 3600
    facts = [f"{saved['method']} on {saved['model']}", saved["processes"], f"step {done} of {steps}",
             f"about {hours:.1f} h left" if done < steps else "all steps are done"]
    content = dict(title=escape(run.name), facts=escape(" · ".join(facts)), options=escape(saved["options"]),
                   style=STYLE, panels=draw_curves(lines), previews=draw_previews(run))
    template = Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    with whole_file(run / "index.html") as part:
        part.write_text(template.substitute(content), encoding="utf-8")

def update_page(run):
    """`write_page` while training goes on, which does not end for want of a page."""
    try:
        write_page(run)
    except UserError as e:
        print(f"no page: {e}")

@dataclass
class Options:
    """Write the page of a training run, and its curves as a picture."""
    run: str = option(help="the --out of a training run")

def main(options):
    """Write RUN/index.html and RUN/curves.svg."""
    write_page(options.run)
    with whole_file(Path(options.run) / "curves.svg") as part:
        part.write_text(draw_curves(read_metrics(Path(options.run)), columns=3), encoding="utf-8")
    print(f"{options.run}/index.html and {options.run}/curves.svg")

if __name__ == "__main__":
    command(main, Options, "support.page")
