// @ts-check
/** Shows on the FP8 Quantize nodes, and on the loader of what they made, which layers are quantized and what it gave. */
import { api } from "../../scripts/api.js"
import { app } from "../../scripts/app.js"
import { fill } from "./fbcache_words.js"
import { LinesPanel } from "./lines_panel.js"
import { NodePanels } from "./node_panels.js"
import { byReason, size } from "./report_panel.js"
import { translated, wordsOf } from "./report_words.js"

/** @typedef {import("./report_panel.js").Quantization & import("./node_panels.js").Sender} ReportEvent */

const NODES = ["ParaFP8Quantize", "ParaFP8QuantizeCLIP", "ParaLoadQuantizedModel"]
const panels = new NodePanels(NODES, "para_fp8", () => new LinesPanel(linesOf))

app.registerExtension({
  name: "para.fp8",
  setup() {
    api.addEventListener("para.fp8", (/** @type {CustomEvent<ReportEvent>} */ event) => panels.receive(event.detail))
  },
  afterConfigureGraph: () => panels.restore(),
})

/** @param {ReportEvent} report @param {string} locale @returns {import("./lines_panel.js").Line[]} */
function linesOf({ scheme, quantized, left, bytes_before, bytes_after, weight_error, note }, locale) {
  const words = wordsOf(locale)
  const layers = fill(words.layers, { quantized: quantized.length, left: Object.keys(left).length })
  const sizes = { before: size(bytes_before), after: size(bytes_after), ratio: (bytes_after / bytes_before).toFixed(2) }
  const error = weight_error === null ? words.unknown : `${(100 * weight_error).toFixed(2)}%`
  return [
    fill(words.scheme, { scheme, layers }),
    ...(bytes_before ? [fill(words.memory, sizes)] : []),
    fill(words.error, { error }),
    ...byReason(left).map(([reason, names]) =>
      fill(words.count_left, { count: names.length, reason: translated(reason, locale) })),
    ...(note ? [{ notice: translated(note, locale) }] : []),
  ]
}
