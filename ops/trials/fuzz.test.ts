/** A short form of the trials in `ops/trials/fuzz.ts` and `ops/trials/soak.ts`. About 4 s. */
import { expect, test } from "bun:test";
import { fuzz } from "./fuzz.ts";
import { soak } from "./soak.ts";

const SECONDS = 0.5;
const seed = Number(process.env.FUZZ_SEED ?? crypto.getRandomValues(new Uint16Array(1))[0]);

async function passes(run: typeof fuzz): Promise<void> {
  const lines: string[] = [];
  const faults = await run(SECONDS, seed, (line) => lines.push(line));
  expect(faults, `seed ${seed}\n${lines.join("\n")}`).toEqual([]);
}

test.concurrent(
  "takes any bytes from anybody, while other rooms lose nothing and nothing is left behind",
  () => passes(fuzz),
  60_000,
);
test.concurrent("holds parties for people who come, drop out, return and leave", () => passes(soak), 60_000);
