"""scripts/gpu_check.sh with a Python that only notes what it is asked for, and the tables of what it leaves."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
STUB = r"""#!/usr/bin/env bash
echo "$*" >>"$CALLS"
case "$1 $3" in
    "-c "*) exec "$REAL" "$@" ;;
    *" evaluate") echo '{"kid": 0.5}'; exit ;;
esac
folder=""
while (($#)); do
    case $1 in
        --out) folder=$2 ;;
        *gpu_tables.py) exec "$REAL" "$@" ;;
        *gpu_smoke.py) exit "${SMOKE:-0}" ;;
    esac
    shift
done
if [ -n "$folder" ]; then
    mkdir -p "$folder/samples"
    echo 'batch_size = 64' >"$folder/config.toml"
    echo '{"step": 7, "size_2/gap": 0.25, "seconds_per_update": 0.002}' >"$folder/metrics.jsonl"
    touch "$folder/samples/7.png"
fi
"""
TOOL = r"""#!/usr/bin/env bash
echo "${0##*/} $*${OUT:+ and writes results}" >>"$CALLS"
case "${0##*/} $*" in
    *--help*) echo "  --kernel-name" ;;
    *racecheck*edge_step*) exit 9 ;;
    *ncu*) while (($#)); do if [ "$1" = --log-file ]; then echo measured >"$2"; fi; shift; done ;;
esac
"""


def run(folder: Path, what: str, *tools: str, **variables: str) -> tuple[int, list[str], list[dict], str]:
    """(exit status, calls of Python, lines of results.jsonl, output)"""
    stub = folder / "python"
    for name, text in (("python", STUB), *((tool, TOOL) for tool in tools)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    (folder / "calls").write_text("")
    out = folder / "out"
    given = {"PYTHON": str(stub), "REAL": sys.executable, "CALLS": str(folder / "calls"), "OUT": str(out),
             "PATH": f"{folder}:{os.environ['PATH']}", **variables}  # fmt: skip
    done = subprocess.run(
        ["bash", "scripts/gpu_check.sh", what], cwd=ROOT, env={**os.environ, **given}, capture_output=True, text=True,
        timeout=60,
    )  # fmt: skip
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    return done.returncode, (folder / "calls").read_text().splitlines(), lines, done.stdout


def test_results_lie_flat_and_are_few(tmp_path):
    status, _, lines, said = run(tmp_path, "all", "ncu", DEVICE="cuda")
    assert status == 0, said
    left = sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*"))
    assert len(left) <= 8 and not [name for name in left if "/" in name], left
    assert {line["status"] for line in lines if line["part"] == "run"} == {"done"}
    assert "## Parts" in said and "not measured" in said  # the tables, with what there is no figure of
    assert (tmp_path / "out/log.txt").read_text() == said  # to the last line
    assert said.splitlines()[-1].startswith("all in ")
    assert [line for line in lines if line["part"] == "evaluate"] == [
        {"part": "evaluate", "name": name, "kid": 0.5} for name in ("digits", "grid64")
    ]
    assert "## Training grid64: 7 updates, 2 ms an update, 32,000 images a second" in said


def test_the_memory_checker_and_the_profiler_take_the_package_s_kernels_by_name(tmp_path):
    status, calls, lines, said = run(tmp_path, "first", "compute-sanitizer", DEVICE="cuda")
    found = {line["name"]: line["status"] for line in lines if line["part"] == "run"}
    assert status == 1 and found["sanitizer"] == "failed with 1" and found["racecheck edge"] == "failed with 9"
    assert found["memcheck edge"] == found["racecheck resident"] == "done"
    checked = [call for call in calls if "--tool memcheck" in call]
    names = {call.split("kns=")[1].split()[0] for call in checked}
    assert len({call.split("--port ")[1].split()[0] for call in calls if "--port" in call}) == 8
    _, calls, _, _ = run(tmp_path, "second", "ncu", DEVICE="cuda")
    names |= {call.split("regex:")[1].split()[0] for call in calls if call.startswith("ncu")}
    assert not [call for call in calls if "gpu_smoke.py" in call and "writes results" in call]
    kernels = "".join(path.read_text() for path in [*ROOT.glob("kernels/*.py"), *ROOT.glob("csrc/**/*.cu")])
    assert len(names) == 5 and all(name in kernels for name in names), names


def test_it_builds_without_a_network_and_smoke_comes_before_all_else(tmp_path):
    _, calls, lines, _ = run(tmp_path, "first", DEVICE="cuda")
    (build,) = [call for call in calls if "pip install" in call]
    assert "--no-index" in build and "--no-build-isolation" in build and "--no-deps" in build
    assert [line["name"] for line in lines if line["part"] == "run"][:4] == ["build", "doctor", "smoke", "train digits"]


def test_what_fails_is_said_and_the_rest_goes_on(tmp_path):
    status, _, lines, _ = run(tmp_path, "first", DEVICE="cuda", SMOKE="1")
    found = {line["name"]: line["status"] for line in lines if line["part"] == "run"}
    assert status == 1 and found["smoke"] == "failed with 1" and found["chains"] == "done"


def test_no_part_begins_without_time(tmp_path):
    status, _, lines, _ = run(tmp_path, "first", DEVICE="cpu", BUDGET="3")
    assert status == 0 and {line["status"] for line in lines} == {"no time left", "nothing to evaluate"}


def test_smoke_lines_have_the_worst_share_of_a_bound_and_what_is_only_noted(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DEVICE", "cpu")
    monkeypatch.setenv("OUT", str(tmp_path))
    spec = importlib.util.spec_from_file_location("gpu_smoke", ROOT / "scripts/gpu_smoke.py")
    smoke = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(smoke)
    smoke.GROUPS["tried"] = [
        lambda: iter([("near", 0.25, 0.5), ("other bits", 0.9, smoke.NOTED)]),
        lambda: iter([("other bits", 0.9, smoke.NOTED), ("far", float("nan"), 0.5), ("not reached", 0.0, 0.5)]),
    ]
    assert smoke.run("tried") == 1
    good, bad = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert good["ok"] and good["share_of_bound"] == 0.5 and good["noted"] == "other bits: 0.9"
    assert not bad["ok"] and "far: off by nan, at most 0.5" in bad["said"] and bad["noted"] == "other bits: 0.9"
    assert "     other bits: 0.9" in capsys.readouterr().out


def test_tables_take_what_there_is(tmp_path):
    (tmp_path / "results.jsonl").write_text(
        '{"part": "run", "name": "build", "status": "done", "seconds": 40}\n'
        '{"part": "smoke", "group": "edge", "check": "edge_step", "ok": false, "said": "off by 1 | 2"}\n'
        '{"part": "smoke", "gro'  # cut short
    )
    (tmp_path / "bench.csv").write_text(
        "# chains chains.csv\ncase,contender,ms,explain,device,torch,precision,ceiling_gflops\n"
        '64,mgebm_auto,1.51234,"chain: 9 steps\ngradient: resident\ngraph: replayed",GPU,2.11,fp16,790000\n'
        "# ops ops.csv\nop,ours_us,gb_per_s,percent_of_copy,device,torch\nnoise,15605.5,3,50,GPU,2.11\n"
        "# kernels kernels.csv\ncase,batch,norm,device,place,kernel,us\n16,1056,batch,GPU,0,gemm,2\n"
        "16,1056,batch,GPU,1,edge_step_kernel,7\n"
        "# compiled chains.csv\ncase,contender,ms,explain,device,torch,precision,ceiling_gflops\n"
        "64,compile_bf16,2.5,,GPU,2.11,bf16,790000\n"
    )
    command = [sys.executable, "scripts/gpu_tables.py", tmp_path, tmp_path / "results"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for words in (
        "| build | done | 40 |",
        "## Smoke test: 1 failures",
        "| edge | edge_step | no | off by 1 \\| 2 |",
        "| 64 | mgebm_auto | fp16 | 1.512 |",
        "- 64: gradient: resident; graph: replayed",
        "| noise | 15606 | 3 | 50 |",
        "| GPU | 2.11 | 790000 | 6 | 790000 |",
        "| 16 | 1056 | 2 | 9 | edge_step_kernel 7.0, gemm 2.0 |",
        "not measured",
    ):
        assert words in done.stdout
    kept = sorted(path.relative_to(tmp_path / "results").as_posix() for path in (tmp_path / "results").rglob("*.csv"))
    assert kept == ["gpu/chains.csv", "gpu/kernels.csv", "gpu/ops.csv"]
    assert [
        row.split(",")[1] for row in (tmp_path / "results/gpu/chains.csv").read_text().splitlines() if "64," in row
    ] == [
        "mgebm_auto",
        "compile_bf16",
    ]
