// The live view of a change. `render` draws it from a model of four values: `facts` and `state`, `request` and `answers`
// (docs/how_to/explore.md). In a notebook the model is the widget's, and Python answers; in a page it is `recorded`.
const PAUSE = 150; // milliseconds without a move before Python is asked
const PATIENCE = 10000; // milliseconds after which a request is taken for lost
const DASHES = ["", "7 3", "2 3", "10 3 2 3"];
const SVG = "http://www.w3.org/2000/svg";

function node(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function drawn(name, attributes, ...children) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

const minus = text => text.replace("-", "−");
const isNumber = value => typeof value === "number";
const fixed = (value, digits) => (isNumber(value) ? minus(value.toFixed(digits)) : "not finite");
const signed = value => (isNumber(value) && value >= 0 ? "+" : "") + fixed(value, 3);
const shown = token => token.replaceAll("\n", "↵").replaceAll(" ", "␣");

function mean(values) {
  return values.every(isNumber) ? values.reduce((sum, value) => sum + value, 0) / values.length : null;
}

function grouped(margins) {
  const groups = new Map();
  for (const margin of margins) groups.set(margin.behaviour, [...(groups.get(margin.behaviour) ?? []), margin]);
  return groups;
}

// What a state says at its dose: a point of each curve.
function pointOf(state) {
  const values = new Map();
  for (const [name, margins] of grouped(state.margins)) {
    const before = mean(margins.map(margin => margin.original));
    const after = mean(margins.map(margin => margin.edited));
    values.set(`mean margin, ${name}`, isNumber(before) && isNumber(after) ? after - before : null);
  }
  values.set("KL on general text", state.kl);
  return { dose: state.dose, values };
}

// The host may be light or dark whatever the system is: what lies behind the view decides.
function isDark(element) {
  const pen = node("canvas", { width: 1, height: 1 }).getContext("2d", { willReadFrequently: true });
  for (let at = element; at; at = at.parentElement ?? at.getRootNode().host) {
    // A colour may be written as rgb(), oklch() or color(): what is painted has three numbers in every case.
    pen.clearRect(0, 0, 1, 1);
    pen.fillStyle = getComputedStyle(at).backgroundColor;
    pen.fillRect(0, 0, 1, 1);
    const [red, green, blue, alpha] = pen.getImageData(0, 0, 1, 1).data;
    if (alpha > 127) return 0.3 * red + 0.6 * green + 0.1 * blue < 128;
  }
  return matchMedia("(prefers-color-scheme: dark)").matches;
}

function table(caption, heads, rows) {
  const head = node("tr", {}, ...heads.map(text => node("th", { scope: "col" }, text)));
  return node("table", {}, node("caption", {}, caption), node("thead", {}, head), node("tbody", {}, ...rows));
}

function row(cells, name = "td", attributes = {}) {
  const [first, ...others] = cells;
  return node("tr", attributes, node(name, name === "th" ? { scope: "row" } : {}, first), ...others.map(cell => node("td", {}, cell)));
}

function share(kind, value) {
  const bar = node("span", { class: `bar ${kind}`, "aria-hidden": "true" });
  bar.style.width = `${isNumber(value) ? (100 * value).toFixed(1) : 0}%`;
  const text = isNumber(value) ? `${(100 * value).toFixed(1)} %` : "not finite";
  return node("span", { class: "share" }, node("span", { class: "track" }, bar), node("span", {}, text));
}

function marginTable(margins) {
  const rows = [];
  for (const [name, own] of grouped(margins)) {
    const cells = margin => [fixed(margin.original, 3), fixed(margin.edited, 3), signed(margin.edited - margin.original)];
    for (const margin of own) rows.push(row([margin.prompt, ...cells(margin)]));
    const whole = { original: mean(own.map(margin => margin.original)), edited: mean(own.map(margin => margin.edited)) };
    rows.push(row([`mean of ${name}`, ...cells(whole)], "th", { class: "mean" }));
  }
  return table("Margins of held-out prompts: log p(safe) − log p(unsafe), nats per token", ["prompt", "original", "edited", "change"], rows);
}

function tokenTable(following) {
  const rows = following.tokens.map(one => row([node("code", {}, shown(one.token)), share("original", one.original), share("edited", one.edited)]));
  return table("Next token", ["token", "original", "edited"], rows);
}

// The points of all curves as a CSV, which the link itself holds.
function dataLink(points, names) {
  const quoted = text => `"${text.replaceAll('"', '""')}"`;
  const lines = [["dose", ...names.map(name => quoted(`${name} (nats per token)`))]];
  for (const point of points) lines.push([point.dose, ...names.map(name => point.values.get(name) ?? "")]);
  const text = lines.map(cells => `${cells.join(",")}\n`).join("");
  const href = `data:text/csv;charset=utf-8,${encodeURIComponent(text)}`;
  return node("a", { class: "data", href, download: "curves_by_dose.csv" }, "Data (CSV)");
}

// All curves are in nats per token, so they share one axis: an effect stands beside what it costs.
function chart(points, facts, state) {
  points.sort((a, b) => a.dose - b.dose);
  const dose = state.dose;
  const width = 440, height = 190, left = 46, right = 12, top = 10, bottom = 24;
  const values = points.flatMap(point => [...point.values.values()]).filter(isNumber);
  const low = Math.min(0, ...values), high = Math.max(0.01, ...values);
  const x = at => left + ((at - facts.lowest) / (facts.highest - facts.lowest)) * (width - left - right);
  const y = value => top + ((high - value) / (high - low)) * (height - top - bottom);
  const parts = [];
  for (const value of [low, 0, high]) {
    if (value === 0 || Math.abs(y(value) - y(0)) > 14) {
      parts.push(drawn("line", { class: "grid", x1: left, x2: width - right, y1: y(value), y2: y(value) }));
      parts.push(drawn("text", { x: left - 6, y: y(value) + 4, "text-anchor": "end" }, fixed(value, 2)));
    }
  }
  for (let at = Math.ceil(facts.lowest); at <= facts.highest; at += 1) {
    parts.push(drawn("text", { x: x(at), y: height - 6, "text-anchor": "middle" }, minus(String(at))));
  }
  parts.push(drawn("line", { class: "now", x1: x(dose), x2: x(dose), y1: top, y2: height - bottom }));
  const names = [...(points[0]?.values.keys() ?? [])];
  const legend = node("figcaption", { class: "legend" }, "By dose, in nats per token: ");
  names.forEach((name, number) => {
    const style = { class: `curve c${number % 4}`, "stroke-dasharray": DASHES[number % 4] };
    const there = points.filter(point => isNumber(point.values.get(name)));
    const place = point => `${x(point.dose).toFixed(1)},${y(point.values.get(name)).toFixed(1)}`;
    parts.push(drawn("polyline", { ...style, points: there.map(place).join(" ") }));
    for (const point of there) parts.push(drawn("circle", { class: `dot c${number % 4}`, cx: x(point.dose), cy: y(point.values.get(name)), r: 2.5 }));
    const swatch = drawn("svg", { width: 30, height: 10, "aria-hidden": "true" }, drawn("line", { ...style, x1: 0, x2: 30, y1: 5, y2: 5 }));
    legend.append(node("span", {}, swatch, number === names.length - 1 ? name : `change of the ${name}`));
  });
  const counts = [...grouped(state.margins)].map(([name, own]) => `${own.length} prompts of ${name}`);
  legend.append(`n: ${[...counts, `${facts.n_general} texts of ${facts.general}`].join(", ")}. `, dataLink(points, names));
  const label = "Change of the mean margins and KL on general text by dose; the numbers are in the tables";
  return node("figure", {}, drawn("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label }, ...parts), legend);
}

// The controls: each is labelled, and tells `moved` when the reader moves it.
function controls(facts, request, moved) {
  const isRecorded = facts.doses.length > 0;
  const nearest = dose => facts.doses.reduce((best, each, i) => (Math.abs(each - dose) < Math.abs(facts.doses[best] - dose) ? i : best), 0);
  const range = isRecorded ? { min: 0, max: facts.doses.length - 1, step: 1 } : { min: facts.lowest, max: facts.highest, step: 0.05 };
  const slider = node("input", { type: "range", ...range });
  const doseNow = () => (isRecorded ? facts.doses[slider.value] : Number(slider.value));
  slider.value = isRecorded ? nearest(request.dose) : request.dose;
  const readout = node("span", { class: "readout" });
  const say = () => {
    readout.textContent = fixed(doseNow(), 2);
    slider.setAttribute("aria-valuetext", `dose ${fixed(doseNow(), 2)}`);
  };
  slider.addEventListener("input", () => { say(); moved(); });
  say();
  const choice = node("select", {}, ...facts.prompts.map(prompt => node("option", { value: prompt }, prompt)));
  const typed = node("textarea", { rows: 2, spellcheck: "false" });
  typed.value = request.prompt;
  choice.value = request.prompt;
  choice.addEventListener("change", () => { typed.value = choice.value; moved(); });
  typed.addEventListener("input", () => moved(true));
  const prompts = node("div", { class: "prompts" }, node("label", {}, "Prompt", choice));
  if (!isRecorded) prompts.append(node("label", {}, "or type one", typed));
  const ends = node("p", { class: "ends", "aria-hidden": "true" }, node("span", {}, "−1 opposite"), node("span", {}, "0 original"), node("span", {}, "1 edit"), node("span", {}, "2 twice"));
  const dose = node("div", { class: "dose" }, node("label", {}, "Dose ", readout, slider), ends);
  return { prompts, dose, values: () => ({ dose: doseNow(), prompt: isRecorded ? choice.value : typed.value }) };
}

function unitPanel(facts, request, moved) {
  const isRecorded = facts.doses.length > 0;
  const off = { layers_off: new Set(request.layers_off), behaviours_off: new Set(request.behaviours_off), units_off: new Set(request.units_off) };
  const boxes = [];
  const isUnder = unit => off.layers_off.has(unit.layer) || off.behaviours_off.has(unit.behaviour);
  const box = (kind, key, label, unit) => {
    const made = node("input", { type: "checkbox" });
    if (unit) made.setAttribute("aria-label", label);
    made.addEventListener("change", () => {
      off[kind][made.checked ? "delete" : "add"](key);
      refresh();
      moved();
    });
    boxes.push({ made, kind, key, unit });
    return unit ? made : node("label", {}, made, label);
  };
  const refresh = () => {
    for (const { made, kind, key, unit } of boxes) {
      made.disabled = Boolean(unit && isUnder(unit));
      made.checked = !off[kind].has(key) && !made.disabled;
    }
  };
  const rows = facts.listed.map(unit => {
    const [layer] = unit.site;
    const own = { ...unit, layer };
    const ranks = Object.keys(facts.n_by_behaviour).map(name => unit.ranks[name] ?? "not kept");
    const cells = [unit.name, signed(unit.change), ...(ranks.length ? [unit.behaviour, ...ranks] : [])];
    const made = row(isRecorded ? cells : [box("units_off", unit.name, unit.name, own), ...cells]);
    made.dataset.text = `${unit.name} layer ${layer} ${unit.behaviour}`.toLowerCase();
    return made;
  });
  const filter = node("input", { type: "search", placeholder: "L17. or layer 17" });
  filter.addEventListener("input", () => {
    for (const made of rows) made.hidden = !made.dataset.text.includes(filter.value.toLowerCase());
  });
  const panel = node("details", { class: "units" }, node("summary", {}, `Units: ${facts.n_units}`));
  if (!isRecorded) {
    const sets = [["Behaviours", "behaviours_off", facts.n_by_behaviour, String], ["Layers", "layers_off", facts.n_by_layer, Number]];
    for (const [title, kind, counts, keyOf] of sets) {
      const switches = Object.entries(counts).map(([key, n]) => box(kind, keyOf(key), `${key} (${n})`));
      if (switches.length) panel.append(node("fieldset", {}, node("legend", {}, title), ...switches));
    }
  }
  const names = Object.keys(facts.n_by_behaviour);
  const heads = [...(isRecorded ? [] : ["on"]), "unit", "change", ...(names.length ? ["behaviour", ...names.map(name => `rank, ${name}`)] : [])];
  const caption = `The ${rows.length} largest changes at dose 1 (of a neuron its gate minus 1)`;
  panel.append(node("label", { class: "filter" }, "Filter ", filter), node("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Units" }, table(caption, heads, rows)));
  refresh();
  const values = () => Object.fromEntries(Object.entries(off).map(([kind, keys]) => [kind, [...keys]]));
  return { panel, values };
}

function render({ model, el }) {
  const facts = model.get("facts");
  const request = { dose: 1, prompt: facts.prompts[0], ...model.get("request") };
  const points = new Map();
  let timer = 0, asked = 0, askedAt = 0, again = false, switches = "", latest = 0;

  const send = () => {
    if (asked && Date.now() - askedAt < PATIENCE) {
      again = true;
      return;
    }
    const values = { ...inputs.values(), ...units.values() };
    if (!values.prompt.trim()) {
      status.textContent = "type a prompt";
      return;
    }
    const number = Math.max(Date.now(), latest + 1);
    [asked, askedAt, again] = [number, Date.now(), false];
    model.set("request", { number, ...values });
    model.save_changes();
  };
  const moved = (typing = false) => {
    clearTimeout(timer);
    if (facts.doses.length) {
      send();
      return;
    }
    status.textContent = "asking Python … (if the kernel was restarted, run the cell again)";
    timer = setTimeout(send, typing ? 4 * PAUSE : PAUSE);
  };
  const inputs = controls(facts, request, moved);
  const units = unitPanel(facts, request, moved);
  const status = node("p", { class: "status", role: "status" });
  const kl = node("p", { class: "kl" });
  const curves = node("div", {});
  const original = node("div", { class: "answer", "aria-live": "off" });
  const edited = node("div", { class: "answer", "aria-live": "off" });
  const editedTitle = node("h3", {}, "Edited");
  const scored = node("p", { class: "warning" });
  const tokens = node("div", { class: "scroll" });
  const margins = node("div", { class: "scroll" });
  // Keys are for the view: JupyterLab would fold cells where an arrow key moves the slider, and other hosts listen, too.
  const named = { class: "dean-explore", "aria-label": `${facts.model}: ${facts.change}`, "data-lm-suppress-shortcuts": "true" };
  const root = node("section", named,
    node("p", { class: "what" }, node("b", {}, facts.model), ` ${facts.change}`),
    inputs.prompts, scored, inputs.dose, kl, status,
    node("div", { class: "columns" }, node("div", {}, node("h3", {}, "Original"), original), node("div", {}, editedTitle, edited)),
    node("div", { class: "columns" }, tokens, curves), margins, units.panel);

  const grow = (number, step) => {
    if (facts.doses.length || asked || again) return;
    model.set("wanted", { request: number, step });
    model.save_changes();
  };
  const drawAnswers = () => {
    const answers = model.get("answers");
    if (answers.request !== latest) return;
    original.textContent = answers.original;
    edited.textContent = answers.edited;
    if (!answers.is_done) grow(latest, answers.step + 1);
  };
  const drawState = () => {
    const state = model.get("state");
    // An answer to an older request never takes the place of a newer one.
    if (!(state.request >= latest)) return;
    latest = state.request;
    if (state.request >= asked) asked = 0;
    if (again) send();
    if (state.error) {
      status.textContent = state.error;
      return;
    }
    const { request: _, ...now } = model.get("request");
    const key = JSON.stringify([now.layers_off, now.behaviours_off, now.units_off]);
    if (key !== switches) points.clear();
    switches = key;
    for (const each of model.get("curve") ?? [state]) points.set(each.dose, pointOf(each));
    const dose = fixed(state.dose, 2);
    if (!asked) status.textContent = `dose ${dose}, ${state.n_on} of ${facts.n_units} units on`;
    editedTitle.textContent = `Edited, dose ${dose}`;
    kl.replaceChildren("KL on general text ", node("b", {}, fixed(state.kl, 4)), ` nats per token, at dose ${dose} (${facts.n_general} texts of ${facts.general}; 0: nothing changed)`);
    const [following] = state.following;
    scored.textContent = following.was_scored ? "The edit was made from this prompt: what happens here says nothing about others." : "";
    tokens.replaceChildren(tokenTable(following));
    margins.replaceChildren(marginTable(state.margins));
    curves.replaceChildren(chart([...points.values()], facts, state));
    if (model.get("answers").request === latest) drawAnswers();
    else grow(latest, 1);
  };
  const onTheme = () => root.setAttribute("data-theme", isDark(el) ? "dark" : "light");
  const scheme = matchMedia("(prefers-color-scheme: dark)");
  // Where the view is live, its copy without a kernel is not needed.
  const hiding = node("style", {}, facts.name ? `.${facts.name} { display: none; }` : "");
  root.addEventListener("keydown", event => {
    if (!event.ctrlKey && !event.metaKey) event.stopPropagation();
  });
  document.head.append(hiding);
  el.append(root);
  requestAnimationFrame(onTheme);
  scheme.addEventListener("change", onTheme);
  model.on("change:state", drawState);
  model.on("change:answers", drawAnswers);
  drawState();
  return () => {
    clearTimeout(timer);
    hiding.remove();
    scheme.removeEventListener("change", onTheme);
    model.off("change:state", drawState);
    model.off("change:answers", drawAnswers);
  };
}

// A model for `render` whose answers were measured beforehand, at the doses of `facts.doses`.
function recorded({ facts, recorded: all }) {
  const values = { facts, curve: all.map(each => each.state), request: {}, state: {}, answers: {} };
  const watching = [];
  const answer = () => {
    const { number, dose, prompt } = values.request;
    const here = all.find(each => each.state.dose === dose), zero = all.find(each => each.state.dose === 0);
    const i = facts.prompts.indexOf(prompt);
    values.answers = { request: number, original: zero.answers[i], edited: here.answers[i], is_done: true };
    values.state = { ...here.state, request: number, following: [here.state.following[i]] };
    for (const [event, call] of watching) if (event === "change:state") call();
  };
  const model = {
    get: name => values[name],
    set: (name, value) => { values[name] = value; },
    save_changes: answer,
    on: (event, call) => watching.push([event, call]),
    off: () => {},
  };
  values.request = { number: 1, dose: 1, prompt: facts.prompts[0] };
  answer();
  return model;
}

export default { render };
