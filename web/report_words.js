// @ts-check
/** What the Acceleration Report, FP8 Quantize and the nodes of several devices say, in English and Chinese. */

/** @typedef {Record<string, string>} Words */

/** @type {Record<string, Words>} */
const WORDS = {
  en: {
    fbcache: "FBCache Patcher",
    fp8: "FP8 Quantize",
    compile: "Compile Model",
    parallel: "Context-Parallel Launcher",
    nothing:
      'Nothing to report: this MODEL has no acceleration. Are the nodes of this pack bypassed, or is "model" connected ' +
      "in front of them?",
    layers: "{quantized} layers quantized, {left} left",
    before: "before",
    after: "after",
    error: "weight error {error} (relative L2)",
    unknown: "unknown",
    scheme: "{scheme}: {layers}",
    memory: "{before} \u2192 {after} ({ratio})",
    count_left: "{count} left: {reason}",
    left: "left ({reason}): {names}",
    more: "{names} and {count} more",
    listed: ", ",
    ranks: "{count} ranks: {mesh}",
    rank: "rank {rank} ({device}): {size}",
    calm: "no restart during the run",
    restarts: "restarts during the run: {count}; what was lost was computed again, with the same result",
    not_asked: "The ranks were not asked: another node runs the model itself.",
    one_device: "One device: the model runs as it is, without further processes.",
    decoded_alone: "One device: decoded as VAE Decode does.",
    decoded: "Decoded on {count} ranks.",
    decoded_in_tiles: "Decoded on {count} ranks, in tiles: one of them ran out of memory.",
    replaced: "Ended the processes on {devices}, which use some of the same devices.",
  },
  zh: {
    fbcache: "首块缓存 (FBCache)",
    fp8: "FP8 量化",
    compile: "编译模型",
    parallel: "上下文并行启动器",
    nothing: "没有可报告的内容：该模型没有任何加速。是否绕过了本插件的节点，或者“模型”接在了它们之前？",
    layers: "量化 {quantized} 层，保留 {left} 层",
    before: "之前",
    after: "之后",
    error: "权重误差 {error}（相对 L2）",
    unknown: "未知",
    scheme: "{scheme}：{layers}",
    memory: "{before} \u2192 {after}（{ratio}）",
    count_left: "保留 {count} 层：{reason}",
    left: "保留（{reason}）：{names}",
    more: "{names} 等，另有 {count} 层",
    listed: "、",
    ranks: "{count} 个进程：{mesh}",
    rank: "进程 {rank}（{device}）：{size}",
    calm: "运行期间没有重启",
    restarts: "运行期间重启 {count} 次；丢失的部分已重新计算，结果不变",
    not_asked: "没有用到这些进程：其他节点自己运行了模型。",
    one_device: "只有一个设备：模型照常运行，没有启动其他进程。",
    decoded_alone: "只有一个设备：与 VAE 解码相同。",
    decoded: "由 {count} 个进程解码。",
    decoded_in_tiles: "由 {count} 个进程分块解码：其中一个内存不足。",
    replaced: "已结束 {devices} 上的进程，因为它们使用了其中的设备。",
  },
}

/** What the server says in English of layers that were left, and of a device. @type {[RegExp, string][]} */
const CHINESE = [
  [/^excluded$/, "已排除"],
  [/^outside the blocks$/, "在块之外"],
  [/^modulation, norms, embedders$/, "调制、归一化与嵌入层"],
  [/^without weights$/, "没有权重"],
  [/^already quantized \(by this node\)$/, "已由本节点量化"],
  [/^already quantized \((.+)\)$/, "已量化：$1"],
  [/^smaller than (\d+) or no multiple of (\d+)$/, "小于 $1 或不是 $2 的倍数"],
  [/^(\w+) has no kernels for it: .+$/, "$1 没有相应的内核：由参考实现得出相同的数值，不会更快"],
  [/^weight only: less memory, not faster/, "仅量化权重：节省内存，不加快速度"],
  [
    /; compiled code cannot convert float8 on compute capability (\S+); with Compile Model choose (.+)$/,
    "；计算能力 $1 的编译代码无法转换 float8，使用编译模型时请选择 $2",
  ],
  [/(\w+) or (\w+)$/, "$1 或 $2"],
]

/** @param {string} locale of the interface @returns {Words} */
export const wordsOf = (locale) => (locale.startsWith("zh") ? WORDS.zh : WORDS.en)

/** The server's English in the language of the interface; what is not known stays. @param {string} text @param {string} locale */
export const translated = (text, locale) =>
  locale.startsWith("zh") ? CHINESE.reduce((found, [pattern, words]) => found.replace(pattern, words), text) : text
