"""What each method reaches with how much compute, as a picture with intervals."""
import math
from html import escape
from itertools import chain
from typing import NamedTuple

from support.files import whole_file

# Okabe and Ito's colours, which the colour-blind can tell apart; each method also has its own mark.
COLOURS = ("#0072b2", "#d55e00", "#555555")
MARKS = ("circle", "square", "triangle")
LEFT, TOP, WIDTH, HEIGHT = 60, 40, 430, 300                # of the frame, pixels
APART = 5                                                  # between the marks of two methods, pixels

class Point(NamedTuple):
    """What a method reaches with a budget."""
    budget: float                                          # 1: the compute of 533 SFT steps
    mean: float
    half: float                                            # half the interval's width

class Scale(NamedTuple):
    """A logarithmic axis."""
    low: float
    high: float
    start: float                                           # pixel of `low`
    end: float

    def place(self, value):
        return self.start + (self.end - self.start) * math.log(value / self.low) / math.log(self.high / self.low)

def mark(shape, x, y, colour):
    """The SVG element of a method's mark."""
    if shape == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>'
    if shape == "square":
        return f'<rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8" fill="{colour}"/>'
    corners = f"{x:.1f},{y - 5:.1f} {x - 5:.1f},{y + 4:.1f} {x + 5:.1f},{y + 4:.1f}"
    return f'<polygon points="{corners}" fill="{colour}"/>'

def draw_axes(x, y, budgets, ticks):
    """The SVG elements of frame, ticks and names."""
    bottom = TOP + HEIGHT
    elements = [f'<rect x="{LEFT}" y="{TOP}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#999"/>']
    for budget in budgets:
        at = x.place(budget)
        name = {0.25: "¼", 0.5: "½"}.get(budget, f"{budget:g}")
        elements.append(f'<text x="{at:.1f}" y="{bottom + 18}" text-anchor="middle">{name} ×</text>')
    for tick in ticks:
        at = y.place(tick)
        elements.append(f'<line x1="{LEFT}" x2="{LEFT + WIDTH}" y1="{at:.1f}" y2="{at:.1f}" stroke="#ddd"/>')
        elements.append(f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{tick:g}</text>')
    elements.append(f'<text x="{LEFT + WIDTH / 2}" y="{bottom + 38}" text-anchor="middle">'
                    'compute, 1 × = 533 steps of SFT</text>')
    return elements

def draw_method(points, number, count, x, y):
    """The SVG elements of one method: a line, its marks and their intervals."""
    colour = COLOURS[number]
    elements = []
    path = []
    for point in points:
        at = x.place(point.budget) + APART * (number - (count - 1) / 2)
        height = y.place(point.mean)
        path.append(f"{at:.1f},{height:.1f}")
        top, bottom = y.place(point.mean + point.half), y.place(max(point.mean - point.half, y.low))
        elements.append(f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{top:.1f}" y2="{bottom:.1f}" stroke="{colour}"/>')
        elements.append(mark(MARKS[number], at, height, colour))
    return [f'<polyline points="{" ".join(path)}" fill="none" stroke="{colour}"/>', *elements]

def draw_budgets(file, methods, base, title, ticks=(0.5, 0.7, 1, 1.5, 2, 3, 4, 5)):
    """Write the picture. `methods` {label: [Point]}, `base` the rvd before training, a dashed line."""
    all_points = list(chain(*methods.values()))
    budgets = sorted({point.budget for point in all_points})
    tops = [point.mean + point.half for point in all_points]
    bottoms = [point.mean - point.half for point in all_points]
    x = Scale(budgets[0] / 1.25, budgets[-1] * 1.25, LEFT, LEFT + WIDTH)
    lowest = max(min(bottoms), 0.5 * min(point.mean for point in all_points))
    y = Scale(0.9 * lowest, 1.1 * max(*tops, base), TOP + HEIGHT, TOP)
    elements = draw_axes(x, y, budgets, [tick for tick in ticks if y.low < tick < y.high])
    elements.append(f'<text x="{LEFT}" y="22" font-weight="bold">{escape(title)}</text>')
    at = y.place(base)
    elements.append(f'<line x1="{LEFT}" x2="{LEFT + WIDTH}" y1="{at:.1f}" y2="{at:.1f}" stroke="black" '
                    'stroke-dasharray="5 4"/>')
    elements.append(f'<text x="{LEFT + WIDTH + 8}" y="{at + 4:.1f}">the base</text>')
    for number, (label, points) in enumerate(methods.items()):
        elements += draw_method(points, number, len(methods), x, y)
        row = TOP + HEIGHT + 62 + 20 * number
        elements.append(mark(MARKS[number], LEFT + 6, row - 4, COLOURS[number]))
        elements.append(f'<text x="{LEFT + 18}" y="{row}">{escape(label)}</text>')
    with whole_file(file) as part:
        part.write_text(f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + 80}" '
                        f'height="{TOP + HEIGHT + 60 + 20 * len(methods)}" font-family="sans-serif" font-size="12">'
                        '<rect width="100%" height="100%" fill="white"/>\n' + "\n".join(elements) + "\n</svg>\n",
                        encoding="utf-8")
