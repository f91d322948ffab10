"""The report as Chromium makes it: what models wrote does nothing there, the search finds, the numbers are right."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from test_report import build

from rlhf_pipeline.report.compare import write_comparison
from rlhf_pipeline.report.stage import write_report

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium; apt-get install chromium brings it")
# Without its own errands in the background, which are no requests of a page.
FLAGS = ["--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync", *(["--no-sandbox"] if os.getuid() == 0 else [])]
RUN = "document.documentElement.dataset.owned=1"
ATTACKS = (
    f"<script>{RUN}</script>",
    f"\"' onmouseover='{RUN}' x=\"<img src=http://192.0.2.1/x.png onerror={RUN}>",
    f"</span></td></table></section></style></script><svg onload={RUN}><a href=javascript:{RUN}>",
    "\u202ednammoc\u2066 \x1b[2J\x9b\x00\r\u200b\ud800",
    "<base href=http://192.0.2.1/><meta http-equiv=refresh content='0;url=http://192.0.2.1/'>",
)


@pytest.fixture
def attacked(tmp_path: Path) -> Path:
    """The page of a stage whose every text attacks."""
    folder = build(tmp_path / "run" / "ppo", "".join(ATTACKS))
    rows = [{"step": n, "prompt": word, "response": f"{word} needle{n}", "reward": n / 8}
            for n, word in enumerate(ATTACKS)]  # fmt: skip
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return write_report(folder)


def after_load(page: Path) -> str:
    """The document that is there once scripts have run."""
    command = [str(CHROMIUM), "--headless", *FLAGS, f"--user-data-dir={page.parent / 'profile'}", "--dump-dom"]
    done = subprocess.run([*command, page.as_uri()], capture_output=True, timeout=120, check=True)
    return done.stdout.decode()


def test_only_our_script_has_run(attacked: Path) -> None:
    document = after_load(attacked)
    assert "data-owned" not in document.partition(">")[0] + document.partition("<html")[2].partition(">")[0]
    assert re.search(r'<div class="search"><input', document)  # ours has shown the box
    assert re.search(r'role="status">\d+ / \d+</span>', document)
    assert len(re.findall(r"<script", document)) == 1
    assert not re.search(r"<(img|svg onload|base|a href=.?javascript)", document)
    shown = unescape(document)
    hidden = "\\u202ednammoc\\u2066 \\u001b[2J\\u009b\\u0000"
    for text in ("0.9137", "0.5678", "0.8125", "fell to 0.07", "needle4", hidden):
        assert text in shown, text


def test_even_markup_that_got_in_would_not_run(attacked: Path) -> None:
    source = attacked.read_text(encoding="utf-8")
    attacked.write_text(source.replace("<main>", f"<main><script>{RUN}</script><img src=x onerror='{RUN}'>"))
    document = after_load(attacked)
    assert "<main><script>" in document
    assert "data-owned" not in document.partition("<html")[2].partition(">")[0]


@pytest.fixture
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="there is no playwright; pip install playwright brings it"
    )
    with sync_api.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


def opened(browser: Any, page: Path, **options: Any) -> tuple[Any, list[str]]:
    """A page in a window of its own, and all that it has asked for."""
    window = browser.new_context(**options).new_page()
    asked: list[str] = []
    window.on("request", lambda request: asked.append(request.url))
    window.goto(page.as_uri())
    return window, asked


def test_the_search_leaves_what_holds_every_word(attacked: Path, browser: Any) -> None:
    window, asked = opened(browser, attacked)
    rows = window.locator("#samples tbody tr:visible")
    everything = rows.count()
    window.fill("input[type=search]", "NEEDLE4  refresh")
    assert rows.count() == 1
    assert "needle4" in rows.inner_text()
    assert window.inner_text(".search [role=status]") == f"1 / {everything}"
    assert window.locator("td.one.miss:visible").count() == 3  # beside the one that holds both words
    window.fill("input[type=search]", "<script>")
    assert 0 < rows.count() <= everything
    window.fill("input[type=search]", "nothing says this")
    assert rows.count() == 0
    window.fill("input[type=search]", "")
    assert rows.count() == everything
    assert asked == [attacked.as_uri()]


def test_without_a_script_the_tables_are_whole(attacked: Path, browser: Any) -> None:
    window, _ = opened(browser, attacked, java_script_enabled=False)
    assert not window.locator("input[type=search]").is_visible()
    assert window.locator("#samples tbody tr:visible").count() == window.locator("#samples tbody tr").count() > 50


@pytest.mark.parametrize("lang", ["en", "zh"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_it_without_scrolling_sideways(tmp_path: Path, browser: Any, lang: str, scheme: str) -> None:
    folder = build(tmp_path / "one", "a-word-that-is-rather-long-for-a-phone" * 3)
    build(tmp_path / "two")
    pages = [
        write_report(folder, lang),
        write_comparison([tmp_path / "one", tmp_path / "two"], tmp_path / "compare.html", lang),
    ]
    for page in pages:
        window, _ = opened(browser, page, viewport={"width": 380, "height": 800}, color_scheme=scheme)
        assert window.evaluate("document.documentElement.scrollWidth") <= 380
        colour = window.evaluate("getComputedStyle(document.body).backgroundColor")
        bright = sum(map(int, re.findall(r"\d+", colour)[:3])) > 384
        assert bright == (scheme == "light"), "the style sheet is not applied"
