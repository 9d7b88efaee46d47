// Drawings: trend charts (uPlot), sparklines and bars (SVG).

/** Colours for canvas: custom properties do not resolve by themselves, the colour of an element does. */
function inks() {
  const probe = el("span", { hidden: false });
  document.body.append(probe);
  const ink = (name) => {
    probe.style.color = `var(--${name})`;
    return getComputedStyle(probe).color;
  };
  const colours = {
    axis: ink("muted"), grid: ink("line"), mark: ink("warning"),
    series: [0, 1, 2, 3, 4, 5].map((n) => ink(`series-${n}`)),
  };
  probe.remove();
  return colours;
}

/** The colour with less opacity; computed colours are rgb(r, g, b) or color(srgb r g b). */
const faded = (colour, alpha) =>
  colour.startsWith("rgb(") ? colour.replace("rgb(", "rgba(").replace(")", `, ${alpha})`) : colour.replace(")", ` / ${alpha})`);

/** Shades the time of growth without a break, and says so. */
function drawGrowth(u, mark, colour) {
  const from = Math.max(u.valToPos(mark.since, "x", true), u.bbox.left);
  const to = Math.min(u.valToPos(mark.until, "x", true), u.bbox.left + u.bbox.width);
  if (to <= from) return;
  const { ctx } = u, ratio = devicePixelRatio || 1;
  ctx.save();
  ctx.fillStyle = faded(colour, 0.1);
  ctx.fillRect(from, u.bbox.top, to - from, u.bbox.height);
  ctx.fillStyle = colour;
  ctx.fillRect(from, u.bbox.top, ratio, u.bbox.height);
  ctx.font = `${11 * ratio}px system-ui, sans-serif`;
  ctx.textBaseline = "top";
  ctx.textAlign = "left";
  const label = `growing for ${formatDuration(mark.until - mark.since)}`;
  if (ctx.measureText(label).width + 12 * ratio < to - from) ctx.fillText(label, from + 6 * ratio, u.bbox.top + 5 * ratio);
  ctx.restore();
}

const powersOfTwo = Array.from({ length: 50 }, (_, n) => 2 ** n);
const wholeNumbers = [1, 2, 5].flatMap((n) => Array.from({ length: 13 }, (_, e) => n * 10 ** e)).sort((a, b) => a - b);

/**
 * A chart of several series over time in `box`.
 * `lines`: [{ time, values, colour (index), label, fill }]; `options`: { bytes, mark, sync, onCursor, height }.
 * Returns an object with destroy(), or null when there is nothing to draw.
 */
function makeChart(box, lines, options) {
  box.replaceChildren();
  const drawable = lines.filter((line) => line.time.length > 1);
  if (!drawable.length) {
    box.append(el("div", { className: "none" }, lines.length ? "Too few snapshots for a trend" : "Nothing selected"));
    return null;
  }
  const colours = inks();
  const format = options.bytes ? formatBytes : formatCount;
  const tables = drawable.map((line) => [line.time, line.values]);
  const joined = tables.length > 1 ? uPlot.join(tables) : tables[0];
  const axis = { stroke: colours.axis, grid: { stroke: colours.grid, width: 1 }, ticks: { show: false }, font: "11px system-ui, sans-serif" };
  const chart = new uPlot({
    width: box.clientWidth, height: box.clientHeight,
    tzDate: (wall) => uPlot.tzDate(new Date(wall * 1000), "Etc/UTC"),
    legend: { show: false },
    cursor: { points: { size: 6 }, ...(options.sync ? { sync: { key: options.sync, setSeries: false } } : {}) },
    scales: { y: { range: (u, low, high) => [0, high > 0 ? high * 1.06 : 1] } },
    axes: [
      { ...axis, grid: { show: false }, size: 30, space: 70, values: (u, ticks, i, space, step) => ticks.map((t) => formatTime(t, step)) },
      { ...axis, size: options.bytes ? 76 : 62, space: 34, incrs: options.bytes ? powersOfTwo : wholeNumbers, values: (u, ticks) => ticks.map((t) => (t === 0 ? "0" : format(t).replace(".0 ", " "))) },
    ],
    series: [{}, ...drawable.map((line) => ({
      label: line.label, stroke: colours.series[line.colour], width: 1.6, spanGaps: true, points: { show: false },
      fill: drawable.length === 1 || line.fill ? faded(colours.series[line.colour], 0.08) : undefined,
    }))],
    hooks: {
      drawAxes: options.mark ? [(u) => drawGrowth(u, options.mark, colours.mark)] : [],
      setCursor: options.onCursor ? [(u) => options.onCursor(u.cursor.idx == null ? null : u.data[0][u.cursor.idx])] : [],
    },
  }, joined, box);
  const observer = new ResizeObserver(() => {
    if (box.clientWidth && box.clientWidth !== chart.width) chart.setSize({ width: box.clientWidth, height: box.clientHeight });
  });
  observer.observe(box);
  box.setAttribute("role", "img");
  box.setAttribute("aria-label", drawable.map((line) => {
    const { values } = line;
    return `${line.label}: from ${format(values[0])} to ${format(values[values.length - 1])}, at most ${format(values.reduce((a, b) => Math.max(a, b), 0))}`;
  }).join("; "));
  return { destroy: () => { observer.disconnect(); chart.destroy(); } };
}

/** The value of a series at a time: that of the newest sample not after it; null before the first. */
function valueAt(series, values, wall) {
  let low = 0, high = series.time.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (series.time[middle] <= wall) low = middle + 1; else high = middle;
  }
  return low ? values[low - 1] : null;
}

/** A line of outstanding bytes without axes: time is that of the whole run, the bottom is zero. */
function sparkline(index) {
  const series = seriesOf(index);
  const whole = seriesOf(-1).time;
  const width = 112, height = 26;
  const box = svg("svg", { viewBox: `0 0 ${width} ${height}`, class: `spark${data.sites[index].growing_since != null ? " rising" : ""}`, preserveAspectRatio: "none", "aria-hidden": "true" });
  if (series.time.length < 2 || whole.length < 2) return box;
  const from = whole[0], span = whole[whole.length - 1] - from || 1;
  const top = series.bytes.reduce((a, b) => Math.max(a, b), 1);
  const points = series.time.map((t, i) =>
    `${(((t - from) / span) * width).toFixed(1)} ${(height - 1 - (series.bytes[i] / top) * (height - 3)).toFixed(1)}`);
  const line = `M${points.join("L")}`;
  const ends = [points[0], points[points.length - 1]].map((p) => p.split(" ")[0]);
  box.append(
    svg("path", { class: "area", d: `${line}L${ends[1]} ${height}L${ends[0]} ${height}Z` }),
    svg("path", { d: line }),
  );
  return box;
}

/** Bars of equal width: [{ track, fill, title }], track and fill as fractions of the height. */
function bars(values, label) {
  const width = 100, height = 40, step = width / Math.max(values.length, 1);
  const box = svg("svg", { viewBox: `0 0 ${width} ${height}`, class: "bars", preserveAspectRatio: "none", role: "img", "aria-label": label });
  values.forEach(({ track, fill, title }, i) => {
    const group = svg("g", {}, svg("title", {}, title));
    const place = { x: (i * step + step * 0.1).toFixed(2), width: (step * 0.8).toFixed(2) };
    for (const [part, share] of [["track", track], ["fill", fill]]) {
      // Something that is there must be seen, however small.
      const tall = share > 0 ? Math.max(share * (height - 1), 0.8) : 0;
      if (tall) group.append(svg("rect", { ...place, class: part, y: (height - tall).toFixed(2), height: tall.toFixed(2) }));
    }
    box.append(group);
  });
  box.append(svg("line", { class: "axis", x1: 0, x2: width, y1: height, y2: height }));
  return box;
}
