/** What is wrong with how a screen of the demo looks, from what the browser computed. */
import { LAPTOP, PHONE, TELEVISION, type Tab } from "./tab.ts";

const LEAST_CONTRAST = 4.5; // WCAG 2, level AA, for text of any size
const SOFA_PX = 24; // on a television of 1080 lines, as makers of televisions advise
const WIDE = { width: 1366, height: 768 };

type Findings = {
  /** Texts that contrast too little with what is behind them. */
  faint: string[];
  /** The smallest text, in px. */
  smallest: number;
  /** Buttons that one has to scroll to, or that something covers. */
  outOfReach: string[];
  /** Headings of the first level. */
  headings: number;
  /** What the page is too wide by, in px. */
  sideways: number;
};

/** Runs in the page, so it uses nothing from outside. */
function inspect(least: number): Findings {
  const canvas = Object.assign(document.createElement("canvas"), { width: 1, height: 1 });
  const context = canvas.getContext("2d", { willReadFrequently: true })!;
  /** @returns the relative luminance of a colour over what was painted before */
  const paint = (colour: string, alpha: number): number => {
    context.globalAlpha = alpha;
    context.fillStyle = colour;
    context.fillRect(0, 0, 1, 1);
    const [r, g, b] = [...context.getImageData(0, 0, 1, 1).data].map((part) => {
      const share = part / 255;
      return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r! + 0.7152 * g! + 0.0722 * b!;
  };
  const faint: string[] = [];
  let smallest = Infinity;
  const top = document.querySelector("dialog[open]") ?? document.body; // what is under a sheet isn't in use
  for (const element of top.querySelectorAll<HTMLElement>("*")) {
    const isInput = element instanceof HTMLInputElement;
    const texts = [...element.childNodes].filter(({ nodeType }) => nodeType === Node.TEXT_NODE).map((node) => node.textContent);
    const text = isInput ? element.value || element.placeholder : texts.join("");
    if (text.trim() === "" || !element.checkVisibility({ visibilityProperty: true }) || element.offsetWidth < 2) continue;
    const style = getComputedStyle(element, isInput && element.value === "" ? "::placeholder" : undefined);
    const layers: HTMLElement[] = [];
    for (let at: HTMLElement | null = element; at !== null; at = at.parentElement) layers.unshift(at);
    let back = paint("white", 1);
    let alpha = 1;
    for (const layer of layers) {
      const { backgroundColor, opacity } = getComputedStyle(layer);
      alpha *= Number(opacity);
      back = paint(backgroundColor, alpha);
    }
    const front = paint(style.color, isInput ? alpha * Number(style.opacity) : alpha);
    const ratio = (Math.max(front, back) + 0.05) / (Math.min(front, back) + 0.05);
    if (ratio < least) faint.push(`${ratio.toFixed(2)} ${element.id || element.className || element.tagName} “${text}”`);
    smallest = Math.min(smallest, Number.parseFloat(style.fontSize));
  }
  const outOfReach = [...top.querySelectorAll("button")].filter((button) => {
    if (!button.checkVisibility()) return false;
    const { left, right, top, bottom } = button.getBoundingClientRect();
    const above = document.elementFromPoint((left + right) / 2, (top + bottom) / 2);
    return left < 0 || top < 0 || right > innerWidth || bottom > innerHeight || !button.contains(above);
  });
  const { scrollWidth, clientWidth } = document.documentElement;
  return {
    faint,
    smallest,
    outOfReach: outOfReach.map((button) => button.id),
    headings: document.querySelectorAll("h1").length,
    sideways: scrollWidth - clientWidth,
  };
}

/**
 * Looks at a state of a screen in both themes, and at the host's on two laptops and a television.
 * @returns what is wrong with it
 */
export async function faultsOf(state: string, tab: Tab, isHost: boolean): Promise<string[]> {
  const faults: string[] = [];
  const say = (what: string) => faults.push(`${isHost ? "host" : "guest"}, ${state}: ${what}`);
  const look = () => tab.evaluate<Findings>(`(${inspect})(${LEAST_CONTRAST})`);
  for (const theme of ["dark", "light"]) {
    await tab.prefer({ "prefers-color-scheme": theme, "prefers-reduced-motion": "reduce" });
    const { faint, headings } = await look();
    for (const text of faint) say(`contrast by ${theme}: ${text}`);
    if (headings !== 1) say(`${headings} first headings`);
  }
  if (/^won-by-(?!1$)/.test(state)) return faults; // as the first, but for the colour
  for (const size of isHost ? [LAPTOP, WIDE, TELEVISION] : [PHONE]) {
    await tab.resize(size);
    const { smallest, outOfReach, sideways } = await look();
    const scrolls = !isHost && /over|closed/.test(state); // a phone's long list of standings
    if (outOfReach.length > 0 && !scrolls) say(`out of reach at ${size.width}: ${outOfReach.join(", ")}`);
    if (sideways > 0) say(`${sideways} px too wide at ${size.width}`);
    if (size === TELEVISION && smallest < SOFA_PX) say(`a text of ${smallest} px`);
  }
  return faults;
}
