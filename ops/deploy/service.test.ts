/** The unit for systemd, as systemd reads it. `service.real.ts` starts a systemd with it. */
import { describe, expect, test } from "bun:test";
import { join } from "node:path";
import { LIMITS } from "../../server.ts";
import { temporaryDirectory } from "../shared/directory.ts";
import { run } from "../shared/processes.ts";

const LONGEST_DRAIN_SECONDS = 300; // a game
const NAME = "party-sockets.service";
const unit = await Bun.file(join(import.meta.dir, NAME)).text();

const whyNot = Bun.which("systemd-analyze") === null ? " (skipped: without systemd-analyze, of systemd)" : undefined;

/** Runs systemd-analyze on the unit, with a program in Bun's place that is on every machine. */
async function analyze(...command: string[]) {
  await using directory = await temporaryDirectory("unit");
  const path = join(directory.path, NAME);
  await Bun.write(path, unit.replaceAll("/usr/local/bin/bun", "/bin/true"));
  const { exitCode, stdout, stderr } = await run(["systemd-analyze", ...command, path]);
  return { exitCode, printed: stdout + stderr };
}

describe("the unit", () => {
  test("leaves the relay time to drain, and files for all its sockets", () => {
    const seconds = (name: string) => Number(new RegExp(`^${name}=(\\d+)$`, "m").exec(unit)?.[1]);
    expect(seconds("TimeoutStopSec")).toBeGreaterThan(LONGEST_DRAIN_SECONDS);
    expect(seconds("LimitNOFILE")).toBeGreaterThan(LIMITS.maxConnections);
  });

  describe.skipIf(whyNot !== undefined)(`by systemd's judgement${whyNot ?? ""}`, () => {
    test("has no fault", async () => {
      expect(await analyze("verify")).toEqual({ exitCode: 0, printed: "" });
    });

    test("gives away next to nothing", async () => {
      const { exitCode, printed } = await analyze("security", "--offline=true", "--threshold=20"); // 2.0 of 10
      expect(printed).toContain("Overall exposure level");
      expect(exitCode).toBe(0);
    });
  });
});
