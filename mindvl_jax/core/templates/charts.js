// Draws every <div class="chart"> from the JSON in its <script>: lines with gaps, phases shaded, values under the pointer, lines that a
// click on their name hides. No library, nothing loaded from elsewhere.
function drawChart(box) {
  const spec = JSON.parse(box.querySelector("script").textContent), hidden = new Set(), ns = "http://www.w3.org/2000/svg";
  const legend = document.createElement("div"), plot = document.createElement("div"), tip = document.createElement("div");
  legend.className = "legend"; plot.className = "plotarea"; tip.className = "tip"; tip.hidden = true;
  box.append(legend, plot, tip);
  const colour = index => `hsl(${(index * 137.5 + 215) % 360} 62% var(--lightness))`;
  const short = value => { const size = Math.abs(value); return size >= 1e6 ? (value / 1e6).toPrecision(3) + "M" : size >= 1e4 ? (value / 1e3).toPrecision(3) + "k" : size && size < 1e-3 ? value.toExponential(1) : String(+value.toPrecision(3)); };
  spec.lines.forEach((line, index) => {
    const name = document.createElement("button");
    name.textContent = line.name; name.style.setProperty("--c", colour(index)); name.type = "button";
    name.onclick = () => { hidden.has(index) ? hidden.delete(index) : hidden.add(index); name.classList.toggle("off"); draw(); };
    legend.append(name);
  });
  legend.hidden = spec.lines.length < 2;
  function draw() {
    const width = plot.clientWidth || 640, height = spec.tall ? 300 : 170, left = 48, right = 8, top = spec.phases.length > 1 ? 18 : 8, bottom = 22;
    const shown = spec.lines.filter((_, index) => !hidden.has(index));
    const values = shown.flatMap(line => line.values).filter(value => value !== null && (!spec.log || value > 0));
    let low = spec.log ? Math.min(...values) : Math.min(0, ...values), high = Math.max(...values);
    if (!values.length) { low = 0; high = 1; }
    if (low === high) high = low + (Math.abs(low) || 1);
    const first = spec.first, last = spec.last, f = spec.log ? Math.log : x => x;
    const x = step => left + (width - left - right) * (step - first) / Math.max(1, last - first), y = value => top + (height - top - bottom) * (1 - (f(value) - f(low)) / (f(high) - f(low)));
    const svg = document.createElementNS(ns, "svg");
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`); svg.setAttribute("role", "img"); svg.setAttribute("aria-label", spec.title);
    const add = (tag, attributes, text) => { const node = document.createElementNS(ns, tag); for (const key in attributes) node.setAttribute(key, attributes[key]); if (text !== undefined) node.textContent = text; svg.append(node); return node; };
    spec.phases.forEach((phase, index) => {
      if (index % 2) add("rect", { x: x(phase.first), y: top, width: Math.max(0, x(phase.last) - x(phase.first)), height: height - top - bottom, class: "phase" });
      if (spec.phases.length > 1 && x(phase.last) - x(phase.first) > 7 * phase.name.length) add("text", { x: (x(phase.first) + x(phase.last)) / 2, y: 12, "text-anchor": "middle" }, phase.name);
    });
    for (let k = 0; k <= 4; k++) {
      const value = spec.log ? Math.exp(f(low) + (f(high) - f(low)) * k / 4) : low + (high - low) * k / 4;
      add("line", { x1: left, x2: width - right, y1: y(value), y2: y(value), class: "grid" });
      add("text", { x: left - 6, y: y(value) + 4, "text-anchor": "end" }, short(value));
      const step = Math.round(first + (last - first) * k / 4);
      add("text", { x: x(step), y: height - 6, "text-anchor": k === 0 ? "start" : k === 4 ? "end" : "middle" }, step);
    }
    spec.lines.forEach((line, index) => {
      if (hidden.has(index)) return;
      let path = "", pen = false;
      line.values.forEach((value, k) => { if (value === null || (spec.log && value <= 0)) { pen = false; return; } path += (pen ? "L" : "M") + x(line.steps[k]).toFixed(1) + " " + y(value).toFixed(1); pen = true; });
      const drawn = add("path", { d: path, class: "line" }); drawn.style.stroke = colour(index); if (index === 0) drawn.classList.add("main");
      if (line.steps.length < 30) line.values.forEach((value, k) => { if (value !== null) { const dot = add("circle", { cx: x(line.steps[k]), cy: y(value), r: 2.4 }); dot.style.fill = colour(index); } });
    });
    const cursor = add("line", { y1: top, y2: height - bottom, class: "cursor" }); cursor.style.display = "none";
    svg.onpointermove = event => {
      const step = first + (event.offsetX * width / svg.clientWidth - left) / (width - left - right) * (last - first);
      if (step < first || step > last) return;
      cursor.setAttribute("x1", x(step)); cursor.setAttribute("x2", x(step)); cursor.style.display = "";
      tip.textContent = ""; tip.append(`step ${Math.round(step)}`);
      const near = spec.lines.map((line, index) => { if (hidden.has(index)) return null; let best = -1; line.steps.forEach((at, k) => { if (line.values[k] !== null && (best < 0 || Math.abs(at - step) < Math.abs(line.steps[best] - step))) best = k; }); return best < 0 || Math.abs(line.steps[best] - step) > (last - first) / 25 + 1 ? null : { name: line.name, value: line.values[best], index }; }).filter(Boolean);
      near.sort((a, b) => b.value - a.value).forEach(entry => { const row = document.createElement("div"); row.style.setProperty("--c", colour(entry.index)); row.textContent = `${short(entry.value)}  ${entry.name}`; tip.append(row); });
      tip.hidden = false; tip.style.left = Math.min(event.offsetX + 14, svg.clientWidth - 150) + "px"; tip.style.top = plot.offsetTop + 10 + "px";
    };
    svg.onpointerleave = () => { tip.hidden = true; cursor.style.display = "none"; };
    plot.replaceChildren(svg);
  }
  draw(); new ResizeObserver(draw).observe(plot);
}
document.querySelectorAll(".chart").forEach(drawChart);
