"""What a run takes, computed: the work of a step, memory on a GPU, and hours from clips to a model."""
from dataclasses import replace
from typing import NamedTuple

from support import UserError

GIB = 2 ** 30
CARDS = {24: 165e12, 48: 362e12, 80: 989e12, 141: 989e12}  # dense bf16 FLOP/s of 4090, L40S, H100 and H200, by their GB
UTILISATION = 0.4              # of that, for transformers; others measured 38 % compiled and 30 % eager
# How many activations of all tokens, in bf16, a block's graph keeps, and how many exist while the block is
# back-propagated; then both for adapters on a frozen block, which needs less for its gradient. Counted on the real code
# with tensors without data; the tests hold `memory` to it.
KEPT = {"none": (25, 16), "full": (1, 1), "selective": (2, 2)}
BACKWARD = (25, 28)
ENCODING = 156e12 / 0.1        # FLOP of a clip of 49×480×720 through autoencoder and T5, counted; at 10 %, a guess
EVALUATIONS = 2 * 12           # of the transformer for a negative, with guidance

class Work(NamedTuple):
    """A training run, as far as its cost goes, by its train.Options; of CogVideoX-5B-I2V unless told otherwise."""
    options: object
    parameters: int = 5_570_479_680
    layers: int = 42
    width: int = 3072
    tokens: int = 17_776       # of a video with its caption
    negatives: int = 3         # of a record

    @property
    def products(self):
        """FLOP of the matrix products in a forward pass of one video."""
        return 24 * self.layers * self.width ** 2 * self.tokens

    @property
    def forward(self):
        """FLOP of a forward pass of one video, with attention."""
        return self.products + 4 * self.layers * self.width * self.tokens ** 2

    def videos(self, compares=True):
        """How many videos of a sample a step looks at."""
        drawn = min(self.negatives, self.options.lose_per_step or self.negatives) if compares else 0
        return {"realdpo": 1 + drawn, "sft": 1, "dpo": 2, "rwr": self.negatives}[self.options.method]

    def flops(self, compares=True):
        """FLOP of a step over all ranks, with what the backward pass computes again, without 1 % of the adapters' own."""
        options, videos = self.options, self.videos(compares)
        again = {"none": 0, "full": self.forward, "selective": self.products}[options.checkpointing]
        backward = 2 * self.forward + again
        if options.rank:
            backward -= self.products                      # of the gradients of frozen weights
        passes = videos if compares and options.method in ("realdpo", "dpo") else 0     # without a graph: the reference's
        if passes and options.graphs == "one":
            passes += 1                                    # and the win's error, before its graph
        return options.batch * (videos * (self.forward + backward) + passes * self.forward)

    def mean_flops(self):
        """`flops` of the mean step: every `compare_every`-th compares."""
        share = 1 / self.options.compare_every if self.options.method == "realdpo" else 1
        return share * self.flops() + (1 - share) * self.flops(compares=False)

    def memory(self, shards):
        """{kind: bytes} on a GPU at a step's peak, with parameters sharded over so many GPUs."""
        options, frozen = self.options, bool(self.options.rank)
        at_once = graphs = self.videos()
        if options.method in ("realdpo", "dpo") and options.graphs != "all":
            at_once, graphs = 1, {"one": 1, "two": 2}[options.graphs]
        adapters = 18 * options.rank * self.layers * self.width        # 4 times 1 + 1 widths, and twice 1 + 4
        part = 4 * (adapters if frozen else self.parameters) // shards
        activation = 2 * self.tokens * self.width * options.micro_batch                # bytes of one, of all tokens
        return {"frozen base": 2 * frozen * self.parameters // shards,
                "parameters": part, "gradients": part, "Adam": 2 * part, "reference": part,
                "graphs": graphs * self.layers * KEPT[options.checkpointing][frozen] * activation,
                "a block's backward pass": at_once * BACKWARD[frozen] * activation,
                "gathered blocks": (4 if frozen else 14) * self.parameters // self.layers,
                "context, NCCL, fragments (guessed)": (2 if shards == 1 else 5) * GIB}

def dry_run(options, steps, clips):
    """Print what a run of `steps` on `clips` takes on GPUs of each size; with --rank, the whole network beside."""
    gpus = options.dry_run
    if options.batch % gpus:
        raise UserError(f"--dry-run {gpus}: expected a number of GPUs by which --batch {options.batch} can be divided")
    print(f"computed, not measured: hours for {clips} clips and {steps} steps of {options.batch}, at {UTILISATION:.0%} "
          f"of a GPU's peak, with 3 negatives a record or 1\n{'GPUs × GB':>10}  {'--rank':>6}  {'GiB':>5}  {'s/step':>6}  "
          f"{'h/1000 samples':>14}  {'encoding':>8}  {'negatives':>13}  {'training':>8}  {'in all':>13}")
    for rank in sorted({0, options.rank}):
        work = Work(replace(options, rank=rank))
        gib = sum(work.memory(min(gpus, 8)).values()) / GIB
        for size, peak in CARDS.items():
            step = work.mean_flops() / (gpus * peak * UTILISATION)
            encoding, training = clips * ENCODING / (gpus * peak) / 3600, steps * step / 3600
            one = clips * EVALUATIONS * work.forward / (gpus * peak * UTILISATION) / 3600
            print(f"{gpus:>4} × {size:>3}  {rank:6}  {gib:5.1f}  {step:6.1f}  "
                  f"{1000 * step / options.batch / 3600:14.2f}  {encoding:8.1f}  {3 * one:6.1f} {one:6.1f}  "
                  f"{training:8.1f}  {encoding + 3 * one + training:6.1f} {encoding + one + training:6.1f}  "
                  f"{'' if gib <= 0.97 * size else 'does not fit'}")
