/** Rooms in which everybody says too much at once, the same ones in each run; `bun run ops/trials/bursts.ts --seed N` plays others. About 3 s. */
import { expect, test } from "bun:test";
import { runBursts } from "./bursts.ts";

const SEEDS = [1, 2, 3, 4, 5, 31_023, 76_891];

test("everybody hears the same story of a room, from the own arrival on, however much is said at once", async () => {
  let paused = 0;
  for (const seed of SEEDS) paused += (await runBursts(seed)).paused;
  expect(paused).toBeGreaterThan(0);
}, 60_000);
