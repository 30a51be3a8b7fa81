// Values of the curves under the pointer, or with the arrow keys on a chart in focus. The charts are there without it.
"use strict";

(() => {
  const SVG = "http://www.w3.org/2000/svg";
  const box = document.getElementById("values");

  /** Three significant digits or more, as the numbers need. */
  const words = (value) => {
    const size = Math.abs(value);
    if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(3);
    return String(Number(value.toPrecision(5)));
  };

  const nearest = (points, x) => points.reduce((best, point) =>
    (best === null || Math.abs(point[0] - x) < Math.abs(best[0] - x) ? point : best), null);

  for (const chart of document.querySelectorAll("svg[data-chart]")) {
    const data = JSON.parse(chart.dataset.chart);
    const lines = data.lines.filter((line) => line.points.length > 0);
    const all = [...new Set(lines.flatMap((line) => line.points.map((point) => point[0])))].sort((a, b) => a - b);
    if (all.length === 0) continue;
    const across = (x) => data.left + ((x - data.x[0]) / (data.x[1] - data.x[0])) * data.width;
    let at = all.length - 1;
    let cursor = null;

    const show = (x, left, top) => {
      hide();
      cursor = document.createElementNS(SVG, "path");
      cursor.setAttribute("class", "cursor");
      cursor.setAttribute("d", `M${across(x)} ${data.top}V${data.top + data.height}`);
      chart.append(cursor);
      const heading = document.createElement("strong");
      heading.textContent = `${data.xName} ${words(x)}`;
      const rows = lines.map((line) => {
        const row = document.createElement("div");
        const [name, value] = [document.createElement("span"), document.createElement("span")];
        const point = nearest(line.points, x);
        name.className = `c${line.color}`;
        name.textContent = line.label;
        value.textContent = point[0] === x ? words(point[1]) : `${words(point[1])} at ${words(point[0])}`;
        row.append(name, value);
        return row;
      });
      box.replaceChildren(heading, ...rows);
      box.hidden = false;
      const size = box.getBoundingClientRect();
      box.style.left = `${Math.max(4, Math.min(left + 14, window.innerWidth - size.width - 4))}px`;
      box.style.top = `${Math.max(4, top - size.height - 12)}px`;
    };
    const hide = () => {
      cursor?.remove();
      cursor = null;
      box.hidden = true;
    };
    const place = () => {
      const frame = chart.getBoundingClientRect();
      show(all[at], frame.left + (across(all[at]) / chart.viewBox.baseVal.width) * frame.width, frame.top + frame.height / 2);
    };

    chart.addEventListener("pointermove", (event) => {
      const frame = chart.getBoundingClientRect();
      const drawn = ((event.clientX - frame.left) / frame.width) * chart.viewBox.baseVal.width;
      const x = data.x[0] + ((drawn - data.left) / data.width) * (data.x[1] - data.x[0]);
      const best = nearest(all.map((value) => [value]), x)[0];
      at = all.indexOf(best);
      show(best, event.clientX, event.clientY);
    });
    chart.addEventListener("pointerleave", hide);
    chart.addEventListener("focus", () => { if (chart.matches(":focus-visible")) place(); });
    chart.addEventListener("blur", hide);
    chart.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1, Home: -all.length, End: all.length }[event.key];
      if (event.key === "Escape") hide();
      if (step === undefined) return;
      at = Math.max(0, Math.min(all.length - 1, at + step));
      place();
      event.preventDefault();
    });
  }
})();
