/** A relay inside the test's own process, and a clock for it. */
import type { Clock, Config, RelayHandle } from "../../server.ts";
import { startRelay } from "../../server.ts";

/** A relay of the test's own, on a free port, with nothing in the log and `/metrics` always fresh. */
export function testRelay(overrides: Partial<Config> = {}): RelayHandle {
  return startRelay({ port: 0, log: () => {}, metricsMs: 0, ...overrides });
}

/** A clock that stands still until the test moves it. */
export class TestClock implements Clock {
  #now = 1_000_000;
  readonly #timers = new Set<{ due: number; run: () => void }>();
  /** The rests that were asked for, in ms; none is taken. */
  readonly rests: number[] = [];

  rest(ms: number): void {
    this.rests.push(ms);
  }

  now(): number {
    return this.#now;
  }

  epoch(): number {
    return this.#now;
  }

  after(ms: number, run: () => void): () => void {
    const timer = { due: this.#now + ms, run };
    this.#timers.add(timer);
    return () => this.#timers.delete(timer);
  }

  /** Timers that wait. */
  get pending(): number {
    return this.#timers.size;
  }

  /** Lets `ms` pass; timers run when they are due, in their order. */
  advance(ms: number): void {
    const until = this.#now + ms;
    for (;;) {
      const [next] = [...this.#timers].sort((a, b) => a.due - b.due);
      if (next === undefined || next.due > until) break;
      this.#timers.delete(next);
      this.#now = Math.max(this.#now, next.due);
      next.run();
    }
    this.#now = until;
  }

  /** Lets `ms` pass in which the process stands still: timers that fall due run late, at the end. */
  stall(ms: number): void {
    this.#now += ms;
    this.advance(0);
  }
}
