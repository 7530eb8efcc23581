// @ts-check
/** Shows on the nodes of several devices how many there are and how they share the work. */
import { api } from "../../scripts/api.js"
import { app } from "../../scripts/app.js"
import { fill } from "./fbcache_words.js"
import { LinesPanel } from "./lines_panel.js"
import { arrangement } from "./mesh_words.js"
import { NodePanels } from "./node_panels.js"
import { wordsOf } from "./report_words.js"

/**
 * @typedef {import("./node_panels.js").Sender & { kind: string, num_ranks: number, mesh: string, replaced: string[] }}
 *   NoticeEvent ParallelNotice of para_core/parallel_notice.py
 */

const WARNINGS = ["not_asked", "decoded_in_tiles"]
const NODES = ["ParaContextParallelLauncher", "ParaParallelVAEDecode"]
const panels = new NodePanels(NODES, "para_parallel", () => new LinesPanel(linesOf))

app.registerExtension({
  name: "para.parallel",
  setup() {
    api.addEventListener("para.parallel", (/** @type {CustomEvent<NoticeEvent>} */ event) => panels.receive(event.detail))
  },
  afterConfigureGraph: () => panels.restore(),
})

/** @param {NoticeEvent} event @param {string} locale @returns {import("./lines_panel.js").Line[]} */
function linesOf({ kind, num_ranks: count, mesh, replaced }, locale) {
  const words = wordsOf(locale)
  const line = fill(words[kind], { count, mesh: arrangement(mesh, locale) })
  const ended = replaced.length ? [{ notice: fill(words.replaced, { devices: replaced.join(words.listed) }) }] : []
  return [WARNINGS.includes(kind) ? { notice: line } : line, ...ended]
}
