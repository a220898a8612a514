"""The text adapter against plain Hugging Face passes, over kinds of tokenizers and templates."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from conftest import shared
from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.models.adapter import evaluating
from expunge.models.text import TextAdapter, cut_middle
from expunge.models.tiny import init_text, train_tokenizer

torch.set_num_threads(1)

QA = [
    Sample(id="a", subject="lily", prompt="Where did Lily go?", target="Lily went to the park."),
    Sample(id="b", subject="tim", prompt="Who is Tim", target="A boy with a big red ball, who liked to play outside."),
    Sample(id="c", subject="zoë", prompt="Zoë's naïve question – 你好?", target="Größe 🎉 ok"),
    Sample(id="d", subject="doc", target="Once upon a time, there was a little girl named Lily."),
]
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHAT = {
    "llama3": (LLAMA3, "<|eot_id|>", ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]),
    "chatml": (CHATML, "<|im_end|>", ["<|im_start|>", "<|im_end|>"]),
}


@pytest.fixture(scope="module")
def stories() -> tuple[Any, TextAdapter]:
    folder = shared("models/stories260k")
    model = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return model, TextAdapter(tokenizer=tokenizer, context=512).bind(model)


def chat_tokenizer(name: str) -> Any:
    template, eos, special = CHAT[name]
    tokenizer = train_tokenizer([f"{s.prompt} {s.target}" for s in QA], 400, special=special)
    tokenizer.chat_template = template
    tokenizer.eos_token = eos
    tokenizer.pad_token = eos  # as many published chat models have it
    return tokenizer


def kinds() -> list[str]:
    return ["bpe", "gpt2", "sentencepiece", "bytes", "llama3", "chatml"]


def tokenizer_of(kind: str) -> Any:
    if kind == "bpe":
        return train_tokenizer([f"{s.prompt} {s.target}" for s in QA], 400)
    if kind == "gpt2":
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers

        files = [str(shared(f"data/tokenizers/gpt2/{n}")) for n in ("vocab.json", "merges.txt")]
        raw = Tokenizer(models.BPE.from_file(*files))
        raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        raw.decoder = decoders.ByteLevel()
        end = "<|endoftext|>"
        return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token=end, eos_token=end, unk_token=end)
    if kind == "sentencepiece":
        return AutoTokenizer.from_pretrained(shared("models/stories260k"))
    if kind == "bytes":
        return ByT5Tokenizer()  # not a fast tokenizer: no offsets, and it adds its own eos
    return chat_tokenizer(kind)


def squeezed(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


@pytest.mark.filterwarnings("ignore:This sequence already has")
@pytest.mark.parametrize("kind", kinds())
def test_prompt_and_target_are_cut_at_the_right_token(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    adapter = TextAdapter(tokenizer=tokenizer)
    eos = tokenizer.eos_token_id
    for sample in QA:
        coded = adapter.encode(sample)
        asked, answered = coded.ids[: coded.first], coded.ids[coded.first :]
        shown = squeezed(tokenizer.decode(answered, skip_special_tokens=True))
        if kind == "gpt2" and not sample.prompt:
            # No bos: the first token has nothing before it, so it is context and not a target.
            assert squeezed(tokenizer.decode(coded.ids, skip_special_tokens=True)) == sample.target
        elif kind == "bytes" and not sample.prompt:
            assert shown == str(sample.target)[1:]
        else:
            assert shown == sample.target
        if sample.prompt:
            assert squeezed(tokenizer.decode(asked, skip_special_tokens=True)).endswith(
                sample.prompt if kind not in CHAT else "assistant"
            )
            assert sample.prompt in squeezed(tokenizer.decode(asked, skip_special_tokens=True))
        assert answered[-1] == eos and (len(answered) < 2 or answered[-2] != eos)
        if kind in ("bpe", "sentencepiece", "llama3"):
            assert coded.ids[0] == tokenizer.bos_token_id != coded.ids[1]  # once, neither missing nor doubled
        if kind in ("gpt2", "bytes", "chatml") and sample.prompt:
            assert coded.ids[0] != tokenizer.bos_token_id


@pytest.mark.parametrize("name", list(CHAT))
def test_eos_inside_a_chat_is_attended_although_it_is_the_padding(name: str) -> None:
    tokenizer = chat_tokenizer(name)
    adapter = TextAdapter(tokenizer=tokenizer)
    assert adapter.pad_id == tokenizer.eos_token_id
    batch = adapter.collate(QA[:3])
    lengths = [len(adapter.cached(s).ids) for s in QA[:3]]
    assert batch.inputs["attention_mask"].sum(1).tolist() == lengths
    for row, length in enumerate(lengths):
        ends = (batch.inputs["input_ids"][row, :length] == tokenizer.eos_token_id).sum()
        assert ends == 2  # the user's turn and the answer, both visible


def test_loss_through_the_seam_is_the_models_own(stories: tuple[Any, TextAdapter]) -> None:
    """Labels -100 outside of the answer, as the Trainer world writes it."""
    model, adapter = stories
    assert not adapter.whole_logits
    for sample in QA:
        coded = adapter.encode(sample)
        ids = torch.tensor([coded.ids])
        labels = ids.clone()
        labels[0, : coded.first] = -100
        with evaluating(model):
            own = model(input_ids=ids, labels=labels).loss
            ours = -adapter.positions(model, [sample]).log_prob_N().mean()
        assert float(ours) == pytest.approx(float(own), abs=1e-5)


def test_stories_need_their_bos(stories: tuple[Any, TextAdapter]) -> None:
    """llama2.c trains on sequences that begin with bos; the published greedy story is the check."""
    model, adapter = stories
    tale = Sample(id="t", subject="t", prompt="Once upon a time", target="x")
    text = adapter.generate(model, [tale], 40)[0]
    assert text.startswith(", there was a little girl named Lily. She loved to play outside in the park.")
    assert adapter.encode(tale).ids[0] == 1


def test_padding_does_not_change_log_probs(stories: tuple[Any, TextAdapter]) -> None:
    model, adapter = stories
    with evaluating(model):
        together = adapter.positions(model, QA)
        values = together.log_prob_N()
        for row, sample in enumerate(QA):
            alone = adapter.positions(model, [sample]).log_prob_N()
            torch.testing.assert_close(values[together.sample_N == row], alone, atol=1e-5, rtol=0)


def test_generation_in_a_batch_equals_one_by_one(stories: tuple[Any, TextAdapter]) -> None:
    model, adapter = stories
    together = adapter.generate(model, QA[:3], 12)
    assert together == [adapter.generate(model, [s], 12)[0] for s in QA[:3]]
    assert len(set(together)) > 1


def test_generation_is_greedy_whatever_the_model_ships_with(stories: tuple[Any, TextAdapter]) -> None:
    model, adapter = stories
    before = adapter.generate(model, QA[:1], 8)
    kept = model.generation_config
    try:
        model.generation_config = type(kept)(**{**kept.to_dict(), "do_sample": True, "repetition_penalty": 1.9})
        assert adapter.generate(model, QA[:1], 8) == before
    finally:
        model.generation_config = kept


def test_long_samples_are_cut_and_counted() -> None:
    long_answer = Sample(id="answer", subject="x", prompt="Who?", target="word " * 200)
    long_prompt = Sample(id="prompt", subject="x", prompt="word " * 200, target="Lily went.")
    loaded = init_text([*QA, long_answer], "tiny-test")
    tokenizer = loaded.adapter.tokenizer  # type: ignore[attr-defined]
    adapter = TextAdapter(tokenizer=tokenizer, context=64)
    whole = TextAdapter(tokenizer=tokenizer, context=4096)
    for sample in (long_answer, long_prompt, QA[0]):
        cut, full = adapter.encode(sample), whole.encode(sample)
        assert len(cut.ids) == min(64, len(full.ids))
        assert cut.ids[0] == tokenizer.bos_token_id
    assert adapter.truncated == {"answer", "prompt"}
    assert whole.truncated == set()
    # The answer survives a long prompt whole, and a short prompt survives a long answer.
    coded = adapter.encode(long_prompt)
    assert coded.ids[coded.first :] == whole.encode(long_prompt).ids[whole.encode(long_prompt).first :]
    coded = adapter.encode(long_answer)
    assert coded.ids[: coded.first] == whole.encode(long_answer).ids[: coded.first]
    with evaluating(loaded.model):
        assert adapter.positions(loaded.model, [long_answer, long_prompt]).log_prob_N().isfinite().all()
    assert cut_middle([1, 2, 3, 4], 9, 1) == [1, 2, 3, 4]


def test_custom_template_keeps_its_words() -> None:
    adapter = TextAdapter(tokenizer=tokenizer_of("bpe"), template="Q: {prompt}\nA: {target}{eos}")
    coded = adapter.encode(QA[0])
    assert adapter.tokenizer.decode(coded.ids[: coded.first], skip_special_tokens=True) == "Q: Where did Lily go?\nA:"
    braces = Sample(id="e", subject="e", prompt="What is {eos} and {target}?", target="A {prompt}")
    assert "What is {eos} and {target}?" in adapter.tokenizer.decode(adapter.encode(braces).ids)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"template": "chat"}, "has none"),
        ({"template": "{target}"}, r"lacks \{prompt\}"),
        ({"template": "{target} {prompt}"}, "after it"),
        ({"context": 1}, "too short"),
    ],
)
def test_wrong_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        TextAdapter(tokenizer=tokenizer_of("bpe"), **options)


def test_chat_template_that_rewrites_the_prompt_is_refused() -> None:
    tokenizer = tokenizer_of("bpe")
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(UserError, match="rewrites the prompt"):
        TextAdapter(tokenizer=tokenizer).encode(QA[0])


def test_a_model_that_scales_its_logits_is_found_out() -> None:
    """Granite divides its logits by a configured number, which our head does not know."""
    from transformers import GraniteConfig, GraniteForCausalLM

    tokenizer = tokenizer_of("bpe")
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = GraniteForCausalLM(
        GraniteConfig(vocab_size=len(tokenizer), num_key_value_heads=2, logits_scaling=4.0, **size)
    ).eval()
    adapter = TextAdapter(tokenizer=tokenizer).bind(model)
    assert adapter.whole_logits
    coded = adapter.encode(QA[0])
    labels = torch.tensor([[-100] * coded.first + list(coded.ids[coded.first :])])
    with evaluating(model):
        own = model(input_ids=torch.tensor([coded.ids]), labels=labels).loss
        ours = -adapter.positions(model, QA[:1]).log_prob_N().mean()
    assert float(ours) == pytest.approx(float(own), abs=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "qwen2", "gpt_neox"])
def test_other_architectures(name: str) -> None:
    """Absolute positions, soft-capped logits, grouped heads, parallel blocks: seam, padding and generation."""
    from transformers import AutoConfig

    tokenizer = tokenizer_of("bpe")
    cap = {"final_logit_softcapping": 0.05} if name == "gemma2" else {}
    config = AutoConfig.for_model(
        name, vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, n_embd=16, n_layer=2, n_head=2,
        **cap, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    adapter = TextAdapter(tokenizer=tokenizer, context=128).bind(model)
    assert not adapter.whole_logits
    assert len(adapter.blocks(model)) == 2
    with evaluating(model):
        for sample in QA:
            coded = adapter.encode(sample)
            labels = torch.tensor([[-100] * coded.first + list(coded.ids[coded.first :])])
            own = model(input_ids=torch.tensor([coded.ids]), labels=labels).loss
            ours = -adapter.positions(model, [sample]).log_prob_N().mean()
            assert float(ours) == pytest.approx(float(own), abs=1e-5)
        together = adapter.positions(model, QA)
        for row, sample in enumerate(QA):
            alone = adapter.positions(model, [sample]).log_prob_N()
            torch.testing.assert_close(together.log_prob_N()[together.sample_N == row], alone, atol=1e-5, rtol=0)
    assert adapter.generate(model, QA[:3], 6) == [adapter.generate(model, [s], 6)[0] for s in QA[:3]]


def test_a_tokenizer_that_adds_its_own_eos_ends_the_sample_once() -> None:
    from tokenizers import processors

    tokenizer = tokenizer_of("bpe")
    ends = [("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A $B </s>", special_tokens=ends
    )
    for sample in QA:
        ids = TextAdapter(tokenizer=tokenizer).encode(sample).ids
        assert ids == TextAdapter(tokenizer=tokenizer_of("bpe")).encode(sample).ids
        assert ids.count(tokenizer.eos_token_id) == 1
