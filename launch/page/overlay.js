// Each group's mean at the point of each of its lines that is nearest to some tokens.
const write = ({outputs, chart}, tokens) => {
  for (const output of outputs) {
    const values = chart.filter(line => line.group === Number(output.dataset.group))
      .map(line => line.y[nearest(line.x, tokens)]).filter(value => value !== null);
    const mean = values.reduce((sum, value) => sum + value, 0) / values.length;
    output.textContent = values.length ? Number(mean.toPrecision(4)).toLocaleString("en", {maximumSignificantDigits: 4}) : "–";
  }
};
follow((figure, tokens) => {
  mark(figure, tokens, `${Math.round(tokens).toLocaleString("en")} tokens`, 100);
  write(figure, tokens);
}, figure => write(figure, last));
for (const figure of figures) write(figure, last);
