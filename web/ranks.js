// @ts-check
/** A sidebar tab that shows the processes of the Context-Parallel Launcher: one card for each rank, while it is open. */
import { api } from "../../scripts/api.js"
import { app } from "../../scripts/app.js"
import { arrangement } from "./mesh_words.js"

/**
 * @typedef {{ rank: number, device: string, pid: number | null, state: string, memory_bytes: number, error: string,
 *   log: string[] }} RankState
 * @typedef {{ address: string, mesh: string, restarts: number, ranks: RankState[] }} GroupState
 */

const INTERVAL = 1000 // ms between two looks, while the tab is open
const WORDS = {
  en: {
    title: "Ranks", none: "No processes are running. They start with the first run behind a Context-Parallel Launcher.",
    stop: "Stop all", memory: "memory", restarts: "restarts", log: "Log", rank: "Rank", lost: "The server does not answer.",
    starting: "starting", idle: "idle", busy: "busy", lost_rank: "lost", stopped: "stopped",
  },
  zh: {
    title: "进程", none: "没有正在运行的进程。它们会在上下文并行启动器之后的第一次运行时启动。",
    stop: "全部停止", memory: "内存", restarts: "重启次数", log: "日志", rank: "进程", lost: "服务器没有回应。",
    starting: "启动中", idle: "空闲", busy: "忙碌", lost_rank: "已丢失", stopped: "已停止",
  },
}
const COLOURS = { idle: "#2fae74", busy: "#4f8ff0", starting: "#e08a1e" }

const STYLE = new CSSStyleSheet()
STYLE.replaceSync(`
  section { padding: 10px; display: flex; flex-direction: column; gap: 8px; color: var(--input-text, #ddd);
    font-size: 12px; line-height: 1.4; overflow-wrap: anywhere; }
  article { padding: 8px 10px; border-radius: 6px; background: var(--comfy-input-bg, #222); }
  h2 { margin: 2px 0 4px; font-size: 14px; font-weight: 600; }
  header { display: flex; gap: 8px; align-items: center; justify-content: space-between; }
  b { flex: 1; font-weight: 600; }
  .quiet, summary, pre { opacity: 0.75; }
  summary { cursor: pointer; }
  i { display: inline-block; width: 9px; height: 9px; border-radius: 50%; }
  pre { margin: 6px 0 0; max-height: 160px; overflow: auto; font-size: 11px; white-space: pre-wrap; }
  .error { margin-top: 6px; padding-left: 7px; border-left: 3px solid #e5604d; white-space: pre-wrap; }
  button { align-self: flex-end; padding: 5px 14px; border: 1px solid var(--border-color, #555); border-radius: 6px;
    background: var(--comfy-input-bg, #222); color: inherit; font: inherit; cursor: pointer; }
  button:hover { border-color: currentColor; }
`)

/** What ends the look at the server, while the tab is open. @type {(() => void) | null} */
let close = null

const locale = () => String(app.extensionManager.setting.get("Comfy.Locale"))
const words = () => (locale().startsWith("zh") ? WORDS.zh : WORDS.en)

app.registerExtension({
  name: "para.ranks",
  setup() {
    app.extensionManager.registerSidebarTab({
      id: "para.ranks", icon: "pi pi-server", title: words().title, tooltip: `Para Accelerate: ${words().title}`,
      type: "custom",
      render: (/** @type {HTMLElement} */ element) => {
        close?.()
        close = open(element)
      },
      destroy: () => close?.(),
    })
  },
})

/** @param {HTMLElement} element @returns {() => void} ends it */
function open(element) {
  const root = element.shadowRoot ?? element.attachShadow({ mode: "open" })
  root.adoptedStyleSheets = [STYLE]
  /** @type {Set<number>} ranks whose log is unfolded */
  const unfolded = new Set()
  let ended = false
  const look = async () => {
    const groups = await fetchGroups()
    if (ended) return
    root.replaceChildren(draw(groups, unfolded, look))
    timer = setTimeout(look, INTERVAL)
  }
  let timer = setTimeout(look, 0)
  return () => {
    ended = true
    clearTimeout(timer)
  }
}

/** @returns {Promise<GroupState[] | null>} null: no answer */
async function fetchGroups() {
  try {
    return await (await api.fetchApi("/para/ranks")).json()
  } catch {
    return null
  }
}

/** @param {GroupState[] | null} groups @param {Set<number>} unfolded @param {() => void} look */
function draw(groups, unfolded, look) {
  const title = make("h2", {}, words().title)
  if (!groups) return make("section", {}, title, words().lost)
  if (!groups.length) return make("section", {}, title, words().none)
  const stop = make("button", {}, words().stop)
  stop.addEventListener("click", async () => {
    await api.fetchApi("/para/ranks/stop", { method: "POST" })
    look()
  })
  return make("section", {}, title, ...groups.flatMap((group) => [
    make("header", { title: group.address }, make("b", {}, arrangement(group.mesh, locale())),
      make("span", { class: "quiet" }, `${words().restarts}: ${group.restarts}`)),
    ...group.ranks.map((rank) => card(rank, unfolded)),
  ]), stop)
}

/** @param {RankState} rank @param {Set<number>} unfolded */
function card(rank, unfolded) {
  const state = rank.state === "lost" ? words().lost_rank : words()[rank.state] ?? rank.state
  const dot = make("i", { style: `background: ${COLOURS[rank.state] ?? "#e5604d"}` })
  const log = make("details", unfolded.has(rank.rank) ? { open: "" } : {}, make("summary", {}, words().log),
    make("pre", {}, rank.log.join("\n")))
  log.addEventListener("toggle", () => log.open ? unfolded.add(rank.rank) : unfolded.delete(rank.rank))
  return make("article", { "data-rank": rank.rank },
    make("header", {}, dot, make("b", {}, `${words().rank} ${rank.rank} · ${rank.device}`), state),
    make("div", { class: "quiet" }, `${words().memory} ${size(rank.memory_bytes)}${rank.pid ? ` · pid ${rank.pid}` : ""}`),
    ...(rank.error ? [make("div", { class: "error" }, rank.error)] : []), ...(rank.log.length ? [log] : []))
}

/** @param {number} bytes */
const size = (bytes) => (bytes < 2 ** 30 ? `${(bytes / 2 ** 20).toFixed(0)} MiB` : `${(bytes / 2 ** 30).toFixed(1)} GiB`)

/** @param {string} name @param {Record<string, unknown>} attributes @param {...(Element | string)} children */
function make(name, attributes, ...children) {
  const element = document.createElement(name)
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, String(value))
  element.append(...children)
  return /** @type {any} */ (element)
}
