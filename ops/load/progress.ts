/** How numbers are written, and a bar on stderr that is drawn over itself; if stderr is no terminal, a line a second. */

/** The ways in which figures are written. */
export const thousands = (value: number) => Math.round(value).toLocaleString("en-US");
export const milliseconds = (value: number) => (value < 10 ? value.toFixed(2) : value.toFixed(1));
export const figure = (value: number | null) => (value === null ? "n/a" : Number(value.toPrecision(3)).toLocaleString("en-US"));
export const percent = (share: number | null) => (share === null ? "n/a" : `${(share * 100).toFixed(1)} %`);

export class Progress {
  prefix = "";
  readonly #terminal = process.stderr.isTTY;
  readonly everyMs = this.#terminal ? 100 : 1000;
  #shownAt = 0;

  show(what: string, done: number, all: number, unit = "", deliveries?: number): void {
    if (performance.now() - this.#shownAt < this.everyMs) return;
    this.#shownAt = performance.now();
    const part = Math.min(1, done / all);
    const filled = Math.round(part * 24);
    const bar = `[${"#".repeat(filled)}${".".repeat(24 - filled)}]`;
    const figures = `${Number(done.toFixed(1))}/${Number(all.toFixed(1))} ${unit}`;
    const count = deliveries ? `, ${thousands(deliveries)} deliveries` : "";
    const line = `${this.prefix}${what} ${bar} ${figures}${count}`;
    process.stderr.write(this.#terminal ? `\r\x1b[K${line}` : `${line}\n`);
  }

  clear(): void {
    if (this.#terminal) process.stderr.write("\r\x1b[K");
  }
}
