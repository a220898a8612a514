"""``certificate.html``: the claims for people. What is said in one sentence, what it rests on, what it does not say."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from jinja2 import Environment, StrictUndefined, Template

VERDICTS = {
    "certified": "This is certified.",
    "evidence-only": "There is evidence, and no guarantee.",
    "refused": "Nothing is certified.",
}
REASONS = {
    "certified": "At least one formal claim (L0 or L1) holds, and no claim is refuted.",
    "evidence-only": "What was measured (L2 to L5) holds, nothing is refuted, and nothing is guaranteed.",
    "refused": "The evidence is too little for any claim.",
}
LEVELS = {
    "L0": "exact",
    "L1": "(ε, δ)",
    "L2": "equivalent to retrained models",
    "L3": "bounded divergence",
    "L4": "audited by attacks",
    "L5": "robustness measured",
}
WORDS = {"certified": "holds", "refuted": "refuted", "unsupported": "not shown"}
SHOWN = 40  # figures on the page; all of them are in the certificate


@cache
def _template() -> Template:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(HTML)


def page(statement: Mapping[str, Any], certificate: str) -> str:
    """A self-contained HTML page of a statement; ``certificate`` is the name of the file that is signed.

    The page itself is not signed, and says so.
    """
    predicate = statement["predicate"]
    manifest = predicate["model"]["manifest"]
    return _template().render(
        certificate=certificate,
        digest=statement["subject"][0]["digest"]["sha256"],
        files=len(manifest),
        size=f"{sum(f['size'] for f in manifest.values()):,}".replace(",", " "),
        headline=VERDICTS[predicate["verdict"]],
        reason=reason(predicate),
        lead=lead(predicate),
        levels=LEVELS,
        words=WORDS,
        measures=[m | {"text": number(m)} for m in predicate["evidence"]["measures"][:SHOWN]],
        hidden=max(0, len(predicate["evidence"]["measures"]) - SHOWN),
        p=predicate,
    )


def reason(predicate: Mapping[str, Any]) -> str:
    """Why the verdict is what it is."""
    if predicate["lineage"]["original"] == predicate["model"]["recorded"] and predicate["verdict"] == "refused":
        return "The model is the original, unchanged."
    refuted = [c["level"] for c in predicate["claims"] if c["verdict"] == "refuted"]
    return f"Refuted at {', '.join(refuted)}: then no claim stands." if refuted else REASONS[predicate["verdict"]]


def lead(predicate: Mapping[str, Any]) -> str:
    """The strongest claim that holds, as the one sentence that may be said; empty when nothing is certified."""
    held = [str(c["claim"]) for c in predicate["claims"] if c["verdict"] == "certified"]
    return held[0] if held and predicate["verdict"] != "refused" else ""


def number(measure: Mapping[str, Any]) -> str:
    """``0.123 [0.101, 0.145]``."""
    value, low, high = (measure[key] for key in ("value", "low", "high"))
    if value is None:
        return "–"
    return f"{value:.3g}" + (f" [{low:.3g}, {high:.3g}]" if low is not None and high is not None else "")


HTML = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Certificate: {{ p.verdict }}</title>
<style>
:root { --ink: #1c2330; --soft: #5b6576; --line: #d9dee7; --paper: #fff; --wash: #f6f7f9;
  --holds: #1a6b45; --refuted: #a3262a; --unsupported: #6a7280; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --soft: #a3acbb; --line: #39414f; --paper: #14181f;
  --wash: #1c222c; --holds: #6fcf9b; --refuted: #f0888b; --unsupported: #a3acbb; } }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 52rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .6rem; }
p, li { max-width: 44rem; }
.soft, dt, th { color: var(--soft); }
.lead { font-size: 1.25rem; line-height: 1.4; margin: .2rem 0 .6rem; }
.reason { font-size: 1.1rem; margin: 0 0 1rem; }
.claim { border-left: 4px solid var(--unsupported); background: var(--wash); padding: .7rem 1rem; margin: .7rem 0; }
.claim.certified { border-color: var(--holds); }
.claim.refuted { border-color: var(--refuted); }
.claim p { margin: .2rem 0; }
.claim ul { margin: .3rem 0 .2rem; padding-left: 1.2rem; }
.mark { font-weight: 600; color: var(--unsupported); }
.certified .mark { color: var(--holds); }
.refuted .mark { color: var(--refuted); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1.2rem; margin: 0; }
dd { margin: 0; overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .25rem .8rem .25rem 0; border-bottom: 1px solid var(--line); }
th { font-weight: 500; }
td.n, th.n { text-align: right; padding-right: 0; }
code { font: .9em/1.5 ui-monospace, monospace; overflow-wrap: anywhere; }
@media (max-width: 34rem) { dl { grid-template-columns: 1fr; } dd { margin-bottom: .5rem; } }
</style>
</head>
<body>
<main>
<h1>{{ headline }}</h1>
{% if lead %}
<p class="lead">{{ lead }}</p>
{% endif %}
<p class="reason">{{ reason }}</p>
<p class="soft">This page repeats what <code>{{ certificate }}</code> says. Only that file is signed; check it with
<code>expunge verify {{ certificate }} --pub KEY.pub.pem --model MODEL</code>.</p>

<h2>What is said</h2>
{% for c in p.claims %}
<section class="claim {{ c.verdict }}">
<p>{{ c.level }} {{ levels[c.level] }}: <span class="mark">{{ words[c.verdict] }}</span></p>
<p>{{ c.claim }}</p>
{% if c.assumptions and c.verdict != "unsupported" %}
<p class="soft">If:</p>
<ul>{% for a in c.assumptions %}<li>{{ a }}</li>{% endfor %}</ul>
{% endif %}
{% if c.not_claimed and c.verdict == "certified" %}
<p class="soft">It does not say:</p>
<ul>{% for a in c.not_claimed %}<li>{{ a }}</li>{% endfor %}</ul>
{% endif %}
</section>
{% else %}
<p>No claim was made.</p>
{% endfor %}

<h2>About which model</h2>
<dl>
<dt>digest</dt><dd><code>{{ digest }}</code></dd>
<dt>files</dt><dd>{{ files }}, {{ size }} bytes</dd>
<dt>made by</dt><dd>{{ p.method.name or "unknown" }} ({{ p.method.kind }}), Expunge {{ p.method.version }}</dd>
<dt>request</dt><dd>{{ p.request.samples }} sample(s) of {{ p.request.subjects }} subject(s)
{%- if p.request.regime %}, {{ p.request.regime }}{% endif %}
{%- if p.request.received %}, received {{ p.request.received[:10] }}{% endif %}
{%- if p.request.due %}, due {{ p.request.due[:10] }}{% endif %}</dd>
<dt>valid</dt><dd>{{ p.created[:10] }} to {{ p.valid_until[:10] }}</dd>
</dl>

<h2>What it rests on</h2>
<ul>{% for a in p.assumptions %}<li>{{ a }}</li>{% endfor %}</ul>
<dl>
<dt>retrained references</dt>
<dd>{{ p.evidence.references or "none: nothing was compared with a model that never saw the data" }}</dd>
{% for a in p.evidence.axes %}
<dt>{{ a.axis }}</dt><dd>{{ a.verdict }} ({{ a.tests }} tests)</dd>
{% endfor %}
</dl>
<h2>What it does not say</h2>
<ul>{% for a in p.not_claimed %}<li>{{ a }}</li>{% endfor %}</ul>

<h2>What became of other copies, as the signer states it</h2>
<dl>
{% for name, d in p.lineage.disposal.items() %}
<dt>{{ name }}</dt>
<dd>{{ d.state }}{% if d.when %}, {{ d.when[:10] }}{% endif %}</dd>
{% endfor %}
</dl>

{% if measures %}
<h2>Figures measured by the signer</h2>
<table>
<tr><th>figure</th><th>value and interval</th><th class="n">n</th></tr>
{% for m in measures %}
<tr><td>{{ m.name }}</td><td>{{ m.text }}</td><td class="n">{{ m.n if m.n is not none else "–" }}</td></tr>
{% endfor %}
</table>
{% if hidden %}<p class="soft">{{ hidden }} more are in the certificate.</p>{% endif %}
{% endif %}
</main>
</body>
</html>
"""
