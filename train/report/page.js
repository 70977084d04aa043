"use strict";
const every = (selector, act, root = document) => root.querySelectorAll(selector).forEach(act);

// Tables say when they are wider than the window.
const seen = new ResizeObserver(boxes => requestAnimationFrame(() => boxes.forEach(({target: box}) =>
  box.classList.toggle("scrolls", box.scrollWidth > box.clientWidth + 1))));
every(".scroll, .wide", box => seen.observe(box));

// A press on a header sorts its table: as numbers where cells start with one.
every("table", table => every("th button", (button, column) => button.addEventListener("click", () => {
  const head = button.parentElement, down = head.getAttribute("aria-sort") !== "descending";
  every("th", other => other.removeAttribute("aria-sort"), table);
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const key = row => {
    const text = row.cells[column].textContent, number = parseFloat(text.replace("−", "-").replaceAll(",", ""));
    return Number.isNaN(number) ? text : number;
  };
  const compare = (x, y) => x < y ? -1 : x > y ? 1 : 0;
  const apart = (x, y) => (typeof y === "number") - (typeof x === "number");  // words after numbers, in both directions
  const rows = [...table.tBodies[0].rows].map(row => [key(row), row]);
  rows.sort(([x], [y]) => apart(x, y) || (down ? compare(y, x) : compare(x, y)));
  table.tBodies[0].append(...rows.map(([, row]) => row));
}), table));

// A legend's entry hides and shows a series on the whole page; under the pointer, or focused, it stands out.
const drawn = {};
every(".series", part => (drawn[part.dataset.series] ??= []).push(part));
const show = (name, on) => {
  (drawn[name] ?? []).forEach(part => part.classList.toggle("off", !on));
  every(".chip input", box => { if (box.value === name) box.checked = on; });
};
every(".chip input", box => {
  const light = on => (drawn[box.value] ?? []).forEach(part => {
    part.classList.toggle("on", on);
    part.closest(".panels").classList.toggle("lit", on);
  });
  box.addEventListener("change", () => show(box.value, box.checked));
  box.parentElement.addEventListener("pointerenter", () => light(box.checked));
  box.parentElement.addEventListener("pointerleave", () => light(false));
  box.addEventListener("focus", () => light(box.checked && box.matches(":focus-visible")));
  box.addEventListener("blur", () => light(false));
});
every("button[data-all]", button => button.addEventListener("click", () =>
  every("input", box => show(box.value, button.dataset.all === "1"), button.closest("fieldset"))));
