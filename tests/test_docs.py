import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES_BY_NAME = {page.name: page.read_text() for page in PAGES}
SUFFIXES = r"(?:py|md|png|json|toml|txt|cpp|cuh|hpp)"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", prose)
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_exist(page):
    names = set(re.findall(rf"`((?:[\w.-]+/)+[\w.-]+\.{SUFFIXES})`", page.read_text()))
    places = [ROOT, ROOT / "python" / "msf", ROOT / "msf_kernels"]
    missing = [
        name
        for name in names
        if not name.startswith("runs/") and not any((place / name).exists() for place in places)
    ]
    assert not missing


def test_the_loop_of_ones_own_saves_and_resumes(tmp_path, monkeypatch):
    (code,) = re.findall(r"^```python\n(.*?)^```$", PAGES_BY_NAME["imagenet.md"], re.M | re.S)
    monkeypatch.chdir(tmp_path)
    first: dict[str, Any] = {}
    exec(code, first)
    assert first["trainer"].step_number == 40 and float(first["loss"]) < 2
    second: dict[str, Any] = {}
    exec(code.replace("(40, 40)", "(60, 40)"), second)  # continues from step 40
    assert second["trainer"].step_number == 60
    assert len(code.splitlines()) <= 20
