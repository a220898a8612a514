"""The logit lens against a slow reading through the model's own modules, and what it finds."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from tests.matrix import worlds
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM, OPTConfig, OPTForCausalLM

import attack_cases
from attack_cases import exam, retrain
from expunge.attacks.exam import Checkpoint
from expunge.attacks.lens import Reading, best_layer, fact_tokens, final_norm, in_candidates, read
from expunge.attacks.registry import Finding, get_attack
from expunge.data.samples import Sample
from expunge.errors import UserError

LENS = get_attack("logit-lens")


def run(checkpoint: Checkpoint, **options: object) -> Finding:
    return LENS.run(exam(), checkpoint, LENS.configure(options))


def slow(checkpoint: Checkpoint, sample: Sample) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities and ranks (K, L) of one text alone, from the hidden states that the model itself returns."""
    model, coded = checkpoint.model, checkpoint.adapter.encode(sample)
    with torch.no_grad():
        ids = torch.tensor([coded.ids])
        handed: list[torch.Tensor] = []
        hooks = [b.register_forward_hook(lambda _m, _i, o: handed.append(o)) for b in model.model.layers]
        model(input_ids=ids)
        for hook in hooks:
            hook.remove()
        log_probs, ranks = [], []
        for state in handed:
            logits = model.lm_head(model.model.norm(state))[0]
            log_p = logits.double().log_softmax(-1)
            spots = range(coded.first, len(coded.ids))
            log_probs.append([float(log_p[t - 1, coded.ids[t]]) for t in spots])
            ranks.append([int((logits[t - 1] > logits[t - 1, coded.ids[t]]).sum()) for t in spots])
    return np.array(log_probs), np.array(ranks)


def test_equals_one_text_at_a_time_through_norm_and_head() -> None:
    checkpoint, samples = exam().audited, exam().samples["forget"][:4] + exam().samples["retain"][:3]
    for sample, reading in zip(samples, read(checkpoint, samples), strict=True):
        log_probs, ranks = slow(checkpoint, sample)
        np.testing.assert_allclose(reading.log_prob_KL, log_probs, atol=1e-4)
        np.testing.assert_array_equal(reading.rank_KL, ranks)


def test_the_last_block_is_what_the_model_says() -> None:
    checkpoint, samples = exam().audited, exam().samples["forget"]
    for signals, reading in zip(checkpoint.signals(samples), read(checkpoint, samples), strict=True):
        np.testing.assert_allclose(reading.log_prob_KL[-1], signals.log_prob_L, atol=1e-4)


def test_the_norm_is_found_by_what_it_does() -> None:
    checkpoint = exam().audited
    assert final_norm(checkpoint, exam().forget[0]) is checkpoint.model.model.norm


def test_a_model_without_a_norm_of_its_own_is_refused() -> None:
    model = copy.deepcopy(exam().audited.model)
    norm = model.model.norm
    model.model.norm = torch.nn.Sequential(norm, torch.nn.Linear(32, 32))
    with pytest.raises(UserError, match="final norm"):
        read(Checkpoint.of(model, attack_cases.adapter()), exam().forget[:1])


def test_finds_the_original_and_nothing_in_a_retrain() -> None:
    found, gone = (run(c).scores for c in (exam().audited, retrain()))
    assert np.mean(found["logit-lens"]["forget"]) > np.mean(gone["logit-lens"]["forget"]) + 3
    four, none = (run(c, budget=4).scores["logit-lens.candidates"]["forget"] for c in (exam().audited, retrain()))
    assert np.mean(four) > 0.9
    assert np.mean(none) < 0.3
    # What was kept is read in both.
    assert min(np.mean(s["logit-lens"]["retain"]) for s in (found, gone)) > -0.5


def test_sees_through_a_model_whose_last_block_is_broken() -> None:
    """Unlearning that only spoils the end: the loss is lost, the inner block still has the answer."""
    model = copy.deepcopy(exam().audited.model)
    with torch.no_grad():
        for parameter in model.model.layers[-1].parameters():
            parameter.normal_(0, 1.0, generator=torch.Generator().manual_seed(3))
    hidden = Checkpoint.of(model, attack_cases.adapter())
    loss = np.mean([s.loss for s in hidden.signals(exam().forget)])
    readings = read(hidden, exam().forget)
    assert {best_layer(r)[1] for r in readings} == {0}
    assert np.mean([best_layer(r)[0] for r in readings]) > -1.0
    assert loss > 2.0


def test_candidate_sets_share_the_budget_among_blocks() -> None:
    reading = Reading(np.zeros((2, 3)), np.array([[0, 1, 5], [2, 2, 0]]), np.array([True, True, True]))
    assert in_candidates(reading, 1).tolist() == [False, False, True]  # one guess: the last block's first
    assert in_candidates(reading, 2).tolist() == [True, False, True]
    assert in_candidates(reading, 4).tolist() == [True, True, True]
    with pytest.raises(UserError, match="budget of 0"):
        run(exam().audited, budget=0)


def test_fact_tokens_are_those_that_only_the_right_answer_has() -> None:
    adapter, sample = attack_cases.adapter(), exam().forget[0]
    coded = adapter.encode(sample)
    ids = np.array(coded.ids[coded.first :])
    kept = fact_tokens(adapter, sample, ids)
    assert adapter.tokenizer.decode(ids[kept]) == str(sample.target).split()[-1]  # the colour, not the name or the verb
    plain = Sample(id="x", subject="x", prompt="who is ada ash", target="ada ash")
    coded = adapter.encode(plain)
    # Everything stands in the prompt: the rule would leave nothing and is not applied; the end marker never counts.
    assert fact_tokens(adapter, plain, np.array(coded.ids[coded.first :])).tolist() == [True, True, False]


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}
ENDS = {"vocab_size": 64, "bos_token_id": None, "eos_token_id": 2}


@pytest.mark.parametrize(
    "model",
    [
        GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, **ENDS)),
        OPTForCausalLM(OPTConfig(ffn_dim=32, word_embed_proj_dim=32, **SIZES, **ENDS)),
        GPTNeoXForCausalLM(GPTNeoXConfig(intermediate_size=32, **SIZES, **ENDS)),
    ],
    ids=["gpt2", "opt", "neox"],
)
def test_other_architectures_end_in_their_own_prediction(model: torch.nn.Module) -> None:
    """The norm has another name in each; the last block through it must be what the model says."""
    checkpoint = Checkpoint.of(model.eval(), attack_cases.adapter().bind(model))
    samples = exam().forget[:3]
    for signals, reading in zip(checkpoint.signals(samples), read(checkpoint, samples), strict=True):
        assert len(reading.log_prob_KL) == 2
        np.testing.assert_allclose(reading.log_prob_KL[-1], signals.log_prob_L, atol=1e-4)


def test_reads_models_with_images() -> None:
    world = worlds.world("llava")
    known, blank = (Checkpoint.of(m.eval(), world.adapter) for m in (world.original, world.start))
    reads = [np.mean([best_layer(r)[0] for r in read(c, world.forget)]) for c in (known, blank)]
    assert reads[0] > -1 > reads[1]
