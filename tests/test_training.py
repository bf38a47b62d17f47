"""Training: what a step is made of, and what a run does."""
import json, math, shutil
from functools import partial

from support import UserError, folders
from tests.helpers import (NAMES, Toy, as_a_process, assert_unrelated, checkpoint, encode, exported, metrics,
                           preference, run_training, same_tensors, spy_on_losses)

import pytest
import torch

import data
import model
import realdpo
import train

pytest_plugins = "tests.helpers"

def test_an_epoch_is_every_record_once_in_an_order_of_its_own():
    def epochs(seed):                                      # six of seven records, in batches of three
        options, drawn = train.Options(batch=3, seed=seed), []
        for step in range(14):
            drawn += train.batch_indices(options, 7, step)
        return [tuple(drawn[begin:begin + 7]) for begin in range(0, 42, 7)]

    orders = epochs(seed=0) + epochs(seed=1)
    assert all(sorted(order) == list(range(7)) for order in orders)
    assert len({*orders}) == 12

def draw(seed=0, step=0, place=0, t_min=0.0, **options):
    """What `draw_sample` makes of a record whose negatives are their numbers."""
    record = dict(win=torch.zeros(4, 5, 8, 8), lose=torch.arange(100.0))
    options = train.Options(**dict(seed=seed, compare_every=1, t_draw="uniform") | options)
    return train.draw_sample(record, options, step, place, t_min)

@pytest.mark.parametrize("change", [dict(seed=1), dict(step=1), dict(place=1)], ids=str)
def test_all_that_is_drawn_depends_on_seed_step_and_place_alone(change):
    ours, again, other = draw(), draw(), draw(**change)
    assert ours.keys() == {"win", "lose", "t", "noise"}
    assert same_tensors(ours, again)
    for name in ("t", "noise", "lose"):
        assert not torch.equal(ours[name], other[name]), name

def test_t_is_uniform_from_the_least_that_the_network_knows():
    t = torch.stack([draw(place=place, t_min=0.2)["t"] for place in range(2000)])
    assert 0.2 < t.min() < 0.201 and 0.999 < t.max() <= 1
    assert t.mean() == pytest.approx(0.6, abs=0.01)
    assert_unrelated(torch.stack([draw(place=place)["noise"] for place in range(8)]))

def test_the_releases_t_are_those_of_its_first_500_training_steps():
    assert len(train.RELEASE_T) == 500 and (train.RELEASE_T.diff() > 0).all()
    assert train.RELEASE_T[0].item() == pytest.approx(0.0283, abs=1e-4)
    assert train.RELEASE_T[-1].item() == pytest.approx(0.6387, abs=1e-4)
    t = torch.stack([draw(place=place, t_draw="release")["t"] for place in range(2000)])
    assert set(t.tolist()) <= set(train.RELEASE_T.tolist()) and len(t.unique()) > 400
    assert t.mean() == pytest.approx(train.RELEASE_T.mean().item(), abs=0.01)

def test_negatives_are_drawn_evenly_without_repetition_and_for_realdpo_alone():
    drawn = torch.stack([draw(place=place, lose_per_step=60)["lose"] for place in range(50)])
    assert drawn.shape == (50, 60) and all(len(row.unique()) == 60 for row in drawn)
    assert drawn.mean() == pytest.approx(49.5, abs=2) and (drawn.min(), drawn.max()) == (0, 99)
    assert torch.equal(draw(lose_per_step=0)["lose"], torch.arange(100.0))
    assert torch.equal(draw(method="dpo")["lose"], torch.arange(100.0))        # which has scores in their order

def scored_batch():
    """Two samples of three negatives with scores, as a step stacks them."""
    given = preference(2, 3)
    cond = given.pop("cond")
    return given | dict(text=cond.text, image=cond.image, scores=torch.tensor([[0.0, 1.0, -2.0], [3.0, -1.0, 1.0]]))

@pytest.mark.parametrize("graphs", ["all", "two"])
@pytest.mark.parametrize("weighting", ["x0", "velocity"])
def test_each_method_takes_its_loss_with_the_options_of_the_run(weighting, graphs):
    batch, given = scored_batch(), preference(2, 3)
    options = partial(train.Options, beta=3.0, anchor=0.7, compare_every=2, weighting=weighting, graphs=graphs)
    same = {name: given[name] for name in ("cond", "t", "noise")} | dict(weighting=weighting)
    best, worst = given["lose"][[0, 1], [1, 0]], given["lose"][[0, 1], [2, 1]][:, None]
    compare = partial(realdpo.realdpo_loss, Toy(1), Toy(2), beta=3.0, **same)
    expected = {
        "realdpo": compare(win=given["win"], lose=given["lose"], anchor=0.7, scale=2),
        "dpo": compare(win=best, lose=worst, anchor=0.0),
        "sft": realdpo.sft_loss(Toy(1), win=given["win"], **same),
        "rwr": realdpo.rwr_loss(Toy(1), videos=given["lose"], scores=batch["scores"], **same)}
    for method, (loss, numbers) in expected.items():
        our_loss, our_numbers = train.loss_of(Toy(1), Toy(2), batch, options(method=method))
        torch.testing.assert_close(our_loss, loss)
        assert our_numbers.keys() == numbers.keys()

def test_the_console_says_win_and_lose_as_differences_to_the_reference(tmp_path, capsys):
    numbers = dict(loss=1.2345, win=0.01, ref_win=0.0123, lose=0.1, ref_lose=0.05, margin=2.345, accuracy=1.0, lr=5e-5,
                   seconds=7.612)
    with open(tmp_path / "metrics.jsonl", "w") as file:
        train.log_step(file, 6249, numbers)
    line = capsys.readouterr().out.strip()
    assert line == "step 6249  loss 1.23  win -2.3e-03  lose +5.0e-02  margin 2.35  acc 1.00  lr 5e-05  7.61 s"

@pytest.mark.parametrize("steps, warmup, decay, rates", [
    (5, 2, 0.0, [0.5, 1, 1, 1, 1]),
    (10, 2, 0.4, [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]),
    (4, 0, 1.0, [1, 0.75, 0.5, 0.25]),
    (6, 4, 1.0, [1 / 4, 2 / 4, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),               # warm-up and fall meet
    (1, 1, 1.0, [1])])
def test_the_rate_rises_stays_and_falls(steps, warmup, decay, rates):
    options = train.Options(lr=2.0, warmup=warmup, decay=decay)
    assert [train.learning_rate(options, step, steps) / 2 for step in range(steps)] == pytest.approx(rates)

@pytest.fixture(scope="module")
def paced(cache):
    """Three steps at rates of 0.05, 0.1 and 0.1, the reference moved every second step. Returns the run and what its
    optimizer did: [(rate, weights before, gradient, weights after)], in fp64."""
    updates, update = [], torch.optim.AdamW.step

    def spy(optimizer, *arguments, **options):
        group = optimizer.param_groups[0]

        def vector(tensors):
            return torch.cat([tensor.double().flatten() for tensor in tensors])

        rate, before, gradient = group["lr"], vector(group["params"]), vector(p.grad for p in group["params"])
        update(optimizer, *arguments, **options)
        updates.append((rate, before, gradient, vector(group["params"])))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "KEEP", 9)
        patch.setattr(torch.optim.AdamW, "step", spy)
        run_training(cache.parent / "paced", cache, steps=3, lr=0.1, warmup=2, ema_every=2, save_every=1, beta=500.0)
    return cache.parent / "paced", updates

def test_a_step_is_adamws_with_the_settings_that_cogvideox_was_trained_with(paced):
    """Loshchilov and Hutter 2019, Algorithm 2, in fp64, of a gradient whose norm is at most 1."""
    out, updates = paced
    lines, m, v = metrics(out), 0, 0
    assert [rate for rate, *_ in updates] == [0.05, 0.1, 0.1] == [line["lr"] for line in lines]
    for step, (rate, before, gradient, after) in enumerate(updates, start=1):
        assert gradient.norm() == pytest.approx(min(1, lines[step - 1]["grad_norm"]), rel=1e-4)
        m, v = 0.9 * m + 0.1 * gradient, 0.95 * v + 0.05 * gradient ** 2
        slope = (m / (1 - 0.9 ** step)) / ((v / (1 - 0.95 ** step)).sqrt() + 1e-8)
        torch.testing.assert_close(after, before - rate * (slope + 1e-4 * before), rtol=0, atol=1e-6)
    assert max(line["grad_norm"] for line in lines) > 1    # so it was clipped

def test_the_reference_moves_every_so_many_steps(paced):
    out, _ = paced
    first, second, third = (checkpoint(out, step) for step in (1, 2, 3))
    base = {name: tensor.float() for name, tensor in exported(folders.TINY).items()}
    for name in base:
        assert torch.equal(first[f"ref.{name}"], base[name])
        moved = torch.lerp(base[name], second[f"model.{name}"], 1 - 0.996)
        assert torch.equal(second[f"ref.{name}"], moved) and torch.equal(third[f"ref.{name}"], moved)
    assert not torch.equal(second["ref.proj_out.weight"], base["proj_out.weight"])

def test_held_out_records_are_looked_at_at_fixed_times_and_noise(cache, monkeypatch):
    """A policy that always says 0 has the error of the videos' own mean square, the reference's is the noise's."""
    monkeypatch.setattr(train, "EVAL_RECORDS", 3)
    records = data.Records(cache)
    look = partial(train.evaluate, lambda x_t, *_: torch.zeros_like(x_t), lambda x_t, *_: x_t, records,
                   train.Options())
    with as_a_process():
        alone, _ = train.init_distributed()
        found = look(alone)
        assert look(alone) == found
        monkeypatch.setattr(train.dist, "all_reduce", lambda numbers: None)
        parts = [look(alone._replace(rank=rank, world_size=2)) for rank in (0, 1)]       # who cannot share three evenly
    for name in found:
        assert sum(part[name] for part in parts) == pytest.approx(found[name], rel=1e-6), name
    win, lose = (torch.stack([records[i][name].float() for i in range(3)]) for name in ("win", "lose"))
    for t in ("", "_t0.1", "_t0.3", "_t0.5", "_t0.7", "_t0.9"):
        assert found[f"eval_win{t}"] == pytest.approx(win.square().mean().item(), rel=1e-5)
        assert found[f"eval_lose{t}"] == pytest.approx(lose.square().mean().item(), rel=1e-5)
    for t in (0.1, 0.3, 0.5, 0.7, 0.9):                    # x_t − x₀ = t·(ε − x₀)
        assert found[f"eval_ref_win_t{t}"] == pytest.approx(t ** 2 * (1 + win.square().mean().item()), rel=0.05)


# ---- Training: a run ------------------------------------------------------------------------------------------------

ERRORS = ["win", "lose", "ref_win", "ref_lose"]

def test_a_run_logs_every_step_and_starts_at_log_2(straight):
    lines = [json.loads(line) for line in (straight / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    for line in lines:
        assert {"loss", *ERRORS, "margin", "accuracy", "grad_norm", "lr", "seconds", "eval_margin"} <= line.keys()
    assert lines[0]["preference"] == pytest.approx(math.log(2), abs=1e-6) and lines[0]["margin"] == 0

def test_a_run_exports_what_it_trained(straight):
    ours, last = model.load_dit(straight).net.state_dict(), checkpoint(straight, 4)
    assert {v.dtype for v in exported(straight).values()} == {torch.bfloat16}
    assert all(torch.equal(ours[k[6:]], v.bfloat16().float()) for k, v in last.items() if k.startswith("model."))
    assert not torch.equal(ours["proj_out.weight"], model.load_dit("tiny").net.proj_out.weight)

def test_a_loss_that_is_not_finite_stops_before_the_update(straight, cache, tmp_path, monkeypatch):
    spy_on_losses(monkeypatch, lambda count, loss: loss * (math.nan if count == 3 else 1))
    with pytest.raises(UserError) as stopped:
        run_training(tmp_path / "run", cache, save_every=2)
    assert all(part in str(stopped.value) for part in ("step 2", *NAMES, "step-000002"))
    assert len(metrics(tmp_path / "run")) == 2 and not (tmp_path / "run" / "transformer").exists()
    assert same_tensors(checkpoint(tmp_path / "run", 2), checkpoint(straight, 2))

def test_between_comparisons_the_anchor_trains_alone_and_a_run_goes_on_there_bit_for_bit(cache, tmp_path):
    out = tmp_path / "run"
    run = partial(run_training, cache=cache, compare_every=2, anchor=20.0, decay=1.0, save_every=1, steps=3)
    lines, whole = run(out), checkpoint(out, 3)
    assert ["ref_win" in line for line in lines] == [True, False, True]
    assert lines[1]["loss"] == pytest.approx(20 * lines[1]["win"])
    (plain,) = run(tmp_path / "plain", compare_every=1, steps=1)               # of the same draws
    assert lines[0]["win"] == plain["win"] and lines[0]["preference"] == plain["preference"]
    assert lines[0]["loss"] == pytest.approx(2 * plain["preference"] + 20 * plain["win"])
    shutil.rmtree(out / "checkpoints" / "step-000003")
    (out / "done").unlink()
    assert run(out) == lines and same_tensors(checkpoint(out, 3), whole)

def test_every_sample_of_a_run_has_draws_of_its_own(cache, tmp_path, monkeypatch):
    losses = spy_on_losses(monkeypatch)
    monkeypatch.setattr(model.FlowPrediction, "t_min", 0.4)
    run_training(tmp_path / "run", cache, batch=2, micro_batch=1)              # four steps: every record twice
    t, noise, wins, lose = (torch.cat([batch[name] for batch in losses]) for name in ("t", "noise", "win", "lose"))
    assert len(set(t.tolist())) == 8 and 0.4 < t.min() and t.max() <= 1
    assert_unrelated(noise)
    assert lose.shape == wins[:, None].shape and len(lose.unique(dim=0)) > 4   # not always the same one

@pytest.mark.parametrize("options", [dict(micro_batch=1), dict(micro_batch=2, graphs="two"),
                                     dict(checkpointing="full"), dict(checkpointing="selective")], ids=str)
def test_how_a_batch_is_computed_changes_no_gradient(options, straight, cache, tmp_path):
    # Adam's first update divides every gradient by itself, those too that are only rounding.
    lines = run_training(tmp_path / "run", cache, **options, steps=2)
    for ours, theirs, close in zip(lines, metrics(straight), (1e-5, 1e-4)):
        for name in ("loss", "grad_norm", *ERRORS):
            assert ours[name] == pytest.approx(theirs[name], rel=close), name

def test_supervised_training_needs_no_negatives(videos, tmp_path):
    lines = run_training(tmp_path / "run", encode(videos, tmp_path / "cache"), method="sft", steps=2)
    assert lines[0]["loss"] == lines[0]["win"] and not lines[0].keys() & {"lose", "ref_win", "margin"}
    assert not torch.equal(exported(tmp_path / "run")["proj_out.weight"], exported(folders.TINY)["proj_out.weight"])

def test_scored_methods_learn_from_generated_videos_by_their_scores(own_cache, tmp_path, monkeypatch):
    records, good, scores = data.Records(own_cache), [], {}
    for i, name in enumerate(records.names):
        best = i % 2                                       # of two negatives each, the even records' first
        scores[name] = [1.0 - best, float(best)]
        good.append(records[i]["lose"][best].float())
    (own_cache / "scores.json").write_text(json.dumps(scores))
    seen = spy_on_losses(monkeypatch)
    lines = run_training(tmp_path / "dpo", own_cache, method="dpo", steps=8)
    assert abs(lines[0]["loss"] - math.log(2)) <= 1e-6 and lines[-1]["loss"] < lines[0]["loss"]
    for call in seen:
        for win in call["win"]:
            assert any(torch.equal(win, each) for each in good)
    lines = run_training(tmp_path / "rwr", own_cache, method="rwr", steps=2)
    assert lines[0].keys() & {"loss", "win", "lose", "margin"} == {"loss", "win"}

