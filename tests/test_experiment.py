"""The experiment that says what is signal: its search, intervals, regimes and pictures."""
import shutil
from contextlib import ExitStack
from functools import partial
from xml.etree import ElementTree

from tests.helpers import exported, same_tensors

from support import UserError
from support.files import sole_owner
import numpy as np
import pytest

import model
import train
from toy import budget, experiment, make_model, regimes, runs
from toy.world import read_toy_video, toy_video, world_of


# ---- The runs -------------------------------------------------------------------------------------------------------

class Known(runs.Runs):
    """Runs whose rvd is a function of the rate, once they are done; doing them takes no time."""

    def __init__(self, out, rvd):
        super().__init__(out)
        self.rvd, self.done = rvd, []

    def scores(self, run, split):
        return {"rvd": [self.rvd(run)]} if (run, split) in self.done else None

    def do(self, run, split):
        self.done.append((run, split))

def test_the_search_finds_the_lowest_rate_and_asks_for_no_more_than_it_needs(tmp_path):
    found = Known(tmp_path, lambda run: abs(np.log(run.rate / 1e-4)) + 0.01 * run.base)
    row = runs.Row("row", {}, start=1e-3)
    assert found.search(row) == (None, [(runs.Run(row, 5e-4, base, 0), "validation") for base in (1, 2)])
    while found.search(row)[1]:
        found.do(*found.search(row)[1][0])
    assert found.search(row)[0] == 1e-4
    assert {run.rate for run, _ in found.done} == {2e-3, 1e-3, 5e-4, 2e-4, 1e-4, 5e-5}   # both neighbours, no others
    falling = Known(tmp_path, lambda run: -run.rate)
    with pytest.raises(UserError, match="row: the best rate lies at an end"):
        while falling.search(row)[1]:
            falling.do(*falling.search(row)[1][0])
    assert found.search(row._replace(fixed=True)) == (1e-3, [])

def test_every_row_has_the_compute_of_its_budget():
    """A comparison takes 8/3 of the work of a step without one: the reference's two forward passes add to six."""
    steps = {row.name: runs.training_options(row).steps for row in (experiment.SFT, *experiment.CANDIDATES)}
    assert [steps[f"realdpo {n} release"] for n in (1, 2, 4)] == [200, 291, 376] and steps["sft release"] == 533
    assert runs.training_options(experiment.PAPER).steps == 100                        # four videos, not two
    assert runs.training_options(experiment.SFT._replace(budget=0.25)).steps == 133

def test_work_takes_what_no_other_process_holds_and_asks_again_after_each(tmp_path, monkeypatch):
    first, second = (runs.Run(runs.Row("row", {}), 1e-3, base, 1) for base in (1, 2))
    mine, other = Known(tmp_path, lambda run: 1.0), ExitStack()
    judged = mine.do
    monkeypatch.setattr(mine, "do", partial(runs.Runs.do, mine))
    monkeypatch.setattr(mine, "prepare", lambda run: (tmp_path, tmp_path))
    monkeypatch.setattr(mine, "train", lambda *_: None)
    monkeypatch.setattr(mine, "judge", lambda run, split, trained: judged(run, split))
    monkeypatch.setattr(train, "init_distributed", lambda: ("process", "mesh"))
    monkeypatch.setattr(runs.dist, "destroy_process_group", lambda: None)
    monkeypatch.setattr(runs.time, "sleep", lambda _: other.close())                    # the other process lets go
    other.enter_context(sole_owner(mine.folder(first)))
    mine.work(lambda: mine.missing([first, second], "held-out"))
    assert mine.done == [(second, "held-out"), (first, "held-out")]


# ---- The intervals --------------------------------------------------------------------------------------------------

def test_intervals_come_from_bases_and_from_runs():
    bases, runs_alone = np.array([[1.0], [2.0], [3.0], [4.0], [5.0]]), np.tile([[1.0, 3.0]], (5, 1))
    spread = 2.78 * np.sqrt(2 / 5)                         # a bootstrap's standard deviation: that of the five, by √5
    assert experiment.half_width(bases) == pytest.approx(spread, rel=0.03)
    assert experiment.half_width(np.tile(bases, 4)) == pytest.approx(spread, rel=0.03)             # runs agree
    assert experiment.half_width(runs_alone) == pytest.approx(2.78 * np.sqrt(1 / 2 / 5), rel=0.03)
    assert experiment.half_width(bases, bases + 1) == pytest.approx(0, abs=1e-12)      # the same bases on both sides
    assert experiment.half_width(runs_alone, runs_alone) == pytest.approx(2.78 * np.sqrt(1 / 5), rel=0.03)  # other runs

def test_spreads_tell_runs_from_bases():
    rng = np.random.default_rng(0)
    values = 5 + 0.3 * rng.standard_normal((5000, 1)) + 0.1 * rng.standard_normal((5000, 4))
    assert experiment.spreads(values) == pytest.approx((0.1, 0.3), rel=0.05)
    assert experiment.spreads(0.1 * rng.standard_normal((5000, 4)))[1] < 0.02


# ---- Other clips ----------------------------------------------------------------------------------------------------

def test_a_regime_has_the_clips_that_it_names(tmp_path):
    regimes.write_real_clips(regimes.REGIMES["one action"]._replace(count=3), tmp_path / "one", seed=1)
    captions = [file.read_text() for file in tmp_path.glob("one/*.txt")]
    assert len(captions) == 3 and all("marches in place" in caption for caption in captions)
    styled = regimes.restyle(toy_video(world_of(1, "real"), 0)[0])
    assert (styled[:, 0, 0] == round(0.6 * 128)).all() and (styled[:, 3:-3, 3:-3] != styled[:, :1, :1]).any()
    regimes.write_real_clips(regimes.Regime(count=1, restyled=True), tmp_path / "styled", seed=1)
    again = read_toy_video(tmp_path / "styled" / "00000.mp4")
    assert np.abs(again.astype(float) - styled).mean() < 3


# ---- The picture ----------------------------------------------------------------------------------------------------

def test_the_picture_of_budgets_shows_every_method_with_its_interval(tmp_path):
    methods = {"SFT": [budget.Point(0.5, 2.0, 0.2), budget.Point(1.0, 1.5, 0.1)],
               "RealDPO & anchor": [budget.Point(0.5, 1.9, 0.2), budget.Point(1.0, 1.4, 2.0)]}      # half > mean
    budget.draw_budgets(tmp_path / "budget.svg", methods, base=4.7, title="rvd < base")
    root = ElementTree.parse(tmp_path / "budget.svg").getroot()
    texts = {element.text for element in root.iter() if element.tag.endswith("text")}
    assert {"SFT", "RealDPO & anchor", "rvd < base", "½ ×", "1 ×", "the base"} <= texts
    marks = [element for element in root.iter() if element.tag.endswith("circle")]
    heights = [float(element.get("cy")) for element in marks[:2]]
    assert budget.TOP < heights[0] < heights[1] < budget.TOP + budget.HEIGHT             # less is lower
    assert "nan" not in (tmp_path / "budget.svg").read_text()


# ---- All of it ------------------------------------------------------------------------------------------------------

@pytest.fixture
def small_experiment(monkeypatch):
    """Two bases of two steps, two clips, rows of one step or two at given rates."""
    make_base = partial(make_model.make_base, clips=16, unseen=16)
    row = partial(runs.Row, fixed=True, start=1e-3, count=1, bases=(1, 2))
    sft, paper, default = [row(name, options) for name, options in (
        ("sft", dict(method="sft")), ("paper", dict(anchor=0.0)), ("realdpo", dict(compare_every=2)))]
    of_experiment = dict(TEN=(1, 2), FEW=(1, 2), BUDGETS=(1.0, 2.0), REGIMES=("nearly right",), NEGATIVES=("1 x 4",), RANKS=(2,),
                         BASE=row("base", start=0.0), SFT=sft, DEFAULT=default, PAPER=paper, OTHERS=(paper,),
                         CANDIDATES=(default, row("other", {})), NOISE=(sft._replace(count=2),))
    for name, value in of_experiment.items():
        monkeypatch.setattr(experiment, name, value)
    monkeypatch.setattr(regimes, "make_base", lambda folder, steps, seed: make_base(folder, 2, seed))
    monkeypatch.setattr(regimes, "SIZES", {"real": 2, "held-out": 1, "validation": 1})
    monkeypatch.setitem(regimes.REGIMES, "usual", regimes.Regime(count=2))
    monkeypatch.setitem(regimes.REGIMES, "1 x 4", regimes.Regime(count=2, negatives=1))
    monkeypatch.setitem(regimes.REGIMES, "nearly right", regimes.Regime(count=1, further=1))
    monkeypatch.setattr(regimes, "CLEAN", 8)
    monkeypatch.setattr(runs, "UNIT", 3)
    monkeypatch.setattr(model, "ADAPTED", model.ADAPTED)                       # which every run sets

@pytest.mark.slow
def test_the_experiment_prints_its_tables_and_then_from_kept_scores_alone(tmp_path, small_experiment, capsys):
    def tables():
        rows = {}
        for part in ("noise", "negatives", "comparison", "budgets", "regimes", "adapters"):
            experiment.main(experiment.Options(part=part, out=str(tmp_path)))
            rows[part] = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
        return rows

    first = tables()
    rows = [row[0].removeprefix("| ") for row in first["comparison"]]
    default, other = "RealDPO + anchor, compared every 2 steps, all t", "RealDPO + anchor, all t"
    assert rows[1:6] == ["base", "SFT, all t", default, other, "RealDPO, all t"] and rows[7:] == [default, other]
    assert all("±" in row[3] for row in first["comparison"][1:6]) and len(first["budgets"]) == 3
    assert [row[0] for row in first["negatives"][1:]] == ["| 3 × 4", "| 1 × 4"]
    layers = [row[1:3] for row in first["adapters"][1:4]]
    assert layers == [["all", "–"], ["attention", "2"], ["attention, feed-forward", "2"]]
    assert len(first["regimes"]) == 5 and first["regimes"][1][:2] == ["| nearly right", "base, nearly right"]
    ElementTree.parse(tmp_path / "budget.svg")
    bases = [exported(tmp_path / f"seed-{seed}" / "base") for seed in (1, 2)]
    assert not same_tensors(*bases)
    better = tmp_path / "seed-1" / "nearly right"
    assert len(list((better / "cache" / "real" / "lose").glob("*.safetensors"))) == 1
    assert not same_tensors(exported(better / "base"), bases[0])
    for folder in tmp_path.glob("seed-*/base"):
        shutil.rmtree(folder)                              # whatever has to be done now, cannot
    assert tables() == first

def test_an_unknown_part_ends_in_one_line(tmp_path):
    with pytest.raises(UserError, match="ranking: expected noise, negatives, comparison, budgets, regimes, adapters"):
        experiment.main(experiment.Options(part="ranking", out=str(tmp_path)))
