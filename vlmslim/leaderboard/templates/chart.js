"use strict";
// The chart of the report. Plotly comes packed, because unpacked it would be the largest part of the report by far.

// Told apart by the colour-blind, and from the ground they stand on.
const COLOURS = ["#0072b2", "#d55e00", "#009e73", "#c2609b", "#8a6d00", "#6a3d9a"];
const ON_DARK = ["#56b4e9", "#ff9e4a", "#35d3a2", "#f0a6cf", "#f0e442", "#9fc5ff"];
const SIDES = [["top center", -0.5, 0, -24], ["bottom center", -0.5, 0, 8], ["middle right", 0, 10, -8], ["middle left", -1, -10, -8]];
const dark = window.matchMedia("(prefers-color-scheme: dark)");
const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const digits = (value) => value === null ? NOTHING : Number(value.toPrecision(4)).toLocaleString("en", { useGrouping: false });

async function unpack() {
  const packed = new Blob([bytes(await part("plotly"))]).stream().pipeThrough(new DecompressionStream("deflate"));
  document.head.append(make("script", {}, await new Response(packed).text()));
}

function draw() {
  const cost = board.costs[$("cost").value], quality = board.qualities[$("quality").value];
  if (!cost || !quality) return;
  const front = new Set(board.fronts[$("cost").value][$("quality").value]);
  const points = board.rows
    .map((row, i) => ({ row, i, x: cost.values[i], y: quality.values[i], front: front.has(i) }))
    .filter((point) => point.x !== null && point.y !== null && passes(point.row));
  const best = points.filter((point) => point.front).sort((a, b) => a.x - b.x);
  $("front").textContent = best.length
    ? `On the front of all rows, where no row costs less and is as good: ${best.map((point) => point.row.label).join(", ")}.`
    : "No row on the front passes the filter.";
  const said = points.map(({ row, x, y, front: on }) => [row.label, row.budget, digits(x), interval(y), on ? "yes" : "no"]);
  table($("points"), ["method", "budget", cost.name, quality.name, "on the front"], said);
  if (!window.Plotly) return;

  const plot = $("plot"), ink = getComputedStyle(document.body), narrow = plot.clientWidth < 480;
  const colour = (name) => ink.getPropertyValue(name).trim();
  const hues = dark.matches ? ON_DARK : COLOURS;
  const title = (axis) => ({ text: narrow ? plain(axis.name).replace(", ", ",<br>") : plain(axis.name) });
  const marks = (name, x, y, marker) => ({ name, x, y, mode: "markers", marker, hoverinfo: "skip" });
  label(points, plot.clientWidth - 80, plot.clientHeight - 150);
  const traces = [
    {
      name: "front", x: best.map((point) => point.x), y: best.map((point) => point.y[0]), mode: "lines", hoverinfo: "skip",
      line: { color: colour("--quiet"), width: 1, dash: "dot" },
    },
    ...[["unpatched", "star"], ["method", "circle"], ["baseline", "circle-open"]].map(([name, symbol]) => marks(name, [null], [null], { symbol, size: 9, color: colour("--ink") })),
  ];
  for (const [i, budget] of board.budgets.entries()) {
    const own = points.filter((point) => point.row.budget === budget), color = hues[i % hues.length];
    if (!own.length) continue;
    traces.push(marks(`budget ${plain(budget)}`, [null], [null], { symbol: "square", size: 9, color }), {
      x: own.map((point) => point.x),
      y: own.map((point) => point.y[0]),
      text: own.map((point) => point.side ? plain(point.row.label) : ""),
      textposition: own.map((point) => point.side || "top center"),
      hovertext: own.map(({ row, x, y }) => plain(row.label) + `<br>${plain(quality.name)}: ${interval(y)}<br>${plain(cost.name)}: ${digits(x)}`),
      hoverinfo: "text", mode: "markers+text", cliponaxis: false, showlegend: false,
      error_y: $("bars").checked ? {
        type: "data", symmetric: false, thickness: 1, width: 3,
        array: own.map(({ y }) => y[2] === null ? 0 : y[2] - y[0]), arrayminus: own.map(({ y }) => y[1] === null ? 0 : y[0] - y[1]),
      } : { visible: false },
      marker: {
        opacity: 1, color, size: own.map((point) => point.front ? 12 : 9),
        symbol: own.map(({ row }) => row.unpatched ? "star" : row.baseline ? "circle-open" : "circle"),
      },
    });
  }
  const axis = { gridcolor: colour("--line"), zeroline: false };
  Plotly.react(plot, traces, {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: colour("--ink"), family: "system-ui, sans-serif", size: 13 },
    margin: { l: 60, r: 20, t: 30, b: 50 }, hovermode: "closest",
    hoverlabel: { bgcolor: colour("--band"), bordercolor: colour("--line"), font: { color: colour("--ink") } },
    legend: { orientation: "h", x: 0, y: narrow ? -0.27 : -0.17, yanchor: "top", itemclick: false, itemdoubleclick: false },
    xaxis: { ...axis, title: title(cost), rangemode: "tozero" }, yaxis: { ...axis, title: title(quality) },
  }, {
    displaylogo: false, responsive: true, modeBarButtonsToRemove: ["select2d", "lasso2d"],
    toImageButtonOptions: { filename: "quality-against-cost", scale: 2 },
  });
}

/** Choose a side of each point where its label covers no point and no other label; "" if there is none. */
function label(points, width, height) {
  const scaled = (values, first, size) => {
    const low = Math.min(first, ...values), span = Math.max(...values) - low || 1;
    return values.map((value) => (value - low) / span * size);
  };
  const x = scaled(points.map((point) => point.x), 0, width), y = scaled(points.map((point) => -point.y[0]), Infinity, height);
  const taken = points.map((_, i) => [x[i] - 7, y[i] - 7, x[i] + 7, y[i] + 7]);
  const order = points.map((_, i) => i).sort((a, b) => points[b].front - points[a].front);
  for (const i of order) {
    const wide = 7.5 * points[i].row.label.length;
    const boxes = SIDES.map(([side, part, left, top]) => [side, [x[i] + part * wide + left, y[i] + top, x[i] + (1 + part) * wide + left, y[i] + top + 16]]);
    const [side, box] = boxes.find(([, [l, t, r, b]]) => l > -50 && r < width + 20 && taken.every(([left, top, right, below]) => r < left || l > right || b < top || t > below)) ?? ["", null];
    points[i].side = side;
    if (box) taken.push(box);
  }
}

function interval([value, low, high]) {
  return low === null || high === null ? digits(value) : `${digits(value)} [${digits(low)}, ${digits(high)}]`;
}
