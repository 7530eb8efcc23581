// @ts-check
/** Panels on the nodes of some classes: each shows the latest report that the server sent for its node. */
import { app } from "../../scripts/app.js"

/**
 * @typedef {{ node: string, workflow: string | null }} Sender
 *   node: execution id, "3:1" for node 1 of the subgraph in node 3; workflow: id, null where no interface queued it.
 * @typedef {{ element: HTMLElement, height: number, draw: (report: any, locale: string) => void }} Panel
 *   height: what it needs, 0 while it is not on the page.
 */

const MARGIN = 10 // of the widget, above and below
const MAX_REMEMBERED = 50

/** @type {WeakMap<object, number>} by node: its height without a panel */
const heights = new WeakMap()

export class NodePanels {
  /** @param {string[]} nodeClasses @param {string} widget name @param {() => Panel} make */
  constructor(nodeClasses, widget, make) {
    Object.assign(this, { nodeClasses, widget, make })
    /** @type {WeakMap<object, Panel>} by node */
    this.panels = new WeakMap()
    /** @type {Map<string, Sender>} Of each node: undo and changing tabs build a workflow's nodes anew. */
    this.latest = new Map()
  }

  /** @param {Sender} report */
  receive(report) {
    const key = `${report.workflow}/${report.node}`
    this.latest.delete(key)
    this.latest.set(key, report)
    const [oldest] = this.latest.keys()
    if (this.latest.size > MAX_REMEMBERED) this.latest.delete(oldest)
    this.show(report)
  }

  /** After the interface has built the nodes of a workflow. */
  restore() {
    for (const report of this.latest.values()) {
      const node = this.nodeOf(report)
      if (node) keepSavedHeight(node)
    }
    // Nodes 2.0 notices that a node has grown only once it has drawn it.
    requestAnimationFrame(() => this.latest.forEach((report) => this.show(report)))
  }

  /** @param {Sender} report */
  show(report) {
    const node = this.nodeOf(report)
    if (!node) return
    const panel = this.panels.get(node) ?? this.add(node)
    panel.draw(report, String(setting("Comfy.Locale")))
    node.setDirtyCanvas(true, true)
  }

  /** @param {Sender} report Undefined where another workflow is open by now, with other nodes under the same ids. */
  nodeOf(report) {
    if (report.workflow !== app.rootGraph.id) return undefined
    const [id, ...inner] = report.node.split(":")
    const node = inner.reduce((outer, next) => outer?.subgraph?.getNodeById(next), app.rootGraph.getNodeById(id))
    return this.nodeClasses.includes(node?.comfyClass) ? node : undefined
  }

  /** @param {any} node */
  add(node) {
    const panel = this.make()
    this.panels.set(node, panel)
    panel.element.dataset.panel = this.widget
    keepSavedHeight(node)
    panel.element.addEventListener("wheel", zoomCanvas)
    // The canvas asks for the height when it draws, and the panel has one only after that.
    new ResizeObserver(() => node.setDirtyCanvas(true, true)).observe(panel.element)
    let height = 200 // until it is on the page
    const widget = node.addDOMWidget(this.widget, this.widget, panel.element, {
      serialize: false, // not part of the prompt
      hideOnZoom: false,
      margin: MARGIN,
      getMinHeight: () => (height = panel.height || height) + 2 * MARGIN,
    })
    widget.serialize = false // not part of the saved workflow
    return panel
  }
}

/** @param {string} id */
const setting = (id) => app.extensionManager.setting.get(id)

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
  node.onSerialize = function (/** @type {any} */ saved) {
    before?.call(this, saved)
    saved.size = [saved.size[0], heights.get(this) ?? saved.size[1]]
    if (saved.widgets_values?.length === 0) { // the panel is the only widget
      delete saved.widgets_values
      delete saved.widgets_values_named
    }
  }
}
