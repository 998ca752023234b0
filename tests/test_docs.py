import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
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
