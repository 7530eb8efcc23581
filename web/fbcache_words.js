// @ts-check
/** What the panel of the first-block cache says, in English and Chinese. */

/** @typedef {Record<string, string>} Words */

/** @type {Record<string, Words>} */
const WORDS = {
  en: {
    positive: "positive",
    negative: "negative",
    conditioning: "conditioning",
    strip: "{reused} of {all} reused",
    cell: "step {step}: {state}, difference {difference}",
    foreseen: "step {step}: {state}, foreseen: not even the first block ran",
    prediction: "estimated error (0 to {ceiling})",
    first_block: "first block's change (0 to {ceiling})",
    threshold: "threshold {threshold}",
    target: "target {target}x",
    curve: "The difference at each step; a dashed line is the threshold",
    computed: "computed",
    reused: "reused",
    coming: "to come",
    blocks: "{computed} of {all} block calls computed, {saved} saved",
    time: "{seconds} s, model about {speedup}x as fast (estimate)",
    memory: "{size} MiB held",
    zero: "Nothing is reused at threshold 0. Set -1 for the model's own value, or a value above 0.",
    limits: "Nothing was reused: start_percent, end_percent, warmup_steps or too few steps leave no room for it.",
    none: "Nothing was reused.",
    few: "With fewer than 10 steps that is expected: neighbouring steps differ too much.",
    smallest: "The smallest difference was {smallest}.",
    raise: "Raise residual_diff_threshold or take more steps.",
    between: " ", // sentences
  },
  zh: {
    positive: "正向",
    negative: "负向",
    conditioning: "条件",
    strip: "复用 {reused}/{all}",
    cell: "第 {step} 步：{state}，差异 {difference}",
    foreseen: "第 {step} 步：{state}，已预见，首块也未运行",
    prediction: "估计误差（0 到 {ceiling}）",
    first_block: "首块变化（0 到 {ceiling}）",
    threshold: "阈值 {threshold}",
    target: "目标 {target} 倍",
    curve: "每一步的差异；虚线为阈值",
    computed: "完整计算",
    reused: "复用",
    coming: "未到",
    blocks: "块调用 {computed}/{all}，节省 {saved}",
    time: "用时 {seconds} 秒，模型速度约为 {speedup} 倍（估计值）",
    memory: "占用 {size} MiB",
    zero: "阈值为 0 时从不复用。可设为 -1（模型的推荐值）或大于 0 的值。",
    limits: "一步都没有复用：开始百分比、结束百分比、预热步数或过少的步数没有留下可复用的步。",
    none: "一步都没有复用。",
    few: "少于 10 步时这是正常的：相邻两步差别太大。",
    smallest: "最小差异为 {smallest}。",
    raise: "请调大残差差异阈值，或增加步数。",
    between: "",
  },
}

/** @param {string} locale of the interface @returns {Words} */
export const wordsOf = (locale) => (locale.startsWith("zh") ? WORDS.zh : WORDS.en)

/** @param {string} text @param {Record<string, unknown>} values */
export const fill = (text, values) => text.replace(/{(\w+)}/g, (_, name) => String(values[name]))
