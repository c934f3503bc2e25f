/** Rooms in which everybody says too much at once, the same ones in each run; `bun run ops/trials/bursts.ts --seed N` plays others. About 3 s. */
import { expect, test } from "bun:test";
import { runBursts } from "./bursts.ts";

const SCENES = 6;

test("everybody hears the same story of a room, from the own arrival on, however much is said at once", async () => {
  const seed = 1;
  let paused = 0;
  for (let scene = 0; scene < SCENES; scene++) paused += (await runBursts(seed + scene)).paused;
  expect(paused).toBeGreaterThan(0);
}, 60_000);
