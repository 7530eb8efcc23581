// @ts-check
/** Shows on Compile Model what is being compiled, for how long, and what was compiled again and why. */
import { api } from "../../scripts/api.js"
import { app } from "../../scripts/app.js"
import { CompilePanel } from "./compile_panel.js"
import { NodePanels } from "./node_panels.js"

/** @typedef {import("./compile_panel.js").Report & import("./node_panels.js").Sender} ReportEvent */

const panels = new NodePanels(["ParaCompileModel"], "para_compile", () => new CompilePanel())

app.registerExtension({
  name: "para.compile",
  setup() {
    api.addEventListener("para.compile", (/** @type {CustomEvent<ReportEvent>} */ event) => panels.receive(event.detail))
  },
  afterConfigureGraph: () => panels.restore(),
})
