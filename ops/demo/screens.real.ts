/** How the demo's screens look in each state. */
import { describe, expect, test } from "bun:test";
import { whyNoBrowser } from "../shared/browser.ts";
import { faultsOf } from "./inspect.ts";
import { walk } from "./tour.ts";

describe.skipIf(whyNoBrowser !== undefined)(`screens${whyNoBrowser ?? ""}`, () => {
  // Twelve rounds bring all colours; fourteen players, that so many are left to win one.
  test.each([
    [1, 1],
    [4, 2],
    [12, 1],
    [14, 12],
    [24, 1],
  ])(
    "with %d players and %d rounds are readable by day, by night and from a sofa, and no button is out of reach",
    async (players, rounds) => {
      const faults: string[] = [];
      await walk(players, rounds, async (...state) => void faults.push(...(await faultsOf(...state))));
      expect(faults).toEqual([]);
    },
    60_000,
  );
});
