"use strict";
// The page of `vlmslim leaderboard --format html`. All texts come from data and go into the page as text, never as HTML.

const $ = (id) => document.getElementById(id);
const NOTHING = "–";

/** Make an element with attributes and children; a string becomes text. */
function make(name, attributes = {}, ...children) {
  const space = SVG.has(name) ? "http://www.w3.org/2000/svg" : "http://www.w3.org/1999/xhtml";
  const element = document.createElementNS(space, name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (value === true) element.setAttribute(key, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(key, value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}
const SVG = new Set(["svg", "image", "rect", "title", "g"]);

// ------------------------------------------------------------------ data

// A part of the data stands in the page (--single), or in a script of its own that is loaded when it is needed, because
// a page that is opened from disk may not fetch files.
const parts = window.parts ?? {};
const loading = {};

function part(name) {
  const inside = $(name);
  if (inside) parts[name] ??= JSON.parse(inside.textContent);
  if (name in parts) return Promise.resolve(parts[name]);
  return loading[name] ??= new Promise((resolve, reject) => {
    const failed = () => reject(new Error(`data/${name}.js is missing: copy the whole folder of the report`));
    document.head.append(make("script", { src: `data/${name}.js`, onload: () => resolve(window.parts[name]), onerror: failed }));
  });
}

const board = parts.board ?? JSON.parse($("board").textContent);
const number = (label) => board.rows.findIndex((row) => row.label === label);

// ------------------------------------------------------------------ tables

/** Return what a cell is sorted by: the first number of its text, or the text; a dash comes last. Names are no numbers. */
function key(cell) {
  const text = cell.textContent.trim();
  if (text === NOTHING || text === "") return null;
  if (cell.tagName === "TH") return text;
  const found = /^[<≤]?\s*([+-]?\d+(?:\.\d+)?)/.exec(text.replace("−", "-"));
  return found ? Number(found[1]) : text;
}

function order(a, b, down) {
  if (a === null || b === null) return (a === null) - (b === null);
  if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1;
  const sign = typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true });
  return down ? -sign : sign;
}

/** Make the headers of a table sort it: first up or down, then the other way, then as it was. */
function sortable(table) {
  const bodies = [...table.tBodies];
  const home = bodies.map((body) => [...body.rows]);
  const headers = [...table.tHead.rows[0].cells];
  let column = -1, direction = "none";

  function arrange() {
    headers.forEach((header, i) => header.setAttribute("aria-sort", i === column ? direction : "none"));
    const sorted = (rows) => direction === "none" ? rows : [...rows].sort((a, b) => order(key(a.cells[column]), key(b.cells[column]), direction === "descending"));
    if ($("sort-together").checked && direction !== "none") bodies[0].append(...sorted(home.flat()));
    else bodies.forEach((body, i) => body.append(...sorted(home[i])));
  }
  headers.forEach((header, i) => {
    header.querySelector("button").addEventListener("click", () => {
      const numeric = home.flat().some((row) => typeof key(row.cells[i]) === "number");
      const turns = numeric ? ["descending", "ascending", "none"] : ["ascending", "descending", "none"];
      direction = turns[column === i ? (turns.indexOf(direction) + 1) % 3 : 0];
      column = i;
      arrange();
    });
  });
  $("sort-together").addEventListener("change", arrange);
}

/** Tell which rows the filters let through. */
function passes(row) {
  const words = $("filter-label").value.toLowerCase().split(/[\s,]+/).filter(Boolean);
  const budgets = new Set([...document.querySelectorAll("[name=budget]:checked")].map((box) => box.value));
  return budgets.has(row.budget) && (!words.length || words.some((word) => row.label.toLowerCase().includes(word)));
}

function filter() {
  const labels = new Set(board.rows.filter(passes).map((row) => row.label));
  for (const line of document.querySelectorAll("tr[data-label]")) line.hidden = !labels.has(line.dataset.label);
  $("shown").value = `${labels.size} of ${board.rows.length} rows${labels.size ? "" : ": change the filter to see some"}`;
  draw();
}

/** Fill a table with texts. */
function table(element, headers, lines) {
  element.replaceChildren(
    make("thead", {}, make("tr", {}, ...headers.map((text) => make("th", { scope: "col" }, text)))),
    make("tbody", {}, ...lines.map((line) => make("tr", {}, ...line.map((text, i) => make(i ? "td" : "th", i ? {} : { scope: "row" }, text))))),
  );
}

// ------------------------------------------------------------------ questions

const OUTCOMES = [
  ["lost", "lost"], ["won", "won"], ["right", "both right"], ["wrong", "both wrong"], ["all", "all"],
];
const PAGE = 100; // questions that are listed at a time
const state = { outcome: "lost", question: null, shown: PAGE };
let listed = []; // the positions, in the questions of the task, that the list holds

/** Return the outcome of a question for a row against another; null where one of them has no score. */
function outcome(task, questions, position, row, against) {
  const [ours, theirs] = [row, against].map((i) => questions.scores[i] && questions.scores[i][position]);
  if (ours === null || theirs === null || ours === undefined || theirs === undefined) return null;
  const change = task.sign * (ours - theirs);
  if (change) return change < 0 ? "lost" : "won";
  return task.sign * (ours - questions.half) >= 0 ? "right" : "wrong";
}

function answer(questions, row, position) {
  const given = questions.given[row];
  return given ? questions.options[position][given[position]] : null;
}

const chosen = () => ({
  t: Number($("task").value), row: Number($("row").value), against: Number($("against").value),
});

async function list() {
  const { t, row, against } = chosen(), task = board.tasks[t];
  const questions = await part(`questions-${t}`).catch((error) => { $("found").textContent = error.message; });
  if (!questions || t !== chosen().t) return; // another task was chosen meanwhile
  const outcomes = questions.ids.map((_, position) => outcome(task, questions, position, row, against));
  const words = $("search").value.toLowerCase();
  const has = (position) => !words || [
    questions.prompts[position], questions.targets[position], answer(questions, row, position), answer(questions, against, position),
  ].some((text) => text !== null && text.toLowerCase().includes(words));
  const buttons = OUTCOMES.map(([name, text]) => {
    const count = name === "all" ? outcomes.length : outcomes.filter((one) => one === name).length;
    return make("button", {
      type: "button", "aria-pressed": String(state.outcome === name), "data-outcome": name,
      onclick: () => { state.outcome = name; state.shown = PAGE; remember(); list(); $("outcomes").querySelector("[aria-pressed=true]").focus(); },
    }, `${text} ${count}`);
  });
  $("outcomes").replaceChildren(...buttons);
  listed = questions.ids.map((_, position) => position)
    .filter((position) => (state.outcome === "all" || outcomes[position] === state.outcome) && has(position));
  const names = [row, against].map((i) => board.rows[i].label);
  $("found").textContent = questions.given[row] && questions.given[against]
    ? `${listed.length} of ${outcomes.length} questions of ${task.name}: ${names[0]} against ${names[1]}.`
    : `${questions.given[row] ? names[1] : names[0]} has not finished ${task.name}.`;
  const drawn = new Set(questions.drawn);
  $("list").replaceChildren(
    make("thead", {}, make("tr", {}, ...["question", "asked", "expected", ...names, "outcome", "picture"].map((text) => make("th", { scope: "col" }, text)))),
    make("tbody", {}, ...listed.slice(0, state.shown).map((position) => make("tr", {},
      make("th", { scope: "row" }, String(questions.ids[position])),
      make("td", {}, make("button", { type: "button", onclick: () => open(position) }, questions.prompts[position] || `question ${questions.ids[position]}`)),
      make("td", {}, questions.targets[position]),
      make("td", {}, answer(questions, row, position) ?? NOTHING),
      make("td", {}, answer(questions, against, position) ?? NOTHING),
      make("td", { class: outcomes[position] }, said(outcomes[position])),
      make("td", {}, drawn.has(position) ? "yes" : NOTHING),
    ))),
  );
  $("list").hidden = !listed.length;
  $("more").hidden = listed.length <= state.shown;
}

const said = (name) => (OUTCOMES.find(([key]) => key === name) || [null, "not scored"])[1];

/** Show one question with the answers, the tokens and the receipts of the two rows. */
async function open(position) {
  const { t, row, against } = chosen(), task = board.tasks[t];
  const questions = await part(`questions-${t}`);
  state.question = position;
  remember();
  const drawn = questions.drawn.includes(position) ? await part(`tokens-${t}-${position}`) : null;
  $("question-title").textContent = `${task.name}, question ${questions.ids[position]}: ${said(outcome(task, questions, position, row, against))}`;
  $("asked").textContent = questions.prompts[position];
  $("target").replaceChildren(...pairs([["expected", questions.targets[position]], ["picture", questions.pictures[position]]]));
  const sides = [row, against].map((i) => side(task, questions, position, i, drawn));
  $("sides").replaceChildren(...(row === against ? sides.slice(0, 1) : sides));
  const at = listed.indexOf(position);
  $("previous").disabled = at <= 0;
  $("next").disabled = at < 0 || at === listed.length - 1;
  if (!$("question").open) $("question").showModal();
}

const pairs = (list) => list.flatMap(([name, value]) => value === null ? [] : [make("dt", {}, name), make("dd", {}, String(value))]);

function side(task, questions, position, row, drawn) {
  const scores = questions.scores[row];
  const record = drawn && drawn.rows[row];
  const facts = [["answer", answer(questions, row, position) ?? NOTHING], [task.metric, scores ? scores[position] : null]];
  const parts = [make("h3", {}, board.rows[row].label), make("dl", {}, ...pairs(facts))];
  if (record) {
    record.images.forEach((image, i) => parts.push(...picture(drawn.images[i], image, board.rows[row].label)));
    parts.push(make("dl", {}, ...pairs(record.receipt)));
    if (record.ledger.length) {
      const ledger = make("table", {});
      table(ledger, ["FLOPs of this prefill", "GFLOPs", "share"], record.ledger);
      parts.push(make("div", { class: "scroll" }, ledger));
    }
  } else {
    parts.push(make("p", {}, drawn
      ? "This row was not recorded for this question; vlmslim report DIR records it."
      : "No picture was recorded of this question; vlmslim report DIR --samples N records more."));
  }
  return make("article", { "aria-label": board.rows[row].label }, ...parts);
}

// ------------------------------------------------------------------ tokens

const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));

/** Return, for each of an image's tokens, the token that it went into, or -1. */
function destinations(cut, count) {
  if (cut.into) return Array.from(new Int16Array(bytes(cut.into).buffer));
  const bits = bytes(cut.kept);
  return Array.from({ length: count }, (_, i) => (bits[i >> 3] >> (i & 7)) & 1 ? i : -1);
}

/** Return what a merged token is made of: for each of the image's tokens in it, how much of that one, up to 1. */
function partsOf(cut, token, count) {
  if (!cut.parts) return new Map(destinations(cut, count).flatMap((place, i) => place === token ? [[i, 1]] : []));
  const [tokens, patches] = [cut.parts.token, cut.parts.patch].map((text) => new Int16Array(bytes(text).buffer));
  const levels = bytes(cut.parts.level);
  return new Map([...patches].flatMap((patch, i) => tokens[i] === token ? [[patch, levels[i] / 255]] : []));
}

/** Draw an image with its tokens, and the controls that choose the decoder layer, the scores and one merged token. */
function picture(image, record, label) {
  const rects = image.rects, svg = make("svg", { viewBox: `0 0 ${image.width} ${image.height}`, role: "img" });
  svg.style.maxWidth = `calc(55vh * ${image.width / image.height})`; // so that answer, picture and controls fit a screen
  const overlay = make("g");
  svg.append(make("image", { href: image.src, width: image.width, height: image.height }), overlay);
  const layer = make("input", { type: "range", min: 0, max: record.depth - 1, value: record.depth - 1, "aria-label": `decoder layer, ${label}` });
  const heat = make("input", { type: "checkbox" });
  const single = make("input", { type: "number", min: 0, value: 0, "aria-label": `only token, 0 for all, ${label}` });
  const told = make("output");

  function show() {
    const cut = record.cuts.findLast((one) => one.first <= Number(layer.value));
    const hasScore = cut.score !== null;
    heat.disabled = !hasScore;
    single.disabled = !cut.into;
    single.max = cut.count;
    if (cut.kept === null && cut.into === null) {
      told.value = `layer ${layer.value}: ${cut.count} tokens; ${cut.stage} does not say which patches they are made of`;
      overlay.replaceChildren();
    } else {
      const into = destinations(cut, image.tokens), sizes = {};
      for (const place of into) sizes[place] = (sizes[place] || 0) + 1;
      const score = hasScore && heat.checked ? bytes(cut.score) : null;
      const one = cut.into ? Math.min(Number(single.value), cut.count) : 0; // 0: all tokens
      const parts = one ? partsOf(cut, one - 1, image.tokens) : null;
      overlay.replaceChildren(...rects.flatMap(([token, x, y, width, height]) => {
        const box = { x, y, width, height };
        if (token < 0) return [make("rect", { ...box, class: "outside" })];
        if (score) return [make("rect", { ...box, fill: score[token] ? `hsl(${270 - 0.9 * score[token]} 80% ${15 + score[token] / 4}%)` : "#fff", "fill-opacity": 0.75, class: "score" })];
        if (parts) return [make("rect", { ...box, "fill-opacity": parts.has(token) ? 0.6 - 0.6 * parts.get(token) : 0.84, class: parts.has(token) ? "part" : "dropped" })];
        if (into[token] < 0) return [make("rect", { ...box, "fill-opacity": 0.84, class: "dropped" })];
        if (sizes[into[token]] > 1) return [make("rect", { x: x + 1, y: y + 1, width: width - 2, height: height - 2, fill: "none", stroke: `hsl(${into[token] * 222.5 % 360} 90% 45%)`, "stroke-width": 2, class: "merged" })];
        return [];
      }));
      told.value = `layer ${layer.value}: ${cut.count} of ${image.tokens} visual tokens${cut.stage ? `, after ${cut.stage}` : ""}${parts ? `; token ${one} is made of ${parts.size}` : ""}`;
    }
    svg.setAttribute("aria-label", `${label}, ${told.value}`);
  }
  layer.addEventListener("input", show);
  heat.addEventListener("change", show);
  single.addEventListener("input", show);
  show();
  const controls = make("div", { class: "controls" }, make("label", {}, "layer ", layer), told);
  if (record.cuts.some((cut) => cut.score !== null)) controls.append(make("label", {}, heat, " order of scores"));
  if (record.cuts.some((cut) => cut.into)) controls.append(make("label", {}, "only token ", single, " (0: all)"));
  return [svg, controls];
}

// ------------------------------------------------------------------ the address

// Which questions are open stands in the address, so that it can be kept, sent and gone back to.
function remember() {
  const { t, row, against } = chosen();
  const said = new URLSearchParams({ task: board.tasks[t].name, row: board.rows[row].label, against: board.rows[against].label, outcome: state.outcome });
  if (state.question !== null) said.set("question", state.question);
  history.replaceState(null, "", `#${said}`);
}

async function follow() {
  const told = new URLSearchParams(location.hash.slice(1));
  if (!told.has("task")) return;
  const task = board.tasks.findIndex((one) => one.name === told.get("task"));
  const row = number(told.get("row")), against = number(told.get("against") ?? board.unpatched);
  if (task < 0 || row < 0 || against < 0) return;
  [$("task").value, $("row").value, $("against").value] = [task, row, against];
  state.outcome = OUTCOMES.some(([name]) => name === told.get("outcome")) ? told.get("outcome") : "lost";
  state.shown = PAGE;
  await list();
  if (/^\d+$/.test(told.get("question") ?? "")) await open(Number(told.get("question")));
  else $("questions").scrollIntoView();
}

// ------------------------------------------------------------------ the page

function fill(select, names) {
  select.replaceChildren(...names.map((name, i) => make("option", { value: i }, name)));
}

document.querySelectorAll("table.board").forEach((one) => one.tHead && sortable(one));
fill($("cost"), board.costs.map((axis) => axis.name));
fill($("quality"), board.qualities.map((axis) => axis.name));
fill($("task"), board.tasks.map((task) => task.name));
for (const select of ["row", "against"]) fill($(select), board.rows.map((row) => row.label));
$("row").value = Math.max(0, board.rows.findIndex((row) => !row.unpatched && !row.baseline));
$("against").value = Math.max(0, number(board.unpatched));
if (!board.costs.length || !board.qualities.length) $("chart").closest("section").hidden = true;
if (!board.hasQuestions) $("questions").closest("section").hidden = true;

for (const form of document.forms) form.addEventListener("submit", (event) => event.preventDefault());
$("filters").addEventListener("input", filter);
$("axes").addEventListener("input", draw);
$("choice").addEventListener("input", () => { state.shown = PAGE; remember(); list(); });
$("more").addEventListener("click", () => { state.shown += PAGE; list(); });
$("close").addEventListener("click", () => $("question").close());
$("question").addEventListener("close", () => { state.question = null; remember(); });
$("previous").addEventListener("click", () => open(listed[listed.indexOf(state.question) - 1]));
$("next").addEventListener("click", () => open(listed[listed.indexOf(state.question) + 1]));
window.addEventListener("hashchange", follow);
dark.addEventListener("change", draw);

filter();
unpack().then(draw, (error) => { $("front").textContent = `This browser shows no chart (${error.message}); the table below has its numbers.`; });
if (board.hasQuestions) list().then(follow);
