"use strict";
// Shared by every part of the page. Untrusted text (prompts, answers, names) reaches it through textContent only.
function el(tag, properties, children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(properties || {})) {
    if (key in node) node[key] = value; else node.setAttribute(key, value);
  }
  for (const child of children || []) node.append(child);
  return node;
}

// Missing values go last whichever way the column is sorted.
function compare(a, b, turn) {
  const none = (v) => v === null || v === undefined || v === "";
  if (none(a) || none(b)) return none(a) - none(b);
  if (typeof a === "number" && typeof b === "number") return turn * (a - b);
  return turn * String(a).localeCompare(String(b), undefined, { numeric: true });
}

function sortButton(th, onSort) {
  const button = el("button", { type: "button", title: "Sort by this column" });
  button.append(...th.childNodes);
  th.append(button);
  button.addEventListener("click", () => {
    const up = th.getAttribute("aria-sort") !== "ascending";
    for (const other of th.parentNode.children) other.removeAttribute("aria-sort");
    th.setAttribute("aria-sort", up ? "ascending" : "descending");
    onSort(up ? 1 : -1);
  });
}

// Every group of rows is sorted within itself, under its own head.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = table.tHead.rows[table.tHead.rows.length - 1].cells;
  Array.from(heads).forEach((th, index) => sortButton(th, (turn) => {
    const key = (row) => {
      const cell = row.cells[index];
      if (index === 0) return cell.textContent;
      if (cell.dataset.t !== undefined) return cell.dataset.t;
      return cell.dataset.v === undefined ? null : Number(cell.dataset.v);
    };
    for (const body of table.tBodies) {
      const rows = Array.from(body.rows).filter((row) => !row.classList.contains("head"));
      body.append(...rows.sort((a, b) => compare(key(a), key(b), turn)));
    }
  }));
}
