"""The page in a real browser: headless Chromium, driven by Playwright."""

from __future__ import annotations

import html
import re
import shutil

import pytest
import torch
from torch import nn

from composer_gpt2 import cli
from composer_gpt2.demo import page as demo
from composer_gpt2.demo.token_html import text_html
from composer_gpt2.generation import Piece, Sampling, TextGenerator
from composer_gpt2.generation.text_stream import Token
from composer_gpt2.model import GPT2Model
from composer_gpt2.tokenizer import get_encoding

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
# Gradio 6.17 with a newer Starlette, inside its server.
pytestmark = pytest.mark.filterwarnings("ignore:'HTTP_422_UNPROCESSABLE_ENTITY' is deprecated")


def decode(ids) -> str:
    return get_encoding().decode([token for token in ids if token < 50256])


# --- HTML ----------------------------------------------------------------------------------------


def test_what_a_model_writes_is_never_markup():
    evil = '<img src=x onerror="alert(1)">\'&</span>'
    ids = get_encoding().encode_ordinary(evil)
    tokens = tuple(Token(token, -1.0, ((token, -1.0), (50256, -3.0))) for token in ids)
    page = text_html(evil, [Piece(0, 0, evil, tokens)], decode)
    assert re.findall(r"<(?!/?(?:div|span)\b)", page) == []
    assert "onerror=" not in re.sub(r">[^<]*<|\"[^\"]*\"", "", page)
    (tip,) = re.findall(r'data-tip="([^"]*)"', page)
    assert html.unescape(tip).splitlines()[0] == ' 36.79%  "<"'  # exp(-1)
    assert "  4.98%  (end)" in html.unescape(tip)  # exp(-3)


def test_names_of_models_are_different():
    assert demo.model_names(["a", "b"]) == ["a", "b"]
    assert demo.model_names(["a", "a"]) == ["a (1)", "a (2)"]


def test_the_command_wants_one_model_or_two_and_gradio(monkeypatch):
    def command(*arguments: str) -> None:
        cli.app(["demo", *arguments], standalone_mode=False)

    with pytest.raises(ValueError, match="one trained model or two, got 0"):
        command()
    with pytest.raises(ValueError, match="one trained model or two, got 3"):
        command("a", "b", "c")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'composer-gpt2\[demo\]'"):
        command("a")


# --- The browser ---------------------------------------------------------------------------------


def build(seed: int) -> GPT2Model:
    torch.manual_seed(seed)
    model = GPT2Model.from_name("gpt2-tiny", n_embd=32, n_positions=64, dropout=0.0)
    for parameter in model.parameters():  # away from the uniform predictions of a new network
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.fixture(scope="module")
def writers() -> dict[str, TextGenerator]:
    return {"first": TextGenerator(build(1)), "<b>second": TextGenerator(build(2))}


@pytest.fixture(scope="module")
def address(writers):
    pytest.importorskip("gradio", reason="needs the extra demo: pip install -e '.[demo]'")
    page = demo.build_page(writers)
    yield demo.launch(page, block=False)
    page.close()


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="needs the extra browser: pip install -e '.[browser]'"
    )
    if CHROMIUM is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


COUNT_TOKENS = """
window.counts = [];
new MutationObserver(() => {
    const count = document.querySelectorAll("#text-0 .token").length;
    if (count !== window.counts.at(-1)) window.counts.push(count);
}).observe(document.body, {subtree: true, childList: true});
"""


def test_a_person_writes_with_two_models(address, browser, writers, monkeypatch):
    monkeypatch.setattr(demo, "_SECONDS_BETWEEN_UPDATES", 0.0)
    page = browser.new_page()
    asked, broken = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: broken.append(str(error)))
    page.goto(address)
    prompt = "<i>Hello</i> ${1+1} {{name}}"
    page.locator("#prompt textarea").fill(prompt)
    for control, value in {"temperature": 0.7, "new-tokens": 30, "seed": 5, "top-k": 40}.items():
        field = page.locator(f"#{control} input[type=number]")
        field.fill(str(value))
        field.press("Tab")
    page.evaluate(COUNT_TOKENS)
    page.locator("#write button, button#write").click()

    for number, writer in enumerate(writers.values()):
        (sample,) = writer.generate(
            [prompt],
            max_new_tokens=30,
            seed=5,
            sampling=Sampling(0.7, top_k=40),
            n_alternatives=5,
        )
        column = page.locator(f"#text-{number} .written")
        expected = prompt + sample.text
        page.wait_for_function(
            "([selector, text]) => document.querySelector(selector)?.textContent === text",
            arg=[f"#text-{number} .written", expected],
        )
        assert column.locator("i").count() == 0  # the prompt's markup is text
        tips = column.locator(".token").evaluate_all("spans => spans.map(s => s.dataset.tip)")
        blocks = [block for tip in tips for block in tip.split("\n\n")]
        assert len(blocks) == len(sample.tokens) == 30
        for block, token in zip(blocks, sample.tokens, strict=True):
            first, _, *others = block.splitlines()
            assert percent(first) == pytest.approx(100 * probability(token.log_probability))
            assert [percent(line) for line in others] == pytest.approx(
                [100 * probability(log) for _, log in token.alternatives]
            )
    counts = page.evaluate("window.counts")
    assert len([count for count in counts if 0 < count < max(counts)]) > 3  # it came bit by bit

    token = page.locator("#text-1 .token").first
    shown = "element => getComputedStyle(element, '::after').content"
    assert token.evaluate(shown) == "none"
    token.hover()
    assert "%" in token.evaluate(shown)

    assert broken == []
    assert asked
    assert {url for url in asked if not url.startswith((address, "data:", "blob:"))} == set()
    page.close()


def test_mistakes_are_shown(address, browser):
    page = browser.new_page()
    page.goto(address)
    page.locator("#prompt textarea").fill(" a" * 60)
    page.locator("#write button, button#write").click()
    page.get_by_text("must fit the model's 64 positions").wait_for()
    page.close()


def percent(line: str) -> float:
    return float(line.split("%")[0])


def probability(log: float) -> float:
    """As it is shown: with two digits behind the point of the percentage."""
    return round(100 * float(torch.tensor(log).exp()), 2) / 100
