"""Cut labelled images into roles: what the image datasets share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from expunge.data.chance import share, shuffled
from expunge.data.pool import Pool
from expunge.data.samples import Dataset, Role, Sample
from expunge.errors import UserError
from expunge.options import option

SPLITS = ("sizes", "iam")
IAM = {  # (target set, shadow set) as published; others are cut as CIFAR is, three to two
    "cifar10": (30_000, 20_000),
    "cifar100": (30_000, 20_000),
    "cinic10": (70_000, 20_000),
    "purchase100": (117_859, 40_000),
    "texas100": (33_864, 20_000),  # 80 % of the 67,330 records, less the shadow set
    "location30": (3_008, 1_000),  # 80 % of the 5,010 records, less the shadow set
}


@dataclass(frozen=True, kw_only=True)
class ImageSizes:
    """How many images stand in each role."""

    private: int | float = option(
        400, "images that the original is trained on (forget and retain together): a count, or a fraction of all"
    )
    forget: int | float = option(0.1, "of these, to forget at random: a count (1 or more) or a fraction (below 1)")
    forget_class: int | None = option(None, "forget the private images of this class instead")
    class_share: float = option(1.0, "which fraction of that class, above 0 and up to 1")
    holdout: int | float = option(
        1000, "images that the original is never trained on; shadow models are trained on a part"
    )
    utility: int | float = option(200, "other images, for training a base and measuring utility")
    split: str = option(
        "sizes",
        "sizes: as above; iam: private is the target set and holdout the shadow set of IAM's protocols, in its sizes",
        source="arXiv 2506.06112",
        choices=SPLITS,
    )
    split_seed: int = option(0, "another value gives another choice of images")


def image_dataset(name: str, pool: Pool, sizes: ImageSizes) -> Dataset:
    """Images in roles, drawn without regard to class; the target is the class index.

    A subject is one image; with ``forget_class``, private images have their class for subject, for then that is what
    has to go. An image that occurs twice is taken once. Every image has its place in an order that depends on nothing
    but ``split_seed``, so more holdout or utility images never change which ones are forgotten. Ids
    end with the place in the pool.

    Raises:
        UserError: more images asked for than there are, an impossible size, a label outside of the classes, an image
            that cannot be read, or no private image of the class.
    """
    _check(name, pool, sizes)
    order = shuffled(range(len(pool.labels_N)), name, sizes.split_seed)
    asked = (sizes.private, sizes.holdout, sizes.utility)
    whole = sizes.split == "iam" or any(0 < amount < 1 for amount in asked)  # how many there are has to be known
    most = len(order) if whole else sum(int(amount) for amount in asked)
    if most > len(order):
        raise UserError(_too_few(name, len(order), "", most))
    images = pool.different(order, most)
    notes = pool.notes
    if sizes.split == "iam":
        private, holdout, utility = _as_iam(name, len(images))
        notes += (f"Cut as IAM does: target set {private}, shadow set {holdout}.",)
    else:
        private, holdout, utility = (_count(amount, len(images)) for amount in asked)
    if private + holdout + utility > len(images):
        raise UserError(_too_few(name, len(images), "different ", private + holdout + utility))
    places = list(images)
    own, chosen = places[:private], _chosen(name, pool, sizes, places[:private])
    gone = set(chosen)

    def sample(place: int, role: Role) -> Sample:
        subject = f"image {place:05d}"
        if sizes.forget_class is not None and role in ("forget", "retain"):
            kept = role == "retain" and pool.labels_N[place] == sizes.forget_class
            subject = pool.classes[pool.labels_N[place]] + (" (kept)" if kept else "")
        return Sample(id=f"{name}-{place:05d}", subject=subject, target=int(pool.labels_N[place]), image=images[place])

    cuts: dict[Role, Sequence[int]] = {
        "forget": chosen,
        "retain": [place for place in own if place not in gone],
        "holdout": places[private : private + holdout],
        "utility": places[private + holdout : private + holdout + utility],
    }
    roles = {role: tuple(sample(place, role) for place in sorted(cut)) for role, cut in cuts.items()}
    return Dataset(name=name, roles=roles, modality="classifier", source=pool.source, notes=notes)


def _check(name: str, pool: Pool, sizes: ImageSizes) -> None:
    pool.check()
    if len(pool.classes) < 2:
        raise UserError(
            f"dataset '{name}' has the one class '{pool.classes[0]}' here, and a classifier needs two or more: add "
            "pictures of another class."
        )
    for field, least in (("private", 1), ("holdout", 0), ("utility", 0)):
        amount = getattr(sizes, field)
        if not amount >= 0 or amount == 0 < least:
            raise UserError(f"dataset '{name}': {field} = {amount}: give {least} or more.")
        if amount > 1 and amount != int(amount):
            raise UserError(f"dataset '{name}': {field} = {amount}: give a whole count, or a fraction below 1.")
    if sizes.forget_class is not None and not 0 <= sizes.forget_class < len(pool.classes):
        raise UserError(f"dataset '{name}': forget_class = {sizes.forget_class}: give 0 to {len(pool.classes) - 1}.")
    if not 0 < sizes.class_share <= 1:
        raise UserError(f"dataset '{name}': class_share = {sizes.class_share}: give a number above 0 and up to 1.")


def _too_few(name: str, there: int, kind: str, wanted: int) -> str:
    return (
        f"dataset '{name}' has {there} {kind}images, and private + holdout + utility ask for {wanted}: "
        "lower one of them."
    )


def _count(amount: int | float, total: int) -> int:
    # Rounded down, so that fractions that add up to 1 fit.
    return int(amount * total + 1e-9) if 0 < amount < 1 else int(amount)


def _as_iam(name: str, there: int) -> tuple[int, int, int]:
    """Target set, shadow set, nothing else; duplicates are missing from the target set.

    Raises:
        UserError: the files hold less than the shadow set and as much again.
    """
    private, holdout = IAM.get(name, (there - 2 * there // 5, 2 * there // 5))
    if there < 2 * holdout:
        raise UserError(
            f"dataset '{name}' has {there} different images here, and split = iam takes {holdout} for the shadow set "
            "and more for the target set: give all files, or sizes of your own."
        )
    return min(private, there - holdout), holdout, 0


def _chosen(name: str, pool: Pool, sizes: ImageSizes, private: Sequence[int]) -> Sequence[int]:
    if sizes.forget_class is None:
        return private[: share(sizes.forget, len(private), f"dataset '{name}': forget")]
    members = [place for place in private if pool.labels_N[place] == sizes.forget_class]
    if not members:
        raise UserError(f"dataset '{name}': no private image is of class {sizes.forget_class}: raise private.")
    return members[: max(1, round(sizes.class_share * len(members)))]
