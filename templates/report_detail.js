// What a row shows when it is opened: stack, trend, survival, lifetimes, what the rules said.

/** The detail of a site and what to call when it is closed. */
function makeDetail(index, pinned, onPin) {
  const site = data.sites[index];
  const pin = el("button", { type: "button", className: "ghost pin" });
  const showPin = (on) => {
    pin.textContent = on ? "Remove from trend charts" : "Show in trend charts";
    pin.setAttribute("aria-pressed", on);
  };
  showPin(pinned);
  pin.addEventListener("click", () => showPin(onPin(index)));
  const plot = el("div", { className: "plot small" });
  const node = el("div", { className: "detail-grid" },
    el("div", {}, notesOf(site), reachOf(site), stackOf(site)),
    el("div", {},
      el("div", {}, factsOf(site)),
      el("div", {}, el("h3", {}, "Outstanding bytes"), plot),
      survivalOf(site), lifetimesOf(site),
      el("div", {}, pin)));
  let chart = null;
  return {
    node,
    /** Draws what needs a width; also called when colours change. */
    draw() {
      if (chart) chart.destroy();
      const series = seriesOf(index);
      chart = makeChart(plot, [{ time: series.time, values: series.bytes, colour: 1, label: headingOf(site).name }], {
        bytes: true,
        mark: site.growing_since == null ? null : { since: data.zero_wall_s + site.growing_since, until: series.time[series.time.length - 1] },
      });
    },
    showPin,
    close() { if (chart) chart.destroy(); },
  };
}

/** What alerts say about the site; nothing when none does. */
function notesOf(site) {
  if (!site.alerts.length) return null;
  return el("div", {}, el("h3", {}, "Findings"), el("ul", { className: "notes" }, ...site.alerts.map((i) => {
    const alert = data.alerts[i];
    const firing = alert.status === "firing";
    return el("li", {}, badge(firing ? alert.severity : "resolved"),
      ` ${text(alert.rule)}: `, el("bdi", {}, text(alert.reason)));
  })));
}

/** What scans of the process's memory say: verdict, evidence, numbers, and an example of a way to the blocks. */
function reachOf(site) {
  const reach = site.reach;
  if (!reach) return null;
  const { words, colour } = verdicts[reach.verdict];
  // The label says the first words already.
  const evidence = text(reach.evidence).startsWith(words) ? text(reach.evidence).slice(words.length).replace(/^[:,] /, "") : text(reach.evidence);
  const names = ["Lost", "Lost with others", "Possibly lost", "Reachable", "Coded pointers", "Too young", "Freed unseen"];
  const numbers = reach.tallies.map(([blocks, bytes], i) => [names[i], blocks, bytes]).filter(([, blocks]) => blocks > 0);
  return el("div", {}, el("h3", {}, "Can the process still reach its blocks?"),
    el("p", { className: "verdict" }, el("span", { className: `badge ${colour}` }, words), " ", el("bdi", {}, evidence)),
    reach.fraction ? fractionOf(reach.fraction) : null,
    el("dl", { className: "kv" }, ...numbers.map(([name, blocks, bytes]) =>
      el("div", {}, el("dt", {}, name), el("dd", {}, `${formatCount(blocks)} (${formatBytes(bytes)})`)))),
    reach.way >= 0 ? el("div", {}, el("h3", {}, "Held by, for example"), el("p", { className: "way mono" }, el("bdi", {}, `${text(reach.way)} > this`))) : null,
    el("p", { className: "caption" }, `${reach.scans} ${reach.scans === 1 ? "scan" : "scans"}, the last ${formatDuration(data.now_s - reach.time)} before the end.`));
}

/** The lost fraction as a mark on a line from 0 to 100 %, with its confidence interval. */
function fractionOf([value, low, high]) {
  const at = (share) => 2 + 196 * share;
  const summary = `${formatPercent(value)} lost, 95 % interval ${formatPercent(low)} to ${formatPercent(high)}`;
  return svg("svg", { class: "fraction", viewBox: "0 0 200 14", role: "img", "aria-label": summary },
    svg("line", { class: "axis", x1: 2, x2: 198, y1: 7, y2: 7 }),
    svg("line", { class: "interval", x1: at(low), x2: Math.max(at(high), at(low) + 1), y1: 7, y2: 7 }),
    svg("circle", { class: "mark", cx: at(value), cy: 7, r: 4 }));
}

function stackOf(site) {
  const items = site.stack.map((number, i) => {
    const frame = frameOf(number);
    const where = [];
    if (frame.file) where.push(frame.line > 0 ? `${frame.file}:${frame.line}` : frame.file);
    // With a source file the module's name is enough; with a function the offset counts from its start and stands there.
    if (frame.module) where.push(frame.file ? fileName(frame.module) : frame.named ? frame.module : `${frame.module}+${frame.offset}`);
    if (frame.reason) where.push(frame.reason);
    // With it, whoever has the symbols can name the place.
    if (!frame.named && frame.build) where.push(`build id ${frame.build}`);
    return el("li", { className: i === site.head ? "head" : "" },
      el("div", { className: "fn" }, el("bdi", {}, frame.name),
        frame.named && !frame.inlined ? el("span", { className: "muted" }, `+${frame.offset}`) : null,
        frame.inlined ? el("span", { className: "tag" }, "inlined") : null),
      el("div", { className: "at" }, el("bdi", {}, where.join(" · "))));
  });
  if (site.truncated >= 0) items.push(el("li", { className: "end" }, el("div", {}, `The stack ends early: ${text(site.truncated)}`)));
  if (!items.length) items.push(el("li", { className: "end" }, el("div", {}, "No frame of this stack is known.")));
  return el("div", {}, el("h3", {}, `Call stack, innermost first, below ${text(site.function)}`), el("ol", { className: "stack" }, ...items));
}

function factsOf(site) {
  const [allocatedBytes, allocatedCount, freedBytes, freedCount] = site.totals;
  const facts = [
    ["Allocated", `${formatBytes(allocatedBytes)} in ${formatCount(allocatedCount)}`],
    ["Freed", `${formatBytes(freedBytes)} in ${formatCount(freedCount)}`],
    ["Still outstanding", formatPercent(allocatedBytes ? site.bytes / allocatedBytes : null)],
    ["Mean block", formatBytes(site.count ? site.bytes / site.count : null)],
    ["Last allocation", `${formatDuration(data.now_s - site.last)} ago`],
    ["Probe set", text(site.probe_set)],
    ["Site id", site.id],
  ];
  if (site.stderr) facts.unshift(["Outstanding (estimate)", `${formatBytes(site.bytes)} ± ${formatBytes(site.stderr[0])} in ${formatCount(site.count)} ± ${formatCount(Math.round(site.stderr[1]))}`]);
  if (site.growing_since != null) facts.splice(3, 0, ["Growing for", formatDuration((site.ended ?? data.now_s) - site.growing_since)]);
  if (site.ended != null) facts.push(["Process ended", `${formatDuration(data.now_s - site.ended)} ago`]);
  return el("dl", { className: "kv" }, ...facts.map(([name, value]) =>
    el("div", {}, el("dt", {}, name), el("dd", { className: name === "Site id" ? "mono" : "" }, value))));
}

/** Cohorts, oldest at the left: what is left of the blocks born in the same period. */
function survivalOf(site) {
  const born = cohortsOf(site).filter((c) => c.born > 0);
  if (!born.length) return null;
  const now = site.ended ?? data.now_s;
  const share = (c) => c.outstanding / c.born;
  const age = (c) => `${formatDuration(now - c.end)} to ${formatDuration(now - c.start)} old`;
  const oldest = born[0];
  const summary = `${formatPercent(share(oldest))} of the oldest blocks (${age(oldest)}) are still outstanding`;
  return el("div", {}, el("h3", {}, "Survival by age"),
    bars(born.map((c) => ({
      track: 1, fill: share(c),
      title: `${age(c)}: ${formatCount(c.outstanding)} of ${formatCount(c.born)} blocks outstanding, ${formatBytes(c.bytes)}`,
    })), summary),
    el("div", { className: "bar-labels" }, el("span", {}, `${formatDuration(now - oldest.start)} old`), el("span", {}, "now")),
    el("p", { className: "caption" }, `${summary}.`));
}

/** How long freed blocks lived, in powers of two from one microsecond. */
function lifetimesOf(site) {
  if (!site.lifetimes.length) {
    return el("div", {}, el("h3", {}, "Lifetimes"), el("p", { className: "caption" }, "No block of this site has been freed."));
  }
  const frees = new Map(site.lifetimes);
  const first = site.lifetimes[0][0], last = site.lifetimes[site.lifetimes.length - 1][0];
  const all = site.lifetimes.reduce((sum, [, n]) => sum + n, 0);
  const most = Math.max(...frees.values());
  const start = (c) => (c === 0 ? "0" : formatDuration(2 ** (c - 1) / 1e6));
  const end = (c) => (c === 31 ? "longer" : formatDuration(2 ** c / 1e6));
  let seen = 0, median = first;
  for (const [c, n] of site.lifetimes) {
    seen += n;
    if (seen * 2 >= all) { median = c; break; }
  }
  const values = [];
  for (let c = first; c <= last; c++) {
    const n = frees.get(c) || 0;
    values.push({ track: 0, fill: n / most, title: `${start(c)} to ${end(c)}: ${formatCount(n)} frees` });
  }
  const summary = `Half of the ${formatCount(all)} freed blocks lived less than ${end(median)}`;
  return el("div", {}, el("h3", {}, "Lifetimes of freed blocks"), bars(values, summary),
    el("div", { className: "bar-labels" }, el("span", {}, start(first)), el("span", {}, end(last))),
    el("p", { className: "caption" }, `${summary}.`));
}
