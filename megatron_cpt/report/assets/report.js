// Interactive charts in place of the SVG ones: hover, zoom, hide a curve, logarithmic scale.
(() => {
  "use strict";
  const root = document.documentElement;
  const data = JSON.parse(document.getElementById("report-data").textContent);
  const color = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const create = (tag, className) => Object.assign(document.createElement(tag), { className });
  const number = (value) => (Math.abs(value) >= 1e6 || (value && Math.abs(value) < 1e-3) ? value.toExponential(3).replace(/\.?0+e/, "e") : String(+value.toPrecision(5)));
  const FONT = "12px system-ui, sans-serif";
  const HEIGHT = 270;
  const charts = [];

  // The value of a curve at a place, or at the nearest place that has one: runs have their lines at other steps.
  const near = (values, place) => {
    for (let far = 0; far <= 12; far++) {
      for (const at of [place - far, place + far]) {
        if (values[at] != null) return values[at];
      }
    }
    return null;
  };

  const drawMarks = (plot, chart) => {
    const context = plot.ctx, box = plot.bbox, ratio = devicePixelRatio;
    const shown = ([step]) => step >= plot.scales.x.min && step <= plot.scales.x.max;
    context.save();
    context.font = `${12 * ratio}px system-ui, sans-serif`;
    context.textAlign = "center";
    context.fillStyle = color("--faint");
    context.strokeStyle = color("--ink");
    context.lineWidth = ratio;
    context.setLineDash([3 * ratio, 3 * ratio]);
    for (const [step, name] of chart.switches.filter(shown)) {
      const x = Math.round(plot.valToPos(step, "x", true));
      context.beginPath();
      context.moveTo(x, box.top);
      context.lineTo(x, box.top + box.height);
      context.stroke();
      context.fillText(`${name} from here`, x, box.top - 6 * ratio);
    }
    context.setLineDash([]);
    context.fillStyle = color("--flag");
    for (const [step] of chart.flags.filter(shown)) {
      const x = plot.valToPos(step, "x", true);
      context.beginPath();
      context.moveTo(x, box.top);
      context.lineTo(x - 4 * ratio, box.top - 7 * ratio);
      context.lineTo(x + 4 * ratio, box.top - 7 * ratio);
      context.fill();
    }
    context.restore();
  };

  const drawErrors = (plot, chart) => {
    const context = plot.ctx, ratio = devicePixelRatio;
    context.save();
    context.lineWidth = 1.4 * ratio;
    chart.curves.forEach((curve, place) => {
      if (!curve.errors || !plot.series[place + 1].show) return;
      context.strokeStyle = color(`--c${curve.color}`);
      curve.errors.forEach((error, at) => {
        const value = curve.values[at], step = chart.steps[at];
        if (error == null || value == null || step < plot.scales.x.min || step > plot.scales.x.max) return;
        const x = plot.valToPos(step, "x", true);
        const ends = [value - error, value + error].map((end) => plot.valToPos(end, "y", true));
        context.beginPath();
        context.moveTo(x, ends[0]);
        context.lineTo(x, ends[1]);
        for (const y of ends) {
          context.moveTo(x - 4 * ratio, y);
          context.lineTo(x + 4 * ratio, y);
        }
        context.stroke();
      });
    });
    context.restore();
  };

  const showTip = (plot, chart, tip) => {
    const { left, top, idx } = plot.cursor;
    tip.hidden = idx == null || left < 0 || !plot.over.matches(":hover");
    if (tip.hidden) return;
    const line = (label, value, className) => {
      const row = create("div", ""), name = create("span", className), text = create("b", "");
      name.textContent = label;
      text.textContent = value;
      row.append(name, text);
      return row;
    };
    const rows = [line("step", chart.steps[idx].toLocaleString("en"), "")];
    chart.curves.forEach((curve, place) => {
      const value = near(curve.values, idx), error = curve.errors && curve.errors[idx];
      if (value == null || !plot.series[place + 1].show) return;
      rows.push(line(curve.label, number(value) + (error == null ? "" : ` ± ${number(error)}`), `c${curve.color}`));
    });
    for (const [step, text] of chart.flags) {
      if (Math.abs(plot.valToPos(step, "x") - left) < 5) rows.push(line(`step ${step.toLocaleString("en")}`, text, ""));
    }
    tip.replaceChildren(...rows);
    const width = plot.over.clientWidth;
    const x = left + 16 + tip.offsetWidth > width ? left - 16 - tip.offsetWidth : left + 16;
    tip.style.left = `${Math.max(0, x)}px`;
    tip.style.top = `${Math.max(0, Math.min(top + 12, plot.over.clientHeight - tip.offsetHeight))}px`;
  };

  const build = (item) => {
    const { chart, holder } = item;
    const bounds = item.plot && { min: item.plot.scales.x.min, max: item.plot.scales.x.max };
    if (item.plot) item.plot.destroy();
    const axis = { stroke: color("--faint"), font: FONT, grid: { stroke: color("--grid"), width: 1 }, ticks: { stroke: color("--line"), width: 1, size: 5 } };
    const tip = create("div", "tip");
    tip.hidden = true;
    const range = (plot, low, high) => {
      if (item.isLog) return uPlot.rangeLog(low, high, 10, false);
      const spread = chart.curves.flatMap((curve) => (curve.errors || []).map((e) => e || 0));
      const error = spread.length ? Math.max(...spread) : 0;
      const pad = (high - low) * 0.06 || Math.abs(high) * 0.05 || 0.5;
      return [low - error - pad, high + error + pad];
    };
    item.plot = new uPlot({
      width: Math.max(holder.clientWidth, 200),
      height: HEIGHT,
      padding: [22, 14, 0, 0],
      legend: { show: false },
      cursor: { sync: { key: "steps" }, drag: { x: true, y: false }, points: { size: 6 } },
      scales: { x: { time: false }, y: { distr: item.isLog ? 3 : 1, range } },
      axes: [{ ...axis, label: "step", labelFont: FONT, labelSize: 18, size: 34 }, { ...axis, size: 62, values: (_, ticks) => ticks.map((tick) => (tick == null ? "" : number(tick))) }],
      series: [{}, ...chart.curves.map((curve, place) => ({
        label: curve.label,
        stroke: color(`--c${curve.color}`),
        width: 1.6,
        dash: curve.dashes,
        spanGaps: true,
        show: item.shown[place],
        points: { show: chart.has_points, size: 7, fill: color(`--c${curve.color}`) },
      }))],
      hooks: { drawClear: [(plot) => drawMarks(plot, chart)], draw: [(plot) => drawErrors(plot, chart)], setCursor: [(plot) => showTip(plot, chart, tip)] },
    }, [chart.steps, ...chart.curves.map((curve) => curve.values)], holder);
    item.plot.over.append(tip);
    item.plot.over.addEventListener("mouseleave", () => { tip.hidden = true; });
    if (bounds && bounds.min != null) item.plot.setScale("x", bounds);
  };

  const button = (label, isPressed, onClick) => {
    const made = create("button", "");
    made.type = "button";
    made.append(...(typeof label === "string" ? [label] : label));
    made.setAttribute("aria-pressed", isPressed);
    made.addEventListener("click", () => {
      const pressed = made.getAttribute("aria-pressed") !== "true";
      made.setAttribute("aria-pressed", pressed);
      onClick(pressed);
    });
    return made;
  };

  const open = (figure) => {
    const chart = data.charts[figure.dataset.chart];
    const values = chart.curves.flatMap((curve) => curve.values).filter((value) => value != null);
    if (!values.length) return;
    const holder = create("div", "plot");
    const item = { chart, holder, isLog: false, shown: chart.curves.map(() => true), plot: null };
    const legend = figure.querySelector(".legend");
    if (chart.curves.length > 1) {
      [...legend.children].forEach((entry, place) => {
        const toggle = button([...entry.childNodes], true, (isShown) => {
          item.shown[place] = isShown;
          item.plot.setSeries(place + 1, { show: isShown });
        });
        toggle.title = "Show or hide this curve";
        entry.replaceChildren(toggle);
      });
    }
    if (values.every((value) => value > 0)) {
      const scale = button("log scale", false, (isLog) => {
        item.isLog = isLog;
        build(item);
      });
      scale.classList.add("scale");
      const entry = create("li", "scale");
      entry.append(scale);
      legend.append(entry);
    }
    figure.insertBefore(holder, figure.querySelector(":scope > svg"));
    figure.classList.add("live");
    build(item);
    charts.push(item);
    new ResizeObserver(() => {
      const width = holder.clientWidth;
      if (width && Math.abs(width - item.plot.width) > 1) item.plot.setSize({ width, height: HEIGHT });
    }).observe(figure);
  };

  root.classList.add("js");
  document.querySelectorAll("figure[data-chart]").forEach((figure) => {
    try {
      open(figure);
    } catch (error) {
      figure.classList.remove("live");
      figure.querySelectorAll(".plot").forEach((plot) => plot.remove());
      console.error(error);
    }
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => charts.forEach(build));
})();
