"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const categories = data.categories.map(([key, title]) => ({ key, title }));
  const US = 1e6; // all times in the data are microseconds since the run's start
  const CACHED = 1, SERVING = 2;
  const NARROW = 1 / 900; // of the axis: about a pixel or two; what is narrower is drawn together
  const ROWS = 10, MORE = 200; // of a table at first, and with each press of its button
  const LONG = 90; // letters of a cell, beyond which it folds

  // ---- Words ------------------------------------------------------------------------------------------------------

  // As in_words() of summary.py says it, so that all outputs agree.
  function words(us) {
    const s = us / US, size = Math.abs(s);
    if (size < 0.0005) return us ? `${us} µs` : "0 s";
    if (size < 0.0995) return `${(s * 1000).toFixed(0)} ms`;
    return `${s.toFixed(size < 9.995 ? 2 : 1)} s`;
  }
  const signed = (us) => (us > 0 ? "+" : us < 0 ? "\u2212" : "") + words(Math.abs(us));
  const plural = (count, what, many = `${what}s`) => `${count} ${count === 1 ? what : many}`;

  // ---- Elements: whatever comes from outside is text, and never markup ------------------------------------------------

  function make(tag, properties = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(properties)) {
      if (value === undefined || value === null || value === false) continue;
      if (name === "text") element.textContent = value;
      else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
      else if (name === "style") for (const [property, what] of Object.entries(value)) element.style.setProperty(property, what);
      else element.setAttribute(name, value === true ? "" : value);
    }
    element.append(...children.filter((child) => child !== null && child !== undefined));
    return element;
  }
  const swatch = (key) => make("span", { class: `swatch fill-${key}`, "aria-hidden": "true" });
  const tag = (run) => (run.letter ? make("span", { class: "tag", text: run.letter }) : null);

  // ---- The runs -----------------------------------------------------------------------------------------------------

  const runs = data.runs.map((raw, number) => {
    const text = (place) => data.texts[place || 0];
    const run = { ...raw, number, letter: data.runs.length > 1 ? String.fromCharCode(65 + number) : "" };
    const bare = { kernels: 0, library: "", shape: "", target: "", error: "", remedy: "", cached: false, serving: false, run };
    for (const track of run.tracks) {
      track.events = track.events.map((values) => {
        const [at, length, row, category, kind, name, kernels = 0, flags = 0, ...texts] = values;
        const [library, shape, target, error, remedy] = [0, 1, 2, 3, 4].map((place) => text(texts[place]));
        return { ...bare, at, length, row, category: categories[category], kind: text(kind), name: text(name), kernels, library, shape, target, error, remedy,
          cached: Boolean(flags & CACHED), serving: Boolean(flags & SERVING), where: track.title };
      });
    }
    run.event = ([track, index]) => run.tracks[track].events[index];
    run.attributed = raw.stretches.map(([begin, end, category]) => ({
      ...bare, at: begin, length: end - begin, row: 0, category: categories[category], kind: "", name: categories[category].title, where: "",
    }));
    run.last = run.tracks.reduce((most, track) => track.events.reduce((end, event) => Math.max(end, event.at + event.length), most), run.total);
    return run;
  });
  const isAlarm = (event) => event.kind === "jit" && event.serving && !event.cached;

  function kindOf(event) {
    if (event.kind === "") return "what this time is attributed to";
    if (event.kind === "jit") return event.serving ? "compiled on call, while serving" : "compiled on call (JIT)";
    if (event.kind === "compile") return event.cached ? "in the cache already" : "compiled ahead";
    if (event.kind === "load") return event.cached ? "loaded from a cache" : "loaded";
    return { step: "step", discover: "found by dry forwards", record: "recorded", restore: "restored", ready: "ready" }[event.kind] || event.kind;
  }

  function facts({ event, count }) {
    const counted = { discover: "targets", record: "kernels", load: "kernels", restore: "kernels" }[event.kind];
    return [
      ["what", kindOf(event)],
      ["took", event.kind === "ready" ? "" : words(event.length)],
      ["began", `${words(event.at)} after the start`],
      ["where", event.where],
      ["library", event.library],
      ["shape", event.shape],
      ["target", event.target],
      [counted, counted && !(event.kind === "load" && event.cached) ? String(event.kernels) : ""],
      ["error", event.error],
      ["instead", event.remedy],
      ["here", count > 1 ? `${count} events, of which this is the longest` : ""],
    ].filter(([, value]) => value);
  }

  const about = (run) => [run.hosts.join(", "), run.when, plural(new Set(run.tracks.map((track) => track.about)).size, "process", "processes")].join(" \u00b7 ");

  // ---- The picture: all runs on one axis ---------------------------------------------------------------------------------

  const longest = Math.max(...runs.map((run) => run.total), 1);
  const last = Math.max(...runs.map((run) => run.last), 1);
  // Serving goes on for days: what is far behind the start-up would squeeze it.
  const end = (last <= longest * 1.25 ? last : longest) * 1.015;
  const percent = (us) => `${((100 * us) / end).toFixed(4)}%`;
  const bars = new Map(); // element -> what it shows
  const drawn = new Map(); // event -> its element
  let beyond = 0;

  function bar({ event, at, length, count }) {
    const wide = length / end;
    const key = event.category.key;
    const label = wide > 0.03 ? make("span", { text: event.error ? `\u2715 ${event.name}` : event.name }) : null;
    const classes = ["bar", `fill-${key}`, event.cached && count === 1 ? "hollow" : "", wide < NARROW * 2 ? "narrow" : "", isAlarm(event) ? "alarm" : "", label ? "told" : ""];
    return make("div", { class: classes.filter(Boolean).join(" "), style: { left: percent(at), width: percent(length) } }, label);
  }

  function row(events, label) {
    const element = make("div", { class: "row" });
    let open = null;
    const put = () => {
      if (!open) return;
      const made = bar(open);
      bars.set(made, { event: open.event, count: open.count });
      for (const event of open.events) drawn.set(event, made);
      element.append(made);
      open = null;
    };
    for (const event of events) {
      let { at } = event;
      if (at >= end) {
        beyond++;
        if (!isAlarm(event)) continue;
        at = end * (1 - 3 * NARROW); // it must be seen, wherever it was
      }
      const length = Math.max(Math.min(event.length, end - at), 0), narrow = length < end * NARROW && !isAlarm(event);
      if (open && narrow && open.narrow && at - open.at - open.length < end * NARROW * 0.75) {
        open.length = Math.max(open.length, at + length - open.at);
        if (event.length > open.event.length) open.event = event;
        open.count++;
        open.events.push(event);
        continue;
      }
      put();
      open = { event, at, length, narrow, count: 1, events: [event] };
    }
    put();
    if (label) element.dataset.lane = label;
    return element;
  }

  function lane(label, about, classes, ...rows) {
    return make("div", { class: `lane ${classes}` }, make("div", { class: "label", text: label, title: about }), make("div", { class: "rows" }, ...rows));
  }

  function lanes(run) {
    const found = [lane("start-up", "what each instant is attributed to", "led", row(run.attributed, "start-up"))];
    for (let place = 0; place < run.tracks.length; place++) {
      const track = run.tracks[place], { group } = track;
      let next = place + 1;
      while (group && next < run.tracks.length && run.tracks[next].group === group && run.tracks[next].about === track.about) next++;
      const many = run.tracks.slice(place, next);
      if (many.length > 2) {
        found.push(lane(plural(many.length, group), track.about, "thin", ...many.map((each) => row(each.events, each.title))));
        place = next - 1;
        continue;
      }
      const depth = track.events.reduce((most, event) => Math.max(most, event.row), 0);
      const rows = Array.from({ length: depth + 1 }, () => []);
      for (const event of track.events) rows[event.row].push(event);
      found.push(lane(track.title, track.about, "", ...rows.map((events) => row(events, track.title))));
    }
    return found;
  }

  function ticks() {
    const power = 10 ** Math.floor(Math.log10(end / 10));
    const step = [1, 2, 5, 10].map((each) => each * power).find((each) => end / each <= 10);
    const digits = Math.max(0, -Math.floor(Math.log10(step / US) + 1e-9));
    const times = Array.from({ length: Math.floor(end / step) + 1 }, (_, place) => place * step);
    return { step, marks: times.map((at) => make("span", { class: at > 0.96 * end ? "tick end" : "tick", text: `${(at / US).toFixed(digits)} s`, style: { left: percent(at) } })) };
  }

  const tip = document.getElementById("tip");
  const live = make("p", { class: "hidden", "aria-live": "polite", id: "live" });
  const hideTip = () => { tip.hidden = true; };
  let selected = null;

  function showTip(shown, x, y) {
    const list = make("dl");
    for (const [name, value] of facts(shown)) list.append(make("dt", { text: name }), make("dd", { text: value }));
    tip.replaceChildren(make("span", { class: "name", text: shown.event.name }), list);
    tip.hidden = false;
    const { width, height } = tip.getBoundingClientRect();
    const left = x + 14 + width > innerWidth - 8 ? Math.max(8, x - 14 - width) : x + 14;
    const top = y + 18 + height > innerHeight - 8 ? Math.max(8, y - 12 - height) : y + 18;
    tip.style.transform = `translate(${Math.round(left)}px, ${Math.round(top)}px)`;
  }

  function select(element, into = "nearest") {
    if (selected) selected.classList.remove("selected");
    selected = element;
    if (!element) return hideTip();
    element.classList.add("selected");
    element.scrollIntoView({ block: into });
    const shown = bars.get(element), box = element.getBoundingClientRect();
    const { letter } = shown.event.run;
    live.textContent = `${letter ? `Run ${letter}. ` : ""}${shown.event.name}: ${facts(shown).map(([name, value]) => `${name} ${value}`).join(", ")}`;
    return showTip(shown, Math.max(box.left, 0), box.bottom - 10);
  }

  function walk(frame, key) {
    const rows = [...frame.querySelectorAll(".row")].filter((each) => each.childElementCount);
    if (key === "Escape") return select(null);
    if (!selected) return rows.length && select(rows[Math.min(1, rows.length - 1)].firstElementChild);
    const here = selected.parentElement;
    if (key === "ArrowRight" || key === "ArrowLeft") return select((key === "ArrowRight" ? selected.nextElementSibling : selected.previousElementSibling) || selected);
    if (key === "Home" || key === "End") return select(key === "Home" ? here.firstElementChild : here.lastElementChild);
    const next = rows[rows.indexOf(here) + (key === "ArrowDown" ? 1 : -1)];
    if (!next) return undefined;
    const middle = (element) => { const box = element.getBoundingClientRect(); return box.left + box.width / 2; };
    const at = middle(selected);
    const away = (element) => { const box = element.getBoundingClientRect(); return Math.max(box.left - at, at - box.right, 0); };
    return select([...next.children].reduce((best, each) => (away(each) < away(best) ? each : best)));
  }

  function picture() {
    const { step, marks } = ticks();
    const keys = ["ArrowRight", "ArrowLeft", "ArrowDown", "ArrowUp", "Home", "End", "Escape"];
    const over = (event) => {
      const element = event.target.closest(".bar");
      if (element) showTip(bars.get(element), event.clientX, event.clientY);
      else hideTip();
    };
    const frame = make("div", {
      class: "frame", tabindex: "0", role: "application", "data-end": end / US, "aria-roledescription": "timeline", "aria-describedby": "keys", style: { "--step": percent(step) },
      "aria-label": `Timeline: ${runs.map((run) => `${run.letter ? `run ${run.letter}, ` : ""}${plural(run.tracks.length, "lane")}, ${words(run.total)}`).join("; ")}`,
      onpointermove: over, onpointerleave: hideTip, onblur: hideTip,
      onclick: (event) => select(event.target.closest(".bar")),
      onkeydown: (event) => {
        if (event.ctrlKey || event.metaKey || event.altKey || !keys.includes(event.key)) return;
        event.preventDefault();
        walk(frame, event.key);
      },
    }, make("div", { class: "axis", "aria-hidden": "true" }, ...marks),
    ...runs.map((run) => make("div", { class: "run" },
      run.letter ? make("h2", {}, tag(run), " ", make("b", { text: run.name }), " ", make("span", { text: run.verdict }), " ", make("span", { class: "soft", text: about(run) })) : null,
      make("div", { class: "lanes" }, ...lanes(run),
        run.ready === null ? null : make("div", { class: "over", "aria-hidden": "true" }, make("div", { class: "ready", style: { left: percent(run.ready) } }))))));
    const used = categories.map((category, place) => [category, place]).filter(([, place]) => runs.some((run) => run.parts[place] > 0));
    const legend = make("p", { class: "legend" }, ...used.map(([{ key, title }, place]) => make("span", {}, swatch(key),
      runs.length > 1 ? title : `${title} ${words(runs[0].parts[place])}`)), make("span", {}, make("span", { class: "dash", "aria-hidden": "true" }), "ready"));
    return make("section", { id: "picture", "aria-label": "Timeline" }, legend, frame,
      beyond ? make("p", { class: "about", id: "beyond", text: `${plural(beyond, "event")} later than ${words(Math.round(end))} ${beyond === 1 ? "is" : "are"} beyond this picture.` }) : null,
      make("p", { class: "about", id: "keys", text: "Hover for details, or focus the picture and use the arrow keys, Home, End and Escape. Hatched: compiled on call. Hollow: found in a cache. To zoom, open a trace (--trace) in Perfetto." }), live);
  }

  // ---- Tables ----------------------------------------------------------------------------------------------------------

  // A long text is folded to its beginning.
  const folded = (text) => (text.length <= LONG ? text : make("details", {}, make("summary", { text: `${text.slice(0, LONG - 20)}\u2026` }), text));

  function table({ id, title, about, columns, rows }) {
    let by = columns.findIndex((column) => column.title === "seconds"), falling = true, wanted = "", most = ROWS;
    const all = runs.length > 1 ? [{ title: "run", value: (row) => row.run.letter, kind: "short" }, ...columns] : columns;
    by += all.length - columns.length;
    const show = (column, row) => (column.show ? column.show(row) : String(column.value(row)));
    const heads = all.map((column, place) => make("th", { scope: "col", role: "columnheader", class: column.kind === "number" ? "number" : null }, make("button", {
      type: "button", text: column.title,
      onclick: () => {
        falling = by === place ? !falling : column.kind === "number";
        by = place;
        fill();
      },
    })));
    const body = make("tbody", { role: "rowgroup" }), count = make("span", { class: "soft", "aria-live": "polite" });
    const more = make("button", { type: "button", class: "tool more-rows", onclick: () => { most += MORE; fill(); } });
    const input = make("input", { class: "filter", type: "search", placeholder: "Filter", "aria-label": `Filter: ${title}`, oninput: () => { wanted = input.value.toLowerCase(); most = ROWS; fill(); } });
    const compare = (left, right) => {
      const [a, b] = [left, right].map(all[by].value);
      const way = typeof a === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true });
      return falling ? -way : way;
    };
    function cell(column, row) {
      const text = show(column, row), bar = column.kind === "name" && drawn.get(row.event);
      const inside = bar ? make("button", { type: "button", class: "go", text, title: "Show it in the picture", onclick: () => { bar.closest(".frame").focus({ preventScroll: true }); select(bar, "center"); } }) : folded(text);
      return make("td", { class: column.kind, role: "cell", "data-label": column.title }, inside);
    }
    function fill() {
      const fitting = rows.filter((row) => !wanted || all.some((column) => show(column, row).toLowerCase().includes(wanted))).sort(compare);
      heads.forEach((head, place) => head.setAttribute("aria-sort", place === by ? (falling ? "descending" : "ascending") : "none"));
      body.replaceChildren(...fitting.slice(0, most).map((row) => make("tr", { role: "row" }, ...all.map((column) => cell(column, row)))));
      count.textContent = wanted ? `${fitting.length} of ${rows.length}` : "";
      more.hidden = fitting.length <= most;
      more.textContent = `Show ${Math.min(MORE, fitting.length - most)} more of ${fitting.length}`;
    }
    fill();
    return make("section", { id, "aria-labelledby": `${id}-title` },
      make("div", { class: "above" }, make("div", {}, make("h2", { id: `${id}-title`, text: title }), make("p", { class: "about", text: about })),
        rows.length > 5 ? make("div", { class: "tools" }, count, input) : null),
      make("div", { class: "scroll", role: "region", "aria-label": title, tabindex: "0" },
        make("table", { class: "cards", role: "table" }, make("thead", { role: "rowgroup" }, make("tr", { role: "row" }, ...heads)), body)), more);
  }

  const each = (list) => runs.flatMap((run) => list(run).map((row) => ({ ...row, run })));
  const events = (list) => each((run) => list(run).map((place) => ({ event: run.event(place) })));
  const seconds = (title, value) => ({ title, value, show: (row) => (value(row) ? words(value(row)) : ""), kind: "number" });
  const number = (title, value) => ({ title, value, show: (row) => (value(row) ? String(value(row)) : ""), kind: "number" });
  const column = (title, kind, value) => ({ title, kind, value });
  const how = (event) => (event.error ? "failed" : event.kind !== "jit" ? "ahead" : event.serving ? "on call, serving" : "on call");

  const serving = events((run) => run.serving);
  const ofEvent = [
    column("kernel", "name", (row) => row.event.name),
    seconds("seconds", (row) => row.event.length), seconds("began at", (row) => row.event.at),
    column("library", "short", (row) => row.event.library), column("where", "short", (row) => row.event.where),
  ];
  const tables = () => [
    {
      id: "serving", title: "JIT while serving", rows: serving,
      about: "A request waited for each of these. The last column says what would have covered it.",
      columns: [...ofEvent, column("shape", "shape", (row) => row.event.shape || row.event.target),
        column("instead", "shape", (row) => [row.event.error, row.event.remedy].filter(Boolean).join("; "))],
    },
    {
      id: "compiles", title: "Longest compiles", rows: events((run) => run.compiles),
      about: "Ahead: before its use, by a worker. On call: because it was called, and the caller waited.",
      columns: [...ofEvent, column("how", "short", (row) => how(row.event)),
        column("target or shape", "shape", (row) => row.event.error || row.event.target || row.event.shape)],
    },
    {
      id: "targets", title: "Targets", about: "The model's GEMMs. Seconds are those of all compiles for one together.",
      rows: each((run) => run.targets.map(([name, kernels, cached, failed, us, ...place]) => ({ name: data.texts[name], kernels, cached, failed, us, event: run.event(place) }))),
      columns: [column("target", "name", (row) => row.name), number("compiled", (row) => row.kernels), number("in the cache", (row) => row.cached),
        number("failed", (row) => row.failed), seconds("seconds", (row) => row.us)],
    },
    {
      id: "kernels", title: "Kernels", about: "How often each was compiled ahead, compiled on call, and found in a cache, in all processes together.",
      rows: each((run) => run.kernels.map(([name, library, ahead, called, cached, us, ...place]) => ({ name: data.texts[name], library: data.texts[library], ahead, called, cached, us, event: run.event(place) }))),
      columns: [column("kernel", "name", (row) => row.name), column("library", "short", (row) => row.library), number("ahead", (row) => row.ahead),
        number("on call", (row) => row.called), number("in a cache", (row) => row.cached), seconds("seconds", (row) => row.us)],
    },
  ].filter(({ rows }) => rows.length).map(table);

  function parts() {
    const [first, ...others] = runs;
    // Two starts of one server differ by as much as that.
    const told = (by) => (Math.abs(by) < 0.01 * longest ? "soft" : by < 0 ? "less" : "more");
    const cell = (text, kind = "") => make("td", { class: `number ${kind}`, text });
    const cells = (of) => [
      cell(words(of(first))),
      ...others.flatMap((run) => [cell(words(of(run))), cell(signed(of(run) - of(first)), told(of(run) - of(first)))]),
      others.length ? null : cell(first.total ? `${((100 * of(first)) / first.total).toFixed(1)} %` : "", "soft"),
    ];
    const heads = others.length ? ["A", ...others.flatMap((run) => [run.letter, `${run.letter} \u2212 A`])] : ["seconds", "share"];
    const rows = categories.map((category, place) => [category, place]).filter(([, place]) => runs.some((run) => run.parts[place] > 0));
    return make("section", { id: "parts", "aria-labelledby": "parts-title" },
      make("h2", { id: "parts-title", text: "Where the seconds went" }),
      make("p", { class: "about", text: "Each instant counts once: for what the slowest rank was doing, where it did nothing for the other ranks, then for the main process." }),
      make("div", { class: "scroll", role: "region", "aria-label": "Where the seconds went", tabindex: "0" }, make("table", {},
        make("thead", {}, make("tr", {}, make("th", { scope: "col", text: "category" }), ...heads.map((text) => make("th", { scope: "col", class: "number", text })))),
        make("tbody", {}, ...rows.map(([{ key, title }, place]) => make("tr", { "data-category": key }, make("th", { scope: "row" }, swatch(key), title), ...cells((run) => run.parts[place])))),
        make("tfoot", {}, make("tr", {}, make("th", { scope: "row", text: runs.every((run) => run.ready !== null) ? "start to ready" : "in all" }), ...cells((run) => run.total))))));
  }

  // ---- The page ------------------------------------------------------------------------------------------------------------

  const lines = runs.flatMap((run) => run.unreadable.map((line) => (run.letter ? `${run.letter}: ${line}` : line)));
  const whom = serving.length === 1 ? "1 kernel was compiled while serving: a request waited for it." : `${serving.length} kernels were compiled while serving: a request waited for each.`;
  const by = runs.filter((run) => run.letter && run.serving.length).map((run) => `${run.letter} ${run.serving.length}`).join(", ");
  // The tables' rows lead to the picture, which has to be there first.
  const top = picture(), below = tables();
  below.splice(serving.length ? 1 : 0, 0, parts());
  document.getElementById("page").append(...[
    make("header", {},
      make("h1", { class: data.compared ? "compared" : null, text: data.compared || runs[0].verdict }),
      serving.length ? make("p", { class: "warning" }, make("a", { href: "#serving", text: by ? `${whom} (${by})` : whom })) : null,
      runs.length > 1 ? null : make("p", { class: "overline", text: `${runs[0].name} \u00b7 ${about(runs[0])}` })),
    lines.length ? make("div", { class: "note", role: "note" }, "Some events could not be read, so this is not all that happened:", make("ul", {}, ...lines.map((line) => make("li", { text: line })))) : null,
    top, ...below,
    make("footer", { text: `Made by sglang-warmstart report, ${data.version}. Times are of the clock that all processes of a host share.` }),
  ].filter(Boolean));
})();
