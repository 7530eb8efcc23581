// @ts-check
/** Draws the report of a run with the first-block cache: strips of steps, the curve, and the numbers in words. */

/**
 * @typedef {{ step: number, sigma: number, diff: number | null, reused: boolean }} StepRecord
 * @typedef {{ x: number, width: number, record: StepRecord }} Cell One evaluation; x and width count in steps.
 * @typedef {{ conditionings: Record<string, StepRecord[]>, residual_diff_threshold: number, num_calls: number,
 *   num_reused_calls: number, num_block_calls: number, num_block_calls_baseline: number, seconds: number,
 *   computed_seconds: number, reused_seconds: number, num_bytes: number, num_steps: number, finished: boolean,
 *   decision: string, target_speedup: number
 * }} Report RunReport of para_core/cache_report.py
 * @typedef {import("./fbcache_words.js").Words} Words
 */
import { fill, wordsOf } from "./fbcache_words.js"

const CHART_HEIGHT = 60 // at least
const FEW_STEPS = 10
const MANY_STRIPS = 4
const MANY_POINTS = 40
const CURVES = ["#4f8ff0", "#e08a1e", "#a873dc", "#17a5a5"]
const SVG_NAMES = ["svg", "title", "rect", "path", "line"]

const STYLE = new CSSStyleSheet()
STYLE.replaceSync(`
  section { --text: var(--input-text, #ddd); --paper: var(--comfy-input-bg, #222); --green: #2fae74; --red: #e5604d;
    --strong: color-mix(in srgb, var(--text) 55%, var(--paper));
    --faint: color-mix(in srgb, var(--text) 16%, var(--paper));
    box-sizing: border-box; min-height: 100%; display: flex; flex-direction: column; gap: 5px; padding: 7px 9px;
    border-radius: 6px; background: var(--paper); color: var(--text); font-size: 11px; line-height: 1.35;
    overflow-wrap: anywhere; }
  .row { display: flex; flex-wrap: wrap; gap: 0 10px; justify-content: space-between; }
  .key { display: inline-block; width: 9px; height: 9px; margin-right: 5px; }
  .key.reused { height: 5px; }
  .key.dashed { width: 18px; height: 0; border-top: 2px dashed var(--red); vertical-align: middle; }
  .computed { fill: var(--strong); background: var(--strong); }
  .reused { fill: var(--green); background: var(--green); }
  .coming { fill: var(--faint); background: var(--faint); }
  svg { display: block; width: 100%; height: 12px; overflow: visible; }
  .dense { gap: 2px; font-size: 9px; }
  .dense svg { height: 7px; }
  path, line { fill: none; vector-effect: non-scaling-stroke; stroke-width: 1.5; stroke-linejoin: round; }
  .chart { position: relative; flex: 1 0 var(--chart-height, ${CHART_HEIGHT}px); margin-top: 2px; }
  .chart svg { position: absolute; inset: 0; height: 100%; }
  .points { stroke: var(--green); stroke-linecap: round; }
  .axis { stroke: var(--strong); stroke-width: 1; }
  .threshold { stroke: var(--red); stroke-dasharray: 6 4; }
  .advice { padding-left: 7px; border-left: 3px solid #e08a1e; }
`)

/** An element that shows one report at a time and knows how high it must be. */
export class Panel {
  constructor() {
    this.element = document.createElement("div")
    this.shadow = this.element.attachShadow({ mode: "open" })
    this.shadow.adoptedStyleSheets = [STYLE]
  }

  /** @param {Report} report @param {string} locale of the interface */
  draw(report, locale) {
    const words = wordsOf(locale)
    const strips = Object.entries(report.conditionings).flatMap((entry, index) => strip(report, words, entry, index))
    const parts = [head(report, words), ...strips, ...chart(report, words), facts(report, words)]
    if (report.finished) parts.push(...advice(report, words).map((text) => make("div", { class: "advice" }, text)))
    const dense = Object.keys(report.conditionings).length > MANY_STRIPS ? "dense" : ""
    this.shadow.replaceChildren(make("section", { role: "group", class: dense }, ...parts))
  }

  /** What the content needs when the chart is as low as it may be; 0 while it is not on the page. */
  get height() {
    const [section, chart] = ["section", ".chart"].map((name) => this.shadow.querySelector(name)?.clientHeight ?? 0)
    return section && section - chart + CHART_HEIGHT
  }
}

/** @param {string} name @param {Record<string, unknown>} attributes @param {...(Element | string)} children */
function make(name, attributes, ...children) {
  const element = SVG_NAMES.includes(name)
    ? document.createElementNS("http://www.w3.org/2000/svg", name)
    : document.createElement(name)
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, String(value))
  element.append(...children)
  return element
}

/** @param {Report} report @param {string} title @param {...Element} children */
const drawing = (report, title, ...children) =>
  make("svg", { viewBox: `0 0 ${numSteps(report)} 1`, preserveAspectRatio: "none", role: "img" },
    make("title", {}, title), ...children)

/** @param {Report} report */
const numSteps = (report) => Math.max(1, report.num_steps, ...allRecords(report).map((record) => record.step + 1))

/** @param {number} index of the conditioning */
const colour = (index) => CURVES[index % CURVES.length]

/** @param {Report} report */
const allRecords = (report) => Object.values(report.conditionings).flat()

/** @param {StepRecord[]} records @returns {Cell[]} by step; some samplers evaluate a step more than once */
function cellsOf(records) {
  /** @type {Map<number, StepRecord[]>} */
  const steps = new Map()
  for (const record of records) steps.set(record.step, [...(steps.get(record.step) ?? []), record])
  return [...steps.keys()].sort((a, b) => a - b).flatMap((step) => {
    const found = steps.get(step) ?? []
    return found.map((record, index) => ({ x: step + index / found.length, width: 1 / found.length, record }))
  })
}

/** @param {Report} report @param {Words} words */
function head(report, words) {
  const at = Math.max(0, ...allRecords(report).map((record) => record.step + 1))
  const progress = report.finished ? "" : `${at} / ${numSteps(report)}`
  const legend = ["computed", "reused", "coming"].map((state) =>
    make("span", {}, make("i", { class: `key ${state}` }), words[state]))
  return make("div", { class: "row head" }, make("div", { class: "row" }, ...legend), make("span", {}, progress))
}

/** @param {Report} report @param {Words} words @param {[string, StepRecord[]]} entry @param {number} index */
function strip(report, words, [label, records], index) {
  const name = label.replace(/^\w+/, (word) => words[word] ?? word)
  const count = fill(words.strip, { reused: records.filter((record) => record.reused).length, all: records.length })
  const evaluated = new Set(records.map((record) => record.step))
  const coming = [...Array(numSteps(report)).keys()].filter((step) => !evaluated.has(step))
  const cells = [
    ...cellsOf(records).map(({ x, width, record }) =>
      cell(x, width, record.reused ? "reused" : "computed", words, record)),
    ...coming.map((step) => cell(step, 1, "coming", words)),
  ]
  const key = make("i", { class: "key", style: `background: ${colour(index)}` })
  const row = make("div", { class: "row" }, make("span", {}, key, name), make("span", {}, count))
  return [row, drawing(report, `${name}: ${count}`, ...cells)]
}

/** @param {number} x @param {number} width @param {string} state @param {Words} words @param {StepRecord} [record] */
function cell(x, width, state, words, record) {
  const difference = record?.diff?.toFixed(3) ?? "-"
  const text = record?.reused && record.diff === null ? words.foreseen : words.cell
  const title = record ? fill(text, { step: record.step + 1, state: words[state], difference }) : words[state]
  const height = state === "reused" ? 0.5 : 1 // not by colour alone
  const box = { x: x + 0.06 * width, y: 1 - height, width: 0.88 * width, height }
  return make("rect", { class: state, ...box }, make("title", {}, title))
}

/** @param {Report} report @param {Words} words */
function chart(report, words) {
  const threshold = report.target_speedup ? 0 : report.residual_diff_threshold
  const differences = allRecords(report).flatMap((record) => record.diff ?? []).sort((a, b) => a - b)
  // A few steps at the ends differ far more than the rest: they may leave the chart at its upper edge.
  const ceiling = Math.max(1.4 * threshold, 1.3 * (differences[Math.floor(0.8 * differences.length)] ?? 0)) || 0.1
  const y = (/** @type {number} */ difference) => 1 - Math.min(difference / ceiling, 1)
  const across = (/** @type {string} */ name, /** @type {number} */ at) =>
    make("line", { class: name, x1: 0, x2: numSteps(report), y1: at, y2: at })
  const lines = report.target_speedup ? [across("axis", 1)] : [across("axis", 1), across("threshold", y(threshold))]
  const curves = Object.values(report.conditionings).flatMap((records, index) => curve(records, y, colour(index)))
  const axis = make("div", { class: "row" },
    make("span", {}, fill(words[report.decision], { ceiling: ceiling.toFixed(3) })), limit(report, words))
  return [axis, make("div", { class: "chart" }, drawing(report, words.curve, ...lines, ...curves))]
}

/** @param {Report} report @param {Words} words */
function limit({ target_speedup: target, residual_diff_threshold: threshold }, words) {
  if (target) return make("span", {}, fill(words.target, { target }))
  const text = fill(words.threshold, { threshold: Number(threshold.toPrecision(3)) })
  return make("span", {}, make("i", { class: "key dashed" }), text)
}

/** @param {StepRecord[]} records @param {(difference: number) => number} y @param {string} stroke */
function curve(records, y, stroke) {
  const points = cellsOf(records).flatMap(({ x, width, record }) =>
    record.diff === null ? [] : { at: `${x + width / 2} ${y(record.diff)}`, reused: record.reused })
  const dots = points.filter((point) => point.reused).map((point) => `M${point.at}h0`)
  const style = `stroke-width: ${points.length > MANY_POINTS ? 3 : 5}`
  const line = points.map((point, index) => `${index ? "L" : "M"}${point.at}`)
  return [make("path", { d: line.join(""), stroke }), make("path", { class: "points", d: dots.join(""), style })]
}

/** @param {Report} report @param {Words} words */
function facts(report, words) {
  const [computed, all] = [report.num_block_calls, report.num_block_calls_baseline]
  const lines = [
    fill(words.blocks, { computed, all, saved: `${Math.round(100 * (1 - computed / (all || 1)))}%` }),
    fill(words.time, { seconds: report.seconds.toFixed(2), speedup: estimatedSpeedup(report).toFixed(2) }),
    fill(words.memory, { size: (report.num_bytes / 2 ** 20).toFixed(2) }),
  ]
  return make("div", { class: "facts" }, ...lines.map((line) => make("div", {}, line)))
}

/** @param {Report} report as RunReport.estimated_speedup */
function estimatedSpeedup({ num_calls, num_reused_calls, computed_seconds, reused_seconds }) {
  const divisor = (num_calls - num_reused_calls) * (computed_seconds + reused_seconds)
  return divisor ? (num_calls * computed_seconds) / divisor : 1
}

/** @param {Report} report @param {Words} words @returns {string[]} as RunReport.advice */
function advice(report, words) {
  if (report.num_reused_calls || !report.num_calls) return []
  const [target, threshold, smallest] = [report.target_speedup, report.residual_diff_threshold, smallestOf(report)]
  if (!target && threshold === 0) return [words.zero]
  if (target || smallest < threshold) return [words.limits]
  const why = numSteps(report) < FEW_STEPS ? [words.few] : []
  const known = Number.isFinite(smallest) ? [fill(words.smallest, { smallest: smallest.toFixed(3) })] : []
  return [[words.none, ...why, ...known, words.raise].join(words.between)]
}

/** @param {Report} report the smallest of the steps' differences; a step's is its largest, as in RunReport */
function smallestOf(report) {
  /** @type {Map<number, number>} */
  const differences = new Map()
  for (const { step, diff } of allRecords(report)) {
    if (diff !== null) differences.set(step, Math.max(diff, differences.get(step) ?? 0))
  }
  return Math.min(...differences.values())
}
