// @ts-check
/** Draws the report of a run with compiled code: what goes on, the bar, and each compilation with its reason. */

/**
 * @typedef {{ name: string, seconds: number, reason: string }} Compiled
 * @typedef {{ compiled: Compiled[], num_compilations: number, total_seconds: number, num_blocks: number,
 *   num_kinds: number, uncompiled: Record<string, number>, compiling: string | null, compiling_seconds: number,
 *   cache_bytes: number | null, finished: boolean }} Report CompileReport of para_core/compile_report.py
 */
import { fill } from "./fbcache_words.js"

/** @type {Record<string, Record<string, string>>} */
const WORDS = {
  en: {
    compiling: "compiling {name}, {seconds} s",
    running: "running compiled code",
    done: "{count} compilations in {seconds} s",
    nothing: "nothing had to be compiled",
    recompiled: "{done}, {count} of them recompilations",
    total: "{count} compilations since the model was loaded, {seconds} s; {blocks} blocks",
    kept: "{size} MiB kept for the next start",
    uncompiled: "{count} block calls uncompiled: {reason}",
    progress: "Kinds of blocks compiled",
  },
  zh: {
    compiling: "正在编译 {name}，{seconds} 秒",
    running: "正在运行编译后的代码",
    done: "编译 {count} 次，用时 {seconds} 秒",
    nothing: "无需编译",
    recompiled: "{done}；其中重新编译 {count} 次",
    "another size": "尺寸不同",
    "its weights are offloaded, with a LoRA on them": "权重已卸载，且带有 LoRA",
    "another node's patch inside the model (FBCache Patcher)": "首块缓存在模型内部逐块判断",
    "another extension has replaced the block's forward": "其他扩展替换了该块的 forward",
    total: "模型加载以来编译 {count} 次，{seconds} 秒；共 {blocks} 个块",
    kept: "保留 {size} MiB 供下次启动",
    uncompiled: "{count} 次块调用未编译：{reason}",
    progress: "已编译的块种类",
  },
}

const STYLE = new CSSStyleSheet()
STYLE.replaceSync(`
  section { --text: var(--input-text, #ddd); --paper: var(--comfy-input-bg, #222);
    box-sizing: border-box; display: flex; flex-direction: column; gap: 5px; padding: 7px 9px; border-radius: 6px;
    background: var(--paper); color: var(--text); font-size: 11px; line-height: 1.35; overflow-wrap: anywhere; }
  progress { width: 100%; height: 6px; accent-color: #2fae74; }
  .row { display: flex; gap: 10px; justify-content: space-between; }
  .reason { padding-left: 7px; border-left: 3px solid #e08a1e; }
`)

/** An element that shows one report at a time and knows how high it must be. */
export class CompilePanel {
  constructor() {
    this.element = document.createElement("div")
    this.shadow = this.element.attachShadow({ mode: "open" })
    this.shadow.adoptedStyleSheets = [STYLE]
  }

  /** @param {Report} report @param {string} locale of the interface */
  draw(report, locale) {
    const words = WORDS[locale.startsWith("zh") ? "zh" : "en"]
    const parts = [line("head", headline(report, words))]
    if (report.compiling !== null) parts.push(bar(report, words))
    parts.push(...report.compiled.flatMap((one) => compilation(one, words)))
    for (const [reason, count] of Object.entries(report.uncompiled)) {
      parts.push(line("reason", fill(words.uncompiled, { count, reason: translated(reason, words) })))
    }
    if (report.finished) parts.push(...totals(report, words))
    const group = document.createElement("section")
    group.setAttribute("role", "group")
    group.append(...parts)
    this.shadow.replaceChildren(group)
  }

  /** What the content needs; 0 while it is not on the page. */
  get height() {
    return this.shadow.querySelector("section")?.clientHeight ?? 0
  }
}

/** @param {Report} report @param {Record<string, string>} words */
function headline(report, words) {
  if (report.compiling !== null) {
    return fill(words.compiling, { name: report.compiling, seconds: Math.round(report.compiling_seconds) })
  }
  if (!report.finished) return words.running
  if (!report.compiled.length) return words.nothing
  const again = report.compiled.filter((one) => one.reason).length
  const seconds = report.compiled.reduce((sum, one) => sum + one.seconds, 0).toFixed(1)
  const done = fill(words.done, { count: report.compiled.length, seconds })
  return again ? fill(words.recompiled, { done, count: again }) : done
}

/** @param {Report} report @param {Record<string, string>} words */
function bar(report, words) {
  const element = document.createElement("progress")
  element.max = Math.max(report.num_kinds, 1)
  element.value = Math.min(new Set(report.compiled.map((one) => one.name)).size, element.max)
  element.setAttribute("aria-label", words.progress)
  return element
}

/** @param {Compiled} one @param {Record<string, string>} words */
function compilation(one, words) {
  const row = line("row", "")
  row.append(line("", one.name), line("", `${one.seconds.toFixed(1)} s`))
  return one.reason ? [row, line("reason", translated(one.reason, words))] : [row]
}

/** Our own reasons in the language of the interface; torch's as they come. @param {string} reason @param {Record<string, string>} words */
const translated = (reason, words) => words[reason] ?? reason

/** @param {Report} report @param {Record<string, string>} words */
function totals(report, words) {
  const values = { count: report.num_compilations, seconds: report.total_seconds.toFixed(1), blocks: report.num_blocks }
  const lines = [line("", fill(words.total, values))]
  if (report.cache_bytes) {
    lines.push(line("", fill(words.kept, { size: (report.cache_bytes / 2 ** 20).toFixed(1) })))
  }
  return lines
}

/** @param {string} name of the class @param {string} text */
function line(name, text) {
  const element = document.createElement("div")
  element.className = name
  element.textContent = text
  return element
}
