"""Which values a metric can have, by its name. Student's interval over seeds knows no bounds, and is cut to these."""

from __future__ import annotations

import math
import re

from expunge.stats import Estimate

SHARES = re.compile(  # in [0, 1], distances between two of them included
    r"(^|\.)(prob|accuracy|extraction_strength|rouge_l|kfr|kfr_fluent|krr|ls|auc|p_value|ks_distance|verdict|u_mia"
    r"|mia_efficacy|tow|tow_mia|average_gap|zrf|face_centroid|face_recognition|clear_js_published)(\.|$)"
    r"|^clear_(real|retain|forget)(\.gap)?$|^rouge_with_image\.(forget|retain)$|^model_utility$"
    r"|(^|\.)tv\.(forget|floor)$|(^|\.)mia\.\w+\.gap$"
)
CHANGES = re.compile(r"^rouge_with_image\.gain\.|^modality\.\w+\.(forget|retain)$")  # in [-1, 1]
AMOUNTS = re.compile(r"(^|\.)(loss|loss_ratio|retain_ratio|perplexity)(\.|$)")  # 0 or more


def possible(name: str) -> tuple[float, float]:
    """Least and largest value of a metric of this name, roles included; infinite where nothing is known."""
    if SHARES.search(name):
        return 0.0, 1.0
    if CHANGES.search(name):
        return -1.0, 1.0
    return (0.0 if AMOUNTS.search(name) else -math.inf), math.inf


def cut(estimate: Estimate, least: float, most: float = math.inf) -> tuple[float, float]:
    """The bounds of an interval, none of them outside of what is possible; nan stays nan."""
    low, high = estimate.low, estimate.high
    return (low if math.isnan(low) else max(least, low)), (high if math.isnan(high) else min(most, high))
