/** What axe-core, the accessibility checker, says of the demo's screens. It comes from npm, into a temporary directory. */
import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { whyNoBrowser } from "../shared/browser.ts";
import { temporaryDirectory } from "../shared/directory.ts";
import { run } from "../shared/processes.ts";
import { walk } from "./tour.ts";

const AXE = "axe-core@4.14.1";
const missing = whyNoBrowser ?? (Bun.which("npm") ? undefined : " (skipped: no npm on this machine)");

describe.skipIf(missing !== undefined)(`axe-core${missing ?? ""}`, () => {
  let directory: Awaited<ReturnType<typeof temporaryDirectory>>;
  let axe = "";
  beforeAll(async () => {
    directory = await temporaryDirectory("axe");
    const command = ["npm", "install", "--no-save", "--no-audit", "--no-fund", "--ignore-scripts", AXE];
    const { exitCode, stderr } = await run(command, { cwd: directory.path });
    if (exitCode !== 0) throw new Error(`npm can't install ${AXE}: ${stderr}`);
    axe = await Bun.file(`${directory.path}/node_modules/axe-core/axe.min.js`).text();
  }, 60_000);
  afterAll(() => directory[Symbol.asyncDispose]());

  test("finds nothing on any screen, by day or by night", async () => {
    const found: string[] = [];
    await walk(4, 2, async (state, tab) => {
      for (const theme of ["light", "dark"]) {
        await tab.prefer({ "prefers-color-scheme": theme, "prefers-reduced-motion": "reduce" });
        const faults = await tab.evaluate<string[]>(`(async () => {
          if (!window.axe) (0, eval)(${JSON.stringify(axe)});
          const { violations } = await axe.run(document, { resultTypes: ["violations"] });
          return violations.flatMap(({ id, nodes }) => nodes.map(({ html, failureSummary }) => id + ": " + html + " " + failureSummary));
        })()`);
        found.push(...faults.map((fault) => `${state}, ${theme}: ${fault}`));
      }
    });
    expect(found).toEqual([]);
  }, 60_000);
});
