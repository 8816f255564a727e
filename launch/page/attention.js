"use strict";
const {tokens, layers, heads, weights} = JSON.parse(document.getElementById("data").textContent);
const T = tokens.length, size = T * (T + 1) / 2, bytes = atob(weights);
// A byte is 255 times the square root of a weight, so that small ones are seen, too.
const byteOf = (layer, head, query, key) =>
  key > query ? 0 : bytes.charCodeAt((layer * heads + head) * size + query * (query + 1) / 2 + key);
const weightOf = (...of) => (byteOf(...of) / 255) ** 2;
const percent = weight => weight >= 0.0995 ? Math.round(100 * weight) + "%" : (100 * weight).toFixed(1) + "%";
const find = name => document.querySelector(name), all = name => [...document.querySelectorAll(name)];
const large = find(".field canvas"), field = find(".field"), row = find(".row"), column = find(".column");
const headButtons = all(".heads button"), tokenButtons = all(".tokens button");
let layer = 0, head = 0, pinned = T - 1, query = T - 1, key = null;

const accent = () => {
  const probe = document.createElement("canvas").getContext("2d");
  probe.fillStyle = getComputedStyle(document.documentElement).getPropertyValue("--accent").trim();
  return [1, 3, 5].map(i => parseInt(probe.fillStyle.slice(i, i + 2), 16));
};
const picture = (layer, head) => {
  const image = new ImageData(T, T), [red, green, blue] = accent();
  for (let query = 0; query < T; query++) for (let key = 0; key <= query; key++)
    image.data.set([red, green, blue, byteOf(layer, head, query, key)], 4 * (query * T + key));
  return image;
};
const draw = () => {
  large.width = large.height = T;
  large.getContext("2d").putImageData(picture(layer, head), 0, 0);
};
const whole = document.createElement("canvas");
const drawAll = () => {
  whole.width = whole.height = T;
  for (const button of headButtons) {
    const small = button.firstChild;
    small.width = small.height = Math.min(T, 96);
    whole.getContext("2d").putImageData(picture(+button.dataset.layer, +button.dataset.head), 0, 0);
    small.getContext("2d").drawImage(whole, 0, 0, small.width, small.height);
  }
  draw();
};
const show = () => {
  find("#which").textContent = `Layer ${layer}, head ${head}`;
  for (const button of headButtons)
    button.ariaPressed = +button.dataset.layer === layer && +button.dataset.head === head;
  tokenButtons.forEach((button, i) => {
    const weight = weightOf(layer, head, query, i);
    button.style.setProperty("--weight", Math.sqrt(weight).toFixed(3));
    button.lastChild.textContent = i <= query && weight >= 0.0005 ? percent(weight) : "";
    button.ariaPressed = i === query;
    button.classList.toggle("later", i > query);
  });
  const share = 100 / T;
  row.style.top = query * share + "%"; row.style.height = share + "%";
  column.hidden = key === null;
  if (key !== null) { column.style.left = key * share + "%"; column.style.width = share + "%"; }
  const keys = tokens.map((_, i) => i).slice(0, query + 1);
  const best = keys.sort((a, b) => byteOf(layer, head, query, b) - byteOf(layer, head, query, a)).slice(0, 3);
  const name = i => `“${tokens[i]}” (${i})`, at = i => `${name(i)} ${percent(weightOf(layer, head, query, i))}`;
  find("output").textContent = key === null ? `${name(query)} looks at ${best.map(at).join(", ")}`
    : key > query ? `${name(query)} does not see ${name(key)}, which comes later`
    : `${name(query)} looks at ${at(key)}`;
};
for (const button of headButtons) button.addEventListener("click", () => {
  layer = +button.dataset.layer; head = +button.dataset.head; draw(); show();
});
tokenButtons.forEach((button, i) => {
  button.addEventListener("pointerenter", () => { query = i; key = null; show(); });
  button.addEventListener("pointerleave", () => { query = pinned; show(); });
  button.addEventListener("click", () => { query = pinned = i; key = null; show(); });
});
const point = event => {
  const box = large.getBoundingClientRect(), place = x => Math.min(Math.max(Math.floor(x * T), 0), T - 1);
  query = place((event.clientY - box.top) / box.height); key = place((event.clientX - box.left) / box.width);
  show();
};
field.addEventListener("pointermove", point);
field.addEventListener("click", event => { point(event); pinned = query; });
field.addEventListener("pointerleave", () => { query = pinned; key = null; show(); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
drawAll();
show();
