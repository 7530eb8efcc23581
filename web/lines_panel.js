// @ts-check
/** Draws what a node has to say, line by line. */

/** @typedef {string | { notice: string }} Line A notice is marked: something that the person may want to change. */

const STYLE = new CSSStyleSheet()
STYLE.replaceSync(`
  section { --text: var(--input-text, #ddd); --paper: var(--comfy-input-bg, #222);
    box-sizing: border-box; display: flex; flex-direction: column; gap: 3px; padding: 7px 9px; border-radius: 6px;
    background: var(--paper); color: var(--text); font-size: 11px; line-height: 1.35; overflow-wrap: anywhere; }
  .notice { padding-left: 7px; border-left: 3px solid #e08a1e; }
`)

/** An element that shows the lines of one report at a time and knows how high it must be. */
export class LinesPanel {
  /** @param {(report: any, locale: string) => Line[]} linesOf */
  constructor(linesOf) {
    this.linesOf = linesOf
    this.element = document.createElement("div")
    this.shadow = this.element.attachShadow({ mode: "open" })
    this.shadow.adoptedStyleSheets = [STYLE]
  }

  /** @param {object} report @param {string} locale of the interface */
  draw(report, locale) {
    const group = document.createElement("section")
    group.setAttribute("role", "group")
    group.append(...this.linesOf(report, locale).map(element))
    this.shadow.replaceChildren(group)
  }

  /** What the content needs; 0 while it is not on the page. */
  get height() {
    return this.shadow.querySelector("section")?.clientHeight ?? 0
  }
}

/** @param {Line} line */
function element(line) {
  const div = document.createElement("div")
  div.className = typeof line === "string" ? "" : "notice"
  div.textContent = typeof line === "string" ? line : line.notice
  return div
}
