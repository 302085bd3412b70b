"""The documents are true: their code runs, their commands exist, their tables are those of the code."""

from __future__ import annotations

import io
import re
import runpy
import shlex
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.main import get_command
from typer.testing import CliRunner

import mgebm_fast as mg
from mgebm_fast.cli import app
from mgebm_fast.cli.presets import _toml
from mgebm_fast.learning import apply_overrides, describe_keys, load_preset, preset_names
from mgebm_fast.ops.backend import TABLE

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = ROOT / "docs"
GROUP = get_command(app)
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md"))]


def fenced(text: str) -> list[tuple[str, str]]:
    """(language, code) of every fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def code_blocks(text: str, language: str) -> list[str]:
    return [code for found, code in fenced(text) if found == language]


def table(page: str, header: str) -> list[list[str]]:
    """The cells of the table of docs/`page` whose first header cell is `header`."""
    lines = iter((DOCS / page).read_text(encoding="utf-8").splitlines())
    for line in lines:
        if line.startswith(f"| {header} |"):
            break
    else:
        raise AssertionError(f"no table of {header}")
    next(lines)
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return rows


def shell_commands(text: str) -> list[list[str]]:
    """Every `mgebm …` of shell text, as words: continued lines joined, comments and what follows a pipe left out."""
    lines = [line.strip().removeprefix("$ ") for line in text.replace("\\\n", " ").splitlines()]
    found = [command for line in lines for command in re.findall(r"(?:^|&& |; do )(mgebm [a-z-][^|&;>]*)", line)]
    return [shlex.split(command, comments=True)[1:] for command in found]


def commands(text: str) -> tuple[list[list[str]], list[list[str]]]:
    """The commands of a page's blocks, fenced or indented, which are whole, and those named in its sentences."""
    indented = "\n".join(re.findall(r"^    (mgebm .*)$", text, re.MULTILINE))
    blocks = "\n".join([*code_blocks(text, ""), indented])
    return shell_commands(blocks), [shlex.split(words)[1:] for words in re.findall(r"`(mgebm [a-z][^`\n]*)`", text)]


def test_the_loop_and_the_call_are_the_same_chain():
    """The page's example runs, and with the call's own noise in place of randn the loop gives the call's samples."""
    (code,) = code_blocks((DOCS / "migrating.md").read_text(encoding="utf-8"), "python")
    before, after = code.split("# after\n")
    torch.manual_seed(0)
    names: dict = {}
    exec(before.replace("torch.randn_like(y)", "mg.ops.noise(y.shape, seed=0, step=step)"), names)
    loop = names["y"]
    seeded = after.replace("clamp=(0, 1))", 'clamp=(0, 1), seed=0, precision="fp32")')
    assert seeded != after
    exec(seeded, names)
    assert not torch.equal(loop, names["x"])
    torch.testing.assert_close(names["y"], loop, rtol=0, atol=1e-5)


def test_the_readme_is_short_and_its_code_runs():
    (code,) = code_blocks(README, "python")
    statements = [line for line in code.splitlines() if line and not line.startswith("#")]
    assert len(statements) <= 10 and len(README.splitlines()) <= 100
    names: dict = {}
    exec(code, names)
    assert names["pictures"].shape == (16, 1, 8, 8) and names["pictures"].dtype == torch.uint8
    assert names["energies"].shape == (16,) and names["x"].shape == (8, 3, 32, 32)


BLOCKS = [
    pytest.param(code, id=f"{path.relative_to(ROOT)}-{number}")
    for path in DOCUMENTS
    for number, code in enumerate(code_blocks(path.read_text(encoding="utf-8"), "python"))
    if path.name != "README.md" or path.parent != ROOT  # run above
]


@pytest.mark.parametrize("code", BLOCKS)
def test_every_block_of_code_runs_as_it_is_pasted(code, tmp_path, monkeypatch):
    if "split_rhat" in code:
        pytest.importorskip("arviz")  # of the extra `diagnostics`, as the page says
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mgebm_fast.benchmarks.run.matrix_rate", lambda device, precision: 1e12)  # seconds to measure
    exec(compile(code, "block", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#\s]+)", path.read_text(encoding="utf-8")):
        if not target.startswith("https://"):
            assert (path.parent / target).exists(), f"{path.name}: {target}"


def parse(words: list[str]) -> None:
    """What `mgebm WORDS` means is taken apart as the program does, and not run; --set and presets are looked at too."""
    command = GROUP.commands[words[0]]
    parsed = command.make_context(words[0], words[1:]).params
    if words[0] == "train" and "$" not in (parsed["config"] or "$") and not (parsed["config"] or "").endswith(".toml"):
        apply_overrides(load_preset(parsed["config"]), parsed["settings"] or ())


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_commands_parse(path):
    whole, named = commands(path.read_text(encoding="utf-8"))
    for words in whole:
        parse(words)
    for words in named:  # parts of commands, with places such as RUN and PRESET
        name = words[0]
        if name == "COMMAND":
            continue
        assert name in GROUP.commands, f"{path.name}: mgebm {name}"
        options = {option for parameter in GROUP.commands[name].params for option in parameter.opts}
        for word in words[1:]:
            assert not word.startswith("--") or word == "--help" or word in options, f"{path.name}: {words}"
        if name == "train" and len(words) > 1 and re.fullmatch(r"[a-z][a-z0-9-]*", words[1]):
            assert words[1] in preset_names(), f"{path.name}: {words}"


LONG = re.compile(
    r"(?:^|\s)(?:mgebm (?:train|compare|classify|bench|evaluate|diagnose|inpaint)|torchrun) ", re.MULTILINE
)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_what_takes_long_says_how_long(path):
    """Every section with a block of commands that train or measure says what time that takes."""
    for section in re.split(r"^(?=##? )", path.read_text(encoding="utf-8"), flags=re.MULTILINE):
        blocks = code_blocks(section, "") + re.findall(r"^    (?:mgebm|torchrun) .*$", section, re.MULTILINE)
        if any(LONG.search(block) for block in blocks):
            title = section.partition("\n")[0]
            assert re.search(r"\b(seconds?|minutes?|min|hours?)\b", section), f"{path.name}: {title}"


@pytest.mark.parametrize("name", sorted(GROUP.commands))
def test_the_examples_of_the_help_parse(name):
    text = GROUP.commands[name].help
    examples = shell_commands(re.sub(r"(?<=\S)   +\S.*", "", text))
    assert examples or name in ("doctor", "presets")
    for words in examples:
        parse(words)


def test_the_readme_has_the_two_commands(tmp_path, monkeypatch):
    """The first needs nothing but the installation: a picture of the model that comes with the package."""
    first, second = code_blocks(README, "")[0].splitlines()
    assert first.startswith("pip install -e . && mgebm sample digits") and second.startswith("mgebm train digits")
    monkeypatch.chdir(tmp_path)
    (words,) = shell_commands(first)
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0 and (tmp_path / "digits.png").is_file(), result.output
    # .ci/run runs this very line
    assert 'pip install -e ".[test]" && pytest' in README.splitlines()


def test_the_op_table_is_that_of_the_code():
    rows = {cells[0].strip("`"): cells[1:] for cells in table("ops.md", "op")}
    assert rows.keys() == TABLE.keys()
    for op, (reference, *others) in rows.items():
        layers = TABLE[op]
        assert reference == "yes"
        assert [cell == "yes" for cell in others] == [layers.cpu, layers.cuda, layers.triton], op


def test_the_preset_table_is_complete():
    assert [cells[0].strip("`") for cells in table("configuration.md", "preset")] == preset_names()


def test_the_environment_table_is_complete():
    """Every MGEBM_* variable that Python reads is in the table, and no other."""
    sources = [ROOT / "setup.py", *(ROOT / "mgebm_fast").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    pattern = re.compile(r"environ(?:\.get\(|\[)\"(MGEBM_\w+)\"")
    read = {name for path in sources for name in pattern.findall(path.read_text(encoding="utf-8"))}
    assert {cells[0].strip("`") for cells in table("cli.md", "variable")} == read


def test_the_run_folder_table_is_what_commands_leave(tmp_path):
    settings = "steps=300 langevin.steps=1 batch_size=2 width=0.05 sizes=1,2 sample_every=300 checkpoint_every=300"
    words = [word for setting in settings.split() for word in ("--set", setting)]
    result = CliRunner().invoke(app, ["train", "digits", *words, "--out", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    (tmp_path / "run" / "evaluations.jsonl").touch()  # of `mgebm evaluate --record`, not of training
    named = [name.rstrip("/") for cells in table("cli.md", "file") for name in re.findall(r"`([^`]+)`", cells[0])]
    for name in named:
        assert (tmp_path / "run" / name).exists(), name
    assert {name.split("/")[0] for name in named} == {path.name for path in (tmp_path / "run").iterdir()}


def test_the_key_table_is_that_of_the_code():
    rows = [[cell.replace("\\|", "|") for cell in cells] for cells in table("configuration.md", "key")]
    assert rows == [[f"`{key}`", f"`{_toml(default)}`", kind, doc] for key, kind, default, doc in describe_keys()]


def test_the_examples_run(tmp_path, monkeypatch, capsys):
    runpy.run_path(str(ROOT / "examples" / "replace_a_loop.py"), run_name="__main__")
    differences = re.findall(r"against .*: (\S+) apart", capsys.readouterr().out)
    assert len(differences) == 2 and all(float(difference) < 1e-3 for difference in differences)

    arguments = ["train_on_folder.py", "texture:grass", "--steps", "2", "--batch", "4", "--out", str(tmp_path / "run")]
    monkeypatch.setattr("sys.argv", arguments)
    runpy.run_path(str(ROOT / "examples" / "train_on_folder.py"), run_name="__main__")
    assert (tmp_path / "run" / "samples.png").is_file()


def test_a_zip_of_class_folders_is_made_of_labelled_images(tmp_path, monkeypatch):
    """The script behind README's cifar10.zip: every training image, in the folder of its class."""
    out = tmp_path / "digits.zip"
    monkeypatch.setattr("sys.argv", ["cifar10_zip.py", "digits", str(out), "--size", "8"])
    runpy.run_path(str(ROOT / "scripts" / "cifar10_zip.py"), run_name="__main__")
    given = mg.data.load("digits", size=8, channels=3)
    made = [mg.data.load(str(out), size=8, channels=3, split=split) for split in ("train", "held_out")]
    assert sum(map(len, made)) == len(given) and list(made[0].class_names) == list(given.class_names)
    assert sum(int(part.images.astype("int64").sum()) for part in made) == int(given.images.astype("int64").sum())
    assert [path.name for path in tmp_path.iterdir()] == ["digits.zip"]


def test_a_zip_of_class_folders_is_made_of_tiny_imagenet(tmp_path, monkeypatch, capsys):
    """The script behind the gallery's tiny.zip: the training images of the classes asked for, as they are."""
    archive, out = tmp_path / "tiny-imagenet-200.zip", tmp_path / "tiny.zip"
    pixels = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    encoded = [io.BytesIO() for _ in pixels]
    for image, file in zip(pixels, encoded, strict=True):
        Image.fromarray(image).save(file, format="jpeg")
    with zipfile.ZipFile(archive, "w") as made:
        made.writestr("tiny-imagenet-200/words.txt", "n09193705\talp")
        for wnid, number, file in zip(("n09193705", "n09193705", "n01443537"), (0, 1, 0), encoded, strict=True):
            made.writestr(f"tiny-imagenet-200/train/{wnid}/images/{wnid}_{number}.JPEG", file.getvalue())
        made.writestr("tiny-imagenet-200/val/images/val_0.JPEG", encoded[0].getvalue())

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["tiny_imagenet_zip.py", str(archive), str(out), *arguments])
        runpy.run_path(str(ROOT / "scripts" / "tiny_imagenet_zip.py"), run_name="__main__")

    with pytest.raises(SystemExit):
        run()
    assert "without ['albatross'" in capsys.readouterr().err and [path.name for path in tmp_path.iterdir()] == [
        archive.name
    ]
    run("--classes", "n09193705=alp", "n01443537=goldfish")
    with zipfile.ZipFile(out) as made:
        names = ["alp/n09193705_0.jpg", "alp/n09193705_1.jpg", "goldfish/n01443537_0.jpg"]
        assert {name: made.read(name) for name in made.namelist()} == {
            name: file.getvalue() for name, file in zip(names, encoded, strict=True)
        }


def test_public_names_are_those_of_the_design():
    for name in ("langevin_sample", "Langevin", "EnergyNet", "MultiGrid", "MultiGridTrainer"):
        assert callable(getattr(mg, name))
    for name in mg.__all__:
        assert getattr(mg, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'langevin'"):
        _ = mg.langevin
