"""The build: sources belong to a hash, names with spaces reach the compiler, a source distribution is whole."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import types
from pathlib import Path

import pytest

from mgebm_fast import doctor, native, stamp
from mgebm_fast.errors import BackendError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def checkout(tmp_path):
    """A checkout in a path with spaces and a dollar, with one source each way."""
    root = tmp_path / "a checkout: 5 $x"
    root.mkdir()
    shutil.copytree(ROOT / "csrc", root / "csrc")
    (root / "mgebm_fast").mkdir()
    for name in ("setup.py", "pyproject.toml", "mgebm_fast/stamp.py", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, root / name)
    return root


def ninja(root: Path, *arguments: str) -> str:
    """What ninja would run for the checkout: its commands, none of them run."""
    program = (
        "import sys, types, setuptools; setuptools.setup = lambda **k: None\n"
        "import importlib.util\n"
        "spec = importlib.util.spec_from_file_location('setup_module', 'setup.py')\n"
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)\n"
        "from pathlib import Path\n"
        "text = module.NinjaBuild.ninja_file(None, Path('out put/_C.so').resolve())\n"
        "Path('build.ninja').write_text(text)\n"
        "import os, ninja, subprocess\n"
        "command = [os.path.join(ninja.BIN_DIR, 'ninja'), '-n', '-v']\n"
        "print(subprocess.run(command, capture_output=True, text=True).stdout)"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=root, capture_output=True, text=True, env={**os.environ, "MGEBM_CUDA": "0"}
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_paths_with_spaces_reach_the_compiler(checkout):
    commands = ninja(checkout)
    assert f"'-I{checkout}/csrc/include'" in commands
    assert f"-c '{checkout}/csrc/dispatch.cpp'" in commands
    assert f"-o '{checkout}/out put/_C.so'" in commands
    line = next(line for line in commands.splitlines() if "dispatch.cpp" in line)
    command = line.partition("] ")[2].replace("-c ", "-fsyntax-only ").replace(" -MMD -MF dispatch.o.d", "")
    assert subprocess.run(command.rpartition(" -o ")[0], shell=True, cwd=checkout).returncode == 0


OLD_NVCC = r"""#!/bin/sh
for word; do
    case $word in *.cu) grep -Eq 'at\[[0-9]{4,}\]' "$word" && echo 'Formal parameter space' >&2 && exit 1;; esac
done
"""


@pytest.mark.parametrize("editable", [True, False])
def test_an_editable_install_keeps_its_objects_and_replaces_whatever_module_is_there(checkout, editable):
    """A module that was copied from elsewhere is newer than all objects: ninja would take it for built."""
    (checkout / "_C.so").write_text("of another checkout")
    program = (
        "import sys, types, setuptools, subprocess; setuptools.setup = lambda **k: None\n"
        "import importlib.util\n"
        "spec = importlib.util.spec_from_file_location('setup_module', 'setup.py')\n"
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)\n"
        "module.subprocess = types.SimpleNamespace(check_call=lambda words: print(words[words.index('-C') + 1]))\n"
        f"build = types.SimpleNamespace(build_temp='temp', editable_mode={editable}, ninja_file=lambda target: '',\n"
        "    get_ext_fullpath=lambda name: '_C.so')\n"
        "module.NinjaBuild.build_extension(build, types.SimpleNamespace(name='_C'))"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=checkout, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    kept = f"build/native-{sys.implementation.cache_tag}"
    assert Path(run.stdout.strip()) == checkout / (kept if editable else "temp")
    assert not (checkout / "_C.so").exists()


def test_an_nvcc_or_an_architecture_that_is_too_old_is_refused(tmp_path, monkeypatch):
    """The resident chain has parameters of 9 KiB, and matrix products of 8.0."""
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    spec = importlib.util.spec_from_file_location("setup_module", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/nvcc").write_text(OLD_NVCC)
    (tmp_path / "bin/nvcc").chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("MGEBM_CUDA", "auto")
    found, reason = module.find_nvcc()
    assert found is None and reason.endswith("(12.1 or newer does): Formal parameter space")
    for archs in ("75", "7.0+PTX", "80;75"):
        monkeypatch.setenv("MGEBM_CUDA_ARCHS", archs)
        with pytest.raises(SystemExit, match="of 80 and newer, got '7"):
            module.target_flags()


def test_the_module_has_the_hash_of_its_sources(checkout):
    assert native.module().sources() == stamp.of_sources(ROOT / "csrc") == stamp.of_sources(checkout / "csrc")
    assert stamp.why_stale(ROOT / "mgebm_fast", native.module().sources()) == ""
    (checkout / "csrc/dispatch.cpp").write_text("// another\n")
    reason = stamp.why_stale(checkout / "mgebm_fast", native.module().sources())
    assert reason.endswith(f"Reinstall: pip install -e '{checkout}'")


def test_an_installed_copy_keeps_the_hash_beside_it(tmp_path):
    package = tmp_path / "mgebm_fast"
    package.mkdir()
    reason = stamp.why_stale(package, "abc")  # a copy of the folder alone: nothing to compare with
    assert "was copied, without _csrc.sha256" in reason and "Reinstall: pip install --force-reinstall" in reason
    (package / stamp.RECORD).write_text("abc\n")
    assert stamp.why_stale(package, "abc") == ""
    assert "Reinstall: pip install --force-reinstall" in stamp.why_stale(package, "abd")


def test_a_stale_module_is_an_error_that_says_what_to_run(monkeypatch):
    monkeypatch.setattr(native, "stale", "it was compiled from other sources. Reinstall: pip install -e /there")
    for use in (native.available, native.module):
        with pytest.raises(BackendError, match="is stale: .* Reinstall: pip install -e /there"):
            use()
    report = doctor.examine()
    assert not report["native"]["usable"] and "Reinstall: pip install -e /there" in doctor.render(report)


def test_an_unbuilt_source_tree_warns(checkout, monkeypatch):
    monkeypatch.setattr(native, "PACKAGE", checkout / "mgebm_fast")
    monkeypatch.setattr(native.importlib.util, "find_spec", lambda *_: None)
    with pytest.raises(ImportError, match="has none for this Python$") as error:
        native._load()
    with pytest.warns(RuntimeWarning, match="was not built.*pip install -e"):
        native._warn_of(error.value)


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda whole: whole[: len(whole) // 2], r"is cut short: \d+ of \d+ bytes"),
        (lambda whole: whole[:100], "is cut short: 100 of"),
        (lambda whole: whole[:3], "cannot be loaded: .*file too short"),
        (lambda whole: b"x" * 1000, "cannot be loaded: .*invalid ELF header"),
        (None, "has none for this Python, only _C.cpython-26.so"),
        (lambda whole: whole, "is not of mgebm_fast"),
    ],
)
def test_a_module_that_cannot_be_loaded_warns_once(damage, why, tmp_path, monkeypatch):
    whole = Path(native.module().__file__).read_bytes()
    file = tmp_path / ("_C.so" if damage else "_C.cpython-26.so")
    file.write_bytes(damage(whole) if damage else whole)
    spec = importlib.util.spec_from_file_location("mgebm_fast._C", file) if damage else None

    def load(*_):
        if file.read_bytes() == whole:
            return types.ModuleType("_C")  # of somebody else
        return importlib.util.module_from_spec(spec)

    monkeypatch.setattr(native, "PACKAGE", tmp_path)
    monkeypatch.setattr(native.importlib.util, "find_spec", lambda *_: spec)
    monkeypatch.setattr(native.importlib, "import_module", load)
    with pytest.raises(ImportError, match=why) as error:
        native._load()
    with pytest.warns(RuntimeWarning, match=f"cannot be used: .*{why}.*Reinstall: pip install"):
        native._warn_of(error.value)


def test_a_source_distribution_is_whole(checkout):
    text = (ROOT / "pyproject.toml").read_text()
    (checkout / "pyproject.toml").write_text(
        text[: text.index("[tool.setuptools]")] + "[tool.setuptools]\npackages = []\n"
    )
    shutil.copytree(ROOT / "kernels", checkout / "kernels")
    subprocess.run([sys.executable, "setup.py", "-q", "sdist"], cwd=checkout, check=True, capture_output=True)
    [archive] = (checkout / "dist").glob("*.tar.gz")
    names = {name.partition("/")[2] for name in tarfile.open(archive).getnames()}
    wanted = {
        path.relative_to(ROOT).as_posix() for folder in ("csrc", "kernels") for path in (ROOT / folder).rglob("*.*")
    }
    wanted = {name for name in wanted if "__pycache__" not in name}
    assert wanted <= names and "setup.py" in names
