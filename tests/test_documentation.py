"""The pages' links and commands; and that documentation.py notices wrong ones."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from documentation import ROOT, anchors, faults, pages, tokens_of


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_is_there(page: Path) -> None:
    assert list(faults(page)) == []


def test_all_pages_are_judged() -> None:
    names = {str(page.relative_to(ROOT)) for page in pages()}
    assert {"README.md", "CONTRIBUTING.md", "docs/updating.md", "roles/gateway/README.md"} <= names


def test_the_readme_leads_to_every_page() -> None:
    readme = ROOT / "README.md"
    links = {
        str(token.attrs["href"])
        for _, token in tokens_of(readme.read_text())
        if token.type == "link_open"
    }
    assert {f"docs/{page.name}" for page in ROOT.glob("docs/*.md")} <= links


GOOD = """\
# A page, and its `code`

## Twice

## Twice

<a id="here"></a>[here](#here) [there](#a-page-and-its-code) [again](#twice-1)
[other](other.md#its-heading) [elsewhere](https://example.org/#nothing) [a directory](.)

    DEMO_PORT=8081 make demo && . .venv/bin/activate      # make nothing
    ansible-playbook --ask-vault-pass -i inventories/mine \\
      playbooks/update.yml -e site_soak=600
    … -e '{"site_serial": [1, "25%"]}'
    docker exec vllm-k80-die0 vllm-k80 probe --wait 3

`drain.yml --limit server1 -e instance=die0`, `vllm-k80 serve MODEL --max-num-seqs 4`, `make`,
`k80-doctor --json`, `k80-instance restart die0 --settle 3`, `vllm_instance_soak`, `vllm-k80`,
`roles/*/README.md`, `benchmarks/DATE/HOST/result.json`
"""


@pytest.fixture
def page(tmp_path: Path) -> Path:
    (tmp_path / "other.md").write_text("# Its heading\n")
    return tmp_path / "page.md"


def test_nothing_is_wrong_with_a_good_page(page: Path) -> None:
    page.write_text(GOOD)
    assert list(faults(page)) == []
    assert anchors(page) == {"a-page-and-its-code", "twice", "twice-1", "here"}


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("[x](gone.md)", "links to gone.md, which is not there"),
        ("![x](gone.svg)", "links to gone.svg, which is not there"),
        ("[x](#gone)", "links to #gone, but page.md has no heading or anchor of that name"),
        ("[x](other.md#gone)", "links to other.md#gone, but other.md has no heading"),
        ("`make gone`", "the Makefile has no target gone"),
        ("    cd x && make gone", "the Makefile has no target gone"),
        ("```sh\nmake gone\n```", "the Makefile has no target gone"),
        ("| a |\n|---|\n| `make gone` |", "the Makefile has no target gone"),
        ("`ansible-playbook -i x playbooks/gone.yml`", "there is no playbook gone.yml"),
        ("`gone.yml --limit x`", "there is no playbook gone.yml"),
        ("`ansible-playbook --gone site.yml`", "ansible-playbook has no flag --gone"),
        ("`playbooks/update.yml -e site_soka=1`", "-e site_soka: neither the roles nor update.yml"),
        ("`… -e '{\"site_soka\": 1}'`", "-e site_soka: neither the roles nor a playbook"),
        # Another playbook's.
        ("`playbooks/drain.yml -e rotate_keys_wait=1`", "-e rotate_keys_wait: neither the roles"),
        ("`vllm-k80 gone`", "vllm-k80 has no command gone"),
        ("`docker run vllm-k80:TAG gone`", "vllm-k80 has no command gone"),
        ("`vllm-k80 plan x --gone`", "vllm-k80 plan has no flag --gone"),
        ("`k80-instance gone die0`", "k80-instance has no command gone"),
        ("`k80-instance undrain --settle 3`", "k80-instance undrain has no flag --settle"),
        ("`k80-doctor --gone`", "k80-doctor has no flag --gone"),
        ("`tools/demo gone`", "tools/demo has no command gone"),
        ("`roles/gone/README.md`", "names roles/gone/README.md, which is not there"),
        ("    python benchmarks/gone.py", "names benchmarks/gone.py, which is not there"),
        ("    gateway_prot: 8080", "gateway_prot is not a variable of any role"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(page: Path, text: str, fault: str) -> None:
    page.write_text(f"# A page\n\n{text}\n")
    told = [line for line in faults(page) if fault in line]
    assert told
    assert told[0].startswith(f"{page}:")
    assert int(told[0].removeprefix(f"{page}:").partition(":")[0]) in (3, 5)


def test_no_code_of_the_product_knows_of_the_emulator() -> None:
    product = ["roles", "playbooks", "library", "group_vars", "site.yml", "vllm-k80-src"]
    listed = subprocess.run(
        ["git", "grep", "--ignore-case", "--files-with-matches", "emulator", "--", *product],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert [name for name in listed.stdout.split() if not name.endswith(".md")] == []
    assert listed.stdout, "the search finds what is there"
