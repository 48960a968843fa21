// Charts and videos of a page: hover values, log scale, smoothing, curves on and off, one button that plays a section.
// Progressive: without it the page shows each chart as a picture and plays each video.
"use strict";
(() => {
  const SVG = "http://www.w3.org/2000/svg", LEFT = 56, RIGHT = 12, TOP = 10, BOTTOM = 28, HEIGHT = 270;
  const svg = (parent, tag, attributes) => {
    const node = parent.appendChild(document.createElementNS(SVG, tag));
    for (const key in attributes) node.setAttribute(key, attributes[key]);
    return node;
  };
  const html = (parent, tag, words, className) => {
    const node = parent.appendChild(document.createElement(tag));
    node.textContent = words || "";
    if (className) node.className = className;
    return node;
  };
  const short = v => Math.abs(v) >= 1e5 || (v && Math.abs(v) < 1e-3) ? v.toExponential(2).replace(/\.?0+e/, "e") : String(+v.toPrecision(4));

  // Mean of the values so far, older ones weighing less by `weight` a point; begins at the first value.
  const smoothed = (values, weight) => {
    let sum = 0, mass = 0;
    return values.map(v => (sum = sum * weight + v, mass = mass * weight + 1, sum / mass));
  };

  const ticks = (low, high, log) => {
    if (log) {
      const found = [];
      for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); e++)
        for (const m of [1, 2, 5]) found.push(m * 10 ** e);
      const inside = found.filter(v => v >= low && v <= high);
      return inside.length > 7 ? inside.filter(v => Math.abs(Math.log10(v) % 1) < 1e-9) : inside;
    }
    const raw = (high - low) / 5 || 1, power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].find(m => m * power >= raw) * power;
    const found = [];
    for (let v = Math.ceil(low / step) * step; v <= high + step / 1e6; v += step) found.push(Math.abs(v) < step / 1e6 ? 0 : v);
    return found;
  };

  class Chart {
    constructor(figure) {
      this.data = JSON.parse(figure.dataset.chart);
      this.log = this.data.log;
      this.weight = 0;
      this.hidden = new Set();
      this.box = document.createElement("div");
      this.box.className = "chart";
      figure.querySelector("img").replaceWith(this.box);
      this.legend = document.createElement("div");
      this.legend.className = "legend";
      this.box.after(this.legend);
      this.data.series.forEach((series, n) => this.key(series, n));
      if (this.data.series.every(s => s.low.every(v => v > 0))) {
        const label = html(this.legend, "label", "", "log"), box = label.appendChild(document.createElement("input"));
        box.type = "checkbox";
        box.checked = this.log;
        label.append(" log scale");
        box.onchange = () => { this.log = box.checked; this.draw(); };
      }
      addEventListener("resize", () => this.draw());
      this.draw();
    }

    key(series, n) {
      const button = html(this.legend, "button", " " + series.name);
      const line = document.createElementNS(SVG, "svg");
      line.setAttribute("width", 22); line.setAttribute("height", 8);
      svg(line, "line", {x1: 0, x2: 22, y1: 4, y2: 4, stroke: series.color, "stroke-width": 3, "stroke-dasharray": series.dash});
      button.prepend(line);
      button.setAttribute("aria-pressed", "true");
      button.onclick = () => {
        this.hidden.has(n) ? this.hidden.delete(n) : this.hidden.add(n);
        button.setAttribute("aria-pressed", String(!this.hidden.has(n)));
        this.draw();
      };
    }

    draw() {
      const width = this.box.clientWidth;
      if (!width) return;
      this.box.textContent = "";
      this.shown = this.data.series.filter((s, n) => !this.hidden.has(n) && s.x.length).map(s => ({...s, now: smoothed(s.y, this.weight)}));
      const root = svg(this.box, "svg", {width, height: HEIGHT, role: "img", "aria-label": this.data.title});
      if (!this.shown.length) return;
      const band = this.weight ? ["y", "y"] : ["low", "high"];
      let low = Math.min(...this.shown.flatMap(s => s[band[0]])), high = Math.max(...this.shown.flatMap(s => s[band[1]]));
      if (low === high) [low, high] = this.log ? [low / 2, high * 2] : [low - (Math.abs(low) / 2 || 1), high + (Math.abs(high) / 2 || 1)];
      const last = Math.max(...this.shown.flatMap(s => s.x)) || 1, scale = this.log ? Math.log : v => v;
      const room = (scale(high) - scale(low)) * 0.04;
      const X = x => LEFT + (width - LEFT - RIGHT) * x / last;
      const Y = y => HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (scale(y) - scale(low) + room) / (scale(high) - scale(low) + 2 * room);
      this.X = X; this.Y = Y; this.last = last;
      for (const y of ticks(low, high, this.log)) {
        svg(root, "line", {x1: LEFT, x2: width - RIGHT, y1: Y(y), y2: Y(y), class: "grid"});
        svg(root, "text", {x: LEFT - 6, y: Y(y) + 4, "text-anchor": "end"}).textContent = short(y);
      }
      const every = ticks(0, last, false), fewer = width < 420 ? every.filter((x, n) => n % 2 === 0) : every;
      for (const x of fewer) svg(root, "text", {x: X(x), y: HEIGHT - 10, "text-anchor": "middle"}).textContent = short(x);
      svg(root, "line", {x1: LEFT, x2: width - RIGHT, y1: HEIGHT - BOTTOM, y2: HEIGHT - BOTTOM, class: "axis"});
      const path = (xs, ys) => xs.map((x, n) => (n ? "L" : "M") + X(x).toFixed(1) + " " + Y(ys[n]).toFixed(1)).join("");
      for (const s of this.shown) {
        if (this.weight) svg(root, "path", {d: path(s.x, s.y), class: "raw", stroke: s.color});
        else svg(root, "path", {d: path(s.x, s.high) + path([...s.x].reverse(), [...s.low].reverse()).replace("M", "L") + "Z", fill: s.color, class: "band"});
        svg(root, "path", {d: path(s.x, s.now), class: "curve", stroke: s.color, "stroke-dasharray": s.dash});
        if (s.x.length < 12) s.x.forEach((x, n) => svg(root, "circle", {cx: X(x), cy: Y(s.now[n]), r: 2.5, fill: s.color}));
      }
      this.marks = svg(root, "g", {});
      this.tip = html(this.box, "div", "", "tip");
      this.tip.hidden = true;
      root.onpointermove = event => this.hover(event.clientX - root.getBoundingClientRect().left);
      root.onpointerleave = () => { this.tip.hidden = true; this.marks.textContent = ""; };
    }

    hover(place) {
      const at = (place - LEFT) / (this.box.clientWidth - LEFT - RIGHT) * this.last;
      const near = this.shown.map(s => s.x.reduce((best, x, n) => Math.abs(x - at) < Math.abs(s.x[best] - at) ? n : best, 0));
      const step = this.shown.reduce((best, s, n) => Math.abs(s.x[near[n]] - at) < Math.abs(best - at) ? s.x[near[n]] : best, Infinity);
      this.marks.textContent = this.tip.textContent = "";
      svg(this.marks, "line", {x1: this.X(step), x2: this.X(step), y1: TOP, y2: HEIGHT - BOTTOM, class: "axis"});
      html(this.tip, "b", "step " + Math.round(step).toLocaleString("en"));
      this.shown.forEach((s, n) => {
        const i = near[n], row = html(this.tip, "div", "");
        if (Math.abs(s.x[i] - step) > this.last / 50) return row.remove();
        html(row, "i", "").style.background = s.color;
        row.append(` ${s.name}  ${short(s.now[i])}` + (!this.weight && s.high[i] > s.low[i] ? ` (${short(s.low[i])} to ${short(s.high[i])})` : ""));
        svg(this.marks, "circle", {cx: this.X(s.x[i]), cy: this.Y(s.now[i]), r: 4, fill: s.color});
      });
      this.tip.hidden = false;
      const right = this.X(step) + 14 + this.tip.offsetWidth > this.box.clientWidth;
      this.tip.style.left = Math.max(0, right ? this.X(step) - 14 - this.tip.offsetWidth : this.X(step) + 14) + "px";
    }
  }

  for (const section of document.querySelectorAll("section")) {
    const charts = [...section.querySelectorAll("figure[data-chart]")].map(figure => new Chart(figure));
    if (charts.length) {
      const label = document.createElement("label"), slider = document.createElement("input"), value = document.createElement("output");
      label.className = "smoothing";
      Object.assign(slider, {type: "range", min: 0, max: 0.99, step: 0.01, value: 0});
      value.textContent = "0";
      slider.oninput = () => {
        value.textContent = slider.value;
        for (const chart of charts) { chart.weight = +slider.value; chart.draw(); }
      };
      label.append("smoothing ", slider, " ", value);
      section.querySelector("h2").after(label);
    }
    const videos = [...section.querySelectorAll("video")];
    if (videos.length > 1) {
      const button = document.createElement("button");
      const play = () => {
        for (const video of videos) { video.currentTime = 0; video.play().catch(() => {}); }
        button.textContent = "pause all";
      };
      button.className = "play";
      button.textContent = "pause all";
      button.onclick = () => {
        if (videos.some(video => video.paused)) return play();
        for (const video of videos) { video.pause(); video.currentTime = videos[0].currentTime; }
        button.textContent = "play all";
      };
      section.querySelector("h2").after(button);
      Promise.all(videos.map(v => v.readyState > 1 || new Promise(done => { v.onloadeddata = v.onerror = done; }))).then(play);
    }
  }
})();
