"""The documents: every command and snippet runs as written, and every link leads somewhere.

The blocks of a page run in order, in a folder with MODEL (a tiny one), texts, and DIR unless the
page makes it. Nothing is added to a block but small sizes (`SMALL`). A block after
`<!-- skip: REASON -->` cannot run here; its commands are only parsed, its Python only compiled.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
from families import SPECIAL_TOKENS, save_tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import grasp
from grasp.cli import main as cli
from tools import picture, planned

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINKING = [*PAGES, *(ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"))]
LINKING += [ROOT / "benchmarks/README.md", *sorted((ROOT / "examples").glob("*.ipynb"))]
SMALL = {
    "prune": {"samples": 4, "seq_len": 32, "epochs": 1},
    "compare": {"samples": 4, "seq_len": 32, "epochs": 1, "eval_windows": 1},
    "sparsify": {"samples": 4, "seq_len": 32, "rounds": 1},
    "recover": {"samples": 20, "held_out": 4, "seq_len": 32, "accumulate": 4},
}
BLOCK = re.compile(
    r"(?:^<!-- skip: (?P<skip>[^\n]+) -->\n)?^```(?P<kind>\w+)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?://)([^)#\s]*)(?:#([^)\s]*))?\)")


class Block(NamedTuple):
    skip: str | None
    kind: str
    text: str

    def commands(self) -> Iterator[list[str]]:
        """Words of each command; of a console transcript, what stands behind a `$`."""
        joined = self.text.replace("\\\n", " ")
        for line in joined.splitlines():
            if self.kind == "console" and not line.startswith("$ "):
                continue
            words = shlex.split(line.removeprefix("$ "), comments=True)
            if words:
                yield words


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = [Block(**match.groupdict()) for match in BLOCK.finditer(text)]
    assert text.count("```") == 2 * len(found), f"{page.name}: name the language of every block"
    return found


def with_pages(kinds: tuple[str, ...]):
    pages = [p for p in PAGES if any(b.kind in kinds for b in blocks(p))]
    return pytest.mark.parametrize("page", pages, ids=lambda p: p.name)


@pytest.fixture(scope="module")
def dense(text, tmp_path_factory):
    """A llama as long as the default settings want, with a tokenizer that llama.cpp has."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet, special = pre_tokenizers.ByteLevel.alphabet(), list(SPECIAL_TOKENS)
    options = {"initial_alphabet": alphabet, "special_tokens": special, "show_progress": False}
    raw.train_from_iterator([text.read_text()], trainers.BpeTrainer(vocab_size=270, **options))
    folder = save_tiny(
        tmp_path_factory.mktemp("dense") / "model",
        vocab=raw.get_vocab_size(),
        max_position_embeddings=2048,
    )
    tokens = dict(zip(("unk_token", "bos_token", "eos_token"), special, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=raw, **tokens).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pruned(dense, text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pruned") / "DIR"
    grasp.prune(str(dense), out=folder, keep=0.5, calibration=str(text), **SMALL["prune"])
    return folder


@pytest.fixture
def workplace(dense, text, tmp_path, monkeypatch):
    """The folder in which a page's blocks run."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(dense, "MODEL")
    shutil.copytree(ROOT / "docs/configs", "docs/configs")
    words = text.read_text()
    Path("text.txt").write_text(words)
    Path("other.txt").write_text(words[::-1])
    Path("held_out.txt").write_text(words.upper())
    records = [json.dumps({"body": words[at : at + 300]}) for at in range(0, len(words), 300)]
    Path("records.jsonl").write_text("\n".join(records))
    for verb, sizes in SMALL.items():
        monkeypatch.setattr(grasp, verb, partial(getattr(grasp, verb), **sizes))
    return tmp_path


@with_pages(("sh", "console", "python"))
def test_a_page_runs_as_written(page, workplace, pruned, call, monkeypatch):
    run = [block for block in blocks(page) if not block.skip and block.kind != "console"]
    if not any(re.search(r'--out DIR\s|(out=|save\(.*)"DIR"', block.text) for block in run):
        shutil.copytree(pruned, "DIR")
    names: dict[str, object] = {"__name__": "docs"}
    for block in run:
        if block.kind == "python":
            exec(compile(block.text, str(page), "exec"), names)
        if block.kind == "sh":
            for program, verb, *arguments in block.commands():
                assert program == "grasp", f"mark the block: {program} cannot run here"
                sizes = [(f"--{n.replace('_', '-')}", v) for n, v in SMALL.get(verb, {}).items()]
                extra = [str(part) for size in sizes for part in size if size[0] not in arguments]
                code, _, err = call(verb, *arguments, *extra)
                assert code == 0, f"grasp {verb} {arguments}: {err}"


@with_pages(("sh", "console"))
def test_commands_that_need_more_than_this_machine_still_parse(page):
    verbs = cli.verbs().commands
    for block in blocks(page):
        for program, *words in block.commands() if block.kind in ("sh", "console") else ():
            if program == "grasp":
                verbs[words[0]].make_context(words[0], words[1:])


@with_pages(("python",))
def test_snippets_that_do_not_run_here_compile(page):
    for block in blocks(page):
        if block.kind == "python":
            compile(block.text, str(page), "exec")


def headings(page: Path) -> set[str]:
    """Anchors, as GitHub and mkdocs name them."""
    text = re.sub(
        r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL
    )
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", title.lower()) for title in titles)
    return {title.strip().replace(" ", "-") for title in plain}


@pytest.mark.parametrize("page", LINKING, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for file, anchor in LINK.findall(FENCED.sub("", text)):
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), f"{page.name} links to {file}"
        if anchor:
            assert anchor in headings(target), f"{page.name} links to {file}#{anchor}"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 150


def test_the_picture_shows_the_committed_figures():
    assert picture.PICTURE.read_text(encoding="utf-8") == picture.draw(picture.figures())


@pytest.mark.parametrize("page", planned.PAGES, ids=lambda page: page.name)
def test_pages_hold_what_plan_says(page):
    assert page.read_text(encoding="utf-8") == planned.written(page), "run python tools/planned.py"
