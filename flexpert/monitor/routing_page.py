"""A report of routers as one HTML page that needs nothing else."""

from __future__ import annotations

import html
import json
from typing import Any

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>__TITLE__</title>
<style>
body { font: 14px/1.4 system-ui, sans-serif; margin: 2em; color: #222; }
table { border-collapse: collapse; margin: 1em 0; }
td, th { padding: 2px 10px; text-align: right; border-bottom: 1px solid #ddd; }
td:first-child, th:first-child { text-align: left; }
canvas { border: 1px solid #ccc; image-rendering: pixelated; display: block; margin: .5em 0; }
#tip { min-height: 1.4em; color: #555; }
</style></head><body>
<h1>__TITLE__</h1><p>__SOURCE__</p>
<table id="layers"></table>
<h2>Load of each expert</h2><p>Rows are layers, columns experts; dark blue is idle, yellow twice an even share
or more.</p><canvas id="load"></canvas>
<h2>Pairs chosen together</h2><p>Layer <select id="pick"></select>: the number of tokens that chose both
experts, over that of independent choices; yellow is twice or more, the diagonal is left out.</p>
<canvas id="pairs"></canvas><p id="tip"></p>
<script id="data" type="application/json">__DATA__</script>
<script>
const layers = JSON.parse(document.getElementById("data").textContent).layers;
const tip = text => { document.getElementById("tip").textContent = text; };
function colour(v) {  // from dark blue over green to yellow, v in 0..1
  const stops = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];
  const x = Math.min(Math.max(v, 0), 1) * 4, i = Math.min(Math.floor(x), 3), t = x - i;
  return "rgb(" + stops[i].map((a, k) => Math.round(a + (stops[i + 1][k] - a) * t)).join(",") + ")";
}
function draw(id, rows, columns, value, say) {
  const canvas = document.getElementById(id);
  const size = Math.max(3, Math.min(28, Math.floor(900 / columns)));
  canvas.width = columns * size; canvas.height = rows * size;
  const pen = canvas.getContext("2d");
  for (let y = 0; y < rows; y++) for (let x = 0; x < columns; x++) {
    const v = value(y, x);
    pen.fillStyle = v === null ? "#fff" : colour(v / 2);
    pen.fillRect(x * size, y * size, size, size);
  }
  canvas.onmousemove = e => {
    const y = Math.floor(e.offsetY / size), x = Math.floor(e.offsetX / size);
    if (y >= 0 && y < rows && x >= 0 && x < columns) tip(say(y, x, value(y, x)));
  };
}
const row = (cells, tag) => "<tr>" + cells.map(c => `<${tag}>${c}</${tag}>`).join("") + "</tr>";
const escape = text => text.replace(/[&<>]/g, c => ({"&": "&amp;", "<": "&lt;", ">": "&gt;"}[c]));
document.getElementById("layers").innerHTML =
  row(["layer", "tokens", "experts", "entropy", "load entropy", "max violation", "idle", "dropped",
       "unserved tokens"], "th") +
  layers.map(l => row([escape(l.layer), l.tokens, l.experts, l.entropy.toFixed(3), l.load_entropy.toFixed(3),
    l.max_violation.toFixed(2), l.idle, (100 * l.drop_rate).toFixed(1) + " %", l.unserved], "td")).join("");
const share = (l, e) => l.load[e] * l.experts / Math.max(1, l.load.reduce((a, b) => a + b, 0));
const widest = Math.max(...layers.map(l => l.experts));
draw("load", layers.length, widest, (y, x) => x < layers[y].experts ? share(layers[y], x) : null,
     (y, x, v) => v === null ? "" : `${layers[y].layer}, expert ${x}: ${v.toFixed(2)} of an even share, ` +
       `${layers[y].load[x]} rows, ${layers[y].dropped[x]} dropped`);
const pick = document.getElementById("pick");
pick.innerHTML = layers.map((l, i) => `<option value="${i}">${escape(l.layer)}</option>`).join("");
pick.onchange = () => {
  const l = layers[+pick.value], c = l.coactivation;
  const lift = (a, b) => a === b ? null : c[a][b] * l.tokens / Math.max(1, c[a][a] * c[b][b]);
  draw("pairs", l.experts, l.experts, lift, (a, b, v) => v === null ? `expert ${a}: ${c[a][a]} tokens` :
    `experts ${a} and ${b}: ${c[a][b]} tokens, ${v.toFixed(2)} times independent choices`);
};
pick.onchange();
</script></body></html>
"""


def routing_page(report: dict[str, Any]) -> str:
    """The text of the page.

    Args:
        report: "model", "source", and "layers" of `RoutingRecord.report`.
    """
    data = json.dumps({"layers": report["layers"]}).replace("<", "\\u003c")  # nothing ends the script early
    parts = {
        "__TITLE__": html.escape(f"Routing of {report['model']}"),
        "__SOURCE__": html.escape(f"{report['tokens']} tokens of {report['source']}"),
        "__DATA__": data,
    }
    page = _PAGE
    for name, value in parts.items():
        page = page.replace(name, value)
    return page
