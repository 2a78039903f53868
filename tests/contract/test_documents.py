"""The tables in docs/ name every test, and every test is in them."""

import csv
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from test_bad_input import BAD_ARGUMENTS, BAD_COMMANDS, BAD_DATA, BAD_ENVIRONMENT
from tiny_trainers import every_trainer

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import pseudo_labels
import ruler
import step_time

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def collected(request):
    """Every test there is, as folder/file::function[parameters]."""
    names, options = [item.nodeid for item in request.session.items], request.config.option
    files = {f"tests/{file.relative_to(TESTS)}" for file in TESTS.rglob("test_*.py")}
    chosen = options.keyword or options.markexpr or options.deselect
    if chosen or {name.partition("::")[0] for name in names} != files:
        command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", str(TESTS)]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=300, cwd=TESTS.parent)
        names = [line for line in done.stdout.splitlines() if "::" in line]
    return {name.removeprefix("tests/") for name in names}


def test_the_table_names_a_test_for_every_trainer_and_feature(collected):
    by_function = {}  # file::function to the sets of its parameters
    for name in collected:
        function, _, parameters = name.partition("[")
        by_function.setdefault(function, []).append(set(parameters.rstrip("]").split("-")))
    lines = (TESTS.parent / "docs" / "compatibility.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    trainers = rows[0][2:]
    assert {f"nnUNetTrainer{name}" for name in trainers} == {t.__name__ for t in every_trainer()}
    named = set()
    for _, test, *cells in (row for row in rows if "::" in row[1]):
        test = test.strip("`")
        named.add(test)
        assert test in by_function, f"{test} does not exist"
        source = (
            (TESTS / test.partition("::")[0])
            .read_text(encoding="utf-8")
            .partition(f"def {test.partition('::')[2]}(")[2]
        )
        assert len(cells) in (0, len(trainers))
        for name, cell in zip(trainers, cells, strict=False):
            assert cell in ("yes", "refused")
            assert any(f"nnUNetTrainer{name}" in parameters for parameters in by_function[test]), f"{test}: {name}"
            if cell == "refused":
                assert "pytest.raises(NotImplementedError" in source.partition("\n\n\n")[0]
    own = {test for test in by_function if test.startswith("contract/test_compatibility.py")}
    assert own <= named


def test_the_table_names_every_mistake_its_message_and_its_test(collected):
    lines = (TESTS.parent / "docs" / "bad_input.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    rows = [row for row in rows if "::" in row[-1]]
    named = {}
    for mistake, message, test in rows:
        test = test.strip("`")
        assert mistake
        assert test in collected or any(name.startswith(f"{test}[") for name in collected), f"{test} does not exist"
        named[test] = message
    tables = {
        "test_data": {key: words for key, (_, words) in BAD_DATA.items()},
        "test_arguments": {key: words for key, (_, words) in BAD_ARGUMENTS.items()},
        "test_environment": {key: words for key, (_, words) in BAD_ENVIRONMENT.items()},
        "test_commands": {key: re.escape(words) for key, (_, _, words) in BAD_COMMANDS.items()},
    }
    for function, table in tables.items():
        for key, words in table.items():
            test = f"contract/test_bad_input.py::{function}[{key}]"
            assert test in named, f"docs/bad_input.md lacks {test}"
            assert re.search(words, named[test]), f"docs/bad_input.md: the message of {test} has no {words!r}"
    own = {name.partition("[")[0] for name in collected if name.startswith("contract/test_bad_input.py")}
    others = ("any_json", "any_bytes", "deep_json")
    missing = own - {test.partition("[")[0] for test in named}
    assert not [name for name in missing if not any(other in name for other in others)]


def former_left_atrium(results):
    """Mean Dice of every trainer of the earlier script: 8 labels, 4,000 steps, seed 0; float32 where there is both."""
    dice = {}
    for table in (results / "la_quick_bf16.csv", results / "la_quick.csv"):
        with table.open(encoding="utf-8") as f:
            rows = [row for row in csv.DictReader(f) if row["network"] == "student"]
        kind = {"fold": "0", "labeled": "8", "steps": "4000", "seed": "0"}
        rows = [row for row in rows if all(row[key] == value for key, value in kind.items())]
        for name in {row["trainer"] for row in rows}:
            dice[name] = statistics.mean(float(row["dice"]) for row in rows if row["trainer"] == name)
    return dice


ALONE = {  # settings of a row of one phase, and the mark of its footnote
    "": "",
    ", supervised_part=0.0": "",
    ", pseudo_dice=True, pseudo_weight=0.5, rampup=0.0": "²",
}


def test_the_table_of_methods_has_every_trainer_with_its_paper_cost_and_dice():
    root = TESTS.parent
    lines = (root / "docs" / "methods.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    table = {row[0]: row[1:] for row in rows if len(row) == 9 and set(row[0]) != {"-"}}
    header = table.pop("trainer `nnUNetTrainer...")
    times = (root / "benchmarks" / "results" / "step_time_3d_fullres_quick_cpu.md").read_text(encoding="utf-8")
    measured = {task: ruler.read(task, "test") for task in header[-2:]}
    former = former_left_atrium(root / "benchmarks" / "results")
    trainers = [t.__name__ for t in every_trainer() if not t.__name__.endswith("Paper")]
    assert {*trainers} <= step_time.PASSES.keys()
    assert table.keys() == {name.removeprefix("nnUNetTrainer") for name in step_time.PASSES} | {"nnUNetTrainer"}
    for short, (paper, idea, _, passes, cost, _, *dice) in table.items():
        name = short if short == "nnUNetTrainer" else f"nnUNetTrainer{short}"
        assert len(idea.split()) <= 10
        if name in trainers:
            first = (root / "trainers" / f"{name}.py").read_text(encoding="utf-8").partition("\n")[0]
            ids = re.findall(r"\d{4}\.\d{5}", first)
            assert list(dict.fromkeys(re.findall(r"\d{4}\.\d{5}", paper))) == ids, name
            assert ids or paper.startswith("none") or re.search(r"20\d\d", paper).group() in first, name
        if name in step_time.PASSES:
            assert passes.split(",")[0] == "{} + {}".format(*step_time.PASSES[name]), name
            step = re.search(rf"\| {name} \|.*?\|.*?\| ([\d.]+) \(", times)
            assert bool(step) == bool(cost), name
            assert not step or float(cost.split(",")[0]) == pytest.approx(float(step.group(1)), abs=0.06), name
        for task, cell in zip(header[-2:], dice, strict=True):
            method = "supervised" if name == "nnUNetTrainer" else name
            rows = [(measured[task].get(f"{method}{settings}, alone"), mark) for settings, mark in ALONE.items()]
            found = [f"{scores.dice([0]).mean():.1f}{mark}" for scores, mark in rows if scores is not None]
            found += [f"{former[name]:.1f}¹"] if task == "LA-8" and name in former else []
            assert cell == (found[0] if found else ""), f"{name}, {task}"


GAINS = {  # rows of the README's table
    "left atrium, 8 labeled scans": ("LA-8", ""),
    "left atrium, 8, 20,000 steps": ("LA-8", "num_epochs=64"),
    "left atrium, 4 labeled scans": ("LA-4", ""),
    "left atrium, 4, 20,000 steps": ("LA-4", "num_epochs=64"),
    "ACDC, 7 labeled patients": ("ACDC-7", ""),
    "ACDC, 7, 12,500 steps": ("ACDC-7", "num_epochs=40"),
    "ACDC, 3 labeled patients": ("ACDC-3", ""),
    "ACDC, 3, 12,500 steps": ("ACDC-3", "num_epochs=40"),
}


def test_the_gains_of_the_readme_are_those_of_the_measured_cases():
    lines = (TESTS.parent / "README.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    table = {row[0]: row[1:] for row in rows if row[0] in GAINS}
    assert table.keys() == GAINS.keys()
    for name, (task, length) in GAINS.items():
        measured = ruler.by_length(task, "test")[length]
        reference = ruler.by_length(ruler.REFERENCE[task], "test")[length]["supervised"]
        methods = [measured.get(row) for row in ("supervised", "self-training")]
        methods.append(measured.get(ruler.RECOMMENDED) or measured["nnUNetTrainerM3HL"])  # or after a supervised one
        for cell, scores in zip(table[name], [*methods, reference], strict=True):
            seeds = [seed for seed in scores.seeds if seed in methods[-1].seeds] if scores else []
            means = scores and [scores.dice(seeds, metric).mean() for metric in ("dice", "dice_largest")]
            values = [float(value) for value in re.findall(r"[\d.]+", cell)]
            assert values == pytest.approx(means or [], abs=0.0501), name


def test_every_row_of_the_results_is_a_measured_row():
    root, measured = TESTS.parent, set()
    for file in (root / "benchmarks" / "results").glob("*-*.md"):
        for line in file.read_text(encoding="utf-8").splitlines():
            if caption := re.search(r"cost in supervised trainings|num_epochs=\d+", line.partition("|")[0]):
                longer = caption.group().startswith("num_epochs")
            cells = [re.sub(r" \(\d+\)|, better on \d+", "", cell.strip()) for cell in line.strip("|").split("|")]
            if len(cells) == 10:
                cost, dice, seeds, gap, against = (cells[place] for place in (1, 2, 3, 6, 7))
                for last in (against, ", ".join(filter(None, cells[8:]))):  # with another training, or postprocessed
                    measured.add((file.stem, longer, cost, dice, seeds, gap, last))
    task, rows = None, {}
    for line in (root / "docs" / "results.md").read_text(encoding="utf-8").splitlines():
        if not line.startswith("|"):
            task = None
            continue
        name, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        if head := re.match(r"(left atrium|ACDC), (\d+) labeled", name):
            task = (f"{'LA' if head[1] == 'left atrium' else 'ACDC'}-{head[2]}", "in the second phase" in name)
        elif task and len(cells) == 5 and name.strip("-"):
            cost, dice, seeds, gap, last = cells
            assert (*task, cost, dice, seeds or dice, gap, last) in measured, line
            rows[task] = rows.get(task, 0) + 1
    assert rows.keys() == {(task, bool(length)) for task, length in GAINS.values()}
    assert min(rows.values()) >= 4  # supervised training, self-training, M3HL, all labels


def test_what_is_said_of_the_gap_is_measured():
    results = TESTS.parent / "benchmarks" / "results"
    text = (TESTS.parent / "docs" / "results.md").read_text(encoding="utf-8").partition("## What is left of the gap")[2]
    table, prose = text.partition("So a long second phase")[::2]
    prose = " ".join(prose.split())
    tables = [(results / f"{task}.md").read_text(encoding="utf-8") for task in ("LA-4", "ACDC-3")]
    found = 0
    for line in table.splitlines():
        for cell, measured in zip(line.strip("|").split("|")[1:], tables, strict=False):
            for percent in re.findall(r"\d+", cell) if cell.endswith(" % ") else ():
                assert f"| {percent} % (" in measured, line
                found += 1
    assert found == 22
    ends = []
    for task, row in pseudo_labels.AFTER.items():
        before, after = (pseudo_labels.read_dice(task, name) for name in (pseudo_labels.BEFORE, row))
        worst = sorted(before, key=before.get)[: pseudo_labels.HARD]
        means = [statistics.mean(dice[case] for case in worst) for dice in (before, after)]
        assert "from {:.0f} to {:.0f}".format(*means) in prose
        ends.append(statistics.mean(after.values()))
    assert "it ends at {:.0f} and {:.0f},".format(*ends) in prose
