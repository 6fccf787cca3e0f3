"use strict";
(() => {
  // The choice of colours is kept where the browser lets a file keep anything.
  const key = "flashtune-theme";
  const radios = [...document.querySelectorAll("input[name=theme]")];
  try {
    const kept = localStorage.getItem(key);
    const radio = radios.find((one) => one.id === kept);
    if (radio) radio.checked = true;
  } catch { /* nothing is kept */ }
  for (const radio of radios) {
    radio.addEventListener("change", () => {
      try { localStorage.setItem(key, radio.id); } catch { /* nothing is kept */ }
    });
  }
  const value = (row, place) => {
    const cell = row.cells[place];
    const order = cell?.dataset.order;
    return order === undefined ? (cell?.textContent ?? "") : Number(order);
  };
  const compare = (a, b) => {
    if (typeof a === typeof b) return typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true });
    return typeof a === "number" ? -1 : 1;
  };
  for (const heading of document.querySelectorAll("th")) {
    heading.tabIndex = 0;
    heading.classList.add("sortable");
    const sort = () => {
      const body = heading.closest("table").tBodies[0];
      const down = heading.getAttribute("aria-sort") === "ascending";
      for (const other of heading.parentNode.cells) other.removeAttribute("aria-sort");
      heading.setAttribute("aria-sort", down ? "descending" : "ascending");
      const place = heading.cellIndex;
      const rows = [...body.rows].sort((a, b) => compare(value(a, place), value(b, place)) * (down ? -1 : 1));
      body.append(...rows);
    };
    heading.addEventListener("click", sort);
    heading.addEventListener("keydown", (event) => { if (event.key === "Enter") sort(); });
  }
  // A figure's words at once, where a pointer would have to wait for them.
  const tip = document.createElement("div");
  tip.id = "tip";
  tip.hidden = true;
  document.body.append(tip);
  for (const mark of document.querySelectorAll(".mark")) {
    const title = mark.querySelector("title");
    if (!title) continue;
    const words = title.textContent;
    mark.setAttribute("aria-label", words);
    mark.addEventListener("pointerenter", () => {
      title.textContent = "";
      tip.textContent = words;
      tip.hidden = false;
      const box = mark.getBoundingClientRect();
      const left = Math.min(Math.max(8, box.left + box.width / 2 - tip.offsetWidth / 2), innerWidth - tip.offsetWidth - 8);
      tip.style.left = `${left + scrollX}px`;
      tip.style.top = `${(box.top > tip.offsetHeight + 12 ? box.top - tip.offsetHeight - 8 : box.bottom + 8) + scrollY}px`;
    });
    mark.addEventListener("pointerleave", () => {
      title.textContent = words;
      tip.hidden = true;
    });
  }
})();
