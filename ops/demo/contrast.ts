/** What a page's visible texts contrast by with what is behind them, from the colours that the browser computed. */

const LEAST = 4.5; // WCAG 2, level AA, for text of any size

/** Runs in the page, so it uses nothing from outside. @returns texts that contrast too little, and the smallest size of all in px */
function inspect(least: number): { faint: string[]; smallest: number } {
  const canvas = Object.assign(document.createElement("canvas"), { width: 1, height: 1 });
  const context = canvas.getContext("2d", { willReadFrequently: true })!;
  /** Relative luminance of one colour over what was painted before. */
  const paint = (colour: string, alpha = 1): number => {
    context.globalAlpha = alpha;
    context.fillStyle = colour;
    context.fillRect(0, 0, 1, 1);
    const [r, g, b] = [...context.getImageData(0, 0, 1, 1).data].map((part) => {
      const share = part / 255;
      return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r! + 0.7152 * g! + 0.0722 * b!;
  };
  const modal = document.querySelector("dialog[open]") ?? document.body; // what is under a sheet isn't to be read
  const faint: string[] = [];
  let smallest = Infinity;
  for (const element of modal.querySelectorAll<HTMLElement>("*")) {
    const isInput = element instanceof HTMLInputElement;
    const own = [...element.childNodes].filter(({ nodeType }) => nodeType === Node.TEXT_NODE);
    const text = isInput ? element.value || element.placeholder : own.map((node) => node.textContent).join("");
    if (text.trim() === "" || !element.checkVisibility({ visibilityProperty: true }) || element.offsetWidth < 2) continue;
    const style = getComputedStyle(element, isInput && element.value === "" ? "::placeholder" : undefined);
    const layers: HTMLElement[] = [];
    for (let at: HTMLElement | null = element; at !== null; at = at.parentElement) layers.unshift(at);
    paint("white");
    let back = 1;
    let alpha = 1;
    for (const layer of layers) {
      const { backgroundColor, opacity } = getComputedStyle(layer);
      alpha *= Number(opacity);
      back = paint(backgroundColor, alpha);
    }
    const front = paint(style.color, alpha * Number(isInput ? style.opacity : 1));
    const ratio = (Math.max(front, back) + 0.05) / (Math.min(front, back) + 0.05);
    if (ratio < least) faint.push(`${ratio.toFixed(2)} ${element.id || element.className || element.tagName}: ${text}`);
    smallest = Math.min(smallest, Number.parseFloat(style.fontSize));
  }
  return { faint, smallest };
}

/** The same as an expression, for the page. */
export const INSPECT = `(${inspect})(${LEAST})`;
