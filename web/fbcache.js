// @ts-check
/** Shows on the FBCache Patcher what its cache does, live while sampling and after the run. */
import { api } from "../../scripts/api.js"
import { app } from "../../scripts/app.js"
import { Panel } from "./fbcache_panel.js"

/**
 * @typedef {import("./fbcache_panel.js").Report & { node: string, workflow: string | null }} ReportEvent
 *   node: execution id, "3:1" for node 1 of the subgraph in node 3; workflow: id, null where no interface queued it.
 */

const NODE_CLASS = "ParaFBCachePatcher"
const WIDGET = "para_fbcache"
const MARGIN = 10 // of the widget, above and below
const MAX_REMEMBERED = 50

/** @type {WeakMap<object, Panel>} by node */
const panels = new WeakMap()
/** @type {WeakMap<object, number>} by node: its height without a panel */
const heights = new WeakMap()
/** @type {Map<string, ReportEvent>} The latest of each node: undo and changing tabs build a workflow's nodes anew. */
const latest = new Map()

app.registerExtension({
  name: "para.fbcache",
  setup() {
    api.addEventListener("para.fbcache", (/** @type {CustomEvent<ReportEvent>} */ event) => receive(event.detail))
  },
  afterConfigureGraph() {
    for (const report of latest.values()) {
      const node = nodeOf(report)
      if (node) keepSavedHeight(node)
    }
    // Nodes 2.0 notices that a node has grown only once it has drawn it.
    requestAnimationFrame(() => latest.forEach(show))
  },
})

/** @param {ReportEvent} report */
function receive(report) {
  if (!Object.keys(report.conditionings).length) return
  const key = `${report.workflow}/${report.node}`
  latest.delete(key)
  latest.set(key, report)
  const [oldest] = latest.keys()
  if (latest.size > MAX_REMEMBERED) latest.delete(oldest)
  show(report)
}

/** @param {ReportEvent} report */
function show(report) {
  const node = nodeOf(report)
  if (!node) return
  const panel = panels.get(node) ?? addPanel(node)
  panel.draw(report, String(setting("Comfy.Locale")))
  node.setDirtyCanvas(true, true)
}

/** @param {ReportEvent} report Undefined where another workflow is open by now, with other nodes under the same ids. */
function nodeOf(report) {
  if (report.workflow !== app.rootGraph.id) return undefined
  const [id, ...inner] = report.node.split(":")
  const node = inner.reduce((outer, next) => outer?.subgraph?.getNodeById(next), app.rootGraph.getNodeById(id))
  return node?.comfyClass === NODE_CLASS ? node : undefined
}

/** @param {string} id */
const setting = (id) => app.extensionManager.setting.get(id)

/** @param {any} node */
function addPanel(node) {
  const panel = new Panel()
  panels.set(node, panel)
  keepSavedHeight(node)
  panel.element.addEventListener("wheel", zoomCanvas)
  // The canvas asks for the height when it draws, and the panel has one only after that.
  new ResizeObserver(() => node.setDirtyCanvas(true, true)).observe(panel.element)
  let height = 200 // until it is on the page
  const widget = node.addDOMWidget(WIDGET, WIDGET, panel.element, {
    serialize: false, // not part of the prompt
    hideOnZoom: false,
    margin: MARGIN,
    getMinHeight: () => (height = panel.height || height) + 2 * MARGIN,
  })
  widget.serialize = false // not part of the saved workflow
  return panel
}

/** @param {WheelEvent} event Nodes 2.0 passes it on by itself. */
function zoomCanvas(event) {
  if (!setting("Comfy.VueNodes.Enabled")) app.canvas.processMouseWheel(event)
}

/**
 * Let the workflow be saved with the height that the node has without a panel, so that a run changes nothing in it.
 * @param {any} node
 */
function keepSavedHeight(node) {
  if (heights.has(node)) return
  heights.set(node, node.size[1])
  const before = node.onSerialize
  node.onSerialize = function (/** @type {{ size: [number, number] }} */ saved) {
    before?.call(this, saved)
    saved.size = [saved.size[0], heights.get(this) ?? saved.size[1]]
  }
}
