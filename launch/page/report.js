"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const [left, right] = data.edges, [first, last] = data.between;
const nearest = (steps, step) => {
  let low = 0, high = steps.length - 1;
  while (high - low > 1) { const middle = (low + high) >> 1; steps[middle] <= step ? low = middle : high = middle; }
  return step - steps[low] <= steps[high] - step ? low : high;
};
// While the pointer is over one chart, all of them show their values at its step.
const figures = [...document.querySelectorAll("figure[data-chart]")].map(figure => ({
  svg: figure.querySelector("svg"), output: figure.querySelector("output"), cursor: figure.querySelector(".cursor"),
  when: figure.querySelector(".when"), ...data.charts[figure.dataset.chart],
}));
const show = step => {
  document.body.className = "pointing";
  for (const {cursor, when, output, steps, values} of figures) {
    const i = nearest(steps, step), x = left + (right - left) * (steps[i] - first) / (last - first);
    cursor.setAttribute("d", `M${x} ${data.top}V${data.bottom}`);
    output.textContent = values[i];
    const time = data.times[nearest(data.steps, steps[i])];
    when.textContent = `step ${steps[i].toLocaleString("en")}${time ? " · " + time : ""}`;
    when.setAttribute("x", Math.min(Math.max(x, left + 75), right - 75));
  }
};
const forget = () => {
  document.body.className = "";
  for (const {cursor, when, output, values} of figures) {
    cursor.setAttribute("d", ""); when.textContent = ""; output.textContent = values.at(-1);
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
