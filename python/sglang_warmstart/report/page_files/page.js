"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const categories = data.categories.map(([key, title, kernels]) => ({ key, title, kernels }));
  const calm = matchMedia("(prefers-reduced-motion: reduce)");
  const US = 1e6; // all times in the data are microseconds since the run's start
  const CACHED = 1, SERVING = 2;

  // ---- Words ------------------------------------------------------------------------------------------------------

  // As in_words() of summary.py says it, so that all outputs agree.
  function words(us) {
    const s = us / US, size = Math.abs(s);
    if (size < 0.0005) return us ? `${us} µs` : "0 s";
    if (size < 0.0995) return `${(s * 1000).toFixed(0)} ms`;
    return `${s.toFixed(size < 9.995 ? 2 : 1)} s`;
  }
  const signed = (us) => (us > 0 ? "+" : us < 0 ? "\u2212" : "") + words(Math.abs(us));
  const share = (part, whole) => (whole ? `${((100 * part) / whole).toFixed(1)} %` : "");
  const plural = (count, what) => `${count} ${what}${count === 1 ? "" : "s"}`;

  // ---- Elements: whatever comes from outside is text, and never markup ------------------------------------------------

  function make(tag, properties = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(properties)) {
      if (value === undefined || value === null || value === false) continue;
      if (name === "text") element.textContent = value;
      else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
      else if (name === "style") Object.assign(element.style, value);
      else element.setAttribute(name, value === true ? "" : value);
    }
    element.append(...children.filter((child) => child !== null && child !== undefined));
    return element;
  }

  function swatch(category) {
    const extra = category.key === "jit" ? " hatched" : category.key === "other" ? " outlined" : "";
    return make("span", { class: `swatch${extra}`, style: { backgroundColor: `var(--${category.key})` }, "aria-hidden": "true" });
  }

  // ---- The runs -----------------------------------------------------------------------------------------------------

  const letters = ["A", "B", "C", "D"];
  const runs = data.runs.map((raw, number) => {
    const text = (place) => data.texts[place || 0];
    const run = { ...raw, number, letter: data.runs.length > 1 ? letters[number] : "" };
    run.tracks = raw.tracks.map((track, place) => ({ ...track, place }));
    for (const track of run.tracks) {
      track.events = track.events.map((values, index) => {
        const [at, length, row, category, kind, name, kernels = 0, flags = 0, ...texts] = values;
        const [library, shape, target, error, remedy] = [0, 1, 2, 3, 4].map((place) => text(texts[place]));
        return {
          at, length, row, category: categories[category], kind: text(kind), name: text(name), kernels, library, shape, target,
          error, remedy, cached: Boolean(flags & CACHED), serving: Boolean(flags & SERVING), track, index,
        };
      });
    }
    run.event = ([track, index]) => run.tracks[track].events[index];
    run.attributed = {
      title: "start-up", about: "what each instant is attributed to", place: -1, started: 0,
      events: raw.stretches.map(([begin, end, category], index) => ({
        at: begin, length: end - begin, row: 0, category: categories[category], kind: "", name: categories[category].title, kernels: 0,
        library: "", shape: "", target: "", error: "", remedy: "", cached: false, serving: false, index,
      })),
    };
    for (const event of run.attributed.events) event.track = run.attributed;
    const ends = run.tracks.flatMap((track) => track.events.map((event) => event.at + event.length));
    run.last = ends.reduce((most, end) => Math.max(most, end), run.total);
    return run;
  });

  const isAlarm = (event) => event.kind === "jit" && event.serving && !event.cached;

  function kindOf(event) {
    if (event.kind === "") return "attributed to";
    if (event.kind === "jit") return event.serving ? "compiled on call, while serving" : "compiled on call (JIT)";
    if (event.kind === "compile") return event.cached ? "in the cache already" : "compiled ahead";
    if (event.kind === "load") return event.cached ? "loaded from a cache" : "loaded";
    return { step: "step", discover: "found by dry forwards", record: "recorded", restore: "restored", ready: "ready" }[event.kind] || event.kind;
  }

  function facts(event) {
    const what = { discover: "targets", record: "kernels", load: "kernels", restore: "kernels" }[event.kind];
    return [
      ["what", kindOf(event)],
      ["took", event.kind === "ready" ? "" : words(event.length)],
      ["began", `${words(event.at)} after the start`],
      ["where", event.kind ? event.track.title : ""],
      ["library", event.library],
      ["shape", event.shape],
      ["target", event.target],
      [what, what && !(event.kind === "load" && event.cached) ? String(event.kernels) : ""],
      ["error", event.error],
      ["instead", event.remedy],
    ].filter(([, value]) => value);
  }

  // ---- What part of the time is shown: one for all timelines, so that two runs stay comparable -----------------------

  const longest = Math.max(...runs.map((run) => run.total), 1);
  const last = Math.max(...runs.map((run) => run.last), 1);
  const view = {
    home: { from: 0, to: (last <= longest * 1.25 ? last : longest) * 1.015 },
    whole: { from: 0, to: last * 1.015 },
    from: 0, to: 0, watchers: [], moving: 0,
    set(from, to) {
      const limit = this.whole.to;
      const span = Math.min(Math.max(to - from, 50), limit);
      const middle = (from + to) / 2;
      this.from = Math.min(Math.max(middle - span / 2, 0), limit - span);
      this.to = this.from + span;
      for (const watcher of this.watchers) watcher();
    },
    // A step with a keyboard or a button is shown as a movement, so that one can see where one is.
    go(from, to) {
      cancelAnimationFrame(this.moving);
      if (calm.matches || document.hidden) return this.set(from, to);
      const begin = performance.now(), old = [this.from, this.to];
      const move = (now) => {
        const part = Math.min((now - begin) / 160, 1), eased = 1 - (1 - part) ** 3;
        this.set(old[0] + (from - old[0]) * eased, old[1] + (to - old[1]) * eased);
        if (part < 1) this.moving = requestAnimationFrame(move);
      };
      this.moving = requestAnimationFrame(move);
      return undefined;
    },
    zoom(factor, around, smoothly) {
      cancelAnimationFrame(this.moving);
      const from = around - (around - this.from) * factor, to = around + (this.to - around) * factor;
      if (smoothly) this.go(Math.max(from, 0), Math.min(to, this.whole.to));
      else this.set(from, to);
    },
    pan(us) {
      cancelAnimationFrame(this.moving);
      const span = this.to - this.from;
      const from = Math.min(Math.max(this.from + us, 0), this.whole.to - span);
      this.set(from, from + span);
    },
    show(event) {
      const span = Math.max(event.length * 2.5, 2000);
      const middle = event.at + event.length / 2;
      this.go(Math.max(middle - span / 2, 0), Math.min(middle + span / 2, this.whole.to));
    },
  };

  // ---- Tooltip and what is said ----------------------------------------------------------------------------------------

  const tip = document.getElementById("tip");
  const live = make("p", { class: "hidden", "aria-live": "polite", id: "live" });

  function showTip(event, x, y, others) {
    const list = make("dl");
    for (const [name, value] of facts(event)) list.append(make("dt", { text: name }), make("dd", { text: value }));
    if (others > 1) list.append(make("dt", { text: "here" }), make("dd", { text: `${others} events; zoom in to tell them apart` }));
    tip.replaceChildren(make("span", { class: "name", text: event.name }), list);
    tip.hidden = false;
    const { width, height } = tip.getBoundingClientRect();
    const left = x + 14 + width > innerWidth - 8 ? Math.max(8, x - 14 - width) : x + 14;
    const top = y + 18 + height > innerHeight - 8 ? Math.max(8, y - 12 - height) : y + 18;
    tip.style.transform = `translate(${Math.round(left)}px, ${Math.round(top)}px)`;
  }
  const hideTip = () => { tip.hidden = true; };

  function announce(event, run) {
    const where = run.letter ? `Run ${run.letter}. ` : "";
    const rest = facts(event).map(([name, value]) => `${name} ${value}`).join(", ");
    live.textContent = `${where}${event.name}: ${rest}`;
  }

  // ---- Timeline --------------------------------------------------------------------------------------------------------

  class Timeline {
    constructor(run) {
      this.run = run;
      this.tracks = [run.attributed, ...run.tracks];
      const what = run.letter ? `Timeline of run ${run.letter}, ${run.name}` : "Timeline";
      this.axis = make("canvas", { class: "axis", "aria-hidden": "true" });
      this.canvas = make("canvas", { class: "lanes", "aria-hidden": "true" });
      this.labels = make("div", { class: "labels", "aria-hidden": "true" });
      for (const track of this.tracks) {
        track.label = make("div", { class: track.place < 0 ? "label led" : "label", text: track.title, title: track.about });
        this.labels.append(track.label);
      }
      this.frame = make(
        "div",
        { class: "frame", tabindex: "0", role: "application", "aria-roledescription": "timeline", "aria-label": `${what}: ${plural(run.tracks.length, "lane")}, ${words(run.total)}`, "aria-describedby": "timeline-help" },
        make("div", { class: "corner" }), this.axis, this.labels, this.canvas,
      );
      this.element = make("div", { class: "timeline" }, run.letter ? make("h3", {}, make("span", { class: "tag", text: run.letter }), ` ${run.name}`) : null, this.frame);
      this.selected = null;
      this.hovered = null;
      this.pending = 0;
      this.listen();
      view.watchers.push(() => this.soon());
    }

    // Sizes follow the page's font, which is larger on very large screens.
    layOut() {
      const rem = parseFloat(getComputedStyle(document.documentElement).fontSize);
      this.unit = rem / 16;
      this.rowHeight = Math.round((this.tracks.length > 40 ? 14 : 18) * this.unit);
      this.axisHeight = Math.round(28 * this.unit);
      this.font = `${11 * this.unit}px ${getComputedStyle(document.body).fontFamily}`;
      let top = 0;
      for (const track of this.tracks) {
        const depth = 1 + track.events.reduce((most, event) => Math.max(most, event.row), 0);
        track.rows = Array.from({ length: depth }, () => []);
        for (const event of track.events) track.rows[event.row].push(event);
        for (const row of track.rows) {
          let reach = -Infinity;
          row.reach = row.map((event) => (reach = Math.max(reach, event.at + event.length)));
        }
        track.top = top;
        track.height = depth * this.rowHeight + (track.place < 0 ? 12 : 6);
        top += track.height;
        Object.assign(track.label.style, { top: `${track.top + 2}px`, lineHeight: `${this.rowHeight}px` });
      }
      this.height = top;
    }

    x(us) { return ((us - view.from) / (view.to - view.from)) * this.width; }
    time(x) { return view.from + (x / this.width) * (view.to - view.from); }
    y(event) { return event.track.top + 3 + event.row * this.rowHeight; }

    soon() {
      if (!this.pending) this.pending = requestAnimationFrame(() => { this.pending = 0; this.draw(); });
    }

    measure() {
      const scale = devicePixelRatio || 1;
      this.layOut();
      this.width = this.canvas.clientWidth;
      for (const [canvas, height] of [[this.canvas, this.height], [this.axis, this.axisHeight]]) {
        canvas.style.height = `${height}px`;
        canvas.width = Math.round(this.width * scale);
        canvas.height = Math.round(height * scale);
        canvas.getContext("2d").setTransform(scale, 0, 0, scale, 0, 0);
      }
      this.labels.style.height = `${this.height}px`;
      this.draw();
    }

    readColours() {
      const style = getComputedStyle(document.documentElement);
      const colour = (name) => style.getPropertyValue(`--${name}`).trim();
      this.colours = Object.fromEntries(["ground", "ink", "soft", "line", "strong", "focus", "alarm", "grid"].map((name) => [name, colour(name)]));
      this.fills = new Map(categories.map((category) => [category, { fill: colour(category.key), ink: colour(`${category.key}-ink`) }]));
      const tile = make("canvas", { width: 6, height: 6 }), stroke = tile.getContext("2d");
      stroke.strokeStyle = this.fills.get(categories.find((category) => category.key === "jit")).ink;
      stroke.globalAlpha = 0.38;
      stroke.lineWidth = 1.5;
      for (const shift of [-6, 0, 6]) { stroke.moveTo(shift, 6); stroke.lineTo(shift + 6, 0); }
      stroke.stroke();
      this.hatch = this.canvas.getContext("2d").createPattern(tile, "repeat");
    }

    ticks() {
      const wanted = Math.max(this.width / (90 * this.unit), 2), span = view.to - view.from;
      const power = 10 ** Math.floor(Math.log10(span / wanted));
      const step = [1, 2, 5, 10].map((each) => each * power).find((each) => span / each <= wanted);
      const found = [];
      for (let at = Math.ceil(view.from / step) * step; at <= view.to; at += step) found.push(Math.round(at * 1000) / 1000);
      const digits = Math.max(0, -Math.floor(Math.log10(step / US) + 1e-9));
      return found.map((at) => [at, step >= US / 1000 ? `${(at / US).toFixed(digits)} s` : `${(at / 1000).toFixed(Math.max(0, digits - 3))} ms`]);
    }

    draw() {
      if (!this.width) return;
      const begin = performance.now();
      if (!this.colours) this.readColours();
      const context = this.canvas.getContext("2d"), { colours } = this;
      context.clearRect(0, 0, this.width, this.height);
      context.font = this.font;
      context.textBaseline = "middle";
      const ticks = this.ticks();
      context.fillStyle = colours.grid;
      for (const [at] of ticks) context.fillRect(Math.round(this.x(at)), 0, 1, this.height);
      context.fillStyle = colours.line;
      for (const track of this.tracks) context.fillRect(0, track.top + track.height - 1, this.width, 1);
      // Round corners cost more than all else, and nobody sees them where there are thousands.
      this.round = this.bars === undefined || this.bars < 1500;
      this.bars = 0;
      this.shown = 0;
      this.alarms = [];
      for (const track of this.tracks) for (const row of track.rows) this.drawRow(context, row);
      const ready = this.run.ready === null ? null : this.x(this.run.ready);
      if (ready !== null && ready >= -1 && ready <= this.width + 1) {
        context.strokeStyle = colours.ink;
        context.setLineDash([4, 3]);
        context.beginPath();
        context.moveTo(Math.round(ready) + 0.5, 0);
        context.lineTo(Math.round(ready) + 0.5, this.height);
        context.stroke();
        context.setLineDash([]);
      }
      for (const [left, right, event] of this.alarms) this.outline(context, left, right, event, colours.alarm, 2);
      if (this.selected) this.outline(context, this.x(this.selected.at), this.x(this.selected.at + this.selected.length), this.selected, colours.focus, 2.5);
      this.drawAxis(ticks, ready);
      const { dataset } = this.frame;
      dataset.from = (view.from / US).toFixed(6);
      dataset.to = (view.to / US).toFixed(6);
      dataset.bars = this.bars;
      dataset.events = this.shown;
      dataset.frames = Number(dataset.frames || 0) + 1;
      dataset.ms = (performance.now() - begin).toFixed(2);
    }

    // The place of the first event that may last until a time. The last row of a track may hold some that overlap, so that
    // their ends are in no order; how far they reach together is.
    first(row, time) {
      let low = 0, high = row.length;
      while (low < high) {
        const middle = (low + high) >> 1;
        if (row.reach[middle] < time) low = middle + 1;
        else high = middle;
      }
      return low;
    }

    drawRow(context, row) {
      // What is narrower than a pixel or two becomes one bar with its neighbours, in the colour that most of it has.
      let open = null;
      for (let place = this.first(row, view.from); place < row.length && row[place].at <= view.to; place++) {
        const event = row[place];
        if (event.at + event.length < view.from) continue;
        this.shown++;
        const left = this.x(event.at), right = Math.max(this.x(event.at + event.length), left + 1);
        const narrow = right - left < 2;
        if (isAlarm(event)) this.alarms.push([left, right, event]);
        if (open && narrow && left - open.right < 0.75) {
          open.right = Math.max(open.right, right);
          if (event.length > open.event.length) open.event = event;
          open.count++;
          continue;
        }
        if (open) this.drawBar(context, open);
        open = null;
        if (narrow) open = { left, right, event, count: 1 };
        else this.drawBar(context, { left, right, event, count: 1 });
      }
      if (open) this.drawBar(context, open);
    }

    drawBar(context, { left, right, event, count }) {
      this.bars++;
      const { fill, ink } = this.fills.get(event.category);
      // One pixel stays free between neighbours, where there is room for it.
      const from = Math.max(left, -4), to = Math.min(right > left + 4 ? right - 1 : right, this.width + 4);
      const top = this.y(event), height = this.rowHeight - 2, width = Math.max(to - from, 1);
      const hollow = event.cached && count === 1 && width > 3;
      const shape = (colour) => {
        context.fillStyle = colour;
        if (this.round && width > 6) { context.beginPath(); context.roundRect(from, top, width, height, 2); context.fill(); }
        else context.fillRect(from, top, width, height);
      };
      context.globalAlpha = hollow ? 0.3 : 1;
      shape(fill);
      context.globalAlpha = 1;
      if (event.category.key === "jit") shape(this.hatch);
      if (hollow || event.category.key === "other") {
        context.strokeStyle = event.category.key === "other" ? this.colours.strong : fill;
        context.lineWidth = 1;
        context.strokeRect(from + 0.5, top + 0.5, width - 1, height - 1);
      }
      if (width < 34 * this.unit) return;
      const start = Math.max(from, 0) + 5, room = Math.min(to, this.width) - start - 4;
      const label = this.cut(context, event.error ? `\u2715 ${event.name}` : event.name, room);
      if (!label) return;
      if (event.category.key === "jit") {
        // The hatching would run through the letters.
        context.fillStyle = fill;
        context.fillRect(start - 3, top + 2, context.measureText(label).width + 6, height - 4);
      }
      context.fillStyle = hollow ? this.colours.ink : ink;
      context.fillText(label, start, top + height / 2 + 0.5);
    }

    cut(context, text, room) {
      if (room < 18) return "";
      // No name is worth measuring in full if it cannot fit.
      const head = text.length > 200 ? text.slice(0, 200) : text;
      const whole = context.measureText(head).width;
      if (whole <= room) return head;
      const letters = Math.floor((head.length * (room - 8)) / whole);
      return letters < 2 ? "" : `${head.slice(0, letters).trimEnd()}\u2026`;
    }

    outline(context, left, right, event, colour, width) {
      context.strokeStyle = colour;
      context.lineWidth = width;
      const from = Math.max(left, -6) - 1.5, to = Math.min(Math.max(right, left + 2), this.width + 6) + 1.5;
      context.strokeRect(from, this.y(event) - 1.5, to - from, this.rowHeight + 1);
      context.lineWidth = 1;
    }

    drawAxis(ticks, ready) {
      const context = this.axis.getContext("2d"), { colours, axisHeight: bottom } = this;
      context.clearRect(0, 0, this.width, bottom);
      context.font = `600 ${this.font}`;
      context.textBaseline = "alphabetic";
      const flag = ready === null || ready < 0 || ready > this.width ? null : `ready ${words(this.run.ready)}`;
      const wide = flag ? context.measureText(flag).width : 0;
      const place = flag ? Math.min(Math.max(ready - wide / 2, 0), this.width - wide) : 0;
      context.font = this.font;
      context.fillStyle = colours.soft;
      for (const [at, label] of ticks) {
        const x = this.x(at), size = context.measureText(label).width;
        const left = Math.min(Math.max(x - size / 2, 0), this.width - size);
        context.fillRect(Math.round(x), bottom - 5, 1, 5);
        if (!flag || left + size < place - 8 || left > place + wide + 8) context.fillText(label, left, bottom - 9);
      }
      if (flag) {
        context.fillStyle = colours.ink;
        context.font = `600 ${this.font}`;
        context.fillText(flag, place, bottom - 9);
        context.fillRect(Math.round(ready), bottom - 6, 1, 6);
      }
      context.fillStyle = colours.alarm;
      for (const [left] of this.alarms) {
        context.beginPath();
        context.moveTo(left, bottom);
        context.lineTo(left - 4, bottom - 7);
        context.lineTo(left + 4, bottom - 7);
        context.fill();
      }
    }

    // The event at a point, or the nearest one within three pixels, and how many share that pixel.
    at(x, y) {
      const track = this.tracks.find((each) => y >= each.top && y < each.top + each.height);
      if (!track) return null;
      const number = Math.min(Math.max(Math.floor((y - track.top - 3) / this.rowHeight), 0), track.rows.length - 1);
      const row = track.rows[number], pixel = (view.to - view.from) / this.width, time = this.time(x);
      let best = null, nearest = Infinity, others = 0;
      for (let place = this.first(row, time - 3 * pixel); place < row.length && row[place].at <= time + 3 * pixel; place++) {
        const event = row[place];
        const away = time < event.at ? event.at - time : Math.max(time - event.at - event.length, 0);
        if (away < pixel && event.length < 2 * pixel) others++;
        if (away < nearest) [best, nearest] = [event, away];
      }
      return best && { event: best, others };
    }

    listen() {
      const { canvas, frame } = this;
      let held = null;
      canvas.addEventListener("pointerdown", (event) => {
        if (event.button !== 0) return;
        held = { x: event.clientX, moved: false };
        canvas.setPointerCapture(event.pointerId);
        canvas.classList.add("held");
      });
      canvas.addEventListener("pointermove", (event) => {
        if (held) {
          const by = event.clientX - held.x;
          if (!held.moved && Math.abs(by) < 3) return;
          held.moved = true;
          held.x = event.clientX;
          view.pan((-by / this.width) * (view.to - view.from));
          hideTip();
          return;
        }
        const found = this.at(event.offsetX, event.offsetY);
        this.hovered = found && found.event;
        canvas.classList.toggle("over", Boolean(found));
        if (found) showTip(found.event, event.clientX, event.clientY, found.others);
        else hideTip();
      });
      const release = (event) => {
        canvas.classList.remove("held");
        if (held && !held.moved && event.type === "pointerup") {
          const found = this.at(event.offsetX, event.offsetY);
          this.select(found && found.event);
          if (found) showTip(found.event, event.clientX, event.clientY, found.others);
        }
        held = null;
      };
      canvas.addEventListener("pointerup", release);
      canvas.addEventListener("pointercancel", release);
      canvas.addEventListener("pointerleave", () => { if (!held) hideTip(); });
      canvas.addEventListener("dblclick", () => view.go(view.home.from, view.home.to));
      canvas.addEventListener("wheel", (event) => {
        if (event.shiftKey || Math.abs(event.deltaX) > Math.abs(event.deltaY)) {
          event.preventDefault();
          view.pan(((event.deltaX || event.deltaY) / this.width) * (view.to - view.from));
          return;
        }
        // With all of it in sight there is nothing to zoom out of: the page scrolls on.
        if (event.deltaY > 0 && view.to - view.from >= view.whole.to - 1) return;
        event.preventDefault();
        hideTip();
        view.zoom(Math.exp(Math.max(-0.5, Math.min(0.5, event.deltaY * 0.0025))), this.time(event.offsetX));
      }, { passive: false });
      frame.addEventListener("keydown", (event) => this.key(event));
      frame.addEventListener("blur", hideTip);
      new ResizeObserver(() => this.measure()).observe(canvas.parentElement);
    }

    key(event) {
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      const steps = {
        ArrowRight: () => this.along(1), ArrowLeft: () => this.along(-1),
        ArrowDown: () => this.across(1), ArrowUp: () => this.across(-1),
        Home: () => this.edge(0), End: () => this.edge(-1),
        "+": () => this.zoomAround(0.6), "=": () => this.zoomAround(0.6),
        "-": () => this.zoomAround(1 / 0.6), _: () => this.zoomAround(1 / 0.6),
        0: () => { view.go(view.home.from, view.home.to); live.textContent = `The whole start-up, ${words(this.run.total)}`; hideTip(); },
        Enter: () => { if (this.selected) { view.show(this.selected); live.textContent = `Zoomed to ${this.selected.name}`; } },
        Escape: () => { this.select(null); hideTip(); },
      };
      if (!steps[event.key]) return;
      event.preventDefault();
      steps[event.key]();
    }

    zoomAround(factor) {
      const { selected } = this;
      const middle = (view.from + view.to) / 2;
      const at = selected ? selected.at + selected.length / 2 : middle;
      view.zoom(factor, at >= view.from && at <= view.to ? at : middle, true);
      hideTip();
      const span = Math.min((view.to - view.from) * factor, view.whole.to);
      live.textContent = `Zoomed ${factor < 1 ? "in" : "out"}: ${words(span)} in sight`;
    }

    // The first press takes what is in sight, from where one then walks.
    begin() {
      const track = this.tracks.find((each) => each.place >= 0 && each.events.length) || this.tracks[0];
      this.walkTo(track.events.find((event) => event.at + event.length >= view.from) || track.events[0]);
    }

    along(step) {
      if (!this.selected) return this.begin();
      const row = this.selected.track.rows[this.selected.row];
      return this.walkTo(row[row.indexOf(this.selected) + step]);
    }

    edge(place) {
      if (!this.selected) return this.begin();
      return this.walkTo(this.selected.track.rows[this.selected.row].at(place));
    }

    across(step) {
      if (!this.selected) return this.begin();
      const rows = this.tracks.flatMap((track) => track.rows.filter((row) => row.length));
      const next = rows[rows.indexOf(this.selected.track.rows[this.selected.row]) + step];
      if (!next) return undefined;
      const middle = Math.min(Math.max(this.selected.at + this.selected.length / 2, view.from), view.to);
      const away = (event) => Math.max(event.at - middle, middle - event.at - event.length, 0);
      return this.walkTo(next.reduce((best, event) => (away(event) < away(best) ? event : best)));
    }

    walkTo(event) {
      if (!event) return;
      this.select(event);
      const span = view.to - view.from;
      if (event.at > view.to || event.at + event.length < view.from || (event.length < span && (event.at < view.from || event.at + event.length > view.to))) {
        view.set(event.at + event.length / 2 - span / 2, event.at + event.length / 2 + span / 2);
      }
      event.track.label.scrollIntoView({ block: "nearest" });
      const box = this.canvas.getBoundingClientRect();
      const x = Math.min(Math.max(this.x(event.at), 0), this.width) + box.left;
      showTip(event, x, box.top + this.y(event) + this.rowHeight, 1);
    }

    select(event) {
      for (const each of timelines) if (each !== this && each.selected) { each.selected = null; each.soon(); }
      this.selected = event || null;
      this.frame.dataset.selected = event ? event.name : "";
      if (event) announce(event, this.run);
      this.soon();
    }

    // From a row of a table.
    jump(event) {
      this.select(event);
      view.show(event);
      event.track.label.scrollIntoView({ block: "center", behavior: calm.matches ? "auto" : "smooth" });
    }
  }

  const timelines = [];
  const jump = (run, event) => timelines[run.number].jump(event);

  // ---- Tables ----------------------------------------------------------------------------------------------------------

  const ROWS = 12;

  // columns: {title, value(row): string or number, show(row): text, kind: "number", "name", "shape", "short"}
  function table({ id, title, about, columns, rows, go, sorted, filter = true }) {
    let order = sorted, falling = true, wanted = "", most = ROWS;
    const compared = runs.length > 1 && rows.some((row) => row.run);
    const all = compared ? [{ title: "run", value: (row) => row.run.letter, kind: "short" }, ...columns] : columns;
    const chosen = all.map((column) => ({ show: (row) => String(column.value(row)), ...column }));
    let by = chosen.findIndex((column) => column.title === order);
    const heads = chosen.map((column, place) => make("th", { scope: "col", role: "columnheader", class: column.kind === "number" ? "number" : null }, make("button", {
      type: "button", text: column.title,
      onclick: () => {
        falling = by === place ? !falling : column.kind === "number";
        by = place;
        fill();
      },
    })));
    const body = make("tbody", { role: "rowgroup" }), count = make("span", { class: "soft", "aria-live": "polite" });
    const more = make("button", { type: "button", class: "tool more-rows", onclick: () => { most += 200; fill(); } });
    const input = make("input", { class: "filter", type: "search", placeholder: "Filter", "aria-label": `Filter: ${title}`, oninput: () => { wanted = input.value.toLowerCase(); most = ROWS; fill(); } });
    const compare = (left, right) => {
      const [a, b] = [left, right].map(chosen[by].value);
      const way = typeof a === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true });
      return falling ? -way : way;
    };
    function fill() {
      const fitting = wanted ? rows.filter((row) => chosen.some((column) => column.show(row).toLowerCase().includes(wanted))) : [...rows];
      fitting.sort(compare);
      heads.forEach((head, place) => head.setAttribute("aria-sort", place === by ? (falling ? "descending" : "ascending") : "none"));
      body.replaceChildren(...fitting.slice(0, most).map((row) => {
        const target = go && go(row);
        const cells = chosen.map((column) => {
          const text = column.show(row), leads = target && column.kind === "name";
          const inside = leads ? make("button", { type: "button", class: "go", text, title: "Show it in the timeline" }) : text;
          return make("td", { class: column.kind, role: "cell", "data-label": column.title }, inside);
        });
        return make("tr", { class: target ? "goes" : null, role: "row", onclick: target ? () => jump(...target) : null }, ...cells);
      }));
      count.textContent = wanted ? `${fitting.length} of ${rows.length}` : "";
      more.hidden = fitting.length <= most;
      more.textContent = `Show ${Math.min(200, fitting.length - most)} more of ${fitting.length}`;
    }
    fill();
    const scroll = make("div", { class: "scroll", role: "region", "aria-label": title, tabindex: "0" },
      make("table", { class: "cards", role: "table" }, make("thead", { role: "rowgroup" }, make("tr", { role: "row" }, ...heads)), body));
    const tools = filter && rows.length > 5 ? make("div", { class: "tools" }, count, input) : null;
    return make("section", { id, "aria-labelledby": `${id}-title` },
      make("div", { class: "above" }, make("div", {}, make("h2", { id: `${id}-title`, text: title }), about ? make("p", { class: "about", text: about }) : null), tools),
      scroll, more);
  }

  const each = (list) => runs.flatMap((run) => list(run).map((row) => ({ ...row, run })));
  const seconds = (title, value) => ({ title, value, show: (row) => (value(row) ? words(value(row)) : ""), kind: "number" });
  const number = (title, value) => ({ title, value, show: (row) => (value(row) ? String(value(row)) : ""), kind: "number" });

  function servingTable() {
    const rows = each((run) => run.serving.map((place) => ({ event: run.event(place) })));
    if (!rows.length) return null;
    const section = table({
      id: "serving", title: `${plural(rows.length, "JIT compile")} while serving`, rows, filter: false, sorted: "seconds",
      about: "A request waited for each of these. The last column says what would have covered it.",
      go: (row) => [row.run, row.event],
      columns: [
        { title: "kernel", value: (row) => row.event.name, kind: "name" },
        seconds("seconds", (row) => row.event.length),
        seconds("began at", (row) => row.event.at),
        { title: "library", value: (row) => row.event.library, kind: "short" },
        { title: "where", value: (row) => row.event.track.title, kind: "short" },
        { title: "shape", value: (row) => row.event.shape || row.event.target, kind: "shape" },
        { title: "instead", value: (row) => [row.event.error, row.event.remedy].filter(Boolean).join("; "), kind: "shape" },
      ],
    });
    section.classList.add("alarm");
    return section;
  }

  function compilesTable() {
    const rows = each((run) => run.compiles.map((place) => ({ event: run.event(place) })));
    if (!rows.length) return null;
    return table({
      id: "compiles", title: "Longest compiles", rows, sorted: "seconds", go: (row) => [row.run, row.event],
      about: "Ahead: before its use, by a worker. On call: because it was called, and the caller waited.",
      columns: [
        { title: "kernel", value: (row) => row.event.name, kind: "name" },
        seconds("seconds", (row) => row.event.length),
        seconds("began at", (row) => row.event.at),
        { title: "how", value: (row) => (row.event.error ? "failed" : row.event.kind === "jit" ? (row.event.serving ? "on call, serving" : "on call") : "ahead"), kind: "short" },
        { title: "library", value: (row) => row.event.library, kind: "short" },
        { title: "where", value: (row) => row.event.track.title, kind: "short" },
        { title: "target or shape", value: (row) => row.event.error || row.event.target || row.event.shape, kind: "shape" },
      ],
    });
  }

  function targetsTable() {
    const rows = each((run) => run.targets.map(([name, kernels, cached, failed, us, ...place]) => ({ name: data.texts[name], kernels, cached, failed, us, event: run.event(place) })));
    if (!rows.length) return null;
    return table({
      id: "targets", title: "Targets", rows, sorted: "seconds", go: (row) => [row.run, row.event],
      about: "GEMMs of the model, and the kernels that were compiled for each. Seconds are those of all its compiles together.",
      columns: [
        { title: "target", value: (row) => row.name, kind: "name" },
        number("compiled", (row) => row.kernels), number("in the cache", (row) => row.cached), number("failed", (row) => row.failed),
        seconds("seconds", (row) => row.us),
      ],
    });
  }

  function kernelsTable() {
    const rows = each((run) => run.kernels.map(([name, library, ahead, called, cached, us, ...place]) => ({ name: data.texts[name], library: data.texts[library], ahead, called, cached, us, event: run.event(place) })));
    if (!rows.length) return null;
    return table({
      id: "kernels", title: "Kernels", rows, sorted: "seconds", go: (row) => [row.run, row.event],
      about: "How often each was compiled ahead, compiled on call, and found in a cache, in all processes together.",
      columns: [
        { title: "kernel", value: (row) => row.name, kind: "name" },
        { title: "library", value: (row) => row.library, kind: "short" },
        number("ahead", (row) => row.ahead), number("on call", (row) => row.called), number("in a cache", (row) => row.cached),
        seconds("seconds", (row) => row.us),
      ],
    });
  }

  // ---- Head, and where the seconds went -----------------------------------------------------------------------------------

  function head() {
    return make("header", {},
      data.compared ? make("p", { class: "compared", text: data.compared }) : null,
      make("div", { class: "runs" }, ...runs.map((run) => make("div", {},
        make("p", { class: "overline" }, run.letter ? make("span", { class: "tag", text: run.letter }) : "Start-up", ` ${run.name}`),
        make("p", { class: "figure-of-run" }, make("b", { text: words(run.total) }), make("span", { class: "soft", text: run.ready === null ? "in all" : "to ready" })),
        make("h1", { class: "verdict", text: run.verdict }),
        make("p", { class: "overline", text: [run.hosts.join(", "), run.when, plural(new Set(run.tracks.map((track) => track.about)).size, "process").replace("processs", "processes")].join(" \u00b7 ") }),
      ))),
    );
  }

  function unreadable() {
    const lines = runs.flatMap((run) => run.unreadable.map((line) => (run.letter ? `${run.letter}: ${line}` : line)));
    if (!lines.length) return null;
    return make("div", { class: "note", role: "note" }, "Some events could not be read, so this is not all that happened:",
      make("ul", {}, ...lines.map((line) => make("li", { text: line }))));
  }

  function stack(run) {
    const described = categories.map((category, place) => [category, run.parts[place]]).filter(([, part]) => part > 0);
    const bar = make("div", { class: "stack", role: "img", "aria-label": described.map(([category, part]) => `${category.title} ${words(part)}`).join(", ") },
      ...described.map(([category, part]) => {
        const extra = category.key === "jit" ? "hatched" : category.key === "other" ? "outlined" : null;
        const wide = part / longest;
        return make("span", { class: extra, title: `${category.title}: ${words(part)}`, style: { width: `calc(${wide * 100}% - 1px)`, backgroundColor: `var(--${category.key})`, color: `var(--${category.key}-ink)` } },
          // A ground of its own: the hatching would run through the letters.
          wide > 0.045 ? make("i", { text: wide > 0.16 ? `${category.title} ${words(part)}` : words(part), style: { backgroundColor: `var(--${category.key})` } }) : null);
      }));
    return run.letter ? make("div", {}, make("p", { class: "stack-of" }, make("span", { class: "tag", text: run.letter }), make("span", { class: "soft", text: `${run.name}, ${words(run.total)}` })), bar) : bar;
  }

  function parts() {
    const [left, right] = runs;
    const most = Math.max(...runs.flatMap((run) => run.parts), 1);
    // Two starts of one server differ by as much as that.
    const told = (by) => (Math.abs(by) < 0.01 * longest ? "soft" : by < 0 ? "less" : "more");
    const change = (by) => make("td", { class: `number ${told(by)}`, text: signed(by) });
    const rows = categories.map((category, place) => ({ category, place })).filter(({ place }) => runs.some((run) => run.parts[place] > 0));
    const bars = (place, category) => make("td", { class: "bar" }, ...runs.map((run) => make("span", { style: { width: `${(100 * run.parts[place]) / most}%`, backgroundColor: `var(--${category.key})`, marginTop: run.letter === "B" ? "2px" : "0.4rem" }, class: category.key === "jit" ? "hatched" : category.key === "other" ? "outlined" : null })));
    const columns = right ? ["A", "B", "difference"] : ["seconds", "share"];
    return make("div", { class: "scroll parts" }, make("table", { id: "parts" },
      make("thead", {}, make("tr", {}, make("th", { scope: "col", text: "category" }), ...columns.map((text) => make("th", { scope: "col", class: "number", text })), make("th", { class: "bar", "aria-hidden": "true" }))),
      make("tbody", {}, ...rows.map(({ category, place }) => make("tr", { "data-category": category.key },
        make("th", { scope: "row", class: "part" }, swatch(category), category.title),
        ...runs.slice(0, 2).map((run) => make("td", { class: "number", text: words(run.parts[place]) })),
        right ? change(right.parts[place] - left.parts[place]) : make("td", { class: "number soft", text: share(left.parts[place], left.total) }),
        bars(place, category)))),
      make("tfoot", {}, make("tr", {}, make("th", { scope: "row", text: runs.every((run) => run.ready !== null) ? "start to ready" : "in all" }),
        ...runs.slice(0, 2).map((run) => make("td", { class: "number", text: words(run.total) })),
        right ? change(right.total - left.total) : make("td", { class: "number soft", text: "100 %" }), make("td", { class: "bar" })))));
  }

  function where() {
    return make("section", { id: "where", "aria-labelledby": "where-title" },
      make("h2", { id: "where-title", text: "Where the seconds went" }),
      make("p", { class: "about", text: "Each instant counts once: for what the slowest rank was doing, where it did nothing for the other ranks, then for the main process." }),
      ...runs.map(stack), parts());
  }

  function timeline() {
    timelines.push(...runs.map((run) => new Timeline(run)));
    const tool = (text, label, onclick, square) => make("button", { type: "button", class: square ? "tool square" : "tool", text, "aria-label": label, onclick });
    const middle = () => (view.from + view.to) / 2;
    const key = (text) => make("kbd", { text });
    return make("section", { id: "timeline", "aria-labelledby": "timeline-title" },
      make("div", { class: "above" },
        make("h2", { id: "timeline-title", text: "Timeline" }),
        make("div", { class: "tools" },
          tool("\u2212", "Zoom out", () => view.zoom(1 / 0.6, middle(), true), true),
          tool("+", "Zoom in", () => view.zoom(0.6, middle(), true), true),
          tool("Start-up", "Show the whole start-up", () => view.go(view.home.from, view.home.to)),
          view.whole.to > view.home.to ? tool("Everything", "Show everything, serving too", () => view.go(view.whole.from, view.whole.to)) : null)),
      make("p", { class: "help", id: "timeline-help" }, "Wheel zooms, dragging moves, a double click shows the whole start-up. Keys: ",
        key("\u2190"), " ", key("\u2192"), " next event, ", key("\u2191"), " ", key("\u2193"), " next lane, ", key("+"), " ", key("\u2212"), " zoom, ", key("Enter"), " zoom to the event, ",
        key("Home"), " ", key("End"), " first and last, ", key("0"), " whole start-up. Hatched: compiled on call. Hollow: found in a cache."),
      ...timelines.map((each) => each.element), live);
  }

  // ---- The page ------------------------------------------------------------------------------------------------------------

  const sections = [head(), unreadable(), where(), timeline()];
  // Its rows lead to the timeline, which has to be there first; on the page it comes before all else.
  sections.splice(2, 0, servingTable());
  sections.push(compilesTable(), targetsTable(), kernelsTable());
  sections.push(make("footer", { text: `Made by sglang-warmstart report, ${data.version}. Times are of the clock that all processes of a host share.` }));
  document.getElementById("page").append(...sections.filter(Boolean));
  const recolour = () => { for (const each of timelines) { each.colours = null; each.draw(); } };
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", recolour);
  addEventListener("beforeprint", () => { document.documentElement.classList.add("printing"); recolour(); });
  addEventListener("afterprint", () => { document.documentElement.classList.remove("printing"); recolour(); });
  view.set(view.home.from, view.home.to);
})();
