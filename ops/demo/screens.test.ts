/** How the demo's screens look in each state: readable, and nothing out of reach. */
import { describe, expect, test } from "bun:test";
import { whyNoBrowser } from "../shared/browser.ts";
import { INSPECT } from "./contrast.ts";
import { LAPTOP, PHONE, TELEVISION } from "./tab.ts";
import { walk } from "./tour.ts";

const SOFA_PX = 24; // on a television of 1080 lines, as makers of televisions advise
const WIDE = { width: 1366, height: 768 };
/** Buttons that can be pressed, but not seen without scrolling. */
const OUT_OF_REACH = `[...(document.querySelector("dialog[open]") ?? document).querySelectorAll("button")].filter((button) => {
  if (!button.checkVisibility()) return false;
  const { left, right, top, bottom } = button.getBoundingClientRect();
  const above = document.elementFromPoint((left + right) / 2, (top + bottom) / 2);
  return left < 0 || top < 0 || right > innerWidth || bottom > innerHeight || !button.contains(above);
}).map((button) => button.id)`;
const SIDEWAYS = "document.documentElement.scrollWidth - document.documentElement.clientWidth";

describe.skipIf(whyNoBrowser !== undefined)(`screens${whyNoBrowser ?? ""}`, () => {
  test("all texts contrast by 4.5 in both themes on every player's colour, and are readable from a sofa", async () => {
    const found: string[] = [];
    await walk(14, 12, async (state, tab, isHost) => {
      for (const theme of ["light", "dark"]) {
        await tab.prefer({ "prefers-color-scheme": theme, "prefers-reduced-motion": "reduce" });
        const { faint, smallest } = await tab.evaluate<{ faint: string[]; smallest: number }>(INSPECT);
        found.push(...faint.map((what) => `${state} ${theme} ${what}`));
        if (isHost && smallest < SOFA_PX) found.push(`${state}: ${smallest} px`);
      }
      const headings = await tab.evaluate("document.querySelectorAll('h1').length");
      if (headings !== 1) found.push(`${state}: ${headings} first headings`);
    });
    expect(found).toEqual([]);
  }, 30_000);

  test.each([1, 12, 24])(
    "with %d players no button of the host is out of sight, on a laptop or a television",
    async (players) => {
      const found: string[] = [];
      await walk(players, 1, async (state, tab, isHost) => {
        for (const size of isHost ? [LAPTOP, WIDE, TELEVISION] : [PHONE]) {
          await tab.resize(size);
          const hidden = await tab.evaluate<string[]>(OUT_OF_REACH);
          const sideways = await tab.evaluate<number>(SIDEWAYS);
          const scrolls = !isHost && /over|closed/.test(state); // a phone's long list
          if ((hidden.length > 0 && !scrolls) || sideways > 0) {
            found.push(`${state} on ${size.width}: ${hidden} out of sight, ${sideways} px too wide`);
          }
        }
      });
      expect(found).toEqual([]);
    },
    30_000,
  );
});
