/** A process that takes part in a trial: it is told something in a line, and answers in one. */
import { Child } from "../shared/processes.ts";

export class Part extends Child {
  #taken = 0;

  /** The next line that it prints. @throws if it ends before, or `ms` pass */
  next(ms: number): Promise<string> {
    return this.lineAt(this.#taken++, ms);
  }

  /** @throws as `next` does, and if the answer is what a crash prints */
  async ask<T>(line: string, ms: number): Promise<T> {
    this.type(`${line}\n`);
    const answer = await this.next(ms);
    if (answer.startsWith("{")) return JSON.parse(answer) as T;
    await Bun.sleep(100); // for the rest of what it prints
    throw new Error(this.lines.slice(this.#taken - 1).join(" "));
  }
}
