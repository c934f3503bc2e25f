/** A short form of everything at once, with the real nginx and the real Prometheus: one restart and one kill. About 35 s. */
import { describe, expect, test } from "bun:test";
import { run } from "../shared/processes.ts";
import { whyNoPrometheus } from "../shared/prometheus.ts";
import { nginx } from "../shared/proxies.ts";

const TOOL = [process.execPath, "run", `${import.meta.dir}/everything.ts`];
const whyNot = nginx.whyNot || (whyNoPrometheus ?? "");

describe.skipIf(whyNot !== "")(`everything at once${whyNot}`, () => {
  test("loses nothing but what rooms took with them that ended with their relay", async () => {
    const flags = ["--minutes", "0.2", "--restarts", "1", "--drain", "2", "--parties", "4"];
    const { exitCode, stdout, stderr } = await run([...TOOL, ...flags], {}, 110_000);
    expect({ exitCode, faults: stdout.match(/faults: (.|\n)*/)?.[0] ?? "", stderr }).toEqual({
      exitCode: 0,
      faults: "",
      stderr: "",
    });
    expect(stdout).toMatch(/^restart at \d+ s: exit 0 after/m);
    expect(stdout).toMatch(/^kill at \d+ s: exit 137 after/m);
    expect(stdout).toMatch(/^the end at \d+ s: exit 0 after/m);
    const [, rooms, deliveries, lost] =
      /^ordinary parties: (\d+) rooms, \d+ messages, (\d+) deliveries, (\d+) lost/m.exec(stdout) ?? [];
    expect(Number(rooms)).toBe(12);
    expect(Number(deliveries)).toBeGreaterThan(0);
    expect(lost).toBe("0");
  }, 120_000);
});

test.each([
  [["--minutes", "0"], "--minutes must be a number up to 600"],
  [["--restarts", "x"], "--restarts must be a whole number"],
])("%p is refused with 2, and why", async (flags, fault) => {
  const { exitCode, stderr } = await run([...TOOL, ...flags]);
  expect(stderr).toContain(fault);
  expect(exitCode).toBe(2);
});
