// The table of samples.jsonl: filter, sort, page.
(function () {
  const source = document.getElementById("sample-data");
  if (!source) return;
  const data = JSON.parse(source.textContent);
  const table = document.getElementById("sample-table");
  const shown = table.tHead.rows[0].cells.length - 5;
  const PAGE = 25;
  const rows = data.rows.map((row) => {
    const [id, subject, role, prompt, target] = data.texts[row[0]];
    const [model, method, seed] = data.models[row[1]];
    const text = [id, subject, prompt, target, row[3] || ""].join("\n").toLowerCase();
    return { id, subject, role, prompt, target, model, method, seed, verdict: row[2], generated: row[3], numbers: row.slice(4), text };
  });
  const columns = [(r) => r.id, (r) => r.role, (r) => r.method, (r) => r.seed, (r) => r.verdict];
  for (let i = 0; i < shown; i += 1) columns.push((r) => r.numbers[i]);
  const state = { search: "", method: "", seed: "", role: "", verdict: "", page: 0, column: null, turn: 1 };

  function cells(row) {
    const block = (word, text) => el("p", { className: "text" }, [el("b", { textContent: word }), text]);
    const details = el("details", {}, [el("summary", {}, [row.id, " ", el("span", { className: "muted", textContent: row.subject })])]);
    // The body is filled on opening: 25 rows with long documents stay light.
    details.addEventListener("toggle", () => {
      if (!details.open || details.childElementCount > 1) return;
      if (row.prompt) details.append(block("Prompt", row.prompt));
      details.append(block("Target", row.target));
      if (row.generated !== null) details.append(block("Generated", row.generated));
      const rest = data.numbers.map((name, i) => name + " " + (row.numbers[i] === null ? "–" : row.numbers[i]));
      details.append(block("Model " + row.model, rest.join(", ")));
    });
    const verdict = el("td", {}, row.verdict ? [el("span", { className: "verdict " + row.verdict, textContent: row.verdict })] : []);
    const numbers = row.numbers.slice(0, shown).map((v) => el("td", { textContent: v === null ? "–" : String(Number(v.toPrecision(3))) }));
    return [el("th", { scope: "row" }, [details]), ...[row.role, row.method, row.seed].map((v) => el("td", { textContent: v })), verdict, ...numbers];
  }

  let hits = rows;
  const count = document.getElementById("count");
  const pages = document.getElementById("pages");
  const back = el("button", { type: "button", className: "plain", textContent: "Previous" });
  const next = el("button", { type: "button", className: "plain", textContent: "Next" });
  const where = el("span", {});
  pages.append(back, where, next);
  pages.hidden = false;

  function draw() {
    const last = Math.max(0, Math.ceil(hits.length / PAGE) - 1);
    state.page = Math.min(state.page, last);
    const from = state.page * PAGE;
    table.tBodies[0].replaceChildren(...hits.slice(from, from + PAGE).map((row) => el("tr", {}, cells(row))));
    const held = data.total > rows.length ? " (" + data.total + " in samples.jsonl)" : "";
    count.textContent = hits.length
      ? "Rows " + (from + 1) + "–" + Math.min(from + PAGE, hits.length) + " of " + hits.length + (hits.length < rows.length ? ", filtered from " + rows.length : "") + held
      : "No row matches the filter" + held;
    where.textContent = "Page " + (state.page + 1) + " of " + (last + 1);
    back.disabled = state.page === 0;
    next.disabled = state.page === last;
  }

  function refresh() {
    const wanted = state.search.toLowerCase();
    hits = rows.filter((r) => (!state.method || r.method === state.method) && (!state.seed || r.seed === state.seed)
      && (!state.role || r.role === state.role) && (!state.verdict || (r.verdict || "none") === state.verdict)
      && (!wanted || r.text.includes(wanted)));
    if (state.column !== null) {
      const key = columns[state.column];
      hits = hits.slice().sort((a, b) => compare(key(a), key(b), state.turn));
    }
    state.page = 0;
    draw();
  }

  const form = document.getElementById("filters");
  form.addEventListener("submit", (event) => event.preventDefault());
  const search = el("input", { type: "search", placeholder: "id, subject or text" });
  search.addEventListener("input", () => { state.search = search.value; refresh(); });
  form.append(el("label", {}, ["Search", search]));
  const selects = {};
  for (const [name, label] of [["method", "Method"], ["seed", "Seed"], ["role", "Role"], ["verdict", "Verdict"]]) {
    const values = Array.from(new Set(rows.map((r) => (name === "verdict" ? r.verdict || "none" : r[name])))).sort((a, b) => compare(a, b, 1));
    const select = el("select", {}, [el("option", { value: "", textContent: "all" }), ...values.map((v) => el("option", { value: v, textContent: name === "verdict" ? v : v }))]);
    select.addEventListener("change", () => { state[name] = select.value; press(); refresh(); });
    selects[name] = select;
    form.append(el("label", {}, [label, select]));
  }
  const still = el("button", { type: "button", className: "plain", textContent: "Under-unlearned" });
  const clear = el("button", { type: "button", className: "plain", textContent: "Clear" });
  function press() { still.setAttribute("aria-pressed", String(state.verdict === "under-unlearned")); }
  still.addEventListener("click", () => {
    state.verdict = selects.verdict.value = state.verdict === "under-unlearned" ? "" : "under-unlearned";
    press();
    refresh();
  });
  clear.addEventListener("click", () => {
    for (const [name, select] of Object.entries(selects)) state[name] = select.value = "";
    state.search = search.value = "";
    press();
    refresh();
  });
  if (rows.some((r) => r.verdict === "under-unlearned")) form.append(still);
  form.append(clear);
  form.hidden = false;
  press();
  Array.from(table.tHead.rows[0].cells).forEach((th, index) => sortButton(th, (turn) => {
    state.column = index;
    state.turn = turn;
    refresh();
  }));
  back.addEventListener("click", () => { state.page -= 1; draw(); });
  next.addEventListener("click", () => { state.page += 1; draw(); });
  draw();
})();
