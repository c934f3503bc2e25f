/** How the demo's screens look in each state; `axe.real.ts` looks at more of them. */
import { expect, test } from "bun:test";
import { whyNoBrowser } from "../shared/browser.ts";
import { faultsOf } from "./inspect.ts";
import { walk } from "./tour.ts";

test.skipIf(whyNoBrowser !== undefined)(
  `screens with 24 players are readable on every colour by day and night, from a sofa too, and no button is out of reach${whyNoBrowser ?? ""}`,
  async () => {
    const faults: string[] = [];
    await walk(24, 12, async (...state) => void faults.push(...(await faultsOf(...state))));
    expect(faults).toEqual([]);
  },
  30_000,
);
