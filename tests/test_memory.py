"""What train.py says a step takes, against the real code on tensors without data, watched by torch's FSDP tracker."""
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore

import data
import model
import train
from model import UserError
from tests.helpers import as_a_process, exported, run_training

pytest_plugins = "tests.helpers"

SHAPE = 16, 13, 60, 90                                     # latents of 49×480×720
SELECTIVE, FULL = "selective", "full"


def counted(options, config, setting, n_lose, ranks):
    """Peak bytes of a step on one of so many ranks, and how many parameters the network has."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    split = partial(train.shard, mesh=train.make_mesh("cpu", ranks, ranks), dtype=torch.bfloat16)
    options.graphs = setting.graphs
    model.rope_table.cache_clear()                         # here and below: no fake tensors among the real ones
    with as_a_process(), FakeTensorMode():
        nets = [model.empty(model.DiT, config, torch.float32, "cpu", split) for _ in range(2)]
        policy, reference = (model.Denoiser(net, model.FlowPrediction(), None) for net in nets)
        policy.checkpointing = train.CHECKPOINTING[setting.checkpointing]
        tracker = FSDPMemTracker(policy.net, train.make_optimizer(policy, options))
        reference.requires_grad_(False)
        batch = dict(win=torch.randn(1, *SHAPE), lose=torch.randn(1, n_lose, *SHAPE), t=torch.rand(1),
                     noise=torch.randn(1, *SHAPE), image=torch.randn(1, 16, 1, 60, 90), text=torch.randn(1, 226, 4096))
        with tracker:
            for _ in range(2):                             # the second meets the first's gradients, as later ones do
                loss, _ = train.loss_of(policy, reference, batch, options)
                loss.backward()
    model.rope_table.cache_clear()
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    return peak, sum(p.numel() for p in policy.parameters())


@pytest.mark.parametrize("layers, checkpointing, graphs, n_lose, close", [
    (2, SELECTIVE, "two", 1, 0.1),
    pytest.param(4, FULL, "one", 3, 0.1, marks=pytest.mark.slow),
    pytest.param(4, FULL, "all", 1, 0.1, marks=pytest.mark.slow),
    pytest.param(42, SELECTIVE, "two", 1, 0.03, marks=pytest.mark.slow)])
def test_the_memory_of_a_step_is_what_the_real_code_takes(layers, checkpointing, graphs, n_lose, close):
    options, config = train.Options(), model.PUBLISHED_DIT | dict(num_layers=layers)
    setting = train.Setting(False, checkpointing, graphs, False)
    work = train.Work(options, config, SHAPE, n_lose)
    peak, parameters = counted(options, config, setting, n_lose, ranks=8)
    memory = work.memory(setting, shards=8)
    assert work.parameters == parameters
    assert memory["parameters"] == pytest.approx(4 * parameters / 8) and memory["Adam"] == 2 * memory["parameters"]
    assert sum(size for kind, size in memory.items() if "guess" not in kind) == pytest.approx(peak, rel=close)


def test_the_work_of_a_sample_of_5b():
    """FLOP in forwards of one sequence, 332 T: counted by hand from what passes through the network."""
    forward = 332e12

    def forwards(setting, compare_every=1, **options):
        options = train.Options(batch=1, compare_every=compare_every, **options)
        useful, done = train.Work(options, model.PUBLISHED_DIT, SHAPE, 3).flops(setting)
        return useful / forward, done / forward

    setting = partial(train.Setting, False, held=False)
    none, full = setting("none", "all"), setting("full", "all")
    assert forwards(none) == pytest.approx((8, 8), rel=0.01)           # win and one negative: 3 the policy, 1 the other
    assert forwards(none, lose_per_step=0) == pytest.approx((16, 16), rel=0.01)
    assert forwards(none, method="sft") == pytest.approx((3, 3), rel=0.01)
    assert forwards(none, method="dpo") == pytest.approx((8, 8), rel=0.01)
    assert forwards(none, method="rwr") == pytest.approx((9, 9), rel=0.01)
    assert forwards(full) == pytest.approx((8, 10), rel=0.01)
    assert forwards(setting("full", "one")) == pytest.approx((8, 11), rel=0.01)          # the win once more
    assert 8 < forwards(setting(SELECTIVE, "two"))[1] < 10
    assert forwards(none, compare_every=4) == pytest.approx((4.25, 4.25), rel=0.01)      # (8 + 3 · 3) / 4
    assert forwards(setting("full", "one"), compare_every=2) == pytest.approx((5.5, 7.5), rel=0.01)


def test_offload_leaves_no_weights_on_the_gpu_and_takes_its_time():
    work = train.Work(train.Options(compare_every=1), model.PUBLISHED_DIT, SHAPE, 3)
    held, out = train.Setting(True, FULL, "one", True), train.Setting(True, FULL, "one", False)
    memory = work.memory(out, 1)
    assert memory["parameters"] == memory["gradients"] == memory["Adam"] == memory["reference"] == 0
    assert sum(memory.values()) / train.GIB < 20           # fits a card of 24 GB
    assert work.memory(held, 1)["gradients"] == 4 * work.parameters
    plain = train.Setting(False, FULL, "one", False)
    assert work.seconds(plain, 1, 1, 1e15) < work.seconds(held, 1, 1, 1e15) < work.seconds(out, 1, 1, 1e15)
    # The weights are copied for each of 8 samples: for the policy's forward and backward and the reference's forward of
    # two videos, and once more for the win's error. Gradients that are not held go out, and are added, after each.
    part = 4 * work.parameters
    for setting, copied, touched in ((held, 8 * 7, 13), (out, 8 * 9, 3 * 8 * 2 + 13)):
        more = work.seconds(setting, 1, 1, 1e15) - work.seconds(plain, 1, 1, 1e15)
        assert more == pytest.approx(copied * part / 25e9 + touched * part / 80e9)
    whole, in_place = train.Setting(True, FULL, "all", False), train.Setting(False, FULL, "all", False)
    more = work.seconds(whole, 1, 1, 1e15) - work.seconds(in_place, 1, 1, 1e15)
    assert more == pytest.approx(8 * 4 * part / 25e9 + (3 * 8 + 13) * part / 80e9)     # the two videos in one graph
    assert work.host_memory(1, 1) == 20 * work.parameters and work.host_memory(8, 8) == work.host_memory(1, 1)


class Gpu:
    """What torch says of a GPU of so many GB."""

    def __init__(self, monkeypatch, gigabytes):
        self.total_memory = gigabytes * 2 ** 30
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: self)


class Mesh:
    def size(self, dim):
        return 1


@pytest.mark.parametrize("gigabytes, options, graphs, held", [
    (24, dict(checkpointing=FULL, offload=True), "all", False),
    (14, dict(checkpointing=FULL, offload=True), "one", False),
    (80, dict(offload=True), "all", True), (24, dict(offload=True, graphs="one"), "one", False),
    (129, {}, "two", False), (141, {}, "all", False), (141, dict(graphs="one"), "one", False)])
def test_a_run_takes_the_fastest_way_that_fits_its_gpu(gigabytes, options, graphs, held, monkeypatch):
    Gpu(monkeypatch, gigabytes)
    options = train.Options(compare_every=1, **options)
    work = train.Work(options, model.PUBLISHED_DIT, SHAPE, 3)
    monkeypatch.setattr(data, "free_host_memory", lambda: 2 ** 40)
    process = data.Process(0, 1, torch.device("cuda", 0), torch.bfloat16)
    setting = train.choose_setting(work, options, process, Mesh())
    assert (setting.graphs, setting.held) == (graphs, held)


def test_what_cannot_fit_is_said_before_anything_is_loaded(cache, tmp_path, monkeypatch):
    Gpu(monkeypatch, 48)
    options = train.Options()
    work = train.Work(options, model.PUBLISHED_DIT, SHAPE, 3)
    with pytest.raises(UserError, match="a step takes 119 GiB on each GPU, which has 48; .*--dry-run 1 lists"):
        train.choose_setting(work, options, data.Process(0, 1, torch.device("cuda", 0), torch.bfloat16), Mesh())
    monkeypatch.setattr(data, "free_host_memory", lambda: 2 ** 20)
    monkeypatch.setattr(train, "load_models", None)        # not to be called
    with pytest.raises(UserError, match="--offload: 1 processes take .* GiB of this machine's memory"):
        run_training(tmp_path / "run", cache, offload=True)


def test_the_dry_run_prints_what_fits_the_fastest_first(capsys):
    train.main(train.Options(model=data.HUB_MODEL, dry_run=["1", "8", "2x8"], batch=16))
    head, _, *rows = capsys.readouterr().out.splitlines()
    assert "5,570,479,680 parameters" in head and "computed, not measured" in head
    cells = [row.split(None, 9) for row in rows]
    places = [(place, memory) for place, _, memory, *_ in cells]
    assert {*places} == {(place, memory) for place in ("1", "8", "2x8") for memory in ("24", "48", "80", "141")}
    for place in {*places}:
        times = [float(row[5]) for row, where in zip(cells, places) if where == place]
        assert times == sorted(times) and 1 <= len(times) <= 3
    one, eight = (cells[places.index(place)] for place in (("1", "24"), ("8", "80")))
    assert "--offload" in one[-1] and float(one[4]) == pytest.approx(104, abs=1)
    assert "--offload" not in eight[-1] and float(eight[3]) == pytest.approx(41.9, abs=0.1)
    # 16 samples of 8 forwards at a step that compares, of 3 at the other three; and what is done twice.
    least = 16 * (8 + 3 * 3) / 4 * 332e12 / (8 * 989e12 * 0.4)
    assert least < float(eight[5]) < 1.25 * least
    assert float(eight[6]) == pytest.approx(1000 * float(eight[5]) / 16 / 3600, abs=0.1)         # hours a 1000 samples
    assert sum(v.numel() for k, v in exported(model.TINY).items() if k != "patch_embed.pos_embedding") == train.Work(
        train.Options(), model.read_dit_config("tiny"), (8, 5, 8, 8), 3).parameters
