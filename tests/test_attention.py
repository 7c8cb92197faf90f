"""Recomputed attention against scaled_dot_product_attention, its measures on known patterns, and the views."""

from __future__ import annotations

import builtins
import dataclasses
import math
import os
import re
import shutil
import time
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.image import imread

from nanochat.attention import (
    MAX_MAP,
    Recorder,
    attention_html,
    attention_probabilities,
    attention_telemetry,
    heatmap_png,
    option_spans,
)
from nanochat.common import UserError
from nanochat.gpt import causal_attend
from tests.rl_fakes import ByteTokenizer, Choices, small_model, written

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("window_pattern", ["L", "S"])
def test_recomputed_probabilities_give_the_output_of_fused_attention(
    kv_heads: int, window_pattern: str
) -> None:
    """In the model itself, with grouped heads and windows: probabilities times v is what the blocks used."""
    model = small_model(kv_heads=kv_heads, window_pattern=window_pattern)
    inner = causal_attend(model.config)
    seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def spy(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        y = inner(layer, q, k, v)
        seen[layer] = v, y
        return y

    recorder = Recorder(spy)
    ids = torch.randint(31, (3, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden = model.hidden(ids, attend=recorder)
        assert torch.equal(hidden, model.hidden(ids)), "recording changes nothing"
    for layer, (v, y) in seen.items():
        p = attention_probabilities(
            recorder.queries[layer], recorder.keys[layer], window=model.config.window(layer)
        )
        again = torch.einsum("bhrt,bthd->brhd", p, v.repeat_interleave(4 // kv_heads, dim=2))
        assert torch.allclose(again, y, atol=1e-5)
        assert torch.allclose(p.sum(-1), torch.ones(3, 4, 17), atol=1e-6)


@pytest.mark.parametrize("window", [None, 4])
def test_padding_attends_to_nothing_and_gets_nothing(window: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 9, 2, 8, generator=generator) for _ in range(3))
    lengths = torch.tensor([9, 5])
    p = attention_probabilities(q, k, window=window, lengths=lengths)
    behind = torch.arange(9)[:, None] - torch.arange(9)[None, :]
    mask = (behind >= 0) & (behind < (window or 9))
    y = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask)
    again = torch.einsum("bhrt,bthd->bhrd", p, v)
    assert torch.allclose(again[0], y[0], atol=1e-5) and torch.allclose(
        again[1, :, :5], y[1, :, :5], atol=1e-5
    )
    assert p[1, :, 5:].abs().max() == 0 and p[1, :, :, 5:].abs().max() == 0


def test_the_last_rows_alone_are_the_last_rows_of_all() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 9, 2, 8, generator=generator) for _ in range(2))
    everything = attention_probabilities(q, k, window=3)
    assert torch.allclose(
        attention_probabilities(q, k, window=3, first_row=6), everything[:, :, 6:], atol=1e-7
    )


def test_only_chosen_layers_are_recorded() -> None:
    model = small_model()
    recorder = Recorder(causal_attend(model.config), layers={1})
    model.hidden(torch.tensor([[1, 2, 3]]), attend=recorder)
    assert set(recorder.queries) == set(recorder.keys) == {1}
    assert not recorder.queries[1].requires_grad


@pytest.mark.parametrize("style", ["- {option}={letter}", "{letter}) {option}", "({letter}) {option}"])
def test_option_spans_cover_each_options_line(style: str) -> None:
    tokenizer = ByteTokenizer(words=["=A\n- ", "wat"])
    options = ["12 km", "a=B", "water", "7", "none"]
    lines = [style.format(option=o, letter=x) for o, x in zip(options, "ABCDE", strict=True)]
    prompt = tokenizer.encode("\n".join(["how far? - 3=4", *lines, "Reason first."]), bos=True)
    spans = option_spans(tokenizer, prompt, "ABCDE")
    for letter, line in zip("ABCDE", lines, strict=True):
        text = tokenizer.decode(prompt[i] for i in spans[letter])
        assert line in text and len(text) <= len(line) + 2 * len("\n- "), (letter, text)


def test_a_prompt_without_options_has_no_spans() -> None:
    tokenizer = ByteTokenizer()
    assert option_spans(tokenizer, tokenizer.encode("A man has 3=A few"), "ABCDE") == {}


def test_the_telemetry_has_exactly_the_promised_names_and_sane_values() -> None:
    tokenizer, task = ByteTokenizer(), Choices(4)
    model = small_model(vocab_size=tokenizer.vocab_size, window_pattern="SL", noise=0.3)
    episodes = [written(tokenizer, task, i, "x\nAnswer: A" * (i % 2)) for i in range(4)]
    report = attention_telemetry(model, tokenizer, episodes)
    assert set(report.metrics) == {
        "attn/entropy_mean", "attn/entropy_normalised_mean", "attn/bos_mass", "attn/mean_distance",
        "attn/gold_option_mass",
        *(f"attn/option_mass/{letter}" for letter in "ABCDE"),
        *(f"attn/{name}/{layer}" for layer in range(3) for name in
          ("entropy_layer", "entropy_normalised_layer", "logit_lens_gold_prob")),
    }  # fmt: skip
    assert len(report.heads) == 3 * 4
    mean = np.mean([row["entropy"] for row in report.heads])
    assert report.metrics["attn/entropy_mean"] == pytest.approx(mean)
    assert 0 < report.metrics["attn/entropy_normalised_mean"] < 1
    assert sum(report.metrics[f"attn/option_mass/{letter}"] for letter in "ABCDE") < 1
    assert set(report.maps) == {0, 1, 2}
    size = len(report.tokens)
    assert report.maps[0].shape == (4, size, size) and size <= MAX_MAP
    assert np.allclose(report.maps[2].sum(-1), 1, atol=1e-5)


def test_even_attention_has_known_measures_and_the_last_layers_lens_is_the_models_answer() -> None:
    tokenizer, task = ByteTokenizer(), Choices(1)
    model = small_model(vocab_size=tokenizer.vocab_size)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.c_q.weight.zero_()  # every score 0: attention is even over what is visible
    e = written(tokenizer, task, 0, "Answer: A")
    report = attention_telemetry(model, tokenizer, [e])
    start = len(e.prompt_ids) - 1
    rows = range(start, start + 1 + len("Answer:"))
    assert report.metrics["attn/entropy_mean"] == pytest.approx(
        np.mean([math.log(t + 1) for t in rows]), rel=1e-5
    )
    assert report.metrics["attn/entropy_normalised_mean"] == pytest.approx(1.0, rel=1e-5)
    assert report.metrics["attn/bos_mass"] == pytest.approx(np.mean([1 / (t + 1) for t in rows]), rel=1e-5)
    assert report.metrics["attn/mean_distance"] == pytest.approx(np.mean([t / 2 for t in rows]), rel=1e-5)
    assert report.metrics["attn/option_mass/B"] == pytest.approx(len("- x=B") / (rows[-1] + 1), rel=1e-5)
    ids = torch.tensor([[*e.prompt_ids, *tokenizer.encode("Answer:")]])
    letters = tokenizer.letter_ids("ABCDE")
    answer = torch.softmax(model(ids)[0, -1, letters], -1)["ABCDE".index(e.gold)].item()
    assert report.metrics["attn/logit_lens_gold_prob/2"] == pytest.approx(answer, rel=1e-4)


def test_questions_without_letters_have_entropy_and_no_option_masses() -> None:
    tokenizer, task = ByteTokenizer(), Choices(1)
    model = small_model(vocab_size=tokenizer.vocab_size)
    e = written(tokenizer, task, 0, "4")
    e = dataclasses.replace(e, gold=None, conversation={"messages": e.conversation["messages"]})
    names = set(attention_telemetry(model, tokenizer, [e]).metrics)
    assert "attn/entropy_mean" in names and not any("option" in name or "lens" in name for name in names)


@pytest.mark.parametrize(("size", "heads"), [(12, 3), (60, 1), (256, 9)])
def test_a_heatmap_is_a_png_with_a_square_per_head(tmp_path: Path, size: int, heads: int) -> None:
    p = np.zeros((heads, size, size))
    p[:, :, 0] = 1.0
    file = tmp_path / "map.png"
    file.write_bytes(heatmap_png(p, ["\n" if i == 5 else "x" for i in range(size)], title="layer 0, step 3"))
    pixels = imread(file)[..., :3]
    zoom, shown = max(1, 240 // size), min(heads, 8)
    square = size * zoom + 8
    assert pixels.shape == (square * math.ceil(shown / 4), square * min(4, shown), 3)
    assert np.allclose(pixels[:4], 1) and np.allclose(pixels[4, 4] * 255, [8, 48, 107]), (
        "margin, then attention 1"
    )
    assert np.allclose(pixels[4, 4 + zoom], 1), "attention 0 is white"
    assert 0.9 < pixels[4 + 5 * zoom, 4 + zoom, 0] < 0.95, "the end of a line of text is marked"
    assert b"layer 0, step 3" in file.read_bytes()


def test_without_treescope_the_error_names_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: object, **kwargs: object) -> object:
        if name == "treescope":
            raise ImportError(name)
        return real(name, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(UserError, match="uv sync --inexact --extra interp"):
        attention_html({0: np.zeros((1, 2, 2))}, ["a", "b"])


def page() -> str:
    pytest.importorskip("treescope", reason="needs the extra interp")
    p = np.tril(np.ones((2, 2, 24, 24))) / np.arange(1, 25)[None, None, :, None]
    return attention_html({0: p[0], 3: p[1]}, [f"tok{i}" for i in range(24)])


def test_the_html_view_is_standalone() -> None:
    html = page()
    assert not re.search(r"""(?:src|href)\s*=\s*["']?https?:""", html)
    assert "https://" not in html and len(html) < 2**20


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: apt-get install chromium")
def test_the_html_view_opens_in_headless_chromium_without_a_network_request(tmp_path: Path) -> None:
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: uv sync --extra test"
    )
    file = tmp_path / "attention.html"
    file.write_text(page())
    rootless = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium's sandbox refuses to run as root
    with (
        sync_api.sync_playwright() as playwright,
        playwright.chromium.launch(executable_path=CHROMIUM, args=rootless, timeout=120_000) as browser,
    ):
        visit = browser.new_page(viewport={"width": 700, "height": 400})
        visit.set_default_timeout(120_000)  # milliseconds; a crowded machine is slow
        requests: list[str] = []
        visit.on("request", lambda request: requests.append(request.url))
        visit.goto(file.as_uri())
        until = time.monotonic() + 120
        shades = 0  # the page paints the map in a timer of its own after it has loaded
        while shades <= 20 and time.monotonic() < until:
            picture = imread(BytesIO(visit.screenshot()))[40:210, 50:225, :3]  # where the map stands
            shades = len(np.unique(picture.reshape(-1, 3), axis=0))
    assert requests == [file.as_uri()]
    assert shades > 20, "the map is painted in many shades"
