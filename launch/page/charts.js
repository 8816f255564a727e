"use strict";
// Charts with a cursor under the pointer, for the script that comes after this one.
const data = JSON.parse(document.getElementById("data").textContent);
const [left, right] = data.edges, [first, last] = data.between;
const nearest = (places, place) => {
  let low = 0, high = places.length - 1;
  while (high - low > 1) { const middle = (low + high) >> 1; places[middle] <= place ? low = middle : high = middle; }
  return place - places[low] <= places[high] - place ? low : high;
};
const figures = [...document.querySelectorAll("figure[data-chart]")].map(figure => ({
  svg: figure.querySelector("svg"), cursor: figure.querySelector(".cursor"), when: figure.querySelector(".when"),
  outputs: [...figure.querySelectorAll("output")], chart: data.charts[figure.dataset.chart],
}));
// Puts the cursor of a figure at a place of its axis, with a text below that is `width` wide.
const mark = ({cursor, when}, place, text, width) => {
  const x = left + (right - left) * (place - first) / (last - first);
  cursor.setAttribute("d", `M${x} ${data.top}V${data.bottom}`);
  when.textContent = text;
  when.setAttribute("x", Math.min(Math.max(x, left + width / 2), right - width / 2));
};
// While the pointer is over one chart, calls show(figure, place) for all of them; then end(figure), without cursors.
const follow = (show, end) => {
  for (const {svg} of figures) {
    svg.addEventListener("pointermove", event => {
      const box = svg.getBoundingClientRect();
      const x = (event.clientX - box.left) * svg.viewBox.baseVal.width / box.width;
      const place = first + Math.min(Math.max((x - left) / (right - left), 0), 1) * (last - first);
      document.body.className = "pointing";
      for (const figure of figures) show(figure, place);
    });
    svg.addEventListener("pointerleave", () => {
      document.body.className = "";
      for (const figure of figures) {
        figure.cursor.setAttribute("d", ""); figure.when.textContent = ""; end(figure);
      }
    });
  }
};
