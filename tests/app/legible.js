// What a reader of the page could not read, or a screen reader could not name. Called by test_browser.py with the smallest
// ratio of contrast that passes; the formulas are those of WCAG 2.2, "contrast ratio" and "relative luminance".
const least = arguments[0];
const parse = (text) => (text.match(/[\d.]+/g) || [0, 0, 0, 0]).map(Number);
const over = (top, below) => {
  const alpha = top.length > 3 ? top[3] : 1;
  return [0, 1, 2].map((i) => alpha * top[i] + (1 - alpha) * below[i]);
};
const light = (color) => {
  const parts = color.slice(0, 3).map((v) => (v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
};
const ground = (element) => {
  const layers = [];
  for (let e = element; e; e = e.parentElement) layers.push(parse(getComputedStyle(e).backgroundColor));
  return layers.reverse().reduce((below, top) => over(top, below), [255, 255, 255]);
};
const seen = (e) => {
  const box = e.getBoundingClientRect();
  return box.width > 1 && box.height > 1 && e.checkVisibility({ opacityProperty: true, visibilityProperty: true });
};
const contrast = (ink, element) => {
  const below = ground(element);
  const [a, b] = [light(over(ink, below)), light(below)];
  return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
};
const faults = [];
const texts = [];
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const [text, element] = [walker.currentNode.textContent.trim(), walker.currentNode.parentElement];
  if (!text || !seen(element) || ["SCRIPT", "STYLE"].includes(element.tagName)) continue;
  const range = document.createRange();
  range.selectNodeContents(walker.currentNode);
  for (const box of range.getClientRects()) texts.push([text, box, element]);
  const ratio = contrast(parse(getComputedStyle(element).color), element);
  if (ratio < least) faults.push(`contrast ${ratio.toFixed(2)}: ${text.slice(0, 60)}`);
}
for (const box of document.querySelectorAll("textarea, input")) {
  if (!seen(box) || !box.placeholder) continue;
  const style = getComputedStyle(box, "::placeholder");
  const ink = parse(style.color);
  const ratio = contrast([...ink.slice(0, 3), (ink[3] ?? 1) * Number(style.opacity)], box);
  if (ratio < least) faults.push(`contrast ${ratio.toFixed(2)}: placeholder ${box.placeholder}`);
}
// Two lines of text on each other: both must be seen, so what scrolled out of a box does not count.
const clipped = (box, element) => {
  let [left, top, right, bottom] = [box.left, box.top, box.right, box.bottom];
  for (let e = element; e; e = e.parentElement) {
    if (getComputedStyle(e).overflow === "visible") continue;
    const around = e.getBoundingClientRect();
    [left, top] = [Math.max(left, around.left), Math.max(top, around.top)];
    [right, bottom] = [Math.min(right, around.right), Math.min(bottom, around.bottom)];
  }
  return [left, top, right, bottom];
};
const boxes = texts.map(([text, box, element]) => [text, ...clipped(box, element)]).filter((b) => b[3] > b[1] && b[4] > b[2]);
for (let i = 0; i < boxes.length; i++)
  for (let j = i + 1; j < boxes.length; j++) {
    const [a, b] = [boxes[i], boxes[j]];
    const [wide, high] = [Math.min(a[3], b[3]) - Math.max(a[1], b[1]), Math.min(a[4], b[4]) - Math.max(a[2], b[2])];
    if (wide > 2 && high > 4) faults.push(`text on text: ${a[0].slice(0, 40)} | ${b[0].slice(0, 40)}`);
  }
for (const [text, box, element] of texts) {
  const [left, top, right, bottom] = clipped(box, element);
  const scrolls = (e) => e && (/auto|scroll/.test(getComputedStyle(e).overflowY) || scrolls(e.parentElement));
  if (!scrolls(element) && (bottom - top < box.height - 2 || right - left < box.width - 2))
    faults.push(`cut: ${text.slice(0, 60)}`);
}
for (const e of document.querySelectorAll("button, textarea, input, a[href]")) {
  if (!seen(e)) continue;
  const labels = [...(e.labels || [])].map((label) => label.innerText).join(" ");
  const name = e.getAttribute("aria-label") || e.innerText || labels || e.title || "";
  if (!name.trim()) faults.push(`no name: ${e.outerHTML.slice(0, 120)}`);
}
if (document.documentElement.scrollWidth > innerWidth) faults.push(`wider than the screen: ${document.documentElement.scrollWidth}`);
const ask = document.querySelector("#question textarea").getBoundingClientRect();
if (ask.bottom + scrollY > innerHeight) faults.push(`the question box ends at ${ask.bottom + scrollY} of ${innerHeight}`);
return faults;
