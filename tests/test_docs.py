"""The READMEs and --help say what is true."""
import dataclasses, re, shlex
from functools import partial
from typing import get_args

from tests.helpers import REPO

import pytest

import data
import judging.curate, judging.study, judging.tally, judging.verdict
import model
import sample
import train
from toy import curves, experiment, judge, make_model

pytest_plugins = "tests.helpers"


def test_a_models_own_defaults_apply_to_what_was_not_given(straight):
    parse, other = partial(data.parse, train.Options, "train"), ["--model", "owner/name"]
    tiny = model.defaults_of("tiny", "train")
    assert parse(other) == train.Options(model="owner/name")
    assert parse(["--model", "tiny"]) == train.Options(model="tiny", **tiny)
    assert parse(["--model", str(straight)]).beta == tiny["beta"] != train.Options.beta
    given = parse(["--model", "tiny", "--beta", "7", "--offload", "--method", "sft"])
    assert given == train.Options(**{**tiny, "model": "tiny", "beta": 7.0, "offload": True, "method": "sft"})
    assert parse([*other, "--offload", "--no-offload"]).offload is False
    steps = [train.number_of_steps(parse(args), 20) for args in (other, ["--epochs", "3"], ["--steps", "5"])]
    assert steps == [25, 8, 5]                             # of 8 samples: ten epochs of 20 records, three, as told


@pytest.mark.parametrize("module, names", [(train, ["beta", "lr", "ema_decay", "batch"]),
                                           (sample, ["negatives", "guidance"])], ids=["train", "sample"])
def test_a_default_is_what_its_help_says_that_the_paper_or_the_release_takes(module, names):
    fields = {field.name: field for field in dataclasses.fields(module.Options)}
    for name in names:
        found = re.search(r"(?:paper|release): ([\d.e-]+)", fields[name].metadata["help"])
        assert float(found[1]) == fields[name].default, name


def test_a_default_that_differs_from_them_is_what_the_readme_says():
    differs = README.split("## What differs")[1].split("\n## ")[0]
    for name, words in (("anchor", "an anchor, "), ("warmup", "warm-up "), ("lr", "learning rate "), ("beta", "β = ")):
        found = re.search(rf"^\| [^|]*{words}([\d.e-]+)", differs, re.MULTILINE)
        assert float(found[1]) == getattr(train.Options, name), name
    assert "| one negative drawn per sample and step |" in differs and train.Options.lose_per_step == 1
    assert train.Options.ema_every == 1 and "updated every step" in differs
    assert "A frame is taken every eighth of a second" in " ".join(README.split())
    assert data.Options.fps == sample.Options.fps == 8


@pytest.mark.parametrize("module", [data, sample, train])
def test_every_option_has_a_help_line(module, capsys):
    with pytest.raises(SystemExit):
        data.parse(module.Options, module.__name__, ["--help"])
    text = capsys.readouterr().out
    for field in dataclasses.fields(module.Options):   # the name, its values, and on the same line or the next a text
        flag = "--" + field.name.replace("_", "-")
        assert re.search(rf"^  {flag}\b[^\n]*?(\n {{20,}}|  +)[^-\s]", text, re.M), flag
        assert all(choice in text for choice in get_args(field.type)), field.name      # of a Literal


def test_a_missing_argument_is_called_by_its_name():
    with pytest.raises(SystemExit, match="required: folder"):
        data.parse(judge.Options, "toy.judge", [])


README = (REPO / "README.md").read_text()


@pytest.mark.parametrize("readme", ["README.md", "toy/README.md", "judging/README.md"])
def test_a_readme_links_to_what_exists(readme):
    links = re.findall(r"\]\((?!http)([^)#]+)", (REPO / readme).read_text())
    assert links
    for link in links:
        assert (REPO / readme).parent.joinpath(link).exists(), link


def test_the_readme_says_how_long_a_file_is_and_where_a_function():
    lines = dict(re.findall(r"^\| \[\S+\]\((\S+\.py)\) \| (\d+) \|", README, re.M))
    assert lines.keys() == {"realdpo.py", "model.py", "data.py", "sample.py", "train.py", "test_realdpo.py"}
    for file, count in lines.items():
        assert int(count) == pytest.approx(len((REPO / file).read_text().splitlines()), rel=0.03), file
    places = re.findall(r"`(\w+)`[^`\n]* \| \[(\w+\.py):(\d+)\]\(\2#L\3\)", README)
    assert len(places) > 6
    for name, file, line in places:
        assert re.match(rf" *(def|class) {name}\b", (REPO / file).read_text().splitlines()[int(line) - 1]), (name, file)


COMMANDS = {"data.py": data, "sample.py": sample, "train.py": train, "-m judging.curate": judging.curate,
            "-m judging.study": judging.study, "-m judging.tally": judging.tally, "-m judging.verdict": judging.verdict,
            "-m toy.judge": judge, "-m toy.curves": curves,
            "-m toy.make_model": make_model, "-m toy.experiment": experiment}


def test_the_readmes_give_commands_and_options_that_parse():
    text = README + (REPO / "toy" / "README.md").read_text() + (REPO / "judging" / "README.md").read_text()
    found = re.findall(r"(?:python|torchrun --nproc_per_node \d+) (-m \w+\.\w+|\w+\.py)"
                       r"((?: +(?:--?[\w-]+|\"[^\"\n]*\"|[\w./-]+))*)", text.replace("\\\n", ""))
    assert len(found) > 15
    for name, arguments in found:
        module = COMMANDS[name]
        data.parse(module.Options, module.__name__, shlex.split(arguments))
    known = {field.name for module in COMMANDS.values() for field in dataclasses.fields(module.Options)}
    for option in re.findall(r"(?<![\w-])--([a-z][\w-]*)", text):
        option = option.replace("-", "_").removeprefix("no_")
        assert option in known | {"help", "nproc_per_node", "shutdown_timeout", "index_url",
                                  "nnodes", "rdzv_backend", "rdzv_endpoint", "mode", "videos_path",
                                  "custom_image_folder", "dimension"}, option
