// The forget samples of an audit: list, filter, and one sample opened.
(function () {
  const source = document.getElementById("drill-data");
  if (!source) return;
  const data = JSON.parse(source.textContent);
  const kinds = new Map(data.models);
  const list = document.getElementById("drill-list");
  const panel = document.getElementById("drill-sample");
  const count = document.getElementById("drill-count");
  const SVG = el("template", { innerHTML: "<svg></svg>" }).content.firstChild.namespaceURI; // no address in the page
  const LEARNT = 0.5; // nats between original and reference below which a token says nothing
  const MUCH = 0.75;
  const FAR = -0.5;

  function show(value, digits) {
    if (value === null || value === undefined) return "–";
    return String(Number(value.toPrecision(digits || 3))).replace("-", "−");
  }
  function svg(tag, attributes, children) {
    const node = document.createElementNS(SVG, tag);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    for (const child of children || []) node.append(child);
    return node;
  }
  function table(heads, rows) {
    const head = el("tr", {}, heads.map(([text, className]) => el("th", { scope: "col", className: className || "", textContent: text })));
    return el("div", { className: "scroll-x" }, [el("table", { className: "plainlist" }, [el("thead", {}, [head]), el("tbody", {}, rows)])]);
  }
  const cell = (text, className) => el("td", { className: className || "n", textContent: text });
  const title = (text) => el("h4", { textContent: text });

  // How much of what the original had learnt of a token is left: 0 = as in the reference, 1 = as in the original.
  function left(tokens, i) {
    const own = tokens.audited[i];
    const other = tokens.reference ? tokens.reference[i] : null;
    if (own === null || other === null) return null;
    if (!tokens.original) return (own - other) / 3;
    const before = tokens.original[i];
    if (before === null || before - other < LEARNT) return null;
    return (own - other) / (before - other);
  }

  function token(tokens, i) {
    const share = left(tokens, i);
    const numbers = [["audited", tokens.audited], ["reference", tokens.reference], ["original", tokens.original]]
      .filter(([, values]) => values && values[i] !== null).map(([word, values]) => word + " " + show(values[i]));
    const said = share === null ? "no share: the original hardly knew it better" : show(share, 2) + " of what was learnt is left";
    const node = el("span", { className: "tok", title: "log p: " + numbers.join(", ") + "; " + (tokens.reference ? said : "no reference") });
    if (share === null) node.classList.add("blank");
    else {
      node.classList.add(share >= 0 ? "left" : "past");
      node.style.setProperty("--w", Math.min(1, Math.abs(share)).toFixed(2));
      if (share >= MUCH) node.classList.add("much");
      if (share <= FAR) node.classList.add("far");
    }
    node.append(tokens.text[i].replaceAll("\n", "↵\n"), el("small", { textContent: share === null ? "·" : show(share, 2) }));
    return node;
  }

  function heatmap(sample) {
    const tokens = sample.tokens;
    if (!tokens || !tokens.text.length || !tokens.audited) return [];
    const text = el("p", { className: "tokens" }, tokens.text.map((_, i) => token(tokens, i)));
    if (tokens.more) text.append(" … (" + tokens.more + " more tokens)");
    const box = el("input", { type: "checkbox" });
    box.addEventListener("change", () => text.classList.toggle("numbered", box.checked));
    const key = (className, weight, words) => {
      const mark = el("span", { className: "tok " + className, textContent: words });
      mark.style.setProperty("--w", weight);
      return mark;
    };
    const legend = !tokens.reference
      ? ["No reference was given, so nothing can be said of what is left; log-probabilities stand in the titles."]
      : [key("left much", "1", "1: as in the original"), key("left", ".5", "half is left"), key("left", "0", "0: as in the reference"),
        key("past far", ".7", "less than the reference"), key("blank", "0", tokens.original ? "grey: hardly learnt (below " + LEARNT + " nats)" : "grey: not known"),
        ...(tokens.original ? [] : ["Without the original, 1 stands for 3 nats more than the reference."])];
    return [title("What is left, token by token"), text, el("p", { className: "key-tokens" }, [...legend, el("label", {}, [box, " numbers"])])];
  }

  // Words of the target that the prompt does not give away are marked in the answers.
  function answer(text, sample) {
    const split = (s) => s.toLowerCase().match(/[\p{L}\p{N}]+/gu) || [];
    const given = new Set(split(sample.prompt));
    const secret = new Set(split(sample.target).filter((word) => (word.length > 3 || /\p{N}/u.test(word)) && !given.has(word)));
    const parts = text.split(/([\p{L}\p{N}]+)/u);
    return el("p", {}, parts.map((part) => (secret.has(part.toLowerCase()) ? el("mark", { textContent: part }) : part)));
  }

  function answers(sample) {
    const names = Object.keys(sample.answers);
    const order = ["original", "audited", "reference", "shadow", "base"];
    const place = (name) => (order.includes(kinds.get(name)) ? order.indexOf(kinds.get(name)) : order.length);
    names.sort((a, b) => place(a) - place(b));
    const boxes = names.map((name) => {
      const kind = kinds.get(name) || name;
      const head = el("h5", { textContent: name === kind ? kind : kind + ": " + name });
      return el("div", { className: kind === "audited" ? "audited" : "" }, [head, answer(sample.answers[name], sample)]);
    });
    boxes.unshift(el("div", {}, [el("h5", { textContent: "target" }), el("p", { textContent: sample.target })]));
    return boxes.length > 1 ? [title("Answers side by side"), el("div", { className: "answers" }, boxes), el("p", { className: "muted", textContent: "Underlined: words of the target (numbers, or four letters and more) that the prompt does not give." })] : [];
  }

  function plot(five) {
    const [own, before, middle, low, high] = five;
    const values = five.filter((v) => v !== null);
    const bottom = Math.min(...values), top = Math.max(...values);
    const span = top - bottom || 1;
    const x = (v) => (8 + 184 * (v - bottom) / span).toFixed(1);
    const parts = [svg("line", { class: "rule", x1: 8, x2: 192, y1: 11, y2: 11 })];
    if (low !== null && high !== null) parts.push(svg("rect", { class: "band", x: x(low), y: 5, width: Math.max(2, x(high) - x(low)), height: 12 }));
    if (middle !== null) parts.push(svg("line", { class: "reference", x1: x(middle), x2: x(middle), y1: 5, y2: 17 }));
    if (before !== null) parts.push(svg("path", { class: "original", d: "M" + x(before) + " 6l5 5-5 5-5-5z" }));
    if (own !== null) parts.push(svg("circle", { class: "audited", cx: x(own), cy: 11, r: 4 }));
    return svg("svg", { class: "dots", viewBox: "0 0 200 22", role: "img", "aria-label": "audited " + show(own) + ", reference " + show(middle) + ", original " + show(before) }, parts);
  }

  // How far outside the range of the models that never saw the sample, in widths of that range.
  function beyond(five) {
    const [own, , , low, high] = five;
    if (own === null || low === null || high === null) return 0;
    const width = high - low || Math.abs(high) * 1e-6 || 1e-9;
    return own > high ? (own - high) / width : own < low ? (own - low) / width : 0;
  }

  function scores(sample) {
    const found = data.scores.map((name, i) => [name, sample.scores[i]]).filter(([, five]) => five && five[0] !== null);
    if (!found.length) return [];
    const side = (out) => (out > 0 ? 0 : out < 0 ? 1 : 2);
    found.sort(([, a], [, b]) => side(beyond(a)) - side(beyond(b)) || Math.abs(beyond(b)) - Math.abs(beyond(a)));
    const rows = found.map(([name, five]) => {
      const out = beyond(five);
      const word = five[3] === null ? "no range" : out > 0 ? "▲ above" : out < 0 ? "▼ below" : "within";
      return el("tr", {}, [el("th", { scope: "row", textContent: name }), el("td", { className: "wide" }, [plot(five)]), cell(show(five[0])), cell(word, out > 0 ? "beyond" : out < 0 ? "below" : ""),
        cell(five[3] === null ? "–" : show(five[3]) + " to " + show(five[4])), cell(show(five[2])), cell(show(five[1]))]);
    });
    return [title("Each attack's score"), table([["score"], ["lowest to highest"], ["audited", "n"], ["", ""], ["range, unseen", "n"], ["reference", "n"], ["original", "n"]], rows),
      el("p", { className: "muted", textContent: "Higher: more is left. The range is that of references and shadows, models that never saw the sample." })];
  }

  function neighbours(sample) {
    if (!sample.neighbours.length) return [];
    const rows = sample.neighbours.map(([id, target, similarity, own, other]) => el("tr", {}, [
      el("th", { scope: "row", textContent: id }), cell(target, "wide"), cell(show(similarity)), cell(show(own)), cell(show(other)),
      cell(own === null || other === null ? "–" : (own > other ? "+" : "") + show(own - other)),
    ]));
    return [title("Nearest samples that were kept"), table([["sample"], ["target"], ["similarity", "n"], ["loss, audited", "n"], ["loss, reference", "n"], ["difference", "n"]], rows)];
  }

  function details(sample) {
    const blocks = Object.entries(sample.details).map(([name, pairs]) => el("details", {}, [
      el("summary", { textContent: name }),
      el("dl", { className: "pairs" }, pairs.flatMap(([word, text]) => [el("dt", { textContent: word || "text" }), el("dd", { textContent: text })])),
    ]));
    return blocks.length ? [title("What single attacks found"), ...blocks] : [];
  }

  function open(sample, jump) {
    const mark = el("span", { className: "verdict " + (sample.verdict || ""), textContent: sample.verdict || "not judged" });
    const facts = [["completeness", sample.completeness], ["position", sample.position], ["p, under", sample.p_under], ["p, over", sample.p_over], ["completeness under attack" + (sample.view ? " (" + sample.view + ")" : ""), sample.completeness_attacked]]
      .filter(([, value]) => value !== null).map(([word, value]) => el("span", { textContent: word + " " + show(value) }));
    const losses = Object.entries(sample.losses).filter(([name, value]) => value !== null && kinds.get(name) !== "shadow")
      .map(([name, value]) => name + " " + show(value));
    const block = (word, text) => el("p", { className: "text" }, [el("b", { textContent: word }), text]);
    panel.replaceChildren(
      el("h3", {}, [sample.id, " ", el("span", { className: "muted", textContent: sample.subject })]),
      el("p", { className: "facts" }, [mark, ...facts]),
      ...(losses.length ? [el("p", { className: "facts muted", textContent: "loss, nats per token: " + losses.join(", ") })] : []),
      ...(sample.prompt ? [block("Prompt", sample.prompt)] : []), block("Target", sample.target),
      ...heatmap(sample), ...answers(sample), ...scores(sample), ...neighbours(sample), ...details(sample),
    );
    for (const button of list.querySelectorAll("button")) button.setAttribute("aria-current", String(button.sample === sample));
    const narrow = window.matchMedia("(max-width: 760px)").matches;
    if (jump && (narrow || panel.getBoundingClientRect().top < 0)) panel.scrollIntoView({ block: "start" });
  }

  const state = { search: "", verdict: "", subject: "", order: "worst" };
  for (const sample of data.samples) sample.text = [sample.id, sample.subject, sample.prompt, sample.target, ...Object.values(sample.answers)].join("\n").toLowerCase();
  const orders = {
    worst: ["worst first", null],
    completeness: ["least complete first", (s) => s.completeness],
    position: ["most left first", (s) => (s.position === null ? null : -s.position)],
    id: ["id", (s) => s.id],
  };

  function refresh() {
    const wanted = state.search.toLowerCase();
    const hits = data.samples.filter((s) => (!state.verdict || (s.verdict || "not judged") === state.verdict)
      && (!state.subject || s.subject === state.subject) && (!wanted || s.text.includes(wanted)));
    const key = orders[state.order][1];
    if (key) hits.sort((a, b) => compare(key(a), key(b), 1));
    list.replaceChildren(...hits.map((sample) => {
      const button = el("button", { type: "button" }, [
        el("span", { className: "line" }, [el("span", { className: "verdict " + (sample.verdict || ""), textContent: sample.verdict || "not judged" }), el("span", { className: "muted", textContent: sample.completeness === null ? "" : " " + show(sample.completeness, 2) })]),
        el("span", { className: "line" }, [sample.id + " ", el("span", { className: "muted", textContent: sample.subject })]),
        el("span", { className: "line muted", textContent: sample.target }),
      ]);
      button.sample = sample;
      button.addEventListener("click", () => open(sample, true));
      return el("li", {}, [button]);
    }));
    const held = data.total > data.samples.length ? ", of the " + data.samples.length + " worst of " + data.total + " (all are in drill.jsonl)" : " of " + data.total;
    count.textContent = hits.length ? hits.length + held + " forget samples" : "No sample matches the filter";
    if (hits.length) open(hits[0], false); else panel.replaceChildren();
  }

  const form = document.getElementById("drill-filters");
  form.addEventListener("submit", (event) => event.preventDefault());
  const search = el("input", { type: "search", placeholder: "id, subject or text" });
  search.addEventListener("input", () => { state.search = search.value; refresh(); });
  form.append(el("label", {}, ["Search", search]));
  const tally = (values) => Array.from(values.reduce((m, v) => m.set(v, (m.get(v) || 0) + 1), new Map()));
  function choice(label, name, options) {
    const select = el("select", {}, options.map(([value, text]) => el("option", { value: value, textContent: text })));
    select.addEventListener("change", () => { state[name] = select.value; refresh(); });
    form.append(el("label", {}, [label, select]));
  }
  const verdicts = tally(data.samples.map((s) => s.verdict || "not judged"));
  const subjects = tally(data.samples.map((s) => s.subject)).filter(([value]) => value !== "").sort((a, b) => compare(a[0], b[0], 1));
  choice("Verdict", "verdict", [["", "all"], ...verdicts.map(([v, n]) => [v, v + " (" + n + ")"])]);
  if (subjects.length > 1) choice("Subject", "subject", [["", "all"], ...subjects.map(([v, n]) => [v, v + " (" + n + ")"])]);
  choice("Order", "order", Object.entries(orders).map(([value, [text]]) => [value, text]));
  form.hidden = false;
  document.getElementById("drill-view").hidden = false;
  document.getElementById("drill-plain").hidden = true;
  refresh();
})();
