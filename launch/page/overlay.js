"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const [left, right] = data.edges, [first, last] = data.between;
const nearest = (places, place) => {
  let low = 0, high = places.length - 1;
  while (high - low > 1) { const middle = (low + high) >> 1; places[middle] <= place ? low = middle : high = middle; }
  return place - places[low] <= places[high] - place ? low : high;
};
const figures = [...document.querySelectorAll("figure[data-chart]")].map(figure => ({
  svg: figure.querySelector("svg"), cursor: figure.querySelector(".cursor"), when: figure.querySelector(".when"),
  outputs: [...figure.querySelectorAll("output")], lines: data.charts[figure.dataset.chart],
}));
// Each group's mean at the point of each of its lines that is nearest to some tokens.
const write = ({outputs, lines}, tokens) => {
  for (const output of outputs) {
    const values = lines.filter(line => line.group === Number(output.dataset.group))
      .map(line => line.y[nearest(line.x, tokens)]).filter(value => value !== null);
    const mean = values.reduce((sum, value) => sum + value, 0) / values.length;
    output.textContent = values.length ? Number(mean.toPrecision(4)).toLocaleString("en", {maximumSignificantDigits: 4}) : "–";
  }
};
const show = tokens => {
  document.body.className = "pointing";
  for (const figure of figures) {
    const x = left + (right - left) * (tokens - first) / (last - first);
    figure.cursor.setAttribute("d", `M${x} ${data.top}V${data.bottom}`);
    write(figure, tokens);
    figure.when.textContent = `${Math.round(tokens).toLocaleString("en")} tokens`;
    figure.when.setAttribute("x", Math.min(Math.max(x, left + 50), right - 50));
  }
};
const forget = () => {
  document.body.className = "";
  for (const figure of figures) {
    figure.cursor.setAttribute("d", ""); figure.when.textContent = ""; write(figure, last);
  }
};
for (const {svg} of figures) {
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect();
    const x = (event.clientX - box.left) * svg.viewBox.baseVal.width / box.width;
    show(first + Math.min(Math.max((x - left) / (right - left), 0), 1) * (last - first));
  });
  svg.addEventListener("pointerleave", forget);
}
forget();
