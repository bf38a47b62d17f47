"""What a run takes, as support/budget.py computes it, against the real code on tensors without data."""
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.flop_counter import FlopCounterMode

import model
import train
from support.budget import Work
from support.weights import empty
from tests.helpers import FULL_DIT, as_a_process

pytest_plugins = "tests.helpers"

SHAPE, RANKS = (16, 13, 60, 90), 8                         # latents of 49×480×720; GPUs
FORWARD = 332e12                                           # FLOP of a video's, counted by hand

def attention_flops(passes, shape, *_, **__):
    """Of queries with keys, and of the result with values. A fused kernel's repeated forward is not counted."""
    batch, heads, tokens, width = shape
    return passes * 4 * batch * heads * tokens ** 2 * width

ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: partial(attention_flops, 1),
             torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: partial(attention_flops, 2)}

def denoisers(layers, rank, split):
    """Policy and reference without data: two networks in fp32, or one in bf16 with two sides' adapters in fp32."""
    config = FULL_DIT | dict(num_layers=layers)
    if not rank:
        nets = [empty(model.DiT, config, torch.float32, "cpu", split) for _ in range(2)]
        policy, reference = [model.Denoiser(net, model.FlowPrediction(), None) for net in nets]
        return policy, reference.requires_grad_(False)

    def prepare(net):
        torch.set_default_dtype(torch.float32)
        net.adapt(rank)
        split(net)

    torch.set_default_dtype(torch.bfloat16)                # fake tensors cannot be converted afterwards
    net = empty(model.DiT, config, torch.float32, "cpu", prepare)
    policy, reference = [model.Denoiser(net, model.FlowPrediction(), None, side) for side in ("policy", "reference")]
    for parameter in reference.parameters():
        parameter.requires_grad_(False)
    return policy, reference

@pytest.mark.parametrize("layers, checkpointing, graphs, lose, rank, close", [
    (2, "selective", "two", 1, 0, 0.1),
    pytest.param(4, "full", "one", 3, 0, 0.1, marks=pytest.mark.slow),
    pytest.param(4, "full", "one", 1, 64, 0.1, marks=pytest.mark.slow),
    pytest.param(42, "selective", "two", 1, 0, 0.03, marks=pytest.mark.slow)])
def test_memory_and_flops_are_those_of_the_real_code(layers, checkpointing, graphs, lose, rank, close):
    options = train.Options(batch=1, lose_per_step=lose, checkpointing=checkpointing, graphs=graphs, rank=rank)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    split = partial(train.shard, mesh=train.make_mesh("cpu", RANKS, RANKS), dtype=torch.bfloat16)
    counter = FlopCounterMode(display=False, custom_mapping=ATTENTION)
    model.rope_table.cache_clear()                         # here and below: no fake tensors among the real ones
    with as_a_process(), FakeTensorMode():
        policy, reference = denoisers(layers, rank, split)
        policy.checkpointing = train.CHECKPOINTING[checkpointing]
        batch = dict(win=torch.randn(1, *SHAPE), lose=torch.randn(1, lose, *SHAPE), t=torch.rand(1),
                     noise=torch.randn(1, *SHAPE), image=torch.randn(1, 16, 1, 60, 90), text=torch.randn(1, 226, 4096))
        tracker = FSDPMemTracker(policy.net, train.make_optimizer(policy, options))
        for watch in tracker, tracker, counter:            # the second meets the first's gradients, as later ones do
            with watch:
                train.loss_of(policy, reference, batch, options)[0].backward()
    model.rope_table.cache_clear()
    whole = [tensor.numel() for name, tensor in policy.net.named_parameters() if ".adapters." not in name]
    work = Work(options, sum(whole), layers)
    memory = sum(size for kind, size in work.memory(RANKS).items() if "guess" not in kind)
    assert memory == pytest.approx(tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"], rel=close)
    assert work.flops() == pytest.approx(counter.get_total_flops(), rel=0.015 if rank else 0.005)

@pytest.mark.parametrize("options, forwards", [
    ({}, 8), (dict(lose_per_step=0), 16), (dict(method="sft"), 3), (dict(method="dpo"), 8), (dict(method="rwr"), 9),
    (dict(compare_every=4), (8 + 3 * 3) / 4)])             # the anchor alone at three of four steps
def test_the_work_of_a_step_is_three_forwards_of_the_policy_a_video_and_one_of_the_reference(options, forwards):
    options = train.Options(**dict(batch=1, checkpointing="none", compare_every=1) | options)
    assert Work(options).mean_flops() == pytest.approx(forwards * FORWARD, rel=0.01)

@pytest.mark.parametrize("gpus, count, sizes", [(1, 1, [141]), (8, 8, [48, 80, 141]), (16, 16, [48, 80, 141])])
def test_a_dry_run_says_for_each_size_of_gpu_whether_it_fits_and_how_long_it_takes(gpus, count, sizes, capsys):
    train.main(train.Options(batch=16, dry_run=gpus))
    head, _, *rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert {"5000", "3125"} <= {*head}                     # clips and steps
    assert len(rows) == 4 and [int(row[2]) for row in rows if row[-1] != "fit"] == sizes
    least = 16 * (8 + 3 * 3) / 4 * FORWARD / (count * 989e12 * 0.4)          # without what is done twice
    assert least < float(rows[2][5]) < 1.25 * least
    hours = [float(cell) for cell in rows[2][7:13]]        # encoding, three negatives or one, training, and their sums
    assert hours[0] + hours[1] + hours[3] == pytest.approx(hours[4], abs=0.11)
    assert hours[0] + hours[2] + hours[3] == pytest.approx(hours[5], abs=0.11)
