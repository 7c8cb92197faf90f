"""Exported checkpoints, opened by the real transformers library: the same logits, ids, chats and answers."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from small import tiny_tokenizer

from nanochat.common import UserError
from nanochat.export_hf import check_representable, export, widening
from nanochat.gpt import GPT, GPTConfig

transformers = pytest.importorskip("transformers")

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 2 + 3?"},
    {"role": "assistant", "content": [
        {"type": "text", "text": "We add."}, {"type": "python", "text": "2+3"},
        {"type": "python_output", "text": "5"}, {"type": "text", "text": "So 5."}, {"type": "text", "text": "Answer: A"},
    ]},
    {"role": "user", "content": "And 2 - 3?"},
]  # fmt: skip


def model(**overrides: Any) -> GPT:
    """A model with weights large enough that every part matters."""
    torch.manual_seed(5)
    config = GPTConfig.for_depth(
        2, vocab_size=tiny_tokenizer().vocab_size, sequence_len=256, n_embd=64, n_head=4, **overrides
    )
    made = GPT(config)
    with torch.no_grad():
        for weight in made.parameters():
            weight.normal_(std=0.3)
    return made


@pytest.mark.parametrize(
    "overrides",
    [{}, {"qk_scale": 1.0}, {"qk_scale": 1.0, "rope_base": 10_000.0}, {"n_kv_head": 2}, {"qk_scale": 0.8}, {"softcap": 30.0}],
    ids=str,
)  # fmt: skip
def test_logits_are_ours(tmp_path: Path, overrides: dict[str, Any]) -> None:
    ours = model(**overrides)
    found = export(ours, tiny_tokenizer(), tmp_path)
    assert found["largest_logit_difference"] < 1e-4
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(theirs).__name__ == "NanoChatForCausalLM"
    ids = torch.randint(0, ours.config.vocab_size, (2, 200), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, ours(ids), atol=1e-4, rtol=0)
        scrambled = theirs(ids.flip(1)).logits
    assert (scrambled - theirs(ids).logits).abs().max() > 0.1, "a comparison that could not fail"


def test_greedy_text_is_ours_token_by_token(tmp_path: Path) -> None:
    from nanochat.engine import Engine

    ours, tokenizer = model(), tiny_tokenizer()
    export(ours, tokenizer, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    prompt = tokenizer.render_for_completion({"messages": CHAT})
    with torch.no_grad():
        out = theirs.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False, use_cache=True)
    expected = greedy(Engine(ours, tokenizer), prompt, 40)
    assert out[0, len(prompt) :].tolist() == expected and len(expected) > 5
    text = transformers.AutoTokenizer.from_pretrained(tmp_path).decode(out[0, len(prompt) :])
    assert text == tokenizer.decode(expected)


def greedy(engine: Any, prompt: list[int], count: int) -> list[int]:
    """Our model's likeliest tokens, without the engine's tool."""
    ids, ends = list(prompt), {engine.tokenizer.special("<|assistant_end|>"), engine.tokenizer.bos_id}
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(engine.model(torch.tensor([ids]))[0, -1].argmax()))
            if ids[-1] in ends:
                break
    return ids[len(prompt) :]


def test_the_tokenizer_gives_our_ids_and_reads_them_back(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    export(model(), tokenizer, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    draw = random.Random(3)
    texts = [
        "",
        " ",
        "\n\n a\r\n",
        "it's 1234567 km/h",
        "naïve Ünïcode 漢字 🎉",
        "Answer: A",
        "<|not_special|>",
        "a" * 300,
    ]
    letters = "abc xyz ABC 0123456789 .,+-*/=()'\n\té漢"
    texts += ["".join(draw.choices(letters, k=60)) for _ in range(300)]
    texts += ["".join(chr(draw.randrange(32, 0x2FFF)) for _ in range(20)) for _ in range(100)]
    for text in texts:
        assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text), repr(text)
        assert theirs.decode(tokenizer.encode(text)) == text
    assert theirs.eos_token == "<|assistant_end|>" and theirs.bos_token_id == tokenizer.bos_id


@pytest.mark.parametrize("end", [2, 4])
def test_the_chat_template_renders_as_we_do(tmp_path: Path, end: int) -> None:
    tokenizer = tiny_tokenizer()
    export(model(), tokenizer, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = theirs.apply_chat_template(CHAT[:end], add_generation_prompt=True, tokenize=True, return_dict=False)
    assert list(ids) == tokenizer.render_for_completion({"messages": CHAT[:end]})
    whole = theirs.apply_chat_template(CHAT[:3], tokenize=True, return_dict=False)
    assert list(whole) == tokenizer.render_conversation({"messages": CHAT[:3]})[0]


def test_what_transformers_cannot_compute_is_refused(tmp_path: Path) -> None:
    for overrides, words in (({"smear": 3}, "smear"), ({"window_pattern": "SL", "window_len": 16}, "window")):
        with pytest.raises(UserError, match=words):
            export(model(**overrides), tiny_tokenizer(), tmp_path / "x")
    assert not (tmp_path / "x").exists()
    check_representable(model(window_pattern="SL", window_len=256).config)


def test_weights_that_diverged_are_refused(tmp_path: Path) -> None:
    broken = model()
    torch.nn.init.constant_(broken.lm_head.weight, float("nan"))
    with pytest.raises(UserError, match="not finite"):
        export(broken, tiny_tokenizer(), tmp_path)


def test_october_2025_is_exported_with_a_word_on_its_rounding(tmp_path: Path) -> None:
    old = model(rope_bf16=True, rope_base=10_000.0, qk_scale=1.0)
    found = export(old, tiny_tokenizer(), tmp_path)
    assert found["largest_logit_difference"] < 1.0
    assert json.loads((tmp_path / "config.json").read_text())["nanochat"]["rope_bf16"] is True


def test_heads_are_as_wide_as_the_scale_asks_for() -> None:
    assert widening(model(qk_scale=1.0).config) == (1, 0.0)
    n, a = widening(model(qk_scale=1.2).config)
    assert n == 3 and (3 / (1 + a * a)) ** 0.5 == pytest.approx(1.44)


def test_the_command_exports_a_saved_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    from nanochat import checkpoint_manager
    from nanochat.common import World
    from scripts import export_hf

    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    tiny_tokenizer().save(tmp_path / "base" / "tokenizer")
    world = World(0, 0, 1, torch.device("cpu"), torch.float32)
    checkpoint_manager.save("rl", "d2", 7, model=model(), meta={}, world=world)
    export_hf.main(export_hf.Config(output_dir=str(tmp_path / "out"), dtype="bfloat16"))
    assert "rl step 7" in capsys.readouterr().out
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    with pytest.raises(UserError, match="-o is missing"):
        export_hf.main(export_hf.Config())
