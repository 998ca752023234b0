"""Which classes `msf sample` makes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from models import tiny_model
from msf.cli import main
from msf.cli.labels import choose, class_number, of_classes, of_numbers, split_labels


def test_labels_are_numbers_or_names(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(workspace / "run", run)
    values = json.loads((run / "training.json").read_text())
    values["class_names"] = ["ant", "bee", "cat", *"3456789"]
    (run / "training.json").write_text(json.dumps(values))
    command = ["sample", str(run), "--json", "--out", str(tmp_path / "x.png"), "--overwrite"]
    assert main([*command, "--labels", "cat,1,10,ant"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["labels"] == [2, 1, 10, 0] and made["classes"] == [
        "cat",
        "bee",
        None,
        "ant",
    ]
    assert main([*command, "--labels", "dog"]) == 2
    assert capsys.readouterr().err == (
        "msf sample: --labels: no class is named or numbered 'dog'; "
        "choose from ant, bee, cat and 7 more, or 0 to 9, or 10 for no class\n"
    )
    command.remove("--json")
    assert main([*command, "--num-images", "12"]) == 0
    assert capsys.readouterr().out.endswith(" seeds 0 to 11, classes ant, bee, cat and 7 more\n")
    assert main(["inspect", str(run)]) == 0
    assert "0 ant, 1 bee, 2 cat, 3 3" in capsys.readouterr().out
    (run / "training.json").unlink()
    assert main([*command, "--labels", "cat"]) == 2
    assert capsys.readouterr().err.endswith("'cat'; choose from 0 to 9, or 10 for no class\n")
    assert main([*command, "--num-images", "1"]) == 0
    assert capsys.readouterr().out.endswith(" seeds 0 to 0\n")


def test_a_name_wins_over_a_number() -> None:
    names = ["1", "2", "3"]
    assert [class_number(label, names, 3) for label in ("1", "3", "0")] == [0, 2, 0]
    with pytest.raises(ValueError, match="no class is named or numbered '4'; choose from 1, 2, 3,"):
        class_number("4", names, 3)


def test_a_class_may_have_a_comma_in_its_name() -> None:
    names = ["a", "a,b", "c", "d,e,f"]
    split = {
        "d,e,f": ["d,e,f"],
        "a,b,a": ["a,b", "a"],
        "c,a,b": ["c", "a,b"],
        "a,c,b": ["a", "c", "b"],
        "": [""],
    }
    assert {text: list(split_labels(text, names)) for text in split} == split


@pytest.mark.parametrize("names", [["a", "b", "a,b,c", "c"], ["a,b", "a,b,c", "c"]])
def test_a_name_whose_parts_are_names_is_ambiguous(names: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        list(split_labels("c,a,b,c", names))
    assert str(error.value) == (
        '--labels: "a,b,c" is ambiguous, it is a class and its parts are classes too; '
        f"give their numbers, {names.index('a,b,c')} for the former"
    )
    assert list(split_labels("c,0", names)) == ["c", "0"]


def test_names_that_need_it_are_quoted(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(workspace / "run", run)
    values = json.loads((run / "training.json").read_text())
    values["class_names"] = ["(no class)", "", "a,b", 'say "c"', *"456789"]
    (run / "training.json").write_text(json.dumps(values))
    assert main(["inspect", str(run)]) == 0
    assert r'0 "(no class)", 1 "", 2 "a,b", 3 "say \"c\"", 4 4' in capsys.readouterr().out
    command = ["sample", str(run), "--overwrite", "--out", str(tmp_path / "x.png"), "--labels"]
    assert main([*command, "0,10"]) == 0
    assert capsys.readouterr().out.endswith(', classes "(no class)", (no class)\n')
    assert main([*command, "b"]) == 2
    assert 'choose from "(no class)", "", "a,b" and 7 more, or 0' in capsys.readouterr().err


def test_a_label_is_a_function_of_its_number() -> None:
    classes = torch.tensor([5, 7, 9])
    in_turn = of_numbers(range(10, 16), classes, drawn=False)
    assert in_turn is not None and in_turn.tolist() == [7, 9, 5, 7, 9, 5]
    drawn = of_numbers(range(3000), classes, drawn=True)
    again = of_numbers([2**63 + 5, 2000, 7], classes, drawn=True)
    assert drawn is not None and again is not None
    assert again[1:].tolist() == [drawn[2000], drawn[7]]
    # Of 3,000 labels 1,000 are expected in each class, with a deviation of 26.
    assert all(abs(int((drawn == label).sum()) - 1000) < 5 * 26 for label in classes)
    # Neighbours are of the same class as often as of each other one.
    assert abs(int((drawn[1:] == drawn[:-1]).sum()) - 1000) < 5 * 26
    assert of_numbers(range(3), None, drawn=True) is None


@pytest.mark.parametrize(
    ("text", "names", "expected"),
    [
        (None, ["a", "b", "c"], ([], False)),
        ("random", ["a", "b", "c"], ([], True)),
        ("random", ["a", "random", "c"], ([1], False)),
        ("b,3", ["a", "b", "c"], ([1, 3], False)),
    ],
)
def test_what_labels_say(
    text: str | None, names: list[str], expected: tuple[list[int], bool], tmp_path: Path
) -> None:
    assert choose(text, names, tiny_model(), tmp_path) == expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [0, 1, 2]),
        ({"label_dropout": 1.0}, [3, 3, 3]),  # no class is all that was trained
        ({"num_classes": 0}, None),
    ],
)
def test_all_classes_are_those_that_were_trained(
    changes: dict[str, Any], expected: list[int] | None
) -> None:
    model = tiny_model(**changes)
    classes = of_classes([], model)
    assert (None if classes is None else classes.tolist()) == expected
    if expected is None:
        with pytest.raises(ValueError, match="was trained without classes; leave --labels out"):
            choose("random", [], model, Path("run"))
