// @ts-check
/** How ranks share the work, in the words of the interface. */

const WORDS = { en: { batch: "batch", ring: "ring" }, zh: { batch: "批次", ring: "环形" } }

/** @param {string} mesh such as "batch 1 x ring 1 x Ulysses 2" @param {string} locale of the interface */
export function arrangement(mesh, locale) {
  const words = locale.startsWith("zh") ? WORDS.zh : WORDS.en
  return mesh.replace("batch", words.batch).replace("ring", words.ring).replaceAll(" x ", " \u00d7 ")
}
