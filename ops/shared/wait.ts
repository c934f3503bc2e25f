/** Waiting that ends: each wait has a deadline, and says what it waited for. */

/** Longer than anything takes that works, on a machine that is busy. */
export const PATIENCE_MS = 10_000;

const POLL_MS = 20;

/** What a promise gives. @throws if that takes longer than `ms` */
export async function within<T>(promise: Promise<T>, what: string, ms = PATIENCE_MS): Promise<T> {
  let timer: Timer | undefined;
  const late = new Promise<never>((_, reject) => {
    timer = setTimeout(() => reject(new Error(`waited ${ms / 1000} s for ${what}`)), ms);
  });
  return Promise.race([promise, late]).finally(() => clearTimeout(timer));
}

/**
 * Looks again and again, every 20 ms, for what tells nobody when it happens. @returns what `look` gives once that is neither
 * undefined nor false. @throws if that takes longer than `ms`
 */
export async function until<T>(
  what: string,
  look: () => T | undefined | false | Promise<T | undefined | false>,
  ms = PATIENCE_MS,
): Promise<T> {
  const end = performance.now() + ms;
  for (;;) {
    const seen = await within(Promise.resolve(look()), what, Math.max(1, end - performance.now()));
    if (seen !== undefined && seen !== false) return seen;
    if (performance.now() > end) throw new Error(`waited ${ms / 1000} s for ${what}`);
    await Bun.sleep(POLL_MS);
  }
}
