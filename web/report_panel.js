// @ts-check
/** Draws what the accelerations on a MODEL did in its latest run, one below the other. */

/**
 * @typedef {{ scheme: string, quantized: string[], left: Record<string, string>, bytes_before: number,
 *   bytes_after: number, weight_error: number | null, note: string }} Quantization
 *   QuantizationReport of para_core/quantization_report.py
 * @typedef {{ mesh: string, ranks: { device: string, memory_bytes: number }[], num_restarts: number, asked: boolean
 * }} Parallel ParallelReport of para_core/parallel_report.py
 * @typedef {{ sections: { fbcache?: import("./fbcache_panel.js").Report & { family: string }, fp8?: Quantization[],
 *   compile?: import("./compile_panel.js").Report, parallel?: Parallel } }} Report as the node's JSON
 * @typedef {{ draw: (report: any, locale: string) => void, element: HTMLElement }} Panel
 */
import { CompilePanel } from "./compile_panel.js"
import { Panel as CachePanel } from "./fbcache_panel.js"
import { fill } from "./fbcache_words.js"
import { arrangement } from "./mesh_words.js"
import { translated, wordsOf } from "./report_words.js"

const NAMES_SHOWN = 3 // of the layers that were left for one reason
const UNITS = ["B", "KB", "MB", "GB"]

const STYLE = new CSSStyleSheet()
STYLE.replaceSync(`
  section { --text: var(--input-text, #ddd); --paper: var(--comfy-input-bg, #222); --chart-height: 130px;
    display: flex; flex-direction: column; gap: 6px; color: var(--text); font-size: 11px; line-height: 1.35;
    overflow-wrap: anywhere; }
  article { border-radius: 6px; background: var(--paper); }
  h3 { margin: 0; padding: 7px 9px 0; font-size: 12px; font-weight: 600; }
  .lines { padding: 5px 9px 7px; display: flex; flex-direction: column; gap: 3px; }
  .bars { display: grid; grid-template-columns: max-content 1fr; gap: 2px 7px; margin: 3px 0; }
  .bar { padding: 0 5px; box-sizing: border-box; white-space: nowrap;
    background: color-mix(in srgb, var(--text) 35%, var(--paper)); }
  .bar.after { background: color-mix(in srgb, #2fae74 60%, var(--paper)); }
  .notice { padding-left: 7px; border-left: 3px solid #e08a1e; }
`)

/** An element that shows one report at a time and knows how high it must be. */
export class ReportPanel {
  constructor() {
    this.element = document.createElement("div")
    this.shadow = this.element.attachShadow({ mode: "open" })
    this.shadow.adoptedStyleSheets = [STYLE]
  }

  /** @param {Report} report @param {string} locale of the interface */
  draw({ sections: { fbcache, fp8, compile, parallel } }, locale) {
    const words = wordsOf(locale)
    const parts = [
      ...(fbcache ? [part(`${words.fbcache} \u00b7 ${fbcache.family}`, drawn(new CachePanel(), fbcache, locale))] : []),
      ...(fp8 ?? []).map((one) => part(`${words.fp8} \u00b7 ${one.scheme}`, quantization(one, locale))),
      ...(compile ? [part(words.compile, drawn(new CompilePanel(), compile, locale))] : []),
      ...(parallel ? [part(words.parallel, ranks(parallel, locale))] : []),
    ]
    const nothing = make("article", {}, make("div", { class: "lines" }, words.nothing))
    this.shadow.replaceChildren(make("section", { role: "group" }, ...(parts.length ? parts : [nothing])))
  }

  /** What the content needs; 0 while it is not on the page. */
  get height() {
    return this.shadow.querySelector("section")?.clientHeight ?? 0
  }
}

/** @param {string} title @param {Element} content */
const part = (title, content) => make("article", {}, make("h3", {}, title), content)

/** @param {Panel} panel @param {object} report @param {string} locale */
function drawn(panel, report, locale) {
  panel.draw(report, locale)
  return panel.element
}

/** @param {Quantization} report @param {string} locale */
function quantization(report, locale) {
  const words = wordsOf(locale)
  const left = Object.keys(report.left).length
  const error = report.weight_error === null ? words.unknown : `${(100 * report.weight_error).toFixed(2)}%`
  return lines(
    fill(words.layers, { quantized: report.quantized.length, left }),
    bars({ before: report.bytes_before, after: report.bytes_after }, locale),
    fill(words.error, { error }),
    ...byReason(report.left).map(([reason, names]) =>
      fill(words.left, { reason: translated(reason, locale), names: some(names, locale) })),
    ...(report.note ? [make("div", { class: "notice" }, translated(report.note, locale))] : []))
}

/** @param {Record<string, string>} left layer to reason @returns {[string, string[]][]} the most frequent one first */
export function byReason(left) {
  /** @type {Map<string, string[]>} */
  const found = new Map()
  for (const [name, reason] of Object.entries(left)) found.set(reason, [...(found.get(reason) ?? []), name])
  return [...found].sort(([, a], [, b]) => b.length - a.length)
}

/** @param {string[]} names @param {string} locale */
function some(names, locale) {
  const words = wordsOf(locale)
  const shown = names.slice(0, NAMES_SHOWN).join(words.listed)
  return names.length > NAMES_SHOWN ? fill(words.more, { names: shown, count: names.length - NAMES_SHOWN }) : shown
}

/** @param {Record<string, number>} sizes what to bytes @param {string} locale */
function bars(sizes, locale) {
  const longest = Math.max(...Object.values(sizes)) || 1
  return make("div", { class: "bars" }, ...Object.entries(sizes).flatMap(([name, bytes]) => [
    make("span", {}, wordsOf(locale)[name]),
    make("div", { class: `bar ${name}`, style: `width: ${(100 * bytes) / longest}%` }, size(bytes)),
  ]))
}

/** @param {Parallel} report @param {string} locale */
function ranks({ mesh, ranks: all, num_restarts: count, asked }, locale) {
  const words = wordsOf(locale)
  return lines(
    fill(words.ranks, { count: all.length, mesh: arrangement(mesh, locale) }),
    ...all.map(({ device, memory_bytes }, rank) => fill(words.rank, { rank, device, size: size(memory_bytes) })),
    count ? fill(words.restarts, { count }) : words.calm,
    ...(asked ? [] : [make("div", { class: "notice" }, words.not_asked)]))
}

/** @param {...(Element | string)} content each in a line of its own */
const lines = (...content) =>
  make("div", { class: "lines" }, ...content.map((one) => (typeof one === "string" ? make("div", {}, one) : one)))

/** @param {number} bytes */
export function size(bytes) {
  const unit = Math.min(Math.floor(Math.log2(Math.max(bytes, 1)) / 10), UNITS.length - 1)
  return `${Number((bytes / 1024 ** unit).toPrecision(4))} ${UNITS[unit]}`
}

/** @param {string} name @param {Record<string, string>} attributes @param {...(Element | string)} children */
function make(name, attributes, ...children) {
  const element = document.createElement(name)
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value)
  element.append(...children)
  return element
}
