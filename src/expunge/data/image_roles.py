"""Cut labelled images into roles: what the image datasets share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from expunge.data.chance import share, shuffled
from expunge.data.samples import Dataset, Role, Sample
from expunge.errors import UserError
from expunge.options import option


@dataclass(frozen=True, kw_only=True)
class ImageSizes:
    """How many images stand in each role."""

    private: int = option(400, "images that the original is trained on (forget and retain together)")
    forget: int | float = option(0.1, "of these, to forget at random: a count (1 or more) or a fraction (below 1)")
    forget_class: int | None = option(None, "forget the private images of this class instead")
    class_share: float = option(1.0, "which fraction of that class, above 0 and up to 1")
    holdout: int = option(1000, "images that the original is never trained on; shadow models are trained on a part")
    utility: int = option(200, "other images, for training a base and measuring utility")
    split_seed: int = option(0, "another value gives another choice of images")


def image_dataset(
    name: str, images_NHW: NDArray[np.uint8], labels_N: NDArray[np.integer], classes: Sequence[str], sizes: ImageSizes
) -> Dataset:
    """Images in roles, drawn without regard to class; the target is the class index.

    A subject is one image; with ``forget_class`` it is the class, for then that is what has to go. An image that
    occurs twice is taken once.

    Raises:
        UserError: more images asked for than there are, an impossible size, or no private image of the class.
    """
    for field, least in (("private", 1), ("holdout", 0), ("utility", 0)):
        if getattr(sizes, field) < least:
            raise UserError(f"dataset '{name}': {field} = {getattr(sizes, field)}: give {least} or more.")
    if sizes.forget_class is not None and not 0 <= sizes.forget_class < len(classes):
        raise UserError(f"dataset '{name}': forget_class = {sizes.forget_class}: give 0 to {len(classes) - 1}.")
    if not 0 < sizes.class_share <= 1:
        raise UserError(f"dataset '{name}': class_share = {sizes.class_share}: give a number above 0 and up to 1.")
    first = {image.tobytes(): place for place, image in reversed(list(enumerate(images_NHW)))}
    order = shuffled(sorted(first.values()), name, sizes.split_seed)
    wanted = sizes.private + sizes.holdout + sizes.utility
    if wanted > len(order):
        raise UserError(
            f"dataset '{name}' has {len(order)} different images, and private + holdout + utility ask for {wanted}: "
            "lower one of them."
        )

    def sample(place: int) -> Sample:
        label = int(labels_N[place])
        called = f"image {place:05d}" if sizes.forget_class is None else classes[label]
        return Sample(id=f"{name}-{place:05d}", subject=called, target=label, image=images_NHW[place])

    private = order[: sizes.private]
    if sizes.forget_class is None:
        chosen = private[: share(sizes.forget, sizes.private, f"dataset '{name}': forget")]
    else:
        own = [place for place in private if labels_N[place] == sizes.forget_class]
        if not own:
            raise UserError(f"dataset '{name}': no private image is of class {sizes.forget_class}: raise private.")
        chosen = own[: max(1, round(sizes.class_share * len(own)))]
    gone = set(chosen)
    cuts: dict[Role, list[int]] = {
        "forget": chosen,
        "retain": [place for place in private if place not in gone],
        "holdout": order[sizes.private : sizes.private + sizes.holdout],
        "utility": order[sizes.private + sizes.holdout : wanted],
    }
    roles = {role: tuple(sample(place) for place in sorted(places)) for role, places in cuts.items()}
    return Dataset(name=name, roles=roles, modality="classifier")
