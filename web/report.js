// @ts-check
/** Shows on the Acceleration Report what the accelerations did, in the language of the interface. */
import { api } from "../../scripts/api.js"
import { app } from "../../scripts/app.js"
import { NodePanels } from "./node_panels.js"
import { ReportPanel } from "./report_panel.js"

/**
 * @typedef {import("./report_panel.js").Report & { workflow: string | null }} Shown
 * @typedef {{ node: string, output: { para_report?: Shown[] } | null }} Executed
 */

const NODE = "ParaAccelerationReport"
const panels = new NodePanels([NODE], "para_report", () => new ReportPanel())

/** Of the present run, what the host takes from its cache. @type {Set<string>} */
let cached = new Set()

app.registerExtension({
  name: "para.report",
  setup() {
    api.addEventListener("execution_cached", (/** @type {CustomEvent<{ nodes: string[] }>} */ { detail }) => {
      cached = new Set(detail.nodes)
    })
    api.addEventListener("executed", (/** @type {CustomEvent<Executed>} */ { detail: { node, output } }) => {
      const [report] = output?.para_report ?? []
      // What was kept may have been made for another workflow with the same nodes; it is asked for by this one.
      const workflow = report && cached.has(node) ? app.rootGraph.id : report?.workflow
      if (report) panels.receive({ ...report, node, workflow })
    })
  },
  nodeCreated(node) {
    if (node.comfyClass === NODE) hidePicture(node)
  },
  afterConfigureGraph: () => panels.restore(),
})

/**
 * The panel says the same. The picture, in English, remains at the node's output and in the list of results.
 * @param {any} node
 */
function hidePicture(node) {
  node.hideOutputImages = true // Nodes 2.0
  node.onDrawBackground = () => {} // on the canvas: this is where the host lays a preview over the node
}
