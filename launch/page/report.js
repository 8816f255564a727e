follow((figure, place) => {
  const {steps, values} = figure.chart, i = nearest(steps, place), time = data.times[nearest(data.steps, steps[i])];
  mark(figure, steps[i], `step ${steps[i].toLocaleString("en")}${time ? " · " + time : ""}`, 150);
  figure.outputs[0].textContent = values[i];
}, ({outputs, chart}) => { outputs[0].textContent = chart.values.at(-1); });
