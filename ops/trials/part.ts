/** A process that takes part in a trial: it is told something in a line, and answers in one. */
import { Child, type ChildOptions } from "../shared/processes.ts";
import { within } from "../shared/wait.ts";

export class Part extends Child {
  #taken = 0;
  #isOver = false;

  constructor(command: string[], options?: ChildOptions) {
    super(command, options);
    void this.exited.then(() => (this.#isOver = true));
  }

  /** The next line that it prints. @throws if it ends before, or `ms` pass */
  async next(ms: number): Promise<string> {
    const index = this.#taken++;
    const look = async (): Promise<string> => {
      for (; this.lines.length <= index; await Bun.sleep(5)) if (this.#isOver) throw new Error("it ended before it answered");
      return this.lines[index] as string;
    };
    return within(look(), "its answer", ms);
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
