/** A tab of a real browser, as the demo's tests use it. */
import { openPage } from "../shared/browser.ts";

/** A window's inside, in CSS pixels. */
type Size = { width: number; height: number };
/** A phone of usual size, upright. */
export const PHONE: Size = { width: 390, height: 844 };
/** The smallest laptop that the host's screen is made for. */
export const LAPTOP: Size = { width: 1280, height: 720 };
/** A television's 1080 lines. */
export const TELEVISION: Size = { width: 1920, height: 1080 };

const PATIENCE_MS = 8_000;

/** Its `sessionStorage` is its own, so that each tab is a player. */
export class Tab {
  readonly #view: Bun.WebView;
  /** Its window has its size: done while other tabs still load. */
  readonly #prepared: Promise<void>;
  #isBlank = false;
  /** What the page has written to its console as an error. */
  readonly faults: string[] = [];

  constructor(size: Size) {
    const onConsole = (type: string, ...parts: unknown[]) => {
      if (type === "error") this.faults.push(parts.join(" "));
    };
    this.#view = openPage({ ...size, console: onConsole });
    this.#prepared = this.blank().then(() => this.resize(size)); // a tab that shows nothing has no size yet
    this.#prepared.catch(() => {}); // `open` fails
  }

  /** Leaves the page, as who follows a link does. */
  async blank(): Promise<void> {
    await this.#view.navigate("about:blank");
    this.#isBlank = true;
  }
  /** Loads a page anew, also if only the hash differs. */
  async open(url: string): Promise<void> {
    await this.#prepared;
    if (!this.#isBlank) await this.blank(); // a change of the hash alone would load nothing
    this.#isBlank = false;
    await this.#view.navigate(url);
  }
  /** Gives the page another window; one below 500 px is a phone's. */
  async resize(size: Size): Promise<void> {
    const mobile = size.width < 500;
    await this.#view.cdp("Emulation.setDeviceMetricsOverride", { ...size, mobile, deviceScaleFactor: 1 });
  }
  reload(): Promise<void> {
    return this.#view.reload();
  }
  /** What an expression gives in the page, a promise's result included. */
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
  /** An element's text, once it has one. */
  text(selector: string): Promise<string> {
    return this.until(`document.querySelector(${JSON.stringify(selector)})?.textContent`);
  }
  /** Clicks an element, once it can be clicked. */
  click(selector: string): Promise<void> {
    return this.#view.click(selector, { timeout: PATIENCE_MS });
  }
  /** Clicks a field and types into it. */
  async type(selector: string, text: string): Promise<void> {
    await this.click(selector);
    await this.#view.type(text);
  }
  /** Presses a key, by its DOM name, on what has the focus. */
  press(key: string): Promise<void> {
    return this.#view.press(key);
  }
  /** Sets CSS media features, such as `prefers-color-scheme`. */
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
