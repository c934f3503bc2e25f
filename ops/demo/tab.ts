/** A tab of a real browser, as the demo's tests use it. */
import { openPage } from "../shared/browser.ts";

export type Size = { width: number; height: number };
export const PHONE: Size = { width: 390, height: 844 };
export const LAPTOP: Size = { width: 1280, height: 720 };
export const TELEVISION: Size = { width: 1920, height: 1080 };

const PATIENCE_MS = 8_000;

/** Its `sessionStorage` is its own, so that each tab is a player. */
export class Tab {
  readonly #view: Bun.WebView;
  #size: Size;
  /** What the page has written to its console as an error. */
  readonly faults: string[] = [];

  constructor(size: Size) {
    const onConsole = (type: string, ...parts: unknown[]) => {
      if (type === "error") this.faults.push(parts.join(" "));
    };
    this.#view = openPage({ ...size, console: onConsole });
    this.#size = size;
  }

  blank(): Promise<void> {
    return this.#view.navigate("about:blank");
  }
  async open(url: string): Promise<void> {
    await this.blank(); // a change of the hash alone would load nothing, and a new tab has no size yet
    await this.resize(this.#size);
    await this.#view.navigate(url);
  }
  async resize(size: Size): Promise<void> {
    this.#size = size;
    const mobile = size.width < 500;
    await this.#view.cdp("Emulation.setDeviceMetricsOverride", { ...size, mobile, deviceScaleFactor: 1 });
  }
  reload(): Promise<void> {
    return this.#view.reload();
  }
  evaluate<T>(expression: string): Promise<T> {
    return this.#view.evaluate(expression) as Promise<T>;
  }
  /** Waits until an expression holds in the page. @returns its value */
  async until<T = unknown>(expression: string): Promise<T> {
    const value = await this.#view.evaluate(`new Promise((resolve) => {
      const deadline = performance.now() + ${PATIENCE_MS};
      (function check() {
        const value = ${expression};
        if (value || performance.now() > deadline) resolve(value || null);
        else setTimeout(check, 10);
      })();
    })`);
    if (value) return value as T;
    throw new Error(`Never came: ${expression}\n${await this.#view.evaluate("document.body.innerText")}`);
  }
  /** Waits until an element is visible and says something. */
  says(selector: string, text: string): Promise<unknown> {
    const [where, what] = [JSON.stringify(selector), JSON.stringify(text)];
    return this.until(
      `[...document.querySelectorAll(${where})].some((e) => e.checkVisibility() && e.textContent.includes(${what}))`,
    );
  }
  text(selector: string): Promise<string> {
    return this.until(`document.querySelector(${JSON.stringify(selector)})?.textContent`);
  }
  click(selector: string): Promise<void> {
    return this.#view.click(selector, { timeout: PATIENCE_MS });
  }
  async type(selector: string, text: string): Promise<void> {
    await this.click(selector);
    await this.#view.type(text);
  }
  press(key: string): Promise<void> {
    return this.#view.press(key);
  }
  async prefer(features: Record<string, string>): Promise<void> {
    const list = Object.entries(features).map(([name, value]) => ({ name, value }));
    await this.#view.cdp("Emulation.setEmulatedMedia", { features: list });
  }
  screenshot(): Promise<Blob> {
    return this.#view.screenshot();
  }
  [Symbol.dispose](): void {
    this.#view.close();
  }
}
