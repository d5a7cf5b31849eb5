"""The documentation site, built as `make docs` builds it and looked at in a browser.

`SITE=docs/_build/html` takes a site that is already there, `PATIENCE=10` waits ten times as long (on a busy machine). Without a browser the tests that need one are skipped."""
import os
import re
import shutil
import subprocess
import sys
import threading
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parent.parent
PATIENCE = 60_000 * float(os.environ.get("PATIENCE", 1))          # milliseconds
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="session")
def site() -> Path:
    "Folder of the site; warnings of its build are errors."
    if os.environ.get("SITE"): return Path(os.environ["SITE"]).resolve()
    done = subprocess.run([sys.executable, ROOT / "docs/build.py"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return ROOT / "docs/_build/html"


class Page(HTMLParser):
    "Links, embedded files and anchors of a page."
    def __init__(self, text: str):
        super().__init__()
        self.links, self.embedded, self.anchors = [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.anchors |= {given[name] for name in ("id", "name") if given.get(name)}
        if tag == "a" and given.get("href"): self.links.append(given["href"])
        if tag == "link" and given.get("href") and given.get("rel") != "canonical": self.embedded.append(given["href"])
        if given.get("src"): self.embedded.append(given["src"])


@pytest.fixture(scope="session")
def pages(site) -> dict[Path, Page]:
    # the play page is one file of 13 MB and has no links
    return {path: Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html") if path.name != "play.html"}


def test_every_part_is_there(site):
    notebooks = {path.stem for path in (ROOT / "nbs").glob("[0-9]*.ipynb")}
    modules = {path.stem for path in (ROOT / "wmpo_nb").glob("[!_]*.py")}
    assert {path.stem for path in (site / "nbs").glob("*.html")} == notebooks
    assert {path.stem for path in (site / "api").glob("*.html")} == modules | {"index"}
    assert {path.stem for path in (site / "data_cards").glob("*.html")} == {path.stem for path in (ROOT / "data_cards").glob("*.md")}
    assert {path.stem for path in (site / "results").glob("*.html")} == {path.stem for path in (ROOT / "results").glob("*.md")}
    for name in ("glossary", "play", "results", "cards", "commands", "recipes/index"): assert (site / f"docs/{name}.html").exists(), name


def test_internal_links_lead_somewhere(site, pages):
    broken = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme in ("http", "https", "mailto"): continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.exists() or not target.is_relative_to(site): broken.append((path.name, link))
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors | {"top"}:
                broken.append((path.name, link))
    assert sum(len(page.links) for page in pages.values()) > 500
    assert not broken


def test_nothing_is_embedded_from_outside(site, pages):
    for path, page in pages.items():
        for source in page.embedded:
            if source.startswith("data:"): continue
            parts = urlsplit(source)
            assert not parts.scheme and not parts.netloc, f"{path.name} embeds {source}"
            assert (path.parent / unquote(parts.path)).exists(), f"{path.name} embeds {source}, which is not there"


def test_what_a_cell_wrote_as_markdown_is_shown_as_markdown(site, pages):
    assert re.search(r"<td>(<p>)?Lift", (site / "index.html").read_text())
    for path in pages:
        text = re.sub(r"<(pre|code|script)\b.*?</\1>", "", path.read_text(), flags=re.S)
        assert "|---" not in text and "| ---" not in text, path.name


def test_a_notebook_is_called_by_its_number(site):
    assert re.search(r"<h1>11 Rectified flow", (site / "nbs/11_flow.html").read_text())


def test_api_pages_have_signatures_docstrings_and_shapes(site):
    text = (site / "api/flow.html").read_text()
    for part in ("add_noise", "timestep", "for x0 and noise", "(paper, eq. 1)"): assert part in text, part
    text = (site / "api/presets.html").read_text()
    assert "control steps before a trial counts as failed" in text and "TaskConfig" in text
    text = (site / "api/world_model.html").read_text()
    assert "imagine" in text and "The next K frames" in text         # a method that is added with @patch


@pytest.fixture(scope="session")
def browser():
    try: from playwright.sync_api import Error, sync_playwright
    except ImportError: pytest.skip("playwright is not installed: pip install 'wmpo_nb[docs]'")
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    with sync_playwright() as playwright:
        try: chromium = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        except Error as error: pytest.skip(f"no browser: make web ({str(error).splitlines()[0]})")
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def address(site):
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_): pass
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture
def open_page(browser, address):
    "Opens a page of the site; afterwards nothing may have been asked from elsewhere, been missing, or gone wrong."
    contexts, outside, faults = [], [], []

    def watch(page):
        page.on("request", lambda r: outside.append(r.url) if not r.url.startswith((address, "data:", "blob:")) else None)
        page.on("response", lambda r: faults.append(f"{r.status} {r.url}") if r.status >= 400 else None)
        page.on("pageerror", lambda error: faults.append(str(error)))
        return page

    def open_one(path: str, **settings):
        contexts.append(browser.new_context(**{"viewport": {"width": 1200, "height": 900}} | settings))
        contexts[-1].set_default_timeout(PATIENCE)
        page = watch(contexts[-1].new_page())
        page.goto(f"{address}/{path}")
        return page

    yield open_one
    for context in contexts: context.close()
    assert not outside and not faults


def test_math_is_set(open_page):
    page = open_page("nbs/16_grpo.html")
    page.wait_for_selector("mjx-container mjx-math")
    assert page.locator("mjx-container").count() >= 5 and page.locator("mjx-merror").count() == 0
    assert page.evaluate("document.fonts.ready.then(() => [...document.fonts].some(f => f.family.startsWith('MJX') && f.status === 'loaded'))")
    assert "$" not in page.locator("article p").first.inner_text()


def test_pictures_are_drawn(open_page):
    page = open_page("nbs/15_dream.html")
    page.wait_for_load_state("load")
    sizes = page.evaluate("[...document.querySelectorAll('article .cell_output img')].map(i => [i.naturalWidth, i.clientWidth])")
    assert sizes and all(natural > 100 and shown > 100 for natural, shown in sizes)


def test_search_finds_words_and_names(open_page):
    for word, expected in (("rectified", "nbs/11_flow.html"), ("add_noise", "api/flow.html")):
        page = open_page(f"search.html?q={word}")
        page.wait_for_selector("#search-results ul.search li a")
        page.wait_for_function("document.querySelectorAll('#search-results ul.search li').length > 1")
        targets = page.eval_on_selector_all("#search-results a", "links => links.map(a => a.getAttribute('href'))")
        assert any(expected in target for target in targets), (word, targets)


def test_code_and_solutions_fold(open_page):
    page = open_page("nbs/11_flow.html")
    solutions = page.locator("details.hide", has=page.locator("summary", has_text="Solution"))
    assert solutions.count() == 3
    for fold, word in ((solutions.first, "assert"), (page.locator("details.hide").first, "import")):
        assert not fold.locator("pre").first.is_visible()
        fold.locator("summary").click()
        assert fold.locator("pre").first.is_visible() and word in fold.inner_text()


@pytest.mark.parametrize("path", ["index.html", "nbs/10_stdit.html", "api/presets.html", "results/tiny_lift.html", "docs/play.html",
                                  "data_cards/wmpo_rollouts.html", "docs/glossary.html"])
def test_a_phone_needs_no_sideways_scrolling(open_page, path):
    page = open_page(path, viewport={"width": 375, "height": 700})
    page.wait_for_load_state("load")
    assert page.evaluate("document.documentElement.scrollWidth") <= 376
    assert page.evaluate("parseFloat(getComputedStyle(document.querySelector('article p')).fontSize)") >= 14


@pytest.mark.parametrize("width", [1024, 1280, 1600])
def test_nor_does_a_screen(open_page, width):
    page = open_page("nbs/15_dream.html", viewport={"width": width, "height": 900})
    page.wait_for_load_state("load")
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_light_and_dark(open_page):
    brightness = {}
    for scheme in ("light", "dark"):
        page = open_page("nbs/15_dream.html", color_scheme=scheme)
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).map(Number)")
        brightness[scheme] = sum(colour) / 3
    assert brightness["light"] > 220 and brightness["dark"] < 60
    page.locator(".theme-toggle:visible").first.click()
    assert page.evaluate("document.body.dataset.theme") in ("light", "dark", "auto")


# ---- the play page

def press(page, key: str) -> str:
    "Press a key, wait until its chunk has been dreamt; the picture as a data URL."
    before = int(page.get_attribute("body", "data-chunks") or 0)
    page.keyboard.press(key)
    page.wait_for_selector(f"body[data-chunks='{before + 1}']")
    return page.locator("#dream").screenshot()


@pytest.fixture
def play(open_page):
    def open_play(**settings):
        page = open_page("play.html", **settings)
        page.wait_for_selector("body[data-state]", timeout=2 * PATIENCE)
        assert page.get_attribute("body", "data-state") == "ready", page.inner_text("#status")
        return page
    return open_play


def test_a_key_moves_the_dream(play):
    page = play()
    sent = []
    page.on("request", lambda request: sent.append(request.url))
    pictures = [page.locator("#dream").screenshot(), press(page, "r"), press(page, "ArrowRight"), press(page, "w")]
    assert len(set(pictures)) == len(pictures), "a key press did not change the picture"
    assert "not asked" in page.inner_text("#real-caption") and "%" in page.inner_text("#verdict")
    assert not [url for url in sent if not url.startswith(("data:", "blob:"))]
    fastest = min(float((press(page, "s"), page.get_attribute("body", "data-milliseconds"))[1]) for _ in range(4))
    print(f"\nplay page: {1000 / fastest:.1f} chunks a second")
    assert fastest < 2000 * PATIENCE / 60_000, "more than two seconds a chunk: 0.5 s is the aim, on a machine with nothing else to do"


def test_play_works_from_a_file_and_on_a_phone(browser, site):
    "A page of one file: opened without a server. Its content security policy would refuse any request."
    context = browser.new_context(viewport={"width": 375, "height": 700})
    context.set_default_timeout(PATIENCE)
    page, sent = context.new_page(), []
    page.on("request", lambda request: sent.append(request.url))
    page.goto((site / "play.html").as_uri())
    page.wait_for_selector("body[data-state='ready']", timeout=2 * PATIENCE)
    page.get_by_role("button", name="fingers").click()
    page.wait_for_selector("body[data-chunks='1']", timeout=PATIENCE)
    assert "closed" in page.inner_text("#dream-caption")
    assert not [url for url in sent if not url.startswith(("file:", "data:", "blob:"))]
    assert page.locator("body").bounding_box()["width"] <= 375
    context.close()


def test_the_page_dreams_what_pytorch_dreams(play):
    import torch
    from wmpo_nb.demo import Parts
    from wmpo_nb.from_scratch import shipped_weights
    from wmpo_nb.presets import load_preset
    from wmpo_nb.world_model import action_inputs
    preset = load_preset("tiny_lift")
    parts = Parts(shipped_weights(preset), preset)
    page = play(bypass_csp=True)                   # the policy forbids what the test needs: evaluating code in the page
    shape = page.evaluate("[1, C, K, H, W]")
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    script = """async noise => {
        const actions = spec.starts[0].actions.slice(0, K), context = Array.from(world.context);
        const dreamt = await imagine(world.context, told(actions), Float32Array.from(noise));
        return [context, actions, Array.from(dreamt), Array.from((await decode(dreamt)).slice(0, 999))];
    }"""
    context, actions, dreamt, pixels = map(torch.tensor, page.evaluate(script, noise.flatten().tolist()))
    context, dreamt = context.view(shape[0], shape[1], -1, *shape[3:]), dreamt.view(shape)
    world_model = parts.world_model()
    told = action_inputs(parts.stats.normalize(actions)[None], world_model.config.action_history)
    want = world_model.imagine(context, told, noise)
    assert (dreamt - want).abs().max() < 1e-4 * max(1, want.abs().max())
    frames = ((parts.vae.decode_pixels(want)[0].permute(1, 2, 3, 0) * 0.5 + 0.5) * 255).clamp(0, 255)
    assert (pixels - frames.flatten()[:999]).abs().max() < 0.05
