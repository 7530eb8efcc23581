// @ts-check
/** Shows on the FBCache Patcher what its cache does, live while sampling and after the run. */
import { api } from "../../scripts/api.js"
import { app } from "../../scripts/app.js"
import { Panel } from "./fbcache_panel.js"
import { NodePanels } from "./node_panels.js"

/** @typedef {import("./fbcache_panel.js").Report & import("./node_panels.js").Sender} ReportEvent */

const panels = new NodePanels(["ParaFBCachePatcher"], "para_fbcache", () => new Panel())

app.registerExtension({
  name: "para.fbcache",
  setup() {
    api.addEventListener("para.fbcache", (/** @type {CustomEvent<ReportEvent>} */ { detail: report }) => {
      if (Object.keys(report.conditionings).length) panels.receive(report)
    })
  },
  afterConfigureGraph: () => panels.restore(),
})
