/** Waiting that ends: each wait has a deadline, and says what it waited for. */

/** Longer than anything takes that works, on a machine that is busy. */
export const PATIENCE_MS = 10_000;

const POLL_MS = 20;

/** What was waited for didn't happen in time. */
export class TooLate extends Error {
  constructor(what: string, ms: number) {
    super(`waited ${ms / 1000} s for ${what}`);
  }
}

/** What a promise gives. @throws TooLate after `ms` */
export async function within<T>(promise: Promise<T>, what: string, ms = PATIENCE_MS): Promise<T> {
  let timer: Timer | undefined;
  const late = new Promise<never>((_, reject) => {
    timer = setTimeout(() => reject(new TooLate(what, ms)), ms);
  });
  return Promise.race([promise, late]).finally(() => clearTimeout(timer));
}

/**
 * Looks again and again, every 20 ms, for what tells nobody when it happens. @returns what `look` gives once that is neither
 * undefined nor false. A `look` that takes long has to have a deadline of its own.
 * @throws TooLate after `ms`
 */
export async function until<T>(
  what: string,
  look: () => T | undefined | false | Promise<T | undefined | false>,
  ms = PATIENCE_MS,
): Promise<T> {
  const end = performance.now() + ms;
  for (;;) {
    const seen = await look();
    if (seen !== undefined && seen !== false) return seen;
    if (performance.now() > end) throw new TooLate(what, ms);
    await Bun.sleep(POLL_MS);
  }
}
