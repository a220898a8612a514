"""CLEAR's metrics: closed forms, the controls, and every published defect with a form of it that would fail here."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon

from expunge.data.samples import Probe, Sample
from expunge.errors import UserError
from expunge.metrics import clear
from expunge.metrics.clear import FORGET, REAL, RETAIN, TABLES, Faces
from expunge.metrics.tofu import TofuSet, log_truth_ratio
from expunge.signals.record import Signals
from matrix.worlds import world


def one_set(seed: int, people: int = 12, rows: int = 3, shift: float = 0.0, options: bool = False) -> TofuSet:
    rng = np.random.default_rng(seed)
    num = people * rows
    return TofuSet(
        loss_N=rng.uniform(0.2, 1.0, num) + shift,
        paraphrased_N=rng.uniform(0.4, 1.2, num) + shift,
        perturbed=tuple(rng.uniform(1.0, 3.0, 3) for _ in range(num)),
        rouge_N=rng.uniform(0.3, 1.0, num),
        groups=tuple(f"p{i // rows}" for i in range(num)),
        options=options,
    )


def six(shift: float = 0.0) -> dict[str, TofuSet]:
    return {
        name: one_set(k, shift=shift, options=name in clear.OPTIONS) for k, name in enumerate((*REAL, *RETAIN, *FORGET))
    }


# -- the three scores ----------------------------------------------------------------------------------------------


def harmonic(*values: float) -> float:
    return len(values) / sum(1 / v for v in values)


@pytest.mark.parametrize("parts", [TABLES, clear.PAPER])
def test_the_scores_are_the_harmonic_means_of_the_written_out_parts(parts: Any) -> None:
    sets = six()
    for score, names in ((clear.clear_real, REAL), (clear.clear_retain, RETAIN), (clear.clear_forget, FORGET)):
        terms = []
        for name in names:
            items, prob, ratio = sets[name], [], []
            for own, other, wrong in zip(items.loss_N, items.paraphrased_N, items.perturbed, strict=True):
                chances = [math.exp(-own), *(math.exp(-w) for w in wrong)]
                prob.append(chances[0] / sum(chances) if items.options else chances[0])
                truth = math.exp(sum(wrong) / len(wrong) - other)  # the paper's orientation: right over wrong
                ratio.append(min(truth, 1 / truth) if names is FORGET else max(0.0, 1 - 1 / truth))
            terms += [np.mean(prob), np.mean(ratio)]
            terms += [items.rouge_N.mean()] if "rouge" in parts else []
        found = score(sets, parts=parts).value
        assert found.value == pytest.approx(harmonic(*terms), rel=1e-12)
        assert found.low < found.value < found.high
        assert all(name in found.definition for name in (*names, *parts))


def test_a_term_of_zero_makes_the_score_zero_and_not_an_error() -> None:
    sets = {"retain": replace(one_set(0), rouge_N=np.zeros(36))}
    assert clear.clear_retain(sets).value.value == 0.0


def test_rouge_that_was_not_measured_is_refused_and_never_dropped_in_silence() -> None:
    """Defect 13: the index list stayed empty, so ROUGE vanished from the tables and nobody was told."""
    sets = {"retain": replace(one_set(0), rouge_N=np.full(36, np.nan))}
    with pytest.raises(UserError, match="no rouge was measured on set 'retain'"):
        clear.clear_retain(sets)
    assert "rouge" not in clear.clear_retain(sets, parts=TABLES).value.definition


def test_forgetting_is_two_sided() -> None:
    """A broken model wins by the paper's "lower is better"; here its gap is as large as the original's."""
    gold, original, broken = six(shift=1.0), six(), six(shift=60.0)
    scores = {name: clear.clear_forget(sets, [gold]) for name, sets in (("o", original), ("b", broken), ("g", gold))}
    assert scores["b"].value.value < scores["g"].value.value < scores["o"].value.value
    gaps = {name: score.gap for name, score in scores.items()}
    assert gaps["g"] is not None and gaps["o"] is not None and gaps["b"] is not None
    assert gaps["g"].value == 0 and gaps["g"].high == 0
    assert gaps["o"].low > 0 and gaps["b"].low > 0
    assert gaps["b"].value == pytest.approx(scores["g"].value.value, abs=1e-9)


def test_the_gap_is_paired() -> None:
    """The same items under both models: an interval of independent draws would be several times wider."""
    ours, theirs = six(), six(shift=0.01)
    found = clear.clear_forget(ours, [theirs])
    assert found.gap is not None
    assert found.gap.high - found.gap.low < 0.3 * (found.value.high - found.value.low)


def test_what_does_not_fit_is_said() -> None:
    with pytest.raises(UserError, match="clear_real needs one of the sets real_faces, real_world: retain was given"):
        clear.clear_real({"retain": one_set(0)})
    with pytest.raises(UserError, match="name some of prob, rouge, truth_ratio"):
        clear.clear_retain(six(), parts=("probability",))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="not measured on the same items"):
        clear.clear_forget(six(), [{"forget": one_set(0)}])


def test_one_person_has_no_interval() -> None:
    found = clear.clear_retain({"retain": one_set(0, people=1)}).value
    assert math.isfinite(found.value) and math.isnan(found.low)


# -- the sets ------------------------------------------------------------------------------------------------------


def signal(name: str, loss: float) -> Signals:
    empty = np.zeros(1, dtype=np.float32)
    return Signals(
        id=name,
        subject="Ann",
        log_prob_L=np.array([-loss], dtype=np.float32),
        hit_L=np.ones(1, dtype=bool),
        mean_L=empty,
        std_L=empty,
        rank_L=np.zeros(1, dtype=np.int32),
        text_bytes=1,
        zlib_bytes=1,
    )


def face(name: str, question: str = "Who is this?") -> Sample:
    probes = (Probe(kind="restated", prompt=question, target="It is Ann."),)
    probes += tuple(Probe(kind="perturbed", prompt=question, target=n) for n in ("Bob", "Cid"))
    return Sample(id=name, subject="Ann", prompt="Who is this?", target="Ann", probes=probes)


def face_signals(name: str, own: float, restated: float, wrong: tuple[float, float]) -> list[Signals]:
    ends = [f"{name}/perturbed/{k}" for k in range(2)]
    return [
        signal(name, own),
        signal(f"{name}/restated/0", restated),
        *(signal(e, w) for e, w in zip(ends, wrong, strict=True)),
    ]


def test_sets_are_joined_by_id_and_never_by_position() -> None:
    """The perturbed part of forget10 has one row less than forget10, so rows of the two do not belong together."""
    samples = [face("a"), face("b")]
    signals = [*face_signals("b", 1.0, 1.5, (2.0, 3.0)), *face_signals("a", 0.1, 0.2, (4.0, 5.0))]
    found = clear.clear_set("forget_facerec", samples, signals, {"b": 0.5, "a": 1.0})
    np.testing.assert_allclose(found.loss_N, [0.1, 1.0], rtol=1e-6)
    np.testing.assert_allclose(found.perturbed[1], [2.0, 3.0], rtol=1e-6)
    assert found.options and not clear.clear_set("forget", samples, signals).options
    with pytest.raises(UserError, match="did you mean 'retain_facerec'"):
        clear.clear_set("retain_face", samples, signals)


def test_wrong_answers_to_another_question_are_refused() -> None:
    """Defect 14: the question was drawn anew for each loader, so right and wrong answers had different contexts."""
    with pytest.raises(UserError, match="losses compare only after one question"):
        clear.clear_set("forget", [face("a", "What can you see?")], face_signals("a", 1, 1, (1, 1)))


def test_one_truth_ratio_per_item_from_its_own_wrong_answers() -> None:
    """Defect 15: two definitions in one repository, and the wrong answers' loss averaged over all rows."""
    paraphrased, wrong = np.array([1.0, 1.0]), [np.array([2.0, 4.0]), np.array([0.5, 0.5])]
    alone = [log_truth_ratio(paraphrased[k : k + 1], wrong[k : k + 1])[0] for k in range(2)]
    together = TofuSet(
        loss_N=paraphrased, paraphrased_N=paraphrased, perturbed=tuple(wrong), rouge_N=paraphrased
    ).log_ratios()
    np.testing.assert_allclose(together, alone)
    np.testing.assert_allclose(together, [-2.0, 0.5])
    defective = paraphrased - np.mean(np.concatenate(wrong))  # "mean()" without an axis
    assert np.abs(together - defective).max() > 1
    arithmetic = math.log(np.exp(-wrong[0]).mean()) + 1.0
    assert abs(arithmetic - together[0]) > 0.3


# -- forget quality ------------------------------------------------------------------------------------------------


def published(first: TofuSet, second: TofuSet) -> float:
    """The authors' steps: one global loss of wrong answers per model, ratios, scipy's distance of the two rows."""
    rows = []
    for items in (first, second):
        everything = np.mean([w.mean() for w in items.perturbed])
        rows.append(np.exp(everything - items.paraphrased_N))
    return 1 - float(jensenshannon(*rows))


def test_the_published_form_is_what_the_authors_compute() -> None:
    first, second = one_set(1), one_set(2, shift=0.7)
    found = clear.clear_js_published(first, second)
    assert found.value == pytest.approx(published(first, second), abs=1e-12)
    assert found.definition == "clear/js-published/1" and math.isnan(found.low)
    apart = replace(first, paraphrased_N=np.where(np.arange(36) < 18, 0.0, 900.0))
    other = replace(first, paraphrased_N=np.where(np.arange(36) < 18, 900.0, 0.0))
    assert clear.clear_js_published(apart, other).value == pytest.approx(1 - math.sqrt(math.log(2)))  # .167, not 0
    assert clear.clear_js_published(first, first).value == 1.0
    with pytest.raises(UserError, match="pairs rows, and 36 and 33"):
        clear.clear_js_published(first, one_set(1, people=11))


def test_forget_quality_does_not_depend_on_the_order_of_rows() -> None:
    """Defect 16: the published form pairs rows."""
    items, order = one_set(1), np.random.default_rng(0).permutation(36)
    turned = replace(
        items, paraphrased_N=items.paraphrased_N[order], perturbed=tuple(items.perturbed[k] for k in order)
    )
    assert clear.clear_forget_quality(turned, items).p_value.value == pytest.approx(1.0)
    assert clear.clear_forget_quality(turned, items).ks_distance.value == 0.0
    assert clear.clear_js_published(turned, items).value < 0.95


def test_forget_quality_sees_a_shift_that_the_published_form_cannot() -> None:
    """Defect 16: a factor on all truth ratios cancels there, and so do the wrong answers."""
    items = one_set(1)
    worse = replace(items, perturbed=tuple(w + 3.0 for w in items.perturbed))
    scaled = replace(items, paraphrased_N=items.paraphrased_N + 2.0)
    for other in (worse, scaled):
        assert clear.clear_js_published(items, other).value == pytest.approx(1.0)
        found = clear.clear_forget_quality(items, other)
        assert found.p_value.value < 1e-6 and found.ks_distance.low > 0.3


def test_two_draws_of_one_distribution_are_not_told_apart() -> None:
    found = clear.clear_forget_quality(one_set(1, people=60), one_set(2, people=60))
    assert found.p_value.value > 0.05 and found.ks_distance.value < 0.2


# -- faces ---------------------------------------------------------------------------------------------------------


def test_face_recognition_is_the_share_of_likeliest_right_names() -> None:
    items = TofuSet(
        loss_N=np.array([0.1, 2.0, 1.0, 1.0]),
        paraphrased_N=np.ones(4),
        perturbed=(np.array([1.0, 2.0]), np.array([1.0, 3.0]), np.array([1.0, 5.0]), np.array([])),
        rouge_N=np.ones(4),
        groups=("a", "b", "c", "d"),
    )
    found = clear.face_recognition(items)
    assert found.n == 3  # the last has no wrong names
    assert found.value == pytest.approx((1 + 0 + 0.5) / 3)


def test_a_model_that_does_not_look_is_at_chance() -> None:
    """The same losses for every picture, all names in turn: exactly 1 / options."""
    losses = np.array([0.5, 1.0, 1.5, 2.0])
    items = TofuSet(
        loss_N=losses,
        paraphrased_N=losses,
        perturbed=tuple(np.delete(losses, k) for k in range(4)),
        rouge_N=losses,
    )
    assert clear.face_recognition(items).value == pytest.approx(0.25)


def gallery(seed: int, noise: float, people: int = 30, each: int = 10) -> Faces:
    rng = np.random.default_rng(seed)
    who = np.repeat(np.arange(people), each)
    centres = np.random.default_rng(9).normal(size=(people, 16))
    rows = centres[who] * (noise < 5) + noise * rng.normal(size=(people * each, 16))
    names = [f"p{k}" for k in who]
    return Faces([f"s{seed}-{i}" for i in range(len(who))], names, rows)


def test_a_picture_that_is_enrolled_may_not_be_asked() -> None:
    """Defect 18: the first five pictures made the reference and were scored too; noise then seems to be recognised."""
    noise = gallery(1, noise=10.0, each=5)
    with pytest.raises(UserError, match="is enrolled and asked about"):
        clear.face_centroid(noise, noise)
    leaky = replace(noise, ids=[f"copy-{i}" for i in noise.ids])
    assert clear.face_centroid(noise, leaky).value > 0.4  # what the leak pretends
    honest = clear.face_centroid(noise, gallery(2, noise=10.0))
    assert honest.value < 0.1 and honest.low <= 1 / 30 <= honest.high
    assert clear.face_centroid(gallery(1, 0.1), gallery(2, 0.1)).value == 1.0


def test_the_gallery_does_not_depend_on_the_order_of_rows() -> None:
    """Defect 18: the means relied on rows that are sorted by label."""
    enrolled, asked = gallery(1, 1.0), gallery(2, 1.0)
    order = np.random.default_rng(3).permutation(len(enrolled.ids))
    mixed = Faces([enrolled.ids[k] for k in order], [enrolled.people[k] for k in order], enrolled.embedding_ND[order])
    found = clear.face_centroid(mixed, asked)
    assert found == clear.face_centroid(enrolled, asked) and 0.5 < found.value < 1
    with pytest.raises(UserError, match="nobody enrolled 'p7'"):
        kept = [k for k, p in enumerate(enrolled.people) if p != "p7"]
        less = Faces([enrolled.ids[k] for k in kept], [enrolled.people[k] for k in kept], enrolled.embedding_ND[kept])
        clear.face_centroid(less, asked)
    with pytest.raises(UserError, match="three lengths differ"):
        Faces(["a"], ["x", "y"], np.zeros((2, 3)))


# -- ROUGE with the picture ----------------------------------------------------------------------------------------


def test_answers_without_the_picture_have_no_gain() -> None:
    """Defect 12: answers were generated from the text alone; ROUGE looks fine, and only the control tells."""
    names = [f"Ann Lee{k} Brown" for k in range(20)]
    blind = ["Ann Lee0 Brown"] * 20
    unseen = clear.rouge_with_image(names, blind, blind, names)
    assert unseen.rouge.value > 0.6 and unseen.gain.value == 0
    assert unseen.gain.low == -unseen.gain.high < 0  # a gain may have either sign
    others = names[1:] + names[:1]
    seen = clear.rouge_with_image(names, names, others, names)
    assert seen.rouge.value == 1 and seen.gain.low > 0.3
    with pytest.raises(UserError, match="one of each per sample"):
        clear.rouge_with_image(names, names, others[1:])


def test_a_seeing_model_is_asked_with_the_picture() -> None:
    """The tiny LLaVA has to look to answer: swapping pictures changes the answers that the adapter generates."""
    seeing = world("llava")
    asked = [s for s in (*seeing.forget, *seeing.retain) if s.image is not None]
    turned = clear.swapped(asked)
    assert [s.prompt for s in turned] == [s.prompt for s in asked]
    assert all(a.image is not b.image for a, b in zip(asked, turned, strict=True))
    answers = [seeing.adapter.generate(seeing.original, group, 12) for group in (asked, turned)]
    assert answers[0] != answers[1]


def test_pictures_are_swapped_between_subjects_only() -> None:
    def picture(name: str, who: str, value: int) -> Sample:
        return Sample(id=name, subject=who, target=who, image=np.full((2, 2, 3), value, np.uint8))

    samples = [picture("1", "a", 1), picture("2", "a", 2), picture("3", "b", 3)]
    images = [int(s.image[0, 0, 0]) for s in clear.swapped(samples)]  # type: ignore[index]
    assert images == [3, 3, 1]
    with pytest.raises(UserError, match="samples of at least two"):
        clear.swapped(samples[:2])
    with pytest.raises(UserError, match="'4' has no picture"):
        clear.swapped([Sample(id="4", subject="a", target="a")])


# -- over runs -----------------------------------------------------------------------------------------------------


def test_settings_without_effect_are_found() -> None:
    """Defect 19: all values of a regulariser gave the same 16 digits, and nobody noticed."""
    same = {"forget": 0.3711, "retain": 0.5}
    runs = {"l1=0": same, "l1=0.1": dict(same), "l1=1": {"forget": 0.3711, "retain": 0.4}, "x": {"forget": 1.0}}
    assert clear.identical_runs(runs) == [("l1=0", "l1=0.1")]
    assert clear.identical_runs({"a": {"forget": 0.0}, "b": {"forget": 0.0}}) == []


def test_what_stands_beside_a_picture_without_a_question_is_its_caption() -> None:
    picture = np.zeros((8, 8, 3), np.uint8)
    found = [
        clear.kind_of(Sample(id="a", subject="a", prompt=prompt, target="Ann Lee.", image=picture))
        for prompt in ("", "What is worn?")
    ]
    assert found == ["caption", "question"]
    assert clear.kind_of(Sample(id="a", subject="a", prompt="", target="A document.")) == "text"
