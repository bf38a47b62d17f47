"""A command line from a dataclass of options, a mistake in one line, and this process among its equals."""
import argparse, hashlib, os, signal, sys, threading, time
from contextlib import contextmanager
from dataclasses import MISSING, field, fields
from functools import partial
from pathlib import Path
from shlex import quote
from typing import NamedTuple, get_args

from support import UserError
from support.folders import HUB_MODEL, defaults_of, last_checkpoint
import torch

# ---- Options --------------------------------------------------------------------------------------------------------

KINDS = {str: dict(metavar="STR"), int: dict(type=int, metavar="INT"), float: dict(type=float, metavar="FLOAT"),
         list: dict(nargs="+", metavar="FILE"), bool: dict(action=argparse.BooleanOptionalAction)}


def option(default=MISSING, help="", group=None, least=None):
    """A field of an Options class; without a default, a positional argument. `group` starts a new section of --help,
    `least` is the smallest value allowed."""
    return field(default=default, metadata=dict(help=help, group=group, least=least))


def flag(name):
    """The name of a field of Options on the command line: ema_every -> --ema-every."""
    return "--" + name.replace("_", "-")


def flags(values):
    """{option: value} as a command line: --steps 8 --guidance 1.0."""
    return " ".join(f"{flag(name)} {quote(str(value))}" for name, value in values.items())


def default_model():
    """The model if no --model is given, and why: CogVideoX-5B-I2V with a GPU, the tiny one without. Raises UserError on
    a machine with a GPU whose driver torch cannot use."""
    if torch.cuda.is_available():
        return HUB_MODEL, "a GPU is here"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if torch.version.cuda and not hidden and Path("/proc/driver/nvidia/version").exists():
        raise UserError(f"a GPU is here, but torch (for CUDA {torch.version.cuda}) cannot use its driver; update the "
                        "driver or install a torch for an older CUDA; on the CPU: CUDA_VISIBLE_DEVICES=")
    return "tiny", "no GPU is here" if torch.version.cuda else "this torch is for CPUs"


def parse(options, name, argv=None):
    """Command line of NAME.py -> an instance of the dataclass `options`. The chosen model may bring defaults of its own;
    ~ is the home folder."""
    style = partial(argparse.RawDescriptionHelpFormatter, max_help_position=28, width=118)
    parser = argparse.ArgumentParser(description=options.__doc__, allow_abbrev=False, formatter_class=style)
    parser.error = lambda message: sys.exit(f"error: {message}; {' '.join(parser.format_usage().split())}")
    defaults = {each.name: each.default for each in fields(options)}
    if "model" in defaults:
        first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        first.add_argument("--model", default=default_model()[0])
        defaults["model"] = first.parse_known_args(argv)[0].model
        own = defaults_of(defaults["model"], name)
        if not own.keys() <= defaults.keys():
            raise UserError(f"{defaults['model']}: defaults.json has {', '.join(own)} for {name}, of which not all are "
                            "options of it")
        defaults |= own
    section = parser
    for each in fields(options):
        if each.metadata["group"]:
            section = parser.add_argument_group(each.metadata["group"])
        help, default = each.metadata["help"].replace("%", "%%"), defaults[each.name]
        if default is MISSING:
            section.add_argument(each.name, type=each.type, help=help)
            continue
        if default not in ("", 0, ()):
            help += f" [{default}]"
        kind = KINDS.get(each.type) or dict(choices=get_args(each.type))                       # else a Literal
        section.add_argument(flag(each.name), default=default, help=help, **kind)
    given = vars(parser.parse_args(argv))
    for each in fields(options):
        value, least = given[each.name], each.metadata["least"]
        if str(value).startswith("~"):                     # a shell leaves it as it is in --out=~/run
            given[each.name] = os.path.expanduser(value)
        if least is not None and value < least:
            raise UserError(f"{flag(each.name)} {value}: expected at least {least}")
    return options(**given)


# ---- A command ------------------------------------------------------------------------------------------------------

def say(message):
    """Print once, however many processes there are."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(message, flush=True)


def announce(options):
    """Say which model a command takes, and why, and which options are not the program's defaults. A run that has not
    ended is taken as it is at its last checkpoint, which is looked up here, once."""
    default, why = default_model()
    values = {each.name: getattr(options, each.name) for each in fields(options) if each.name != "model"}
    changed = {name: value for name, value in values.items() if value != getattr(type(options), name)}
    say(f"model: {options.model} ({why if options.model == default else '--model'})\n"
        f"options: {flags(changed) or 'the defaults'}")
    checkpoint = last_checkpoint(options.model)
    if checkpoint:
        say(f"{options.model}: training has not ended; taken as it was at its last checkpoint, {checkpoint}")
        options.model = str(checkpoint)


def command(main, options, name):
    """Run `main(options)` of NAME.py. A user's mistake ends in one line and status 1."""
    for stream in sys.stdout, sys.stderr:
        stream.reconfigure(errors="replace")               # a console that cannot print ω prints ?
    try:
        options = parse(options, name)
        if hasattr(options, "model"):
            announce(options)
        main(options)
    except UserError as e:
        # Most mistakes are found by all ranks. Rank 0 reports them, and torchrun ends the others meanwhile.
        if int(os.environ.get("RANK", 0)) > 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(3)
        sys.exit(f"error: {e}")
    except RuntimeError as e:                              # gloo's and NCCL's words for a lost peer
        if os.environ.get("WORLD_SIZE", "1") == "1" or not ("by peer" in str(e) or "remote process" in str(e)):
            raise
        sys.exit("another rank has gone, so this one ends too; its own last line says why")
    except BrokenPipeError:                                # | head has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())             # for what Python still flushes
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit("interrupted; what is finished stays, and the same command does the rest")


# ---- One of several equal processes ---------------------------------------------------------------------------------

class Process(NamedTuple):
    """One of `world_size` processes, with its device and the dtype in which its networks compute."""
    rank: int
    world_size: int
    device: torch.device
    dtype: torch.dtype


def this_process():
    """This Process, alone or under torchrun. Raises UserError if a launcher's variables are incomplete, if more GPUs
    are asked for than exist, or for a GPU that is too old."""
    names = "RANK", "WORLD_SIZE", "LOCAL_RANK"
    given = [name for name in names if name in os.environ]
    if given and len(given) < len(names):
        raise UserError(f"{' and '.join(given)} in the environment, without the rest of {', '.join(names)}: start this "
                        f"with torchrun, or alone, after: unset {' '.join(given)}")
    rank, world_size, local = [int(os.environ[name]) for name in names] if given else (0, 1, 0)
    if not torch.cuda.is_available():
        return Process(rank, world_size, torch.device("cpu"), torch.float32)
    if local >= torch.cuda.device_count():
        raise UserError(f"--nproc_per_node needs at least {local + 1} GPUs, this machine has {torch.cuda.device_count()}")
    torch.cuda.set_device(local)
    if torch.cuda.get_device_capability() < (8, 0):        # older ones have no fast bf16, and fp16 overflows
        raise UserError(f"{torch.cuda.get_device_name()}: has no bf16 arithmetic, which the networks need; use a GPU of "
                        "2020 or later (Ampere, compute capability 8.0), or the CPU: CUDA_VISIBLE_DEVICES=")
    return Process(rank, world_size, torch.device("cuda", local), torch.bfloat16)


def generator(*key):
    """A CPU generator seeded by `key` alone: it gives the same numbers on any device and any number of ranks."""
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big"))


@contextmanager
def stop_signals():
    """Yield an Event that is set when this process shall finish its step, save and exit: by SIGTERM (pre-emption;
    launchers repeat it), SIGUSR1 or SIGUSR2 (SLURM's --signal), SIGHUP (a connection that closes, unless nohup ignores
    it) or Ctrl-C. A second Ctrl-C ends it at once."""
    stop = threading.Event()

    def finish_step(number, _):
        stop.set()
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {}
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            before[number] = signal.signal(number, finish_step)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
